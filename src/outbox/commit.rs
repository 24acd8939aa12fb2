//! The one way to the disk: the staged unit is made durable, then applied, then answered.

use std::time::Instant;

use async_channel::Sender;

use super::attempts::Attempt;
use super::engine::{Engine, LIFE_BYTES, answer, answer_if, io_error, tail};
use super::handle::{AppendError, FinishError, Reply};
use super::log::CommitError;
use super::record::{Ending, Entry, Identity, RECORD_HEAD_BYTES, Record};
use super::types::*;
use crate::ids::{AttemptKey, Stream};
use crate::limits::{ChunkBatch, DISK_FULL_PATIENCE};

/// Attempts to make room for one unit, beyond one for each segment.
const TURNS_SPARE: usize = 8;
/// Stream states that one unit brings up at the begin of a segment.
const MARKS_MAX: usize = 32;

/// A fact that is encoded and not yet durable.
pub(super) struct Staged {
    pub key: AttemptKey,
    /// Distance of its first record from the begin of the unit.
    pub at: u64,
    pub fact: Fact,
}

pub(super) enum Fact {
    Received(Identity, Vec<u8>, Reply<Result<Reception, StoreError>>),
    Starting(u64, Reply<Result<Start, StoreError>>),
    Output(
        Stream,
        u64,
        ChunkBatch,
        Reply<Result<ChunkBatch, AppendError>>,
    ),
    Final {
        ending: Ending,
        fin: Final,
        /// Distance of the record that it is reported already, if it is.
        done_at: Option<u64>,
        reply: Option<Reply<Result<(), FinishError>>>,
    },
    /// A chunk, and the watermark that its stream has then.
    Rejected(Stream, u64, u64, Reply<Result<(), StoreError>>),
    Plain(Record<'static>, Reply<Result<(), StoreError>>),
}

/// What a unit holds: of the space, output may not use all.
#[derive(Clone, Copy)]
pub(super) struct Contents {
    pub any_output: bool,
    pub only_output: bool,
}

/// What a side unit says beside its purpose.
#[derive(Default)]
pub(super) struct Unlogged {
    closings: Closings,
    marks: Vec<(AttemptKey, Stream, u64)>,
}

/// The closings that a unit holds: all up to an order, and the oldest segment they depend on.
#[derive(Debug, Clone, Copy)]
struct Closings {
    through: u64,
    first_in: u64,
}

impl Default for Closings {
    fn default() -> Closings {
        Closings {
            through: 0,
            first_in: u64::MAX,
        }
    }
}

impl Closings {
    fn add(&mut self, entry: &Entry, first_in: u64) {
        self.through = self.through.max(entry.order);
        self.first_in = self.first_in.min(first_in);
    }
}

impl Engine {
    /// Makes durable what is staged, applies it and answers.
    pub fn commit(&mut self) {
        self.commit_and_tell(None);
    }

    /// As [`Engine::commit`]. Whoever sends is told before whoever stores is answered: its read then
    /// comes before the next chunks, whose commit it would have to wait for.
    pub fn commit_and_tell(&mut self, sender: Option<&Sender<()>>) {
        if self.staged.is_empty() {
            return;
        }
        let closings = self.add_closings();
        let marks = match self.log.fits_active(self.unit.records_bytes()) {
            true => Vec::new(),
            false => self.add_marks(),
        };
        let has_output = |staged: &Staged| matches!(staged.fact, Fact::Output(..));
        let has_final = |staged: &Staged| matches!(staged.fact, Fact::Final { .. });
        let has_news = |staged: &Staged| has_output(staged) || has_final(staged);
        let contents = Contents {
            any_output: self.staged.iter().any(has_output),
            only_output: self.staged.iter().all(has_output),
        };
        let placed = self.write_unit(contents);
        let staged = std::mem::take(&mut self.staged);
        match placed {
            Ok((generation, offset)) => {
                self.fresh.keep(&mut self.unit, generation, offset);
                self.closings_logged(closings, generation);
                for (key, stream, done) in marks {
                    self.mark_logged(key, stream, done, generation);
                }
                if staged.iter().any(has_news) {
                    match sender {
                        // If a signal waits already, this news is covered by it.
                        Some(sender) => drop(sender.try_send(())),
                        None => self.news = true,
                    }
                }
                for fact in staged {
                    self.apply(fact, generation, offset);
                }
            }
            Err(why) => {
                self.unit.clear();
                // Whoever asked tells what it means; this may come many times a second.
                log::debug!("cannot store {} facts in the outbox: {why}", staged.len());
                for fact in staged {
                    fact.fact.refuse(&why);
                }
            }
        }
    }

    /// Adds what is closed and not in the log, as far as it fits.
    fn add_closings(&mut self) -> Closings {
        let room = self.log.unit_room();
        let mut added = Closings::default();
        for (key, entry, first_in) in &self.closings {
            if self.unit.records_bytes() + RECORD_HEAD_BYTES + 8 > room {
                break;
            }
            self.unit.push(*key, &Record::Closed(*entry));
            added.add(entry, *first_in);
        }
        added
    }

