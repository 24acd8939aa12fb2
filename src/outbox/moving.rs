//! Moving what one store holds into another: from memory to the disk when that can be used again,
//! and from a store that was set aside into the one in use.
//!
//! Nothing changes on the way: messages keep the name of the store that they were born in, and so
//! their ids (PROTOCOL.md 4.3). What moves together becomes known here by one unit: after a crash
//! this store has all of it or nothing. The output of an attempt that this log does not know yet
//! may be more than a unit should hold; it is copied ahead, and recovery passes over it until the
//! unit with the rest is there. Beginning again is harmless: what was copied in vain is dead.
//!
//! A move that fails has not happened: its source goes on and is believed by the server. So what
//! of it may have reached the medium is made void at once, by the header of the next segment.
//!
//! An attempt that both stores know has one life if one of them only received it: that of the
//! other. If both have started it, one of them did not know of the other (a disk that could not be
//! read, an older agent). The store that is moved into wins, what waits in the other is dropped
//! and counted.

use std::collections::HashMap;

use super::attempts::Attempt;
use super::commit::Contents;
use super::engine::Engine;
use super::record::{Ending, Entry, Identity, Mark, RECORD_HEAD_BYTES, Record};
use super::types::*;
use crate::ids::{AttemptKey, Stream};
use crate::limits::{FINISHED_ATTEMPTS_MAX, MEMORY_STORE_BYTES};

/// Which of two stores was used last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The other one is in memory and in use: its attempts move together, and may be running.
    Younger,
    /// The other one was set aside, and may be large: its attempts move one by one.
    Older,
}

/// All of an attempt apart from its output.
struct Life {
    key: AttemptKey,
    identity: Identity,
    /// While it waits for its start.
    command: Option<Vec<u8>>,
    marks: Vec<(Stream, Mark)>,
    fin: Option<StoredTexts>,
    final_done: bool,
    discarded: bool,
}

struct StoredTexts {
    ending: Ending,
    output: Vec<u8>,
    error: Vec<u8>,
    wall_ms: u64,
}

/// The chunks of a unit on their way.
struct Copying {
    ahead: bool,
    copied: Vec<Copied>,
    /// Bytes that are passed over before anything is copied.
    excess: u64,
}

struct Copied {
    key: AttemptKey,
    stream: Stream,
    sequence: u64,
    bytes: u64,
}

impl Engine {
    /// Takes over all that `source` holds, durably. After an error nothing of what was to move
    /// together is known here, and it may be tried again.
    pub fn absorb(&mut self, source: &mut Engine, age: Source) -> Result<(), StoreError> {
        self.commit();
        self.take_memory(source, age)?;
        self.store_memory()?;
        let moving = self.choose(source)?;
        match age {
            Source::Younger => self.move_attempts(source, &moving)?,
            Source::Older => {
                for key in &moving {
                    self.move_attempts(source, std::slice::from_ref(key))?;
                }
            }
        }
        // All of it is here, whatever happens now.
        if let Err(why) = self.shrink() {
            log::warn!("the outbox is larger than its cap: {why}");
        }
        self.news = true;
        Ok(())
    }

    /// The open attempts that go over, in order of arrival. Those that have gone over before a
    /// crash are here already.
    fn choose(&mut self, source: &Engine) -> Result<Vec<AttemptKey>, StoreError> {
        let mut open: Vec<_> = source.attempts.iter().collect();
        open.sort_unstable_by_key(|(_, attempt)| attempt.arrival);
        let mut moving = Vec::new();
        for (&key, attempt) in open {
            match self.known_phase(key)? {
                None => moving.push(key),
                Some(Phase::Received) if attempt.phase() == Phase::Received => {}
                Some(Phase::Received) => moving.push(key),
                Some(_) => {
                    let born = match self.attempts.get(&key) {
                        Some(here) => here.born,
                        None => self.index_entry(key)?.and_then(|entry| entry.born),
                    };
                    if born != Some(attempt.born.unwrap_or(source.log.incarnation)) {
                        self.count_loser(attempt);
                    }
                }
            }
        }
        Ok(moving)
    }

    /// Both stores have started this attempt.
    fn count_loser(&mut self, attempt: &Attempt) {
        let chunks: u64 = attempt.streams.iter().map(|stream| stream.waiting()).sum();
        self.tally.chunks_dropped += chunks;
        self.tally.finals_dropped += u64::from(attempt.final_waits());
        if chunks > 0 || attempt.final_waits() {
            log::warn!(
                "task {}: it has run twice, from two stores that did not know each other; {chunks} \
                 chunks of output and the result in one of them are dropped",
                attempt.ids
            );
        }
    }

