//! What the other layers want recorded: each wish is checked against what is known, and encoded
//! into the unit that waits. Those that change nothing are answered at once.

use super::attempts::Attempt;
use super::commit::{Fact, Staged};
use super::engine::{Engine, LIFE_BYTES, answer, answer_if, tail};
use super::handle::{AppendError, FinishError, Reply};
use super::record::{Ending, Entry, Identity, RECORD_HEAD_BYTES, Record};
use super::types::*;
use crate::ids::{AttemptKey, Stream};
use crate::limits::{ChunkBatch, OPEN_ATTEMPTS_MAX, STORAGE_QUEUE};

impl Engine {
    pub fn receive(&mut self, receipt: Receipt, reply: Reply<Result<Reception, StoreError>>) {
        let key = receipt.ids.key();
        self.make_way(key, None);
        let known = match self.phase_anywhere(key) {
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
            born: None,
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
        is_reported: bool,
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
            usage: fin.usage,
        };
        let record = Record::Final {
            ending,
            output: tail(&fin.output),
            error: tail(&fin.error),
        };
        let at = self.encode(key, &record, fin.output.len() + fin.error.len());
        let done = Record::Done { dropped: false };
        let done_at = is_reported.then(|| self.unit.push(key, &done));
        self.staged.push(Staged {
            key,
            at,
            fact: Fact::Final {
                ending,
                fin,
                done_at,
                reply,
            },
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
                let mark = attempt.stream(stream).mark_without(sequence, sequence);
                let done = mark.done;
                let record = Record::Rejected { stream, sequence };
                let at = self.encode(key, &record, LIFE_BYTES as usize);
                // The watermark may have moved over acknowledgements that nothing else tells.
                self.unit.push(key, &Record::Mark { stream, mark });
                let fact = Fact::Rejected(stream, sequence, done, reply);
                self.staged.push(Staged { key, at, fact });
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
    pub fn remember(&mut self, key: AttemptKey, entry: Entry) {
        let first_in = self
            .attempts
            .remove(&key)
            .map_or(u64::MAX, |open| open.first_in);
        self.close_attempt(key, entry, first_in);
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
    pub fn life_bytes(&self, command_bytes: u64) -> u64 {
        command_bytes + 2 * self.bounds.final_output_bytes as u64 + LIFE_BYTES
    }

    /// What all open attempts need or may come to need, their output apart.
    pub fn needed_bytes(&self) -> u64 {
        let needs = |attempt: &Attempt| match attempt.fin {
            Some(_) if attempt.final_done => LIFE_BYTES,
            Some(fin) => fin.text_bytes + LIFE_BYTES,
            None => self.life_bytes(attempt.command_bytes),
        };
        self.attempts.values().map(needs).sum()
    }
}
