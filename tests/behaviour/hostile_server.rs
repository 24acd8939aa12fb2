//! Servers and middle boxes that misbehave: the agent says why it leaves, waits before it tries
//! again, stays small and is there when a good server comes.

use serde_json::json;

use crate::support::front::{CLOSE, Front, Script, Victim, frame};
use crate::support::tls::{Flaw, TestCa, terminate};
use crate::support::{Agent, ScriptedServer, Task};

/// Frames of up to 1 MiB are read; nothing may be kept of them, and nothing larger is read.
const GROWTH_KIB_MAX: u64 = 6 * 1024;

const TEXT: u8 = 0x81;
const PING: u8 = 0x89;

/// What happens, what is done, and what the agent must say of it.
type Case = (&'static str, Script, &'static str);

/// The agent meets all of them, one connection after another.
fn survives(cases: Vec<Case>) {
    survives_before(cases, None);
}

/// The same, over TLS if there is an authority.
fn survives_before(cases: Vec<Case>, ca: Option<&TestCa>) {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    let front = match ca {
        Some(ca) => {
            let front = Front::before(terminate(ca, server.port()));
            let file = ca.write_pem(agent.path("ca.pem"));
            agent.set("HOSTLINK_CA_FILE", &file);
            agent.set("HOSTLINK_WS_URL", &front.secure_websocket_url());
            front
        }
        None => {
            let front = Front::before(server.port());
            agent.set("HOSTLINK_WS_URL", &front.websocket_url());
            front
        }
    };
    agent.start_again();
    server.run_another("before");
    let peak = agent.peak_resident_kib();
    let before = (complaints(&agent).len(), front.accepted());
    let mut expected = vec![("the cut", "disconnected")];
    for (what, script, says) in cases {
        front.next(script);
        expected.push((what, says));
    }
    server.cut();
    server.wait_until("a good session", |log| log.hello(2).is_some());
    server.run_another("afterwards");
    let said = complaints(&agent).split_off(before.0);
    for (number, (what, says)) in expected.iter().enumerate() {
        let line = said.get(number).map_or("nothing", String::as_str);
        let fits = line.to_lowercase().contains(&says.to_lowercase());
        server.check(
            fits,
            &format!("after {what} it says {says:?}, not {line:?}"),
        );
    }
    server.check_eq(said.len(), expected.len(), "complaints");
    server.check_eq(front.accepted() - before.1, expected.len(), "connections");
    let grown = agent.peak_resident_kib().saturating_sub(peak);
    server.check(grown < GROWTH_KIB_MAX, &format!("{grown} KiB of memory"));
}

/// One line for each connection that failed or ended.
fn complaints(agent: &Agent) -> Vec<String> {
    let text = agent.log().text();
    let lines = text.lines().filter(|line| line.contains("next try in"));
    lines.map(str::to_owned).collect()
}

/// After the upgrade these bytes are sent, and then the agent's end is waited for.
fn sends(what: &'static str, bytes: Vec<u8>, says: &'static str) -> Case {
    let script = move |victim: &mut Victim| {
        victim.upgrade();
        victim.send(&bytes);
        victim.drain();
    };
    (what, Box::new(script), says)
}

/// These bytes are the answer to the upgrade; `ACCEPT` becomes the right key.
fn answers(what: &'static str, text: &'static str, says: &'static str) -> Case {
    let script = move |victim: &mut Victim| {
        let accept = victim.read_request();
        victim.send(text.replace("ACCEPT", &accept).as_bytes());
        victim.hang_up();
    };
    (what, Box::new(script), says)
}

fn lying(length: u64) -> Vec<u8> {
    let mut bytes = vec![TEXT, 127];
    bytes.extend(length.to_be_bytes());
    bytes.extend([b'x'; 100]);
    bytes
}

