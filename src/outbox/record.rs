//! The bytes of a record: a fact about one attempt.
//!
//! Each carries a CRC32C that is seeded with the store, the generation of the segment and the place
//! in it, so that it is valid nowhere but where it was written, and is told apart from damage even
//! if the unit around it is broken.
//!
//! | byte | all little-endian |
//! | --- | --- |
//! | 0 | CRC32C of all that follows |
//! | 4 | length of the body |
//! | 8 | kind, stream, flags (u8, u8, u16) |
//! | 12 | 0 |
//! | 16 | key |
//! | 32 | value, u64 |
//!
//! Kinds, streams and flags of a format are a closed list. A record with a right checksum that
//! has another one was written by a newer agent: it is never guessed at, the whole store is left
//! to that agent ([`RecordHead::is_newer`]).

use crate::ids::{AttemptKey, FinalStatus, Ids, Incarnation, Stream, Usage};
use crate::limits::ID_BYTES_MAX;

pub(super) const RECORD_HEAD_BYTES: usize = 40;
/// Lost ranges of a stream above its watermark that are told apart. There is none but after damage
/// or a rejected chunk; with more, what lies between the two eldest is given up too.
pub(super) const LOST_RANGES_MAX: usize = 32;

/// No count of ours comes near it. What is greater was never written, and is refused, so that
/// nothing overflows that adds to it.
const NUMBER_MAX: u64 = 1 << 62;

/// Flag of the last record of a unit: what follows is the next sector's unit.
pub(super) const FLAG_LAST: u16 = 0x8000;
const FLAG_OUTPUT_TRUNCATED: u16 = 1;
const FLAG_ERROR_TRUNCATED: u16 = 2;
/// Four numbers of what was used stand before the texts.
const FLAG_USAGE: u16 = 4;
const FLAG_DROPPED: u16 = 1;
/// The name of the store in which the messages were born stands first in the body.
const FLAG_BORN: u16 = 2;

/// The flags that a record of this kind may have, apart from [`FLAG_LAST`]; `None`: no such kind.
fn known_flags(kind: u8) -> Option<u16> {
    Some(match kind {
        1 | 9 => FLAG_BORN,
        4 => FLAG_OUTPUT_TRUNCATED | FLAG_ERROR_TRUNCATED | FLAG_USAGE,
        5 | 11 => FLAG_DROPPED,
        10 => FLAG_DROPPED | FLAG_BORN,
        2 | 3 | 6 | 7 | 8 => 0,
        _ => return None,
    })
}

/// State of a stream as far as it cannot be read off its chunks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// Last sequence that was stored.
    pub last: u64,
    /// All up to here are gone: acknowledged, or lost.
    pub done: u64,
    /// Bit i: sequence `done + 1 + i` is gone too.
    pub bits: u64,
    /// Some that were never acknowledged have been lost.
    pub truncated: bool,
    /// Which, as far as a chunk after them may still be sent.
    pub lost: Vec<(u64, u64)>,
}

/// What an attempt is, apart from its command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub ids: Ids,
    /// Rises with each attempt of this store.
    pub arrival: u64,
    pub priority: i64,
    pub timeout_seconds: Option<u64>,
    pub received_at_ms: u64,
    /// 0: not started.
    pub started_at_ms: u64,
    /// The store that its messages are named after, if that is another one.
    pub born: Option<Incarnation>,
}

/// How an attempt ended, apart from its texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ending {
    pub status: FinalStatus,
    pub exit_code: i32,
    pub output_truncated: bool,
    pub error_truncated: bool,
    /// Last sequence of each stream: a lost tail can be noticed.
    pub last: [u64; 2],
    pub usage: Option<Usage>,
}

