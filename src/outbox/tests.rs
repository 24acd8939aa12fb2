//! The outbox through its handle, on the real disk and in memory.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use smol::block_on;

use super::*;
use crate::ids::{AttemptKey, FinalStatus, Ids, Stream};
use crate::limits::{Chunk, ChunkBatch, ChunkBuffer};

/// A folder of its own for each test, removed at its end.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hostlink-outbox-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub(super) fn settings(&self) -> Settings {
        Settings {
            dir: self.0.join("outbox"),
            memory_only: false,
            cap_bytes: 4 << 20,
            terminal_reserve_bytes: 256 << 10,
            final_output_bytes: 4096,
            index_checker: None,
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A handle that was dropped and not closed: its thread closes the store, and holds the
        // lock until then. Without a store on disk there is nothing to wait for.
        if let Ok(spool) = std::fs::File::open(self.settings().dir.join("spool")) {
            let _ = rustix::fs::flock(&spool, rustix::fs::FlockOperation::LockExclusive);
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) fn ids(name: &str) -> Ids {
    Ids::new(name, &format!("{name}-attempt")).unwrap()
}

pub(super) fn receipt(name: &str) -> Receipt {
    Receipt {
        ids: ids(name),
        command: format!("echo {name}").into_bytes(),
        priority: 3,
        timeout_seconds: Some(60),
        received_at_ms: 1_000,
    }
}

fn chunk(bytes: &[u8]) -> Chunk {
    Box::new(ChunkBuffer::from_slice(bytes).unwrap())
}

pub(super) fn batch(texts: &[&str]) -> ChunkBatch {
    texts.iter().map(|text| chunk(text.as_bytes())).collect()
}

pub(super) fn completed(text: &str) -> Final {
    Final {
        status: FinalStatus::Completed,
        exit_code: 0,
        output: text.as_bytes().to_vec(),
        error: Vec::new(),
        output_truncated: false,
        error_truncated: false,
        usage: None,
    }
}

pub(super) async fn run_task(store: &Handle, name: &str) -> AttemptKey {
    let key = ids(name).key();
    assert_eq!(store.receive(receipt(name)).await, Ok(Reception::New));
    assert_eq!(store.start(key, 2_000).await, Ok(Start::Go));
    key
}

/// What a reader gets from a cursor on: one line a message.
pub(super) async fn read_all(store: &Handle, from: Cursor) -> Vec<String> {
    let mut lines = Vec::new();
    let mut request = ReadRequest {
        from,
        max_messages: 3,
        max_bytes: 1 << 20,
        ..ReadRequest::default()
    };
    loop {
        let batch = store.read(request).await;
        for message in &batch.messages {
            let task = &message.ids.task;
            lines.push(match &message.body {
                Body::Output {
                    stream,
                    sequence,
                    data,
                    after_hole,
                } => format!(
                    "{task} {}{sequence}{} {}",
                    &stream.as_str()[3..4],
                    if *after_hole { "!" } else { "" },
                    String::from_utf8_lossy(&batch.buffer[data.clone()])
                ),
                Body::Final {
                    status,
                    exit_code,
                    output,
                    error,
                    ..
                } => format!(
                    "{task} {} {exit_code} [{}] [{}]",
                    status.as_str(),
                    String::from_utf8_lossy(&batch.buffer[output.clone()]),
                    String::from_utf8_lossy(&batch.buffer[error.clone()])
                ),
            });
        }
        if batch.at_end {
            return lines;
        }
        request = ReadRequest {
            from: batch.next,
            max_messages: 3,
            max_bytes: 1 << 20,
            skip: None,
            buffer: batch.buffer,
            messages: batch.messages,
        };
    }
}

/// Appends and fails with the reason alone.
pub(super) async fn append(
    store: &Handle,
    key: AttemptKey,
    first_sequence: u64,
    chunks: ChunkBatch,
) {
    let stored = store
        .append(key, Stream::Stdout, first_sequence, chunks)
        .await;
    assert_eq!(stored.map(drop).map_err(|(_, why)| why), Ok(()));
}

pub(super) fn acks(list: &[Ack]) -> Acks {
    list.iter().copied().collect()
}

pub(super) fn output_ack(key: AttemptKey, sequence: u64, cumulative: bool) -> Ack {
    Ack::Output {
        key,
        stream: Stream::Stdout,
        sequence,
        cumulative,
    }
}

/// Everything that a store must do whatever it stands on.
pub(super) async fn a_life(store: &Handle) {
    let key = run_task(store, "a").await;
    assert_eq!(
        store.receive(receipt("a")).await,
        Ok(Reception::Known(Phase::Started))
    );
    assert_eq!(
        store.start(key, 2_000).await,
        Ok(Start::Refused(Phase::Started))
    );
    let news = store.appended();
    let (out, err) = (Stream::Stdout, Stream::Stderr);
    let back = store
        .append(key, out, 1, batch(&["one", "two", "three"]))
        .await;
    assert_eq!(back.unwrap().len(), 3);
    news.recv().await.unwrap();
    let refused = store.append(key, out, 5, batch(&["five"])).await;
    assert_eq!(refused.unwrap_err().1, StoreError::Sequence { last: 3 });
    store.append(key, err, 1, batch(&["oops"])).await.unwrap();
    store.finish(key, completed("tail")).await.unwrap();
    let mut second = completed("other");
    second.exit_code = 9;
    store.finish(key, second).await.unwrap();
    let all = [
        "a o1 one",
        "a o2 two",
        "a o3 three",
        "a e1 oops",
        "a completed 0 [tail] []",
    ];
    assert_eq!(read_all(store, Cursor::START).await, all);
    let snapshot = store.snapshot(1 << 20).await;
    assert_eq!(snapshot.finals.len(), 1);
    assert_eq!(snapshot.streams.len(), 2);
    assert_eq!(
        (
            snapshot.streams[0].first_sequence,
            snapshot.streams[0].last_sequence
        ),
        (1, 3)
    );
    assert_eq!(snapshot.counts.messages_waiting, 5);

    store.acknowledge(acks(&[output_ack(key, 2, false)])).await;
    let left = [
        "a o1 one",
        "a o3 three",
        "a e1 oops",
        "a completed 0 [tail] []",
    ];
    assert_eq!(read_all(store, Cursor::START).await, left);
    let at = store.rewind(key, out, 2).await.unwrap();
    assert_eq!(read_all(store, at).await, left[1..]);
    store
        .acknowledge(acks(&[output_ack(key, 99, true), Ack::Final { key }]))
        .await;
    assert_eq!(read_all(store, Cursor::START).await, ["a e1 oops"]);
    let piece = Piece::Output {
        stream: err,
        sequence: 1,
    };
    store.reject(key, piece).await.unwrap();
    assert!(read_all(store, Cursor::START).await.is_empty());
    assert_eq!(
        store.phase_of(key).await,
        Some(Phase::Finished { held: false })
    );
    let stored = store.final_of(key).await.unwrap();
    assert_eq!((stored.fin.exit_code, stored.texts_held), (0, false));
    assert_eq!(store.counts().await.attempts_open, 0);
    assert_eq!(
        store.receive(receipt("a")).await,
        Ok(Reception::Known(Phase::Finished { held: false }))
    );
}

#[test]
fn a_life_on_disk() {
    let folder = Folder::new();
    block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        assert!(recovered.queued.is_empty());
        assert!(!store.counts().await.volatile);
        a_life(&store).await;
        let incarnation = store.incarnation().to_owned();
        store.close().await;
        let (store, _) = open(folder.settings()).await;
        assert_eq!(store.incarnation(), incarnation);
        let key = ids("a").key();
        assert_eq!(
            store.phase_of(key).await,
            Some(Phase::Finished { held: false })
        );
    });
}

