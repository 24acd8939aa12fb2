//! One segment file: its header, and reading its units in order.
//!
//! The header is written twice, in the first two sectors, so that one bad sector does not cost
//! the segment. It names the generation, which is never used twice, and the predecessor with its
//! confirmed end: what lies behind that end in the predecessor was never confirmed.

use super::disk::DiskFile;
use super::record::{RECORD_HEAD_BYTES, RecordHead, u32_at, u64_at};
use super::types::Cursor;
use super::unit::{UNIT_HEAD_BYTES, UnitHead};
use crate::ids::Incarnation;
use crate::limits::{READ_BYTES_MAX, SECTOR_BYTES};

/// Raised when the format changes: an older agent sets a newer store aside.
///
/// 2: finals with usage, messages that were born in another store. What format 1 has is a part of
/// it, so that its stores are read as they are.
pub(super) const FORMAT_VERSION: u32 = 2;
/// Two copies of the header: the first unit begins here.
pub(super) const HEADER_BYTES: u64 = 2 * SECTOR_BYTES as u64;
const MAGIC: &[u8; 8] = b"HLEDGESG";
/// Read at once while walking a segment: as much payload as is asked for at once, and its heads.
const WINDOW_BYTES: usize = READ_BYTES_MAX + 4 * 1024;
/// Nothing that is written is longer: a command or two texts of 1 MiB each, with their heads.
pub(super) const SEGMENT_BYTES_LIMIT: u64 = 64 * 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub incarnation: Incarnation,
    pub generation: u64,
    /// 0: none.
    pub predecessor: u64,
    pub predecessor_end: u64,
    /// The predecessor holds bytes behind its confirmed end that may look valid: this header must
    /// stay as long as the predecessor does.
    pub guards_predecessor: bool,
    /// Bytes that the segment may take.
    pub capacity: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// Not a header, or damaged.
    Invalid,
    /// Written by a newer agent, in this version.
    Newer(u32),
}

