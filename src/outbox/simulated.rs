//! The store on the simulated disk for the simulation of the whole agent: the commands of a real
//! [`Handle`], taken by the storage thread's own code, one turn at a time.

use std::sync::{Arc, OnceLock};

use super::engine::Bounds;
use super::handle::{Command, Handle, Incarnations};
use super::recovery;
use super::sim::SimIndex;
pub use super::sim::{Fault, Keep, MARK_BYTES, SimDisk};
use super::thread::{Batch, Storage};
use super::types::*;
use crate::ids::{AttemptKey, Incarnation, Stream};
use crate::limits::STORAGE_QUEUE;

pub struct Store {
    storage: Storage,
    /// Keeps the handle's end of it open.
    _reopened: async_channel::Sender<Recovered>,
}

/// What a turn has done that is not told by answers.
#[derive(Debug, Default)]
pub struct Turn {
    /// Streams that the session has given up.
    pub given_up: Vec<(AttemptKey, Stream)>,
    /// Something is to be dropped at the session's wish: these streams, or anything else.
    pub is_to_drop: bool,
    /// Chunks that were acknowledged one by one.
    pub acknowledged: Vec<(AttemptKey, Stream, u64)>,
    /// Output that was not acknowledged was dropped, for whatever reason.
    pub has_dropped: bool,
}

/// Opens the store as a start of the agent does; `None` if the disk fails meanwhile.
pub fn open(
    disk: &SimDisk,
    cap_bytes: u64,
    incarnation: Incarnation,
    clock_ms: fn() -> u64,
) -> Option<(Handle, Store, Recovered)> {
    let bounds = Bounds {
        cap_bytes,
        terminal_reserve_bytes: cap_bytes / 8,
        final_output_bytes: 256,
    };
    let opened = recovery::open(
        Box::new(disk.clone()),
        Box::new(SimIndex::open(disk)),
        bounds,
        incarnation,
        clock_ms,
    );
    let (engine, recovered) = opened.ok()?;
    let (commands, queue) = async_channel::bounded(STORAGE_QUEUE);
    let (news, appended) = async_channel::bounded(1);
    let (moved, reopened) = async_channel::bounded(1);
    let handle = Handle {
        commands,
        appended,
        reopened,
        incarnations: Arc::new(Incarnations {
            first: engine.incarnation(),
            second: OnceLock::new(),
        }),
    };
    let store = Store {
        storage: Storage {
            engine,
            commands: queue,
            appended: news,
            volatile: None,
            moved: false,
        },
        _reopened: moved,
    };
    Some((handle, store, recovered))
}

impl Store {
    /// Commands that wait.
    pub fn waiting(&self) -> usize {
        self.storage.commands.len()
    }

    /// What the storage thread does when it finds commands. `before` learns what they are.
    pub fn turn(&mut self, before: impl FnOnce(&Turn)) -> Turn {
        let mut turn = Turn::default();
        let mut batch = Batch::new();
        while let Ok(command) = self.storage.commands.try_recv() {
            match &command {
                Command::GiveUpStream(key, stream, _) => {
                    turn.given_up.push((*key, *stream));
                    turn.is_to_drop = true;
                }
                Command::Discard(..) | Command::Reject(..) => turn.is_to_drop = true,
                Command::Acknowledge(acks) => {
                    let single = acks.iter().filter_map(|ack| match *ack {
                        Ack::Output {
                            key,
                            stream,
                            sequence,
                            cumulative: false,
                        } => Some((key, stream, sequence)),
                        Ack::Output { .. } | Ack::Final { .. } => None,
                    });
                    turn.acknowledged.extend(single);
                }
                _ => {}
            }
            if batch.push(command).is_err() {
                unreachable!("the queue is not longer than a batch");
            }
        }
        before(&turn);
        let dropped = self.storage.engine.tally.chunks_dropped;
        self.storage.carry_out(batch);
        turn.has_dropped = self.storage.engine.tally.chunks_dropped > dropped;
        turn
    }

    /// An orderly end.
    pub fn close(mut self) {
        self.storage.close();
    }

    /// Whether this chunk is held and not acknowledged.
    pub fn waits(&self, key: AttemptKey, stream: Stream, sequence: u64) -> bool {
        let attempt = self.storage.engine.attempts.get(&key);
        attempt.is_some_and(|attempt| attempt.stream(stream).waits(sequence))
    }

    /// The last chunk of this stream that was ever stored.
    pub fn last(&self, key: AttemptKey, stream: Stream) -> u64 {
        let attempt = self.storage.engine.attempts.get(&key);
        attempt.map_or(0, |attempt| attempt.stream(stream).mark.last)
    }

    pub fn counts(&self) -> Counts {
        self.storage.engine.counts()
    }
}
