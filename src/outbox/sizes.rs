//! What the store takes on the real disk: the cap, two segments and the index, and no more.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use smol::{LocalExecutor, block_on};

use super::model::Tester;
use super::recovery::segment_bytes;
use super::tests::{Folder, completed, ids, run_task};
use super::*;
use crate::ids::Stream;
use crate::limits::{CHUNK_BYTES_MAX, Chunk, ChunkBatch, ChunkBuffer, FINISHED_ATTEMPTS_MAX};

const CAP_BYTES: u64 = 4 << 20;
const INDEX_BYTES_MAX: u64 = 2 << 20;
/// Lives that go on at once, so that one commit serves several.
const AT_ONCE: usize = 32;

fn settings(folder: &Folder) -> Settings {
    Settings {
        cap_bytes: CAP_BYTES,
        ..folder.settings()
    }
}

fn check(folder: &Folder, when: &str) {
    let dir = folder.settings().dir;
    let most = CAP_BYTES + 2 * segment_bytes(CAP_BYTES);
    let spool = bytes_in(&dir.join("spool"));
    assert!(spool <= most, "{when}: {spool} bytes in the log");
    let index = bytes_in(&dir.join("index"));
    assert!(
        index < INDEX_BYTES_MAX,
        "{when}: {index} bytes in the index"
    );
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

async fn live(store: Handle, number: usize) {
    let key = run_task(&store, &format!("task-{number}")).await;
    assert!(store.finish(key, completed("done")).await.is_ok());
    let acks = [Ack::Final { key }].into_iter().collect();
    store.acknowledge(acks).await;
}

#[test]
fn the_index_of_all_remembered_attempts_stays_small() {
    let folder = Folder::new();
    let executor = LocalExecutor::new();
    block_on(executor.run(async {
        let (store, _) = open(settings(&folder)).await;
        let lives = FINISHED_ATTEMPTS_MAX + 10 * AT_ONCE;
        for first in (0..lives).step_by(AT_ONCE) {
            let lives = first..first + AT_ONCE;
            let tasks: Vec<_> = lives
                .map(|number| executor.spawn(live(store.clone(), number)))
                .collect();
            for task in tasks {
                task.await;
            }
            check(&folder, &format!("after {first} attempts"));
        }
        assert_eq!(store.counts().await.attempts_open, 0);
        // Of all of them it knows that they ended, as far as it must.
        for number in lives - FINISHED_ATTEMPTS_MAX..lives {
            let key = ids(&format!("task-{number}")).key();
            let phase = store.phase_of(key).await;
            assert_eq!(phase, Some(Phase::Finished { held: false }), "{number}");
        }
        store.close().await;
        let index = bytes_in(&folder.settings().dir.join("index"));
        eprintln!("{index} bytes in the index after {lives} attempts");
        assert!(index > 0);
        check(&folder, "closed");
    }));
}

#[test]
fn output_that_nobody_takes_stays_within_the_cap_on_disk() {
    let folder = Folder::new();
    block_on(async {
        let (store, _) = open(settings(&folder)).await;
        let key = run_task(&store, "loud").await;
        for round in 0..60 {
            let full =
                |_| -> Chunk { Box::new(ChunkBuffer::from_slice(&[7; CHUNK_BYTES_MAX]).unwrap()) };
            let chunks: ChunkBatch = (0..8).map(full).collect();
            let stored = store.append(key, Stream::Stdout, 1 + round * 8, chunks);
            assert!(stored.await.is_ok());
            check(&folder, &format!("round {round}"));
        }
        assert!(store.counts().await.chunks_dropped > 0);
        let spool = bytes_in(&folder.settings().dir.join("spool"));
        assert!(spool > CAP_BYTES / 2, "the store is full: {spool}");
        eprintln!("{spool} bytes in the log with a cap of {CAP_BYTES}");
    });
}

/// What flash wears by: a commit is one write and one sync, whatever it holds.
#[test]
fn a_commit_is_one_write_and_one_sync() {
    let mut tester = Tester::new(1 << 20);
    let number = tester.receive();
    tester.start(number);
    for chunks in [1, 8, 1, 5] {
        let before = tester.disk.calls();
        tester.append(number, Stream::Stdout, chunks);
        assert_eq!(tester.disk.calls() - before, 2, "{chunks} chunks");
    }
}
