//! PROTOCOL.md 4.8: polling pauses while a session with `delivery_enabled` is active, and resumes
//! when it has been down for the threshold.

use std::time::Duration;

use crate::support::{Agent, Answer, Event, Log, ScriptedServer};

const SETTINGS: [(&str, &str); 3] = [
    ("HOSTLINK_TASK_POLL_INTERVAL", "50ms"),
    ("HOSTLINK_HEARTBEAT_INTERVAL", "50ms"),
    ("HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD", "2s"),
];

fn polls(log: &Log, mark: usize) -> usize {
    log.after(mark).filter(|e| matches!(e, Event::Poll)).count()
}

fn heartbeats(log: &Log, mark: usize) -> usize {
    log.after(mark)
        .filter(|e| matches!(e, Event::Heartbeat))
        .count()
}

/// Heartbeats go on whatever the gate does: they are the clock of these tests.
fn wait_heartbeats(server: &ScriptedServer, number: usize) -> usize {
    let mark = server.mark();
    server.wait_until("heartbeats", |log| heartbeats(log, mark) >= number);
    mark
}

#[test]
fn polling_pauses_with_delivery_and_resumes_after_the_threshold() {
    let server = ScriptedServer::start();
    server.refuse_upgrades(Answer::status(503));
    let _agent = Agent::with(&server, &SETTINGS);
    server.wait_until("polls from the start", |log| polls(log, 0) >= 3);
    server.allow_upgrades();
    server.link();
    // A poll may have been on its way when the session became active.
    wait_heartbeats(&server, 5);
    let mark = wait_heartbeats(&server, 20);
    server.check_eq(
        server.look(|log| polls(log, mark)),
        0,
        "polls with a session",
    );

    server.refuse_upgrades(Answer::status(503));
    server.cut();
    let cut_at = server.look(|log| log.times(|_| true).last().copied());
    let mark = server.mark();
    server.wait_until("a poll after the threshold", |log| polls(log, mark) > 0);
    let resumed_at = server.look(|log| {
        let mut entries = log.entries[mark..].iter();
        entries
            .find(|e| matches!(e.event, Event::Poll))
            .map(|e| e.at)
    });
    let waited = resumed_at.zip(cut_at).map(|(resumed, cut)| resumed - cut);
    server.check(
        waited.is_some_and(|waited| waited >= Duration::from_millis(1900)),
        &format!("polling resumed after {waited:?}"),
    );
}

#[test]
fn a_short_interruption_does_not_resume_polling() {
    let server = ScriptedServer::start();
    let mut settings = SETTINGS;
    settings[2].1 = "30s";
    let _agent = Agent::with(&server, &settings);
    server.link();
    wait_heartbeats(&server, 5);
    let mark = server.mark();
    server.cut();
    server.link();
    wait_heartbeats(&server, 10);
    server.check_eq(server.look(|log| polls(log, mark)), 0, "polls");
}

#[test]
fn polling_goes_on_without_delivery() {
    let server = ScriptedServer::start();
    server.policy(|policy| policy.delivery_enabled = false);
    let _agent = Agent::with(&server, &SETTINGS);
    server.link();
    let mark = wait_heartbeats(&server, 5);
    server.wait_until("polls beside the session", |log| polls(log, mark) >= 5);
}

#[test]
fn polling_goes_on_if_the_agent_has_delivery_disabled() {
    let server = ScriptedServer::start();
    let _agent = Agent::with(
        &server,
        &[
            ("HOSTLINK_TASK_POLL_INTERVAL", "50ms"),
            ("HOSTLINK_WS_DELIVERY_ENABLED", "false"),
        ],
    );
    let hello = server.wait_hello(1);
    server.check(!hello.capabilities.delivery_enabled, "the hello says so");
    server.link();
    let mark = server.mark();
    server.wait_until("polls beside the session", |log| polls(log, mark) >= 5);
}

#[test]
fn without_websocket_tasks_are_polled_and_reported() {
    let server = ScriptedServer::start();
    let task = crate::support::Task::new("plain", "echo by HTTP alone");
    server.policy(|policy| policy.poll_tasks = vec![task.polled()]);
    let _agent = Agent::with(
        &server,
        &[
            ("HOSTLINK_WS_ENABLED", "false"),
            ("HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD", "0s"),
        ],
    );
    let output = server.wait_for("the report", |log| {
        log.reports(&task.ids)
            .first()
            .map(|report| report.output.clone())
    });
    server.check_eq(output.as_deref(), Some("by HTTP alone\n"), "output");
    server.check_eq(server.look(|log| log.connections()), 0, "connections");
}
