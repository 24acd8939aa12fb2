//! The engine on the simulated disk against a reference model of what it has promised.
//!
//! The model knows for each attempt what was confirmed and what was tried without an answer. After
//! any crash the store must hold all that was confirmed, may hold what was tried, and nothing else.

mod check;
mod moves;

use std::collections::{BTreeMap, BTreeSet};

use super::engine::{Bounds, Engine};
use super::recovery;
use super::sim::{Keep, Random, SimDisk, SimIndex};
use super::types::*;
use crate::ids::{FinalStatus, Ids, Incarnation, Stream, Usage};
use crate::limits::{Chunk, ChunkBatch, ChunkBuffer};

const SEGMENT_BYTES: u64 = 8 << 10;

/// What the model knows of one attempt.
#[derive(Default, Clone, Debug)]
pub struct Known {
    /// Confirmed, or (second) tried without an answer.
    pub received: (bool, bool),
    pub started: (bool, bool),
    /// Starts that were allowed.
    pub goes: u32,
    pub finished: (bool, bool),
    pub reported: (bool, bool),
    pub discarded: (bool, bool),
    pub final_acked: bool,
    /// Last confirmed and last tried sequence of each stream.
    pub last: [(u64, u64); 2],
    /// All up to here may be gone, by acknowledgement.
    pub acked: [u64; 2],
    pub interrupted: bool,
    /// Acknowledged one by one: these may be gone.
    pub acked_alone: [BTreeSet<u64>; 2],
    /// Refused by the server: gone if that was confirmed (`true`), else perhaps.
    pub rejected: [BTreeMap<u64, bool>; 2],
    /// All up to here was given up, confirmed and tried.
    pub given_up: [(u64, u64); 2],
    /// The volatile store that it began in.
    pub born: Option<Incarnation>,
}

impl Known {
    /// Whether a chunk that was stored may be missing, whatever the space.
    fn may_be_gone(&self, stream: Stream, sequence: u64) -> bool {
        self.is_acked(stream, sequence) || self.was_cut(stream, sequence)
    }

    fn is_acked(&self, stream: Stream, sequence: u64) -> bool {
        let at = stream.index();
        sequence <= self.acked[at] || self.acked_alone[at].contains(&sequence)
    }

    /// Whether a chunk may have been thrown away although the server does not have it.
    fn was_cut(&self, stream: Stream, sequence: u64) -> bool {
        let at = stream.index();
        sequence <= self.given_up[at].1 || self.rejected[at].contains_key(&sequence)
    }

    fn must_be_gone(&self, stream: Stream, sequence: u64) -> bool {
        let at = stream.index();
        sequence <= self.given_up[at].0 || self.rejected[at].get(&sequence) == Some(&true)
    }
}

/// The name of the store on disk.
pub const STORE: Incarnation = Incarnation::of(0x0123_4567_89ab_cdef);

pub struct Tester {
    pub store: Incarnation,
    pub disk: SimDisk,
    pub engine: Option<Engine>,
    pub known: BTreeMap<u64, Known>,
    pub cap_bytes: u64,
    pub names: u64,
    /// Output was given up for want of space.
    pub dropped: bool,
}

pub fn ids(number: u64) -> Ids {
    Ids::new(&format!("task-{number}"), "attempt").expect("short")
}

pub fn command(number: u64) -> Vec<u8> {
    // Some are longer than a segment.
    let long = if number % 29 == 11 { 14_000 } else { 0 };
    let len = long + number % 7 * 100;
    format!("run {number} {}", "c".repeat(len as usize)).into_bytes()
}

/// The content of a chunk follows from its name, so that a changed byte is noticed.
pub fn content(number: u64, stream: Stream, sequence: u64) -> Vec<u8> {
    let mut random = Random::new(number << 32 | sequence << 1 | stream.index() as u64);
    let mut bytes = vec![0; 1 + random.below(700) as usize];
    random.fill(&mut bytes);
    bytes
}