#[test]
fn a_life_in_memory() {
    let folder = Folder::new();
    let mut settings = folder.settings();
    settings.memory_only = true;
    block_on(async {
        let (store, _) = open(settings).await;
        let counts = store.counts().await;
        assert!(counts.volatile && counts.volatile_reason.is_none());
        a_life(&store).await;
        store.close().await;
    });
    assert!(!folder.0.join("outbox").exists());
}

#[test]
fn each_state_survives_a_restart() {
    let folder = Folder::new();
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        let running = run_task(&store, "running").await;
        store
            .append(running, Stream::Stdout, 1, batch(&["some ", "output"]))
            .await
            .unwrap();
        store.receive(receipt("waiting")).await.unwrap();
        store.receive(receipt("dropped")).await.unwrap();
        store.discard(ids("dropped").key()).await.unwrap();
        let ended = run_task(&store, "ended").await;
        store
            .append(ended, Stream::Stdout, 1, batch(&["x"]))
            .await
            .unwrap();
        store.finish(ended, completed("x")).await.unwrap();
        store.reported(ended).await.unwrap();
        drop(store);
    });
    block_on(async {
        let (store, recovered) = reopen(&folder).await;
        assert_eq!(recovered.interrupted, [ids("running")]);
        let queued: Vec<_> = recovered
            .queued
            .iter()
            .map(|task| task.ids.clone())
            .collect();
        assert_eq!(queued, [ids("waiting")]);
        let loaded = store.load_task(ids("waiting").key()).await.unwrap();
        assert_eq!(loaded, Some(receipt("waiting")));
        let dropped = store.start(ids("dropped").key(), 1).await;
        assert_eq!(dropped, Ok(Start::Refused(Phase::Discarded)));
        let mut lines = read_all(&store, Cursor::START).await;
        lines.sort();
        let why = "interrupted: the agent stopped while the task ran";
        let expected = [
            "ended o1 x".to_owned(),
            format!("running interrupted -1 [some output] [{why}]"),
            "running o1 some ".to_owned(),
            "running o2 output".to_owned(),
        ];
        assert_eq!(lines, expected);
        let text = store.final_of(ids("running").key()).await.unwrap().fin;
        assert!(!text.output_truncated);
    });
}

