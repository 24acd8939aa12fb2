//! Which processes lead the tasks that run, in a file for the next start of the agent.
//!
//! The mark in the environment tells more, but a leader may have become a program that started with
//! an empty one (`exec env -i`, `su -`). A process is named by boot, id and start time: nobody else
//! ever has that name. The file is never synced: it outlives the agent in the page cache, and a
//! power cut leaves no process. Each running task has a line of fixed length that is overwritten
//! in place, so that short tasks cost no change of the file system's own data.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use log::debug;
use rustix::process::Pid;

use super::procfs::{self, Process};
use crate::ids::AttemptKey;
use crate::limits::CONCURRENCY_MAX;

/// Boot id (36), process id, start time, attempt (32), and blanks between and behind them.
const LINE_BYTES: usize = 128;

#[derive(Debug)]
pub struct Record {
    file: File,
    boot: String,
    lines: RefCell<[Option<Pid>; CONCURRENCY_MAX]>,
}

/// A leader that an earlier life of the agent has noted, and that is still alive.
#[derive(Debug)]
pub struct Noted {
    pub leader: Process,
    pub key: AttemptKey,
}

impl Record {
    /// Opens the file, and returns who of those in it is alive.
    pub fn open(path: &Path) -> std::io::Result<(Record, Vec<Noted>)> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let record = Record {
            file,
            boot: boot.trim().to_owned(),
            lines: RefCell::default(),
        };
        let noted = (0..CONCURRENCY_MAX)
            .filter_map(|index| record.read(index))
            .collect();
        Ok((record, noted))
    }

    fn read(&self, index: usize) -> Option<Noted> {
        let mut line = [0; LINE_BYTES];
        let offset = (index * LINE_BYTES) as u64;
        self.file.read_exact_at(&mut line, offset).ok()?;
        let mut fields = std::str::from_utf8(&line).ok()?.split_ascii_whitespace();
        if fields.next()? != self.boot {
            return None;
        }
        let id = Pid::from_raw(fields.next()?.parse().ok()?)?;
        let started: u64 = fields.next()?.parse().ok()?;
        let key = AttemptKey::parse(fields.next()?)?;
        let leader = procfs::find(id).filter(|it| it.started == started)?;
        Some(Noted { leader, key })
    }

    pub fn has_started(&self, leader: Pid, key: AttemptKey) {
        let mut lines = self.lines.borrow_mut();
        let Some(index) = lines.iter().position(Option::is_none) else {
            return;
        };
        if let Some(process) = procfs::find(leader) {
            lines[index] = Some(leader);
            let id = leader.as_raw_pid();
            self.write(
                index,
                &format!("{} {id} {} {key}", self.boot, process.started),
            );
        }
    }

    pub fn has_ended(&self, leader: Pid) {
        let mut lines = self.lines.borrow_mut();
        if let Some(index) = lines.iter().position(|it| *it == Some(leader)) {
            lines[index] = None;
            self.write(index, "");
        }
    }

    /// Nothing of an earlier life is left.
    pub fn clear(&self) {
        (0..CONCURRENCY_MAX).for_each(|index| self.write(index, ""));
    }

    fn write(&self, index: usize, text: &str) {
        let line = format!("{text:<width$}\n", width = LINE_BYTES - 1);
        let offset = (index * LINE_BYTES) as u64;
        if let Err(error) = self.file.write_all_at(line.as_bytes(), offset) {
            debug!("which process leads a task cannot be noted: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpid;

    use super::*;

    #[test]
    fn only_the_very_process_is_found_again() {
        let name = format!("hostlink-record-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let key = AttemptKey([9; 16]);
        let found = |path: &Path| {
            let (record, noted) = Record::open(path).expect("writable");
            let found: Vec<_> = noted.iter().map(|it| (it.leader.id, it.key)).collect();
            (record, found)
        };
        let (record, none) = found(&path);
        assert_eq!(none, []);
        record.has_started(getpid(), key);
        let text = std::fs::read_to_string(&path).expect("text");
        assert_eq!(text.len(), LINE_BYTES);
        assert_eq!(found(&path).1, [(getpid(), key)]);

        let own = procfs::find(getpid()).expect("we live").started.to_string();
        let later = text.replace(&own, &format!("{}", u64::MAX));
        let other_boot = text.replacen(&record.boot[..8], "00000000", 1);
        for stale in [later.as_str(), other_boot.as_str(), "no line\n", ""] {
            std::fs::write(&path, stale).expect("writable");
            assert_eq!(found(&path).1, [], "{stale}");
        }
        std::fs::write(&path, &text).expect("writable");
        record.has_ended(getpid());
        assert_eq!(found(&path).1, []);
        std::fs::remove_file(&path).expect("clean up");
    }
}
