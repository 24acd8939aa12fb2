//! Room in the log: which segments are dead, and how others are made so.
//!
//! A segment is dead if none of its output waits and no open attempt needs a record in it. It may
//! be retired once the index is durable, unless an older segment that stays depends on it: it may
//! hold the end of a life whose begin is there, or the confirmed end of its predecessor.
//!
//! If nothing is dead, the cheapest segment without waiting output is emptied by copying what is
//! needed of it forward. If there is none either, the oldest waiting output is given up: marked
//! first, durably, and then counted. Output is never copied.

use std::collections::HashSet;

use super::attempts::Attempt;
use super::commit::Unlogged;
use super::engine::{Engine, io_error};
use super::log::Segment;
use super::record::{Entry, RECORD_HEAD_BYTES, Record};
use super::segment::HEADER_BYTES;
use super::types::{Cursor, StoreError};
use super::unit::UNIT_HEAD_BYTES;
use crate::ids::{AttemptKey, FinalStatus, Stream};

/// Dead segments are retired when there are this many, so that one sync of the index serves all.
const RETIRE_BATCH: usize = 16;

impl Engine {
    /// Makes some room, or says that there is none to make. Output is given up only if allowed.
    pub fn make_room(&mut self, may_drop: bool) -> Result<bool, StoreError> {
        if self.retire_dead()? > 0 {
            return Ok(true);
        }
        if self.compact()? && self.retire_dead()? > 0 {
            return Ok(true);
        }
        Ok(may_drop && self.drop_oldest_output()?)
    }

    /// After a commit: retires a batch of dead segments before they are missed.
    pub fn keep_tidy(&mut self) {
        if self.log.free.len() > 1 || self.log.segments.len() < 4 {
            return;
        }
        let needed = self.needed_segments();
        let dead = self
            .log
            .segments
            .iter()
            .filter(|segment| self.is_dead(segment, &needed));
        let batch =
            RETIRE_BATCH.min(self.bounds.cap_bytes as usize / self.log.segment_bytes as usize / 4);
        if dead.count() >= batch.max(1)
            && let Err(why) = self.retire_dead()
        {
            log::warn!("cannot retire segments of the outbox: {why}");
        }
        self.log.ensure_spare();
    }

    /// Goes back under the cap after a start: it may have been lowered, and a power cut may have
    /// brought back what was retired.
    pub fn shrink(&mut self) -> Result<(), StoreError> {
        for _ in 0..2 * self.log.segments.len() {
            if self.log.used_bytes() <= self.bounds.cap_bytes || !self.make_room(true)? {
                break;
            }
        }
        self.log.trim_free(self.bounds.cap_bytes);
        Ok(())
    }

    /// Retires every dead segment that nothing holds; gives how many.
    pub fn retire_dead(&mut self) -> Result<usize, StoreError> {
        let needed = self.needed_segments();
        let mut staying: Vec<u64> = Vec::new();
        let mut retired: Vec<u64> = Vec::new();
        for segment in &self.log.segments {
            let generation = segment.generation();
            let held = staying.iter().any(|&older| {
                older >= segment.depends_on
                    || (segment.header.guards_predecessor && segment.header.predecessor == older)
            });
            if held || !self.is_dead(segment, &needed) {
                staying.push(generation);
            } else {
                retired.push(generation);
            }
        }
        if retired.is_empty() {
            return Ok(0);
        }
        // What only these segments, or nobody but memory, knows.
        let streams = self.unlogged_streams(&retired);
        let unlogged = self.add_unlogged(&streams);
        self.commit_side(unlogged)?;
        self.flush_index()?;
        for &generation in &retired {
            self.log.retire(generation).map_err(|why| io_error(&why))?;
        }
        self.reading = None;
        self.log.trim_free(self.bounds.cap_bytes);
        self.log.ensure_spare();
        Ok(retired.len())
    }

    /// Streams of open attempts whose acknowledged chunks stand in these segments, if the log does
    /// not say that they are acknowledged.
    fn unlogged_streams(&self, retired: &[u64]) -> Vec<(AttemptKey, Stream)> {
        let mut streams: Vec<(AttemptKey, Stream)> = Vec::new();
        for segment in &self.log.segments {
            if !retired.contains(&segment.generation()) {
                continue;
            }
            for span in &segment.spans {
                let unlogged = self.attempts.get(&span.key).is_some_and(|attempt| {
                    attempt.sends() && attempt.stream(span.stream).logged_done < span.last
                });
                if unlogged && !streams.contains(&(span.key, span.stream)) {
                    streams.push((span.key, span.stream));
                }
            }
        }
        streams
    }