    /// Moves these attempts, all or none of them.
    fn move_attempts(
        &mut self,
        source: &mut Engine,
        keys: &[AttemptKey],
    ) -> Result<(), StoreError> {
        let mut received = HashMap::new();
        for key in keys {
            if let Some(attempt) = source.attempts.get(key) {
                let before = self.attempts.remove(key);
                let arriving = arriving(attempt, before.as_ref(), self.next_arrival);
                self.next_arrival += 1;
                self.attempts.insert(*key, arriving);
                received.insert(*key, before);
            }
        }
        // Ahead of the rest only where recovery takes it for nothing.
        let ahead = keys.len() == 1 && received.values().all(Option::is_none);
        let moved = self.write_attempts(source, keys, ahead);
        self.unit.clear();
        if moved.is_err() {
            let now_ms = self.now_ms();
            if self.log.void_remains(now_ms).is_err() {
                log::warn!(
                    "the outbox could not be moved to the disk, and that cannot be noted there: if \
                     the power goes before it can, tasks that run may be told as interrupted"
                );
            }
            for (key, before) in received {
                self.attempts.remove(&key);
                self.attempts.extend(before.map(|before| (key, before)));
            }
        }
        moved
    }

    fn write_attempts(
        &mut self,
        source: &mut Engine,
        keys: &[AttemptKey],
        ahead: bool,
    ) -> Result<(), StoreError> {
        let copied = self.copy_output(source, keys, ahead)?;
        let mut lives = Vec::new();
        for &key in keys {
            lives.extend(self.life(source, key, &copied));
        }
        if lives.is_empty() {
            return Ok(());
        }
        let mut places = Vec::new();
        for life in &lives {
            for record in life.records() {
                places.push(self.unit.push(life.key, &record));
            }
        }
        let (generation, offset) = self.write_unit(Contents {
            any_output: false,
            only_output: false,
        })?;
        self.apply_copied(copied, generation, offset);
        let mut places = places.into_iter();
        for life in &lives {
            let Some(attempt) = self.attempts.get_mut(&life.key) else {
                continue;
            };
            let wall_ms = life.fin.as_ref().map_or(0, |fin| fin.wall_ms);
            for (record, at) in life.records().iter().zip(&mut places) {
                attempt.apply(record, Cursor::record(generation, offset + at), wall_ms);
            }
            let first_in = attempt.first_in;
            self.depend(generation, first_in);
            self.close_if_done(life.key);
        }
        Ok(())
    }

    /// Copies what the source holds of these attempts' output above the watermark: ahead, or into
    /// the unit that waits. Gives what is in that one.
    fn copy_output(
        &mut self,
        source: &mut Engine,
        keys: &[AttemptKey],
        ahead: bool,
    ) -> Result<Vec<Copied>, StoreError> {
        let spans = source
            .log
            .segments
            .iter()
            .flat_map(|segment| &segment.spans);
        let mine = spans.filter(|span| keys.contains(&span.key));
        let held: u64 = mine.map(|span| span.bytes).sum();
        let mut copying = Copying {
            ahead,
            copied: Vec::new(),
            // A volatile store holds no more; of another the eldest are given up.
            excess: match ahead {
                true => 0,
                false => held.saturating_sub(MEMORY_STORE_BYTES as u64),
            },
        };
        for at in 0..source.log.segments.len() {
            let spans = &source.log.segments[at].spans;
            if !spans.iter().any(|span| keys.contains(&span.key)) {
                continue;
            }
            let mut outcome = Ok(());
            source.walk(at, |_, key, record| {
                if outcome.is_ok() && keys.contains(&key) {
                    outcome = self.copy_chunk(key, record, &mut copying);
                }
            });
            outcome?;
        }
        Ok(copying.copied)
    }

    fn copy_chunk(
        &mut self,
        key: AttemptKey,
        record: &Record<'_>,
        copying: &mut Copying,
    ) -> Result<(), StoreError> {
        let &Record::Output {
            stream,
            sequence,
            data,
        } = record
        else {
            return Ok(());
        };
        let newest = copying
            .copied
            .iter()
            .rfind(|chunk| (chunk.key, chunk.stream) == (key, stream));
        let last = match (newest, self.attempts.get(&key)) {
            (Some(newest), _) => newest.sequence,
            (None, Some(attempt)) => attempt.stream(stream).mark.last,
            (None, None) => return Ok(()),
        };
        let bytes = data.len() as u64;
        if sequence <= last {
            copying.excess = copying.excess.saturating_sub(bytes);
            return Ok(());
        }
        if copying.excess > 0 {
            copying.excess = copying.excess.saturating_sub(bytes);
            self.tally.chunks_dropped += 1;
            self.tally.bytes_dropped += bytes;
            return Ok(());
        }
        let needed = data.len() + RECORD_HEAD_BYTES;
        let full = self.unit.records_bytes() + needed > self.log.unit_room();
        if copying.ahead && full && !copying.copied.is_empty() {
            let placed = self.write_unit(Contents {
                any_output: true,
                only_output: true,
            });
            self.unit.clear();
            let (generation, offset) = placed?;
            self.apply_copied(std::mem::take(&mut copying.copied), generation, offset);
        }
        self.unit.push(key, record);
        copying.copied.push(Copied {
            key,
            stream,
            sequence,
            bytes,
        });
        Ok(())
    }

