//! The bytes of a record, and of the unit of records that is committed together.
//!
//! A unit begins on a sector border: a head of [`UNIT_HEAD_BYTES`], then its records one after
//! the other. Head and records each carry a CRC32C that is seeded with the store, the generation
//! of the segment and the place in it, so that nothing is valid anywhere but where it was written.
//! A unit is whole if its head and all its records are; that makes it all-or-nothing without
//! hiding the good records of a damaged one.
//!
//! All integers are little-endian.
//!
//! | head of a unit | | head of a record | |
//! | --- | --- | --- | --- |
//! | 0 | magic | 0 | CRC32C of all that follows |
//! | 4 | CRC32C of the head | 4 | length of the body |
//! | 8 | number, u64 | 8 | kind, stream, flags (u8, u8, u16) |
//! | 16 | length of the records | 12 | 0 |
//! | 20 | how many | 16 | key |
//! | 24 | wall clock, ms | 32 | value, u64 |

use crate::ids::{AttemptKey, FinalStatus, Ids, Stream, Usage};
use crate::limits::{ID_BYTES_MAX, SECTOR_BYTES};

pub(super) const UNIT_HEAD_BYTES: usize = 32;
pub(super) const RECORD_HEAD_BYTES: usize = 40;
const UNIT_MAGIC: u32 = 0x5455_4c48;
/// What the page cache works in.
pub(super) const PAGE_BYTES: u64 = 4096;
/// A buffer that an oversized unit has grown beyond this is given back.
const UNIT_BUFFER_KEPT_BYTES: usize = 1024 * 1024;
/// Lost ranges of a stream above its watermark that are told apart. There is none but after damage
/// or a rejected chunk; with more, what lies between the two eldest is given up too.
pub(super) const LOST_RANGES_MAX: usize = 32;

/// No count of ours comes near it. What is greater was never written, and is refused, so that
/// nothing overflows that adds to it.
const NUMBER_MAX: u64 = 1 << 62;

/// Flag of the last record of a unit: what follows is the next sector's unit.
const FLAG_LAST: u16 = 0x8000;
const FLAG_OUTPUT_TRUNCATED: u16 = 1;
const FLAG_ERROR_TRUNCATED: u16 = 2;
/// Four numbers of what was used stand before the texts.
const FLAG_USAGE: u16 = 4;
const FLAG_DROPPED: u16 = 1;

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

/// Bytes that a unit of records of this length takes on disk.
pub(super) fn unit_bytes(records: usize) -> u64 {
    (UNIT_HEAD_BYTES + records).next_multiple_of(SECTOR_BYTES) as u64
}

// ---- writing ----------------------------------------------------------------------------------

/// Collects the records of one unit in a buffer that is reused.
#[derive(Default)]
pub(super) struct UnitBuffer {
    /// Head and records, and behind them what is left of the padding of an attempt to write it.
    bytes: Vec<u8>,
    /// End of the records in `bytes`.
    end: usize,
    /// Where each record begins in `bytes`.
    starts: Vec<u32>,
}

impl UnitBuffer {
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Bytes of the records so far, without the unit's head.
    pub fn records_bytes(&self) -> usize {
        self.end.saturating_sub(UNIT_HEAD_BYTES)
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.end = 0;
        self.starts.clear();
        if self.bytes.capacity() > UNIT_BUFFER_KEPT_BYTES {
            self.bytes = Vec::new();
        }
    }

    /// Adds a record; gives its distance from the unit's begin.
    pub fn push(&mut self, key: AttemptKey, record: &Record<'_>) -> u64 {
        let start = self.end.max(UNIT_HEAD_BYTES);
        self.bytes.resize(start, 0);
        self.starts.push(start as u32);
        self.bytes.resize(start + RECORD_HEAD_BYTES, 0);
        let (kind, stream, flags, value) = self.push_body(record);
        let body = (self.bytes.len() - start - RECORD_HEAD_BYTES) as u32;
        let head = &mut self.bytes[start..start + RECORD_HEAD_BYTES];
        head[4..8].copy_from_slice(&body.to_le_bytes());
        head[8] = kind;
        head[9] = stream.map_or(0, |stream| stream.index() as u8);
        head[10..12].copy_from_slice(&flags.to_le_bytes());
        head[16..32].copy_from_slice(&key.0);
        head[32..40].copy_from_slice(&value.to_le_bytes());
        self.end = self.bytes.len();
        start as u64
    }

