//! The engine on the simulated disk against a reference model of what it has promised.
//!
//! The model knows for each attempt what was confirmed and what was tried without an answer. After
//! any crash the store must hold all that was confirmed, may hold what was tried, and nothing else.

use std::collections::BTreeMap;

use super::engine::{Bounds, Engine};
use super::recovery;
use super::sim::{Fault, Keep, Random, SimDisk, SimIndex};
use super::types::*;
use crate::ids::{FinalStatus, Ids, Stream};
use crate::limits::{Chunk, ChunkBatch, ChunkBuffer};

const SEGMENT_BYTES: u64 = 8 << 10;

/// What the model knows of one attempt.
#[derive(Default, Clone, Debug)]
struct Known {
    /// Confirmed, or (second) tried without an answer.
    received: (bool, bool),
    started: (bool, bool),
    /// Starts that were allowed.
    goes: u32,
    finished: (bool, bool),
    reported: (bool, bool),
    discarded: (bool, bool),
    final_acked: bool,
    /// Last confirmed and last tried sequence of each stream.
    last: [(u64, u64); 2],
    /// All up to here may be gone, by acknowledgement.
    acked: [u64; 2],
    interrupted: bool,
}

pub struct Tester {
    pub disk: SimDisk,
    engine: Option<Engine>,
    known: BTreeMap<u64, Known>,
    cap_bytes: u64,
    names: u64,
    /// Output was given up for want of space.
    dropped: bool,
}

fn ids(number: u64) -> Ids {
    Ids::new(&format!("task-{number}"), "attempt").expect("short")
}

fn command(number: u64) -> Vec<u8> {
    format!("run {number} {}", "c".repeat((number % 7 * 100) as usize)).into_bytes()
}

/// The content of a chunk follows from its name, so that a changed byte is noticed.
fn content(number: u64, stream: Stream, sequence: u64) -> Vec<u8> {
    let mut random = Random::new(number << 32 | sequence << 1 | stream.index() as u64);
    let len = 1 + random.below(700) as usize;
    (0..len).map(|_| random.below(256) as u8).collect()
}

fn final_of(number: u64) -> Final {
    Final {
        status: FinalStatus::Failed,
        exit_code: number as i32,
        output: content(number, Stream::Stdout, 0),
        error: content(number, Stream::Stderr, 0),
        output_truncated: number.is_multiple_of(2),
        error_truncated: false,
    }
}

fn bounds(cap_bytes: u64) -> Bounds {
    Bounds {
        cap_bytes,
        terminal_reserve_bytes: SEGMENT_BYTES,
        final_output_bytes: 1024,
    }
}

type Answer<T> = async_channel::Receiver<T>;

