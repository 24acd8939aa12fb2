//! Registration and identity (PROTOCOL.md 1 and 2, Register).

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use hostlink_edge::wire::http::{REGISTER_PATH, RegisterRequest};

use crate::support::server::{AGENT_ID, TOKEN_KEY};
use crate::support::{Agent, Answer, Event, Log, ScriptedServer, program};

fn registrations(log: &Log) -> Vec<(RegisterRequest, u16)> {
    let registration = |event: &Event| match event {
        Event::Registration { request, status } => Some((request.as_ref().clone(), *status)),
        _ => None,
    };
    log.after(0).filter_map(registration).collect()
}

#[test]
fn identity_is_stored_and_used_after_a_restart() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    let read = |name: &str| std::fs::read_to_string(agent.state().join(name)).expect(name);
    let stored: serde_json::Value = serde_json::from_str(&read("agent.json")).expect("JSON");
    server.check_eq(stored["agent_id"].as_str(), Some(AGENT_ID), "agent.json");
    let fingerprint: serde_json::Value =
        serde_json::from_str(&read("fingerprint.json")).expect("JSON");
    let sent = server.look(|log| registrations(log)[0].0.fingerprint.clone());
    server.check_eq(
        fingerprint["fingerprint"].as_str(),
        Some(sent.as_str()),
        "fingerprint",
    );
    let key = read("agent.key");
    server.check(
        key.starts_with("-----BEGIN RSA PRIVATE KEY-----"),
        "PKCS#1 PEM",
    );
    let mode = std::fs::metadata(agent.state().join("agent.key")).expect("agent.key");
    server.check_eq(mode.permissions().mode() & 0o777, 0o600, "mode of the key");

    agent.terminate();
    agent.start_again();
    server.wait_until("a second session", |log| log.hello(2).is_some());
    let count = server.look(|log| registrations(log).len());
    server.check_eq(count, 1, "registrations");
}

#[test]
fn a_wrong_token_is_tried_again_until_it_is_taken() {
    let server = ScriptedServer::start();
    let tries = AtomicUsize::new(0);
    server.on_http(move |request| {
        if request.path != REGISTER_PATH {
            return None;
        }
        match tries.fetch_add(1, Ordering::SeqCst) {
            0 => Some(Answer::status(401)),
            1 => Some(Answer::status(500)),
            2 => Some(Answer {
                body: "no JSON".into(),
                ..Answer::status(403)
            }),
            _ => None,
        }
    });
    let agent = Agent::start(&server);
    server.link();
    let statuses: Vec<u16> = server.look(|log| {
        registrations(log)
            .iter()
            .map(|(_, status)| *status)
            .collect()
    });
    server.check_eq(
        statuses,
        vec![401, 500, 403, 200],
        "answers to registrations",
    );
    let names: Vec<String> = server.look(|log| {
        let requests = registrations(log).into_iter();
        requests
            .map(|(request, _)| request.fingerprint + &request.public_key)
            .collect()
    });
    server.check(
        names.iter().all(|name| *name == names[0]),
        "each try is of the same device and key",
    );
    agent.wait_line("401");
    server.check(!agent.log().contains(TOKEN_KEY), "the token is not logged");
}

#[test]
fn without_token_it_says_so_and_goes_on() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    agent.unset("HOSTLINK_TOKEN_ID");
    agent.unset("HOSTLINK_TOKEN_KEY");
    agent.start_again();
    agent.wait_line("HOSTLINK_TOKEN");
    server.check(!agent.has_ended(), "the agent goes on");
    let status = agent.terminate();
    server.check_eq(status.code(), Some(0), "exit status after SIGTERM");
}

#[test]
fn a_damaged_agent_json_registers_again() {
    for damage in [
        &b""[..],
        b"{\"agent_id\":",
        b"[]",
        b"\xff\xfe",
        b"{\"agent_id\":\"\"}",
    ] {
        let server = ScriptedServer::start();
        let mut agent = Agent::start(&server);
        server.link();
        agent.terminate();
        std::fs::write(agent.state().join("agent.json"), damage).expect("writable");
        agent.start_again();
        server.wait_until("a second session", |log| log.hello(2).is_some());
        let requests = server.look(registrations);
        server.check_eq(requests.len(), 2, "registrations");
        server.check_eq(
            (&requests[0].0.fingerprint, &requests[0].0.public_key),
            (&requests[1].0.fingerprint, &requests[1].0.public_key),
            "fingerprint and key stay",
        );
    }
}

#[test]
fn a_damaged_key_ends_the_start_and_is_not_touched() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    agent.terminate();
    let path = agent.state().join("agent.key");
    for damage in [
        &b""[..],
        b"-----BEGIN RSA PRIVATE KEY-----\nAAAA\n",
        b"\0\0\0\0",
    ] {
        std::fs::write(&path, damage).expect("writable");
        agent.start_again();
        let status = agent.wait_exit();
        server.check_eq(status.code(), Some(78), "exit status");
        agent.wait_line(&path.display().to_string());
        let after = std::fs::read(&path).expect("the key is still there");
        server.check_eq(after.as_slice(), damage, "the file is untouched");
    }
}

#[test]
fn other_keys_of_agent_json_are_kept() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    let path = agent.state().join("agent.json");
    std::fs::write(&path, r#"{"site":"north","agent_id":""}"#).expect("writable");
    agent.start_again();
    server.link();
    let stored = std::fs::read(&path).expect("agent.json");
    let stored: serde_json::Value = serde_json::from_slice(&stored).expect("JSON");
    server.check_eq(
        (stored["site"].as_str(), stored["agent_id"].as_str()),
        (Some("north"), Some(AGENT_ID)),
        "agent.json",
    );
}

/// What `hostlink-edge status` prints and exits with, asked beside the agent.
fn ask_status(agent: &Agent) -> (String, Option<i32>) {
    let output = Command::new(program())
        .arg("status")
        .env("HOSTLINK_STATE_PATH", agent.state())
        .output()
        .expect("the program runs");
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        output.status.code(),
    )
}

#[test]
fn status_says_why_a_device_is_not_registered() {
    let server = ScriptedServer::start();
    server.on_http(|request| (request.path == REGISTER_PATH).then(|| Answer::status(401)));
    for (store, exit_status) in [("disk", 1), ("memory", 3)] {
        let agent = Agent::with(&server, &[("HOSTLINK_LOCAL_STORE", store)]);
        agent.wait_line("not registered, trying again");
        let (shown, code) = ask_status(&agent);
        for part in ["not registered", "session   registering", "last ", "401"] {
            server.check(shown.contains(part), &format!("{part} in {shown}"));
        }
        server.check_eq(code, Some(exit_status), store);
    }
}