/// Opens once the thread that still holds the store has gone.
pub(super) async fn reopen(folder: &Folder) -> (Handle, Recovered) {
    loop {
        let (store, recovered) = open(folder.settings()).await;
        if !store.counts().await.volatile {
            return (store, recovered);
        }
        smol::Timer::after(std::time::Duration::from_millis(5)).await;
    }
}

#[test]
fn output_over_the_cap_drops_the_oldest_and_says_so() {
    let folder = Folder::new();
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        let key = run_task(&store, "a").await;
        let full = [7; crate::limits::CHUNK_BYTES_MAX];
        let mut sequence = 1;
        for _ in 0..100 {
            let chunks: ChunkBatch = (0..8).map(|_| chunk(&full)).collect();
            append(&store, key, sequence, chunks).await;
            sequence += 8;
        }
        store.finish(key, completed("end")).await.unwrap();
        let counts = store.counts().await;
        assert!(counts.bytes_used <= counts.byte_cap);
        assert!(counts.has_rotated_chunks && counts.chunks_dropped > 0);
        let snapshot = store.snapshot(1 << 20).await;
        let range = &snapshot.streams[0];
        assert!(range.truncated && range.first_sequence > 1);
        assert_eq!(range.last_sequence, 800);
        let first = store.read(ReadRequest {
            max_messages: 1,
            ..ReadRequest::default()
        });
        match first.await.messages[0].body {
            Body::Output {
                sequence,
                after_hole,
                ..
            } => assert!(after_hole && sequence == range.first_sequence),
            Body::Final { .. } => panic!("the final comes last"),
        }
        assert_eq!(
            range.first_sequence - 1,
            counts.chunks_dropped,
            "every dropped chunk is counted"
        );
    });
}

#[test]
fn a_newer_store_is_set_aside_whole() {
    let folder = Folder::new();
    let spool = folder.0.join("outbox/spool");
    std::fs::create_dir_all(&spool).unwrap();
    let mut sector = vec![0; 4096];
    sector[..8].copy_from_slice(b"HLEDGESG");
    sector[8..12].copy_from_slice(&7u32.to_le_bytes());
    let crc = crc32c::crc32c(&sector[..12]);
    sector[12..16].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(spool.join("0000000001.seg"), &sector).unwrap();
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        assert!(!store.counts().await.volatile);
        a_life(&store).await;
        store.close().await;
    });
    let kept = folder.0.join("outbox.format-7-1/spool/0000000001.seg");
    assert_eq!(std::fs::read(kept).unwrap(), sector);
}

