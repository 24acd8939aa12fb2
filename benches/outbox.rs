//! The store through its handle: `cargo bench --bench outbox`. What is measured includes the way
//! to the storage thread and back. On disk (below `target/`) an append is one durable commit; in
//! memory it is the same without the disk.

use std::path::{Path, PathBuf};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hostlink_edge::ids::{AttemptKey, Ids, Stream};
use hostlink_edge::limits::{
    CHUNK_BYTES_MAX, CHUNKS_WAITING_MAX, Chunk, ChunkBatch, ChunkBuffer, WINDOW_MESSAGES,
};
use hostlink_edge::outbox::{Ack, Acks, Cursor, Handle, ReadRequest, Receipt, Settings};

const MIB: u64 = 1024 * 1024;

struct Store {
    handle: Handle,
    key: AttemptKey,
    next_sequence: u64,
    dir: PathBuf,
}

impl Store {
    /// A fresh store with one attempt that runs.
    fn open(name: &str, memory_only: bool) -> Store {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let dir = target.join(format!("bench-outbox-{name}-{}", std::process::id()));
        let settings = Settings {
            dir: dir.clone(),
            memory_only,
            cap_bytes: 64 * MIB,
            terminal_reserve_bytes: MIB,
            final_output_bytes: 64 * 1024,
            index_checker: None,
        };
        let ids = Ids::new("task", "attempt").expect("both are short");
        let key = ids.key();
        let handle = smol::block_on(async {
            let (handle, _) = hostlink_edge::outbox::open(settings).await;
            let receipt = Receipt {
                ids,
                command: b"true".to_vec(),
                priority: 0,
                timeout_seconds: None,
                received_at_ms: 1,
            };
            handle.receive(receipt).await.expect("there is room");
            handle.start(key, 1).await.expect("it was received");
            handle
        });
        Store {
            handle,
            key,
            next_sequence: 1,
            dir,
        }
    }

    /// Appends a batch and gives its buffers back.
    fn append(&mut self, batch: ChunkBatch) -> ChunkBatch {
        let (first, count) = (self.next_sequence, batch.len() as u64);
        let appended = self.handle.append(self.key, Stream::Stdout, first, batch);
        let batch = smol::block_on(appended).expect("the disk takes it");
        self.next_sequence += count;
        batch
    }

    fn acknowledge(&self, sequence: u64) {
        let mut acks = Acks::new();
        let ack = Ack::Output {
            key: self.key,
            stream: Stream::Stdout,
            sequence,
            cumulative: true,
        };
        assert!(acks.push(ack).is_ok(), "one fits");
        smol::block_on(self.handle.acknowledge(acks));
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        smol::block_on(self.handle.clone().close());
        // A store in memory has none.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn batch(chunks: usize) -> ChunkBatch {
    let chunk = || -> Chunk {
        let mut buffer = Chunk::new(ChunkBuffer::new());
        buffer.resize(CHUNK_BYTES_MAX, b'x').expect("its capacity");
        buffer
    };
    (0..chunks).map(|_| chunk()).collect()
}

/// Appends and acknowledges, so that segments are recycled as with a server that keeps up.
fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append and acknowledge");
    for (place, memory_only) in [("disk", false), ("memory", true)] {
        for chunks in [1, CHUNKS_WAITING_MAX] {
            group.throughput(Throughput::Bytes((chunks * CHUNK_BYTES_MAX) as u64));
            let mut store = Store::open("append", memory_only);
            let mut buffers = Some(batch(chunks));
            group.bench_function(format!("{place}, {chunks} of 16 KiB"), |bencher| {
                bencher.iter(|| {
                    let full = buffers.take().expect("it comes back");
                    buffers = Some(store.append(full));
                    store.acknowledge(store.next_sequence - 1);
                });
            });
        }
    }
    group.finish();
}

/// Reads what waits, half a window at a time, from the begin to the end and again.
fn read(criterion: &mut Criterion) {
    let mut store = Store::open("read", false);
    let mut buffers = batch(CHUNKS_WAITING_MAX);
    for _ in 0..32 * MIB as usize / (CHUNKS_WAITING_MAX * CHUNK_BYTES_MAX) {
        buffers = store.append(buffers);
    }
    let mut group = criterion.benchmark_group("read for replay");
    let max_bytes = CHUNKS_WAITING_MAX * CHUNK_BYTES_MAX;
    group.throughput(Throughput::Bytes(max_bytes as u64));
    let mut from = Cursor::default();
    let mut spare = Some((Vec::new(), Vec::new()));
    group.bench_function("8 of 16 KiB", |bencher| {
        bencher.iter(|| {
            let (buffer, messages) = spare.take().unwrap_or_default();
            let request = ReadRequest {
                from,
                max_messages: WINDOW_MESSAGES,
                max_bytes,
                skip: None,
                buffer,
                messages,
            };
            let read = smol::block_on(store.handle.read(request));
            from = if read.at_end {
                Cursor::default()
            } else {
                read.next
            };
            spare = Some((read.buffer, read.messages));
        });
    });
    group.finish();
}

/// One acknowledgement on its way to the store; it is taken with the next command.
fn acknowledge(criterion: &mut Criterion) {
    let mut store = Store::open("acknowledge", true);
    let mut buffers = batch(1);
    buffers = store.append(buffers);
    drop(buffers);
    criterion.bench_function("acknowledge", |bencher| {
        bencher.iter(|| store.acknowledge(1));
    });
}

criterion_group!(benches, append, read, acknowledge);
criterion_main!(benches);
