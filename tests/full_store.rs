//! A store that is full of chunks of one byte: memory does not grow with their number, and the next
//! start knows them all. A process of its own, since memory is measured.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hostlink_edge::ids::{AttemptKey, Ids, Stream};
use hostlink_edge::limits::{CONCURRENCY_MAX, Chunk, ChunkBatch, ChunkBuffer};
use hostlink_edge::outbox::{Handle, Receipt, Reception, Settings, Start, open};
use smol::{LocalExecutor, block_on};

const CAP_BYTES: u64 = 16 << 20;
const ATTEMPTS: usize = CONCURRENCY_MAX;
/// Between a store with a sixteenth of that and a full one.
const GROWTH_KIB_MAX: u64 = 1024;
/// Not a figure, but a bound for a test build on a busy machine.
const OPENING_MAX: Duration = Duration::from_secs(60);

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // Best effort: it is below the temporary directory.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn settings(folder: &Folder) -> Settings {
    Settings {
        dir: folder.0.join("outbox"),
        memory_only: false,
        cap_bytes: CAP_BYTES,
        terminal_reserve_bytes: 1 << 20,
        final_output_bytes: 4096,
        index_checker: None,
    }
}

/// Memory of this process that is not backed by a file, in KiB.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.expect("the kernel tells it")
}

async fn running(store: &Handle, number: usize) -> AttemptKey {
    let ids = Ids::new(&format!("task-{number}"), "attempt").expect("short");
    let key = ids.key();
    let receipt = Receipt {
        ids,
        command: b"true".to_vec(),
        priority: 0,
        timeout_seconds: None,
        received_at_ms: 1,
    };
    assert_eq!(store.receive(receipt).await, Ok(Reception::New));
    assert_eq!(store.start(key, 1).await, Ok(Start::Go));
    key
}

/// Prints until the store takes `bytes_used`; gives how many chunks it printed.
async fn print(store: Handle, key: AttemptKey, stream: Stream, first: u64, bytes_used: u64) -> u64 {
    let byte = |_| -> Chunk { Box::new(ChunkBuffer::from_slice(b"x").expect("short")) };
    let mut batch: ChunkBatch = (0..8).map(byte).collect();
    let mut next = first;
    loop {
        for _ in 0..16 {
            let stored = store.append(key, stream, next, batch).await;
            batch = stored.map_err(|(_, why)| why).expect("the disk is good");
            next += batch.len() as u64;
        }
        if store.counts().await.bytes_used >= bytes_used {
            return next;
        }
    }
}

#[test]
fn memory_is_flat_for_a_full_store_of_small_chunks() {
    let name = format!("hostlink-full-store-{}", std::process::id());
    let folder = Folder(std::env::temp_dir().join(name));
    std::fs::create_dir_all(&folder.0).expect("the temporary directory is writable");
    let executor = LocalExecutor::new();
    let mut next = [1; 2 * ATTEMPTS];
    let waiting = block_on(executor.run(async {
        let (store, _) = open(settings(&folder)).await;
        let mut keys = Vec::new();
        for number in 0..ATTEMPTS {
            keys.push(running(&store, number).await);
        }
        let mut memory = Vec::new();
        for bytes_used in [CAP_BYTES / 16, CAP_BYTES - (3 << 20)] {
            let tasks: Vec<_> = (0..2 * ATTEMPTS)
                .map(|at| {
                    let (key, stream) = (keys[at / 2], Stream::ALL[at % 2]);
                    executor.spawn(print(store.clone(), key, stream, next[at], bytes_used))
                })
                .collect();
            for (at, task) in tasks.into_iter().enumerate() {
                next[at] = task.await;
            }
            memory.push(anonymous_kib());
        }
        let counts = store.counts().await;
        eprintln!(
            "{} chunks, {memory:?} KiB of memory",
            counts.messages_waiting
        );
        assert!(counts.messages_waiting > 200_000, "{counts:?}");
        assert!(memory[1] < memory[0] + GROWTH_KIB_MAX, "{memory:?}");
        counts.messages_waiting
    }));
    block_on(async {
        let before = anonymous_kib();
        let begun = Instant::now();
        let (store, _) = loop {
            // The thread of the first one may still hold the folder.
            let opened = open(settings(&folder)).await;
            if !opened.0.counts().await.volatile {
                break opened;
            }
        };
        let opening = begun.elapsed();
        let after = anonymous_kib();
        eprintln!("opened in {opening:?}, {before} and {after} KiB of memory");
        let counts = store.counts().await;
        // Each interrupted attempt has a final now.
        assert_eq!(counts.messages_waiting, waiting + ATTEMPTS as u64);
        assert!(opening < OPENING_MAX);
        assert!(after < before + 4 * GROWTH_KIB_MAX);
    });
}
