//! Entry points of the fuzz targets in `fuzz/`: any bytes where the disk gives bytes.
//!
//! Checksums are put right first, since a fuzzer does not guess them. So this is stronger than what
//! damage can do: nothing that decodes may panic, hang, or ask for memory without bound.

use super::attempts::Attempt;
use super::disk::Disk;
use super::engine::Bounds;
use super::log::file_name;
use super::memory::{MemoryDisk, MemoryIndex};
use super::record::{RECORD_HEAD_BYTES, Record, RecordHead};
use super::recovery::{self, OpenError};
use super::segment::{HEADER_BYTES, Header};
use super::types::*;
use super::unit::mend_unit;
use crate::ids::Incarnation;

const SEGMENT_BYTES: u64 = 64 << 10;
/// Of a log of one segment.
pub(super) const HEADER: Header = Header {
    incarnation: Incarnation::of(7),
    generation: 1,
    predecessor: 0,
    predecessor_end: 0,
    guards_predecessor: false,
    capacity: SEGMENT_BYTES,
};

/// The decoder of records, and what a record does to an attempt.
pub fn record(bytes: &[u8]) {
    let mut attempt = Attempt::unidentified(1);
    let mut rest = bytes;
    while let Some(head) = RecordHead::decode(rest) {
        let body_bytes = (head.body_bytes % 4096) as usize;
        let behind = &rest[RECORD_HEAD_BYTES..];
        let body = &behind[..body_bytes.min(behind.len())];
        if let Some(record) = Record::decode(&head, body) {
            attempt.apply(&record, Cursor::START, 0);
        }
        rest = &behind[body.len()..];
    }
    for state in &attempt.streams {
        let _ = (state.range(), state.waiting());
    }
}

/// A log of one segment, whose two units hold these bytes.
pub fn recovery(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(SEGMENT_BYTES as usize / 2)];
    let mut segment = HEADER.encode().to_vec();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    for (number, records) in [(1, first), (2, second)] {
        let offset = segment.len() as u64;
        segment.extend(mend_unit(HEADER.seed(), offset, number, records));
    }
    // The first byte chooses a place that is damaged after all.
    if let Some(&[choice, place, ..]) = bytes.first_chunk::<2>().map(|pair| &pair[..])
        && choice >= 128
    {
        let at = HEADER_BYTES as usize + usize::from(choice - 128) * 256 + usize::from(place);
        if let Some(byte) = segment.get_mut(at) {
            *byte ^= 0x40;
        }
    }
    let mut disk = MemoryDisk::default();
    let made = disk.create(&file_name(1), 0);
    let written = made.and_then(|mut file| file.write_at(&segment, 0));
    written.expect("memory takes everything");
    let bounds = Bounds {
        cap_bytes: 1 << 20,
        terminal_reserve_bytes: SEGMENT_BYTES,
        final_output_bytes: 1024,
    };
    let index = Box::new(MemoryIndex::default());
    let opened = recovery::open(Box::new(disk), index, bounds, HEADER.incarnation, || 1_000);
    let (mut engine, _) = match opened {
        Ok(opened) => opened,
        Err(OpenError::Newer(_)) => return,
        Err(OpenError::Io(why)) => panic!("a damaged store opens: {why}"),
    };
    let mut from = Cursor::START;
    loop {
        let batch = engine.read(ReadRequest {
            from,
            max_messages: 16,
            max_bytes: 1 << 16,
            ..ReadRequest::default()
        });
        if batch.at_end {
            break;
        }
        assert!(batch.next > from, "reading goes on");
        from = batch.next;
    }
    let _ = engine.snapshot(1 << 16);
    let counts = engine.counts();
    assert!(counts.bytes_used <= 2 << 20, "{} bytes", counts.bytes_used);
    engine.close(&counts).expect("memory takes everything");
}

#[cfg(test)]
mod tests {
    use super::super::sim::Random;

    /// Bytes that look like records now and then.
    fn bytes(random: &mut Random) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..random.below(12) {
            let mut head = [0; super::RECORD_HEAD_BYTES];
            let body = random.below(120);
            head[4..8].copy_from_slice(&(body as u32).to_le_bytes());
            head[8] = random.below(13) as u8;
            head[9] = random.below(2) as u8;
            head[10] = random.below(4) as u8;
            head[16] = random.below(3) as u8;
            let value = match random.below(4) {
                0 => u64::MAX - random.below(3),
                1 => random.below(1 << 40),
                _ => random.below(30),
            };
            head[32..40].copy_from_slice(&value.to_le_bytes());
            bytes.extend_from_slice(&head);
            let kind = random.below(3);
            bytes.extend((0..body).map(|at| match kind {
                0 => random.below(256) as u8,
                1 if at % 8 == 0 => random.below(40) as u8,
                1 => 0,
                _ => 0xff,
            }));
        }
        bytes
    }

    #[test]
    fn any_bytes_can_be_recovered() {
        let random = &mut Random::new(1);
        for run in 0..6_000 {
            let bytes = bytes(random);
            let outcome = std::panic::catch_unwind(|| {
                super::record(&bytes);
                super::recovery(&bytes);
            });
            assert!(outcome.is_ok(), "run {run}");
        }
    }
}
