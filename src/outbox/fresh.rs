//! What was committed last is still in memory: who follows closely reads it there, without the disk.

use std::ops::Range;

use super::segment::SegmentReader;
use super::unit::{UNIT_BUFFER_KEPT_BYTES, UnitBuffer, unit_bytes};

/// The last unit of facts that was committed. It stays as it is, whatever becomes of the log: a place
/// in a segment is written once.
#[derive(Default)]
pub(super) struct Fresh {
    generation: u64,
    /// Where in the segment it is.
    place: Range<u64>,
    bytes: Vec<u8>,
}

impl Fresh {
    pub fn keep(&mut self, unit: &mut UnitBuffer, generation: u64, offset: u64) {
        self.generation = generation;
        self.place = offset..offset + unit_bytes(unit.records_bytes());
        unit.clear_into(&mut self.bytes);
        if self.bytes.capacity() > UNIT_BUFFER_KEPT_BYTES {
            *self = Fresh::default();
        }
    }

    pub fn holds(&self, generation: u64, byte: u64) -> bool {
        self.generation == generation && self.place.contains(&byte)
    }

    /// Where it begins, if that is behind this place in the same segment.
    pub fn begin_behind(&self, generation: u64, byte: u64) -> Option<u64> {
        let begin = self.place.start;
        (self.generation == generation && begin > byte).then_some(begin)
    }

    /// A reader of it, and where it ends. To be given back.
    pub fn lend(&mut self, seed: u32) -> (SegmentReader, u64) {
        let bytes = std::mem::take(&mut self.bytes);
        let reader = SegmentReader::of_bytes(bytes, self.place.start, seed);
        (reader, self.place.end)
    }

    pub fn give_back(&mut self, reader: SegmentReader) {
        self.bytes = reader.into_bytes();
    }
}

#[cfg(test)]
mod tests {
    use crate::ids::Stream;
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
    fn the_last_unit_is_read_without_the_disk() {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        tester.start(number);
        tester.append(number, OUT, 2);
        let (found, follows) = read(&mut tester, number, Cursor::START);
        assert_eq!(found, [1, 2]);
        tester.append(number, OUT, 2);
        tester.append(number, OUT, 2);
        assert_eq!(read(&mut tester, number, follows).0, [3, 4, 5, 6]);
        let all = read(&mut tester, number, Cursor::START).0;
        assert_eq!(all, [1, 2, 3, 4, 5, 6], "from the disk and from memory");

        for name in tester.disk.names() {
            let zeros = vec![0; tester.disk.contents(&name).len()];
            tester.disk.overwrite(&name, zeros);
        }
        assert_eq!(read(&mut tester, number, follows).0, [5, 6]);
        let left = read(&mut tester, number, Cursor::START).0;
        assert_eq!(left, [5, 6], "what is on the disk alone is lost");
    }
}
