//! Who is alive in a process group, read from `/proc`.
//!
//! The leader is a zombie of ours until it is reaped, so `kill(-group, 0)` always finds somebody;
//! only `/proc/PID/stat` tells the living from the dead.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::process::Pid;

/// Whether any process of the group is alive. False where `/proc` does not tell.
///
/// Reads one small file for each process of the system.
pub fn has_living(group: Pid) -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return false;
    };
    entries
        .flatten()
        .filter(|entry| is_number(&entry.file_name()))
        .any(|entry| lives_in(&entry.path(), group))
}

fn is_number(name: &OsStr) -> bool {
    name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
}

/// A process that is gone before it is read is not alive.
fn lives_in(process: &Path, group: Pid) -> bool {
    // The fields wanted stand at the front, after a name of at most 64 bytes.
    let mut stat = [0; 256];
    let read = File::open(process.join("stat")).and_then(|mut file| file.read(&mut stat));
    let length = read.unwrap_or(0);
    living_group(&stat[..length]) == Some(group.as_raw_pid())
}

/// The process group in the text of `/proc/PID/stat`, `None` if the process is dead
/// (proc_pid_stat(5): `pid (name) state parent group …`; a name may hold any character).
fn living_group(stat: &[u8]) -> Option<i32> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let fields = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let is_dead = matches!(fields.next()?, "Z" | "X" | "x");
    let group = fields.nth(1)?.parse().ok()?;
    (!is_dead).then_some(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_are_read_whatever_the_name() {
        let check = |stat: &str, group: Option<i32>| {
            assert_eq!(living_group(stat.as_bytes()), group, "{stat:?}");
        };
        check("12 (sh) S 1 12 12 0 -1", Some(12));
        check("13 (a) Z 9 9 (b) R 1 77 12 0", Some(77));
        check("14 (sh) Z 1 12 12 0 -1", None);
        check("15 (sh) X 1 12 12 0 -1", None);
        check("16 (sh) S 1", None);
        check("", None);
        check("17 sh S 1 12", None);
    }

    #[test]
    fn a_group_lives_as_long_as_a_member_does() {
        assert!(has_living(rustix::process::getpgrp()));
        // No process can have it: it is above the largest `pid_max`.
        assert!(!has_living(Pid::from_raw(i32::MAX).expect("not zero")));
    }
}
