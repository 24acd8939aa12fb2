//! What crosses the border of the outbox: plain values, no behaviour beyond their own meaning.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{AttemptKey, FinalStatus, Ids, Incarnation, Stream, Usage};

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Folder of the store (`HOSTLINK_LOCAL_STORE_PATH`); made if it is missing.
    pub dir: PathBuf,
    /// Keep everything in memory and write nothing (`HOSTLINK_LOCAL_STORE=memory`).
    pub memory_only: bool,
    /// All segments together (`HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES`).
    pub cap_bytes: u64,
    /// Of the cap, what output may not use (`HOSTLINK_LOCAL_STORE_TERMINAL_RESERVE_BYTES`).
    pub terminal_reserve_bytes: u64,
    /// Bound of each text of a final (`HOSTLINK_TASK_FINAL_OUTPUT_BYTES`).
    pub final_output_bytes: usize,
    /// Our own executable, run as `EXE __check-index DIR` after an unclean stop, before the index
    /// is opened here. `None`: the index is opened unchecked.
    pub index_checker: Option<PathBuf>,
}

/// What the store knew when it was opened.
#[derive(Debug, Clone, Default)]
pub struct Recovered {
    /// Received and not started, in order of arrival.
    pub queued: Vec<QueuedTask>,
    /// Were starting or running: their final (`interrupted`, exit −1) is durably written.
    pub interrupted: Vec<Ids>,
}

/// An attempt that waits for its start; its command stays on disk ([`super::Handle::load_task`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuedTask {
    pub ids: Ids,
    pub priority: i64,
    pub timeout_seconds: Option<u64>,
    pub received_at_ms: u64,
}

/// A task as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    pub ids: Ids,
    pub command: Vec<u8>,
    /// A larger number is more urgent.
    pub priority: i64,
    pub timeout_seconds: Option<u64>,
    /// Wall clock, milliseconds since 1970.
    pub received_at_ms: u64,
}

/// How far an attempt has come. States only move down this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Received,
    /// Starting or running.
    Started,
    Finished {
        /// The final is unacknowledged and still in the outbox.
        held: bool,
    },
    Discarded,
}

/// Answer to a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reception {
    /// Recorded now, durably: queue it.
    New,
    /// Seen before: never run it again (PROTOCOL.md 4.6).
    Known(Phase),
}

/// Answer to a wish to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// "Starting" is durable: fork now. Given once for an attempt, ever.
    Go,
    Refused(Phase),
}

/// How an attempt ended, with the tails of its streams (PROTOCOL.md 4.9).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Final {
    pub status: FinalStatus,
    pub exit_code: i32,
    pub output: Vec<u8>,
    pub error: Vec<u8>,
    pub output_truncated: bool,
    pub error_truncated: bool,
    /// `None` if no process ran, or none was there to measure it.
    pub usage: Option<Usage>,
}

/// A final as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFinal {
    pub key: AttemptKey,
    /// Where it was born: part of its id.
    pub store: Incarnation,
    /// The texts are empty and both truncation flags set if `texts_held` is false.
    pub fin: Final,
    /// The texts are still in the outbox. False once the final is acknowledged.
    pub texts_held: bool,
    /// Output of the same attempt is not acknowledged.
    pub output_waits: bool,
}

/// An unacknowledged final.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FinalWaiting {
    pub ids: Arc<Ids>,
    pub key: AttemptKey,
    /// Output of the same attempt is not acknowledged: the final may not overtake it.
    pub output_waits: bool,
}

/// One message that the server will never take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    Output { stream: Stream, sequence: u64 },
    Final,
}

/// An acknowledgement by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// This chunk, and all before it if `cumulative`.
    Output {
        key: AttemptKey,
        stream: Stream,
        sequence: u64,
        cumulative: bool,
    },
    Final {
        key: AttemptKey,
    },
}

/// A place in the log: opaque, ordered as the log is. It stays valid when the segment it points
/// into is gone: reading then goes on with the next live record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Cursor {
    pub(super) generation: u64,
    pub(super) offset: u64,
}

impl Cursor {
    /// Before everything.
    pub const START: Cursor = Cursor {
        generation: 0,
        offset: 0,
    };

    /// A record at this byte of its segment. The lowest bit tells it from the head of a unit.
    pub(super) fn record(generation: u64, byte: u64) -> Cursor {
        Cursor {
            generation,
            offset: byte << 1 | 1,
        }
    }

    /// The place of a unit, written or to come.
    pub(super) fn unit(generation: u64, byte: u64) -> Cursor {
        Cursor {
            generation,
            offset: byte << 1,
        }
    }

    /// Places of one segment, in order.
    #[cfg(test)]
    pub fn some() -> [Cursor; 5] {
        [1, 2, 3, 4, 5].map(|sector| Cursor::record(1, 512 * sector))
    }

    pub(super) fn byte(self) -> u64 {
        self.offset >> 1
    }

    pub(super) fn is_record(self) -> bool {
        self.offset & 1 != 0
    }
}

/// What to read next.
#[derive(Debug, Default)]
pub struct ReadRequest {
    pub from: Cursor,
    pub max_messages: usize,
    /// Raw payload bytes. A single message that is larger is read alone.
    pub max_bytes: usize,
    /// Pass over the chunks of this stream and the final of its attempt.
    pub skip: Option<(AttemptKey, Stream)>,
    /// Reused: comes back in the [`Batch`].
    pub buffer: Vec<u8>,
    /// Reused: comes back in the [`Batch`].
    pub messages: Vec<Message>,
}