#[test]
fn a_folder_that_cannot_be_made_means_the_volatile_store() {
    let folder = Folder::new();
    std::fs::write(folder.0.join("outbox"), "a file in the way").unwrap();
    block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        assert!(recovered.queued.is_empty());
        let counts = store.counts().await;
        assert!(counts.volatile && counts.volatile_reason.is_some());
        a_life(&store).await;
        // Or it would try the folder once more when that has gone.
        store.close().await;
    });
}

#[test]
fn two_stores_never_share_a_folder() {
    let folder = Folder::new();
    block_on(async {
        let (first, _) = open(folder.settings()).await;
        let (second, _) = open(folder.settings()).await;
        assert!(!first.counts().await.volatile);
        assert!(second.counts().await.volatile);
        a_life(&first).await;
        second.close().await;
        first.close().await;
    });
}

#[test]
fn a_damaged_index_is_set_aside_and_brought_up_from_the_log() {
    let folder = Folder::new();
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        a_life(&store).await;
        store.receive(receipt("waiting")).await.unwrap();
        store.close().await;
    });
    let index = folder.0.join("outbox/index");
    for name in ["db", "conf"] {
        std::fs::write(index.join(name), vec![0xa5; 5000]).unwrap();
    }
    block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        let counts = store.counts().await;
        assert!(counts.index_rebuilt && !counts.volatile, "{counts:?}");
        assert_eq!(recovered.queued.len(), 1);
        let known = store.receive(receipt("a")).await;
        assert_eq!(known, Ok(Reception::Known(Phase::Finished { held: false })));
        assert!(folder.0.join("outbox/index.damaged").exists());
        store.close().await;
    });
}

#[test]
fn a_task_without_room_is_refused_and_taken_when_room_returns() {
    let folder = Folder::new();
    let mut settings = folder.settings();
    settings.cap_bytes = 1 << 20;
    settings.final_output_bytes = 64 << 10;
    block_on(async {
        let (store, _) = open(settings).await;
        let mut taken = 0;
        loop {
            match store.receive(receipt(&format!("task{taken}"))).await {
                Ok(Reception::New) => taken += 1,
                refused => {
                    assert_eq!(refused, Err(StoreError::Full));
                    break;
                }
            }
        }
        assert!(taken >= 3, "{taken} tasks fit");
        store.discard(ids("task0").key()).await.unwrap();
        let name = format!("task{taken}");
        assert_eq!(store.receive(receipt(&name)).await, Ok(Reception::New));
        // Each of them can store its worst-case final.
        for number in 1..=taken {
            let key = ids(&format!("task{number}")).key();
            let mut fin = completed(&"x".repeat(64 << 10));
            fin.error = vec![b'y'; 64 << 10];
            let stored = store.finish(key, fin).await;
            assert_eq!(stored.map_err(|(_, why)| why), Ok(()));
        }
        assert_eq!(store.finals_waiting(100).await.len(), taken);
        assert!(store.counts().await.bytes_used <= 1 << 20);
    });
}

#[test]
fn looking_at_a_stopped_store_changes_nothing() {
    let folder = Folder::new();
    let dir = folder.0.join("outbox");
    assert!(inspect(&dir, 4 << 20).is_err());
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        let key = run_task(&store, "a").await;
        append(&store, key, 1, batch(&["one", "two"])).await;
        store.acknowledge(acks(&[output_ack(key, 1, true)])).await;
        store.close().await;
    });
    assert_eq!(inspect(&dir, 4 << 20).unwrap().messages_waiting, 1);
    std::fs::remove_file(dir.join("clean")).unwrap();
    assert_eq!(inspect(&dir, 4 << 20).unwrap().messages_waiting, 1);
}
