//! Two agents on one state directory: the second one ends with 75 and names the first.

use std::process::{Command, Stdio};

use crate::support::{Agent, ScriptedServer, program};

#[test]
fn the_second_agent_says_who_holds_the_directory() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    let second = Command::new(program())
        .arg("run")
        .env_clear()
        .env("SH_CONTROL_PLANE_URL", server.url())
        .env("HOSTLINK_STATE_PATH", agent.state())
        .stdin(Stdio::null())
        .output()
        .expect("the agent's binary can be started");
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    server.check_eq(
        second.status.code(),
        Some(75),
        &format!("exit status; it said: {said}"),
    );
    server.check(
        said.contains(&agent.pid().to_string()),
        &format!("{said:?} names process {}", agent.pid()),
    );
    // The first one is not disturbed, and its end frees the directory.
    server.run_another("undisturbed");
    agent.kill();
    agent.start_again();
    server.run_another("afterwards");
}
