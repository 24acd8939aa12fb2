//! What was committed last is still in memory: who follows closely reads it there, without the disk.

use std::ops::Range;

use super::segment::SegmentReader;
use super::unit::{UNIT_BUFFER_KEPT_BYTES, UnitBuffer, unit_bytes};
use crate::limits::UNITS_IN_MEMORY;

/// The last units of facts that were committed. They stay as they are, whatever becomes of the log: a
/// place in a segment is written once.
#[derive(Default)]
pub(super) struct Fresh {
    /// The newest first.
    units: [FreshUnit; UNITS_IN_MEMORY],
}

#[derive(Default)]
struct FreshUnit {
    generation: u64,
    /// Where in the segment it is.
    place: Range<u64>,
    bytes: Vec<u8>,
}

impl Fresh {
    /// Keeps what was sealed in this buffer, and gives it that of the oldest unit.
    pub fn keep(&mut self, unit: &mut UnitBuffer, generation: u64, offset: u64) {
        self.units.rotate_right(1);
        let newest = &mut self.units[0];
        newest.generation = generation;
        newest.place = offset..offset + unit_bytes(unit.records_bytes());
        unit.clear_into(&mut newest.bytes);
        if newest.bytes.capacity() > UNIT_BUFFER_KEPT_BYTES {
            *newest = FreshUnit::default();
        }
    }

    /// Which unit has this place.
    pub fn position(&self, generation: u64, byte: u64) -> Option<usize> {
        let has = |unit: &FreshUnit| unit.generation == generation && unit.place.contains(&byte);
        self.units.iter().position(has)
    }

    /// Where the first of them begins that is behind this place in the same segment.
    pub fn begin_behind(&self, generation: u64, byte: u64) -> Option<u64> {
        let is_behind =
            |unit: &&FreshUnit| unit.generation == generation && unit.place.start > byte;
        let behind = self.units.iter().filter(is_behind);
        behind.map(|unit| unit.place.start).min()
    }

    /// A reader of one of them, and where that ends. To be given back.
    pub fn lend(&mut self, position: usize, seed: u32) -> (SegmentReader, u64) {
        let unit = &mut self.units[position];
        let bytes = std::mem::take(&mut unit.bytes);
        let reader = SegmentReader::of_bytes(bytes, unit.place.start, seed);
        (reader, unit.place.end)
    }

    pub fn give_back(&mut self, position: usize, reader: SegmentReader) {
        self.units[position].bytes = reader.into_bytes();
    }
}

#[cfg(test)]
mod tests {
    use crate::ids::Stream;
    use crate::limits::UNITS_IN_MEMORY;
    use crate::outbox::model::{Tester, content};
    use crate::outbox::types::{Body, Cursor, ReadRequest};

    const OUT: Stream = Stream::Stdout;

    /// The sequences that a read gives; their bytes are checked.
    fn read(tester: &mut Tester, number: u64, from: Cursor) -> (Vec<u64>, Cursor) {
        let batch = tester.engine().read(ReadRequest {
            from,
            max_messages: 100,
            max_bytes: 1 << 20,
            ..ReadRequest::default()
        });
        let output = batch.messages.iter().map(|message| match &message.body {
            Body::Output { sequence, data, .. } => {
                let expected = content(number, OUT, *sequence);
                assert_eq!(batch.buffer[data.clone()], expected, "chunk {sequence}");
                *sequence
            }
            Body::Final { .. } => panic!("nothing has ended"),
        });
        (output.collect(), batch.next)
    }

    #[test]
    fn the_last_units_are_read_without_the_disk() {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        tester.start(number);
        tester.append(number, OUT, 2);
        let (found, follows) = read(&mut tester, number, Cursor::START);
        assert_eq!(found, [1, 2]);
        for _ in 0..UNITS_IN_MEMORY + 1 {
            tester.append(number, OUT, 2);
        }
        let all = [3, 4, 5, 6, 7, 8];
        assert_eq!(read(&mut tester, number, follows).0, all);
        for name in tester.disk.names() {
            let zeros = vec![0; tester.disk.contents(&name).len()];
            tester.disk.overwrite(&name, zeros);
        }
        let (left, end) = read(&mut tester, number, follows);
        assert_eq!(left, all[2..], "what is on the disk alone is lost");
        assert!(read(&mut tester, number, end).0.is_empty());
        let again = read(&mut tester, number, Cursor::START).0;
        assert!(again.is_empty(), "who reads everything reads the disk");
    }
}