    pub fn flush_index(&mut self) -> Result<(), StoreError> {
        let flushed = self.index.flush();
        self.mend_index();
        flushed.map_err(|why| io_error(&why))
    }

    /// An index that was lost is brought up from the closings that the log still has.
    pub fn mend_index(&mut self) {
        if !self.index.take_rebuilt() {
            return;
        }
        self.tally.index_rebuilt = true;
        let mut found = Vec::new();
        for at in 0..self.log.segments.len() {
            self.walk(at, |_, key, record| {
                if let Record::Closed(entry) = record {
                    found.push((key, *entry));
                }
            });
        }
        for (key, entry) in found {
            self.index.put(key, entry);
        }
    }

    /// Segments that hold a record which an open attempt needs.
    fn needed_segments(&self) -> HashSet<u64> {
        let mut needed = HashSet::new();
        for attempt in self.attempts.values() {
            for generation in needs(attempt) {
                needed.insert(generation);
            }
        }
        // The last one is never dead: it tells a restart which generations have been used.
        needed.extend(self.log.segments.last().map(Segment::generation));
        needed
    }

    fn is_dead(&self, segment: &Segment, needed: &HashSet<u64>) -> bool {
        !needed.contains(&segment.generation()) && !self.has_waiting_output(segment)
    }

    pub fn has_waiting_output(&self, segment: &Segment) -> bool {
        segment.spans.iter().any(|span| {
            self.attempts.get(&span.key).is_some_and(|attempt| {
                attempt.sends() && attempt.stream(span.stream).mark.done < span.last
            })
        })
    }

    // ---- copying forward ----------------------------------------------------------------------

