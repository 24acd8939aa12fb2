//! PROTOCOL.md 4.6: an attempt is started at most once, however often and by whichever way it is
//! offered, across restarts.

use crate::support::{Agent, Answer, Event, ScriptedServer, Task};

/// So many more polls and heartbeats, all of which offer the task.
fn wait_offers(server: &ScriptedServer, polls_too: bool) {
    let mark = server.mark();
    server.wait_until("more offers", |log| {
        let count = |wanted: fn(&Event) -> bool| log.after(mark).filter(|e| wanted(e)).count();
        count(|e| matches!(e, Event::Heartbeat)) >= 5
            && (!polls_too || count(|e| matches!(e, Event::Poll)) >= 5)
    });
}

#[test]
fn an_attempt_offered_by_all_ways_runs_once() {
    let server = ScriptedServer::start();
    server.refuse_upgrades(Answer::status(503));
    let settings = [
        ("HOSTLINK_TASK_POLL_INTERVAL", "20ms"),
        ("HOSTLINK_HEARTBEAT_INTERVAL", "20ms"),
    ];
    let mut agent = Agent::prepare(&server);
    for (key, value) in settings {
        agent.set(key, value);
    }
    let command = format!("{}; echo once; {}", agent.trace("once"), agent.hold("end"));
    let task = Task::new("once", command);
    server.policy(|policy| {
        policy.poll_tasks = vec![task.polled(), task.polled()];
        policy.heartbeat_tasks = vec![task.polled()];
    });
    agent.start_again();
    wait_offers(&server, true);

    // Running, offered by delivery as well.
    server.allow_upgrades();
    for _ in 0..3 {
        server.deliver(&task);
    }
    wait_offers(&server, false);
    agent.release("end");
    server.wait_final(&task);
    server.deliver(&task);
    wait_offers(&server, false);
    server.run_another("in-between");
    server.check_eq(agent.runs("once"), 1, "runs before the restart");

    // Ended and acknowledged, and the agent is another process.
    server.refuse_upgrades(Answer::status(503));
    agent.kill();
    agent.start_again();
    wait_offers(&server, true);
    server.allow_upgrades();
    server.deliver(&task);
    server.run_another("afterwards");
    server.check_eq(agent.runs("once"), 1, "runs after the restart");
}

#[test]
fn another_attempt_of_the_same_task_runs() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let first = Task::new("again", agent.trace("again"));
    let ids = hostlink_edge::ids::Ids::new("task-again", "another-attempt");
    let second = Task {
        ids: ids.expect("short"),
        ..first.clone()
    };
    server.deliver(&first);
    server.wait_final(&first);
    server.deliver(&second);
    server.wait_final(&second);
    server.check_eq(agent.runs("again"), 2, "runs");
}

#[test]
fn ended_tasks_of_a_poll_are_not_run() {
    let server = ScriptedServer::start();
    server.policy(|policy| policy.delivery_enabled = false);
    let agent = Agent::prepare(&server);
    let mut agent = agent;
    let offers = ["completed", "failed", "cancelled", "interrupted"].map(|status| {
        let mut offer = Task::new(status, agent.trace("ended")).polled();
        offer["status"] = status.into();
        offer
    });
    let last = Task::new("last", "true");
    server.policy(|policy| {
        policy.poll_tasks = offers.to_vec();
        policy.poll_tasks.push(last.polled());
    });
    agent.start_again();
    server.wait_until("the end of the task behind them", |log| {
        log.first_final(&last.ids).is_some() || !log.reports(&last.ids).is_empty()
    });
    server.check_eq(agent.runs("ended"), 0, "runs of ended tasks");
}