impl Tester {
    pub fn new(cap_bytes: u64) -> Tester {
        let mut tester = Tester {
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
            *b"0123456789abcdef",
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

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("the store is open")
    }

    fn ask<T>(&mut self, send: impl FnOnce(&mut Engine, async_channel::Sender<T>)) -> T {
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
        let answer = self.ask(|engine, reply| engine.finish(key, final_of(number), Some(reply)));
        self.known.entry(number).or_default().finished.0 |= answer.is_ok();
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

    fn note_drops(&mut self) {
        let dropped = |engine: &Engine| engine.tally.streams_truncated > 0;
        self.dropped |= self.engine.as_ref().is_some_and(dropped);
    }

    pub fn crash(&mut self, keep: Keep) {
        self.note_drops();
        self.engine = None;
        self.disk.crash(keep);
    }

    /// Reads all that waits and compares.
    pub fn check(&mut self) {
        self.note_drops();
        let mut streams: BTreeMap<(u64, usize), Vec<(u64, bool)>> = BTreeMap::new();
        let mut finals: Vec<u64> = Vec::new();
        let mut from = Cursor::START;
        loop {
            let batch = self.engine().read(ReadRequest {
                from,
                max_messages: 5,
                max_bytes: 4000,
                ..ReadRequest::default()
            });
            assert!(
                batch.at_end || !batch.messages.is_empty(),
                "reading goes on"
            );
            for message in &batch.messages {
                let number = number_of(&message.ids);
                match &message.body {
                    Body::Output {
                        stream,
                        sequence,
                        data,
                        after_hole,
                    } => {
                        assert_eq!(
                            batch.buffer[data.clone()],
                            content(number, *stream, *sequence),
                            "chunk {sequence} of {number} changed"
                        );
                        assert!(
                            !finals.contains(&number),
                            "output after the final of {number}"
                        );
                        let seen = streams.entry((number, stream.index())).or_default();
                        seen.push((*sequence, *after_hole));
                    }
                    Body::Final {
                        exit_code,
                        output,
                        error,
                        ..
                    } => {
                        let known = &self.known[&number];
                        if *exit_code != -1 {
                            let expected = final_of(number);
                            assert_eq!(*exit_code, expected.exit_code);
                            assert_eq!(batch.buffer[output.clone()], expected.output);
                            assert_eq!(batch.buffer[error.clone()], expected.error);
                        } else {
                            assert!(!known.finished.0, "{number} had ended: {known:?}");
                        }
                        finals.push(number);
                    }
                }
            }
            from = batch.next;
            if batch.at_end {
                break;
            }
        }
        let snapshot = self.engine().snapshot(1 << 20);
        for (number, known) in &self.known {
            let gone = known.discarded.0;
            let seen_final = finals.iter().filter(|&other| other == number).count();
            assert!(seen_final <= 1, "the final of {number} came twice");
            let done = known.final_acked || known.reported.1;
            let ends = known.finished.0 || known.interrupted;
            if ends && !done && !known.discarded.1 {
                assert_eq!(seen_final, 1, "the final of {number} is lost: {known:?}");
            }
            assert!(
                !(gone || known.reported.0) || seen_final == 0,
                "{number}: {known:?}"
            );
            for stream in Stream::ALL {
                let none = Vec::new();
                let seen = streams.get(&(*number, stream.index())).unwrap_or(&none);
                assert!(!gone || seen.is_empty(), "{number} was discarded");
                let range = snapshot
                    .streams
                    .iter()
                    .find(|range| range.key == ids(*number).key() && range.stream == stream);
                let truncated = range.is_some_and(|range| range.truncated);
                assert!(
                    self.dropped || !truncated,
                    "{number} {stream:?} was not cut: {known:?}"
                );
                let (confirmed, tried) = known.last[stream.index()];
                let acked = known.acked[stream.index()];
                let mut before = None;
                for &(sequence, after_hole) in seen {
                    assert!(
                        sequence <= tried,
                        "chunk {sequence} of {number} was never printed"
                    );
                    let follows = match before {
                        Some(before) => sequence == before + 1,
                        None => sequence <= acked + 1,
                    };
                    assert!(
                        follows || (after_hole && truncated),
                        "a hole before {sequence} of {number} {stream:?}: {known:?}"
                    );
                    before = Some(sequence);
                }
                let last = seen.last().map_or(0, |(sequence, _)| *sequence);
                let complete = last >= confirmed || confirmed <= acked;
                assert!(
                    complete || known.discarded.1 || (self.dropped && seen.is_empty()),
                    "{number} {stream:?} ends with {last}: {known:?}"
                );
            }
        }
        let most = self.cap_bytes + 2 * recovery::segment_bytes(self.cap_bytes);
        assert!(snapshot.counts.bytes_used <= most, "the cap is exceeded");
    }

    /// What was tried without an answer is settled by what the store says now.
    pub fn settle(&mut self) {
        let numbers: Vec<u64> = self.known.keys().copied().collect();
        for number in numbers {
            let key = ids(number).key();
            let phase = self.engine().known_phase(key).expect("the index answers");
            let lasts = self
                .engine()
                .attempts
                .get(&key)
                .map(|attempt| attempt.streams.each_ref().map(|state| state.mark.last));
            let stored = self.engine().final_of(key);
            let Some(known) = self.known.get_mut(&number) else {
                continue;
            };
            // Also by a recovery that crashed after it.
            known.interrupted |= stored.is_some_and(|stored| stored.fin.exit_code == -1);
            assert!(
                phase.is_some() || !known.received.0,
                "{number} is forgotten: {known:?}"
            );
            known.received = (phase.is_some(), phase.is_some());
            let discarded = phase == Some(Phase::Discarded);
            assert!(
                discarded || !known.discarded.0,
                "{number} came back: {phase:?} {known:?}"
            );
            known.discarded = (discarded, discarded);
            let ended = matches!(phase, Some(Phase::Finished { .. }));
            if !discarded {
                let finished = ended && !known.interrupted;
                assert!(
                    finished || !known.finished.0,
                    "{number}: {phase:?} {known:?}"
                );
                known.finished = (finished, finished);
                known.started.0 = known.started.1 && phase != Some(Phase::Received);
                known.started.1 = known.started.0;
                let reported = ended && phase == Some(Phase::Finished { held: false });
                assert!(
                    reported || !known.reported.0,
                    "{number} is to be reported again"
                );
                known.reported = (known.reported.1 && reported, known.reported.1 && reported);
            }
            if let Some(lasts) = lasts {
                for (last, (confirmed, tried)) in lasts.into_iter().zip(&mut known.last) {
                    *confirmed = last;
                    *tried = last;
                }
            }
        }
    }

    fn step(&mut self, random: &mut Random) {
        let number = self.names.saturating_sub(1 + random.below(4));
        let stream = Stream::ALL[random.below(2) as usize];
        match random.below(20) {
            0..=2 => {
                self.receive();
            }
            3..=5 => self.start(number),
            6..=12 => self.append(number, stream, 1 + random.below(5)),
            13 | 14 => self.finish(number),
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
            18 => self.discard(number),
            _ => self.acknowledge_final(number),
        }
    }
}

fn number_of(ids: &Ids) -> u64 {
    let number = ids
        .task
        .strip_prefix("task-")
        .and_then(|text| text.parse().ok());
    number.expect("the ids are ours")
}

/// One random history with crashes, also inside the recovery. Fails with the seed.
fn history(seed: u64, cap_bytes: u64) {
    let random = &mut Random::new(seed);
    let mut tester = Tester::new(cap_bytes);
    for _ in 0..4 {
        let crashes = random.below(4) > 0;
        if crashes {
            tester.disk.set_fault(random.below(120), Fault::Crash);
        } else if random.below(2) == 0 {
            let count = 1 + random.below(5);
            let fault = match random.below(2) {
                0 => Fault::Io(count),
                _ => Fault::NoSpace(count),
            };
            tester.disk.set_fault(random.below(60), fault);
        }
        for _ in 0..random.below(80) {
            tester.step(random);
        }
        if random.below(5) == 0 {
            tester.close();
        }
        if random.below(3) == 0 {
            tester.kill();
            assert!(tester.open());
            // What is sent now is relied on, whatever happens next.
            tester.settle();
            tester.check();
        }
        let keep = match random.below(5) {
            0 => Keep::Nothing,
            1 => Keep::Everything,
            2 => Keep::FirstHalf,
            3 => Keep::LastHalf,
            _ => Keep::Some(random.below(1 << 32)),
        };
        tester.crash(keep);
        if random.below(2) == 0 {
            tester.disk.set_fault(random.below(20), Fault::Crash);
            let _ = tester.open();
            tester.crash(Keep::Some(random.below(1 << 32)));
        }
        assert!(tester.open(), "seed {seed}: a good disk opens");
        tester.settle();
        tester.check();
    }
}

/// `HOSTLINK_HISTORIES` makes the run longer: `HOSTLINK_HISTORIES=100000 cargo test --release model`.
fn histories(cap_bytes: u64) {
    let wanted = std::env::var("HOSTLINK_HISTORIES").ok();
    let count = wanted.and_then(|text| text.parse().ok()).unwrap_or(400);
    for seed in 0..count {
        let run = std::panic::catch_unwind(|| history(seed, cap_bytes));
        assert!(
            run.is_ok(),
            "history {seed} with a cap of {cap_bytes} bytes failed"
        );
    }
}

#[test]
fn random_histories_keep_every_promise() {
    histories(1 << 20);
}

#[test]
fn random_histories_in_more_segments_keep_every_promise() {
    histories(256 << 10);
}

#[test]
fn random_histories_in_little_space_keep_every_promise() {
    histories(96 << 10);
}

/// A life of several attempts, each step of which a crash may interrupt.
fn scripted(tester: &mut Tester) {
    let first = tester.receive();
    tester.start(first);
    tester.append(first, Stream::Stdout, 8);
    tester.append(first, Stream::Stderr, 3);
    let second = tester.receive();
    let third = tester.receive();
    tester.discard(third);
    tester.start(third);
    tester.finish(first);
    tester.start(second);
    tester.acknowledge(first, Stream::Stdout, 8);
    for _ in 0..6 {
        tester.append(second, Stream::Stdout, 8);
    }
    tester.acknowledge(first, Stream::Stderr, 3);
    tester.acknowledge_final(first);
    tester.acknowledge(second, Stream::Stdout, 40);
    for _ in 0..6 {
        tester.append(second, Stream::Stderr, 8);
    }
    tester.finish(second);
    tester.report(second);
    let fourth = tester.receive();
    tester.finish(fourth);
    tester.receive();
    tester.close();
}

const KEEPS: [Keep; 7] = [
    Keep::Nothing,
    Keep::Everything,
    Keep::FirstHalf,
    Keep::LastHalf,
    Keep::Some(1),
    Keep::Some(2),
    Keep::Some(3),
];

#[test]
fn a_crash_at_each_call_keeps_every_promise() {
    let mut whole = Tester::new(64 << 10);
    let before = whole.disk.calls();
    scripted(&mut whole);
    let calls = whole.disk.calls() - before;
    assert!(calls > 60, "the script must work the disk: {calls} calls");
    for call in 0..=calls {
        for keep in KEEPS {
            let run = || {
                let mut tester = Tester::new(64 << 10);
                tester.disk.set_fault(call, Fault::Crash);
                scripted(&mut tester);
                tester.crash(keep);
                tester.open();
                tester.settle();
                tester.check();
            };
            let run = std::panic::catch_unwind(run);
            assert!(run.is_ok(), "crash at call {call} that keeps {keep:?}");
        }
    }
}

#[test]
fn a_crash_at_each_call_of_the_recovery_keeps_every_promise() {
    let mut call = 0;
    loop {
        let mut reached = false;
        for crashed_at in (5..110).step_by(7) {
            for keep in [Keep::Nothing, Keep::Everything, Keep::Some(call)] {
                let mut tester = Tester::new(64 << 10);
                tester.disk.set_fault(crashed_at, Fault::Crash);
                scripted(&mut tester);
                tester.crash(Keep::Some(crashed_at));
                let before = tester.disk.calls();
                tester.disk.set_fault(call, Fault::Crash);
                if !tester.open() || tester.disk.calls() > before + call {
                    reached = true;
                }
                tester.crash(keep);
                tester.open();
                tester.settle();
                tester.check();
            }
        }
        call += 1;
        if !reached {
            break;
        }
    }
    assert!(call > 5, "recovery works the disk: {call} calls");
}

#[test]
fn what_is_needed_is_copied_forward() {
    let mut tester = Tester::new(96 << 10);
    let ended = tester.receive();
    tester.start(ended);
    tester.finish(ended);
    let waiting = tester.receive();
    let running = tester.receive();
    tester.start(running);
    let first = tester.engine().log.segments[0].generation();
    for _ in 0..200 {
        tester.append(running, Stream::Stdout, 5);
        tester.check();
    }
    let oldest = tester.engine().log.segments[0].generation();
    assert!(oldest > first, "the first segment has been retired");
    let key = ids(waiting).key();
    let loaded = tester
        .engine()
        .load_task(key)
        .expect("readable")
        .expect("held");
    assert_eq!(loaded.command, command(waiting));
    tester.crash(Keep::Nothing);
    tester.open();
    tester.settle();
    tester.check();
    tester.start(running);
}

/// What is left of a store that was damaged must be as it was, and the damage told.
#[test]
fn a_flipped_bit_costs_only_what_it_hit() {
    let mut tester = Tester::new(1 << 20);
    let number = tester.receive();
    tester.start(number);
    for _ in 0..3 {
        tester.append(number, Stream::Stdout, 3);
    }
    tester.finish(number);
    let other = tester.receive();
    // A later segment proves that this one was synced.
    tester.engine().log.seal_active();
    tester.receive();
    let name = super::log::file_name(tester.engine().log.segments[0].name);
    tester.engine = None;
    let whole = tester.disk.contents(&name);
    let used = whole.iter().rposition(|&byte| byte != 0).expect("content") + 1;
    for bit in (0..used * 8).step_by(61) {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let fork = tester.disk.fork();
        fork.overwrite(&name, damaged);
        check_damaged(fork, number, other, bit);
    }
    for cut in (0..used).step_by(97) {
        let fork = tester.disk.fork();
        fork.overwrite(&name, whole[..cut].to_vec());
        check_damaged(fork, number, other, cut);
    }
}

fn check_damaged(disk: SimDisk, number: u64, other: u64, place: usize) {
    let opened = recovery::open(
        Box::new(disk.clone()),
        Box::new(SimIndex::open(&disk)),
        bounds(1 << 20),
        *b"0123456789abcdef",
        || 1_000,
    );
    let (mut engine, _) = opened.expect("a damaged store opens");
    let batch = engine.read(ReadRequest {
        max_messages: 100,
        max_bytes: 1 << 20,
        ..ReadRequest::default()
    });
    let mut before = 0;
    for message in &batch.messages {
        assert_eq!(number_of(&message.ids), number);
        match &message.body {
            Body::Output {
                sequence,
                data,
                after_hole,
                ..
            } => {
                let expected = content(number, Stream::Stdout, *sequence);
                assert_eq!(batch.buffer[data.clone()], expected, "changed at {place}");
                let hole = *sequence != before + 1;
                assert_eq!(hole, *after_hole, "chunk {sequence}, damage at {place}");
                before = *sequence;
            }
            Body::Final {
                exit_code, output, ..
            } => {
                if *exit_code != -1 {
                    assert_eq!(batch.buffer[output.clone()], final_of(number).output);
                }
            }
        }
    }
    let snapshot = engine.snapshot(1 << 20);
    if before < 9 && engine.attempts.contains_key(&ids(number).key()) && before > 0 {
        assert!(engine.tally.records_damaged > 0, "untold damage at {place}");
    }
    let lost_chunks = 9 - batch.messages.len().saturating_sub(1) as i64;
    let truncated = snapshot.streams.iter().any(|range| range.truncated);
    if (1..9).contains(&lost_chunks) && before == 9 {
        assert!(truncated, "untold hole, damage at {place}");
    }
    // The other attempt is in a unit of its own.
    let phase = engine
        .known_phase(ids(other).key())
        .expect("the index answers");
    assert!(phase.is_none() || phase == Some(Phase::Received));
}

#[test]
fn a_lost_index_costs_no_message_and_no_second_run() {
    for seed in 0..200 {
        let random = &mut Random::new(seed);
        let mut tester = Tester::new(96 << 10);
        for _ in 0..150 {
            tester.step(random);
        }
        tester.close();
        tester.disk.lose_index();
        tester.crash(Keep::Everything);
        assert!(tester.open());
        tester.check();
        // Also those whose records have left the log in part.
        for number in 0..tester.names {
            if tester.known[&number].started.0 {
                let key = ids(number).key();
                let phase = tester.engine().known_phase(key).expect("the index answers");
                assert_ne!(
                    phase,
                    Some(Phase::Received),
                    "{number} would run again, seed {seed}"
                );
            }
        }
    }
}

/// A file system that is full for a while, or an I/O error, costs no confirmed byte and no
/// restart.
#[test]
fn after_a_fault_the_store_goes_on_by_itself() {
    for call in 0..60 {
        for fault in [
            Fault::Io(1),
            Fault::Io(4),
            Fault::NoSpace(1),
            Fault::NoSpace(4),
        ] {
            let mut tester = Tester::new(1 << 20);
            let number = tester.receive();
            tester.start(number);
            tester.disk.set_fault(call, fault);
            for _ in 0..40 {
                tester.append(number, Stream::Stdout, 4);
            }
            tester.disk.clear_fault();
            let confirmed = tester.known[&number].last[0].0;
            tester.append(number, Stream::Stdout, 1);
            assert_eq!(
                tester.known[&number].last[0].0,
                confirmed + 1,
                "{call} {fault:?}"
            );
            tester.check();
            tester.crash(Keep::Nothing);
            tester.open();
            tester.settle();
            tester.check();
        }
    }
}
