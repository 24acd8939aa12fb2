//! PROTOCOL.md 4.5: what the directives of hello_ack do.

use std::sync::Mutex;

use hostlink_edge::ids::Stream;
use serde_json::{Value, json};

use crate::support::{Agent, Frame, Reaction, ScriptedServer, Task, lock};

/// The next hello is answered with these directives, later ones without.
fn direct_next_hello(server: &ScriptedServer, directives: Value) {
    let directives = Mutex::new(Some(directives));
    server.on_frame(move |link, frame| {
        if frame.hello().is_some()
            && let Some(directives) = lock(&directives).take()
        {
            link.hello_ack(frame, directives);
            return Reaction::Handled;
        }
        if frame.output().is_some() {
            link.ack(frame);
            return Reaction::Handled;
        }
        Reaction::Default
    });
}

fn attempt(task: &Task) -> Value {
    json!({"task_id": task.ids.task.as_str(), "execution_attempt_id": task.ids.attempt.as_str()})
}

fn discard(task: &Task) -> Value {
    let mut discarded = attempt(task);
    discarded["reason"] = json!("superseded");
    json!({ "discarded_attempts": [discarded] })
}

fn replay_from(task: &Task, stream: &str, next_sequence: u64) -> Value {
    let mut replay = attempt(task);
    replay["stream"] = json!(stream);
    replay["next_sequence"] = json!(next_sequence);
    json!({ "output_replay": [replay] })
}

#[test]
fn acknowledged_finals_are_removed() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    server.acknowledge_nothing();
    let (known, unknown) = (
        Task::new("known", "echo known; exit 1"),
        Task::new("unknown", "echo unknown; exit 2"),
    );
    server.deliver(&known);
    let first = server.wait_final(&known);
    server.deliver(&unknown);
    server.wait_final(&unknown);
    let mark = server.mark();
    let directives = json!({"acknowledged_final_message_ids": [first.message_id, "foreign"]});
    direct_next_hello(&server, directives);
    server.cut();
    server.wait_until("the other final again", |log| {
        log.frames_after(mark)
            .any(|f| f.is_about("task.final", &unknown.ids))
    });
    server.run_another("afterwards");
    let again = server.look(|log| {
        log.frames_after(mark)
            .any(|f| f.is_about("task.final", &known.ids))
    });
    server.check(!again, "an acknowledged final does not come again");
    server.cut();
    server.run_another("after-another-cut");
    let hello = server.wait_hello(3);
    server.check(hello.unacked_finals.is_empty(), &format!("{hello:?}"));
}

#[test]
fn a_discarded_attempt_that_waits_is_not_started() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let first = Task::new("first", agent.hold("first"));
    let queued = Task::new("queued", agent.trace("queued"));
    server.deliver(&first);
    server.wait_frame("task.started", &first);
    server.deliver(&queued);
    server.wait_frame("task.received", &queued);
    direct_next_hello(&server, discard(&queued));
    server.cut();
    let hello = server.wait_hello(2);
    let waiting: Vec<&str> = hello
        .received_not_started
        .iter()
        .map(|t| t.task_id.as_str())
        .collect();
    server.check_eq(
        waiting,
        vec!["task-queued"],
        "received_not_started of the hello",
    );
    server.link();
    agent.release("first");
    server.wait_final(&first);
    server.run_another("afterwards");
    server.check_eq(agent.runs("queued"), 0, "runs of the discarded task");
    server.check(
        server.look(|log| log.first_final(&queued.ids).is_none()),
        "no final",
    );
}

