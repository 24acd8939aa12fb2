//! The demonstration: what it prints, what it notices, and that it leaves nothing behind.

#![cfg(feature = "gateway")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// The directory for temporary files of one demonstration. Its name wants quoting.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let name = format!("hostlink's demo {name} {}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("directory");
        Directory(path)
    }

    fn start(&self, command: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_hostlink-edge"))
            .args(["demo", command])
            .env("TMPDIR", &self.0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts")
    }

    fn assert_empty(&self) {
        let left: Vec<_> = fs::read_dir(&self.0).expect("readable").collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn both_streams_arrive_byte_for_byte() {
    let dir = Directory::new("exact");
    let command = r"printf 'a\000b\377'; printf '\303\274x' >&2; exit 3";
    let output = dir.start(command).wait_with_output().expect("an end");
    let err = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert_eq!(output.stdout, b"a\0b\xff");
    assert!(err.contains("\u{fc}x"), "{err}");
    assert!(err.contains("ended with exit code 3"), "{err}");
    assert!(err.contains("sent          7 bytes"), "{err}");
    assert!(err.contains("lost          0\n"), "{err}");
    dir.assert_empty();
}

#[test]
fn a_difference_is_noticed() {
    let dir = Directory::new("differs");
    // Once the copy of what was printed is written, it gets bytes that were never sent.
    let command = r#"copy=${0%/*}/printed.stdout; echo sent
        until [ -s "$copy" ]; do sleep 0.01; done; echo never-sent >>"$copy""#;
    let output = dir.start(command).wait_with_output().expect("an end");
    let err = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert_eq!(output.stdout, b"sent\n");
    assert!(err.contains("lost          11\n"), "{err}");
    dir.assert_empty();
}

#[test]
fn an_interrupted_demonstration_cleans_up() {
    let dir = Directory::new("interrupted");
    let mut demo = dir.start("trap '' TERM INT; echo \"process $$\"; while :; do sleep 1; done");
    let mut line = String::new();
    let mut out = BufReader::new(demo.stdout.take().expect("piped"));
    out.read_line(&mut line).expect("readable");
    let task: i32 = line
        .trim()
        .strip_prefix("process ")
        .and_then(|pid| pid.parse().ok())
        .unwrap_or_else(|| panic!("{line:?}"));
    let task = Pid::from_raw(task).expect("a process id");
    let task = pidfd_open(task, PidfdFlags::empty()).expect("the task runs");
    kill_process(Pid::from_child(&demo), Signal::INT).expect("it runs");
    let status = demo.wait().expect("an end");
    let mut err = String::new();
    let mut pipe = demo.stderr.take().expect("piped");
    pipe.read_to_string(&mut err).expect("text");
    assert_eq!(status.code(), Some(130), "{err}");
    // Readable when the process has ended.
    let patience = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let mut ends = [PollFd::new(&task, PollFlags::IN)];
    let ended = poll(&mut ends, Some(&patience)).expect("it can be waited for");
    assert_eq!(ended, 1, "the task still runs");
    dir.assert_empty();
}
