//! What a task may use, kept by the kernel: memory, processes and CPU by cgroups of version 2, and
//! that it takes a task before the agent. Machines without them say so; `targets/qemu/with_cgroups.py`
//! runs these on one that has them.

use std::time::{Duration, Instant};

use hostlink_edge::ids::FinalStatus;
use hostlink_edge::wire::FinalPayload;

use crate::support::cgroups::Service;
use crate::support::processes::Sleeper;
use crate::support::{Agent, ScriptedServer, Task};

const ALL: [&str; 3] = ["memory", "pids", "cpu"];
const MIB: u64 = 1 << 20;
/// Reads a line that never ends into memory.
const HOG: &str = "tail /dev/zero";

fn start(server: &ScriptedServer, service: &Service, settings: &[(&str, &str)]) -> Agent {
    server.acknowledge_hellos_with(serde_json::json!({"extensions": ["usage", "cancel"]}));
    let mut agent = Agent::prepare(server);
    for (key, value) in settings {
        agent.set(key, value);
    }
    service.hold(&mut agent);
    agent.start_again();
    agent.wait_line("each task gets a cgroup below");
    agent
}

fn result(server: &ScriptedServer, task: &Task) -> FinalPayload<String> {
    let fin = server.wait_final(task);
    fin.result().expect("a final").clone()
}

/// Not one warning about a bound that is not kept.
fn keeps_bounds(server: &ScriptedServer, agent: &Agent) {
    server.check(
        !agent.log().contains("without the bounds"),
        "all bounds are kept",
    );
}

#[test]
fn a_task_over_its_memory_is_killed_whole_and_says_so() {
    let Some(service) = Service::new(&ALL) else {
        return;
    };
    let server = ScriptedServer::start();
    let bound = 48 * MIB;
    let agent = start(
        &server,
        &service,
        &[
            ("HOSTLINK_TASK_MEMORY_MAX", &bound.to_string()),
            ("HOSTLINK_TASK_CONCURRENCY", "2"),
        ],
    );
    keeps_bounds(&server, &agent);
    let pid = agent.pid();
    let beside = Task::new("beside", format!("{}; echo whole", agent.hold("beside")));
    server.deliver(&beside);
    server.wait_frame("task.started", &beside);
    // The shell would go on and make something of half a task.
    let sleeper = Sleeper::new();
    let command = format!("echo begun; {} & {HOG}; echo survived", sleeper.command());
    let hog = Task::new("hog", command);
    server.deliver(&hog);
    let end = result(&server, &hog);
    server.check_eq(
        (end.status, end.exit_code),
        (FinalStatus::Failed, -1),
        "end",
    );
    let error = end.error.as_deref().unwrap_or_default();
    server.check(
        error.ends_with("killed by signal 9: out of memory, the kernel killed it"),
        &format!("the reason is in {error:?}"),
    );
    server.check_eq(end.output.as_deref(), Some("begun\n"), "output");
    server.check_eq(sleeper.running().len(), 0, "processes of the task");
    let peak = end.usage.map(|it| it.memory_peak_bytes).unwrap_or_default();
    // The kernel counts in batches of pages for each CPU.
    server.check(
        (bound / 2..=bound + MIB).contains(&peak),
        &format!("{peak} bytes at most"),
    );
    agent.release("beside");
    let end = result(&server, &beside);
    server.check_eq(end.output.as_deref(), Some("whole\n"), "the other task");
    server.run_another("afterwards");
    server.check_eq(agent.pid(), pid, "the agent lives on");
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
    server.check_eq(service.leaves(), Vec::new(), "cgroups left");
}

/// Swap is no way around the bound.
#[test]
fn swap_adds_nothing_to_the_bound_of_memory() {
    let Some(service) = Service::new(&ALL) else {
        return;
    };
    if !service.dir.join("memory.swap.max").exists() {
        eprintln!("SKIPPED: the kernel does not count swap");
        return;
    }
    let server = ScriptedServer::start();
    let settings = [("HOSTLINK_TASK_MEMORY_MAX", "50331648")];
    let agent = start(&server, &service, &settings);
    let task = Task::new(
        "reads",
        "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.swap.max",
    );
    server.deliver(&task);
    let end = result(&server, &task);
    server.check_eq(end.output.as_deref(), Some("0\n"), "swap");
    keeps_bounds(&server, &agent);
}

