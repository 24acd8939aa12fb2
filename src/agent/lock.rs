//! One agent per state directory: a lock on the directory itself, so that it also works where
//! nothing can be written. The kernel lets it go when the process ends, however it ends.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::status;
use crate::outbox;

/// Held as long as it lives.
#[derive(Debug)]
pub struct Lock {
    _directory: File,
}

#[derive(Debug)]
pub enum LockError {
    /// Another agent has it (exit 75).
    Held { path: PathBuf, pid: Option<u32> },
    /// The directory cannot be made or opened: go on without a lock, and say so.
    Unavailable { path: PathBuf, error: io::Error },
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockError::Held { path, pid } => {
                write!(f, "another agent uses {}", path.display())?;
                if let Some(pid) = pid {
                    write!(f, ": process {pid}{}", name_of(*pid))?;
                }
                f.write_str("; stop it first, or set another HOSTLINK_STATE_PATH")
            }
            LockError::Unavailable { path, error } => {
                write!(
                    f,
                    "cannot lock the state directory {}: {error}",
                    path.display()
                )
            }
        }
    }
}

impl std::error::Error for LockError {}

fn name_of(pid: u32) -> String {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!(" ({})", name.trim()),
        Err(_) => String::new(),
    }
}

/// Takes the lock of a state directory, which is made (mode 0700) if it is missing.
pub fn acquire(state_path: &Path) -> Result<Lock, LockError> {
    let path = state_path.to_owned();
    let mut builder = DirBuilder::new();
    // An error shows when the directory is opened.
    let _ = builder.recursive(true).mode(0o700).create(&path);
    let directory = match File::open(&path) {
        Ok(directory) => directory,
        Err(error) => return Err(LockError::Unavailable { path, error }),
    };
    match outbox::lock_folder(&directory) {
        Ok(()) => Ok(Lock {
            _directory: directory,
        }),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            // File systems with several devices behind one mount show another device number there.
            let told = || status::ask(&path).ok().flatten().map(|status| status.pid);
            let pid = holder(&directory).or_else(told);
            Err(LockError::Held { path, pid })
        }
        Err(error) => Err(LockError::Unavailable {
            path,
            error: error.into(),
        }),
    }
}

/// The agent that holds a state directory, as far as it can be seen without touching the lock: a
/// look must not make an agent that starts at this moment believe that there is another one.
pub fn holder_of(state_path: &Path) -> Option<u32> {
    holder(&File::open(state_path).ok()?)
}

/// Who holds the lock, from `/proc/locks` by device and inode.
fn holder(directory: &File) -> Option<u32> {
    let inode = directory.metadata().ok()?.ino();
    let device = directory.metadata().ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    holder_in(&locks, &format!("{major:02x}:{minor:02x}:{inode}"))
}

/// A line is `1: FLOCK ADVISORY WRITE 1234 fd:01:5678 0 EOF`.
fn holder_in(locks: &str, place: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        match fields.as_slice() {
            [_, "FLOCK", _, _, pid, at, ..] if *at == place => pid.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_lock_names_the_holder_and_the_first_lets_go_at_its_end() {
        let dir = std::env::temp_dir().join(format!("hostlink-lock-{}", std::process::id()));
        assert_eq!(holder_of(&dir), None);
        let first = acquire(&dir).expect("free");
        assert_eq!(holder_of(&dir), Some(std::process::id()));
        match acquire(&dir) {
            Err(LockError::Held { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        acquire(&dir).expect("free again");
        std::fs::remove_dir_all(&dir).expect("clean up");
    }

    #[test]
    fn a_directory_that_cannot_be_is_told_apart() {
        let error = acquire(Path::new("/proc/self/no/such")).expect_err("not there");
        assert!(matches!(error, LockError::Unavailable { .. }), "{error}");
    }

    #[test]
    fn lines_of_proc_locks_are_read() {
        let locks = "1: POSIX  ADVISORY  READ 7 fe:00:12 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 1234 fe:00:12 0 EOF\n";
        assert_eq!(holder_in(locks, "fe:00:12"), Some(1234));
        assert_eq!(holder_in(locks, "fe:00:13"), None);
    }
}
