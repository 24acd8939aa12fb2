//! What comes back: a disk that could not be used, and an agent that was rolled back.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use smol::block_on;

use super::fuzzing::HEADER;
use super::record::u32_at;
use super::segment::{FORMAT_VERSION, HEADER_BYTES};
use super::tests::{Folder, append, batch, completed, ids, receipt, run_task};
use super::*;
use crate::ids::{AttemptKey, FinalStatus, Incarnation, Stream};
use crate::limits::SECTOR_BYTES;

/// Makes the store readable and useless: its clean mark cannot be taken. For root as well.
fn block(folder: &Folder) {
    let mark = folder.settings().dir.join("clean");
    let _ = std::fs::remove_file(&mark);
    std::fs::create_dir_all(mark).unwrap();
}

fn unblock(folder: &Folder) {
    std::fs::remove_dir(folder.settings().dir.join("clean")).unwrap();
}

/// All that waits, each with the name of its store.
async fn waiting(store: &Handle) -> Vec<(Incarnation, String)> {
    let batch = store.read(ReadRequest {
        max_messages: 1_000,
        max_bytes: 1 << 20,
        ..ReadRequest::default()
    });
    let batch = batch.await;
    assert!(batch.at_end);
    let mut lines: Vec<_> = batch
        .messages
        .iter()
        .map(|message| {
            let task = &message.ids.task;
            let text = |range: &std::ops::Range<usize>| {
                String::from_utf8_lossy(&batch.buffer[range.clone()]).into_owned()
            };
            let line = match &message.body {
                Body::Output {
                    stream,
                    sequence,
                    data,
                    after_hole,
                } => format!("{task} {stream:?} {sequence} {after_hole} {}", text(data)),
                Body::Final {
                    exit_code,
                    output,
                    error,
                    ..
                } => format!("{task} {exit_code} {} {}", text(output), text(error)),
            };
            (message.store, line)
        })
        .collect();
    lines.sort_by(|a, b| a.1.cmp(&b.1));
    lines
}

async fn ended(store: &Handle, name: &str) -> AttemptKey {
    let key = run_task(store, name).await;
    append(store, key, 1, batch(&["one", "two"])).await;
    store.finish(key, completed(name)).await.unwrap();
    key
}

async fn acknowledge_output(store: &Handle, key: AttemptKey) {
    let ack = Ack::Output {
        key,
        stream: Stream::Stdout,
        sequence: 2,
        cumulative: true,
    };
    store.acknowledge([ack].into_iter().collect()).await;
}

async fn acknowledge_final(store: &Handle, key: AttemptKey) {
    let ack = Ack::Final { key };
    store.acknowledge([ack].into_iter().collect()).await;
}

#[test]
fn what_memory_held_at_the_stop_is_on_the_disk_at_the_next_start() {
    let folder = Folder::new();
    let (on_disk, in_memory) = block_on(async {
        let (store, _) = open(folder.settings()).await;
        ended(&store, "disk").await;
        let on_disk = waiting(&store).await;
        store.close().await;
        block(&folder);
        let (store, _) = open(folder.settings()).await;
        assert!(store.counts().await.volatile);
        ended(&store, "memory").await;
        store.receive(receipt("queued")).await.unwrap();
        let done = ended(&store, "done").await;
        acknowledge_output(&store, done).await;
        acknowledge_final(&store, done).await;
        let in_memory = waiting(&store).await;
        unblock(&folder);
        store.close().await;
        (on_disk, in_memory)
    });
    let mut all = [on_disk, in_memory].concat();
    all.sort_by(|a, b| a.1.cmp(&b.1));
    assert_eq!(all.len(), 6);
    assert_ne!(all[0].0, all[5].0);
    block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        assert!(!store.counts().await.volatile);
        assert_eq!(waiting(&store).await, all);
        assert_eq!(recovered.queued.len(), 1);
        let task = store.load_task(ids("queued").key()).await.unwrap().unwrap();
        assert_eq!(task, receipt("queued"));
        let again = store.receive(receipt("done")).await;
        assert_eq!(again, Ok(Reception::Known(Phase::Finished { held: false })));
        // Its old id, although nothing of it is held.
        let stored = store.final_of(ids("done").key()).await.unwrap();
        assert_eq!(stored.store, all[5].0);
        let inherited = store.snapshot(1 << 20).await.inherited;
        assert_eq!(inherited, [all[5].0]);
        store.close().await;
    });
}