impl Header {
    /// What every checksum of this segment begins with.
    pub fn seed(&self) -> u32 {
        let crc = crc32c::crc32c(self.incarnation.digits());
        crc32c::crc32c_append(crc, &self.generation.to_le_bytes())
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES as usize] {
        let mut sector = [0; SECTOR_BYTES];
        sector[..8].copy_from_slice(MAGIC);
        sector[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        let prefix = crc32c::crc32c(&sector[..12]);
        sector[12..16].copy_from_slice(&prefix.to_le_bytes());
        sector[16..24].copy_from_slice(&self.generation.to_le_bytes());
        sector[24..32].copy_from_slice(&self.predecessor.to_le_bytes());
        sector[32..40].copy_from_slice(&self.predecessor_end.to_le_bytes());
        sector[40..48].copy_from_slice(&self.capacity.to_le_bytes());
        sector[48] = self.guards_predecessor.into();
        sector[56..72].copy_from_slice(self.incarnation.digits());
        let crc = crc32c::crc32c(&sector[..SECTOR_BYTES - 4]);
        sector[SECTOR_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        let mut both = [0; HEADER_BYTES as usize];
        both[..SECTOR_BYTES].copy_from_slice(&sector);
        both[SECTOR_BYTES..].copy_from_slice(&sector);
        both
    }

    /// Reads one sector.
    fn decode(sector: &[u8]) -> Result<Header, HeaderError> {
        let read = || {
            let prefix = sector.get(..12)?;
            if &prefix[..8] != MAGIC || u32_at(sector, 12)? != crc32c::crc32c(prefix) {
                return None;
            }
            let version = u32_at(sector, 8)?;
            if version > FORMAT_VERSION {
                return Some(Err(HeaderError::Newer(version)));
            }
            let covered = sector.get(..SECTOR_BYTES - 4)?;
            if u32_at(sector, SECTOR_BYTES - 4)? != crc32c::crc32c(covered) {
                return None;
            }
            Some(Ok(Header {
                incarnation: Incarnation::from_digits(sector.get(56..72)?)?,
                generation: u64_at(sector, 16)?,
                predecessor: u64_at(sector, 24)?,
                predecessor_end: u64_at(sector, 32)?,
                capacity: u64_at(sector, 40)?,
                guards_predecessor: *sector.get(48)? != 0,
            }))
        };
        read().unwrap_or(Err(HeaderError::Invalid))
    }

    /// Reads both copies; of two valid ones the newer counts (a recycled file whose second copy
    /// was not yet written).
    pub fn read(file: &dyn DiskFile) -> Result<Header, HeaderError> {
        let mut both = [0; HEADER_BYTES as usize];
        // A sector that cannot be read is a damaged one.
        let mut copies = [SECTOR_BYTES, 0].map(|from| {
            let sector = &mut both[from..from + SECTOR_BYTES];
            match file.read_at(sector, from as u64) {
                Ok(SECTOR_BYTES) => Header::decode(sector),
                _ => Err(HeaderError::Invalid),
            }
        });
        copies.sort_by_key(|copy| match copy {
            Err(HeaderError::Newer(_)) => (2, 0),
            Ok(header) => (1, header.generation),
            Err(HeaderError::Invalid) => (0, 0),
        });
        let [_, best] = copies;
        best
    }
}

/// Walks the units and records of one segment through a window. An unreadable place of the disk
/// is treated like damage.
pub(super) struct SegmentReader {
    /// `None`: all there is to read is in the window.
    file: Option<Box<dyn DiskFile>>,
    pub seed: u32,
    window: Vec<u8>,
    base: u64,
    filled: usize,
    /// Bytes of the window that are filled at once.
    read_ahead: usize,
}

impl SegmentReader {
    pub fn new(file: Box<dyn DiskFile>, seed: u32, window: Vec<u8>) -> SegmentReader {
        SegmentReader {
            file: Some(file),
            seed,
            window,
            base: 0,
            filled: 0,
            read_ahead: WINDOW_BYTES,
        }
    }

    /// Reads a part of a segment that is in memory, from `base` on.
    pub fn of_bytes(bytes: Vec<u8>, base: u64, seed: u32) -> SegmentReader {
        SegmentReader {
            file: None,
            seed,
            filled: bytes.len(),
            window: bytes,
            base,
            read_ahead: 0,
        }
    }

    /// Gives back what [`SegmentReader::of_bytes`] was given.
    pub fn into_bytes(self) -> Vec<u8> {
        self.window
    }

    /// Gives the window back for the next reader, without what an oversized record made of it.
    pub fn into_window(mut self) -> Vec<u8> {
        self.shrink();
        self.window
    }

    pub fn shrink(&mut self) {
        if self.window.len() > WINDOW_BYTES {
            self.window = Vec::new();
            self.filled = 0;
        }
    }

    /// Wants no more than this much payload at once, in so many records: what is read beyond it is read
    /// again with the next request, since the file may have been written until then.
    pub fn expect(&mut self, records: usize, bytes: usize) {
        let heads = records.saturating_mul(RECORD_HEAD_BYTES) + SECTOR_BYTES;
        let wanted = bytes.saturating_add(heads);
        self.read_ahead = wanted.clamp(WINDOW_BYTES / 4, WINDOW_BYTES);
    }

    /// Forgets what was read: the file has been written since.
    pub fn forget(&mut self) {
        self.filled = 0;
        self.read_ahead = WINDOW_BYTES;
    }

    /// The bytes at `offset`, or `None` if the file does not have that many.
    pub fn bytes(&mut self, offset: u64, len: usize, limit: u64) -> Option<&[u8]> {
        let end = offset.checked_add(len as u64)?;
        if end > limit {
            return None;
        }
        if offset < self.base || end > self.base + self.filled as u64 {
            let file = self.file.as_ref()?;
            let wanted = len.max(self.read_ahead.min((limit - offset) as usize));
            if self.window.len() < wanted {
                self.window = vec![0; wanted];
            }
            self.base = offset;
            let window = &mut self.window[..wanted];
            self.filled = match file.read_at(window, offset) {
                Ok(filled) => filled,
                // One bad block must not cost its neighbours: the exact range once more.
                Err(_) => file.read_at(&mut window[..len], offset).unwrap_or(0),
            };
        }
        let from = (offset - self.base) as usize;
        self.window[..self.filled].get(from..from + len)
    }

    /// The valid head of a unit at this place that ends within the limit.
    pub fn unit_at(&mut self, offset: u64, limit: u64) -> Option<UnitHead> {
        let seed = self.seed;
        let head = UnitHead::decode(seed, offset, self.bytes(offset, UNIT_HEAD_BYTES, limit)?)?;
        let records_end = offset + UNIT_HEAD_BYTES as u64 + u64::from(head.records_bytes);
        (records_end <= limit).then_some(head)
    }

    /// The next valid head of a unit on a sector border, from `offset` on.
    pub fn find_unit(&mut self, offset: u64, limit: u64) -> Option<(u64, UnitHead)> {
        let mut at = offset.next_multiple_of(SECTOR_BYTES as u64);
        while at + (UNIT_HEAD_BYTES as u64) <= limit {
            if let Some(head) = self.unit_at(at, limit) {
                return Some((at, head));
            }
            at += SECTOR_BYTES as u64;
        }
        None
    }

    /// The record at this place if its checksum is right: its head and its body.
    pub fn record_at(&mut self, offset: u64, limit: u64) -> Option<(RecordHead, &[u8])> {
        let head = RecordHead::decode(self.bytes(offset, RECORD_HEAD_BYTES, limit)?)?;
        let (seed, is_in_memory) = (self.seed, self.file.is_none());
        let record = self.bytes(offset, usize::try_from(head.bytes()).ok()?, limit)?;
        // What is only in memory has just been sealed there.
        (is_in_memory || head.proves(seed, offset, record))
            .then_some((head, &record[RECORD_HEAD_BYTES..]))
    }

    /// Whether every record of this unit is as it was written.
    pub fn is_whole(&mut self, offset: u64, unit: &UnitHead) -> bool {
        let end = offset + UNIT_HEAD_BYTES as u64 + u64::from(unit.records_bytes);
        let mut at = offset + UNIT_HEAD_BYTES as u64;
        for _ in 0..unit.records {
            match self.record_at(at, end) {
                Some((head, _)) => at += head.bytes(),
                None => return false,
            }
        }
        at == end
    }

    /// The next good record of a unit, from `at` on: a damaged one is stepped over as long as its
    /// length still leads to something. `end` is the end of the unit's records.
    pub fn next_good(&mut self, mut at: u64, end: u64, damaged: &mut u64) -> Option<u64> {
        while at < end {
            if self.record_at(at, end).is_some() {
                return Some(at);
            }
            *damaged += 1;
            let head = RecordHead::decode(self.bytes(at, RECORD_HEAD_BYTES, end)?)?;
            let next = at + head.bytes();
            self.record_at(next, end)?;
            at = next;
        }
        None
    }

    /// Where the next record begins if nothing is damaged: here or in the next unit.
    pub fn next_place(&mut self, from: Cursor, end: u64) -> Option<Cursor> {
        if from.is_record() {
            return Some(from);
        }
        let (unit_at, _) = self.find_unit(from.byte(), end)?;
        let first = unit_at + UNIT_HEAD_BYTES as u64;
        Some(Cursor::record(from.generation, first))
    }

    /// How long the body of the record here is said to be; whether it is one is not known yet.
    pub fn body_bytes(&mut self, offset: u64, limit: u64) -> Option<usize> {
        let head = RecordHead::decode(self.bytes(offset, RECORD_HEAD_BYTES, limit)?)?;
        usize::try_from(head.body_bytes).ok()
    }

    /// The body of a record that [`SegmentReader::next_record`] has just given.
    pub fn body(&mut self, offset: u64, head: &RecordHead, limit: u64) -> Option<&[u8]> {
        let body_at = offset + RECORD_HEAD_BYTES as u64;
        self.bytes(body_at, usize::try_from(head.body_bytes).ok()?, limit)
    }

    /// The next good record from a cursor on, and what follows it. What cannot be read is passed over.
    pub fn next_record(&mut self, from: Cursor, end: u64) -> Option<(u64, RecordHead, After)> {
        let mut place = from;
        loop {
            place = self.next_place(place, end)?;
            let at = place.byte();
            if let Some((head, _)) = self.record_at(at, end) {
                let behind = at + head.bytes();
                let after = match head.is_last() {
                    true => After::Unit(behind.next_multiple_of(SECTOR_BYTES as u64)),
                    false => After::Record(behind),
                };
                return Some((at, head, after));
            }
            let behind = match self.bytes(at, RECORD_HEAD_BYTES, end) {
                Some(bytes) => RecordHead::decode(bytes).map(|head| at + head.bytes()),
                None => None,
            };
            place = match behind {
                Some(behind) if self.record_at(behind, end).is_some() => {
                    Cursor::record(place.generation, behind)
                }
                _ => Cursor::unit(place.generation, at + 1),
            };
        }
    }
}

/// Where reading goes on after a record.
pub(super) enum After {
    Record(u64),
    Unit(u64),
}

impl After {
    pub fn cursor(self, generation: u64) -> Cursor {
        match self {
            After::Record(byte) => Cursor::record(generation, byte),
            After::Unit(byte) => Cursor::unit(generation, byte),
        }
    }
}
