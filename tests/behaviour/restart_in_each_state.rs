//! A `kill -9` while an attempt is received, running or ended, and a restart on the same state.

use hostlink_edge::ids::FinalStatus;

use crate::support::{Agent, ScriptedServer, Task};

#[test]
fn a_received_attempt_is_run_after_the_restart() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    let running = Task::new("running", agent.hold("never"));
    let queued = Task::new("queued", format!("{}; echo at last", agent.trace("queued")));
    server.deliver(&running);
    server.wait_frame("task.started", &running);
    server.deliver(&queued);
    server.wait_frame("task.received", &queued);
    agent.kill();
    server.check_eq(agent.runs("queued"), 0, "runs before the restart");
    agent.start_again();
    server.check_eq(
        server.wait_end(&queued).status,
        FinalStatus::Completed,
        "status of the attempt that had been received",
    );
    server.wait_frame("task.output", &queued);
    server.check_eq(
        server.look(|log| log.stdout(&queued.ids)),
        "at last\n".into(),
        "output",
    );
    server.check_eq(agent.runs("queued"), 1, "runs");
    let interrupted = server.wait_end(&running);
    server.check_eq(
        (interrupted.status, interrupted.exit_code),
        (FinalStatus::Interrupted, -1),
        "end of the attempt that had been running",
    );
}

#[test]
fn a_running_attempt_ends_interrupted_and_its_stored_output_is_replayed() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.acknowledge_nothing();
    let command = format!(
        "{}; echo stored; echo also >&2; {}; echo never",
        agent.trace("running"),
        agent.hold("never")
    );
    let task = Task::new("running", command);
    server.deliver(&task);
    server.wait_until("both streams", |log| {
        log.stdout(&task.ids) == "stored\n" && log.stderr(&task.ids) == "also\n"
    });
    agent.kill();
    let mark = server.mark();
    server.acknowledge_everything();
    agent.start_again();
    let result = server.wait_final(&task);
    server.check_eq(
        result.result().map(|r| (r.status, r.exit_code)),
        Some((FinalStatus::Interrupted, -1)),
        "end of the attempt",
    );
    let replayed = server.look(|log| {
        log.frames_after(mark)
            .filter(|f| f.is_about("task.output", &task.ids))
            .count()
    });
    server.check_eq(replayed, 2, "chunks that came again");
    let hello = server.wait_hello(2);
    server.check(hello.running_task.is_none(), &format!("{hello:?}"));
    // Known, so not run again.
    server.deliver(&task);
    server.run_another("afterwards");
    server.check_eq(agent.runs("running"), 1, "runs");
}

#[test]
fn an_unacknowledged_final_comes_again_unchanged() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.acknowledge_nothing();
    let command = format!("{}; echo out; echo err >&2; exit 3", agent.trace("ended"));
    let task = Task::new("ended", command);
    server.deliver(&task);
    let first = server.wait_final(&task);
    agent.kill();
    let mark = server.mark();
    server.acknowledge_everything();
    agent.start_again();
    let again = server.wait_for("the final again", |log| {
        let mut frames = log.frames_after(mark);
        frames
            .find(|f| f.is_about("task.final", &task.ids))
            .cloned()
    });
    server.check_eq(again.message_id, first.message_id, "message id");
    server.check(again.message == first.message, "the final is unchanged");
    let hello = server.wait_hello(2);
    server.check_eq(hello.unacked_finals.len(), 1, "finals in the hello");
    let texts = &hello.unacked_finals[0].result;
    server.check_eq(
        (texts.output.as_deref(), texts.error.as_deref()),
        (Some("out\n"), Some("err\n")),
        "texts of the final in the hello",
    );
    server.check_eq(agent.runs("ended"), 1, "runs");
}

#[test]
fn an_acknowledged_attempt_leaves_nothing_to_send() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    let task = Task::new("done", "echo out");
    server.deliver(&task);
    server.wait_final(&task);
    // By the answer to this one the acknowledgements before it were read and are taken in.
    server.run_another("in-between");
    agent.terminate();
    agent.start_again();
    let hello = server.wait_hello(2);
    server.check(
        hello
            .unacked_output
            .iter()
            .all(|range| range.task_id != "task-done")
            && hello
                .unacked_finals
                .iter()
                .all(|held| held.task_id != "task-done"),
        &format!("{hello:?}"),
    );
    server.run_another("afterwards");
}