pub fn final_of(number: u64) -> Final {
    Final {
        status: FinalStatus::Failed,
        exit_code: number as i32,
        output: content(number, Stream::Stdout, 0),
        error: content(number, Stream::Stderr, 0),
        output_truncated: number.is_multiple_of(2),
        error_truncated: false,
        usage: number.is_multiple_of(3).then_some(Usage {
            wall_ms: number,
            user_ms: 1,
            system_ms: 2,
            memory_peak_bytes: u64::MAX - number,
        }),
    }
}

pub fn bounds(cap_bytes: u64) -> Bounds {
    Bounds {
        cap_bytes,
        terminal_reserve_bytes: SEGMENT_BYTES,
        final_output_bytes: 1024,
    }
}

type Answer<T> = async_channel::Receiver<T>;

impl Tester {
    pub fn new(cap_bytes: u64) -> Tester {
        Tester::named(STORE, cap_bytes)
    }

    fn named(store: Incarnation, cap_bytes: u64) -> Tester {
        let mut tester = Tester {
            store,
            disk: SimDisk::default(),
            engine: None,
            known: BTreeMap::new(),
            cap_bytes,
            names: 0,
            dropped: false,
        };
        assert!(tester.open());
        tester
    }

    /// Opens the store. `false` if the disk failed meanwhile.
    pub fn open(&mut self) -> bool {
        self.engine = None;
        let opened = recovery::open(
            Box::new(self.disk.clone()),
            Box::new(SimIndex::open(&self.disk)),
            bounds(self.cap_bytes),
            self.store,
            || 1_000,
        );
        let (engine, recovered) = match opened {
            Ok(opened) => opened,
            Err(why) => {
                assert!(self.disk.has_fault(), "a good disk opens: {why:?}");
                return false;
            }
        };
        for ids in &recovered.interrupted {
            let known = self
                .known
                .values_mut()
                .zip(0..)
                .find(|(_, at)| *at == number_of(ids));
            let known = known.expect("only what was received is interrupted").0;
            assert!(known.started.1, "{ids} was never started");
            known.interrupted = true;
        }
        let queued: Vec<u64> = recovered
            .queued
            .iter()
            .map(|task| number_of(&task.ids))
            .collect();
        for (number, known) in &self.known {
            let waits = queued.contains(number);
            let may_wait =
                known.received.1 && !known.started.0 && !known.finished.0 && !known.discarded.0;
            assert!(!waits || may_wait, "{number} must not wait: {known:?}");
            let must_wait =
                known.received.0 && !known.started.1 && !known.finished.1 && !known.discarded.1;
            assert!(waits || !must_wait, "{number} is lost: {known:?}");
        }
        self.engine = Some(engine);
        true
    }