/// What is remembered of an attempt that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Rises with each attempt that is done: the eldest are forgotten first.
    pub order: u64,
    pub discarded: bool,
    pub status: FinalStatus,
    pub exit_code: i32,
    /// The store that its messages are named after, if that is another one.
    pub born: Option<Incarnation>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record<'a> {
    Received {
        identity: Identity,
        command: &'a [u8],
    },
    Starting {
        at_ms: u64,
    },
    Output {
        stream: Stream,
        sequence: u64,
        data: &'a [u8],
    },
    Final {
        ending: Ending,
        output: &'a [u8],
        error: &'a [u8],
    },
    /// The final is done: reported, acknowledged, or dropped.
    Done {
        dropped: bool,
    },
    Discarded,
    /// What is held of the stream up to here is given up.
    Truncated {
        stream: Stream,
        through: u64,
    },
    /// The server will never take this chunk.
    Rejected {
        stream: Stream,
        sequence: u64,
    },
    /// Copied forward: the attempt has started, or ended.
    Identity(Identity),
    /// Finished and acknowledged, or discarded: nothing of it is needed but the memory.
    Closed(Entry),
    Mark {
        stream: Stream,
        mark: Mark,
    },
}

pub(super) fn status_code(status: FinalStatus) -> u8 {
    match status {
        FinalStatus::Completed => 0,
        FinalStatus::Failed => 1,
        FinalStatus::Interrupted => 2,
    }
}

pub(super) fn status_of(code: u8) -> Option<FinalStatus> {
    match code {
        0 => Some(FinalStatus::Completed),
        1 => Some(FinalStatus::Failed),
        2 => Some(FinalStatus::Interrupted),
        _ => None,
    }
}

// ---- writing ----------------------------------------------------------------------------------

impl Record<'_> {
    /// Appends the body; gives kind, stream, flags and value for the head.
    pub fn encode_body(&self, out: &mut Vec<u8>) -> (u8, Option<Stream>, u16, u64) {
        match self {
            Record::Received { identity, command } => {
                let flags = put_identity(out, identity);
                out.extend_from_slice(command);
                (1, None, flags, identity.arrival)
            }
            Record::Starting { at_ms } => (2, None, 0, *at_ms),
            Record::Output {
                stream,
                sequence,
                data,
            } => {
                out.extend_from_slice(data);
                (3, Some(*stream), 0, *sequence)
            }
            Record::Final {
                ending,
                output,
                error,
            } => {
                let mut flags = 0;
                if ending.output_truncated {
                    flags |= FLAG_OUTPUT_TRUNCATED;
                }
                if ending.error_truncated {
                    flags |= FLAG_ERROR_TRUNCATED;
                }
                out.push(status_code(ending.status));
                out.extend_from_slice(&ending.exit_code.to_le_bytes());
                out.extend_from_slice(&ending.last[0].to_le_bytes());
                out.extend_from_slice(&ending.last[1].to_le_bytes());
                if let Some(used) = ending.usage {
                    flags |= FLAG_USAGE;
                    for number in [
                        used.wall_ms,
                        used.user_ms,
                        used.system_ms,
                        used.memory_peak_bytes,
                    ] {
                        out.extend_from_slice(&number.to_le_bytes());
                    }
                }
                out.extend_from_slice(output);
                out.extend_from_slice(error);
                (4, None, flags, output.len() as u64)
            }
            Record::Done { dropped } => (5, None, if *dropped { FLAG_DROPPED } else { 0 }, 0),
            Record::Discarded => (6, None, 0, 0),
            Record::Truncated { stream, through } => (7, Some(*stream), 0, *through),
            Record::Rejected { stream, sequence } => (8, Some(*stream), 0, *sequence),
            Record::Identity(identity) => {
                let flags = put_identity(out, identity);
                (9, None, flags, identity.arrival)
            }
            Record::Closed(entry) => {
                let mut flags = put_born(out, entry.born);
                out.push(status_code(entry.status));
                out.extend_from_slice(&entry.exit_code.to_le_bytes());
                if entry.discarded {
                    flags |= FLAG_DROPPED;
                }
                (10, None, flags, entry.order)
            }
            Record::Mark { stream, mark } => {
                out.extend_from_slice(&mark.last.to_le_bytes());
                out.extend_from_slice(&mark.bits.to_le_bytes());
                for (from, to) in &mark.lost {
                    out.extend_from_slice(&from.to_le_bytes());
                    out.extend_from_slice(&to.to_le_bytes());
                }
                let flags = if mark.truncated { FLAG_DROPPED } else { 0 };
                (11, Some(*stream), flags, mark.done)
            }
        }
    }
}

