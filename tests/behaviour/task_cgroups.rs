//! Tasks in cgroups of their own, where the machine lets the agent make some: nothing escapes, not
//! even over the agent's own end, and no cgroup is left.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hostlink_edge::ids::{FinalStatus, Stream};

use crate::support::processes::Sleeper;
use crate::support::{Agent, Log, ScriptedServer, Task};

/// An agent with cgroups, and their folder; `None`, said loudly, where it may not make any.
fn with_cgroups(server: &ScriptedServer, settings: &[(&str, &str)]) -> Option<(Agent, PathBuf)> {
    let mut agent = Agent::prepare(server);
    agent.set("HOSTLINK_TASK_CGROUP", "auto");
    for (key, value) in settings {
        agent.set(key, value);
    }
    agent.start_again();
    server.link();
    let dir = agent.log().part_after("each task gets a cgroup below ");
    match dir {
        Some(dir) => Some((agent, dir.trim().into())),
        None => {
            eprintln!("SKIPPED: the agent may not make cgroups (version 2) on this machine");
            agent.wait_line("without cgroups");
            None
        }
    }
}

/// Neither environment, nor files, nor parent tell whose it is.
fn bare_daemon(command: &str) -> String {
    format!("(env -i setsid sh -c 'exec 3>&- 4>&- 5>&-; {command} >/dev/null 2>&1 & exit 0')")
}

fn leaves(dir: &PathBuf) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().is_dir()).count()
}

#[test]
fn a_task_lives_in_its_leaf_and_leaves_none_behind() {
    let server = ScriptedServer::start();
    let Some((mut agent, dir)) = with_cgroups(&server, &[]) else {
        return;
    };
    let sleeper = Sleeper::new();
    let command = format!(
        "cat /proc/self/cgroup; {}; {} & exit 3",
        bare_daemon(&sleeper.command()),
        sleeper.command()
    );
    let task = Task::new("leaf", command);
    server.deliver(&task);
    let end = server.wait_end(&task);
    server.check_eq((end.status, end.exit_code), (FinalStatus::Failed, 3), "end");
    let name = dir
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    let leaf = format!("{name}/{}", task.ids.key());
    server.check(
        end.output.contains(&leaf),
        &format!("{leaf} in {}", end.output),
    );
    server.check_eq(sleeper.running().len(), 0, "processes");
    let own = Task::new("own", "#!/bin/sh -e\ncat /proc/self/cgroup\n");
    server.deliver(&own);
    let end = server.wait_end(&own);
    let leaf = format!("{name}/{}", own.ids.key());
    server.check(
        end.output.contains(&leaf),
        &format!("{leaf} in {}", end.output),
    );
    server.check_eq(leaves(&dir), 0, "leaves");
    agent.terminate();
    server.check(!dir.exists(), "the folder is removed with the agent");
}

#[test]
fn what_an_agent_that_was_killed_has_left_is_found_by_its_cgroup() {
    let server = ScriptedServer::start();
    let Some((mut agent, dir)) = with_cgroups(&server, &[]) else {
        return;
    };
    let sleeper = Sleeper::new();
    let command = format!(
        "{}; {}",
        bare_daemon(&sleeper.command()),
        agent.hold("never")
    );
    let task = Task::new("bare", command);
    server.deliver(&task);
    let running = sleeper.wait_for(1, Duration::from_secs(10));
    server.check_eq(running, 1, "the daemon before the kill");
    agent.kill();
    agent.start_again();
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Interrupted, "end");
    server.check_eq(sleeper.running().len(), 0, "processes");
    server.check_eq(leaves(&dir), 0, "leaves");
    agent.terminate();
}

#[test]
fn a_task_that_ignores_term_is_killed_with_its_cgroup() {
    let server = ScriptedServer::start();
    let settings = [("HOSTLINK_TASK_KILL_GRACE", "300ms")];
    let Some((mut agent, dir)) = with_cgroups(&server, &settings) else {
        return;
    };
    let sleeper = Sleeper::new();
    let daemon = bare_daemon(&format!("trap \"\" TERM; {}", sleeper.command()));
    let command = format!("trap \"\" TERM; {daemon}; {}", agent.hold("never"));
    let task = Task {
        timeout_seconds: Some(1),
        ..Task::new("stubborn", command)
    };
    let begun = Instant::now();
    server.deliver(&task);
    let end = server.wait_end(&task);
    let took = begun.elapsed();
    server.check_eq(end.status, FinalStatus::Failed, "end");
    server.check(took < Duration::from_secs(4), &format!("took {took:?}"));
    server.check_eq(sleeper.running().len(), 0, "processes");
    server.check_eq(leaves(&dir), 0, "leaves");
    agent.terminate();
}

/// They stand still only while they are found.
#[test]
fn whoever_lives_in_the_cgroup_may_tidy_up() {
    let server = ScriptedServer::start();
    server.acknowledge_hellos_with(serde_json::json!({"extensions": ["cancel"]}));
    let settings = [("HOSTLINK_TASK_KILL_GRACE", "60s")];
    let Some((mut agent, dir)) = with_cgroups(&server, &settings) else {
        return;
    };
    let daemon = |says: &str| {
        let tidies = format!("trap \"{says}; exit\" TERM; echo up; while :; do sleep 0.05; done");
        format!("setsid sh -c '{tidies}'")
    };
    let command = format!(
        "{} & trap 'wait; echo and the shell; exit' TERM; while :; do sleep 0.05; done",
        daemon("echo the daemon")
    );
    let cancelled = Task::new("cancelled", command);
    server.deliver(&cancelled);
    let text = |log: &Log, task: &Task| log.text(&task.ids, Stream::Stdout);
    server.wait_until("the daemon runs", |log| {
        text(log, &cancelled).contains("up")
    });
    server
        .link()
        .send("task.cancel", Some(&cancelled.ids), serde_json::json!({}));
    let end = server.wait_end(&cancelled);
    server.check_eq(end.status, FinalStatus::Interrupted, "end");
    server.check_eq(
        end.output.as_str(),
        "up\nthe daemon\nand the shell\n",
        "output",
    );

    // Left behind by a shell that has ended by itself.
    let left = agent.path("left").display().to_string();
    let command = format!(
        "{} & while [ ! -e {left} ]; do sleep 0.05; done; exit 5",
        daemon(&format!("echo tidy >{left}")).replace("echo up", &format!("echo up >{left}"))
    );
    let leaves_one = Task::new("leaves-one", command);
    server.deliver(&leaves_one);
    let end = server.wait_end(&leaves_one);
    server.check_eq(end.exit_code, 5, "exit code");
    let said = std::fs::read_to_string(&left).unwrap_or_default();
    server.check_eq(said.as_str(), "tidy\n", "what the daemon has written last");
    server.check_eq(leaves(&dir), 0, "leaves");
    agent.terminate();
}

#[test]
fn bounds_that_nothing_keeps_are_told() {
    let server = ScriptedServer::start();
    let settings = [
        ("HOSTLINK_TASK_MEMORY_MAX", "33554432"),
        ("HOSTLINK_TASK_CPU_MAX", "50"),
        ("HOSTLINK_TASK_PIDS_MAX", "20"),
    ];
    let agent = Agent::with(&server, &settings);
    agent.wait_line(
        "tasks run without the bounds HOSTLINK_TASK_MEMORY_MAX, HOSTLINK_TASK_PIDS_MAX, \
         HOSTLINK_TASK_CPU_MAX: switched off by HOSTLINK_TASK_CGROUP",
    );
    server.run_another("all the same");
}
