//! Processes as `/proc` shows them. Every look costs one small file for each process, so nobody
//! looks while nothing is to be ended.

use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;

use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open, pidfd_send_signal,
};

use super::cgroup;
use crate::limits::{ENVIRONMENT_BYTES_READ, PROCESSES_SEEN_MAX, VMSTAT_BYTES_READ};

/// One line of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub id: Pid,
    pub parent: i32,
    pub group: i32,
    /// It has exited and waits to be collected.
    pub is_dead: bool,
    /// Stopped by a signal.
    pub is_stopped: bool,
    /// Clock ticks from boot to its start: with the id, a name that is never used twice.
    pub started: u64,
}

impl Process {
    /// Sends a signal to this process and to no later one with its id.
    pub fn signal(&self, signal: Signal) {
        // Looked at again once the handle is held: whatever the id means now, it meant the same
        // when the handle was opened, or the process of the handle is gone.
        match pidfd_open(self.id, PidfdFlags::empty()) {
            Ok(handle) if self.is_same() => {
                let _ = pidfd_send_signal(&handle, signal);
            }
            Ok(_) => {}
            // Without pidfds a moment remains in which the id may change hands.
            Err(_) if self.is_same() => {
                let _ = kill_process(self.id, signal);
            }
            Err(_) => {}
        }
    }

    /// TERM. A stopped process takes no signal but KILL before it goes on.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
        if self.is_stopped {
            self.signal(Signal::CONT);
        }
    }

    /// Whether it is still there: dead perhaps, but not another one by the same id.
    pub fn is_same(&self) -> bool {
        find(self.id).is_some_and(|now| now.started == self.started)
    }
}

/// The process with this id, if there is one.
pub fn find(id: Pid) -> Option<Process> {
    let mut stat = [0; 512];
    let path = format!("/proc/{}/stat", id.as_raw_pid());
    let read = File::open(path).and_then(|mut file| file.read(&mut stat));
    parse_stat(&stat[..read.ok()?])
}

/// All processes of the system, up to [`PROCESSES_SEEN_MAX`]. Empty where `/proc` does not tell.
pub fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| parse_id(entry.file_name().as_encoded_bytes()))
        .filter_map(find)
        .take(PROCESSES_SEEN_MAX)
        .collect()
}

/// Children of the agent that are not its own helpers: leaders of tasks, and what it has adopted
/// from them (the agent is a subreaper). Dead ones included.
pub fn children() -> Vec<Process> {
    let agent = getpid().as_raw_pid();
    let own_group = own_group();
    // Tasks are started by the main thread, and orphans go to the first thread that lives.
    let listed = std::fs::read(format!("/proc/{agent}/task/{agent}/children"));
    let mut children = match listed {
        Ok(list) => list
            .split(u8::is_ascii_whitespace)
            .filter_map(parse_id)
            .filter_map(find)
            .collect(),
        // A kernel without CONFIG_PROC_CHILDREN.
        Err(_) => all(),
    };
    children.retain(|child| child.parent == agent && child.group != own_group);
    children
}

/// The group of the agent: 0 if the first process of the system or of a container started it and
/// never made one, or its leader is out of sight. `getpgrp` of rustix does not expect that.
fn own_group() -> i32 {
    static GROUP: OnceLock<i32> = OnceLock::new();
    *GROUP.get_or_init(|| find(getpid()).map_or(0, |own| own.group))
}

/// How many processes the kernel has killed for want of memory since it started: of the whole
/// machine, whoever they were. `None` before 4.13.
pub fn kills_for_memory() -> Option<u64> {
    let mut text = Vec::new();
    let file = File::open("/proc/vmstat").ok()?;
    file.take(VMSTAT_BYTES_READ).read_to_end(&mut text).ok()?;
    cgroup::field(&String::from_utf8_lossy(&text), "oom_kill")
}

/// Whether a process was started with this entry in its environment. Unreadable means no.
pub fn environment_has(id: Pid, wanted: impl Fn(&[u8]) -> bool) -> bool {
    let mut environment = Vec::new();
    let path = format!("/proc/{}/environ", id.as_raw_pid());
    let read = File::open(path).and_then(|file| {
        file.take(ENVIRONMENT_BYTES_READ)
            .read_to_end(&mut environment)
    });
    read.is_ok() && environment.split(|byte| *byte == 0).any(wanted)
}

fn parse_id(name: &[u8]) -> Option<Pid> {
    let id = std::str::from_utf8(name).ok()?.parse().ok()?;
    Pid::from_raw(id)
}

/// `pid (name) state parent group session tty …`, the start is field 22 (proc_pid_stat(5)). A name
/// may hold any character.
fn parse_stat(stat: &[u8]) -> Option<Process> {
    let name_start = stat.iter().position(|&byte| byte == b'(')?;
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let id = parse_id(stat[..name_start].trim_ascii())?;
    let fields = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let threads: u64 = fields.nth(14)?.parse().ok()?;
    let started = fields.nth(1)?.parse().ok()?;
    Some(Process {
        id,
        parent,
        group,
        // One whose first thread has ended looks dead while others of its threads go on.
        is_dead: matches!(state, "Z" | "X" | "x") && threads <= 1,
        is_stopped: matches!(state, "T" | "t"),
        started,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_are_read_whatever_the_name() {
        let check = |stat: &str, expected: Option<(i32, i32, i32, bool, u64)>| {
            let found = parse_stat(stat.as_bytes()).map(|it| {
                let id = it.id.as_raw_pid();
                (id, it.parent, it.group, it.is_dead, it.started)
            });
            assert_eq!(found, expected, "{stat:?}");
        };
        let rest = "5 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 777 8192";
        check(
            &format!("12 (sh) S 1 10 {rest}"),
            Some((12, 1, 10, false, 777)),
        );
        check(
            &format!("13 (a) Z 9 9 (b) R 2 77 {rest}"),
            Some((13, 2, 77, false, 777)),
        );
        check(
            &format!("14 (a\nb) Z 3 14 {rest}"),
            Some((14, 3, 14, true, 777)),
        );
        let threads = rest.replace("20 0 1 ", "20 0 2 ");
        check(
            &format!("16 (go) Z 3 14 {threads}"),
            Some((16, 3, 14, false, 777)),
        );
        check("15 (cut) S 1 1", None);
        check("", None);
        check(") S 1", None);
    }

    #[test]
    fn this_process_is_found_and_its_start_is_its_own() {
        let own = find(getpid()).expect("we live");
        assert!(!own.is_dead && own.is_same() && all().iter().any(|it| it.id == own.id));
        let earlier = Process {
            started: own.started - 1,
            ..own
        };
        assert!(!earlier.is_same());
        // A signal for an earlier owner of the id does not hit this one.
        earlier.signal(Signal::KILL);
    }

    #[test]
    fn the_environment_of_a_process_is_read() {
        let id = getpid();
        assert!(environment_has(id, |entry| entry.starts_with(b"PATH=")));
        assert!(!environment_has(id, |entry| entry == b"HOSTLINK_NO_SUCH=1"));
    }
}
