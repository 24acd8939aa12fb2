//! What a task leaves running is ended with it, wherever it hides; or it is kept by the settings.

use std::time::{Duration, Instant};

use hostlink_edge::ids::FinalStatus;

use crate::support::processes::{Sleeper, zombies_of};
use crate::support::{Agent, ScriptedServer, Task};

/// From the exit of the shell to the final, at most.
const LEFTOVER_TIME: Duration = Duration::from_secs(2);

/// Leaves its group and session, and its parent exits.
fn daemon(command: &str) -> String {
    format!("(setsid sh -c '{command} >/dev/null 2>&1 & exit 0')")
}

/// As [`daemon`], without environment and without a file of the task.
fn bare_daemon(command: &str) -> String {
    format!("(env -i setsid sh -c 'exec 3>&- 4>&- 5>&-; {command} >/dev/null 2>&1 & exit 0')")
}

#[test]
fn a_leaked_pipe_ends_with_what_was_printed() {
    for leftovers in ["kill", "keep"] {
        let server = ScriptedServer::start();
        let _agent = Agent::with(&server, &[("HOSTLINK_TASK_LEFTOVERS", leftovers)]);
        let sleeper = Sleeper::new();
        let task = Task::new("leak", format!("echo printed; {} &", sleeper.command()));
        server.deliver(&task);
        server.wait_frame("task.output", &task);
        let begun = Instant::now();
        let end = server.wait_end(&task);
        let took = begun.elapsed();
        server.check(took < LEFTOVER_TIME, &format!("{leftovers}: {took:?}"));
        server.check_eq(end.status, FinalStatus::Completed, leftovers);
        let text = server.look(|log| log.stdout(&task.ids));
        server.check_eq(text.as_str(), "printed\n", leftovers);
        let expected = usize::from(leftovers == "keep");
        server.check_eq(sleeper.running().len(), expected, leftovers);
    }
}

#[test]
fn daemons_are_found_wherever_they_hide() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    leaves_nothing(&server, &agent);
}

#[test]
fn daemons_are_found_without_pidfds() {
    if !Agent::can_inject() {
        return;
    }
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    agent.inject("pidfd_open:error=ENOSYS");
    agent.start_again();
    leaves_nothing(&server, &agent);
}

#[test]
fn daemons_are_found_by_an_ordinary_user() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    agent.set("HOSTLINK_TASK_CGROUP", "auto");
    if !agent.run_as(61235) {
        return;
    }
    agent.start_again();
    agent.wait_line("without cgroups");
    leaves_nothing(&server, &agent);
}

/// A root that cannot be written, a state directory from which nothing may be executed, and no
/// cgroups to be seen.
#[test]
fn daemons_are_found_on_a_bare_system() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    agent.set("HOSTLINK_TASK_CGROUP", "auto");
    agent.set("HOSTLINK_TASK_NICE", "1");
    let state = agent.state().display().to_string();
    let mounts = format!(
        "mount --bind {state} {state} && mount -o remount,bind,noexec {state} && \
         mount -t tmpfs none /sys/fs/cgroup && mount -o remount,bind,ro /"
    );
    if !agent.mount(&mounts) {
        return;
    }
    agent.start_again();
    agent.wait_line("without cgroups");
    let task = Task::new("root", "touch /usr/written 2>/dev/null || echo read-only");
    server.deliver(&task);
    let end = server.wait_end(&task);
    server.check_eq(
        end.output.as_str(),
        "read-only\n",
        "the root is as it should be",
    );
    leaves_nothing(&server, &agent);
    agent.kill();
    agent.start_again();
    server.run_another("after a restart");
}

/// In a container the agent may be process 1, of the group 0: its leader is out of sight.
#[test]
fn daemons_are_found_by_the_first_process_of_a_container() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can make a container");
        return;
    }
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    agent.before("exec unshare --pid --fork --kill-child --mount-proc -- \"$0\" \"$@\"");
    agent.start_again();
    let sleeper = Sleeper::new();
    let task = Task::new(
        "daemon",
        format!(
            "echo $PPID; cut -d' ' -f5 /proc/1/stat; {}",
            daemon(&sleeper.command())
        ),
    );
    server.deliver(&task);
    let end = server.wait_end(&task);
    server.check_eq(
        end.output.as_str(),
        "1\n0\n",
        "process and group of the agent",
    );
    server.check_eq(end.status, FinalStatus::Completed, "end");
    server.check_eq(sleeper.running().len(), 0, "processes");
    let task = Task::new(
        "running",
        format!("{}; {}", daemon(&sleeper.command()), agent.hold("never")),
    );
    server.deliver(&task);
    server.check_eq(
        sleeper.wait_for(1, Duration::from_secs(10)),
        1,
        "the daemon before the kill",
    );
    agent.kill();
    agent.start_again();
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Interrupted, "end");
    server.check_eq(sleeper.running().len(), 0, "processes");
}

