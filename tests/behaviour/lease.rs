//! Extension `lease` (PROTOCOL.md 5): while an attempt runs the server hears of it at the interval
//! that it asked for; of one that waits or has ended it hears nothing.

use std::time::Duration;

use hostlink_edge::ids::Ids;
use serde_json::json;

use crate::support::log::Event;
use crate::support::{Agent, ScriptedServer, Task};

/// When heartbeats of an attempt came, since the server was started.
fn heartbeats(server: &ScriptedServer, ids: &Ids) -> Vec<Duration> {
    server.look(|log| {
        log.times(|event| match event {
            Event::Frame(frame) => frame.is_about("task.lease_heartbeat", ids),
            _ => false,
        })
    })
}

fn wait_heartbeats(server: &ScriptedServer, task: &Task, count: usize) {
    server.wait_until(&format!("{count} heartbeats of {}", task.ids), |log| {
        log.frames_of("task.lease_heartbeat", &task.ids).len() >= count
    });
}

#[test]
fn every_running_task_is_told_at_the_interval_and_no_other() {
    let server = ScriptedServer::start();
    server.acknowledge_hellos_with(json!({
        "extensions": ["lease"], "lease_interval_seconds": 1}));
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_CONCURRENCY", "2")]);
    let running = ["one", "two"].map(|name| Task::new(name, agent.hold(name)));
    let queued = Task::new("queued", "true");
    for task in running.iter().chain([&queued]) {
        server.deliver(task);
        server.wait_frame("task.received", task);
    }
    for task in &running {
        wait_heartbeats(&server, task, 3);
        let times = heartbeats(&server, &task.ids);
        for pair in times.windows(2) {
            let apart = pair[1] - pair[0];
            // As many as were asked for; how late one is, is up to the machine.
            server.check(
                apart > Duration::from_millis(600) && apart < Duration::from_secs(5),
                &format!("{apart:?} between heartbeats"),
            );
        }
    }
    server.check_eq(heartbeats(&server, &queued.ids).len(), 0, "of the queued");
    for name in ["one", "two"] {
        agent.release(name);
    }
    server.wait_end(&queued);
    for task in &running {
        server.wait_end(task);
    }
    // Another one shows that the lease goes on, and for how long.
    let told = running
        .each_ref()
        .map(|task| heartbeats(&server, &task.ids).len());
    let third = Task::new("third", agent.hold("third"));
    server.deliver(&third);
    wait_heartbeats(&server, &third, 2);
    let after = running
        .each_ref()
        .map(|task| heartbeats(&server, &task.ids).len());
    server.check_eq(after, told, "heartbeats of what has ended");
    agent.release("third");
    server.wait_end(&third);
}

#[test]
fn without_a_grant_none_is_sent_and_a_new_session_asks_anew() {
    let server = ScriptedServer::start();
    // An interval without a grant.
    server.acknowledge_hellos_with(json!({"lease_interval_seconds": 1}));
    let agent = Agent::with(&server, &[("HOSTLINK_HEARTBEAT_INTERVAL", "2s")]);
    let task = Task::new("runs", agent.hold("end"));
    server.deliver(&task);
    server.wait_frame("task.started", &task);
    // The device's own heartbeats are the clock: the second one comes two seconds or more from here.
    let started = server.mark();
    server.wait_until("heartbeats of the device", |log| {
        let beats = log
            .after(started)
            .filter(|it| matches!(it, Event::Heartbeat));
        beats.count() >= 2
    });
    server.check_eq(heartbeats(&server, &task.ids).len(), 0, "heartbeats");
    server.acknowledge_hellos_with(json!({
        "extensions": ["lease"], "lease_interval_seconds": 1}));
    server.cut();
    wait_heartbeats(&server, &task, 2);
    agent.release("end");
    server.wait_end(&task);
}
