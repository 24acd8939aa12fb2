//! The outbox without a thread: facts in, durable records out.
//!
//! A fact is first staged: checked against what is known and encoded into the unit. [`Engine::commit`]
//! makes the unit durable and only then applies what it says and answers. So nothing is ever
//! known here that is not on disk, acknowledgements excepted. A fact that touches what is already
//! staged has to wait for the commit of that; [`Engine::make_way`] sees to it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use super::ahead::Ahead;
use super::attempts::Attempt;
use super::commit::Staged;
use super::fresh::Fresh;
use super::handle::Reply;
use super::index::Index;
use super::log::Log;
use super::opening::put_clean_mark;
use super::record::Entry;
use super::segment::SegmentReader;
use super::types::*;
use super::unit::UnitBuffer;
use crate::ids::{AttemptKey, FinalStatus, Ids, Incarnation, Stream};
use crate::limits::FINAL_OUTPUT_BYTES_MAX;

/// Room for the parts of a final apart from its texts, and for the other records of a life.
pub(super) const LIFE_BYTES: u64 = 1024;

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

impl Tally {
    /// Counts on with what another store has counted in the same life of the agent.
    pub fn add(&mut self, other: &Tally) {
        self.chunks_dropped += other.chunks_dropped;
        self.bytes_dropped += other.bytes_dropped;
        self.streams_truncated += other.streams_truncated;
        self.finals_dropped += other.finals_dropped;
        self.attempts_discarded += other.attempts_discarded;
    }
}

pub(super) struct Engine {
    /// Before the log, whose disk holds the lock of the folder: that is let go last.
    pub index: Box<dyn Index>,
    pub log: Log,
    pub attempts: HashMap<AttemptKey, Attempt>,
    pub bounds: Bounds,
    pub tally: Tally,
    pub next_arrival: u64,
    pub next_order: u64,
    pub unit: UnitBuffer,
    pub staged: Vec<Staged>,
    /// Unit of the space keeper, so that it can write while another unit waits.
    pub side: UnitBuffer,
    /// Attempts that were closed and whose closing is not in the log; the next unit takes them.
    pub closings: Vec<(AttemptKey, Entry, u64)>,
    pub reading: Option<(u64, SegmentReader)>,
    pub window: Vec<u8>,
    pub fresh: Fresh,
    pub ahead: Ahead,
    /// Since when the file system has had no room.
    pub full_since: Option<Instant>,
    /// [`Log::files_made`] when output was given up because the file system had no room: it is
    /// full until one more can be made, and not waited for again.
    pub full_with_files: Option<u64>,
    clock_ms: fn() -> u64,
    /// Something to send was committed since this was last taken.
    pub news: bool,
    /// The file that says that the store was closed cleanly; `None` in memory.
    pub clean_mark: Option<PathBuf>,
    /// In memory: what the store on disk says, which can be read and not be written.
    pub frozen: Option<Box<Engine>>,
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
            fresh: Fresh::default(),
            ahead: Ahead::default(),
            full_since: None,
            full_with_files: None,
            clock_ms,
            news: false,
            clean_mark: None,
            frozen: None,
        }
    }

    pub fn now_ms(&self) -> u64 {
        (self.clock_ms)()
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

    /// As [`Engine::known_phase`], of an attempt that this store or the one that cannot be written
    /// knows. What waits in that one is told when it can be: until then its attempts are received
    /// here, and no more. A final that nothing goes before is told again on request.
    pub fn phase_anywhere(&mut self, key: AttemptKey) -> Result<Option<Phase>, StoreError> {
        let known = self.known_phase(key)?;
        let Some(frozen) = self.frozen.as_mut().filter(|_| known.is_none()) else {
            return Ok(known);
        };
        let output_waits = frozen.attempts.get(&key).is_some_and(Attempt::output_waits);
        Ok(frozen.known_phase(key)?.map(|phase| match phase {
            Phase::Finished { .. } if !output_waits => Phase::Finished { held: false },
            Phase::Discarded => Phase::Discarded,
            Phase::Received | Phase::Started | Phase::Finished { .. } => Phase::Received,
        }))
    }

    pub fn index_entry(&mut self, key: AttemptKey) -> Result<Option<Entry>, StoreError> {
        let entry = self.index.get(key);
        self.mend_index();
        entry.map_err(|why| StoreError::Io(format!("reading the index failed: {why}")))
    }

    pub fn close_if_done(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get(&key) else {
            return;
        };
        if attempt.is_closed() {
            let ending = attempt.fin.map(|fin| fin.ending);
            let entry = Entry {
                order: 0,
                discarded: attempt.discarded,
                status: ending.map_or(FinalStatus::Interrupted, |ending| ending.status),
                exit_code: ending.map_or(-1, |ending| ending.exit_code),
                born: attempt.born,
            };
            let first_in = attempt.first_in;
            self.attempts.remove(&key);
            self.close_attempt(key, entry, first_in);
        }
    }

    /// Puts an attempt among those that are done; its order is the next one.
    pub fn close_attempt(&mut self, key: AttemptKey, entry: Entry, first_in: u64) {
        let entry = Entry {
            order: self.next_order,
            ..entry
        };
        self.next_order += 1;
        self.closings.push((key, entry, first_in));
        self.index.put(key, entry);
        self.mend_index();
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

    pub fn incarnation(&self) -> Incarnation {
        self.log.incarnation
    }

    pub fn ids_of(&self, key: AttemptKey) -> Option<&Ids> {
        self.attempts.get(&key).map(|attempt| &*attempt.ids)
    }
}

pub(super) fn io_error(why: &std::io::Error) -> StoreError {
    StoreError::Io(why.to_string())
}

/// What is kept of a text that is longer than any setting allows.
pub(super) fn tail(text: &[u8]) -> &[u8] {
    &text[text.len().saturating_sub(FINAL_OUTPUT_BYTES_MAX)..]
}

pub(super) fn answer<T>(reply: Reply<T>, value: T) {
    // Who asked may have gone away: then nobody wants to know.
    let _ = reply.try_send(value);
}

pub(super) fn answer_if<T>(reply: Option<Reply<T>>, value: T) {
    if let Some(reply) = reply {
        answer(reply, value);
    }
}