#[test]
fn a_fork_bomb_stays_in_its_bound_and_leaves_nothing() {
    let Some(service) = Service::new(&ALL) else {
        return;
    };
    let server = ScriptedServer::start();
    let agent = start(
        &server,
        &service,
        &[
            ("HOSTLINK_TASK_PIDS_MAX", "40"),
            // Others get their share on a slow machine, too.
            ("HOSTLINK_TASK_CPU_MAX", "40"),
            ("HOSTLINK_TASK_CONCURRENCY", "2"),
            ("HOSTLINK_TASK_KILL_GRACE", "200ms"),
        ],
    );
    keeps_bounds(&server, &agent);
    let script = agent.path("bomb.sh");
    let text = format!(
        "trap '' TERM\nwhile :; do setsid sh {0} & setsid sh {0} & sleep 0.3; done\n",
        script.display()
    );
    std::fs::write(&script, text).expect("writable");
    // A shell that cannot fork ends, so the leader does not fork.
    let command = format!(
        "trap '' TERM; sh {} 2>/dev/null & exec sleep 1000",
        script.display()
    );
    let bomb = Task::new("bomb", command);
    server.deliver(&bomb);
    server.wait_frame("task.started", &bomb);
    let leaf = service.leaves().pop().expect("the task has a cgroup");
    let read = |name: &str| {
        let text = std::fs::read_to_string(leaf.join(name)).expect("the task runs");
        let number = text
            .split_whitespace()
            .last()
            .and_then(|it| it.parse().ok());
        number.unwrap_or(0u64)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    // How often the kernel has refused one more: `max N`.
    while read("pids.events") == 0 {
        server.check(Instant::now() < deadline, "the bomb comes to its bound");
        std::thread::sleep(Duration::from_millis(20));
    }
    for number in 0..3 {
        let now = read("pids.current");
        server.check(now <= 40, &format!("{now} processes"));
        server.run_another(&format!("beside-{number}"));
    }
    server
        .link()
        .send("task.cancel", Some(&bomb.ids), serde_json::json!({}));
    let end = result(&server, &bomb);
    server.check_eq(end.status, FinalStatus::Interrupted, "end");
    server.check_eq(service.leaves(), Vec::new(), "cgroups left");
    let name = script.display().to_string();
    server.check_eq(running_with(&name), 0, "processes left");
    server.run_another("afterwards");
}

/// Without a bound, only the end of the whole cgroup at once is faster than the bomb.
#[test]
fn a_fork_bomb_without_bound_is_killed_with_its_cgroup() {
    let Some(service) = Service::new(&ALL) else {
        return;
    };
    let server = ScriptedServer::start();
    let settings = [("HOSTLINK_TASK_KILL_GRACE", "100ms")];
    let agent = start(&server, &service, &settings);
    let script = agent.path("bomb.sh");
    let text = format!(
        "trap '' TERM\n[ -e {1} ] && exit\nsetsid sh {0} & setsid sh {0} & sleep 0.2\n",
        script.display(),
        agent.path("enough").display(),
    );
    std::fs::write(&script, text).expect("writable");
    let bomb = Task {
        timeout_seconds: Some(2),
        ..Task::new(
            "bomb",
            format!(
                "sh {} 2>/dev/null; {}",
                script.display(),
                agent.hold("never")
            ),
        )
    };
    server.deliver(&bomb);
    let end = result(&server, &bomb);
    server.check_eq(end.status, FinalStatus::Failed, "end");
    let name = script.display().to_string();
    server.check_eq(running_with(&name), 0, "processes left");
    server.check_eq(service.leaves(), Vec::new(), "cgroups left");
    agent.release("enough");
    server.run_another("afterwards");
}

fn running_with(argument: &str) -> usize {
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted");
    let lines = entries
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let wanted = argument.as_bytes();
    lines
        .filter(|line| line.split(|byte| *byte == 0).any(|it| it == wanted))
        .count()
}

#[test]
fn the_share_of_the_cpu_is_bounded() {
    const SECONDS: u64 = 4;
    let Some(service) = Service::new(&ALL) else {
        return;
    };
    let server = ScriptedServer::start();
    let settings = [
        ("HOSTLINK_TASK_CPU_MAX", "25"),
        ("HOSTLINK_TASK_KILL_GRACE", "1s"),
    ];
    let agent = start(&server, &service, &settings);
    keeps_bounds(&server, &agent);
    // Two at a time, so that more than one CPU would be used.
    let task = Task {
        timeout_seconds: Some(SECONDS),
        ..Task::new("spins", "while :; do :; done & while :; do :; done")
    };
    server.deliver(&task);
    let end = result(&server, &task);
    let usage = end.usage.expect("it was granted");
    let cpu = usage.user_ms + usage.system_ms;
    let share = cpu * 100 / usage.wall_ms.max(1);
    server.check(
        (10..=32).contains(&share),
        &format!("{share} % of a CPU: {usage:?}"),
    );
}

/// The agent's own cgroup is full: the task goes, the agent stays.
#[test]
fn the_kernel_takes_the_task_before_the_agent() {
    let Some(service) = Service::new(&["memory"]) else {
        return;
    };
    let server = ScriptedServer::start();
    let bound = (160 * MIB).to_string();
    let _ = std::fs::write(service.dir.join("memory.swap.max"), "0");
    std::fs::write(service.dir.join("memory.max"), bound).expect("the controller is there");
    let settings = [("HOSTLINK_TASK_CONCURRENCY", "2")];
    let agent = start(&server, &service, &settings);
    let pid = agent.pid();
    let adj = |pid: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
        text.ok().and_then(|text| text.trim().parse::<i32>().ok())
    };
    let own = adj(&pid.to_string()).expect("the agent runs");
    for round in 0..3 {
        // One that holds less than the agent does, and still goes first if need be.
        let hog = Task::new(
            &format!("hog-{round}"),
            format!("cat /proc/self/oom_score_adj; {HOG}; exit $?"),
        );
        server.deliver(&hog);
        let end = result(&server, &hog);
        let of_task: i32 = end
            .output
            .as_deref()
            .and_then(|text| text.trim().parse().ok())
            .expect("a number");
        server.check(
            of_task > own,
            &format!("{of_task} of the task, {own} of the agent"),
        );
        server.check_eq(end.status, FinalStatus::Failed, "end");
        let error = end.error.as_deref().unwrap_or_default();
        server.check(
            error.ends_with("out of memory, the kernel killed it"),
            &format!("the reason is in {error:?}"),
        );
    }
    server.check_eq(agent.pid(), pid, "the agent lives on");
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
}

