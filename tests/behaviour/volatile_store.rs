//! A store directory that cannot be written: the agent comes up all the same, and says so.

use crate::support::{Agent, Event, ScriptedServer, Task};

#[test]
fn an_unusable_store_directory_is_told_and_tasks_run() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    let file = agent.path("file");
    std::fs::write(&file, b"not a directory").expect("writable");
    // Nobody, not even root, can make a directory below a file.
    let path = file.join("outbox").display().to_string();
    agent.set("HOSTLINK_LOCAL_STORE_PATH", &path);
    agent.start_again();
    let hello = server.wait_hello(1);
    server.check(hello.spool_status.volatile, &format!("{hello:?}"));
    let task = Task::new("volatile", "echo still works; exit 3");
    server.deliver(&task);
    let result = server.wait_final(&task);
    server.check_eq(result.result().map(|r| r.exit_code), Some(3), "exit code");
    server.check_eq(
        server.look(|log| log.stdout(&task.ids)),
        "still works\n".into(),
        "output",
    );
    agent.wait_line(&path);
}

#[test]
fn a_memory_store_by_choice_replays_after_a_cut() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_LOCAL_STORE", "memory")]);
    let hello = server.wait_hello(1);
    server.check(hello.spool_status.volatile, &format!("{hello:?}"));
    server.acknowledge_nothing();
    let task = Task::new("memory", "echo kept");
    server.deliver(&task);
    let first = server.wait_final(&task);
    server.acknowledge_everything();
    let mark = server.mark();
    server.cut();
    server.wait_until("the same final again", |log| {
        log.after(mark)
            .any(|e| matches!(e, Event::Frame(f) if f.message_id == first.message_id))
    });
    server.check(!agent.state().join("outbox").exists(), "nothing is written");
}

#[test]
fn a_durable_store_is_not_called_volatile() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    server.wait_hello(1);
    let raw = server.look(|log| log.frames().next().map(|f| f.raw.clone()));
    server.check(
        raw.is_some_and(|raw| !raw.contains("volatile")),
        "the hello of a durable store",
    );
}
