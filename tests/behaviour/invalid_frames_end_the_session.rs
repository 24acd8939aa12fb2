//! PROTOCOL.md 3: a frame that is no valid envelope, or is for another agent, ends the session; the
//! agent dials again.

use async_tungstenite::tungstenite::Message;
use serde_json::{Value, json};

use crate::support::link::{Link, envelope};
use crate::support::{Agent, ScriptedServer};

type Spoil<'a> = (&'a str, &'a dyn Fn(&Link));

/// Each in a session of its own.
fn ends_the_session(spoil: &[Spoil<'_>]) {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    for (what, send) in spoil {
        let link = server.link();
        server.note(format!("now: {what}"));
        send(&link);
        server.wait_until(&format!("the end of the session after {what}"), |log| {
            log.is_closed(link.conn)
        });
        server.wait_until(&format!("a new session after {what}"), |log| {
            log.hello(link.conn + 1).is_some()
        });
    }
    server.run_another("afterwards");
}

fn without(field: &str) -> String {
    let mut frame = valid();
    frame.as_object_mut().expect("an object").remove(field);
    frame.to_string()
}

fn with(field: &str, value: Value) -> String {
    let mut frame = valid();
    frame[field] = value;
    frame.to_string()
}

fn valid() -> Value {
    envelope(
        "ack",
        None,
        json!({"acked_message_id": "x", "acked_type": "task.final"}),
    )
}

#[test]
fn frames_that_are_no_envelope() {
    ends_the_session(&[
        ("no JSON", &|link| link.send_text("hello there")),
        ("an empty frame", &|link| link.send_text("")),
        ("an array", &|link| link.send_text("[]")),
        ("half an envelope", &|link| {
            let frame = valid().to_string();
            link.send_text(&frame[..frame.len() / 2]);
        }),
        ("no message_id", &|link| {
            link.send_text(&without("message_id"))
        }),
        ("no type", &|link| link.send_text(&without("type"))),
        ("no agent_id", &|link| link.send_text(&without("agent_id"))),
    ]);
}

#[test]
fn frames_with_impossible_values() {
    ends_the_session(&[
        ("another agent", &|link| {
            link.send_text(&with("agent_id", json!("somebody-else")));
        }),
        ("another version", &|link| {
            link.send_text(&with("protocol_version", json!(2)));
        }),
        ("a number as type", &|link| {
            link.send_text(&with("type", json!(5)))
        }),
        ("a payload without what it needs", &|link| {
            link.send_text(&with("payload", json!({"acked_type": "task.final"})));
        }),
        ("a delivery without attempt", &|link| {
            link.send(
                "task.deliver",
                None,
                json!({"command": "true", "priority": 0}),
            );
        }),
    ]);
}

#[test]
fn frames_of_another_kind_or_size() {
    ends_the_session(&[
        ("a binary frame", &|link| {
            link.send_message(Message::binary(valid().to_string().into_bytes()));
        }),
        ("a frame over 1 MiB", &|link| {
            link.send_text(&with("padding", json!("x".repeat(1024 * 1024))));
        }),
        ("a second hello_ack for nothing, over 1 MiB", &|link| {
            link.send_text(&"{".repeat(1024 * 1024 + 1));
        }),
    ]);
}
