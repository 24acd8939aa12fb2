//! Whatever happens to the files of the index, and however its opening misbehaves, the store opens
//! in bounded time and memory: what waits is delivered whole, and attempts that stand in the log
//! are not run again.
//!
//! `HOSTLINK_DAMAGE_STEP=1` flips every bit and cuts at every byte, instead of at some.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use hostlink_edge::ids::{FinalStatus, Ids, Stream};
use hostlink_edge::limits::{ChunkBuffer, INDEX_CHECK_MEMORY_BYTES, INDEX_CHECK_TIMEOUT};
use hostlink_edge::outbox::{
    Body, Final, Phase, ReadRequest, Receipt, Reception, Settings, Start, open,
};
use smol::block_on;

const DONE: usize = 40;
const TEXT: &[u8] = b"printed and not yet acknowledged";
/// An opening with its check takes some ten milliseconds.
const OPENING: Duration = Duration::from_secs(5);
const GROWTH_KIB_MAX: u64 = 16 * 1024;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let name = format!("hostlink-index-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        Folder(path)
    }

    fn settings(&self, checker: &Path) -> Settings {
        Settings {
            dir: self.0.clone(),
            memory_only: false,
            cap_bytes: 4 << 20,
            terminal_reserve_bytes: 256 << 10,
            final_output_bytes: 4096,
            index_checker: Some(checker.to_owned()),
        }
    }

    /// A store as a power cut leaves it, with some attempts that are done, one whose output waits
    /// and one that was not started.
    fn lived(name: &str) -> Folder {
        let folder = Folder::new(name);
        block_on(async {
            let (store, _) = open(folder.settings(binary())).await;
            for number in 0..DONE {
                let ids = ids(&format!("done-{number}"));
                assert_eq!(
                    store.receive(receipt(&ids)).await,
                    Ok(Reception::New),
                    "{ids}"
                );
                store.discard(ids.key()).await.expect("stored");
            }
            let waits = ids("waits");
            store.receive(receipt(&waits)).await.expect("stored");
            assert_eq!(store.start(waits.key(), 1).await, Ok(Start::Go));
            let chunk = Box::new(ChunkBuffer::from_slice(TEXT).expect("short"));
            let stored = store
                .append(
                    waits.key(),
                    Stream::Stdout,
                    1,
                    [chunk].into_iter().collect(),
                )
                .await;
            assert!(stored.is_ok());
            store.finish(waits.key(), ended()).await.expect("stored");
            store
                .receive(receipt(&ids("queued")))
                .await
                .expect("stored");
            store.close().await;
        });
        fs::remove_file(folder.0.join("clean")).expect("the store was closed");
        folder
    }

    fn copy(&self, name: &str) -> Folder {
        let copy = Folder::new(name);
        copy_tree(&self.0, &copy.0);
        copy
    }

    fn index_files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.0.join("index")).expect("there is an index") {
            let path = entry.expect("readable").path();
            if path.is_file() {
                files.push(path);
            }
        }
        files.sort();
        files
    }

    /// Opens the store and looks whether all is there.
    fn check(&self, checker: &Path, within: Duration, what: &str) {
        // Memory is that of the process: one test at a time.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _alone = ONE_AT_A_TIME.lock();
        let begun = Instant::now();
        let before = resident_peak_kib();
        block_on(async {
            let (store, recovered) = open(self.settings(checker)).await;
            let took = begun.elapsed();
            assert!(took < within, "{what}: opening took {took:?}");
            let counts = store.counts().await;
            assert!(!counts.volatile, "{what}: the store is in memory");
            assert_eq!(recovered.queued.len(), 1, "{what}: what was not started");
            let batch = store
                .read(ReadRequest {
                    max_messages: 10,
                    max_bytes: 1 << 20,
                    ..ReadRequest::default()
                })
                .await;
            assert_eq!(batch.messages.len(), 2, "{what}: output and final");
            for message in &batch.messages {
                let (Body::Output { data, .. } | Body::Final { output: data, .. }) = &message.body;
                assert_eq!(&batch.buffer[data.clone()], TEXT, "{what}");
            }
            for number in 0..DONE {
                let ids = ids(&format!("done-{number}"));
                let answer = store.receive(receipt(&ids)).await;
                let known = Ok(Reception::Known(Phase::Discarded));
                assert_eq!(answer, known, "{what}: {ids} would run again");
            }
            store.close().await;
        });
        let grown = resident_peak_kib().saturating_sub(before);
        assert!(grown < GROWTH_KIB_MAX, "{what}: {grown} KiB of memory");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hostlink-edge"))
}

fn ids(name: &str) -> Ids {
    Ids::new(name, "attempt").expect("short")
}

fn receipt(ids: &Ids) -> Receipt {
    Receipt {
        ids: ids.clone(),
        command: b"true".to_vec(),
        priority: 0,
        timeout_seconds: None,
        received_at_ms: 1,
    }
}