    /// Empties the segment that is cheapest to empty by copying forward what is needed of it.
    /// `false` if none is worth it.
    fn compact(&mut self) -> Result<bool, StoreError> {
        let last = self.log.segments.last().map(Segment::generation);
        let mut best: Option<(u64, u64)> = None;
        for segment in &self.log.segments {
            let generation = segment.generation();
            let header = &segment.header;
            let guards =
                header.guards_predecessor && self.log.position(header.predecessor).is_some();
            if Some(generation) == last || guards || self.has_waiting_output(segment) {
                continue;
            }
            let cost = self.copy_bytes(generation);
            if cost <= segment.header.capacity / 2 && best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, generation));
            }
        }
        match best {
            Some((_, generation)) => self.copy_forward(generation),
            None => Ok(false),
        }
    }

    /// About what copying this segment forward would write.
    fn copy_bytes(&self, generation: u64) -> u64 {
        let mut bytes = 0;
        for attempt in self.attempts.values() {
            let mine = needs(attempt)
                .filter(|&needed| needed == generation)
                .count();
            bytes += mine as u64 * 512;
            if attempt.identity_at.generation == generation && !attempt.started {
                bytes += attempt.command_bytes;
            }
            if let Some(fin) = attempt.fin.filter(|fin| fin.at.generation == generation) {
                bytes += if attempt.final_done {
                    0
                } else {
                    fin.text_bytes
                };
            }
        }
        bytes
    }

    /// Copies what open attempts need of this segment, and the closings of those that are done if
    /// an older segment still holds something of them.
    fn copy_forward(&mut self, generation: u64) -> Result<bool, StoreError> {
        let Some(position) = self.log.position(generation) else {
            return Ok(false);
        };
        let depends_on = self.log.segments[position].depends_on;
        let older_stay = self.log.segments[..position]
            .iter()
            .any(|older| older.generation() >= depends_on);
        let mut done: Vec<AttemptKey> = Vec::new();
        // Texts and commands are read before anything is written: the same disk serves both.
        let keys: Vec<AttemptKey> = self
            .attempts
            .iter()
            .filter(|(_, attempt)| needs(attempt).any(|needed| needed == generation))
            .map(|(key, _)| *key)
            .collect();
        if older_stay {
            let attempts: HashSet<AttemptKey> = self.attempts.keys().copied().collect();
            self.walk(position, |_, key, record| {
                let output = matches!(record, Record::Output { .. });
                if !output && !attempts.contains(&key) && !done.contains(&key) {
                    done.push(key);
                }
            });
        }
        let mut copies = Vec::new();
        for key in keys {
            self.copy_attempt(key, generation, &mut copies);
        }
        for key in done {
            if let Some(entry) = self.index_entry(key)? {
                self.side.push(key, &Record::Closed(entry));
            }
        }
        let (new, offset) = self.commit_side(Unlogged::default())?;
        for copy in copies {
            self.note_copy(copy, new, offset);
        }
        self.depend(new, depends_on);
        // Nothing of it is needed any more, and nothing it closes is known only there.
        if let Some(segment) = self.log.segment_mut(generation) {
            segment.depends_on = u64::MAX;
        }
        Ok(true)
    }

    /// Encodes those facts of an attempt whose records stand in this segment.
    fn copy_attempt(&mut self, key: AttemptKey, generation: u64, copies: &mut Vec<Copied>) {
        let receipt = self.stored_command(key);
        let texts = self.stored_texts(key);
        let Some(attempt) = self.attempts.get(&key) else {
            return;
        };
        let side = &mut self.side;
        if attempt.identity_at.generation == generation || attempt.started_in == generation {
            let identity = attempt.identity();
            let waits = !attempt.started && attempt.fin.is_none() && !attempt.discarded;
            let record = match &receipt {
                Some(command) if waits => Record::Received { identity, command },
                _ => Record::Identity(identity),
            };
            let at = side.push(key, &record);
            copies.push(Copied::Identity(key, at));
        }
        if attempt.discarded && attempt.discarded_in == generation {
            side.push(key, &Record::Discarded);
            copies.push(Copied::Discarded(key));
        }
        if let Some(fin) = attempt.fin.filter(|fin| fin.at.generation == generation) {
            let mut ending = fin.ending;
            let (output, error) = match &texts {
                Some((output, error)) => (&output[..], &error[..]),
                None => {
                    ending.output_truncated = true;
                    ending.error_truncated = true;
                    (&[][..], &[][..])
                }
            };
            let record = Record::Final {
                ending,
                output,
                error,
            };
            let at = side.push(key, &record);
            copies.push(Copied::Final(key, at));
        }
        if attempt.final_done && attempt.done_in == generation {
            side.push(key, &Record::Done { dropped: false });
            copies.push(Copied::Done(key));
        }
        for stream in Stream::ALL {
            let state = attempt.stream(stream);
            if state.logged_in == generation {
                let mark = state.mark.clone();
                copies.push(Copied::Mark(key, stream, mark.done));
                side.push(key, &Record::Mark { stream, mark });
            }
        }
    }

    fn note_copy(&mut self, copy: Copied, generation: u64, offset: u64) {
        let (Copied::Identity(key, _)
        | Copied::Discarded(key)
        | Copied::Final(key, _)
        | Copied::Done(key)
        | Copied::Mark(key, ..)) = copy;
        let Some(attempt) = self.attempts.get_mut(&key) else {
            return;
        };
        match copy {
            Copied::Identity(_, at) => {
                attempt.identity_at = Cursor::record(generation, offset + at);
                if attempt.started {
                    attempt.started_in = generation;
                }
            }
            Copied::Discarded(_) => attempt.discarded_in = generation,
            Copied::Final(_, at) => {
                self.ahead.has_moved(key);
                if let Some(fin) = &mut attempt.fin {
                    fin.at = Cursor::record(generation, offset + at);
                }
                self.news = true;
            }
            Copied::Done(_) => attempt.done_in = generation,
            Copied::Mark(_, stream, done) => {
                let state = attempt.stream_mut(stream);
                state.logged_done = done;
                state.logged_in = generation;
            }
        }
        let first_in = attempt.first_in;
        self.depend(generation, first_in);
    }

    // ---- giving up ----------------------------------------------------------------------------

    /// Gives up the waiting output of the oldest segment that has some. `false` if none has.
    fn drop_oldest_output(&mut self) -> Result<bool, StoreError> {
        let oldest = self
            .log
            .segments
            .iter()
            .position(|segment| self.has_waiting_output(segment));
        let Some(position) = oldest else {
            return Ok(false);
        };
        let segment = &self.log.segments[position];
        if self.log.active_generation() == Some(segment.generation()) {
            self.log.seal_active();
        }
        let mut dropped = Vec::new();
        for span in &self.log.segments[position].spans {
            let Some(attempt) = self
                .attempts
                .get(&span.key)
                .filter(|attempt| attempt.sends())
            else {
                continue;
            };
            let done = attempt.stream(span.stream).mark.done;
            if done < span.last {
                let chunks = u64::from(span.chunks).min(span.last - done.max(span.first - 1));
                let bytes = span.bytes * chunks / u64::from(span.chunks.max(1));
                dropped.push((span.key, span.stream, span.last, chunks, bytes));
            }
        }
        let mut records = Vec::new();
        for &(key, stream, through, ..) in &dropped {
            let record = Record::Truncated { stream, through };
            let at = self.side.push(key, &record);
            if let Some(attempt) = self.attempts.get(&key) {
                // What else is known of the stream may stand in a segment that only this one's
                // record keeps.
                let mark = attempt.stream(stream).mark_without(1, through);
                records.push((key, stream, record, at, mark.done));
                self.side.push(key, &Record::Mark { stream, mark });
            }
        }
        let (generation, offset) = self.commit_side(Unlogged::default())?;
        for (key, stream, through, chunks, bytes) in dropped {
            self.tally.chunks_dropped += chunks;
            self.tally.bytes_dropped += bytes;
            let truncated = self
                .attempts
                .get(&key)
                .map(|a| a.stream(stream).mark.truncated);
            if truncated == Some(false) {
                self.tally.streams_truncated += 1;
                if let Some(ids) = self.ids_of(key) {
                    log::warn!(
                        "the outbox is full: {} of attempt {ids} is cut up to chunk {through}; \
                         raise HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES to keep more while offline",
                        stream.as_str(),
                    );
                }
            }
        }
        for (key, stream, record, at, done) in records {
            self.apply_record(key, &record, Cursor::record(generation, offset + at));
            self.mark_logged(key, stream, done, generation);
        }
        Ok(true)
    }

    // ---- walking ------------------------------------------------------------------------------

    /// Visits all good records of a segment, in order.
    pub fn walk(&mut self, at: usize, mut visit: impl FnMut(Cursor, AttemptKey, &Record<'_>)) {
        let window = std::mem::take(&mut self.window);
        let (generation, end) = (
            self.log.segments[at].generation(),
            self.log.segments[at].end,
        );
        let Ok(mut reader) = self.log.reader(at, window) else {
            return;
        };
        let mut from = HEADER_BYTES;
        while let Some((unit_at, unit)) = reader.find_unit(from, end) {
            let mut at = unit_at + UNIT_HEAD_BYTES as u64;
            let records_end = at + u64::from(unit.records_bytes);
            let mut damaged = 0;
            while let Some(good) = reader.next_good(at, records_end, &mut damaged) {
                at = good + RECORD_HEAD_BYTES as u64;
                if let Some((head, body)) = reader.record_at(good, records_end) {
                    at = good + head.bytes();
                    if let Some(record) = Record::decode(&head, body) {
                        visit(Cursor::record(generation, good), head.key, &record);
                    }
                }
            }
            from = unit_at + unit.bytes();
        }
        self.window = reader.into_window();
    }
}

/// A fact that was copied forward; the number is its distance from the begin of the unit.
enum Copied {
    Identity(AttemptKey, u64),
    Discarded(AttemptKey),
    Final(AttemptKey, u64),
    Done(AttemptKey),
    Mark(AttemptKey, Stream, u64),
}

/// The segments that hold what this open attempt needs.
fn needs(attempt: &Attempt) -> impl Iterator<Item = u64> {
    let streams = attempt.streams.each_ref().map(|stream| stream.logged_in);
    [
        attempt.identity_at.generation,
        attempt.started_in,
        attempt.discarded_in,
        attempt.fin.map_or(0, |fin| fin.at.generation),
        attempt.done_in,
        streams[0],
        streams[1],
    ]
    .into_iter()
    .filter(|&generation| generation != 0)
}

/// How an attempt ends of which only later records are left: it must never run again.
pub(super) const FORGOTTEN: Entry = Entry {
    order: 0,
    discarded: false,
    status: FinalStatus::Interrupted,
    exit_code: -1,
    born: None,
};
