//! PROTOCOL.md 1: the server's `Date` corrects the clock that signs.

use crate::support::{Agent, Event, ScriptedServer, Task};

fn refusals(server: &ScriptedServer) -> usize {
    server.look(|log| log.count(|e| matches!(e, Event::Unauthorized { .. })))
}

fn works_with_a_clock_off_by(seconds: i64) {
    let server = ScriptedServer::start();
    server.policy(|policy| {
        policy.clock_shift_seconds = seconds;
        policy.delivery_enabled = false;
    });
    let settings = [
        ("HOSTLINK_TASK_POLL_INTERVAL", "50ms"),
        ("HOSTLINK_HEARTBEAT_INTERVAL", "50ms"),
    ];
    let _agent = Agent::with(&server, &settings);
    server.link();
    let task = Task::without_attempt("reported", "true");
    server.policy(|policy| policy.poll_tasks = vec![task.polled()]);
    server.wait_until("a report", |log| !log.reports(&task.ids).is_empty());
    // Poll, heartbeat and upgrade may each have been refused before the first answer was read.
    let refused = refusals(&server);
    server.check(refused <= 4, &format!("{refused} requests were refused"));

    let mark = server.mark();
    server.wait_until("polls and heartbeats go on", |log| {
        log.after(mark).filter(|e| matches!(e, Event::Poll)).count() >= 5
            && log
                .after(mark)
                .filter(|e| matches!(e, Event::Heartbeat))
                .count()
                >= 5
    });
    server.check_eq(
        refusals(&server),
        refused,
        "refusals once the offset is known",
    );
}

#[test]
fn a_server_two_hours_ahead() {
    works_with_a_clock_off_by(7200);
}

#[test]
fn a_server_two_hours_behind() {
    works_with_a_clock_off_by(-7200);
}

#[test]
fn a_clock_that_steps_later_is_followed() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    server.run_another("before");
    server.policy(|policy| policy.clock_shift_seconds = 7200);
    server.cut();
    server.run_another("after");
    server.check(refusals(&server) >= 1, "the first upgrade was refused");
}