    fn apply_copied(&mut self, copied: Vec<Copied>, generation: u64, offset: u64) {
        for chunk in copied {
            let Copied {
                key,
                stream,
                sequence,
                bytes,
            } = chunk;
            if let Some(attempt) = self.attempts.get_mut(&key) {
                attempt.first_in = attempt.first_in.min(generation);
                attempt.stream_mut(stream).stored(sequence);
            }
            if let Some(segment) = self.log.segment_mut(generation) {
                segment.note_chunk(key, stream, sequence, bytes, offset);
            }
        }
    }

    fn life(&mut self, source: &mut Engine, key: AttemptKey, copied: &[Copied]) -> Option<Life> {
        let waits = source.attempts.get(&key)?.phase() == Phase::Received;
        let command = match waits {
            true => source.stored_command(key),
            false => None,
        };
        let texts = source.stored_texts(key);
        let other = source.attempts.get(&key)?;
        let here = self.attempts.get(&key)?;
        let marks = Stream::ALL.map(|stream| {
            // What had to be dropped on the way is known here alone.
            let mut state = here.stream(stream).clone();
            let mine = |chunk: &&Copied| (chunk.key, chunk.stream) == (key, stream);
            for chunk in copied.iter().filter(mine) {
                state.stored(chunk.sequence);
            }
            state.merge(&other.stream(stream).mark);
            (stream, state.mark)
        });
        let fin = other.fin.map(|fin| {
            let mut ending = fin.ending;
            let held = texts.is_some() || other.final_done;
            ending.output_truncated |= !held;
            ending.error_truncated |= !held;
            let (output, error) = texts.unwrap_or_default();
            StoredTexts {
                ending,
                output,
                error,
                wall_ms: fin.wall_ms,
            }
        });
        let started_at_ms = match other.started {
            true => other.started_at_ms.max(1),
            false => 0,
        };
        Some(Life {
            key,
            identity: Identity {
                arrival: here.arrival,
                born: other.born.or(Some(source.log.incarnation)),
                started_at_ms,
                ..other.identity()
            },
            command,
            marks: marks
                .into_iter()
                .filter(|(_, mark)| mark.last > 0)
                .collect(),
            fin,
            final_done: other.final_done,
            discarded: other.discarded,
        })
    }

    /// Takes over which attempts are done.
    fn take_memory(&mut self, source: &mut Engine, age: Source) -> Result<(), StoreError> {
        let born = source.log.incarnation;
        let mut entries = source.index.entries();
        if entries.is_empty() {
            return Ok(());
        }
        let own = match age {
            Source::Younger => Vec::new(),
            Source::Older => self.index.entries(),
        };
        // Only the last ones are remembered, and those are here.
        let room = FINISHED_ATTEMPTS_MAX.saturating_sub(own.len());
        entries.drain(..entries.len().saturating_sub(room));
        for (key, entry) in entries {
            let entry = Entry {
                born: entry.born.or(Some(born)),
                ..entry
            };
            if matches!(self.known_phase(key)?, None | Some(Phase::Received)) {
                self.remember(key, entry);
            }
        }
        for (key, entry) in own {
            let order = self.next_order;
            self.next_order += 1;
            self.index.put(key, Entry { order, ..entry });
        }
        Ok(())
    }
}

impl Life {
    fn records(&self) -> Vec<Record<'_>> {
        let mut records = vec![match &self.command {
            Some(command) => Record::Received {
                identity: self.identity.clone(),
                command,
            },
            None => Record::Identity(self.identity.clone()),
        }];
        records.extend(self.marks.iter().map(|(stream, mark)| Record::Mark {
            stream: *stream,
            mark: mark.clone(),
        }));
        records.extend(self.fin.as_ref().map(|fin| Record::Final {
            ending: fin.ending,
            output: &fin.output,
            error: &fin.error,
        }));
        if self.final_done {
            records.push(Record::Done { dropped: false });
        }
        if self.discarded {
            records.push(Record::Discarded);
        }
        records
    }
}

/// The attempt here, before its life is written: its streams stand at the watermark of the source.
fn arriving(source: &Attempt, before: Option<&Attempt>, arrival: u64) -> Attempt {
    let mut attempt = Attempt::unidentified(before.map_or(u64::MAX, |before| before.first_in));
    attempt.ids = source.ids.clone();
    attempt.arrival = before.map_or(arrival, |before| before.arrival);
    attempt.priority = source.priority;
    attempt.timeout_seconds = source.timeout_seconds;
    attempt.received_at_ms = source.received_at_ms;
    if let Some(before) = before {
        // Copied forward as what it is until then, if its segment has to go.
        attempt.identity_at = before.identity_at;
        attempt.command_bytes = before.command_bytes;
    }
    for stream in Stream::ALL {
        let done = source.stream(stream).mark.done;
        let mark = &mut attempt.stream_mut(stream).mark;
        (mark.last, mark.done) = (done, done);
    }
    attempt
}
