//! Full stores, for the test and the benchmark that measure them.

use std::path::PathBuf;

use hostlink_edge::ids::{AttemptKey, Ids, Stream};
use hostlink_edge::limits::{CHUNKS_WAITING_MAX, CONCURRENCY_MAX, Chunk, ChunkBatch, ChunkBuffer};
use hostlink_edge::outbox::{Handle, Receipt, Reception, Settings, Start};
use smol::{LocalExecutor, block_on};

/// As many as may run at once: each ends interrupted when the store is opened again.
pub const ATTEMPTS: usize = CONCURRENCY_MAX;
/// What a full store leaves free of its cap: the reserve for finals, the spare segment, and one that
/// has just begun.
const UNUSED_BYTES: u64 = 3 << 20;
/// Bytes that a stream prints before it looks how full the store is, if they are in one batch or more.
const LOOK_BYTES: usize = 128;

/// A folder that goes with its owner.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(parent: PathBuf, name: &str) -> Folder {
        let path = parent.join(format!("hostlink-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the parent is writable");
        Folder(path)
    }

    pub fn settings(&self, cap_bytes: u64) -> Settings {
        Settings {
            dir: self.0.join("outbox"),
            memory_only: false,
            cap_bytes,
            terminal_reserve_bytes: 1 << 20,
            final_output_bytes: 4096,
            index_checker: None,
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Best effort: it is in a place for what is temporary.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An attempt that runs.
pub async fn running(store: &Handle, number: usize) -> AttemptKey {
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

/// So many chunks of one length.
pub fn batch(chunks: usize, chunk_bytes: usize) -> ChunkBatch {
    let chunk = |_| -> Chunk {
        let mut buffer = Chunk::new(ChunkBuffer::new());
        buffer.resize(chunk_bytes, b'x').expect("its capacity");
        buffer
    };
    (0..chunks).map(chunk).collect()
}

/// Both streams of some attempts that print chunks of one length into a store.
pub struct Printing {
    store: Handle,
    chunk_bytes: usize,
    streams: Vec<(AttemptKey, Stream, u64)>,
}

impl Printing {
    pub fn start(store: &Handle, chunk_bytes: usize) -> Printing {
        let streams = (0..ATTEMPTS).flat_map(|number| {
            let key = block_on(running(store, number));
            Stream::ALL.map(|stream| (key, stream, 1))
        });
        Printing {
            store: store.clone(),
            chunk_bytes,
            streams: streams.collect(),
        }
    }

    /// Prints at once in all streams until the store takes so much.
    pub fn print(&mut self, bytes_used: u64) {
        let executor = LocalExecutor::new();
        let chunk_bytes = self.chunk_bytes;
        block_on(executor.run(async {
            let tasks: Vec<_> = self
                .streams
                .drain(..)
                .map(|stream| {
                    let store = self.store.clone();
                    executor.spawn(print(store, stream, chunk_bytes, bytes_used))
                })
                .collect();
            for task in tasks {
                self.streams.push(task.await);
            }
        }));
    }

    /// Prints until the store is full.
    pub fn fill(&mut self, cap_bytes: u64) {
        self.print(cap_bytes - UNUSED_BYTES);
    }
}

async fn print(
    store: Handle,
    (key, stream, mut next): (AttemptKey, Stream, u64),
    chunk_bytes: usize,
    bytes_used: u64,
) -> (AttemptKey, Stream, u64) {
    let mut batch = batch(CHUNKS_WAITING_MAX, chunk_bytes);
    let batches = LOOK_BYTES.div_ceil(CHUNKS_WAITING_MAX * chunk_bytes);
    loop {
        for _ in 0..batches {
            let stored = store.append(key, stream, next, batch).await;
            batch = stored.map_err(|(_, why)| why).expect("the disk is good");
            next += batch.len() as u64;
        }
        if store.counts().await.bytes_used >= bytes_used {
            return (key, stream, next);
        }
    }
}
