//! The store through its handle: `cargo bench --bench outbox`. What is measured includes the way
//! to the storage thread and back. On disk (below `target/`) an append is one durable commit; in
//! memory it is the same without the disk.

#[path = "../tests/stores/mod.rs"]
mod stores;

use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hostlink_edge::ids::{AttemptKey, Stream};
use hostlink_edge::limits::{CHUNK_BYTES_MAX, CHUNKS_WAITING_MAX, ChunkBatch, WINDOW_MESSAGES};
use hostlink_edge::outbox::{Ack, Acks, Cursor, Handle, ReadRequest, Settings, open};
use stores::{ATTEMPTS, Folder, Printing, running};

const MIB: u64 = 1024 * 1024;
const CAP_BYTES: u64 = 64 * MIB;

struct Store {
    handle: Handle,
    key: AttemptKey,
    next_sequence: u64,
    _folder: Folder,
}

impl Store {
    /// A fresh store with one attempt that runs.
    fn open(name: &str, memory_only: bool) -> Store {
        let folder = folder(name);
        let settings = Settings {
            memory_only,
            ..folder.settings(CAP_BYTES)
        };
        let (handle, _) = smol::block_on(open(settings));
        let key = smol::block_on(running(&handle, 1));
        Store {
            handle,
            key,
            next_sequence: 1,
            _folder: folder,
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
    }
}

fn folder(name: &str) -> Folder {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    Folder::new(target.to_owned(), &format!("bench-outbox-{name}"))
}

fn batch(chunks: usize) -> ChunkBatch {
    stores::batch(chunks, CHUNK_BYTES_MAX)
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

/// Opening a store that is full of output, as a stop has left it. All of the log is read, as after a
/// power cut; what the check of the index costs then is not in here.
fn recover(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("recovery of 64 MiB");
    group.sample_size(10);
    for (name, chunk_bytes) in [("of 16 KiB", CHUNK_BYTES_MAX), ("of one byte", 1)] {
        let folder = folder("recovery");
        let (store, _) = smol::block_on(open(folder.settings(CAP_BYTES)));
        let mut printing = Printing::start(&store, chunk_bytes);
        printing.fill(CAP_BYTES);
        let waiting = smol::block_on(store.counts()).messages_waiting;
        // Each interrupted attempt has a final from the first opening on.
        let expected = waiting + ATTEMPTS as u64;
        smol::block_on(store.close());
        group.bench_function(format!("{waiting} chunks {name}"), |bencher| {
            bencher.iter_custom(|rounds| {
                let mut total = Duration::ZERO;
                for _ in 0..rounds {
                    let begun = Instant::now();
                    let (store, _) = smol::block_on(open(folder.settings(CAP_BYTES)));
                    total += begun.elapsed();
                    assert_eq!(smol::block_on(store.counts()).messages_waiting, expected);
                    smol::block_on(store.close());
                }
                total
            });
        });
    }
    group.finish();
}

/// Bytes that this process has sent towards the disk: whole pages, at each sync those that changed.
fn bytes_written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").expect("Linux");
    let line = io
        .lines()
        .find_map(|line| line.strip_prefix("write_bytes: "));
    let number = line.and_then(|number| number.parse().ok());
    number.expect("the kernel tells it")
}

/// What flash wears by, without the journal of the file system. Printed for each commit, which is
/// one sync.
fn wear(_: &mut Criterion) {
    let full = CHUNK_BYTES_MAX;
    for (chunks, chunk_bytes, commits) in [
        (CHUNKS_WAITING_MAX, full, 512),
        (1, full, 1024),
        (1, 100, 1024),
    ] {
        let mut store = Store::open("wear", false);
        let mut buffers = stores::batch(chunks, chunk_bytes);
        let before = bytes_written();
        for _ in 0..commits {
            buffers = store.append(buffers);
            store.acknowledge(store.next_sequence - 1);
        }
        let written = (bytes_written() - before) as f64 / f64::from(commits);
        let per_byte = written / (chunks * chunk_bytes) as f64;
        println!(
            "{chunks} of {chunk_bytes} bytes a commit: {written:.0} bytes written, {per_byte:.3} a \
             byte"
        );
    }
}

criterion_group!(benches, append, read, acknowledge, recover, wear);
criterion_main!(benches);
