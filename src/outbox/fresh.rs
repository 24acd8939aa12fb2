//! What was committed last is still in memory: who follows closely reads it there, without the disk.
//! A unit of much output becomes the batch itself.

use std::ops::Range;

use super::engine::Engine;
use super::record::{RECORD_HEAD_BYTES, Record};
use super::segment::SegmentReader;
use super::types::{Batch, Body, Cursor};
use super::unit::{UNIT_BUFFER_KEPT_BYTES, UnitBuffer, unit_bytes};
use crate::ids::{AttemptKey, Stream};
use crate::limits::{BATCH_BUFFER_BYTES, READ_BYTES_MAX, UNITS_IN_MEMORY};

/// A unit with less than this is copied, several into one batch. In tests chunks are short.
const HANDED_OVER_BYTES_MIN: usize = if cfg!(test) { 1024 } else { READ_BYTES_MAX / 4 };

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
        } else if newest.bytes.len() <= BATCH_BUFFER_BYTES {
            // It has held a larger one before.
            newest.bytes.shrink_to(BATCH_BUFFER_BYTES);
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

    /// The unit that begins here, if its buffer may be that of a batch.
    fn handed_over(&self, from: Cursor) -> Option<usize> {
        let position = self.position(from.generation, from.byte())?;
        let unit = &self.units[position];
        let is_worth_it = unit.bytes.len() >= HANDED_OVER_BYTES_MIN;
        let is_usual = unit.bytes.capacity() <= BATCH_BUFFER_BYTES;
        (unit.place.start == from.byte() && is_worth_it && is_usual).then_some(position)
    }
}

impl Engine {
    /// Reads a whole unit of output that is in memory: its buffer becomes that of the batch, whose own
    /// one is used for a later unit. `None` if it has to be copied, and otherwise whether the batch is
    /// full: a unit that has no room in it as a whole is left for the next one.
    pub(super) fn read_in_place(
        &mut self,
        seed: u32,
        max_messages: usize,
        max_bytes: usize,
        skip: Option<(AttemptKey, Stream)>,
        batch: &mut Batch,
    ) -> Option<bool> {
        let from = batch.next;
        let position = self.fresh.handed_over(from)?;
        if !batch.messages.is_empty() {
            let bytes = self.fresh.units[position].bytes.len();
            return (!batch.has_room(bytes, max_messages, max_bytes)).then_some(true);
        }
        let (mut reader, end) = self.fresh.lend(position, seed);
        let is_read = self.find_in_place(&mut reader, end, max_messages, max_bytes, skip, batch);
        if !is_read || batch.messages.is_empty() {
            batch.messages.clear();
            self.fresh.give_back(position, reader);
        } else {
            let spare = std::mem::replace(&mut batch.buffer, reader.into_bytes());
            self.fresh.units[position] = FreshUnit {
                bytes: spare,
                ..FreshUnit::default()
            };
        }
        is_read.then(|| {
            batch.next = Cursor::unit(from.generation, end);
            false
        })
    }