#[test]
fn frames_that_break_the_rules() {
    let mut masked = vec![TEXT, 0x82];
    masked.extend([1, 2, 3, 4, b'h' ^ 1, b'i' ^ 2]);
    let mut half = frame(TEXT, &[b'x'; 100]);
    half.truncate(12);
    survives(vec![
        sends("opcode 3", frame(0x83, b"hi"), "opcode"),
        sends("opcode 11", frame(0x8b, b"hi"), "opcode"),
        sends("a reserved bit", frame(0xc1, b"hi"), "reserved"),
        sends("a masked frame", masked, "mask"),
        sends("a ping in fragments", frame(0x09, b"hi"), "fragment"),
        sends(
            "a ping of 126 bytes",
            frame(PING, &[b'x'; 126]),
            "125 bytes or less",
        ),
        sends(
            "a continuation of nothing",
            frame(0x80, b"hi"),
            "nothing to continue",
        ),
        sends(
            "a text within a text",
            [frame(0x01, b"{"), frame(TEXT, b"}")].concat(),
            "fragment",
        ),
        sends("2^63 bytes", lying(1 << 63), "allowed are 1048576"),
        sends("2^40 bytes", lying(1 << 40), "allowed are 1048576"),
        sends(
            "a close with half a status",
            frame(CLOSE, &[3]),
            "invalid close",
        ),
        sends(
            "a text that is no UTF-8",
            frame(TEXT, b"\xff\xfe{}"),
            "UTF-8",
        ),
        sends(
            "half a character at the end of a fragment",
            [frame(0x01, b"\"\xc3"), frame(0x80, b"\"")].concat(),
            "UTF-8",
        ),
        sends("a binary frame", frame(0x82, b"{}"), "binary"),
        sends(
            "a goodbye",
            frame(CLOSE, b"\x03\xe8bye"),
            "closed the session: 1000 bye",
        ),
        (
            "half a frame and the end",
            Box::new(move |victim| {
                victim.upgrade();
                victim.send(&half);
                victim.hang_up();
            }),
            "without a close frame",
        ),
    ]);
}

