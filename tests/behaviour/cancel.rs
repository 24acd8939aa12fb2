//! Extension `cancel` (PROTOCOL.md 5): an attempt is ended wherever it is, and its final says why.

use std::time::{Duration, Instant};

use hostlink_edge::ids::FinalStatus;
use serde_json::json;

use crate::support::processes::{Sleeper, zombies_of};
use crate::support::{Agent, ScriptedServer, Task};

/// A server that grants it, and an agent with these settings.
fn start(settings: &[(&str, &str)]) -> (ScriptedServer, Agent) {
    let server = ScriptedServer::start();
    server.acknowledge_hellos_with(json!({"extensions": ["cancel"]}));
    let agent = Agent::with(&server, settings);
    server.link();
    (server, agent)
}

fn cancel(server: &ScriptedServer, task: &Task, reason: Option<&str>) {
    let payload = match reason {
        Some(reason) => json!({"reason": reason}),
        None => json!({}),
    };
    server.link().send("task.cancel", Some(&task.ids), payload);
}

/// Ended by the server, with this at the end of `error`: before it stands what the shell has said.
#[track_caller]
fn ends_interrupted(server: &ScriptedServer, task: &Task, expected: &str) {
    let end = server.wait_end(task);
    server.check_eq(
        (end.status, end.exit_code, end.error.lines().last()),
        (FinalStatus::Interrupted, -1, Some(expected)),
        "end",
    );
}

#[test]
fn a_queued_task_ends_unstarted_and_the_others_keep_their_order() {
    let (server, agent) = start(&[]);
    let first = Task::new("first", agent.hold("go"));
    server.deliver(&first);
    server.wait_frame("task.started", &first);
    let queued: Vec<Task> = ["a", "b", "c"]
        .into_iter()
        .map(|name| {
            Task::new(
                name,
                format!(
                    "{}; echo {name} >> {}",
                    agent.trace(name),
                    agent.path("order").display()
                ),
            )
        })
        .collect();
    for task in &queued {
        server.deliver(task);
        server.wait_frame("task.received", task);
    }
    cancel(&server, &queued[1], Some("not needed any more"));
    // At once, not when its turn comes.
    ends_interrupted(&server, &queued[1], "cancelled: not needed any more");
    agent.release("go");
    for task in [&queued[0], &queued[2]] {
        server.check_eq(server.wait_end(task).status, FinalStatus::Completed, "end");
    }
    server.check_eq(agent.runs("b"), 0, "runs of the cancelled task");
    let started = server.look(|log| log.has("task.started", &queued[1].ids));
    server.check(!started, "it was never started");
    let order = std::fs::read_to_string(agent.path("order")).expect("two have run");
    server.check_eq(order.as_str(), "a\nc\n", "order");
}

/// Also one whose receipt is not durable yet.
#[test]
fn a_task_may_be_cancelled_with_its_delivery() {
    let (server, agent) = start(&[]);
    let first = Task::new("first", agent.hold("go"));
    server.deliver(&first);
    server.wait_frame("task.started", &first);
    for round in 0..20 {
        let name = format!("round-{round}");
        let task = Task::new(&name, agent.trace("ran"));
        server.deliver(&task);
        cancel(&server, &task, None);
        ends_interrupted(&server, &task, "cancelled by the server");
        let received = server.look(|log| log.has("task.received", &task.ids));
        server.check(received, "it was received all the same");
    }
    agent.release("go");
    server.wait_end(&first);
    server.run_another("afterwards");
    server.check_eq(agent.runs("ran"), 0, "runs");
}