    pub fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("the store is open")
    }

    pub fn ask<T>(&mut self, send: impl FnOnce(&mut Engine, async_channel::Sender<T>)) -> T {
        let (reply, answer): (_, Answer<T>) = async_channel::bounded(1);
        send(self.engine(), reply);
        self.engine().commit();
        answer
            .try_recv()
            .expect("every question is answered by a commit")
    }

    pub fn receive(&mut self) -> u64 {
        let number = self.names;
        self.names += 1;
        self.known.entry(number).or_default().received.1 = true;
        let receipt = Receipt {
            ids: ids(number),
            command: command(number),
            priority: number as i64,
            timeout_seconds: None,
            received_at_ms: number,
        };
        let answer = self.ask(|engine, reply| engine.receive(receipt, reply));
        if answer == Ok(Reception::New) {
            self.known.entry(number).or_default().received.0 = true;
        } else {
            assert!(answer.is_err());
        }
        number
    }

    pub fn start(&mut self, number: u64) {
        let known = self.known.entry(number).or_default();
        let may = known.received.1 && !known.started.0 && !known.discarded.0 && !known.finished.0;
        known.started.1 |= known.received.1;
        let key = ids(number).key();
        let answer = self.ask(|engine, reply| engine.start(key, 5, reply));
        let known = self.known.entry(number).or_default();
        if answer == Ok(Start::Go) {
            assert!(may, "{number} must not start: {known:?}");
            known.goes += 1;
            assert_eq!(known.goes, 1, "{number} started twice");
            known.started.0 = true;
        }
    }

    pub fn append(&mut self, number: u64, stream: Stream, count: u64) {
        let known = self.known.entry(number).or_default();
        let (confirmed, tried) = &mut known.last[stream.index()];
        if !known.started.0 || known.finished.1 || known.interrupted {
            return;
        }
        let first = *confirmed + 1;
        *tried = (*tried).max(*confirmed + count);
        let batch: ChunkBatch = (first..first + count)
            .map(|sequence| -> Chunk {
                let bytes = content(number, stream, sequence);
                Box::new(ChunkBuffer::from_slice(&bytes).expect("short"))
            })
            .collect();
        let key = ids(number).key();
        let answer = self.ask(|engine, reply| engine.append(key, stream, first, batch, reply));
        if answer.is_ok() {
            self.known.entry(number).or_default().last[stream.index()].0 = first + count - 1;
        }
    }

    pub fn finish(&mut self, number: u64) {
        let known = self.known.entry(number).or_default();
        if !known.received.0 || known.interrupted {
            return;
        }
        known.finished.1 = true;
        let key = ids(number).key();
        let answer =
            self.ask(|engine, reply| engine.finish(key, final_of(number), false, Some(reply)));
        self.known.entry(number).or_default().finished.0 |= answer.is_ok();
    }

    /// A final that was reported before it could be stored.
    pub fn finish_reported(&mut self, number: u64) {
        let known = self.known.entry(number).or_default();
        if !known.received.0 || known.interrupted || known.finished.1 {
            return;
        }
        (known.finished.1, known.reported.1) = (true, true);
        let key = ids(number).key();
        let fin = final_of(number);
        let answer = self.ask(|engine, reply| engine.finish(key, fin, true, Some(reply)));
        let known = self.known.entry(number).or_default();
        known.finished.0 |= answer.is_ok();
        known.reported.0 |= answer.is_ok();
    }

    pub fn report(&mut self, number: u64) {
        let known = self.known.entry(number).or_default();
        if !known.finished.0 {
            return;
        }
        known.reported.1 = true;
        let key = ids(number).key();
        let answer = self.ask(|engine, reply| engine.final_done(key, false, reply));
        self.known.entry(number).or_default().reported.0 |= answer.is_ok();
    }

    pub fn discard(&mut self, number: u64) {
        let known = self.known.entry(number).or_default();
        if !known.received.0 {
            return;
        }
        known.discarded.1 = true;
        let key = ids(number).key();
        let answer = self.ask(|engine, reply| engine.discard(key, reply));
        // One that is done stays so.
        let discarded = self.engine().known_phase(key) == Ok(Some(Phase::Discarded));
        let known = self.known.entry(number).or_default();
        known.discarded = (answer.is_ok() && discarded, answer.is_err() || discarded);
    }

    pub fn acknowledge(&mut self, number: u64, stream: Stream, sequence: u64) {
        let known = self.known.entry(number).or_default();
        let acked = &mut known.acked[stream.index()];
        *acked = (*acked).max(sequence);
        self.engine().acknowledge(Ack::Output {
            key: ids(number).key(),
            stream,
            sequence,
            cumulative: true,
        });
    }

    pub fn acknowledge_alone(&mut self, number: u64, stream: Stream, sequence: u64) {
        let known = self.known.entry(number).or_default();
        known.acked_alone[stream.index()].insert(sequence);
        self.engine().acknowledge(Ack::Output {
            key: ids(number).key(),
            stream,
            sequence,
            cumulative: false,
        });
    }

    /// The server will never take this chunk.
    pub fn reject(&mut self, number: u64, stream: Stream, sequence: u64) {
        let known = self.known.entry(number).or_default();
        let rejected = &mut known.rejected[stream.index()];
        rejected.entry(sequence).or_insert(false);
        let key = ids(number).key();
        let piece = Piece::Output { stream, sequence };
        let answer = self.ask(|engine, reply| engine.reject(key, piece, reply));
        let known = self.known.entry(number).or_default();
        // The answer is the same for one that was acknowledged, and that may be forgotten.
        if answer.is_ok() && !known.is_acked(stream, sequence) {
            known.rejected[stream.index()].insert(sequence, true);
        }
    }

    /// The server will never take the stream.
    pub fn give_up(&mut self, number: u64, stream: Stream) {
        let known = self.known.entry(number).or_default();
        let (confirmed, last) = known.last[stream.index()];
        // The answer is the same if nothing waits.
        let waited = (1..=confirmed).any(|sequence| !known.may_be_gone(stream, sequence));
        let (_, tried) = &mut known.given_up[stream.index()];
        *tried = (*tried).max(last);
        let key = ids(number).key();
        let answer = self.ask(|engine, reply| engine.give_up_stream(key, stream, reply));
        let known = self.known.entry(number).or_default();
        if answer.is_ok() && waited {
            known.given_up[stream.index()].0 = confirmed;
        }
    }

    /// A second store that is as this one, with no agent on either.
    pub fn fork(&self) -> Tester {
        assert!(self.engine.is_none());
        Tester {
            store: self.store,
            disk: self.disk.fork(),
            engine: None,
            known: self.known.clone(),
            cap_bytes: self.cap_bytes,
            names: self.names,
            dropped: self.dropped,
        }
    }

    pub fn acknowledge_final(&mut self, number: u64) {
        let known = self.known.entry(number).or_default();
        known.final_acked |= known.finished.1 || known.interrupted;
        let key = ids(number).key();
        self.engine().acknowledge(Ack::Final { key });
    }

    pub fn close(&mut self) {
        let engine = self.engine();
        let counts = engine.counts();
        // A failing disk may refuse: then the next start reads all of it.
        let _ = engine.close(&counts);
        self.engine = None;
    }

    /// The process dies, the machine does not: the page cache stays.
    pub fn kill(&mut self) {
        self.note_drops();
        self.engine = None;
        self.disk.clear_fault();
    }

    pub fn note_drops(&mut self) {
        // Near the cap a cut may be durable although its commit was not answered.
        let room = 4 * recovery::segment_bytes(self.cap_bytes) + SEGMENT_BYTES;
        let near = self.cap_bytes.saturating_sub(room);
        let dropped =
            |engine: &Engine| engine.tally.streams_truncated > 0 || engine.log.used_bytes() > near;
        self.dropped |= self.engine.as_ref().is_some_and(dropped);
    }

    pub fn crash(&mut self, keep: Keep) {
        self.note_drops();
        self.engine = None;
        self.disk.crash(keep);
    }

    pub fn step(&mut self, random: &mut Random) {
        let number = self.names.saturating_sub(1 + random.below(4));
        let stream = Stream::ALL[random.below(2) as usize];
        match random.below(23) {
            0..=2 => {
                self.receive();
            }
            3..=5 => self.start(number),
            6..=12 => self.append(number, stream, 1 + random.below(5)),
            13 => self.finish(number),
            14 if random.below(2) == 0 => self.finish_reported(number),
            14 => self.finish(number),
            15 => {
                if let Some(known) = self.known.get(&number) {
                    let (last, _) = known.last[stream.index()];
                    let sequence = random.below(last + 1);
                    self.acknowledge(number, stream, sequence);
                }
            }
            16 => {
                for number in 0..self.names {
                    for stream in Stream::ALL {
                        let last = self.known[&number].last[stream.index()].0;
                        self.acknowledge(number, stream, last);
                    }
                    if random.below(3) > 0 {
                        self.acknowledge_final(number);
                    }
                }
            }
            17 => self.report(number),
            18 | 19 => {
                let last = self
                    .known
                    .get(&number)
                    .map(|known| known.last[stream.index()].0);
                if let Some(last @ 1..) = last {
                    let sequence = last.saturating_sub(random.below(70)).max(1);
                    match random.below(3) {
                        0 => self.reject(number, stream, sequence),
                        _ => self.acknowledge_alone(number, stream, sequence),
                    }
                }
            }
            20 if random.below(3) == 0 => self.give_up(number, stream),
            21 => self.discard(number),
            _ => self.acknowledge_final(number),
        }
    }
}

pub fn number_of(ids: &Ids) -> u64 {
    let number = ids
        .task
        .strip_prefix("task-")
        .and_then(|text| text.parse().ok());
    number.expect("the ids are ours")
}