/// Every state on a disk that can be read and not be written.
#[test]
fn a_store_that_can_be_read_tells_what_must_not_run_again() {
    let folder = Folder::new();
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        let long_ago = ended(&store, "long-ago").await;
        acknowledge_output(&store, long_ago).await;
        acknowledge_final(&store, long_ago).await;
        store.close().await;
        // Its closing is in the index alone.
        std::fs::remove_dir_all(folder.settings().dir.join("spool")).unwrap();
        let (store, _) = open(folder.settings()).await;
        let told = ended(&store, "told").await;
        acknowledge_output(&store, told).await;
        ended(&store, "untold").await;
        store.receive(receipt("queued")).await.unwrap();
        store.receive(receipt("dropped")).await.unwrap();
        store.discard(ids("dropped").key()).await.unwrap();
        let running = run_task(&store, "running").await;
        append(&store, running, 1, batch(&["some ", "output"])).await;
        acknowledge_output(&store, running).await;
        drop(store);
    });
    let names = ["long-ago", "told", "untold", "queued", "dropped", "running"];
    // The thread may still hold the folder.
    let locked = || std::fs::File::open(folder.settings().dir.join("spool")).unwrap();
    lock_folder(&locked()).unwrap();
    block(&folder);
    let before = fingerprint(&folder.settings().dir);
    let finals = block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        assert!(store.counts().await.volatile && recovered.queued.is_empty());
        let mut phases = Vec::new();
        for name in names {
            phases.push(store.receive(receipt(name)).await.unwrap());
        }
        let (finished, received) = (Phase::Finished { held: false }, Phase::Received);
        let expected = [
            finished,
            finished,
            // Its output goes first, and that is for the disk to tell.
            received,
            received,
            Phase::Discarded,
            finished,
        ];
        assert_eq!(phases, expected.map(Reception::Known));
        assert!(store.start(ids("queued").key(), 1).await.is_err());
        // Others run.
        ended(&store, "new").await;
        let mut finals = Vec::new();
        for name in ["long-ago", "told", "running"] {
            finals.push(store.final_of(ids(name).key()).await.unwrap());
        }
        assert_ne!(finals[1].store, store.incarnation());
        drop(store);
        finals
    });
    assert_eq!(
        fingerprint(&folder.settings().dir),
        before,
        "nothing is written"
    );
    assert_eq!(finals[1].fin, completed("told"));
    assert_eq!(finals[2].fin.status, FinalStatus::Interrupted);
    assert_eq!(finals[2].fin.output, b"some output");
    unblock(&folder);
    block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        // The disk tells the same under the same ids.
        for (name, before) in ["long-ago", "told", "running"].into_iter().zip(finals) {
            let now = store.final_of(ids(name).key()).await.unwrap();
            assert_eq!((name, now), (name, before));
        }
        assert_eq!(recovered.queued.len(), 1);
        store.close().await;
    });
}

/// Names, lengths and bytes of all files of the log and the index.
fn fingerprint(dir: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.metadata().unwrap().is_dir() {
            true => found.extend(fingerprint(&entry.path())),
            false => {
                let bytes = std::fs::read(entry.path()).unwrap();
                found.push((entry.path(), crc32c::crc32c(&bytes)));
            }
        }
    }
    found.sort();
    found
}

