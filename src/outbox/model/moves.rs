//! A time in memory: the disk cannot be used, and when it can, all moves there.

use super::super::moving::Source;
use super::super::sim::{Fault, KEEPS, Keep, Random};
use super::super::types::Phase;
use super::{Known, Tester, ids};
use crate::ids::{Incarnation, Stream};

impl Tester {
    /// The agent works without this disk for a while. What it did there is still to come over.
    pub fn in_memory(&self) -> Tester {
        let mut memory = Tester::named(Incarnation::of(self.names + 1), 64 << 10);
        memory.names = self.names;
        memory.known = (0..self.names)
            .map(|number| (number, Known::default()))
            .collect();
        memory
    }

    /// The disk can be used again. `false` if it fails again: memory goes on.
    pub fn absorb(&mut self, memory: &mut Tester) -> bool {
        let source = memory.engine();
        self.engine().absorb(source, Source::Younger).is_ok()
    }

    /// All of memory is here.
    pub fn has_absorbed(&mut self, memory: Tester) {
        self.dropped |= memory.dropped;
        self.names = memory.names;
        let born = Some(memory.store);
        let known = memory.known.into_iter();
        self.known.extend(
            known
                .filter(|(_, known)| known.received.1)
                .map(|(number, known)| (number, Known { born, ..known })),
        );
    }

    /// The power went while memory was about to come over: what it alone held may be here.
    pub fn may_have_absorbed(&mut self, mut memory: Tester) {
        for known in memory.known.values_mut() {
            let tried = |(_, tried)| (false, tried);
            known.received = tried(known.received);
            known.started = tried(known.started);
            known.finished = tried(known.finished);
            known.reported = tried(known.reported);
            known.discarded = tried(known.discarded);
            known.last = known.last.map(|(_, tried)| (0, tried));
            known.given_up = known.given_up.map(|(_, tried)| (0, tried));
            known.rejected.iter_mut().for_each(|rejected| {
                rejected.values_mut().for_each(|refused| *refused = false);
            });
        }
        self.has_absorbed(memory);
    }

    /// The server takes everything that waits here.
    pub fn drain(&mut self) {
        for number in 0..self.names {
            let known = &self.known[&number];
            if known.finished.0 || known.interrupted {
                for stream in Stream::ALL {
                    let last = self.known[&number].last[stream.index()].1;
                    self.acknowledge(number, stream, last);
                }
                self.acknowledge_final(number);
            }
        }
    }

    /// Memory ends with the power or the process, after a move that failed: nothing of it is here.
    fn forget(&mut self, mut memory: Tester, random: &mut Random) {
        memory.note_drops();
        match random.below(2) {
            0 => self.kill(),
            _ => self.crash(Keep::Some(random.below(1 << 32))),
        }
        assert!(self.open(), "a good disk opens");
        for number in self.names..memory.names {
            let phase = self.engine().known_phase(ids(number).key());
            let mut known = Known::default();
            match phase {
                Ok(None) => {}
                // What is done may have come over before the rest failed: it stays so.
                Ok(Some(Phase::Finished { held: false } | Phase::Discarded)) => {
                    known.received.1 = true;
                    known.finished.1 = true;
                    known.final_acked = true;
                }
                phase => panic!("{number} came over by a move that failed: {phase:?}"),
            }
            self.known.insert(number, known);
        }
        self.names = memory.names;
        self.settle();
        self.check();
    }

    /// Some steps in memory, and the way back, which may fail or be cut short.
    pub fn detour(&mut self, random: &mut Random) {
        let mut memory = self.in_memory();
        for _ in 0..random.below(60) {
            memory.step(random);
        }
        memory.check();
        let call = random.below(12);
        let fault = match random.below(4) {
            0 => Some(Fault::Crash),
            1 => Some(Fault::Io(1 + random.below(3))),
            2 => Some(Fault::NoSpace(1 + random.below(3))),
            _ => None,
        };
        if let Some(fault) = fault {
            self.disk.set_fault(call, fault);
        }
        if !self.absorb(&mut memory) {
            if fault == Some(Fault::Crash) {
                self.note_drops();
                memory.note_drops();
                self.may_have_absorbed(memory);
                self.crash(Keep::Some(random.below(1 << 32)));
                assert!(self.open(), "a good disk opens");
                self.settle();
                return self.check();
            }
            self.disk.clear_fault();
            // Nothing has changed there, and life goes on.
            memory.check();
            for _ in 0..random.below(10) {
                memory.step(random);
            }
            if random.below(3) == 0 && !self.engine().log.has_remains() {
                return self.forget(memory, random);
            }
            if !self.absorb(&mut memory) {
                self.drain();
                assert!(self.absorb(&mut memory), "there is room");
            }
        }
        memory.note_drops();
        self.has_absorbed(memory);
        // A fault that was not met yet must not meet what follows.
        self.disk.clear_fault();
        self.check();
    }
}

