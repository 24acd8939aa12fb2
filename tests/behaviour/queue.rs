//! Several tasks at once: order, concurrency, and a queue that is full.

use std::collections::BTreeSet;

use hostlink_edge::limits::TASK_QUEUE_MAX;

use crate::support::{Agent, Event, ScriptedServer, Task};

/// Task ids of the `task.started` frames, in order.
fn started(server: &ScriptedServer) -> Vec<String> {
    server.look(|log| {
        let frames = log.frames().filter(|frame| frame.kind == "task.started");
        let ids = frames.filter_map(|frame| frame.ids());
        ids.map(|ids| ids.task.to_string()).collect()
    })
}

fn wait_started(server: &ScriptedServer, number: usize) {
    server.wait_until(&format!("{number} tasks started"), |log| {
        let frames = log.frames().filter(|frame| frame.kind == "task.started");
        frames.count() >= number
    });
}

#[test]
fn the_most_urgent_starts_first_and_of_equals_the_first() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    server.link();
    server.deliver(&Task::new("first", agent.hold("go")));
    wait_started(&server, 1);
    let names = [("a", 0), ("b", 5), ("c", 5), ("d", -1)];
    for (name, priority) in names {
        let mut task = Task::new(name, "true");
        task.priority = priority;
        server.deliver(&task);
        server.wait_frame("task.received", &task);
    }
    agent.release("go");
    wait_started(&server, 5);
    let order = ["task-first", "task-b", "task-c", "task-a", "task-d"];
    server.check_eq(started(&server), order.map(str::to_owned).to_vec(), "order");
}

#[test]
fn as_many_run_at_once_as_the_setting_says() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_CONCURRENCY", "4")]);
    server.link();
    let tasks: Vec<Task> = (0..6)
        .map(|number| {
            let (begun, hold) = (agent.trace("begun"), agent.hold(&format!("go-{number}")));
            Task::new(
                &format!("t{number}"),
                format!("{begun}; {hold}; echo {number}"),
            )
        })
        .collect();
    for task in &tasks {
        server.deliver(task);
        server.wait_frame("task.received", task);
    }
    wait_started(&server, 4);
    // The third ends first, and one of those that wait takes its place.
    agent.release("go-2");
    server.wait_final(&tasks[2]);
    wait_started(&server, 5);
    server.check_eq(started(&server).len(), 5, "starts");
    server.check_eq(agent.runs("begun"), 5, "runs");
    for number in 0..6 {
        agent.release(&format!("go-{number}"));
    }
    for (number, task) in tasks.iter().enumerate() {
        server.wait_final(task);
        let text = server.look(|log| log.stdout(&task.ids));
        server.check_eq(text, format!("{number}\n"), "output");
    }
}

/// What has no place is neither recorded nor acknowledged, and asked for when room returns; the
/// session goes on.
#[test]
fn a_full_queue_leaves_tasks_to_the_server_and_fetches_them_later() {
    const MORE: usize = 20;
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_POLL_INTERVAL", "50ms")]);
    server.link();
    server.deliver(&Task::new("first", agent.hold("go")));
    wait_started(&server, 1);
    let tasks: Vec<Task> = (0..TASK_QUEUE_MAX + MORE)
        .map(|number| Task::new(&format!("t{number}"), agent.trace(&format!("t{number}"))))
        .collect();
    for task in &tasks {
        server.deliver(task);
    }
    agent.wait_line("are waiting already");
    let (queued, refused) = tasks.split_at(TASK_QUEUE_MAX);
    for task in queued {
        server.wait_frame("task.received", task);
    }
    let told: BTreeSet<String> = server.look(|log| {
        let frames = log.frames().filter(|frame| frame.kind == "task.received");
        let ids = frames.filter_map(|frame| frame.ids());
        ids.map(|ids| ids.task.to_string()).collect()
    });
    for task in refused {
        let id = task.ids.task.as_str();
        server.check(!told.contains(id), &format!("{id} is not acknowledged"));
    }
    let polled = refused.iter().map(Task::polled).collect();
    server.policy(|policy| policy.poll_tasks = polled);
    // One may have gone out before the session was active.
    let mark = server.mark();
    let polls = || {
        server.look(|log| {
            let polls = log.after(mark).filter(|event| matches!(event, Event::Poll));
            polls.count()
        })
    };
    agent.release("go");
    for task in &tasks {
        server.wait_final(task);
    }
    server.check(polls() > 0, "they were asked for");
    let mut expected: Vec<String> = queued
        .iter()
        .map(|task| task.ids.task.to_string())
        .collect();
    expected.insert(0, "task-first".to_owned());
    let order = started(&server);
    server.check_eq(
        order[..=TASK_QUEUE_MAX].to_vec(),
        expected,
        "order of arrival",
    );
    for number in 0..tasks.len() {
        server.check_eq(agent.runs(&format!("t{number}")), 1, "runs");
    }
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
}