/// The move does not make a reader of before pass over what is here.
#[test]
fn nothing_is_read_after_a_move_before_a_hello() {
    let folder = Folder::new();
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        ended(&store, "disk").await;
        store.close().await;
    });
    block(&folder);
    let (engine, _, reason) = opening::open_any(&folder.settings());
    unblock(&folder);
    let (_commands, queue) = async_channel::bounded(1);
    let (news, _appended) = async_channel::bounded(1);
    let (sender, reopened) = async_channel::bounded(1);
    let names = Arc::new(handle::Incarnations {
        first: engine.incarnation(),
        second: OnceLock::new(),
    });
    let mut storage = thread::Storage {
        engine,
        commands: queue,
        appended: news,
        volatile: Some(thread::Volatile {
            reason: reason.unwrap(),
            reopening: Some(opening::Reopening {
                settings: folder.settings(),
                reopened: sender,
                incarnations: names.clone(),
                opened: None,
            }),
        }),
        moved: false,
    };
    let read = |storage: &mut thread::Storage| {
        let (reply, answer) = async_channel::bounded(1);
        let request = ReadRequest {
            max_messages: 9,
            max_bytes: 1 << 20,
            ..ReadRequest::default()
        };
        storage.turn(handle::Command::Read(Box::new(request), reply));
        answer.try_recv().unwrap()
    };
    storage.try_to_leave_memory();
    assert_eq!(names.second.get(), Some(&storage.engine.incarnation()));
    assert!(reopened.try_recv().unwrap().queued.is_empty());
    let batch = read(&mut storage);
    assert!(batch.at_end && batch.messages.is_empty());
    let key = ids("disk").key();
    let (reply, answer) = async_channel::bounded(1);
    storage.turn(handle::Command::Rewind(key, Stream::Stdout, 1, reply));
    assert_eq!(answer.try_recv().unwrap(), None);
    let (reply, answer) = async_channel::bounded(1);
    storage.turn(handle::Command::Snapshot(1 << 20, reply));
    assert!(!answer.try_recv().unwrap().counts.volatile);
    assert_eq!(read(&mut storage).messages.len(), 3);
}

// ---- rollback -----------------------------------------------------------------------------------

fn segments(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("spool")).unwrap().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Makes the store one of this format: what differs in its records is another matter.
fn set_format(dir: &Path, version: u32) {
    for path in segments(dir) {
        let mut bytes = std::fs::read(&path).unwrap();
        for at in [0, SECTOR_BYTES] {
            let sector = &mut bytes[at..at + SECTOR_BYTES];
            if &sector[..8] != b"HLEDGESG" {
                continue;
            }
            sector[8..12].copy_from_slice(&version.to_le_bytes());
            let crc = crc32c::crc32c(&sector[..12]);
            sector[12..16].copy_from_slice(&crc.to_le_bytes());
            let crc = crc32c::crc32c(&sector[..SECTOR_BYTES - 4]);
            sector[SECTOR_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
    }
}

/// This agent as the older one, and then as the newer one that comes back.
#[test]
fn a_store_that_a_rollback_set_aside_is_taken_back() {
    let folder = Folder::new();
    let dir = folder.settings().dir;
    let before = block_on(async {
        let (store, _) = open(folder.settings()).await;
        ended(&store, "waits").await;
        ended(&store, "twice").await;
        let done = ended(&store, "done").await;
        acknowledge_output(&store, done).await;
        acknowledge_final(&store, done).await;
        store.receive(receipt("queued")).await.unwrap();
        store.receive(receipt("queued-again")).await.unwrap();
        let before = waiting(&store).await;
        store.close().await;
        before
    });
    set_format(&dir, FORMAT_VERSION + 1);
    let newer = fingerprint(&dir);
    // The older agent leaves it alone and works.
    let aside = |version: u32| {
        let mut name = dir.clone().into_os_string();
        name.push(format!(".format-{version}-1"));
        PathBuf::from(name)
    };
    block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        assert!(recovered.queued.is_empty() && !store.counts().await.volatile);
        ended(&store, "old").await;
        ended(&store, "twice").await;
        store.receive(receipt("queued-again")).await.unwrap();
        store.close().await;
        // Also after a restart.
        let (store, _) = open(folder.settings()).await;
        assert_eq!(waiting(&store).await.len(), 6);
        store.close().await;
    });
    let kept: Vec<u32> = fingerprint(&aside(FORMAT_VERSION + 1))
        .into_iter()
        .map(|(_, crc)| crc)
        .collect();
    let newer: Vec<u32> = newer.into_iter().map(|(_, crc)| crc).collect();
    assert_eq!(kept, newer, "it is kept as it was");
    // The newer one comes back.
    std::fs::rename(aside(FORMAT_VERSION + 1), aside(FORMAT_VERSION)).unwrap();
    set_format(&aside(FORMAT_VERSION), FORMAT_VERSION);
    block_on(async {
        let (store, recovered) = open(folder.settings()).await;
        let queued: Vec<_> = recovered.queued.iter().map(|q| q.ids.clone()).collect();
        assert_eq!(queued, [ids("queued-again"), ids("queued")]);
        let now = waiting(&store).await;
        assert_eq!(now.len(), 9);
        for message in &before {
            // One that ran in both is told once.
            let twice = message.1.starts_with("twice");
            assert_eq!(now.contains(message), !twice, "{message:?}");
        }
        let finished = |held| Ok(Reception::Known(Phase::Finished { held }));
        assert_eq!(store.receive(receipt("waits")).await, finished(true));
        assert_eq!(store.receive(receipt("done")).await, finished(false));
        let task = store.load_task(ids("queued").key()).await.unwrap();
        assert_eq!(task, Some(receipt("queued")));
        assert_eq!(store.counts().await.chunks_dropped, 2);
        store.close().await;
        // It is there once and for all.
        let (store, _) = open(folder.settings()).await;
        assert_eq!(waiting(&store).await, now);
        assert_eq!(store.receive(receipt("done")).await, finished(false));
        store.close().await;
    });
    let beside = std::fs::read_dir(dir.parent().unwrap()).unwrap().flatten();
    let left: Vec<_> = beside.map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["outbox"]);
}