fn ended() -> Final {
    Final {
        status: FinalStatus::Completed,
        exit_code: 0,
        output: TEXT.to_vec(),
        error: Vec::new(),
        output_truncated: false,
        error_truncated: false,
        usage: None,
    }
}

fn copy_tree(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("readable") {
        let entry = entry.expect("readable");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir_all(&target).expect("writable");
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("writable");
        }
    }
}

fn resident_peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|kib| kib.parse().ok()).expect("a number")
}

/// Every how many bits and bytes, with the default for this file.
fn step(default: usize) -> usize {
    match std::env::var("HOSTLINK_DAMAGE_STEP") {
        Ok(step) => step.parse().expect("HOSTLINK_DAMAGE_STEP is a number"),
        Err(_) => default,
    }
}

#[test]
fn any_file_of_the_index_may_be_gone_cut_or_changed() {
    let whole = Folder::lived("files");
    let files = whole.index_files();
    assert!(files.len() >= 2, "sled keeps several files: {files:?}");
    for path in files {
        let name = path.file_name().expect("a file").to_owned();
        let bytes = fs::read(&path).expect("readable");
        let used = bytes.iter().rposition(|&byte| byte != 0).unwrap_or(0) + 1;
        let try_with = |damaged: Option<Vec<u8>>, what: String| {
            let copy = whole.copy("damaged");
            let path = copy.0.join("index").join(&name);
            match damaged {
                Some(bytes) => fs::write(path, bytes).expect("writable"),
                None => fs::remove_file(path).expect("there"),
            }
            copy.check(binary(), OPENING, &format!("{name:?} {what}"));
        };
        try_with(None, "is gone".to_owned());
        try_with(Some(vec![0xa5; bytes.len()]), "is scrambled".to_owned());
        try_with(Some(vec![0; bytes.len()]), "is zeroed".to_owned());
        for cut in (0..used).step_by(step(used / 9 + 1)) {
            try_with(Some(bytes[..cut].to_vec()), format!("is cut at {cut}"));
        }
        // An odd number of steps, so that each bit of a byte is met.
        for bit in (0..used * 8).step_by(step((used * 8 / 31) | 1)) {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            try_with(Some(damaged), format!("with bit {bit} flipped"));
        }
    }
}

#[test]
fn settings_that_no_index_has_cost_only_the_index() {
    for segment_bytes in [1_u64 << 30, 1 << 36, 1 << 46, (1 << 63) + 1] {
        let folder = Folder::lived("settings");
        let text =
            format!("segment_size: {segment_bytes}\nuse_compression: false\nversion: 0.34\n0000");
        fs::write(folder.0.join("index/conf"), text).expect("writable");
        folder.check(binary(), OPENING, &format!("segments of {segment_bytes}"));
        assert!(folder.0.join("index.damaged").exists(), "{segment_bytes}");
    }
}

/// An index that wants endless memory does not get it: the check has set its own limit before it
/// reads the first file.
#[test]
fn the_check_runs_with_little_memory() {
    let folder = Folder::lived("limit");
    let conf = folder.0.join("index/conf");
    fs::remove_file(&conf).expect("there");
    let made = Command::new("mkfifo").arg(&conf).status();
    assert!(made.is_ok_and(|status| status.success()));
    let mut check = Command::new(binary())
        .arg("__check-index")
        .arg(&folder.0)
        .spawn()
        .expect("the binary runs");
    // Opens when the check does.
    let opened = fs::OpenOptions::new().write(true).open(&conf);
    let limits = fs::read_to_string(format!("/proc/{}/limits", check.id())).expect("it waits");
    check.kill().expect("it waits");
    check.wait().expect("our child");
    drop(opened);
    let data = limits
        .lines()
        .find(|line| line.starts_with("Max data size"));
    let fields: Vec<&str> = data.expect("Linux").split_whitespace().collect();
    let bytes = INDEX_CHECK_MEMORY_BYTES.to_string();
    assert_eq!(fields[3..5], [bytes.as_str(), bytes.as_str()], "{limits}");
}

#[test]
fn a_check_that_hangs_or_crashes_costs_only_the_index() {
    for (script, within) in [
        ("exec sleep 1000", INDEX_CHECK_TIMEOUT + OPENING),
        ("kill -SEGV $$", OPENING),
        ("exit 101", OPENING),
    ] {
        let folder = Folder::lived("check");
        let tools = Folder::new("tools");
        let checker = tools.0.join("checker");
        fs::write(&checker, format!("#!/bin/sh\n{script}\n")).expect("writable");
        fs::set_permissions(&checker, fs::Permissions::from_mode(0o755)).expect("ours");
        folder.check(&checker, within, script);
        assert!(folder.0.join("index.damaged").exists(), "{script}");
        // The next start trusts what was rebuilt.
        folder.check(binary(), OPENING, "after it");
    }
}