fn put_born(out: &mut Vec<u8>, born: Option<Incarnation>) -> u16 {
    let Some(born) = born else {
        return 0;
    };
    out.extend_from_slice(born.digits());
    FLAG_BORN
}

/// Gives the flags.
fn put_identity(out: &mut Vec<u8>, identity: &Identity) -> u16 {
    let flags = put_born(out, identity.born);
    out.push(identity.ids.task.len() as u8);
    out.push(identity.ids.attempt.len() as u8);
    out.push(identity.timeout_seconds.is_some().into());
    out.extend_from_slice(&identity.priority.to_le_bytes());
    out.extend_from_slice(&identity.timeout_seconds.unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&identity.received_at_ms.to_le_bytes());
    out.extend_from_slice(&identity.started_at_ms.to_le_bytes());
    out.extend_from_slice(identity.ids.task.as_bytes());
    out.extend_from_slice(identity.ids.attempt.as_bytes());
    flags
}

// ---- reading ----------------------------------------------------------------------------------

/// The head of a record; its body is proven only by [`RecordHead::proves`].
#[derive(Debug, Clone, Copy)]
pub(super) struct RecordHead {
    crc: u32,
    pub body_bytes: u32,
    kind: u8,
    stream: u8,
    flags: u16,
    reserved: u32,
    pub key: AttemptKey,
    pub value: u64,
}

impl RecordHead {
    pub fn decode(bytes: &[u8]) -> Option<RecordHead> {
        let mut key = [0; 16];
        key.copy_from_slice(bytes.get(16..32)?);
        Some(RecordHead {
            crc: u32_at(bytes, 0)?,
            body_bytes: u32_at(bytes, 4)?,
            kind: *bytes.get(8)?,
            stream: *bytes.get(9)?,
            flags: u16::from_le_bytes(bytes.get(10..12)?.try_into().ok()?),
            reserved: u32_at(bytes, 12)?,
            key: AttemptKey(key),
            value: u64_at(bytes, 32)?,
        })
    }

    /// Head and body.
    pub fn bytes(&self) -> u64 {
        RECORD_HEAD_BYTES as u64 + u64::from(self.body_bytes)
    }

    /// No agent of this format or an older one writes this.
    pub fn is_newer(&self) -> bool {
        let flags = self.flags & !FLAG_LAST;
        let known = known_flags(self.kind).is_some_and(|known| flags & !known == 0);
        !known || usize::from(self.stream) >= Stream::ALL.len() || self.reserved != 0
    }

    pub fn is_last(&self) -> bool {
        self.flags & FLAG_LAST != 0
    }

    /// Whether `record`, head and body, is what was written at this place.
    pub fn proves(&self, seed: u32, offset: u64, record: &[u8]) -> bool {
        record_crc(seed, offset, record) == self.crc
    }
}

