//! A command that cannot be run ends the attempt `failed`, with the reason.

use hostlink_edge::ids::FinalStatus;

use crate::support::{Agent, ScriptedServer, Task};

fn refused_with_reason(server: &ScriptedServer, task: &Task, reason: &str) {
    let end = server.wait_end(task);
    server.check_eq(
        (end.status, end.exit_code),
        (FinalStatus::Failed, -1),
        "end of the attempt",
    );
    server.check(
        end.error.contains(reason),
        &format!("{reason:?} in {end:?}"),
    );
}

#[test]
fn a_command_with_nul() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let task = Task::new("nul", format!("{}\0", agent.trace("nul")));
    server.deliver(&task);
    refused_with_reason(&server, &task, "NUL");
    server.check_eq(agent.runs("nul"), 0, "runs");
    server.run_another("afterwards");
}

#[test]
fn a_command_over_the_limit() {
    let server = ScriptedServer::start();
    server.policy(|policy| policy.delivery_enabled = false);
    let agent = Agent::start(&server);
    let long = format!("{} # {}", agent.trace("long"), "x".repeat(1024 * 1024));
    let task = Task::new("long", long);
    server.policy(|policy| policy.poll_tasks = vec![task.polled()]);
    refused_with_reason(&server, &task, "1048576");
    server.check_eq(agent.runs("long"), 0, "runs");
}

#[test]
fn a_large_command_within_the_limit_runs() {
    let server = ScriptedServer::start();
    server.policy(|policy| policy.delivery_enabled = false);
    let agent = Agent::start(&server);
    let long = format!("{} # {}", agent.trace("large"), "x".repeat(1000 * 1000));
    let task = Task::new("large", long);
    server.policy(|policy| policy.poll_tasks = vec![task.polled()]);
    server.check_eq(server.wait_end(&task).exit_code, 0, "exit code");
    server.check_eq(agent.runs("large"), 1, "runs");
}

#[test]
fn an_empty_command_does_nothing() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let task = Task::new("empty", "");
    server.deliver(&task);
    server.wait_final(&task);
    server.run_another("afterwards");
}

#[test]
fn a_bad_task_in_a_poll_spoils_no_other() {
    let server = ScriptedServer::start();
    server.policy(|policy| policy.delivery_enabled = false);
    let _agent = Agent::start(&server);
    let good = Task::new("good", "echo fine");
    let nameless = serde_json::json!({"id": "", "command": "true"});
    let odd = serde_json::json!({"id": 5, "command": ["true"]});
    server.policy(|policy| policy.poll_tasks = vec![nameless, odd, good.polled()]);
    server.wait_end(&good);
}