#[test]
fn messages_that_break_the_rules() {
    let text = |text: String| frame(TEXT, text.as_bytes());
    let envelope = |kind: &str, payload: &str| {
        frame(
            TEXT,
            format!(
                r#"{{"protocol_version":1,"message_id":"m","type":"{kind}","agent_id":"agent-under-test","sent_at":"2026-01-01T00:00:00Z","payload":{payload}}}"#
            )
            .as_bytes(),
        )
    };
    survives(vec![
        sends("deep arrays", text("[".repeat(1_000_000)), "no valid envelope"),
        sends("deep objects", text(r#"{"a":"#.repeat(200_000)), "no valid envelope"),
        sends(
            "a deep payload",
            envelope("ack", &format!("{}1{}", "[".repeat(300), "]".repeat(300))),
            "no valid envelope",
        ),
        sends("a megabyte of spaces", text(" ".repeat(1024 * 1024)), "no valid envelope"),
        sends("a megabyte and a byte", text(" ".repeat(1024 * 1024 + 1)), "allowed are 1048576"),
        sends(
            "a negative sequence",
            envelope("ack", r#"{"acked_message_id":"x","acked_type":"task.output","highest_output_sequence":-1}"#),
            "no valid envelope",
        ),
        sends(
            "a sequence over 64 bits",
            envelope("ack", r#"{"acked_message_id":"x","acked_type":"task.output","highest_output_sequence":18446744073709551616}"#),
            "no valid envelope",
        ),
        sends(
            "a sequence that is no number of this world",
            envelope("ack", r#"{"acked_message_id":"x","acked_type":"task.output","highest_output_sequence":1e999}"#),
            "no valid envelope",
        ),
        sends(
            "a key twice",
            text(r#"{"protocol_version":1,"message_id":"a","message_id":"b","type":"ack","agent_id":"agent-under-test","payload":{}}"#.to_owned()),
            "no valid envelope",
        ),
        sends("something behind the end", text("{} {}".to_owned()), "no valid envelope"),
    ]);
}

#[test]
fn answers_that_are_no_upgrade() {
    survives(vec![
        answers(
            "half a response",
            "HTTP/1.1 101 Switching Proto",
            "handshake not finished",
        ),
        answers("nothing at all", "", "handshake not finished"),
        answers("no HTTP", "SSH-2.0-OpenSSH_9.2\r\n", "invalid HTTP"),
        answers(
            "a redirect",
            "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
            "answered 302, a redirect",
        ),
        answers(
            "a page",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            "answered 200 (hello)",
        ),
        answers(
            "a wrong key",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: bm90IHRoZSByaWdodCBrZXk=\r\n\r\n",
            "Key mismatch",
        ),
        answers(
            "an upgrade to something else",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: ACCEPT\r\n\r\n",
            "No \"Upgrade: websocket\" header",
        ),
        (
            "a header without end",
            Box::new(|victim| {
                victim.read_request();
                victim.send(b"HTTP/1.1 101 Switching Protocols\r\n");
                while victim.send(b"X-Padding: and so on and so on and so on\r\n") {}
            }),
            "limit exceeded",
        ),
    ]);
}

fn shows(ca: &TestCa, flaw: Flaw, says: &'static str) -> Case {
    let acceptor = ca.acceptor(flaw);
    let script = move |victim: &mut Victim| victim.handshake(&acceptor);
    ("a bad certificate", Box::new(script), says)
}

#[test]
fn certificates_that_prove_nothing() {
    let ca = TestCa::new("test authority");
    let cases = vec![
        shows(&ca, Flaw::Expired, "expired"),
        shows(&ca, Flaw::NotYetValid, "not yet valid"),
        shows(&ca, Flaw::OtherName, "mismatch"),
        shows(&ca, Flaw::SelfSigned, "self-signed"),
        shows(&TestCa::new("test authority"), Flaw::None, "certificate"),
        (
            "plain text",
            Box::new(|victim| {
                victim.send(b"HTTP/1.1 400 Bad Request\r\n\r\n");
                victim.hang_up();
            }),
            "TLS",
        ),
    ];
    survives_before(cases, Some(&ca));
}

/// Three deadlines of twenty seconds each.
#[test]
fn silence_is_not_waited_for_without_end() {
    let says_nothing = || {
        let script = |victim: &mut Victim| victim.drain();
        Box::new(script) as Script
    };
    std::thread::scope(|scope| {
        scope.spawn(|| survives(vec![("no answer", says_nothing(), "did not answer")]));
        scope.spawn(|| survives(vec![sends("no hello_ack", Vec::new(), "hello")]));
        scope.spawn(|| {
            let ca = TestCa::new("test authority");
            let cases = vec![("no TLS", says_nothing(), "TLS")];
            survives_before(cases, Some(&ca));
        });
    });
}

/// The server reads nothing, so no pong can be written: one waits, the others are forgotten.
#[test]
fn a_flood_of_pings_costs_no_memory() {
    let script = |victim: &mut Victim| {
        victim.upgrade();
        let pings = frame(PING, &[b'x'; 100]).repeat(1000);
        for _ in 0..100 {
            if !victim.send(&pings) {
                return;
            }
        }
        victim.hang_up();
    };
    survives(vec![("pings", Box::new(script), "without a close frame")]);
}

#[test]
fn acknowledgements_of_what_is_not_ours_change_nothing() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let link = server.link();
    let peak = agent.peak_resident_kib();
    let other = Task::new("other", "true").ids;
    let kinds = ["task.output", "task.final", "agent.hello"];
    for number in 0..20_000_u64 {
        let ids = if number % 2 == 0 { None } else { Some(&other) };
        let payload = json!({
            "acked_message_id": format!("0123456789abcdef-{number:032x}-o-{number}"),
            "acked_type": kinds[number as usize % kinds.len()],
            "stream": "stdout",
            "highest_output_sequence": number << 40,
        });
        link.send("ack", ids, payload);
    }
    server.run_another("afterwards");
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
    let grown = agent.peak_resident_kib().saturating_sub(peak);
    server.check(grown < GROWTH_KIB_MAX, &format!("{grown} KiB of memory"));
}

#[test]
fn a_server_is_told_why_it_is_left() {
    let (told, statuses) = std::sync::mpsc::sync_channel(5);
    let violates = |what, bytes: Vec<u8>, says| -> Case {
        let told = told.clone();
        let script = move |victim: &mut Victim| {
            victim.upgrade();
            victim.send(&bytes);
            let _ = told.send(victim.close_status());
        };
        (what, Box::new(script), says)
    };
    survives(vec![
        violates("opcode 3", frame(0x83, b"hi"), "opcode"),
        violates("no UTF-8", frame(TEXT, b"\xff"), "UTF-8"),
        violates("2^40 bytes", lying(1 << 40), "allowed are"),
        violates("a binary frame", frame(0x82, b"{}"), "binary"),
        violates("a goodbye", frame(CLOSE, b"\x0f\xa1bye"), "4001 bye"),
    ]);
    let statuses: Vec<Option<u16>> = statuses.try_iter().collect();
    assert_eq!(statuses, [1002, 1007, 1009, 1003, 4001].map(Some));
}
