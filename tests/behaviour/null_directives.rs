//! PROTOCOL.md 4.5: `null` lists in hello_ack are no directives.

use serde_json::{Value, json};

use crate::support::{Agent, Frame, Reaction, ScriptedServer, Task};

/// What comes again after a hello_ack with these fields.
fn replayed(fields: Value) -> (ScriptedServer, Vec<Frame>) {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    server.acknowledge_nothing();
    let task = Task::new("kept", "echo kept; exit 8");
    server.deliver(&task);
    server.wait_final(&task);
    let mark = server.mark();
    server.on_frame(move |link, frame| {
        if frame.hello().is_some() {
            link.hello_ack(frame, fields.clone());
            return Reaction::Handled;
        }
        Reaction::Default
    });
    server.cut();
    server.wait_until("the final again", |log| {
        log.frames_after(mark)
            .any(|f| f.is_about("task.final", &task.ids))
    });
    let frames = server.look(|log| log.frames_after(mark).cloned().collect());
    (server, frames)
}

#[test]
fn all_is_sent_again() {
    let nothing = json!({"acknowledged_final_message_ids": null, "discarded_attempts": null,
        "output_replay": null, "extensions": null, "lease_interval_seconds": null});
    for fields in [json!({}), nothing] {
        let (server, frames) = replayed(fields);
        let kinds: Vec<&str> = frames.iter().map(|f| f.kind.as_str()).collect();
        server.check_eq(
            kinds,
            vec!["agent.hello", "task.output", "task.final"],
            "frames after the reconnect",
        );
    }
}

#[test]
fn empty_lists_leave_unlisted_streams_and_finals_to_be_sent() {
    let (server, frames) = replayed(json!({"acknowledged_final_message_ids": [],
        "discarded_attempts": [], "output_replay": []}));
    let kinds: Vec<&str> = frames.iter().map(|f| f.kind.as_str()).collect();
    server.check_eq(
        kinds,
        vec!["agent.hello", "task.output", "task.final"],
        "frames after the reconnect",
    );
}
