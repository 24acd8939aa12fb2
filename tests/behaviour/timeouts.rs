//! How long a task may run: its own `timeout_seconds`, bounded by `HOSTLINK_TASK_TIMEOUT`, which is
//! also the default. TERM comes first, KILL after the grace, and the final says which bound it was.

use std::time::{Duration, Instant};

use hostlink_edge::ids::FinalStatus;

use crate::support::{Agent, ScriptedServer, Task};

/// Runs what would never end, and returns after how long it did.
fn times_out(server: &ScriptedServer, agent: &Agent, task: &Task, error: &str) -> Duration {
    let task = Task {
        command: agent.hold("never"),
        ..task.clone()
    };
    let begun = Instant::now();
    server.deliver(&task);
    let end = server.wait_end(&task);
    server.check_eq(
        (end.status, end.exit_code, end.error.lines().last()),
        (FinalStatus::Failed, -1, Some(error)),
        "end",
    );
    begun.elapsed()
}

fn task(name: &str, timeout_seconds: Option<u64>) -> Task {
    Task {
        timeout_seconds,
        ..Task::new(name, "")
    }
}

#[test]
fn the_setting_is_the_default_and_the_upper_bound() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_TIMEOUT", "1500ms")]);
    let check = |name: &str, timeout: Option<u64>, error: &str, at_least: u64| {
        let took = times_out(&server, &agent, &task(name, timeout), error);
        let least = Duration::from_millis(at_least);
        server.check(
            took >= least && took < least + Duration::from_secs(8),
            &format!("{name}: {took:?}"),
        );
    };
    check("default", None, "timed out after 1.5 s", 1500);
    check("longer", Some(3600), "timed out after 1.5 s", 1500);
    check("shorter", Some(1), "timed out after 1 s", 1000);
    // One that ends in time is not touched.
    let quick = Task {
        timeout_seconds: Some(60),
        ..Task::new("quick", "echo done")
    };
    server.deliver(&quick);
    let end = server.wait_end(&quick);
    server.check_eq(
        (end.status, end.output.as_str()),
        (FinalStatus::Completed, "done\n"),
        "end",
    );
}

#[test]
fn a_task_that_obeys_term_may_tidy_up_in_the_grace() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_KILL_GRACE", "20s")]);
    let command = format!(
        "trap 'echo tidying; sleep 0.5; echo tidied; exit 0' TERM; echo begun; {}",
        agent.hold("never")
    );
    let task = Task {
        timeout_seconds: Some(1),
        ..Task::new("tidies", command)
    };
    let begun = Instant::now();
    server.deliver(&task);
    let end = server.wait_end(&task);
    let took = begun.elapsed();
    server.check_eq(
        (end.status, end.exit_code, end.error.lines().last()),
        (FinalStatus::Failed, -1, Some("timed out after 1 s")),
        "end",
    );
    server.check_eq(end.output.as_str(), "begun\ntidying\ntidied\n", "output");
    server.check(
        took < Duration::from_secs(10),
        &format!("the grace was not waited for: {took:?}"),
    );
}
