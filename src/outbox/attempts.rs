//! What is known of the attempts that are still open, and how records change it.
//!
//! An attempt is open until it is finished, its final is done and none of its output waits; or
//! until it is discarded and does not run. States only move forward, whatever the order in which
//! recovery meets the records (received < started < finished), so that a copy of an older record
//! never turns one back.

use std::sync::Arc;

use super::record::{Ending, Identity, LOST_RANGES_MAX, Mark, Record};
use super::types::{Cursor, Phase};
use crate::ids::{Id, Ids, Incarnation, Stream};
use crate::limits::ACK_SPAN;

/// Sequences above the watermark that can be acknowledged one by one.
const BITS: u64 = ACK_SPAN;
const _: () = assert!(BITS <= u64::BITS as u64);

/// One stream of an open attempt.
#[derive(Debug, Clone, Default)]
pub(super) struct StreamState {
    pub mark: Mark,
    /// `mark.done` when it was last written to the log …
    pub logged_done: u64,
    /// … and the segment that holds the latest record of this state; 0: none.
    pub logged_in: u64,
}

impl StreamState {
    /// Chunks that were stored and are neither acknowledged nor lost.
    pub fn waiting(&self) -> u64 {
        let mark = &self.mark;
        let above = mark.lost.iter().filter(|(from, _)| *from > mark.done);
        let lost: u64 = above.map(|(from, to)| to - from + 1).sum();
        (mark.last - mark.done).saturating_sub(u64::from(mark.bits.count_ones()) + lost)
    }

    /// Whether this chunk is to be sent.
    pub fn waits(&self, sequence: u64) -> bool {
        sequence > self.mark.done
            && sequence <= self.mark.last
            && !self.bit(sequence)
            && !self.is_lost(sequence)
    }

    /// First and last chunk that wait.
    pub fn range(&self) -> Option<(u64, u64)> {
        let mark = &self.mark;
        let mut last = mark.last;
        while last > mark.done && !self.waits(last) {
            let lost = mark
                .lost
                .iter()
                .find(|(from, to)| (*from..=*to).contains(&last));
            last = lost.map_or(last, |(from, _)| *from) - 1;
        }
        // The watermark stands right below the first one that waits.
        (last > mark.done).then_some((mark.done + 1, last))
    }

    fn bit(&self, sequence: u64) -> bool {
        let above = sequence.wrapping_sub(self.mark.done + 1);
        above < BITS && self.mark.bits >> above & 1 != 0
    }

    fn is_lost(&self, sequence: u64) -> bool {
        let covers = |(from, to): &(u64, u64)| (*from..=*to).contains(&sequence);
        self.mark.lost.iter().any(covers)
    }

    /// Whether the chunk before this one was lost.
    pub fn after_hole(&self, sequence: u64) -> bool {
        self.is_lost(sequence - 1)
    }

    /// A chunk was stored. If it does not follow the last one, those between are lost.
    pub fn stored(&mut self, sequence: u64) {
        if sequence > self.mark.last {
            let missing = self.mark.last + 1;
            self.mark.last = sequence;
            if missing < sequence {
                self.lose(missing, sequence - 1);
            }
        }
    }

    /// The server has this chunk.
    pub fn acknowledge(&mut self, sequence: u64) {
        if self.waits(sequence) {
            let above = sequence - self.mark.done - 1;
            if above < BITS {
                self.mark.bits |= 1 << above;
                self.advance();
            }
        }
    }

    /// The server has all up to here. Clamped to what was stored.
    pub fn acknowledge_through(&mut self, sequence: u64) {
        let through = sequence.min(self.mark.last);
        if through > self.mark.done {
            self.move_to(through);
            self.advance();
        }
    }

    /// These were never acknowledged and are not held any more.
    pub fn lose(&mut self, from: u64, to: u64) {
        let (mut from, mut to) = (from.max(self.mark.done + 1), to);
        if from > to {
            return;
        }
        let mark = &mut self.mark;
        mark.truncated = true;
        if mark.lost.len() >= LOST_RANGES_MAX {
            // The two eldest become one, and what waits between them is lost as well.
            let second = mark.lost.remove(1);
            mark.lost[0].1 = second.1;
        }
        mark.lost.retain(|&(other_from, other_to)| {
            let touches = other_from <= to + 1 && from <= other_to + 1;
            if touches {
                from = from.min(other_from);
                to = to.max(other_to);
            }
            !touches
        });
        mark.lost.push((from, to));
        mark.lost.sort_unstable();
        for bit in 0..BITS {
            let sequence = mark.done + 1 + bit;
            if mark
                .lost
                .iter()
                .any(|(from, to)| (*from..=*to).contains(&sequence))
            {
                mark.bits &= !(1 << bit);
            }
        }
        self.advance();
    }