/// A disk with something on it, and a memory with attempts in every state.
fn both() -> (Tester, Tester) {
    let mut disk = Tester::new(256 << 10);
    let ended = disk.receive();
    disk.start(ended);
    disk.append(ended, Stream::Stdout, 4);
    disk.finish(ended);
    disk.receive();
    let mut memory = disk.in_memory();
    let running = memory.receive();
    memory.start(running);
    memory.append(running, Stream::Stdout, 5);
    memory.append(running, Stream::Stderr, 5);
    memory.acknowledge(running, Stream::Stdout, 2);
    memory.acknowledge_alone(running, Stream::Stdout, 4);
    memory.reject(running, Stream::Stderr, 3);
    let ended = memory.receive();
    memory.start(ended);
    memory.append(ended, Stream::Stderr, 3);
    memory.finish(ended);
    let done = memory.receive();
    memory.start(done);
    memory.finish(done);
    memory.acknowledge_final(done);
    memory.receive();
    let discarded = memory.receive();
    memory.start(discarded);
    memory.append(discarded, Stream::Stdout, 1);
    memory.discard(discarded);
    (disk, memory)
}

#[test]
fn what_memory_held_is_on_the_disk_after_a_power_cut() {
    for keep in KEEPS {
        let (mut disk, mut memory) = both();
        let running = disk.names;
        assert!(disk.absorb(&mut memory));
        disk.has_absorbed(memory);
        disk.check();
        // What runs goes on where it was.
        disk.append(running, Stream::Stdout, 2);
        assert_eq!(disk.known[&running].last[0], (7, 7));
        disk.crash(keep);
        assert!(disk.open());
        disk.settle();
        disk.check();
        assert!(disk.known[&running].interrupted);
        for number in running..disk.names {
            disk.start(number);
        }
        assert!(disk.known.values().all(|known| known.goes <= 1));
    }
}

/// A disk that fails on the way changes nothing in memory; the next time it all comes over.
#[test]
fn a_disk_that_fails_again_loses_nothing_of_memory() {
    let mut failures = 0;
    for call in 0..12 {
        for fault in [
            Fault::Io(1),
            Fault::Io(4),
            Fault::NoSpace(2),
            Fault::BadFile,
        ] {
            let (mut disk, mut memory) = both();
            disk.disk.set_fault(call, fault);
            let moved = disk.absorb(&mut memory);
            disk.disk.clear_fault();
            if !moved {
                failures += 1;
                memory.check();
                let running = disk.names;
                memory.append(running, Stream::Stdout, 2);
                memory.finish(running);
                assert!(disk.absorb(&mut memory), "call {call} {fault:?}");
            }
            disk.has_absorbed(memory);
            disk.check();
            disk.crash(Keep::Everything);
            assert!(disk.open());
            disk.settle();
            disk.check();
        }
    }
    assert!(failures > 8, "{failures}");
}

/// Memory goes on after a move that failed, and the server believes what it tells: what of the move
/// reached the medium, or the page cache, must not tell it otherwise later.
#[test]
fn a_move_that_failed_has_not_happened_after_a_restart() {
    let mut failures = 0;
    for call in 0..12 {
        for keep in KEEPS.map(Some).into_iter().chain([None]) {
            let (mut disk, mut memory) = both();
            let running = disk.names;
            disk.disk.set_fault(call, Fault::Io(1));
            let moved = disk.absorb(&mut memory);
            disk.disk.clear_fault();
            if moved {
                continue;
            }
            failures += 1;
            memory.finish(running);
            assert!(memory.known[&running].finished.0);
            match keep {
                Some(keep) => disk.crash(keep),
                None => disk.kill(),
            }
            disk.known.entry(running).or_default().started.1 = true;
            assert!(disk.open());
            let phase = disk.engine().known_phase(ids(running).key());
            assert_eq!(phase, Ok(None), "call {call}, {keep:?}");
        }
    }
    assert!(failures > 15, "{failures}");
}

/// The power goes at any moment of the move: the disk has all of memory's open attempts or none.
#[test]
fn a_power_cut_on_the_way_leaves_all_or_nothing() {
    let (mut all, mut nothing) = (0, 0);
    for call in 0..14 {
        for keep in KEEPS {
            let (mut disk, mut memory) = both();
            let first = disk.names;
            disk.disk.set_fault(call, Fault::Crash);
            let _ = disk.absorb(&mut memory);
            disk.may_have_absorbed(memory);
            disk.crash(keep);
            assert!(disk.open());
            let open = (first..disk.names).filter(|number| {
                let key = ids(*number).key();
                disk.engine
                    .as_ref()
                    .is_some_and(|e| e.attempts.contains_key(&key))
            });
            match open.count() {
                // The discarded one is done as soon as nothing runs.
                3 => all += 1,
                0 => nothing += 1,
                some => panic!("{some} of 3 came over, call {call}, {keep:?}"),
            }
            disk.settle();
            disk.check();
        }
    }
    assert!(all > 5 && nothing > 5, "{all} {nothing}");
}

