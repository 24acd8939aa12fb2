//! Tasks that no manual expects: they end as they should, and the agent goes on.

use std::time::{Duration, Instant};

use hostlink_edge::ids::FinalStatus;

use crate::support::processes::Sleeper;
use crate::support::{Agent, ScriptedServer, Task};

#[test]
fn a_task_that_kills_the_agent_is_interrupted_and_gone() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    let sleeper = Sleeper::new();
    let command = format!(
        "{}; kill -9 $PPID; {}",
        agent.trace("killer"),
        sleeper.command()
    );
    let task = Task::new("killer", command);
    server.deliver(&task);
    server.check(!agent.wait_exit().success(), "the agent was killed");
    let running = sleeper.wait_for(1, Duration::from_secs(10));
    server.check_eq(running, 1, "the task goes on without the agent");
    agent.start_again();
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Interrupted, "end");
    server.check_eq(sleeper.running().len(), 0, "processes");
    server.run_another("afterwards");
    server.check_eq(agent.runs("killer"), 1, "runs");
}

/// Without mark, but still what was noted as the leader of a task, and its group.
#[test]
fn a_shell_that_becomes_a_program_without_environment_is_found() {
    let server = ScriptedServer::start();
    for leftovers in ["kill", "keep"] {
        let mut agent = Agent::with(&server, &[("HOSTLINK_TASK_LEFTOVERS", leftovers)]);
        let sleeper = Sleeper::new();
        let sleep = sleeper.command();
        let command = format!("exec env -i sh -c 'exec 3>&-; {sleep} & {sleep}; :'");
        let task = Task::new(leftovers, command);
        server.deliver(&task);
        let running = sleeper.wait_for(2, Duration::from_secs(10));
        server.check_eq(running, 2, "processes before the kill");
        agent.kill();
        agent.start_again();
        let end = server.wait_end(&task);
        server.check_eq(end.status, FinalStatus::Interrupted, leftovers);
        server.check_eq(sleeper.running().len(), 0, leftovers);
        agent.terminate();
    }
}

#[test]
fn streams_that_are_closed_early_end_nothing() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let command = format!(
        "echo before; exec >&- 2>&-; {}; exit 5",
        agent.hold("closed")
    );
    let task = Task::new("closes", command);
    server.deliver(&task);
    server.wait_frame("task.output", &task);
    let has_ended = server.look(|log| log.end(&task.ids).is_some());
    server.check(!has_ended, "it runs without streams");
    agent.release("closed");
    let end = server.wait_end(&task);
    server.check_eq(end.exit_code, 5, "exit code");
    server.check_eq(end.output.as_str(), "before\n", "output");
}

#[test]
fn who_reads_stdin_finds_its_end() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let task = Task::new("reads", "read -r line || echo end; cat; wc -c");
    server.deliver(&task);
    let end = server.wait_end(&task);
    server.check_eq(end.output.as_str(), "end\n0\n", "output");
}

#[test]
fn a_gibibyte_passes_by_a_bounded_capture() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_OUTPUT_MAX", "1000000")]);
    server.run_another("before");
    let before = agent.peak_resident_kib();
    let command = "head -c 1073741824 /dev/zero; echo; echo the end";
    let task = Task::new("gibibyte", command);
    server.deliver(&task);
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Completed, "end");
    server.check(
        end.output.ends_with("\0\nthe end\n"),
        "the last bytes are in the final",
    );
    let (frames, truncated) = server.look(|log| {
        let chunks = log.chunks(&task.ids, hostlink_edge::ids::Stream::Stdout);
        let result = log.first_final(&task.ids).and_then(|it| it.result());
        let bytes: usize = chunks
            .iter()
            .filter_map(|frame| Some(frame.output()?.2.len()))
            .sum();
        (bytes, result.map(|it| it.output_truncated))
    });
    server.check_eq(frames, 1_000_000, "bytes sent");
    server.check_eq(truncated, Some(true), "flag");
    agent.wait_line("HOSTLINK_TASK_OUTPUT_MAX");
    let grown = agent.peak_resident_kib().saturating_sub(before);
    server.check(
        grown < 8 * 1024,
        &format!("{grown} KiB more resident than {before}"),
    );
}

/// Others keep their pace beside a task that writes without pause.
#[test]
fn an_output_bomb_holds_up_nobody() {
    let server = ScriptedServer::start();
    let agent = Agent::with(
        &server,
        &[
            ("HOSTLINK_TASK_CONCURRENCY", "2"),
            ("HOSTLINK_TASK_OUTPUT_MAX", "100000"),
            ("HOSTLINK_TASK_KILL_GRACE", "300ms"),
        ],
    );
    let bomb = Task {
        timeout_seconds: Some(8),
        ..Task::new("bomb", "yes & yes >&2")
    };
    server.deliver(&bomb);
    server.wait_frame("task.output", &bomb);
    let begun = Instant::now();
    for number in 0..20 {
        server.run_another(&format!("beside-{number}"));
    }
    let took = begun.elapsed();
    server.check(
        took < Duration::from_secs(6),
        &format!("20 tasks took {took:?}"),
    );
    let is_running = server.look(|log| log.end(&bomb.ids).is_none());
    server.check(is_running, "the bomb has not ended by itself");
    let end = server.wait_end(&bomb);
    server.check_eq(end.status, FinalStatus::Failed, "end");
    let resident = agent.peak_resident_kib();
    server.check(resident < 64 * 1024, &format!("{resident} KiB resident"));
}

/// A bomb inside a bound of processes, of which nothing is left. As another user the bound works
/// without cgroups, too.
#[test]
fn a_fork_bomb_is_bounded_and_ended() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: without root and without cgroups nothing bounds processes");
        return;
    }
    let server = ScriptedServer::start();
    let agent = Agent::with(
        &server,
        &[
            ("HOSTLINK_TASK_USER", "61234:61234"),
            ("HOSTLINK_TASK_PIDS_MAX", "60"),
            ("HOSTLINK_TASK_KILL_GRACE", "100ms"),
        ],
    );
    agent.wait_line("60 processes at most is a bound of the user of all tasks");
    // Each one leaves group and session, and has ended before it can be looked at.
    let script = agent.path("bomb.sh");
    let text = format!(
        "#!/bin/sh\ntrap '' TERM\nwhile :; do setsid {0} & setsid {0} & sleep 0.01; done 2>/dev/null\n",
        script.display()
    );
    std::fs::write(&script, text).expect("writable");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).expect("our own file");
    for dir in [agent.dir.clone(), script.clone()] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir, mode).expect("our own file");
    }
    let task = Task {
        timeout_seconds: Some(2),
        ..Task::new("bomb", format!("{} >/dev/null 2>&1", script.display()))
    };
    server.deliver(&task);
    server.wait_frame("task.started", &task);
    let mut most = 0;
    let begun = Instant::now();
    while server.look(|log| log.end(&task.ids).is_none()) && begun.elapsed().as_secs() < 25 {
        most = most.max(processes_of(61234));
        std::thread::sleep(Duration::from_millis(50));
    }
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Failed, &end.error);
    server.check(
        (10..=60).contains(&most),
        &format!("{most} processes at once"),
    );
    server.check_eq(processes_of(61234), 0, "processes left");
    server.run_another("afterwards");
}

fn processes_of(uid: u32) -> usize {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted");
    let is_of = |entry: &std::fs::DirEntry| {
        let name = entry.file_name();
        let is_process = name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        is_process && entry.metadata().is_ok_and(|it| it.uid() == uid)
    };
    entries.flatten().filter(is_of).count()
}
