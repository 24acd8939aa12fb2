//! What a command finds: its environment, its stdin, its process group, and no secrets.

use std::collections::BTreeSet;

use crate::support::server::{TOKEN_ID, TOKEN_KEY};
use crate::support::{Agent, ScriptedServer, Task};

fn output_of(server: &ScriptedServer, name: &str, command: &str) -> String {
    let task = Task::new(name, command);
    server.deliver(&task);
    server.wait_final(&task);
    server.look(|log| log.stdout(&task.ids))
}

#[test]
fn the_environment_has_what_it_should_and_no_secrets() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    for (key, value) in [
        ("USER", "somebody"),
        ("SHELL", "/bin/sh"),
        ("TERM", "dumb"),
        ("UNRELATED", "of the agent alone"),
    ] {
        agent.set(key, value);
    }
    agent.start_again();
    let text = output_of(&server, "env", "env");
    let names: BTreeSet<&str> = text.lines().filter_map(|l| l.split('=').next()).collect();
    let expected = [
        "PATH",
        "HOME",
        "LANG",
        "USER",
        "SHELL",
        "TERM",
        "HOSTLINK_TASK_ID",
        "HOSTLINK_ATTEMPT_ID",
        "HOSTLINK_TASK_MARK",
    ];
    for name in expected {
        server.check(
            names.contains(name),
            &format!("{name} is missing in {names:?}"),
        );
    }
    // What a shell sets by itself.
    let of_the_shell = ["PWD", "OLDPWD", "SHLVL", "_"];
    for name in &names {
        let known = expected.contains(name) || of_the_shell.contains(name);
        server.check(known, &format!("{name} should not be in the environment"));
    }
    for line in [
        "HOSTLINK_TASK_ID=task-env",
        "HOSTLINK_ATTEMPT_ID=attempt-env",
    ] {
        server.check(
            text.lines().any(|l| l == line),
            &format!("{line} in {text}"),
        );
    }
    for secret in [TOKEN_ID, TOKEN_KEY] {
        server.check(!text.contains(secret), "a secret is in the environment");
    }
}

#[test]
fn stdin_is_empty() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let text = output_of(&server, "stdin", "readlink /proc/self/fd/0; cat; echo end");
    server.check_eq(text, "/dev/null\nend\n".to_owned(), "stdin");
}

#[test]
fn a_task_has_a_process_group_of_its_own() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let command = "read -r pid name state parent group rest < /proc/$$/stat; echo $$ $group";
    let text = output_of(&server, "group", command);
    let numbers: Vec<i32> = text
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    server.check(
        numbers.len() == 2 && numbers[0] == numbers[1] && numbers[1] != agent.pid(),
        &format!("shell and group {text:?}, agent {}", agent.pid()),
    );
}

#[test]
fn no_file_of_the_agent_is_open_in_a_task() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let text = output_of(&server, "files", "ls -l /proc/self/fd");
    let state = agent.state().display().to_string();
    for part in [state.as_str(), "socket:"] {
        server.check(!text.contains(part), &format!("{part} in {text}"));
    }
}

#[test]
fn a_script_may_name_its_interpreter() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let script = "#!/bin/cat\nthis line is printed, not run\n";
    let text = output_of(&server, "cat", script);
    server.check_eq(text, script.to_owned(), "output");
}

#[test]
fn secrets_are_not_logged() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_LOG", "trace")]);
    // Octal, so that the command itself does not contain what it prints.
    let printed = output_of(&server, "said", r"printf 'output\055of\055the\055task'");
    server.check_eq(printed.as_str(), "output-of-the-task", "output");
    for secret in [TOKEN_KEY, "output-of-the-task"] {
        server.check(
            !agent.log().contains(secret),
            &format!("{secret} was logged"),
        );
    }
}
