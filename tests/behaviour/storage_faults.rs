//! Faults of the disk, from outside: strace makes system calls of the agent fail, wait, or end it.
//! Whatever happens, what arrives is an exact prefix, nothing runs twice, and the agent recovers by
//! itself.
//!
//! `HOSTLINK_FAULT_STEP=1` ends the agent at every call instead of at some, and
//! `HOSTLINK_TEST_BINARY=path` puts the release binary under the faults.

use std::time::{Duration, Instant};

use hostlink_edge::ids::{FinalStatus, Stream};

use crate::support::log::End;
use crate::support::server::deadline;
use crate::support::{Agent, Answer, ScriptedServer, Task};

const LINES: usize = 30;
/// Far longer than the task takes.
const RUN_TIME: Duration = Duration::from_secs(4);
/// The exit of the agent is an event; the end of its task is looked for this often meanwhile.
const EXIT_POLL: Duration = Duration::from_millis(50);

fn printing(agent: &Agent, name: &str) -> Task {
    let command = format!(
        "{}; for i in $(seq {LINES}); do echo line $i of the stream; sleep 0.02; done",
        agent.trace(name)
    );
    Task::new(name, command)
}

fn expected_text() -> String {
    (1..=LINES)
        .map(|number| format!("line {number} of the stream\n"))
        .collect()
}

/// By what it is seen that the agent has met the fault.
enum Met {
    /// The output waits, and then does not any more.
    Says,
    /// A receipt, which is durable before it is sent, takes so long.
    Takes(Duration),
}

/// The fault passes: everything arrives over the one connection.
fn survives(faults: &str, name: &str, met: Met) {
    if !Agent::can_inject() {
        return;
    }
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    agent.inject(faults);
    agent.start_again();
    server.link();
    let task = printing(&agent, name);
    let delivered_at = Instant::now();
    server.deliver(&task);
    if let Met::Takes(delay) = met {
        server.wait_frame("task.received", &task);
        server.check(delivered_at.elapsed() >= delay, "the disk is not slow");
    }
    let end = server.wait_end(&task);
    server.check_eq(
        (end.status, end.exit_code),
        (FinalStatus::Completed, 0),
        faults,
    );
    let text = server.look(|log| log.text(&task.ids, Stream::Stdout));
    server.check_eq(text, expected_text(), faults);
    server.check_eq(agent.runs(name), 1, "runs");
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
    if let Met::Says = met {
        agent.wait_line("output waits");
        agent.wait_line("its output is stored again");
    }
}

#[test]
fn a_full_disk_in_the_middle_costs_nothing() {
    survives("pwrite64:error=ENOSPC:when=7..26", "full", Met::Says);
}

#[test]
fn a_failed_sync_costs_nothing() {
    survives("fdatasync:error=EIO:when=12", "failed-sync", Met::Says);
}

#[test]
fn a_slow_disk_costs_nothing() {
    let delay = Duration::from_millis(200);
    let faults = format!("fdatasync:delay_enter={}", delay.as_micros());
    survives(&faults, "slow", Met::Takes(delay));
}

/// A task that was killed cannot be recorded as ended: the device must come down all the same.
#[test]
fn a_disk_that_stays_broken_does_not_hold_up_a_stop() {
    if !Agent::can_inject() {
        return;
    }
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    agent.set("HOSTLINK_TASK_KILL_GRACE", "200ms");
    agent.inject("pwrite64:error=EIO:when=7+");
    agent.start_again();
    server.link();
    let task = printing(&agent, "broken");
    server.deliver(&task);
    agent.wait_line("output waits");
    let status = agent.terminate();
    server.check_eq(status.code(), Some(0), "exit status");
    agent.start_again();
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Interrupted, "status");
    server.check_eq(agent.runs("broken"), 1, "runs");
}

/// A final that cannot be stored is reported; if the server refuses that, it is still owed over the
/// WebSocket (PROTOCOL.md 2, Report).
#[test]
fn a_refused_report_of_a_final_that_could_not_be_stored_leaves_it_to_the_websocket() {
    if !Agent::can_inject() {
        return;
    }
    let server = ScriptedServer::start();
    server.on_http(|request| request.reported_task().map(|_| Answer::status(404)));
    let mut agent = Agent::start(&server);
    server.link();
    let mut reports = 0;
    for nth in 1..=12 {
        agent.terminate();
        agent.inject(&format!("pwrite64:error=EIO:when={nth}..{}", nth + 1));
        agent.start_again();
        let task = Task::new(&format!("silent-{nth}"), "exit 6");
        server.policy(|policy| policy.poll_tasks = vec![task.polled()]);
        server.policy(|policy| policy.deliver_on_hello = vec![task.clone()]);
        let result = server.wait_final(&task);
        server.policy(|policy| policy.deliver_on_hello.clear());
        server.policy(|policy| policy.poll_tasks.clear());
        server.check_eq(result.result().map(|r| r.exit_code), Some(6), "exit code");
        reports += server.look(|log| log.reports(&task.ids).len());
    }
    server.check(reports > 0, "no final was ever refused by the store");
}