#[test]
fn a_discarded_attempt_that_runs_goes_on_unreported() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    server.acknowledge_nothing();
    let command = format!(
        "echo before; {}; echo after; {}",
        agent.hold("go"),
        agent.trace("end")
    );
    let task = Task::new("discarded", command);
    server.deliver(&task);
    server.wait_frame("task.output", &task);
    let mark = server.mark();
    direct_next_hello(&server, discard(&task));
    server.cut();
    let hello = server.wait_hello(2);
    server.check_eq(
        hello
            .running_task
            .map(|t| (t.task_id, t.last_output_sequence.stdout)),
        Some(("task-discarded".into(), 1)),
        "running_task of the hello",
    );
    server.link();
    agent.release("go");
    // The next task starts when the discarded one has ended.
    server.run_another("afterwards");
    server.check_eq(agent.runs("end"), 1, "the running task was left to its end");
    server.cut();
    server.run_another("after-another-cut");
    let reported = server.look(|log| {
        log.frames_after(mark)
            .any(|f: &Frame| f.ids() == Some(&task.ids))
    });
    server.check(!reported, "nothing of a discarded attempt is sent");
}

/// A task of four chunks on stdout that were not acknowledged.
fn four_chunks(server: &ScriptedServer, agent: &Agent) -> Task {
    server.acknowledge_nothing();
    let steps: Vec<String> = (1..=4)
        .map(|number| format!("echo {number}; {}", agent.hold(&format!("step{number}"))))
        .collect();
    let task = Task::new("chunks", steps.join("\n"));
    server.deliver(&task);
    for number in 1..=4 {
        server.wait_until(&format!("chunk {number}"), |log| {
            log.chunks(&task.ids, Stream::Stdout).len() == number
        });
        agent.release(&format!("step{number}"));
    }
    server.wait_final(&task);
    task
}

fn sequences_after(server: &ScriptedServer, mark: usize, task: &Task) -> Vec<u64> {
    server.wait_until("the final again", |log| {
        log.frames_after(mark)
            .any(|f| f.is_about("task.final", &task.ids))
    });
    server.look(|log| log.frames_after(mark).filter_map(Frame::sequence).collect())
}

#[test]
fn output_replay_acknowledges_what_is_below_and_sends_from_there() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let task = four_chunks(&server, &agent);
    let hello_mark = server.mark();
    direct_next_hello(&server, replay_from(&task, "stdout", 3));
    server.cut();
    let sequences = sequences_after(&server, hello_mark, &task);
    server.check_eq(sequences, vec![3, 4], "sequences after the directive");
    let hello = server.wait_hello(2);
    let ranges: Vec<(u64, u64)> = hello
        .unacked_output
        .iter()
        .map(|range| (range.first_sequence, range.last_sequence))
        .collect();
    server.check_eq(
        ranges,
        vec![(1, 4)],
        "one range for the stream in the hello",
    );
}

#[test]
fn output_replay_beyond_what_is_held_acknowledges_all() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let task = four_chunks(&server, &agent);
    let mark = server.mark();
    direct_next_hello(&server, replay_from(&task, "stdout", 5));
    server.cut();
    let sequences = sequences_after(&server, mark, &task);
    server.check_eq(sequences, vec![], "sequences after the directive");
}

#[test]
fn output_replay_below_what_is_held_is_marked_truncated() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let task = four_chunks(&server, &agent);
    // The first two are acknowledged, so no longer held; then the server has forgotten them.
    direct_next_hello(&server, replay_from(&task, "stdout", 3));
    server.on_frame({
        let directives = Mutex::new(Some(replay_from(&task, "stdout", 3)));
        move |link, frame| {
            if frame.hello().is_none() {
                return Reaction::Handled;
            }
            let next = lock(&directives).take();
            link.hello_ack(frame, next.unwrap_or(json!({})));
            Reaction::Handled
        }
    });
    let mark = server.mark();
    server.cut();
    sequences_after(&server, mark, &task);
    let mark = server.mark();
    direct_next_hello(&server, replay_from(&task, "stdout", 1));
    server.cut();
    let sequences = sequences_after(&server, mark, &task);
    server.check_eq(sequences, vec![3, 4], "the next chunk held");
    let flagged: Vec<bool> = server.look(|log| {
        let again = log.frames_after(mark).filter(|f| f.output().is_some());
        again
            .map(|f| f.raw.contains(r#""truncated_locally":true"#))
            .collect()
    });
    server.check_eq(flagged, vec![true, false], "only the jump is flagged");
}