#[test]
fn a_running_task_is_ended_with_all_its_processes_and_its_output_arrives() {
    let (server, agent) = start(&[("HOSTLINK_TASK_KILL_GRACE", "10s")]);
    let sleeper = Sleeper::new();
    let sleep = sleeper.command();
    let command = format!(
        "trap 'echo tidied; exit 0' TERM; {sleep} & (setsid sh -c '{sleep} & exit') & echo begun; \
         {}",
        agent.hold("never")
    );
    let task = Task::new("runs", command);
    server.deliver(&task);
    server.check_eq(
        sleeper.wait_for(2, Duration::from_secs(10)),
        2,
        "its processes",
    );
    server.wait_frame("task.output", &task);
    let begun = Instant::now();
    cancel(&server, &task, Some("maintenance"));
    ends_interrupted(&server, &task, "cancelled: maintenance");
    let took = begun.elapsed();
    server.check(
        took < Duration::from_secs(5),
        &format!("it obeyed TERM, and the grace was not waited for: {took:?}"),
    );
    server.check_eq(sleeper.running().len(), 0, "processes");
    let text = server.look(|log| log.stdout(&task.ids));
    server.check_eq(text.as_str(), "begun\ntidied\n", "output");
    server.check_eq(zombies_of(agent.pid()), 0, "zombies");
}

#[test]
fn a_task_that_ignores_term_is_killed_after_the_grace() {
    let (server, agent) = start(&[("HOSTLINK_TASK_KILL_GRACE", "700ms")]);
    let sleeper = Sleeper::new();
    let command = format!(
        "trap '' TERM; (trap '' TERM; setsid {}) & echo begun; {}",
        sleeper.command(),
        agent.hold("never")
    );
    let task = Task::new("stubborn", command);
    server.deliver(&task);
    server.wait_frame("task.output", &task);
    server.check_eq(
        sleeper.wait_for(1, Duration::from_secs(10)),
        1,
        "its process",
    );
    let begun = Instant::now();
    cancel(&server, &task, None);
    // A second one changes nothing.
    cancel(&server, &task, Some("again"));
    ends_interrupted(&server, &task, "cancelled by the server");
    let took = begun.elapsed();
    server.check(
        took >= Duration::from_millis(700) && took < Duration::from_secs(5),
        &format!("took {took:?}"),
    );
    server.check_eq(sleeper.running().len(), 0, "processes");
    server.run_another("afterwards");
}

/// Of several that run, the one that is meant.
#[test]
fn a_cancel_ends_one_task_and_no_other() {
    let (server, agent) = start(&[("HOSTLINK_TASK_CONCURRENCY", "2")]);
    let tasks =
        ["one", "two"].map(|name| Task::new(name, format!("{}; echo {name}", agent.hold(name))));
    for task in &tasks {
        server.deliver(task);
        server.wait_frame("task.started", task);
    }
    cancel(&server, &tasks[0], None);
    ends_interrupted(&server, &tasks[0], "cancelled by the server");
    agent.release("two");
    let end = server.wait_end(&tasks[1]);
    server.check_eq(
        (end.status, end.output.as_str()),
        (FinalStatus::Completed, "two\n"),
        "the other",
    );
}

/// What has ended, what never came, and what was not granted.
#[test]
fn a_cancel_without_object_or_grant_changes_nothing() {
    let (server, agent) = start(&[]);
    let done = server.run_another("done");
    let ended = Task::new("done", "");
    cancel(&server, &ended, None);
    cancel(&server, &Task::new("never-seen", ""), None);
    server.run_another("after both");
    let finals = server.look(|log| log.frames_of("task.final", &ended.ids).len());
    server.check_eq(finals, 1, "finals of the ended task");
    let status = done.result().map(|result| result.status);
    server.check_eq(status, Some(FinalStatus::Completed), "its end");
    // Offered later, it runs.
    let later = Task::new("never-seen", agent.trace("later"));
    server.deliver(&later);
    server.check_eq(
        server.wait_end(&later).status,
        FinalStatus::Completed,
        "end",
    );
    server.check_eq(agent.runs("later"), 1, "runs");

    server.acknowledge_everything();
    server.cut();
    server.wait_hello(2);
    let task = Task::new("not-granted", format!("{}; echo whole", agent.hold("end")));
    server.deliver(&task);
    server.wait_frame("task.started", &task);
    cancel(&server, &task, None);
    agent.wait_line("not granted");
    agent.release("end");
    let end = server.wait_end(&task);
    server.check_eq(
        (end.status, end.output.as_str()),
        (FinalStatus::Completed, "whole\n"),
        "end",
    );
}