    /// The mark that the stream has once these are lost.
    pub fn mark_without(&self, from: u64, to: u64) -> Mark {
        let mut state = self.clone();
        state.lose(from, to);
        state.mark
    }

    /// What waits outside of these ranges, which are sorted, is lost.
    pub fn keep_only(&mut self, held: &[(u64, u64)]) {
        let mut next = self.mark.done + 1;
        let mut gaps = Vec::new();
        for &(from, to) in held {
            if next < from {
                gaps.push((next, from - 1));
            }
            next = next.max(to + 1);
        }
        gaps.push((next, self.mark.last));
        for (from, to) in gaps {
            let to = to.min(self.mark.last);
            if self.waits_between(from, to) {
                self.lose(from, to);
            }
        }
    }

    fn waits_between(&self, from: u64, to: u64) -> bool {
        let from = from.max(self.mark.done + 1);
        if from > to {
            return false;
        }
        let inside = |sequence: u64| (from..=to).contains(&sequence);
        let acknowledged = (0..BITS)
            .filter(|bit| self.mark.bits >> bit & 1 != 0 && inside(self.mark.done + 1 + bit))
            .count() as u64;
        let lost = self.mark.lost.iter().map(|&(first, last)| {
            let (first, last) = (first.max(from), last.min(to));
            (last + 1).saturating_sub(first)
        });
        acknowledged + lost.sum::<u64>() < to - from + 1
    }

    fn move_to(&mut self, done: u64) {
        let shift = done - self.mark.done;
        self.mark.bits = if shift < BITS {
            self.mark.bits >> shift
        } else {
            0
        };
        self.mark.done = done;
    }

    /// Moves the watermark over what is gone above it, and forgets ranges that no chunk follows.
    fn advance(&mut self) {
        loop {
            let next = self.mark.done + 1;
            if self.mark.bits & 1 != 0 {
                self.move_to(next);
                continue;
            }
            let lost = &self.mark.lost;
            match lost.iter().find(|(from, to)| (*from..=*to).contains(&next)) {
                Some(&(_, to)) => self.move_to(to),
                None => break,
            }
        }
        let mark = &mut self.mark;
        mark.last = mark.last.max(mark.done);
        // A range that ends at the watermark still flags the chunk behind it.
        let done = mark.done;
        mark.lost.retain(|&(_, to)| to >= done);
    }

    /// Takes over a logged state: it knows why things are gone. Holes that were met above it
    /// stay.
    pub fn merge(&mut self, logged: &Mark) {
        if logged.done < self.mark.done && !self.mark.truncated {
            self.mark.last = self.mark.last.max(logged.last);
            return;
        }
        let met = std::mem::replace(&mut self.mark, logged.clone());
        self.mark.last = self.mark.last.max(met.last);
        for (from, to) in met.lost {
            self.lose(from, to);
        }
        if met.done > logged.done {
            self.lose(logged.done + 1, met.done);
        }
        self.advance();
    }
}

/// The final of an attempt.
#[derive(Debug, Clone, Copy)]
pub(super) struct FinalState {
    pub at: Cursor,
    pub ending: Ending,
    pub text_bytes: u64,
    pub wall_ms: u64,
}

/// One open attempt.
#[derive(Debug)]
pub(super) struct Attempt {
    /// The task id is empty as long as recovery has met only later records of it.
    pub ids: Arc<Ids>,
    pub arrival: u64,
    pub priority: i64,
    pub timeout_seconds: Option<u64>,
    pub received_at_ms: u64,
    /// The store that its messages are named after, if that is another one.
    pub born: Option<Incarnation>,
    pub command_bytes: u64,
    /// 0: not started.
    pub started_at_ms: u64,
    pub started: bool,
    pub discarded: bool,
    pub fin: Option<FinalState>,
    /// The final is acknowledged, reported or dropped.
    pub final_done: bool,
    pub streams: [StreamState; 2],
    /// The oldest segment that may hold a record of its life.
    pub first_in: u64,
    /// The record that its ids, and its command while it waits, are read from.
    pub identity_at: Cursor,
    /// The segments that hold the records of these facts; 0: none.
    pub started_in: u64,
    pub discarded_in: u64,
    pub done_in: u64,
}

impl Attempt {
    /// Before its first record.
    pub fn unidentified(first_in: u64) -> Attempt {
        Attempt {
            ids: Arc::new(Ids {
                task: Id::new(),
                attempt: Id::new(),
            }),
            arrival: u64::MAX,
            priority: 0,
            timeout_seconds: None,
            received_at_ms: 0,
            born: None,
            command_bytes: 0,
            started_at_ms: 0,
            started: false,
            discarded: false,
            fin: None,
            final_done: false,
            streams: Default::default(),
            first_in,
            identity_at: Cursor::START,
            started_in: 0,
            discarded_in: 0,
            done_in: 0,
        }
    }

