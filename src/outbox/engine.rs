//! The outbox without a thread: facts in, durable records out.
//!
//! A fact is first staged: checked against what is known and encoded into the unit. [`Engine::commit`]
//! makes the unit durable and only then applies what it says and answers. So nothing is ever
//! known here that is not on disk, acknowledgements excepted. A fact that touches what is already
//! staged has to wait for the commit of that; [`Engine::make_way`] sees to it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use super::attempts::Attempt;
use super::handle::{AppendError, FinishError, Reply};
use super::index::Index;
use super::log::{CommitError, Log};
use super::opening::put_clean_mark;
use super::record::{Ending, Entry, Identity, RECORD_HEAD_BYTES, Record, UnitBuffer};
use super::segment::SegmentReader;
use super::types::*;
use crate::ids::{AttemptKey, FinalStatus, Ids, Stream};
use crate::limits::{
    ChunkBatch, DISK_FULL_PATIENCE, FINAL_OUTPUT_BYTES_MAX, OPEN_ATTEMPTS_MAX, STORAGE_QUEUE,
};

/// Room for the parts of a final apart from its texts, and for the other records of a life.
const LIFE_BYTES: u64 = 1024;
/// Attempts to make room for one unit, beyond one for each segment.
const TURNS_SPARE: usize = 8;
/// Stream states that one unit brings up at the begin of a segment.
const MARKS_MAX: usize = 32;

/// Bounds of one store.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub cap_bytes: u64,
    pub terminal_reserve_bytes: u64,
    pub final_output_bytes: usize,
}

/// Figures since the start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub chunks_dropped: u64,
    pub bytes_dropped: u64,
    pub streams_truncated: u64,
    pub finals_dropped: u64,
    pub attempts_discarded: u64,
    pub records_damaged: u64,
    pub index_rebuilt: bool,
}

/// A fact that is encoded and not yet durable.
struct Staged {
    key: AttemptKey,
    /// Distance of its first record from the begin of the unit.
    at: u64,
    fact: Fact,
}

enum Fact {
    Received(Identity, Vec<u8>, Reply<Result<Reception, StoreError>>),
    Starting(u64, Reply<Result<Start, StoreError>>),
    Output(
        Stream,
        u64,
        ChunkBatch,
        Reply<Result<ChunkBatch, AppendError>>,
    ),
    Final(Ending, Final, Option<Reply<Result<(), FinishError>>>),
    Plain(Record<'static>, Reply<Result<(), StoreError>>),
}

pub(super) struct Engine {
    pub log: Log,
    pub index: Box<dyn Index>,
    pub attempts: HashMap<AttemptKey, Attempt>,
    pub bounds: Bounds,
    pub tally: Tally,
    pub next_arrival: u64,
    next_order: u64,
    unit: UnitBuffer,
    staged: Vec<Staged>,
    /// Unit of the space keeper, so that it can write while another unit waits.
    pub side: UnitBuffer,
    /// Attempts that were closed and whose closing is not in the log; the next unit takes them.
    closings: Vec<(AttemptKey, Entry, u64)>,
    pub reading: Option<(u64, SegmentReader)>,
    pub window: Vec<u8>,
    /// Since when the file system has had no room.
    full_since: Option<Instant>,
    clock_ms: fn() -> u64,
    /// Something to send was committed since this was last taken.
    pub news: bool,
    /// The file that says that the store was closed cleanly; `None` in memory.
    pub clean_mark: Option<PathBuf>,
}

impl Engine {
    pub fn new(
        log: Log,
        index: Box<dyn Index>,
        attempts: HashMap<AttemptKey, Attempt>,
        bounds: Bounds,
        clock_ms: fn() -> u64,
    ) -> Engine {
        let arrivals = attempts.values().map(|attempt| attempt.arrival);
        let next_arrival = arrivals.max().unwrap_or(0).saturating_add(1);
        let next_order = index.last_order() + 1;
        Engine {
            log,
            index,
            attempts,
            bounds,
            tally: Tally::default(),
            next_arrival,
            next_order,
            unit: UnitBuffer::default(),
            staged: Vec::new(),
            side: UnitBuffer::default(),
            closings: Vec::new(),
            reading: None,
            window: Vec::new(),
            full_since: None,
            clock_ms,
            news: false,
            clean_mark: None,
        }
    }

