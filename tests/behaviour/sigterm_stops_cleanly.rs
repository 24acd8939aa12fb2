//! SIGTERM: a running task may finish within the kill grace, else it is ended and recorded
//! `interrupted`; the agent exits 0.

use std::path::Path;

use hostlink_edge::ids::FinalStatus;

use crate::support::{Agent, ScriptedServer, Task};

#[test]
fn a_short_task_finishes() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    // The signal is sent by the task itself, so it prints its line after it.
    let command = format!("kill -TERM {}; sleep 0.5; echo finished", agent.pid());
    let task = Task::new("short", command);
    server.deliver(&task);
    let status = agent.wait_exit();
    server.check_eq(status.code(), Some(0), "exit status");
    if server.look(|log| log.end(&task.ids).is_none()) {
        agent.start_again();
    }
    let end = server.wait_end(&task);
    server.check_eq(
        (end.status, end.output),
        (FinalStatus::Completed, "finished\n".to_owned()),
        "end of the task",
    );
    server.check_eq(
        server.look(|log| log.stdout(&task.ids)),
        "finished\n".into(),
        "output",
    );
}

#[test]
fn a_long_task_is_ended_and_recorded() {
    let server = ScriptedServer::start();
    let mut agent = Agent::with(&server, &[("HOSTLINK_TASK_KILL_GRACE", "500ms")]);
    // A child that ignores SIGTERM needs the whole way to SIGKILL.
    let command = format!(
        "trap '' TERM; echo $$ > {}; echo printed; {}",
        agent.path("pid").display(),
        agent.hold("never")
    );
    let task = Task::new("long", command);
    server.deliver(&task);
    server.wait_frame("task.output", &task);
    let status = agent.terminate();
    server.check_eq(status.code(), Some(0), "exit status");
    let pid = std::fs::read_to_string(agent.path("pid")).expect("the task wrote its pid");
    let alive = Path::new("/proc").join(pid.trim()).join("cwd").exists();
    server.check(!alive, "the task's group is ended");
    if server.look(|log| log.end(&task.ids).is_none()) {
        agent.start_again();
    }
    let end = server.wait_end(&task);
    server.check_eq(
        (end.status, end.exit_code, end.output),
        (FinalStatus::Interrupted, -1, "printed\n".to_owned()),
        "end of the task",
    );
}

#[test]
fn an_idle_agent_stops_and_a_queued_attempt_waits_for_the_next_start() {
    let server = ScriptedServer::start();
    let mut agent = Agent::with(&server, &[("HOSTLINK_TASK_KILL_GRACE", "0s")]);
    let running = Task::new("running", agent.hold("never"));
    let queued = Task::new("queued", agent.trace("queued"));
    server.deliver(&running);
    server.wait_frame("task.started", &running);
    server.deliver(&queued);
    server.wait_frame("task.received", &queued);
    server.check_eq(agent.terminate().code(), Some(0), "exit status");
    server.check_eq(agent.runs("queued"), 0, "no task is started while stopping");
    agent.start_again();
    server.wait_end(&queued);
    server.check_eq(agent.runs("queued"), 1, "runs");
    server.check_eq(agent.terminate().code(), Some(0), "exit status when idle");
}

#[test]
fn an_agent_that_cannot_connect_stops_too() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    // A port that was free a moment ago, so nobody listens on it.
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = closed.local_addr().expect("bound").port();
    drop(closed);
    agent.set("SH_CONTROL_PLANE_URL", &format!("http://127.0.0.1:{port}"));
    agent.start_again();
    agent.wait_line("refused");
    server.check_eq(agent.terminate().code(), Some(0), "exit status");
}