impl<'a> Record<'a> {
    /// Reads a record whose checksum is right. `None`: of a newer format, or with a meaning that no
    /// writer gives it; it is passed over.
    pub fn decode(head: &RecordHead, body: &'a [u8]) -> Option<Record<'a>> {
        if head.is_newer() {
            return None;
        }
        let stream = *Stream::ALL.get(usize::from(head.stream))?;
        let flagged = head.flags & FLAG_DROPPED != 0;
        if head.value > NUMBER_MAX {
            return None;
        }
        Some(match head.kind {
            1 => {
                let (identity, command) = take_identity(head, body)?;
                Record::Received { identity, command }
            }
            2 => Record::Starting { at_ms: head.value },
            3 if head.value > 0 => Record::Output {
                stream,
                sequence: head.value,
                data: body,
            },
            4 => {
                let has_usage = head.flags & FLAG_USAGE != 0;
                let usage = if has_usage {
                    Some(Usage {
                        wall_ms: u64_at(body, 21)?,
                        user_ms: u64_at(body, 29)?,
                        system_ms: u64_at(body, 37)?,
                        memory_peak_bytes: u64_at(body, 45)?,
                    })
                } else {
                    None
                };
                let texts = body.get(if has_usage { 53 } else { 21 }..)?;
                let (output, error) = texts.split_at_checked(usize::try_from(head.value).ok()?)?;
                let ending = Ending {
                    status: status_of(*body.first()?)?,
                    exit_code: u32_at(body, 1)? as i32,
                    output_truncated: head.flags & FLAG_OUTPUT_TRUNCATED != 0,
                    error_truncated: head.flags & FLAG_ERROR_TRUNCATED != 0,
                    last: [number_at(body, 5)?, number_at(body, 13)?],
                    usage,
                };
                Record::Final {
                    ending,
                    output,
                    error,
                }
            }
            5 => Record::Done { dropped: flagged },
            6 => Record::Discarded,
            7 => Record::Truncated {
                stream,
                through: head.value,
            },
            8 if head.value > 0 => Record::Rejected {
                stream,
                sequence: head.value,
            },
            9 => Record::Identity(take_identity(head, body)?.0),
            10 => {
                let (born, body) = take_born(head, body)?;
                Record::Closed(Entry {
                    order: head.value,
                    discarded: flagged,
                    status: status_of(*body.first()?)?,
                    exit_code: u32_at(body, 1)? as i32,
                    born,
                })
            }
            11 => {
                let mut lost = Vec::new();
                for pair in body.get(16..)?.chunks_exact(16).take(LOST_RANGES_MAX) {
                    let (from, to) = (number_at(pair, 0)?, number_at(pair, 8)?);
                    if from == 0 || from > to {
                        return None;
                    }
                    lost.push((from, to));
                }
                Record::Mark {
                    stream,
                    mark: Mark {
                        last: number_at(body, 0)?.max(head.value),
                        done: head.value,
                        bits: u64_at(body, 8)?,
                        truncated: flagged,
                        lost,
                    },
                }
            }
            _ => return None,
        })
    }
}

fn take_born<'a>(head: &RecordHead, body: &'a [u8]) -> Option<(Option<Incarnation>, &'a [u8])> {
    if head.flags & FLAG_BORN == 0 {
        return Some((None, body));
    }
    let (digits, rest) = body.split_at_checked(Incarnation::BYTES)?;
    Some((Some(Incarnation::from_digits(digits)?), rest))
}

fn take_identity<'a>(head: &RecordHead, body: &'a [u8]) -> Option<(Identity, &'a [u8])> {
    let (born, body) = take_born(head, body)?;
    let task_bytes = usize::from(*body.first()?);
    let attempt_bytes = usize::from(*body.get(1)?);
    if task_bytes > ID_BYTES_MAX || attempt_bytes > ID_BYTES_MAX {
        return None;
    }
    let (task, rest) = body.get(35..)?.split_at_checked(task_bytes)?;
    let (attempt, rest) = rest.split_at_checked(attempt_bytes)?;
    let ids = Ids::new(
        std::str::from_utf8(task).ok()?,
        std::str::from_utf8(attempt).ok()?,
    )?;
    let identity = Identity {
        ids,
        arrival: head.value,
        priority: u64_at(body, 3)? as i64,
        timeout_seconds: (*body.get(2)? != 0).then_some(u64_at(body, 11)?),
        received_at_ms: u64_at(body, 19)?,
        started_at_ms: u64_at(body, 27)?,
        born,
    };
    Some((identity, rest))
}

pub(super) fn record_crc(seed: u32, offset: u64, record: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(seed, &offset.to_le_bytes());
    crc32c::crc32c_append(crc, &record[4..])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn number_at(bytes: &[u8], at: usize) -> Option<u64> {
    u64_at(bytes, at).filter(|number| *number <= NUMBER_MAX)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}