    pub fn now_ms(&self) -> u64 {
        (self.clock_ms)()
    }

    // ---- facts --------------------------------------------------------------------------------

    pub fn receive(&mut self, receipt: Receipt, reply: Reply<Result<Reception, StoreError>>) {
        let key = receipt.ids.key();
        self.make_way(key, None);
        let known = match self.known_phase(key) {
            Ok(None) => self.check_room_for(&receipt).map(|()| None),
            other => other,
        };
        match known {
            Ok(None) => {}
            Ok(Some(phase)) => return answer(reply, Ok(Reception::Known(phase))),
            Err(why) => return answer(reply, Err(why)),
        }
        let identity = Identity {
            ids: receipt.ids,
            arrival: self.next_arrival,
            priority: receipt.priority,
            timeout_seconds: receipt.timeout_seconds,
            received_at_ms: receipt.received_at_ms,
            started_at_ms: 0,
        };
        self.next_arrival += 1;
        let record = Record::Received {
            identity: identity.clone(),
            command: &receipt.command,
        };
        let at = self.encode(key, &record, receipt.command.len());
        self.staged.push(Staged {
            key,
            at,
            fact: Fact::Received(identity, receipt.command, reply),
        });
    }

    pub fn start(&mut self, key: AttemptKey, at_ms: u64, reply: Reply<Result<Start, StoreError>>) {
        self.make_way(key, None);
        match self.known_phase(key) {
            Ok(Some(Phase::Received)) => {}
            Ok(Some(phase)) => return answer(reply, Ok(Start::Refused(phase))),
            Ok(None) => return answer(reply, Err(StoreError::Unknown)),
            Err(why) => return answer(reply, Err(why)),
        }
        let at_ms = at_ms.max(1);
        let at = self.encode(key, &Record::Starting { at_ms }, 0);
        self.staged.push(Staged {
            key,
            at,
            fact: Fact::Starting(at_ms, reply),
        });
    }

    pub fn append(
        &mut self,
        key: AttemptKey,
        stream: Stream,
        first_sequence: u64,
        batch: ChunkBatch,
        reply: Reply<Result<ChunkBatch, AppendError>>,
    ) {
        self.make_way(key, Some(stream));
        let verdict = match self.attempts.get(&key) {
            Some(attempt) if !attempt.sends() => Ok(false),
            Some(attempt) if attempt.phase() == Phase::Started => {
                let last = attempt.stream(stream).mark.last;
                match first_sequence == last + 1 {
                    true => Ok(!batch.is_empty()),
                    false => Err(StoreError::Sequence { last }),
                }
            }
            Some(_) => Err(StoreError::Unknown),
            None => match self.index_entry(key) {
                Ok(Some(entry)) if entry.discarded => Ok(false),
                Ok(_) => Err(StoreError::Unknown),
                Err(why) => Err(why),
            },
        };
        match verdict {
            Ok(true) => {}
            Ok(false) => return answer(reply, Ok(batch)),
            Err(why) => return answer(reply, Err((batch, why))),
        }
        let payload = batch.iter().map(|chunk| chunk.len() + RECORD_HEAD_BYTES);
        self.make_fit(payload.sum());
        let at = self.unit.records_bytes() as u64;
        for (sequence, chunk) in (first_sequence..).zip(&batch) {
            let record = Record::Output {
                stream,
                sequence,
                data: chunk,
            };
            self.unit.push(key, &record);
        }
        self.staged.push(Staged {
            key,
            at,
            fact: Fact::Output(stream, first_sequence, batch, reply),
        });
    }

    pub fn finish(
        &mut self,
        key: AttemptKey,
        fin: Final,
        reply: Option<Reply<Result<(), FinishError>>>,
    ) {
        self.make_way(key, None);
        let Some(attempt) = self.attempts.get_mut(&key) else {
            let verdict = match self.index_entry(key) {
                // The first final wins, and that of a discarded attempt is thrown away.
                Ok(Some(_)) => Ok(()),
                Ok(None) => Err((fin, StoreError::Unknown)),
                Err(why) => Err((fin, why)),
            };
            return answer_if(reply, verdict);
        };
        if attempt.discarded {
            // Nothing runs any more. That needs no record: after a restart nothing runs either.
            attempt.started = false;
            self.close_if_done(key);
            return answer_if(reply, Ok(()));
        }
        if attempt.fin.is_some() {
            return answer_if(reply, Ok(()));
        }
        let ending = Ending {
            status: fin.status,
            exit_code: fin.exit_code,
            output_truncated: fin.output_truncated,
            error_truncated: fin.error_truncated,
            last: Stream::ALL.map(|stream| attempt.stream(stream).mark.last),
        };
        let record = Record::Final {
            ending,
            output: tail(&fin.output),
            error: tail(&fin.error),
        };
        let at = self.encode(key, &record, fin.output.len() + fin.error.len());
        self.staged.push(Staged {
            key,
            at,
            fact: Fact::Final(ending, fin, reply),
        });
    }