    fn push_body(&mut self, record: &Record<'_>) -> (u8, Option<Stream>, u16, u64) {
        let out = &mut self.bytes;
        match record {
            Record::Received { identity, command } => {
                put_identity(out, identity);
                out.extend_from_slice(command);
                (1, None, 0, identity.arrival)
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
                put_identity(out, identity);
                (9, None, 0, identity.arrival)
            }
            Record::Closed(entry) => {
                out.push(status_code(entry.status));
                out.extend_from_slice(&entry.exit_code.to_le_bytes());
                let flags = if entry.discarded { FLAG_DROPPED } else { 0 };
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

    /// Completes the unit for this place: checksums and padding.
    pub fn seal(&mut self, place: UnitPlace) -> &[u8] {
        let records = self.records_bytes() as u32;
        if let Some(&last) = self.starts.last() {
            // A unit that failed is sealed once more elsewhere, so only bits are set here.
            self.bytes[last as usize + 11] |= (FLAG_LAST >> 8) as u8;
        }
        let ends = self.starts.iter().skip(1).copied();
        let ends = ends.chain([UNIT_HEAD_BYTES as u32 + records]);
        for (&start, end) in self.starts.iter().zip(ends) {
            let record = &mut self.bytes[start as usize..end as usize];
            let crc = record_crc(place.seed, place.offset + u64::from(start), record);
            record[..4].copy_from_slice(&crc.to_le_bytes());
        }
        let head = &mut self.bytes[..UNIT_HEAD_BYTES];
        head[..4].copy_from_slice(&UNIT_MAGIC.to_le_bytes());
        head[8..16].copy_from_slice(&place.number.to_le_bytes());
        head[16..20].copy_from_slice(&records.to_le_bytes());
        head[20..24].copy_from_slice(&(self.starts.len() as u32).to_le_bytes());
        head[24..32].copy_from_slice(&place.wall_ms.to_le_bytes());
        let crc = unit_crc(place.seed, place.offset, head);
        head[4..8].copy_from_slice(&crc.to_le_bytes());
        // Up to the end of the page, so that the kernel need not read it first. What stands there
        // is not confirmed, and the next unit goes over it.
        let unit_end = place.offset + self.end.next_multiple_of(SECTOR_BYTES) as u64;
        let page_end = unit_end
            .next_multiple_of(PAGE_BYTES)
            .min(place.capacity.max(unit_end));
        self.bytes.resize((page_end - place.offset) as usize, 0);
        &self.bytes
    }
}

/// Where a unit goes.
#[derive(Clone, Copy)]
pub(super) struct UnitPlace {
    pub seed: u32,
    pub offset: u64,
    /// End of the segment.
    pub capacity: u64,
    pub number: u64,
    pub wall_ms: u64,
}

fn put_identity(out: &mut Vec<u8>, identity: &Identity) {
    out.push(identity.ids.task.len() as u8);
    out.push(identity.ids.attempt.len() as u8);
    out.push(identity.timeout_seconds.is_some().into());
    out.extend_from_slice(&identity.priority.to_le_bytes());
    out.extend_from_slice(&identity.timeout_seconds.unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&identity.received_at_ms.to_le_bytes());
    out.extend_from_slice(&identity.started_at_ms.to_le_bytes());
    out.extend_from_slice(identity.ids.task.as_bytes());
    out.extend_from_slice(identity.ids.attempt.as_bytes());
}

// ---- reading ----------------------------------------------------------------------------------

/// A valid head of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnitHead {
    pub number: u64,
    pub records_bytes: u32,
    pub records: u32,
    pub wall_ms: u64,
}

impl UnitHead {
    /// `None` if these bytes are not the head of a unit at this place.
    pub fn decode(seed: u32, offset: u64, bytes: &[u8]) -> Option<UnitHead> {
        let head = bytes.get(..UNIT_HEAD_BYTES)?;
        if u32_at(head, 0)? != UNIT_MAGIC || u32_at(head, 4)? != unit_crc(seed, offset, head) {
            return None;
        }
        Some(UnitHead {
            number: u64_at(head, 8)?,
            records_bytes: u32_at(head, 16)?,
            records: u32_at(head, 20)?,
            wall_ms: u64_at(head, 24)?,
        })
    }

    /// With head and padding.
    pub fn bytes(&self) -> u64 {
        unit_bytes(self.records_bytes as usize)
    }
}

/// The head of a record; its body is proven only by [`RecordHead::proves`].
#[derive(Debug, Clone, Copy)]
pub(super) struct RecordHead {
    crc: u32,
    pub body_bytes: u32,
    kind: u8,
    stream: u8,
    flags: u16,
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
            key: AttemptKey(key),
            value: u64_at(bytes, 32)?,
        })
    }

    /// Head and body.
    pub fn bytes(&self) -> u64 {
        RECORD_HEAD_BYTES as u64 + u64::from(self.body_bytes)
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
    /// Reads a record whose checksum is right. `None`: of an unknown kind, or with a meaning that
    /// no writer gives it; it is passed over.
    pub fn decode(head: &RecordHead, body: &'a [u8]) -> Option<Record<'a>> {
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
            10 => Record::Closed(Entry {
                order: head.value,
                discarded: flagged,
                status: status_of(*body.first()?)?,
                exit_code: u32_at(body, 1)? as i32,
            }),
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

fn take_identity<'a>(head: &RecordHead, body: &'a [u8]) -> Option<(Identity, &'a [u8])> {
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
    };
    Some((identity, rest))
}

/// These bytes as a unit whose checksums are right, whatever they are.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn mend_unit(seed: u32, offset: u64, number: u64, records: &[u8]) -> Vec<u8> {
    let mut unit = vec![0; UNIT_HEAD_BYTES];
    unit.extend_from_slice(records);
    let (mut at, mut count) = (UNIT_HEAD_BYTES, 0u32);
    while at + RECORD_HEAD_BYTES <= unit.len() {
        let room = unit.len() - at - RECORD_HEAD_BYTES;
        let wanted = u32_at(&unit, at + 4).unwrap_or(0) as usize % 4096;
        let body = wanted.min(room);
        unit[at + 4..at + 8].copy_from_slice(&(body as u32).to_le_bytes());
        let end = at + RECORD_HEAD_BYTES + body;
        let crc = record_crc(seed, offset + at as u64, &unit[at..end]);
        unit[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        at = end;
        count += 1;
    }
    unit.truncate(at);
    unit[..4].copy_from_slice(&UNIT_MAGIC.to_le_bytes());
    unit[8..16].copy_from_slice(&number.to_le_bytes());
    unit[16..20].copy_from_slice(&((at - UNIT_HEAD_BYTES) as u32).to_le_bytes());
    unit[20..24].copy_from_slice(&count.to_le_bytes());
    let crc = unit_crc(seed, offset, &unit);
    unit[4..8].copy_from_slice(&crc.to_le_bytes());
    unit.resize(unit.len().next_multiple_of(SECTOR_BYTES), 0);
    unit
}

fn unit_crc(seed: u32, offset: u64, head: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(seed, &offset.to_le_bytes());
    crc32c::crc32c_append(crc, &head[8..UNIT_HEAD_BYTES])
}

fn record_crc(seed: u32, offset: u64, record: &[u8]) -> u32 {
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