    /// Names the chunks of a unit where they lie. False if there is anything else that waits, or too
    /// much: what is named then is void.
    fn find_in_place(
        &mut self,
        reader: &mut SegmentReader,
        end: u64,
        max_messages: usize,
        max_bytes: usize,
        skip: Option<(AttemptKey, Stream)>,
        batch: &mut Batch,
    ) -> bool {
        let (generation, begin) = (batch.next.generation, batch.next.byte());
        let (mut place, mut bytes) = (batch.next, 0);
        while let Some((offset, head, after)) = reader.next_record(place, end) {
            let here = Cursor::record(generation, offset);
            if let Some(body) = reader.body(offset, &head, end)
                && let Some(record) = Record::decode(&head, body)
                && let Some(mut message) = self.message(here, head.key, &record, skip)
            {
                let Body::Output { data, .. } = &mut message.body else {
                    return false;
                };
                let at = (offset - begin) as usize + RECORD_HEAD_BYTES;
                *data = at..at + body.len();
                bytes += body.len();
                if batch.messages.len() == max_messages || bytes > max_bytes {
                    return false;
                }
                batch.messages.push(message);
            }
            place = after.cursor(generation);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use crate::ids::Stream;
    use crate::limits::{CHUNK_BYTES_MAX, Chunk, ChunkBatch, ChunkBuffer, UNITS_IN_MEMORY};
    use crate::outbox::model::{Tester, content, final_of, ids};
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

    /// Whether the newest unit is in memory.
    fn has_newest(tester: &mut Tester) -> bool {
        tester.engine().fresh.units[0].generation > 0
    }

    /// One chunk that is read, and behind it units of eight.
    fn followed(units: u64) -> (Tester, u64, Cursor) {
        let mut tester = Tester::new(64 << 20);
        let number = tester.receive();
        tester.start(number);
        tester.append(number, OUT, 1);
        let (_, follows) = read(&mut tester, number, Cursor::START);
        for _ in 0..units {
            tester.append(number, OUT, 8);
        }
        (tester, number, follows)
    }

    /// How many messages one batch has, and where to go on.
    fn count(
        tester: &mut Tester,
        from: Cursor,
        max_messages: usize,
        max_bytes: usize,
    ) -> (usize, Cursor) {
        let batch = tester.engine().read(ReadRequest {
            from,
            max_messages,
            max_bytes,
            ..ReadRequest::default()
        });
        (batch.messages.len(), batch.next)
    }

    /// Appends chunks of a stream from a sequence on, for the next commit.
    fn stage(tester: &mut Tester, number: u64, from: (Stream, u64), batch: ChunkBatch) {
        let (reply, _answer) = async_channel::bounded(1);
        let (key, (stream, first)) = (ids(number).key(), from);
        tester.engine().append(key, stream, first, batch, reply);
    }

    #[test]
    fn a_unit_of_much_output_becomes_the_batch() {
        let (mut tester, number, follows) = followed(1);
        tester.acknowledge(number, OUT, 3);
        assert!(has_newest(&mut tester));
        let (found, end) = read(&mut tester, number, follows);
        assert_eq!(found, Vec::from_iter(4..=9), "what is done is passed over");
        assert!(!has_newest(&mut tester), "it was handed over");
        // Its buffer is used again, and who comes back reads the disk.
        tester.append(number, OUT, 8);
        assert_eq!(read(&mut tester, number, end).0, Vec::from_iter(10..=17));
        let again = read(&mut tester, number, follows).0;
        assert_eq!(again, Vec::from_iter(4..=17));
    }

    #[test]
    fn what_cannot_be_handed_over_whole_is_copied() {
        let (mut tester, number, follows) = followed(1);
        assert_eq!(count(&mut tester, follows, 7, 1 << 20).0, 7);
        let seven: usize = (2..=8).map(|it| content(number, OUT, it).len()).sum();
        assert_eq!(count(&mut tester, follows, 100, seven).0, 7);
        let (_, middle) = count(&mut tester, follows, 1, 1 << 20);
        let (found, end) = read(&mut tester, number, middle);
        assert_eq!(found, Vec::from_iter(3..=9));
        assert!(has_newest(&mut tester));
        let other = tester.receive();
        let long = Chunk::new(ChunkBuffer::from_slice(&[b'x'; 5000]).expect("fits"));
        let batch = ChunkBatch::from_iter([long]);
        stage(&mut tester, number, (OUT, 10), batch);
        let fin = final_of(other);
        tester.engine().finish(ids(other).key(), fin, false, None);
        tester.engine().commit();
        assert_eq!(count(&mut tester, end, 100, 1 << 20).0, 2);
        assert!(has_newest(&mut tester), "a final has two texts");
    }

    #[test]
    fn a_buffer_that_has_held_more_is_handed_over_all_the_same() {
        let (mut tester, number, mut follows) = followed(0);
        let full = || Chunk::new(ChunkBuffer::from_slice(&[b'x'; CHUNK_BYTES_MAX]).expect("fits"));
        for round in 0..3 {
            for (stream, first) in [(OUT, 2), (Stream::Stderr, 1)] {
                let batch: ChunkBatch = std::iter::repeat_with(full).take(8).collect();
                stage(&mut tester, number, (stream, first + 8 * round), batch);
            }
            tester.engine().commit();
            let (found, end) = count(&mut tester, follows, 100, 1 << 20);
            assert_eq!(found, 16);
            assert!(has_newest(&mut tester), "it is too large");
            follows = end;
        }
        let batch: ChunkBatch = std::iter::repeat_with(full).take(8).collect();
        stage(&mut tester, number, (OUT, 26), batch);
        tester.engine().commit();
        assert_eq!(count(&mut tester, follows, 100, 1 << 20).0, 8);
        assert!(!has_newest(&mut tester));
    }

    #[test]
    fn a_unit_that_has_no_room_as_a_whole_is_left_for_the_next_batch() {
        let (mut tester, number, follows) = followed(2);
        let payload: usize = (2..=10).map(|it| content(number, OUT, it).len()).sum();
        let (first, next) = count(&mut tester, follows, 100, payload);
        assert_eq!(first, 8);
        assert_eq!(count(&mut tester, next, 100, 1 << 20).0, 8);
        assert!(!has_newest(&mut tester));
    }
}
