//! What the agent ends at its start belongs to it for certain: a number that is somebody else's by
//! now, another agent's task, or a look-alike is never hit.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use hostlink_edge::ids::FinalStatus;

use crate::support::processes::Sleeper;
use crate::support::{Agent, ScriptedServer, Task};

/// A process of nobody's task, in a group of its own.
struct Innocent(Child);

impl Innocent {
    fn new(environment: &[(&str, &str)]) -> Innocent {
        let child = Command::new("/bin/sleep")
            .arg("1000")
            .envs(environment.iter().copied())
            .process_group(0)
            .stdin(Stdio::null())
            .spawn();
        Innocent(child.expect("every system has it"))
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().is_ok_and(|ended| ended.is_none())
    }

    /// As the agent notes it, in ticks of 10 ms since the device has started.
    fn started(&self) -> String {
        let id = self.0.id();
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).expect("it lives");
        let behind = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or("");
        behind.split_whitespace().nth(19).unwrap_or("").to_owned()
    }
}

impl Drop for Innocent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The agent is killed, its task ends meanwhile, and the noted id is given to another process.
#[test]
fn a_process_id_that_was_used_again_is_not_hit() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    let task = Task::new("noted", agent.hold("end"));
    server.deliver(&task);
    server.wait_frame("task.started", &task);
    let path = agent.state().join("tasks.running");
    let noted = std::fs::read_to_string(&path).expect("the agent notes who runs");
    let fields: Vec<&str> = noted
        .lines()
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    server.check_eq(fields.len(), 4, "boot, process, start, attempt");
    agent.kill();
    agent.release("end");
    // As if the kernel had come round to the same number, which takes it longer than a tick.
    let mut innocent = std::iter::repeat_with(|| Innocent::new(&[]))
        .find(|innocent| innocent.started() != fields[2])
        .expect("ticks go on");
    let id = innocent.0.id();
    let line = format!("{} {id} {} {}", fields[0], fields[2], fields[3]);
    std::fs::write(&path, format!("{line:<127}\n")).expect("our own file");
    agent.start_again();
    let end = server.wait_end(&task);
    server.check_eq(end.status, FinalStatus::Interrupted, "end");
    server.run_another("afterwards");
    server.check(innocent.lives(), "the later owner of the id lives");
}

/// After a reboot the same id and the same start time are another process.
#[test]
fn a_note_of_another_boot_hits_nobody() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.run_another("before");
    agent.kill();
    let mut innocent = Innocent::new(&[]);
    let id = innocent.0.id();
    let started = innocent.started();
    let key = "0".repeat(32);
    let line = format!("00000000-0000-0000-0000-000000000000 {id} {started} {key}");
    let path = agent.state().join("tasks.running");
    std::fs::write(&path, format!("{line:<127}\n")).expect("our own file");
    agent.start_again();
    server.run_another("afterwards");
    server.check(innocent.lives(), "a process of this boot lives");
    // The same line of this boot names it, and shows that nothing else spared it.
    agent.kill();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("readable");
    let line = format!("{} {id} {started} {key}", boot.trim());
    std::fs::write(&path, format!("{line:<127}\n")).expect("our own file");
    agent.start_again();
    agent.wait_line("ended 1 processes");
    server.check(!innocent.lives(), "the very process is ended");
}

/// Two agents on one device, each with its own state: one that starts ends nothing of the other.
#[test]
fn the_tasks_of_another_agent_are_not_hit() {
    let (first_server, second_server) = (ScriptedServer::start(), ScriptedServer::start());
    let first = Agent::start(&first_server);
    let sleeper = Sleeper::new();
    let task = Task::new(
        "first",
        format!("(setsid {} &); {}", sleeper.command(), first.hold("end")),
    );
    first_server.deliver(&task);
    first_server.wait_frame("task.started", &task);
    let running = sleeper.wait_for(1, std::time::Duration::from_secs(10));
    first_server.check_eq(running, 1, "its daemon");
    let mut second = Agent::start(&second_server);
    let own = Task::new("second", second.hold("never"));
    second_server.deliver(&own);
    second_server.wait_frame("task.started", &own);
    second.kill();
    second.start_again();
    let end = second_server.wait_end(&own);
    second_server.check_eq(end.status, FinalStatus::Interrupted, "end");
    first_server.check_eq(sleeper.running().len(), 1, "the other's daemon");
    first.release("end");
    let end = first_server.wait_end(&task);
    first_server.check_eq(end.status, FinalStatus::Completed, "end");
    first_server.check_eq(sleeper.running().len(), 0, "its own agent ends it");
}

/// Somebody who carries the variable by chance, or a part of it.
#[test]
fn a_look_alike_of_the_mark_is_not_hit() {
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    let task = Task::new("shows", "printf %s \"$HOSTLINK_TASK_MARK\"");
    server.deliver(&task);
    let mark = server.wait_end(&task).output;
    let (owner, key) = mark.rsplit_once('-').unwrap_or(("", ""));
    server.check_eq((owner.len(), key.len()), (32, 32), "the mark's parts");
    let cut = &mark[..mark.len() - 1];
    let other = format!("{}-{key}", "0".repeat(32));
    let mut alike: Vec<Innocent> = [cut, owner, other.as_str(), "", "1"]
        .into_iter()
        .map(|value| Innocent::new(&[("HOSTLINK_TASK_MARK", value)]))
        .chain([Innocent::new(&[("NOT_HOSTLINK_TASK_MARK", mark.as_str())])])
        .collect();
    let mut marked = Innocent::new(&[("HOSTLINK_TASK_MARK", mark.as_str())]);
    agent.kill();
    agent.start_again();
    agent.wait_line("ended 1 processes");
    server.run_another("afterwards");
    for innocent in &mut alike {
        server.check(innocent.lives(), "a look-alike lives");
    }
    server.check(!marked.lives(), "who carries the mark itself is ended");
}