    /// The final is done: reported, or dropped.
    pub fn final_done(
        &mut self,
        key: AttemptKey,
        dropped: bool,
        reply: Reply<Result<(), StoreError>>,
    ) {
        self.make_way(key, None);
        match self.attempts.get(&key) {
            Some(attempt) if attempt.awaits_final() => answer(reply, Err(StoreError::Unknown)),
            // An acknowledgement is not durable by itself, but this is.
            Some(attempt) if attempt.done_in == 0 && !attempt.discarded => {
                let dropped = dropped && attempt.final_waits();
                self.stage_plain(key, Record::Done { dropped }, reply);
            }
            None if self.closings.iter().any(|(closed, ..)| *closed == key) => {
                self.commit();
                let unlogged = self.add_unlogged(&[]);
                let stored = self.commit_side(unlogged);
                answer(reply, stored.map(drop));
            }
            Some(_) | None => answer(reply, Ok(())),
        }
    }

    pub fn discard(&mut self, key: AttemptKey, reply: Reply<Result<(), StoreError>>) {
        self.make_way(key, None);
        match self.attempts.get(&key) {
            Some(attempt) if !attempt.discarded => {
                self.stage_plain(key, Record::Discarded, reply);
            }
            _ => answer(reply, Ok(())),
        }
    }

    pub fn give_up_stream(
        &mut self,
        key: AttemptKey,
        stream: Stream,
        reply: Reply<Result<(), StoreError>>,
    ) {
        self.make_way(key, None);
        match self.attempts.get(&key) {
            Some(attempt) if attempt.stream(stream).waiting() > 0 => {
                let through = attempt.stream(stream).mark.last;
                self.stage_plain(key, Record::Truncated { stream, through }, reply);
            }
            _ => answer(reply, Ok(())),
        }
    }

    pub fn reject(&mut self, key: AttemptKey, piece: Piece, reply: Reply<Result<(), StoreError>>) {
        let (stream, sequence) = match piece {
            Piece::Output { stream, sequence } => (stream, sequence),
            Piece::Final => return self.final_done(key, true, reply),
        };
        self.make_way(key, None);
        match self.attempts.get(&key) {
            Some(attempt) if attempt.stream(stream).waits(sequence) => {
                self.stage_plain(key, Record::Rejected { stream, sequence }, reply);
            }
            _ => answer(reply, Ok(())),
        }
    }

    /// Takes effect at once; it reaches the log with a later commit, or never.
    pub fn acknowledge(&mut self, ack: Ack) {
        let key = match ack {
            Ack::Output { key, .. } | Ack::Final { key } => key,
        };
        let Some(attempt) = self.attempts.get_mut(&key) else {
            return;
        };
        match ack {
            Ack::Output {
                stream,
                sequence,
                cumulative,
                ..
            } => {
                let state = attempt.stream_mut(stream);
                match cumulative {
                    true => state.acknowledge_through(sequence),
                    false => state.acknowledge(sequence),
                }
            }
            Ack::Final { .. } => attempt.final_done |= attempt.fin.is_some(),
        }
        self.close_if_done(key);
    }

    /// Takes over that an attempt was done elsewhere, so that it never runs here.
    pub fn remember(&mut self, key: AttemptKey, discarded: bool, fin: (FinalStatus, i32)) {
        let first_in = self
            .attempts
            .remove(&key)
            .map_or(u64::MAX, |open| open.first_in);
        self.close_attempt(key, discarded, fin, first_in);
    }

    // ---- staging ------------------------------------------------------------------------------