    fn closings_logged(&mut self, logged: Closings, generation: u64) {
        // Room-making may have logged some of them a second time, and taken them off.
        self.closings
            .retain(|(_, entry, _)| entry.order > logged.through);
        self.depend(generation, logged.first_in);
    }

    /// Brings up the log's knowledge of acknowledgements, so that a restart repeats little.
    fn add_marks(&mut self) -> Vec<(AttemptKey, Stream, u64)> {
        let room = self.log.unit_room();
        let mut added = Vec::new();
        for (key, attempt) in &self.attempts {
            for stream in Stream::ALL {
                let state = attempt.stream(stream);
                let fits = self.unit.records_bytes() + LIFE_BYTES as usize <= room;
                if state.mark.done > state.logged_done && added.len() < MARKS_MAX && fits {
                    let mark = state.mark.clone();
                    added.push((*key, stream, mark.done));
                    self.unit.push(*key, &Record::Mark { stream, mark });
                }
            }
        }
        added
    }

    pub fn mark_logged(&mut self, key: AttemptKey, stream: Stream, done: u64, generation: u64) {
        let Some(attempt) = self.attempts.get_mut(&key) else {
            return;
        };
        let first_in = attempt.first_in;
        let state = attempt.stream_mut(stream);
        state.logged_done = done;
        state.logged_in = generation;
        self.depend(generation, first_in);
    }

    pub fn depend(&mut self, generation: u64, first_in: u64) {
        if let Some(segment) = self.log.segment_mut(generation)
            && first_in < generation
        {
            segment.depends_on = segment.depends_on.min(first_in);
        }
    }

    /// Writes the unit that waits, making room if need be. Gives generation and offset.
    pub fn write_unit(&mut self, contents: Contents) -> Result<(u64, u64), StoreError> {
        let only_output = contents.only_output;
        let mut limit = match contents.any_output {
            true => self.output_limit(),
            false => self.terminal_limit(),
        };
        let mut may_use_spare = false;
        // Each turn that makes room takes a segment away, so this many are plenty.
        for _ in 0..self.log.segments.len() + TURNS_SPARE {
            let now_ms = self.now_ms();
            let room_made = match self
                .log
                .commit(&mut self.unit, limit, may_use_spare, now_ms)
            {
                Ok(placed) => {
                    // What was written may have taken the place of output that was given up.
                    if self.full_with_files != Some(self.log.files_made) {
                        self.full_since = None;
                        self.full_with_files = None;
                    }
                    self.keep_tidy();
                    return Ok(placed);
                }
                Err(CommitError::Io(why)) => return Err(io_error(&why)),
                Err(CommitError::NoRoom) => self.make_room(true)?,
                Err(CommitError::DiskFull) => {
                    let since = *self.full_since.get_or_insert_with(Instant::now);
                    let is_full = since.elapsed() >= DISK_FULL_PATIENCE;
                    if is_full {
                        self.full_with_files = Some(self.log.files_made);
                    }
                    self.make_room(is_full)?
                }
            };
            if room_made {
                continue;
            }
            // What is not output may use what is kept for it.
            if !only_output && limit < self.terminal_limit() {
                limit = self.terminal_limit();
            } else if !only_output && !may_use_spare {
                may_use_spare = true;
                limit = self.bounds.cap_bytes;
            } else {
                break;
            }
        }
        Err(StoreError::Full)
    }

    /// Segments that output may take together.
    fn output_limit(&self) -> u64 {
        let kept = self.bounds.terminal_reserve_bytes + self.log.segment_bytes;
        let least = 2 * self.log.segment_bytes;
        self.bounds.cap_bytes.saturating_sub(kept).max(least)
    }

    /// Segments that anything may take together: the spare is for copying forward.
    fn terminal_limit(&self) -> u64 {
        self.bounds.cap_bytes.saturating_sub(self.log.segment_bytes)
    }

    fn apply(&mut self, staged: Staged, generation: u64, offset: u64) {
        let key = staged.key;
        let at = Cursor::record(generation, offset + staged.at);
        match staged.fact {
            Fact::Received(identity, command, reply) => {
                let record = Record::Received {
                    identity,
                    command: &command,
                };
                let mut attempt = Attempt::unidentified(generation);
                attempt.apply(&record, at, 0);
                self.attempts.insert(key, attempt);
                answer(reply, Ok(Reception::New));
            }
            Fact::Starting(at_ms, reply) => {
                self.apply_record(key, &Record::Starting { at_ms }, at);
                answer(reply, Ok(Start::Go));
            }
            Fact::Output(stream, first_sequence, batch, reply) => {
                self.apply_output(key, stream, first_sequence, &batch, generation, offset);
                answer(reply, Ok(batch));
            }
            Fact::Final {
                ending,
                fin,
                done_at,
                reply,
            } => {
                let record = Record::Final {
                    ending,
                    output: tail(&fin.output),
                    error: tail(&fin.error),
                };
                self.apply_record(key, &record, at);
                if let Some(done_at) = done_at {
                    let at = Cursor::record(generation, offset + done_at);
                    self.apply_record(key, &Record::Done { dropped: false }, at);
                }
                answer_if(reply, Ok(()));
            }
            Fact::Rejected(stream, sequence, done, reply) => {
                let record = Record::Rejected { stream, sequence };
                self.count_drops(key, &record);
                self.apply_record(key, &record, at);
                self.mark_logged(key, stream, done, generation);
                answer(reply, Ok(()));
            }
            Fact::Plain(record, reply) => {
                self.count_drops(key, &record);
                self.apply_record(key, &record, at);
                answer(reply, Ok(()));
            }
        }
    }

