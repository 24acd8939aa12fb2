//! What the store takes on the real disk: the cap, two segments and the index, and no more.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use smol::{LocalExecutor, block_on};

use super::recovery::segment_bytes;
use super::*;
use crate::ids::{FinalStatus, Ids, Stream};
use crate::limits::{CHUNK_BYTES_MAX, Chunk, ChunkBatch, ChunkBuffer, FINISHED_ATTEMPTS_MAX};

const CAP_BYTES: u64 = 4 << 20;
const INDEX_BYTES_MAX: u64 = 2 << 20;
/// Lives that go on at once, so that one commit serves several.
const AT_ONCE: usize = 32;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let name = format!("hostlink-sizes-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn settings(&self) -> Settings {
        Settings {
            dir: self.0.clone(),
            memory_only: false,
            cap_bytes: CAP_BYTES,
            terminal_reserve_bytes: 256 << 10,
            final_output_bytes: 4096,
            index_checker: None,
        }
    }

    fn check(&self, when: &str) {
        let most = CAP_BYTES + 2 * segment_bytes(CAP_BYTES);
        let spool = bytes_in(&self.0.join("spool"));
        assert!(spool <= most, "{when}: {spool} bytes in the log");
        let index = bytes_in(&self.0.join("index"));
        assert!(
            index < INDEX_BYTES_MAX,
            "{when}: {index} bytes in the index"
        );
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Lengths of all files. One that goes meanwhile counts as nothing.
fn bytes_in(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

async fn begin(store: &Handle, name: &str) -> crate::ids::AttemptKey {
    let ids = Ids::new(name, "attempt").unwrap();
    let key = ids.key();
    let receipt = Receipt {
        ids,
        command: b"true".to_vec(),
        priority: 0,
        timeout_seconds: None,
        received_at_ms: 1,
    };
    assert_eq!(store.receive(receipt).await, Ok(Reception::New));
    assert_eq!(store.start(key, 2).await, Ok(Start::Go));
    key
}

async fn live(store: Handle, number: usize) {
    let key = begin(&store, &format!("task-{number}")).await;
    let fin = Final {
        status: FinalStatus::Completed,
        exit_code: 0,
        output: b"done".to_vec(),
        error: Vec::new(),
        output_truncated: false,
        error_truncated: false,
        usage: None,
    };
    assert!(store.finish(key, fin).await.is_ok());
    let acks = [Ack::Final { key }].into_iter().collect();
    store.acknowledge(acks).await;
}

#[test]
fn the_index_of_all_remembered_attempts_stays_small() {
    let folder = Folder::new("index");
    let executor = LocalExecutor::new();
    block_on(executor.run(async {
        let (store, _) = open(folder.settings()).await;
        let lives = FINISHED_ATTEMPTS_MAX + 10 * AT_ONCE;
        for first in (0..lives).step_by(AT_ONCE) {
            let lives = first..first + AT_ONCE;
            let tasks: Vec<_> = lives
                .map(|number| executor.spawn(live(store.clone(), number)))
                .collect();
            for task in tasks {
                task.await;
            }
            folder.check(&format!("after {first} attempts"));
        }
        assert_eq!(store.counts().await.attempts_open, 0);
        // Of all of them it knows that they ended, as far as it must.
        for number in lives - FINISHED_ATTEMPTS_MAX..lives {
            let ids = Ids::new(&format!("task-{number}"), "attempt").unwrap();
            let phase = store.phase_of(ids.key()).await;
            assert_eq!(phase, Some(Phase::Finished { held: false }), "{number}");
        }
        store.close().await;
        let index = bytes_in(&folder.0.join("index"));
        eprintln!("{index} bytes in the index after {lives} attempts");
        assert!(index > 0);
        folder.check("closed");
    }));
}

#[test]
fn output_that_nobody_takes_stays_within_the_cap_on_disk() {
    let folder = Folder::new("output");
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        let key = begin(&store, "loud").await;
        for round in 0..60 {
            let full =
                |_| -> Chunk { Box::new(ChunkBuffer::from_slice(&[7; CHUNK_BYTES_MAX]).unwrap()) };
            let chunks: ChunkBatch = (0..8).map(full).collect();
            let stored = store.append(key, Stream::Stdout, 1 + round * 8, chunks);
            assert!(stored.await.is_ok());
            folder.check(&format!("round {round}"));
        }
        assert!(store.counts().await.chunks_dropped > 0);
        let spool = bytes_in(&folder.0.join("spool"));
        assert!(spool > CAP_BYTES / 2, "the store is full: {spool}");
        eprintln!("{spool} bytes in the log with a cap of {CAP_BYTES}");
    });
}
