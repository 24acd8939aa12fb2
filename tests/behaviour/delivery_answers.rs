//! PROTOCOL.md 3, `task.deliver`: the answer to an attempt that was seen before.

use crate::support::{Agent, ScriptedServer, Task};

fn wait_frames(server: &ScriptedServer, kind: &str, task: &Task, number: usize) {
    server.wait_until(&format!("{kind} of {}, {number} times", task.ids), |log| {
        log.frames_of(kind, &task.ids).len() == number
    });
}

#[test]
fn a_queued_attempt_is_received_and_a_running_one_started() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let running = Task::new("running", agent.hold("end"));
    let queued = Task::new("queued", agent.trace("queued"));
    server.deliver(&running);
    wait_frames(&server, "task.received", &running, 1);
    wait_frames(&server, "task.started", &running, 1);
    server.deliver(&queued);
    wait_frames(&server, "task.received", &queued, 1);

    server.deliver(&queued);
    wait_frames(&server, "task.received", &queued, 2);
    server.deliver(&running);
    wait_frames(&server, "task.started", &running, 2);
    agent.release("end");
    server.wait_final(&queued);
    server.check_eq(agent.runs("queued"), 1, "runs");
    let received = server.look(|log| log.frames_of("task.received", &running.ids).len());
    server.check_eq(
        received,
        1,
        "a running attempt is not answered with task.received",
    );
}

#[test]
fn an_ended_attempt_is_answered_with_its_final_under_the_old_id() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    server.acknowledge_nothing();
    let command = format!("{}; echo out; exit 4", agent.trace("ended"));
    let task = Task::new("ended", command);
    server.deliver(&task);
    let first = server.wait_final(&task);
    // Ended and not acknowledged.
    server.deliver(&task);
    wait_frames(&server, "task.final", &task, 2);
    // Ended and acknowledged.
    let link = server.link();
    for frame in server.look(|log| {
        let about = log.frames().filter(|f| f.ids() == Some(&task.ids));
        about.cloned().collect::<Vec<_>>()
    }) {
        if frame.output().is_some() || frame.result().is_some() {
            link.ack(&frame);
        }
    }
    server.acknowledge_everything();
    server.run_another("in-between");
    let before = server.look(|log| log.frames_of("task.final", &task.ids).len());
    server.deliver(&task);
    wait_frames(&server, "task.final", &task, before + 1);
    let finals: Vec<(String, Option<i32>)> = server.look(|log| {
        let finals = log.frames_of("task.final", &task.ids);
        let name =
            |f: &&crate::support::Frame| (f.message_id.clone(), f.result().map(|r| r.exit_code));
        finals.iter().map(name).collect()
    });
    let expected = vec![(first.message_id.clone(), Some(4)); finals.len()];
    server.check_eq(finals, expected, "finals under one id, with one exit code");
    server.check_eq(agent.runs("ended"), 1, "runs");
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
}

#[test]
fn a_more_urgent_task_goes_first() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let running = Task::new("running", agent.hold("end"));
    server.deliver(&running);
    server.wait_frame("task.started", &running);
    let tasks = [("low", -5), ("normal", 0), ("high", 10)].map(|(name, priority)| Task {
        priority,
        ..Task::new(name, "true")
    });
    for task in &tasks {
        server.deliver(task);
        server.wait_frame("task.received", task);
    }
    agent.release("end");
    for task in &tasks {
        server.wait_final(task);
    }
    let order: Vec<String> = server.look(|log| {
        let started = log.frames().filter(|f| f.kind == "task.started");
        started
            .filter_map(|f| f.ids())
            .map(|ids| ids.task.to_string())
            .collect()
    });
    server.check_eq(
        order,
        ["task-running", "task-high", "task-normal", "task-low"]
            .map(String::from)
            .to_vec(),
        "order of starts",
    );
}