/// What an older format wrote is read as it is, and goes on in the present one.
#[test]
fn a_store_of_an_older_format_is_read() {
    let folder = Folder::new();
    let dir = folder.settings().dir;
    let before = block_on(async {
        let (store, _) = open(folder.settings()).await;
        ended(&store, "a").await;
        let before = waiting(&store).await;
        store.close().await;
        before
    });
    set_format(&dir, 1);
    block_on(async {
        let (store, _) = open(folder.settings()).await;
        assert_eq!(waiting(&store).await, before);
        ended(&store, "b").await;
        store.close().await;
    });
    let newest = segments(&dir)
        .into_iter()
        .map(|path| u32_at(&std::fs::read(path).unwrap(), 8).unwrap_or(0));
    assert_eq!(
        newest.max(),
        Some(FORMAT_VERSION),
        "an older agent keeps off"
    );
}

/// A record that is right and unknown was written by a newer agent: it is not passed over.
#[test]
fn an_unknown_record_is_left_to_the_newer_agent() {
    // Kind, stream and flags of a record; its reserved word.
    for (head, reserved) in [
        ([12, 0, 0, 0], 0),
        ([0, 0, 0, 0], 0),
        ([4, 0, 8, 0], 0),
        ([3, 0, 1, 0], 0),
        ([3, 2, 0, 0], 0),
        ([2, 0, 0, 0], 1),
    ] {
        let folder = Folder::new();
        let spool = folder.settings().dir.join("spool");
        std::fs::create_dir_all(&spool).unwrap();
        let mut record = vec![0; record::RECORD_HEAD_BYTES];
        record[8..12].copy_from_slice(&head);
        record[12] = reserved;
        record[32] = 1;
        let mut segment = HEADER.encode().to_vec();
        segment.extend(unit::mend_unit(HEADER.seed(), HEADER_BYTES, 1, &record));
        std::fs::write(spool.join("0000000001.seg"), &segment).unwrap();
        block_on(async {
            let (store, _) = open(folder.settings()).await;
            assert!(!store.counts().await.volatile);
            ended(&store, "a").await;
            store.close().await;
        });
        let aside = format!("outbox.format-{FORMAT_VERSION}-1/spool/0000000001.seg");
        let kept = folder.settings().dir.parent().unwrap().join(aside);
        assert_eq!(std::fs::read(kept).unwrap(), segment, "{head:?} {reserved}");
    }
}
