//! A store directory that cannot be written: the agent comes up all the same, and says so.

use hostlink_edge::ids::Stream;

use crate::support::server::deadline;
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

/// The disk returns while a task runs and nothing is acknowledged: all of it moves there, under the
/// same ids, and outlives the agent.
#[test]
fn a_disk_that_returns_takes_what_memory_held() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    let blocked = agent.path("store");
    std::fs::write(&blocked, b"not a directory").expect("writable");
    let path = blocked.join("outbox").display().to_string();
    agent.set("HOSTLINK_LOCAL_STORE_PATH", &path);
    agent.set("HOSTLINK_TASK_CONCURRENCY", "2");
    agent.start_again();
    let hello = server.wait_hello(1);
    server.check(hello.spool_status.volatile, &format!("{hello:?}"));
    server.acknowledge_nothing();
    let ended = Task::new("ended", "echo kept");
    server.deliver(&ended);
    let first = server.wait_final(&ended);
    let held = agent.hold("held");
    let running = Task::new("running", format!("echo before; {held}; echo after"));
    server.deliver(&running);
    server.wait_until("its first line", |log| {
        log.stdout(&running.ids) == "before\n"
    });
    std::fs::remove_file(&blocked).expect("there");
    let moved = hostlink_edge::limits::STORE_REOPEN_INTERVAL + deadline();
    let hello = server.wait_at_most(moved, "a hello of the disk", |log| log.hello(2).cloned());
    server.check(!hello.spool_status.volatile, &format!("{hello:?}"));
    let told: Vec<_> = hello.unacked_finals.iter().map(|f| &f.message_id).collect();
    server.check_eq(told, vec![&first.message_id], "finals in the hello");
    agent.release("held");
    let end = server.wait_final(&running);
    server.check_eq(end.result().map(|r| r.exit_code), Some(0), "exit code");
    agent.kill();
    server.acknowledge_everything();
    let mark = server.mark();
    agent.start_again();
    server.wait_until("all of it again, under the same ids", |log| {
        let again = |id: &str| log.frames_after(mark).any(|frame| frame.message_id == id);
        let chunks = log.chunks(&running.ids, Stream::Stdout);
        again(&first.message_id)
            && again(&end.message_id)
            && chunks.iter().all(|chunk| again(&chunk.message_id))
    });
    server.check_eq(
        server.look(|log| log.stdout(&running.ids)),
        "before\nafter\n".into(),
        "output",
    );
}