/// Where no service manager has given the agent a cgroup of its own it is in the root.
#[test]
fn bounds_are_kept_in_the_root_cgroup() {
    // Only that the machine has them.
    if Service::new(&ALL).is_none() {
        return;
    }
    let own = std::fs::read_to_string("/proc/self/cgroup").expect("/proc is mounted");
    if !own.lines().any(|line| line == "0::/") {
        eprintln!("SKIPPED: the tests themselves run in a cgroup below the root");
        return;
    }
    let server = ScriptedServer::start();
    let settings = [
        ("HOSTLINK_TASK_CGROUP", "auto"),
        ("HOSTLINK_TASK_MEMORY_MAX", "50331648"),
        ("HOSTLINK_TASK_PIDS_MAX", "30"),
        ("HOSTLINK_TASK_CPU_MAX", "80"),
    ];
    let mut agent = Agent::with(&server, &settings);
    server.link();
    keeps_bounds(&server, &agent);
    let hog = Task::new("hog", HOG);
    server.deliver(&hog);
    let error = server.wait_end(&hog).error;
    server.check(error.contains("out of memory"), &error);
    let (_, text, _) = read_bounds(&server);
    server.check_eq(text.as_str(), "0\n50331648\n30\n80000 100000\n", "bounds");
    agent.terminate();
}

/// What stands in the cgroup of a task.
fn read_bounds(server: &ScriptedServer) -> (FinalStatus, String, String) {
    let task = Task::new(
        "reads",
        "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup) && id -u && cat memory.max pids.max cpu.max",
    );
    server.deliver(&task);
    let end = server.wait_end(&task);
    (end.status, end.output, end.error)
}

/// An ordinary user to whom a cgroup was handed over.
#[test]
fn a_user_with_a_delegated_cgroup_keeps_all_bounds() {
    const USER: u32 = 61237;
    let Some(service) = Service::new(&ALL) else {
        return;
    };
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    for (key, value) in [
        ("HOSTLINK_TASK_MEMORY_MAX", "50331648"),
        ("HOSTLINK_TASK_PIDS_MAX", "30"),
        ("HOSTLINK_TASK_CPU_MAX", "80"),
    ] {
        agent.set(key, value);
    }
    service.hold(&mut agent);
    service.delegate(USER);
    // A manager puts it there before it becomes the user.
    let enter = format!("echo $$ >{}/cgroup.procs", service.dir.display());
    agent.before(&format!(
        "{enter} && exec setpriv --reuid {USER} --regid {USER} --clear-groups \"$0\" \"$@\""
    ));
    if !agent.give_to(USER) {
        return;
    }
    agent.start_again();
    agent.wait_line("each task gets a cgroup below");
    keeps_bounds(&server, &agent);
    let hog = Task::new("hog", HOG);
    server.deliver(&hog);
    let error = server.wait_end(&hog).error;
    server.check(error.contains("out of memory"), &error);
    let (_, text, _) = read_bounds(&server);
    server.check_eq(
        text.as_str(),
        "61237\n50331648\n30\n80000 100000\n",
        "bounds",
    );
    server.check_eq(service.leaves(), Vec::new(), "cgroups left");
}