impl ReadRequest {
    /// The answer when nothing is to be read.
    pub(super) fn nothing(self) -> Batch {
        Batch {
            messages: self.messages,
            buffer: self.buffer,
            next: self.from,
            behind_bytes: 0,
            at_end: true,
        }
    }
}

/// Unacknowledged messages in log order; before them finals from behind [`Batch::next`] that wait
/// for no output of their attempts. A final comes after all output of its attempt.
#[derive(Debug, Default)]
pub struct Batch {
    pub messages: Vec<Message>,
    /// The payloads that the messages' ranges point into.
    pub buffer: Vec<u8>,
    /// Where to read on.
    pub next: Cursor,
    /// Bytes of the log behind `next`, whatever they hold.
    pub behind_bytes: u64,
    /// Nothing was waiting behind `next` when this was read.
    pub at_end: bool,
}

impl Batch {
    /// Whether a message with so much payload may still be added: the first one always. The length
    /// may be one that is not proven.
    pub(super) fn has_room(&self, bytes: usize, max_messages: usize, max_bytes: usize) -> bool {
        let fits = self.buffer.len().saturating_add(bytes) <= max_bytes;
        self.messages.len() < max_messages && (fits || self.messages.is_empty())
    }
}

/// One message to send. A final that was copied forward is met again at its new place, so a
/// reader that has it in flight must recognise it by its key.
#[derive(Debug, Clone)]
pub struct Message {
    pub at: Cursor,
    pub key: AttemptKey,
    /// Where it was born: part of its id.
    pub store: Incarnation,
    pub ids: Arc<Ids>,
    pub body: Body,
}

#[derive(Debug, Clone)]
pub enum Body {
    Output {
        stream: Stream,
        sequence: u64,
        /// Into [`Batch::buffer`].
        data: Range<usize>,
        /// The chunk before this one was lost: rotated out, damaged, given up or rejected.
        after_hole: bool,
    },
    Final {
        status: FinalStatus,
        exit_code: i32,
        /// Into [`Batch::buffer`].
        output: Range<usize>,
        error: Range<usize>,
        output_truncated: bool,
        error_truncated: bool,
        usage: Option<Usage>,
    },
}

/// Everything that a hello tells (PROTOCOL.md 3).
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Not started, in order of arrival, with the time of arrival (wall clock, ms).
    pub received: Vec<(Arc<Ids>, u64)>,
    /// Unacknowledged, with a result channel, oldest first; those whose texts went over the text
    /// budget are left out.
    pub finals: Vec<(Arc<Ids>, StoredFinal)>,
    pub streams: Vec<StreamRange>,
    /// Oldest start first: time of the start (wall clock, ms) and the last sequence of each
    /// stream, 0 for none, indexed by [`Stream::index`].
    pub started: Vec<(Arc<Ids>, u64, [u64; 2])>,
    /// Other stores that messages held here were born in: their ids are ours too.
    pub inherited: Vec<Incarnation>,
    pub counts: Counts,
}

/// Unacknowledged output of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamRange {
    pub ids: Arc<Ids>,
    pub key: AttemptKey,
    pub stream: Stream,
    pub first_sequence: u64,
    pub last_sequence: u64,
    /// Unacknowledged output of this stream has been lost on the device.
    pub truncated: bool,
}

/// Figures for `status` and the hello.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    pub bytes_used: u64,
    pub byte_cap: u64,
    /// Output that was never acknowledged has been dropped, of an attempt that is still open.
    pub has_rotated_chunks: bool,
    /// The store is in memory only: it does not survive a restart.
    pub volatile: bool,
    /// Why, if it was not chosen.
    pub volatile_reason: Option<String>,
    pub messages_waiting: u64,
    /// Raw payload; prorated inside a segment that is partly acknowledged.
    pub bytes_waiting: u64,
    /// When the oldest waiting message was stored (wall clock, ms).
    pub oldest_waiting_ms: Option<u64>,
    pub attempts_open: u64,
    /// Since the start of the agent, like all that follow.
    pub chunks_dropped: u64,
    /// Prorated like `bytes_waiting`.
    pub bytes_dropped: u64,
    pub streams_truncated: u64,
    pub finals_dropped: u64,
    pub attempts_discarded: u64,
    /// Damaged records that recovery met.
    pub records_damaged: u64,
    pub index_rebuilt: bool,
}

/// Why the store did not do what was asked. The variant says what to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// No room. Nothing was stored; it may fit later, when acknowledgements have made room.
    Full,
    /// The disk failed. Nothing counts as stored; the same content may be tried again.
    Io(String),
    /// The chunk is not the one after the last stored, which is `last`. Trying again is useless.
    Sequence { last: u64 },
    /// No such attempt here. Trying again is useless.
    Unknown,
    /// The store has been closed. Trying again is useless.
    Closed,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Full => {
                f.write_str("the outbox has no room; it returns with acknowledgements")
            }
            StoreError::Io(why) => write!(f, "the outbox cannot write: {why}"),
            StoreError::Sequence { last } => {
                write!(
                    f,
                    "the chunk does not follow the last stored one, number {last}"
                )
            }
            StoreError::Unknown => f.write_str("the outbox does not know this attempt"),
            StoreError::Closed => f.write_str("the outbox is closed"),
        }
    }
}

impl std::error::Error for StoreError {}
