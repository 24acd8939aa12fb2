//! The unit of records that is committed together: its bytes, and the buffer that collects it.
//!
//! A unit begins on a sector border: a head of [`UNIT_HEAD_BYTES`], then its records one after
//! the other. The head carries a CRC32C of its own, seeded like those of the records, so that it is
//! valid nowhere but where it was written. A unit is whole if its head and all its records are.
//!
//! | byte | all little-endian |
//! | --- | --- |
//! | 0 | magic |
//! | 4 | CRC32C of the head |
//! | 8 | number, u64 |
//! | 16 | length of the records |
//! | 20 | how many |
//! | 24 | wall clock, ms |

use super::record::{FLAG_LAST, RECORD_HEAD_BYTES, Record, record_crc, u32_at, u64_at};
use crate::ids::AttemptKey;
use crate::limits::{BATCH_BUFFER_BYTES, SECTOR_BYTES};

pub(super) const UNIT_HEAD_BYTES: usize = 32;
const UNIT_MAGIC: u32 = 0x5455_4c48;
/// What the page cache works in.
pub(super) const PAGE_BYTES: u64 = 4096;
/// A buffer that an oversized unit has grown beyond this is given back.
pub(super) const UNIT_BUFFER_KEPT_BYTES: usize = 1024 * 1024;

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

    /// As [`UnitBuffer::clear`]: what was sealed goes to `bytes`, whose buffer is used for the next
    /// unit.
    pub fn clear_into(&mut self, bytes: &mut Vec<u8>) {
        std::mem::swap(&mut self.bytes, bytes);
        self.clear();
    }

    /// Adds a record; gives its distance from the unit's begin.
    pub fn push(&mut self, key: AttemptKey, record: &Record<'_>) -> u64 {
        let start = self.end.max(UNIT_HEAD_BYTES);
        self.make_room(start, record);
        self.bytes.resize(start, 0);
        self.starts.push(start as u32);
        self.bytes.resize(start + RECORD_HEAD_BYTES, 0);
        let (kind, stream, flags, value) = record.encode_body(&mut self.bytes);
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

    /// A buffer for more than a few lines is made as large as that of a read, with which it changes
    /// places.
    fn make_room(&mut self, start: usize, record: &Record<'_>) {
        let Record::Output { data, .. } = record else {
            return;
        };
        let needed = start + RECORD_HEAD_BYTES + data.len();
        if needed > self.bytes.capacity()
            && (BATCH_BUFFER_BYTES / 8..BATCH_BUFFER_BYTES).contains(&needed)
        {
            self.bytes
                .reserve_exact(BATCH_BUFFER_BYTES - self.bytes.len());
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A head that is believed says how much is read and which units are proven.
    #[test]
    fn a_head_with_one_flipped_bit_is_none() {
        let (seed, offset) = (7, 1024);
        let unit = mend_unit(seed, offset, 3, &[0; 2 * RECORD_HEAD_BYTES]);
        let head = UnitHead::decode(seed, offset, &unit);
        assert_eq!(head.map(|head| (head.number, head.records)), Some((3, 2)));
        for bit in 0..UNIT_HEAD_BYTES * 8 {
            let mut damaged = unit.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(UnitHead::decode(seed, offset, &damaged), None, "bit {bit}");
        }
        assert_eq!(UnitHead::decode(seed, offset + 512, &unit), None);
        assert_eq!(UnitHead::decode(seed + 1, offset, &unit), None);
    }
}