    /// Commits first if something staged concerns the same attempt, or the same stream of it.
    fn make_way(&mut self, key: AttemptKey, stream: Option<Stream>) {
        let conflicts = self.staged.iter().any(|staged| {
            staged.key == key
                && match (&staged.fact, stream) {
                    (Fact::Output(other, ..), Some(stream)) => *other == stream,
                    _ => true,
                }
        });
        if conflicts || self.staged.len() >= STORAGE_QUEUE {
            self.commit();
        }
    }

    /// Commits first if the unit would not fit into the segment with so many bytes more.
    fn make_fit(&mut self, bytes: usize) {
        let room = self.log.unit_room();
        if !self.unit.is_empty() && self.unit.records_bytes() + bytes > room {
            self.commit();
        }
    }

    fn encode(&mut self, key: AttemptKey, record: &Record<'_>, payload: usize) -> u64 {
        self.make_fit(payload + LIFE_BYTES as usize);
        self.unit.push(key, record)
    }

    fn stage_plain(
        &mut self,
        key: AttemptKey,
        record: Record<'static>,
        reply: Reply<Result<(), StoreError>>,
    ) {
        let at = self.encode(key, &record, 0);
        self.staged.push(Staged {
            key,
            at,
            fact: Fact::Plain(record, reply),
        });
    }

    pub fn known_phase(&mut self, key: AttemptKey) -> Result<Option<Phase>, StoreError> {
        if let Some(attempt) = self.attempts.get(&key) {
            return Ok(Some(attempt.phase()));
        }
        Ok(self.index_entry(key)?.map(|entry| match entry.discarded {
            true => Phase::Discarded,
            false => Phase::Finished { held: false },
        }))
    }

    pub fn index_entry(&mut self, key: AttemptKey) -> Result<Option<Entry>, StoreError> {
        let entry = self.index.get(key);
        self.mend_index();
        entry.map_err(|why| StoreError::Io(format!("reading the index failed: {why}")))
    }

    fn check_room_for(&mut self, receipt: &Receipt) -> Result<(), StoreError> {
        let staged = self.staged.iter().filter_map(|staged| match &staged.fact {
            Fact::Received(_, command, _) => Some(self.life_bytes(command.len() as u64)),
            _ => None,
        });
        let (mut open, mut needed) = (0, 0);
        for bytes in staged {
            open += 1;
            needed += bytes;
        }
        needed += self.needed_bytes() + self.life_bytes(receipt.command.len() as u64);
        // One segment is the spare, one is being written, one is lost to fragments.
        let room = self
            .bounds
            .cap_bytes
            .saturating_sub(3 * self.log.segment_bytes);
        let full = open + self.attempts.len() >= OPEN_ATTEMPTS_MAX || needed > room;
        match full || self.index.is_backed_up() {
            true => Err(StoreError::Full),
            false => Ok(()),
        }
    }

    /// What one attempt may come to need, its output apart.
    fn life_bytes(&self, command_bytes: u64) -> u64 {
        command_bytes + 2 * self.bounds.final_output_bytes as u64 + LIFE_BYTES
    }

    /// What all open attempts need or may come to need, their output apart.
    fn needed_bytes(&self) -> u64 {
        let needs = |attempt: &Attempt| match attempt.fin {
            Some(_) if attempt.final_done => LIFE_BYTES,
            Some(fin) => fin.text_bytes + LIFE_BYTES,
            None => self.life_bytes(attempt.command_bytes),
        };
        self.attempts.values().map(needs).sum()
    }

    // ---- commit -------------------------------------------------------------------------------

