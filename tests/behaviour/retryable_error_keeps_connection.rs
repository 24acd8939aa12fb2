//! PROTOCOL.md 3, Errors: a retryable error keeps the message and the session.

use crate::support::{Agent, Frame, Reaction, ScriptedServer, Task};

#[test]
fn connection_and_message_stay() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    server.on_frame(|link, frame| {
        if frame.output().is_some() || frame.result().is_some() {
            link.error("storage_busy", true, Some(&frame.message_id));
            return Reaction::Handled;
        }
        Reaction::Default
    });
    let task = Task::new("refused", "echo kept; exit 5");
    server.deliver(&task);
    let result = server.wait_final(&task);
    let link = server.link();
    link.error("server_busy", true, None);
    link.error("unknown_message", true, Some("nobody-knows-this-id"));

    let second = Task::new("second", "true");
    server.deliver(&second);
    server.wait_frame("task.received", &second);
    server.check_eq(server.look(|log| log.connections()), 1, "connections");

    let mark = server.mark();
    server.acknowledge_everything();
    server.cut();
    server.wait_until("output and final again", |log| {
        let again: Vec<&Frame> = log.frames_after(mark).collect();
        again.iter().any(|f| f.is_about("task.output", &task.ids))
            && again.iter().any(|f| f.message_id == result.message_id)
    });
    server.check_eq(
        server.look(|log| log.stdout(&task.ids)),
        "kept\n".into(),
        "output",
    );
}
