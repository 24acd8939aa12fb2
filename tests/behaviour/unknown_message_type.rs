//! PROTOCOL.md 3: an inbound type that the agent does not know is logged and ignored.

use serde_json::json;

use crate::support::{Agent, ScriptedServer, Task};

#[test]
fn the_session_goes_on() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let link = server.link();
    let task = Task::new("danced", "true");
    link.send("task.dance", Some(&task.ids), json!({"steps": [1, 2, 3]}));
    link.send("agent.future", None, json!({}));
    link.send("task.cancelled", Some(&task.ids), json!(null));
    server.run_another("afterwards");
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
    agent.wait_line("task.dance");
}

#[test]
fn unknown_fields_are_ignored_and_null_is_absent() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let task = Task::new("fields", "echo fine");
    let mut payload = task.delivery();
    payload["colour"] = json!({"red": 1});
    payload["timeout_seconds"] = json!(null);
    server.link().send("task.deliver", Some(&task.ids), payload);
    server.wait_final(&task);
    server.check_eq(
        server.look(|log| log.stdout(&task.ids)),
        "fine\n".into(),
        "output",
    );
}