    pub fn apply_record(&mut self, key: AttemptKey, record: &Record<'_>, at: Cursor) {
        let wall_ms = self.now_ms();
        let Some(attempt) = self.attempts.get_mut(&key) else {
            return;
        };
        attempt.apply(record, at, wall_ms);
        let first_in = attempt.first_in;
        self.depend(at.generation, first_in);
        self.close_if_done(key);
    }

    fn apply_output(
        &mut self,
        key: AttemptKey,
        stream: Stream,
        first_sequence: u64,
        batch: &ChunkBatch,
        generation: u64,
        offset: u64,
    ) {
        let (Some(attempt), Some(segment)) = (
            self.attempts.get_mut(&key),
            self.log.segment_mut(generation),
        ) else {
            return;
        };
        for (sequence, chunk) in (first_sequence..).zip(batch) {
            attempt.stream_mut(stream).stored(sequence);
            segment.note_chunk(key, stream, sequence, chunk.len() as u64, offset);
        }
    }

    fn count_drops(&mut self, key: AttemptKey, record: &Record<'_>) {
        let Some(attempt) = self.attempts.get(&key) else {
            return;
        };
        let mut chunks = 0;
        match record {
            Record::Done { dropped: true } => self.tally.finals_dropped += 1,
            Record::Discarded => {
                self.tally.attempts_discarded += 1;
                chunks = attempt.streams.iter().map(|stream| stream.waiting()).sum();
            }
            Record::Truncated { stream, .. } => {
                chunks = attempt.stream(*stream).waiting();
                self.tally.streams_truncated += 1;
            }
            Record::Rejected { .. } => chunks = 1,
            _ => {}
        }
        self.tally.chunks_dropped += chunks;
        let why = match record {
            Record::Discarded => "the server discarded the attempt",
            Record::Truncated { .. } => "the server never takes the stream",
            Record::Rejected { .. } => "the server refused it",
            _ => return,
        };
        if chunks > 0 {
            let ids = &attempt.ids;
            log::warn!("task {ids}: {chunks} chunks of output dropped from the outbox: {why}");
        }
    }

    // ---- side units ---------------------------------------------------------------------------

    /// Puts into the side unit all that is known and not in the log: closings, and the states of
    /// these streams. Gives what [`Engine::side_logged`] wants to know.
    pub fn add_unlogged(&mut self, streams: &[(AttemptKey, Stream)]) -> Unlogged {
        let mut closings = Closings::default();
        for (key, entry, first_in) in &self.closings {
            self.side.push(*key, &Record::Closed(*entry));
            closings.add(entry, *first_in);
        }
        let mut marks = Vec::new();
        for &(key, stream) in streams {
            if let Some(attempt) = self.attempts.get(&key) {
                let mark = attempt.stream(stream).mark.clone();
                marks.push((key, stream, mark.done));
                self.side.push(key, &Record::Mark { stream, mark });
            }
        }
        Unlogged { closings, marks }
    }

    /// Makes the side unit durable. It makes room, so it may always begin one segment, also over
    /// the cap.
    pub fn commit_side(&mut self, unlogged: Unlogged) -> Result<(u64, u64), StoreError> {
        if self.side.is_empty() {
            return Ok((0, 0));
        }
        let now_ms = self.now_ms();
        let placed = self.log.commit(&mut self.side, u64::MAX, true, now_ms);
        self.side.clear();
        match placed {
            Ok((generation, offset)) => {
                self.closings_logged(unlogged.closings, generation);
                for (key, stream, done) in unlogged.marks {
                    self.mark_logged(key, stream, done, generation);
                }
                Ok((generation, offset))
            }
            Err(CommitError::Io(why)) => Err(io_error(&why)),
            Err(CommitError::NoRoom | CommitError::DiskFull) => Err(StoreError::Full),
        }
    }
}

impl Fact {
    fn refuse(self, why: &StoreError) {
        let why = why.clone();
        match self {
            Fact::Received(_, _, reply) => answer(reply, Err(why)),
            Fact::Starting(_, reply) => answer(reply, Err(why)),
            Fact::Output(_, _, batch, reply) => answer(reply, Err((batch, why))),
            Fact::Final { fin, reply, .. } => answer_if(reply, Err((fin, why))),
            Fact::Rejected(.., reply) | Fact::Plain(_, reply) => answer(reply, Err(why)),
        }
    }
}