fn leaves_nothing(server: &ScriptedServer, agent: &Agent) {
    for (name, hide) in [
        ("daemon", daemon as fn(&str) -> String),
        ("bare", bare_daemon),
    ] {
        let sleeper = Sleeper::new();
        let command = hide(&sleeper.command());
        let task = Task::new(name, format!("{command}; {command}; {command}"));
        server.deliver(&task);
        let end = server.wait_end(&task);
        server.check_eq(end.status, FinalStatus::Completed, name);
        server.check_eq(sleeper.running().len(), 0, name);
    }
    server.check_eq(zombies_of(agent.pid()), 0, "zombies");
}

#[test]
fn kept_daemons_outlive_their_task_other_tasks_and_the_agent() {
    let server = ScriptedServer::start();
    let mut agent = Agent::with(&server, &[("HOSTLINK_TASK_LEFTOVERS", "keep")]);
    let (kept, bare) = (Sleeper::new(), Sleeper::new());
    let command = format!(
        "{}; {}",
        daemon(&kept.command()),
        bare_daemon(&bare.command())
    );
    let task = Task::new("keeps", command);
    server.deliver(&task);
    server.wait_end(&task);
    let both = |when: &str| {
        let running = (kept.running().len(), bare.running().len());
        server.check_eq(running, (1, 1), when);
    };
    both("after the task");
    let ended = Task::new("ended", "sleep 1000");
    let ended = Task {
        timeout_seconds: Some(1),
        ..ended
    };
    server.deliver(&ended);
    server.wait_end(&ended);
    both("after another task that was ended");
    // What an interrupted task leaves is ended all the same.
    let interrupted = Sleeper::new();
    let command = format!(
        "{}; {}",
        daemon(&interrupted.command()),
        agent.hold("never")
    );
    let task = Task::new("interrupted", command);
    server.deliver(&task);
    server.check_eq(
        interrupted.wait_for(1, Duration::from_secs(10)),
        1,
        "the daemon of the task that runs",
    );
    agent.kill();
    agent.start_again();
    server.wait_end(&task);
    server.check_eq(interrupted.running().len(), 0, "of the interrupted task");
    both("after the restart");
}

#[test]
fn the_end_of_one_task_ends_nothing_of_another() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_CONCURRENCY", "2")]);
    let (of_first, of_second, bare) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    let first = Task::new(
        "first",
        format!(
            "{}; {} & echo runs; {}",
            daemon(&of_first.command()),
            of_first.command(),
            agent.hold("first")
        ),
    );
    server.deliver(&first);
    server.wait_frame("task.output", &first);
    server.check_eq(of_first.wait_for(2, LEFTOVER_TIME), 2, "of the first");
    let command = format!(
        "{}; {}",
        daemon(&of_second.command()),
        bare_daemon(&bare.command())
    );
    let second = Task::new("second", command);
    server.deliver(&second);
    server.wait_end(&second);
    server.check_eq(of_second.running().len(), 0, "of the second");
    server.check_eq(of_first.running().len(), 2, "of the first beside it");
    agent.release("first");
    server.wait_end(&first);
    server.check_eq(of_first.running().len(), 0, "of the first at its end");
    // Nothing tells whose this was, so the last task answers for it.
    server.check_eq(bare.running().len(), 0, "without a trace");
}

#[test]
fn a_timeout_ends_a_task_that_ignores_term_and_its_daemons() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_KILL_GRACE", "300ms")]);
    let sleeper = Sleeper::new();
    let stubborn = format!(
        "trap \"\" TERM; (trap \"\" TERM; {}) & {}; {}",
        sleeper.command(),
        daemon(&format!("trap \"\" TERM; {}", sleeper.command())),
        agent.hold("never")
    );
    let task = Task {
        timeout_seconds: Some(1),
        ..Task::new("stubborn", stubborn)
    };
    let begun = Instant::now();
    server.deliver(&task);
    let end = server.wait_end(&task);
    let took = begun.elapsed();
    server.check_eq(
        (end.status, end.exit_code),
        (FinalStatus::Failed, -1),
        "end",
    );
    server.check(took < Duration::from_secs(4), &format!("took {took:?}"));
    server.check_eq(sleeper.running().len(), 0, "processes");
    server.check_eq(zombies_of(agent.pid()), 0, "zombies");
}

#[test]
fn orphans_that_exit_while_the_task_runs_are_collected() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let command = format!(
        "for i in $(seq 50); do (setsid true &); done; echo done; {}",
        agent.hold("end")
    );
    let task = Task::new("orphans", command);
    server.deliver(&task);
    server.wait_frame("task.output", &task);
    let deadline = Instant::now() + Duration::from_secs(10);
    while zombies_of(agent.pid()) > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    server.check_eq(zombies_of(agent.pid()), 0, "zombies while the task runs");
    agent.release("end");
    server.wait_end(&task);
}