/// Somebody else lives in the agent's cgroup: it says so, and tasks run all the same.
#[test]
fn a_cgroup_that_is_shared_bounds_nothing_and_breaks_nothing() {
    for setting in [
        ("HOSTLINK_TASK_MEMORY_MAX", "50331648"),
        ("HOSTLINK_TASK_PIDS_MAX", "30"),
        ("HOSTLINK_TASK_CPU_MAX", "80"),
    ] {
        let Some(service) = Service::new(&ALL) else {
            return;
        };
        let mut other = std::process::Command::new("/bin/sleep")
            .arg("1000")
            .spawn()
            .expect("every system has it");
        let procs = service.dir.join("cgroup.procs");
        std::fs::write(procs, other.id().to_string()).expect("it takes processes");
        let server = ScriptedServer::start();
        let agent = start(&server, &service, &[setting]);
        agent.wait_line(&format!("without the bounds {}", setting.0));
        agent.wait_line("give the agent a cgroup of its own");
        let task = Task::new("runs", "echo it runs");
        server.deliver(&task);
        let end = result(&server, &task);
        server.check_eq(end.output.as_deref(), Some("it runs\n"), setting.0);
        let _ = other.kill();
        let _ = other.wait();
    }
}

/// After a kill the bounds are kept again, in the same cgroup, and nothing is left of the old tasks.
#[test]
fn a_killed_agent_comes_up_in_the_cgroup_it_has_left() {
    let Some(service) = Service::new(&ALL) else {
        return;
    };
    let server = ScriptedServer::start();
    let settings = [
        ("HOSTLINK_TASK_MEMORY_MAX", "50331648"),
        ("HOSTLINK_TASK_PIDS_MAX", "30"),
    ];
    let mut agent = start(&server, &service, &settings);
    for round in 0..3 {
        let sleeper = Sleeper::new();
        let daemon = format!(
            "(env -i setsid sh -c 'exec 3>&- 4>&- 5>&-; {} >/dev/null 2>&1 & exit 0')",
            sleeper.command()
        );
        let task = Task::new(
            &format!("round-{round}"),
            format!("{daemon}; {}", agent.hold("never")),
        );
        server.deliver(&task);
        let running = sleeper.wait_for(1, Duration::from_secs(20));
        server.check_eq(running, 1, "the daemon before the kill");
        agent.kill();
        agent.start_again();
        let end = server.wait_end(&task);
        server.check_eq(end.status, FinalStatus::Interrupted, "end");
        server.check_eq(sleeper.running().len(), 0, "processes");
    }
    keeps_bounds(&server, &agent);
    let begun = Instant::now();
    let hog = Task::new("hog", HOG);
    server.deliver(&hog);
    let error = server.wait_end(&hog).error;
    server.check(
        error.contains("out of memory"),
        &format!("{error} after {:?}", begun.elapsed()),
    );
    server.check_eq(service.leaves(), Vec::new(), "cgroups left");
}

/// Nothing counts the memory of the task alone: what it shares with the agent is full.
#[test]
fn a_task_without_a_cgroup_of_its_own_says_so_too() {
    let Some(service) = Service::new(&["memory"]) else {
        return;
    };
    let server = ScriptedServer::start();
    let _ = std::fs::write(service.dir.join("memory.swap.max"), "0");
    let bound = (160 * MIB).to_string();
    std::fs::write(service.dir.join("memory.max"), bound).expect("the controller is there");
    let mut agent = Agent::prepare(&server);
    service.hold(&mut agent);
    agent.set("HOSTLINK_TASK_CGROUP", "off");
    agent.start_again();
    let pid = agent.pid();
    for (name, command, reason) in [
        ("hog", format!("exec {HOG}"), "killed by signal 9"),
        ("shell", format!("{HOG}; exit $?"), "exit status 137"),
    ] {
        let hog = Task::new(name, command);
        server.deliver(&hog);
        let error = server.wait_end(&hog).error;
        let expected = format!("{reason}: out of memory, the kernel killed it");
        server.check(error.ends_with(&expected), &error);
    }
    // Another kill is nobody's lack of memory.
    let killed = Task::new("killed", "kill -9 $$");
    server.deliver(&killed);
    server.check_eq(
        server.wait_end(&killed).error.as_str(),
        "killed by signal 9",
        "by hand",
    );
    server.check_eq(agent.pid(), pid, "the agent lives on");
}