    pub fn is_identified(&self) -> bool {
        !self.ids.task.is_empty()
    }

    pub fn identity(&self) -> Identity {
        Identity {
            ids: (*self.ids).clone(),
            arrival: self.arrival,
            priority: self.priority,
            timeout_seconds: self.timeout_seconds,
            received_at_ms: self.received_at_ms,
            started_at_ms: self.started_at_ms,
            born: self.born,
        }
    }

    pub fn phase(&self) -> Phase {
        if self.discarded {
            Phase::Discarded
        } else if self.fin.is_some() {
            Phase::Finished {
                held: !self.final_done,
            }
        } else if self.started {
            Phase::Started
        } else {
            Phase::Received
        }
    }

    pub fn stream(&self, stream: Stream) -> &StreamState {
        &self.streams[stream.index()]
    }

    pub fn stream_mut(&mut self, stream: Stream) -> &mut StreamState {
        &mut self.streams[stream.index()]
    }

    /// Nothing runs, and nothing of it is to be sent.
    pub fn is_closed(&self) -> bool {
        if self.discarded {
            return !self.started || self.fin.is_some();
        }
        self.fin.is_some() && self.final_done && !self.output_waits()
    }

    pub fn output_waits(&self) -> bool {
        self.sends() && self.streams.iter().any(|stream| stream.waiting() > 0)
    }

    /// Whether messages of it go over the WebSocket at all.
    pub fn sends(&self) -> bool {
        !self.discarded && self.ids.has_result_channel()
    }

    pub fn final_waits(&self) -> bool {
        !self.discarded && !self.final_done && self.fin.is_some()
    }

    /// Whether it may still need room for its worst-case final.
    pub fn awaits_final(&self) -> bool {
        self.fin.is_none() && !self.discarded
    }

    /// Applies a record found at `at`. `true` if it belongs to the life of the attempt, so that
    /// its segment depends on the attempt's older ones.
    pub fn apply(&mut self, record: &Record<'_>, at: Cursor, wall_ms: u64) -> bool {
        self.first_in = self.first_in.min(at.generation);
        match record {
            Record::Received { identity, command } => {
                self.identify(identity);
                // An older copy of the whole task, or a newer one: both hold the command.
                self.identity_at = at;
                self.command_bytes = command.len() as u64;
            }
            Record::Identity(identity) => {
                self.identify(identity);
                self.identity_at = at;
                self.command_bytes = 0;
                if identity.started_at_ms != 0 {
                    self.begin(identity.started_at_ms, at);
                }
            }
            Record::Starting { at_ms } => self.begin(*at_ms, at),
            Record::Output {
                stream, sequence, ..
            } => {
                self.stream_mut(*stream).stored(*sequence);
                return false;
            }
            Record::Final {
                ending,
                output,
                error,
            } => {
                self.fin = Some(FinalState {
                    at,
                    ending: *ending,
                    text_bytes: (output.len() + error.len()) as u64,
                    wall_ms,
                });
            }
            Record::Done { .. } => {
                self.final_done = true;
                self.done_in = at.generation;
            }
            Record::Discarded | Record::Closed(_) => {
                self.discarded = true;
                self.discarded_in = at.generation;
            }
            Record::Truncated { stream, through } => {
                let state = self.stream_mut(*stream);
                state.mark.last = state.mark.last.max(*through);
                state.lose(1, *through);
                // Of acknowledgements above it the record says nothing.
                state.logged_done = *through;
                state.logged_in = at.generation;
            }
            Record::Rejected { stream, sequence } => {
                let state = self.stream_mut(*stream);
                state.mark.last = state.mark.last.max(*sequence);
                state.lose(*sequence, *sequence);
                // The record says nothing of what was acknowledged below it: a mark follows it.
                state.logged_in = at.generation;
            }
            Record::Mark { stream, mark } => {
                let state = self.stream_mut(*stream);
                state.merge(mark);
                state.logged_done = mark.done;
                state.logged_in = at.generation;
            }
        }
        true
    }

    fn identify(&mut self, identity: &Identity) {
        if !self.is_identified() {
            self.ids = Arc::new(identity.ids.clone());
            self.arrival = identity.arrival;
            self.priority = identity.priority;
            self.timeout_seconds = identity.timeout_seconds;
            self.received_at_ms = identity.received_at_ms;
        }
        // Another store has gone further with it before it moved here.
        self.born = identity.born.or(self.born);
    }

    fn begin(&mut self, at_ms: u64, at: Cursor) {
        if self.started_at_ms == 0 {
            self.started_at_ms = at_ms.max(1);
        }
        self.started = true;
        self.started_in = at.generation;
    }
}