    /// Makes durable what is staged, applies it and answers.
    pub fn commit(&mut self) {
        if self.staged.is_empty() {
            return;
        }
        let closings = self.add_closings();
        let marks = match self.log.fits_active(self.unit.records_bytes()) {
            true => Vec::new(),
            false => self.add_marks(),
        };
        let placed = self.write_unit();
        self.unit.clear();
        let staged = std::mem::take(&mut self.staged);
        match placed {
            Ok((generation, offset)) => {
                self.closings_logged(closings, generation);
                for (key, stream, done) in marks {
                    self.mark_logged(key, stream, done, generation);
                }
                for fact in staged {
                    self.apply(fact, generation, offset);
                }
            }
            Err(why) => {
                log::warn!("cannot store {} facts in the outbox: {why}", staged.len());
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

    /// Writes the staged unit, making room if need be.
    fn write_unit(&mut self) -> Result<(u64, u64), StoreError> {
        let has_output = |staged: &Staged| matches!(staged.fact, Fact::Output(..));
        let only_output = self.staged.iter().all(has_output);
        let mut limit = match self.staged.iter().any(has_output) {
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
                    self.full_since = None;
                    self.keep_tidy();
                    return Ok(placed);
                }
                Err(CommitError::Io(why)) => return Err(io_error(&why)),
                Err(CommitError::NoRoom) => self.make_room(true)?,
                Err(CommitError::DiskFull) => {
                    let since = *self.full_since.get_or_insert_with(Instant::now);
                    self.make_room(since.elapsed() >= DISK_FULL_PATIENCE)?
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
            Fact::Final(ending, fin, reply) => {
                let record = Record::Final {
                    ending,
                    output: tail(&fin.output),
                    error: tail(&fin.error),
                };
                self.apply_record(key, &record, at);
                self.news = true;
                answer_if(reply, Ok(()));
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
        self.news = true;
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
        log::warn!(
            "attempt {}: {chunks} chunks dropped from the outbox ({record:?})",
            attempt.ids
        );
    }

    // ---- closing ------------------------------------------------------------------------------

    pub fn close_if_done(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get(&key) else {
            return;
        };
        if attempt.is_closed() {
            let fin = attempt
                .fin
                .map(|fin| (fin.ending.status, fin.ending.exit_code));
            let (discarded, first_in) = (attempt.discarded, attempt.first_in);
            self.attempts.remove(&key);
            self.close_attempt(
                key,
                discarded,
                fin.unwrap_or((FinalStatus::Interrupted, -1)),
                first_in,
            );
        }
    }

    fn close_attempt(
        &mut self,
        key: AttemptKey,
        discarded: bool,
        fin: (FinalStatus, i32),
        first_in: u64,
    ) {
        let entry = Entry {
            order: self.next_order,
            discarded,
            status: fin.0,
            exit_code: fin.1,
        };
        self.next_order += 1;
        self.closings.push((key, entry, first_in));
        self.index.put(key, entry);
        self.mend_index();
    }

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

    /// Makes durable what is known and not in the log.
    pub fn store_memory(&mut self) -> Result<(), StoreError> {
        self.commit();
        let mut streams = Vec::new();
        for (key, attempt) in &self.attempts {
            for stream in Stream::ALL {
                let state = attempt.stream(stream);
                if state.mark.done > state.logged_done {
                    streams.push((*key, stream));
                }
            }
        }
        let unlogged = self.add_unlogged(&streams);
        self.commit_side(unlogged)?;
        self.flush_index()
    }

    /// The last call: leaves the store so that the next start trusts it.
    pub fn close(&mut self, counts: &Counts) -> Result<(), StoreError> {
        self.store_memory()?;
        match &self.clean_mark {
            Some(path) => put_clean_mark(path, counts).map_err(|why| io_error(&why)),
            None => Ok(()),
        }
    }

    pub fn incarnation(&self) -> String {
        String::from_utf8_lossy(&self.log.incarnation).into_owned()
    }

    pub fn ids_of(&self, key: AttemptKey) -> Option<&Ids> {
        self.attempts.get(&key).map(|attempt| &*attempt.ids)
    }
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

impl Fact {
    fn refuse(self, why: &StoreError) {
        let why = why.clone();
        match self {
            Fact::Received(_, _, reply) => answer(reply, Err(why)),
            Fact::Starting(_, reply) => answer(reply, Err(why)),
            Fact::Output(_, _, batch, reply) => answer(reply, Err((batch, why))),
            Fact::Final(_, fin, reply) => answer_if(reply, Err((fin, why))),
            Fact::Plain(_, reply) => answer(reply, Err(why)),
        }
    }
}

pub(super) fn io_error(why: &std::io::Error) -> StoreError {
    StoreError::Io(why.to_string())
}

/// What is kept of a text that is longer than any setting allows.
fn tail(text: &[u8]) -> &[u8] {
    &text[text.len().saturating_sub(FINAL_OUTPUT_BYTES_MAX)..]
}

pub(super) fn answer<T>(reply: Reply<T>, value: T) {
    // Who asked may have gone away: then nobody wants to know.
    let _ = reply.try_send(value);
}

fn answer_if<T>(reply: Option<Reply<T>>, value: T) {
    if let Some(reply) = reply {
        answer(reply, value);
    }
}