/// What can never run has not run, also if the agent ends between its receipt and its final.
#[test]
fn an_unusable_command_never_counts_as_completed() {
    if !Agent::can_inject() {
        return;
    }
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    for nth in 1..=8 {
        agent.terminate();
        let task = Task::new(&format!("unusable-{nth}"), "echo \0");
        server.policy(|policy| policy.deliver_on_hello = vec![task.clone()]);
        agent.inject(&format!("pwrite64:signal=KILL:when={nth}"));
        agent.start_again();
        let (end, _) = wait_end_with_restart(&server, &mut agent, &task);
        server.policy(|policy| policy.deliver_on_hello.clear());
        server.check(
            end.status != FinalStatus::Completed,
            &format!("write {nth}: {:?}", end.status),
        );
    }
}

/// The end of a task of an agent that may end under it, and then is started again; and whether it
/// was.
fn wait_end_with_restart(server: &ScriptedServer, agent: &mut Agent, task: &Task) -> (End, bool) {
    let deadline = Instant::now() + deadline();
    let mut restarted = false;
    loop {
        if let Some(end) = server.look(|log| log.end(&task.ids)) {
            return (end, restarted);
        }
        if agent.wait_exit_within(EXIT_POLL).is_some() {
            restarted = true;
            agent.start_again();
        }
        server.check(Instant::now() < deadline, "the task ends in time");
    }
}

/// Ends the agent at its n-th call, from `first` on; then it starts again without faults.
fn ends_at(call: &str, first: usize, last: usize, step: usize) {
    if !Agent::can_inject() {
        return;
    }
    let step = match std::env::var("HOSTLINK_FAULT_STEP") {
        Ok(step) => step.parse().expect("HOSTLINK_FAULT_STEP is a number"),
        Err(_) => step,
    };
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    let mut hits = 0;
    for nth in (first..=last).step_by(step) {
        let name = format!("{}-{nth}", call.trim_start_matches("/^"));
        let task = printing(&agent, &name);
        agent.terminate();
        server.policy(|policy| policy.deliver_on_hello = vec![task.clone()]);
        agent.inject(&format!("{call}:signal=KILL:when={nth}"));
        agent.start_again();
        let (end, restarted) = wait_end_with_restart(&server, &mut agent, &task);
        hits += usize::from(restarted);
        server.policy(|policy| policy.deliver_on_hello.clear());
        let runs = agent.runs(&name);
        let text = server.look(|log| log.text(&task.ids, Stream::Stdout));
        let context = format!(
            "{name}: {runs} runs, {:?}, {} bytes",
            end.status,
            text.len()
        );
        server.note(&context);
        let expected = expected_text();
        server.check(expected.starts_with(&text), &context);
        match end.status {
            FinalStatus::Completed => server.check(runs == 1 && text == expected, &context),
            FinalStatus::Interrupted => server.check(runs <= 1, &context),
            FinalStatus::Failed => server.fail(&context),
        }
    }
    server.check(hits > 0, &format!("{call} was never met"));
}

#[test]
fn the_agent_may_end_at_any_write() {
    ends_at("pwrite64", 1, 36, 4);
}

#[test]
fn the_agent_may_end_at_any_sync() {
    ends_at("fdatasync", 1, 36, 4);
}

#[test]
fn the_agent_may_end_at_any_preallocation() {
    ends_at("fallocate", 1, 3, 1);
}

#[test]
fn the_agent_may_end_at_any_sync_of_a_directory() {
    ends_at("fsync", 1, 6, 1);
}

#[test]
fn the_agent_may_end_at_any_unlink() {
    ends_at("/^unlink", 1, 1, 1);
}

/// The first start writes its identity by renames. A thread counts its own, so not each is met.
#[test]
fn the_agent_may_end_at_any_rename_of_its_first_start() {
    if !Agent::can_inject() {
        return;
    }
    let mut hits = 0;
    for nth in 1..=3 {
        let server = ScriptedServer::start();
        let mut agent = Agent::prepare(&server);
        agent.inject(&format!("/^rename:signal=KILL:when={nth}"));
        agent.start_again();
        if agent.wait_exit_within(RUN_TIME / 2).is_some() {
            hits += 1;
            agent.start_again();
        }
        server.link();
        runs_whole(&server, &agent, &format!("rename-{nth}"));
    }
    assert!(hits > 0, "a rename was met");
}

/// Later ones bring the index up to date and leave the mark of a clean stop.
#[test]
fn the_agent_may_end_at_any_later_rename() {
    if !Agent::can_inject() {
        return;
    }
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    let mut hits = 0;
    for nth in 1..=2 {
        agent.terminate();
        agent.inject(&format!("/^rename:signal=KILL:when={nth}"));
        agent.start_again();
        let ended = agent.wait_exit_within(RUN_TIME / 4);
        let ended = ended.unwrap_or_else(|| agent.terminate());
        hits += u32::from(!ended.success());
        let before = server.look(|log| log.connections());
        agent.start_again();
        server.wait_hello(before + 1);
        server.link();
        runs_whole(&server, &agent, &format!("later-rename-{nth}"));
    }
    server.check(hits > 0, "a rename was met");
}

fn runs_whole(server: &ScriptedServer, agent: &Agent, name: &str) {
    let task = printing(agent, name);
    server.deliver(&task);
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Completed, name);
    server.check_eq(agent.runs(name), 1, name);
    let text = server.look(|log| log.text(&task.ids, Stream::Stdout));
    server.check_eq(text, expected_text(), name);
}
