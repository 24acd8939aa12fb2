//! A store that is full of chunks of one byte: memory does not grow with their number, and the next
//! start knows them all. A process of its own, since memory is measured.

mod stores;

use std::time::{Duration, Instant};

use hostlink_edge::outbox::open;
use smol::block_on;
use stores::{ATTEMPTS, Folder, Printing};

const CAP_BYTES: u64 = 16 << 20;
/// Between a store with a sixteenth of that and a full one.
const GROWTH_KIB_MAX: u64 = 1024;
/// Not a figure, but a bound for a test build on a busy machine.
const OPENING_MAX: Duration = Duration::from_secs(60);

/// Memory of this process that is not backed by a file, in KiB.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.expect("the kernel tells it")
}

#[test]
fn memory_is_flat_for_a_full_store_of_small_chunks() {
    let folder = Folder::new(std::env::temp_dir(), "full-store");
    let (store, _) = block_on(open(folder.settings(CAP_BYTES)));
    let mut printing = Printing::start(&store, 1);
    printing.print(CAP_BYTES / 16);
    let little = anonymous_kib();
    printing.fill(CAP_BYTES);
    let full = anonymous_kib();
    let waiting = block_on(store.counts()).messages_waiting;
    eprintln!("{waiting} chunks, {little} and {full} KiB of memory");
    assert!(waiting > 200_000, "{waiting}");
    assert!(full < little + GROWTH_KIB_MAX, "{little} and {full}");
    block_on(store.close());
    drop(printing);

    let before = anonymous_kib();
    let begun = Instant::now();
    let (store, _) = block_on(open(folder.settings(CAP_BYTES)));
    let opening = begun.elapsed();
    let after = anonymous_kib();
    eprintln!("opened in {opening:?}, {before} and {after} KiB of memory");
    // Each interrupted attempt has a final now.
    let counts = block_on(store.counts());
    assert_eq!(counts.messages_waiting, waiting + ATTEMPTS as u64);
    assert!(opening < OPENING_MAX);
    assert!(after < before + 4 * GROWTH_KIB_MAX);
    block_on(store.close());
}