/// A store that was set aside is taken back one attempt after the other; a power cut on the way
/// means to begin again.
#[test]
fn taking_back_a_store_begins_again_after_a_power_cut() {
    let mut cuts = 0;
    for call in 0..16 {
        for keep in KEEPS {
            let (mut disk, mut other) = both();
            other.close();
            assert!(other.open());
            disk.disk.set_fault(call, Fault::Crash);
            let source = other.engine.as_mut().expect("open");
            let taken = disk.engine().absorb(source, Source::Older).is_ok();
            cuts += u32::from(!taken);
            disk.crash(keep);
            assert!(disk.open());
            let source = other.engine.as_mut().expect("open");
            let taken = disk.engine().absorb(source, Source::Older);
            assert_eq!(taken, Ok(()), "call {call}, {keep:?}");
            assert_eq!(disk.engine().tally.chunks_dropped, 0);
            disk.has_absorbed(other);
            disk.settle();
            disk.check();
        }
    }
    assert!(cuts > 40, "{cuts}");
}

/// Both stores received it, one of them has started it: it has one life.
#[test]
fn an_attempt_that_the_other_store_has_started_is_not_started_again() {
    for age in [Source::Younger, Source::Older] {
        for keep in KEEPS {
            let mut disk = Tester::new(256 << 10);
            let number = disk.receive();
            let mut other = Tester::named(Incarnation::of(9), 64 << 10);
            assert_eq!(other.receive(), number);
            other.start(number);
            other.append(number, Stream::Stdout, 6);
            let source = other.engine();
            assert_eq!(disk.engine().absorb(source, age), Ok(()));
            disk.has_absorbed(other);
            disk.check();
            disk.crash(keep);
            assert!(disk.open());
            disk.settle();
            disk.check();
            disk.start(number);
            assert_eq!(disk.known[&number].goes, 1, "{age:?} {keep:?}");
        }
    }
}

/// The disk could not be read, so memory ran what had ended there. What waits there stays.
#[test]
fn what_waits_on_the_disk_is_not_dropped_for_what_memory_knows() {
    let mut disk = Tester::new(256 << 10);
    let number = disk.receive();
    disk.start(number);
    disk.append(number, Stream::Stdout, 3);
    disk.finish(number);
    for done in [false, true] {
        let mut memory = Tester::named(Incarnation::of(9), 64 << 10);
        memory.receive();
        memory.start(number);
        memory.append(number, Stream::Stdout, 2);
        memory.finish(number);
        if done {
            memory.acknowledge(number, Stream::Stdout, 2);
            memory.acknowledge_final(number);
        }
        assert!(disk.absorb(&mut memory));
        disk.check();
        let waiting = disk.engine().counts().messages_waiting;
        assert_eq!(waiting, 4);
    }
    // What memory held of it is counted, once.
    let tally = disk.engine().tally;
    assert_eq!((tally.chunks_dropped, tally.finals_dropped), (2, 1));
}

/// A disk that is full of results has no room for more: they stay where they are until it has.
#[test]
fn a_full_disk_puts_the_move_off() {
    let mut disk = Tester::new(64 << 10);
    for _ in 0..40 {
        let number = disk.receive();
        disk.start(number);
        disk.finish(number);
    }
    let mut memory = disk.in_memory();
    for _ in 0..12 {
        let number = memory.receive();
        memory.start(number);
        memory.append(number, Stream::Stdout, 5);
        memory.finish(number);
    }
    memory.check();
    if !disk.absorb(&mut memory) {
        memory.check();
        disk.check();
        disk.drain();
        assert!(disk.absorb(&mut memory), "there is room");
    }
    disk.has_absorbed(memory);
    disk.check();
    disk.crash(Keep::Nothing);
    assert!(disk.open());
    disk.settle();
    disk.check();
    let counts = disk.engine().counts();
    assert!(counts.bytes_used <= counts.byte_cap);
}

/// This log knows the attempt as received: the power goes while its output comes over. Output alone
/// would be sent before it was printed here.
#[test]
fn no_output_comes_over_without_the_start_that_printed_it() {
    let (mut before, mut after) = (0, 0);
    for age in [Source::Younger, Source::Older] {
        for call in 0..14 {
            for keep in KEEPS {
                let mut disk = Tester::new(256 << 10);
                let number = disk.receive();
                let mut other = Tester::named(Incarnation::of(9), 256 << 10);
                other.receive();
                other.start(number);
                // More than one segment of the disk.
                for _ in 0..24 {
                    other.append(number, Stream::Stdout, 5);
                }
                disk.disk.set_fault(call, Fault::Crash);
                let _ = disk.engine().absorb(other.engine(), age);
                disk.crash(keep);
                disk.may_have_absorbed(other);
                assert!(disk.open());
                let attempt = &disk.engine().attempts[&ids(number).key()];
                match (attempt.started, attempt.stream(Stream::Stdout).mark.last) {
                    (false, 0) => before += 1,
                    (true, 120) => after += 1,
                    other => panic!("{other:?}: {age:?}, call {call}, {keep:?}"),
                }
            }
        }
    }
    assert!(before > 20 && after > 20, "{before} {after}");
}
