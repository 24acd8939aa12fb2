//! Histories that once lost, repeated or held up something, each named after what went wrong.

use super::engine::Engine;
use super::log::{Segment, file_name};
use super::model::{Tester, command, ids};
use super::sim::{Fault, KEEPS, Keep, Random};
use super::types::*;
use crate::ids::Stream;
use crate::limits::{
    CHUNK_BYTES_MAX, Chunk, ChunkBatch, ChunkBuffer, READ_BYTES_MAX, WINDOW_MESSAGES,
};

const OUT: Stream = Stream::Stdout;

/// The power goes and comes back: what was promised is there.
fn power_cut(tester: &mut Tester, keep: Keep) {
    tester.crash(keep);
    assert!(tester.open(), "{keep:?}");
    tester.settle();
    tester.check();
}

fn phase(tester: &mut Tester, number: u64) -> Option<Phase> {
    let known = tester.engine().known_phase(ids(number).key());
    known.expect("the index answers")
}

fn is_queued(tester: &mut Tester, number: u64) -> bool {
    phase(tester, number) == Some(Phase::Received)
}

fn oldest_generation(engine: &Engine) -> u64 {
    engine.log.segments[0].generation()
}

#[test]
fn a_task_that_reboots_the_device_runs_once() {
    for keep in KEEPS {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        // Between its receipt and its start it is still to be run ...
        power_cut(&mut tester, keep);
        assert!(is_queued(&mut tester, number), "{keep:?}");
        tester.start(number);
        assert_eq!(tester.known[&number].goes, 1);
        // ... and once its start was allowed, never again: it is what cut the power.
        power_cut(&mut tester, keep);
        assert!(tester.known[&number].interrupted, "{keep:?}");
        tester.start(number);
        assert_eq!(tester.known[&number].goes, 1);
    }
}

#[test]
fn a_discarded_task_does_not_start_offline_after_a_power_cut() {
    for keep in KEEPS {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        tester.discard(number);
        power_cut(&mut tester, keep);
        assert_eq!(phase(&mut tester, number), Some(Phase::Discarded));
        tester.start(number);
        assert_eq!(tester.known[&number].goes, 0, "{keep:?}");
    }
}

/// What a restart has read from the page cache, and sent, must be on the medium before.
#[test]
fn what_was_sent_after_a_kill_before_the_sync_outlives_a_power_cut() {
    for fault in [Fault::Crash, Fault::Io(1)] {
        for keep in KEEPS {
            let mut tester = Tester::new(1 << 20);
            let number = tester.receive();
            tester.start(number);
            // The write is done, its sync is not.
            tester.disk.set_fault(1, fault);
            tester.append(number, OUT, 3);
            assert_eq!(tester.known[&number].last[0], (0, 3));
            tester.kill();
            assert!(tester.open());
            tester.settle();
            tester.check();
            assert_eq!(
                tester.known[&number].last[0],
                (3, 3),
                "it was read and sent"
            );
            power_cut(&mut tester, keep);
            assert_eq!(tester.known[&number].last[0], (3, 3), "{fault:?} {keep:?}");
        }
    }
}

/// A unit is all or nothing, and its remains are in nobody's way.
#[test]
fn a_unit_of_which_one_block_reached_the_medium_is_dropped_whole() {
    let mut dropped = 0;
    for keep in [Keep::LastHalf].into_iter().chain((0..20).map(Keep::Some)) {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        let other = tester.receive();
        tester.start(number);
        tester.append(number, OUT, 2);
        tester.disk.set_fault(1, Fault::Crash);
        tester.append(number, OUT, 5);
        tester.crash(keep);
        assert!(tester.open());
        let last = |tester: &mut Tester| {
            let attempt = &tester.engine().attempts[&ids(number).key()];
            attempt.stream(OUT).mark.last
        };
        let found = last(&mut tester);
        assert!(found == 2 || (found == 7 && keep != Keep::LastHalf));
        dropped += u32::from(found == 2);
        tester.settle();
        tester.check();
        // What is written behind the remains is found again.
        tester.start(other);
        tester.append(other, OUT, 4);
        power_cut(&mut tester, Keep::Nothing);
        assert_eq!(last(&mut tester), found, "{keep:?}");
        assert_eq!(tester.known[&other].last[0], (4, 4), "{keep:?}");
    }
    assert!(dropped > 10, "{dropped} were torn");
}

#[test]
fn a_start_that_was_copied_behind_its_final_does_not_reopen_the_attempt() {
    for keep in KEEPS {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        tester.start(number);
        let first = oldest_generation(tester.engine());
        tester.engine().log.seal_active();
        tester.finish(number);
        assert_eq!(tester.engine().make_room(false), Ok(true));
        let attempt = &tester.engine().attempts[&ids(number).key()];
        let fin = attempt.fin.expect("it ended");
        assert!(attempt.identity_at > fin.at, "the start was copied behind");
        assert!(oldest_generation(tester.engine()) > first);
        power_cut(&mut tester, keep);
        assert_eq!(
            phase(&mut tester, number),
            Some(Phase::Finished { held: true })
        );
        assert!(!tester.known[&number].interrupted, "{keep:?}");
    }
}

/// The segment with the end of a life may not go before the one with its begin: without the index
/// the begin alone would be run again.
#[test]
fn an_index_lost_after_rotation_costs_no_second_run() {
    for keep in KEEPS {
        let mut tester = Tester::new(1 << 20);
        let done = tester.receive();
        // This one keeps the first segment.
        let waiting = tester.receive();
        tester.engine().log.seal_active();
        tester.start(done);
        tester.finish(done);
        tester.acknowledge_final(done);
        let third = tester.receive();
        tester.engine().log.seal_active();
        tester.discard(third);
        tester.engine().log.seal_active();
        tester.receive();
        assert!(tester.engine().retire_dead().is_ok());
        tester.disk.lose_index();
        power_cut(&mut tester, keep);
        assert!(!is_queued(&mut tester, done), "{keep:?}");
        assert!(!is_queued(&mut tester, third), "{keep:?}");
        assert!(is_queued(&mut tester, waiting), "{keep:?}");
    }
}

#[test]
fn a_store_whose_every_segment_is_partly_alive_goes_on_at_the_cap() {
    let cap_bytes = 96 << 10;
    let mut tester = Tester::new(cap_bytes);
    let running = tester.receive();
    tester.start(running);
    let mut waiting = Vec::new();
    for round in 0..120 {
        if waiting.len() < 8 && round % 3 == 0 {
            waiting.push(tester.receive());
        }
        let before = tester.known[&running].last[0].0;
        tester.append(running, OUT, 5);
        let last = tester.known[&running].last[0].0;
        assert_eq!(last, before + 5, "round {round}: output is taken");
        tester.acknowledge(running, OUT, last);
        let used: u64 = tester.engine().log.used_bytes();
        assert!(used <= cap_bytes, "round {round}: {used} bytes");
        tester.check();
    }
    assert_eq!(waiting.len(), 8);
    tester.finish(running);
    assert!(tester.known[&running].finished.0, "the final has room");
    for keep in [Keep::Nothing, Keep::Everything] {
        power_cut(&mut tester, keep);
        for &number in &waiting {
            let task = tester.engine().load_task(ids(number).key());
            let task = task.expect("readable").expect("held");
            assert_eq!(task.command, command(number), "{keep:?}");
        }
    }
}

/// Nothing is retired whose memory is not durable elsewhere.
#[test]
fn a_failed_index_sync_at_retirement_forgets_no_attempt() {
    let mut failures = 0;
    for call in 0..8 {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        tester.start(number);
        tester.finish(number);
        tester.acknowledge_final(number);
        // Takes the closing with it.
        tester.receive();
        tester.engine().log.seal_active();
        let last = tester.receive();
        // The waiting ones are copied forward, so that the first segment can go.
        tester.disk.set_fault(call, Fault::Io(1));
        for _ in 0..2 {
            failures += u32::from(tester.engine().make_room(false).is_err());
        }
        tester.disk.clear_fault();
        power_cut(&mut tester, Keep::Everything);
        assert_eq!(
            phase(&mut tester, number),
            Some(Phase::Finished { held: false }),
            "call {call}"
        );
        assert!(is_queued(&mut tester, last));
    }
    assert!(failures > 1, "the fault was met");
}

/// A fault that hits the header of a new segment and then the removal of its file.
#[test]
fn a_file_that_could_not_be_removed_counts_until_it_is() {
    for call in 0..4 {
        let mut tester = Tester::new(96 << 10);
        for _ in 0..12 {
            tester.engine().log.seal_active();
            tester.disk.set_fault(call, Fault::Io(3));
            tester.receive();
            tester.disk.clear_fault();
            tester.check();
        }
        tester.engine().log.seal_active();
        let last = tester.receive();
        assert!(is_queued(&mut tester, last), "call {call}");
        let log = &tester.engine().log;
        let files = log.segments.len() + log.free.len();
        assert_eq!(tester.disk.names().len(), files, "call {call}");
    }
}

/// It would be read after a restart, when the closings that go with it may have gone for long.
#[test]
fn a_segment_that_can_be_neither_blanked_nor_removed_stays_in_the_log() {
    let mut tester = Tester::new(1 << 20);
    tester.receive();
    let first = oldest_generation(tester.engine());
    tester.disk.set_fault(0, Fault::Io(2));
    assert!(tester.engine().log.retire(first).is_err());
    assert_eq!(oldest_generation(tester.engine()), first);
    tester.check();
    tester.disk.clear_fault();
    assert!(tester.engine().log.retire(first).is_ok());
    assert!(tester.engine().log.segments.is_empty());
}

/// A cut is known after a restart also if no chunk of the stream is left to show it.
#[test]
fn output_is_marked_as_cut_before_it_is_dropped() {
    for keep in KEEPS {
        let mut tester = Tester::new(96 << 10);
        let quiet = tester.receive();
        tester.start(quiet);
        tester.append(quiet, OUT, 5);
        let loud = tester.receive();
        tester.start(loud);
        let first = oldest_generation(tester.engine());
        for round in 0.. {
            tester.append(loud, OUT, 5);
            if oldest_generation(tester.engine()) > first {
                break;
            }
            assert!(round < 200, "the cap is reached");
        }
        tester.crash(keep);
        assert!(tester.open());
        let mark = &tester.engine().attempts[&ids(quiet).key()].stream(OUT).mark;
        assert!(mark.truncated && mark.last == 5, "{keep:?}: {mark:?}");
        tester.settle();
        tester.check();
    }
}

/// After a failed sync the log goes on elsewhere, so that one bad block does not stop it.
#[test]
fn a_segment_that_cannot_be_synced_is_left_behind() {
    for call in 0..12 {
        let mut tester = Tester::new(1 << 20);
        let number = tester.receive();
        tester.start(number);
        tester.append(number, OUT, 2);
        tester.disk.set_fault(call, Fault::BadFile);
        let mut refused = 0;
        for _ in 0..12 {
            let before = tester.known[&number].last[0].0;
            tester.append(number, OUT, 2);
            refused += u32::from(tester.known[&number].last[0].0 == before);
        }
        assert_eq!(refused, 1, "call {call}");
        tester.check();
        power_cut(&mut tester, Keep::Nothing);
    }
}

/// A generation is known to be used before a unit carries it, so that none is ever used twice.
#[test]
fn a_header_is_durable_before_its_first_unit() {
    let mut begun = 0;
    for seed in 0..20 {
        let random = &mut Random::new(seed);
        let mut tester = Tester::new(96 << 10);
        for _ in 0..300 {
            tester.step(random);
        }
        let last = tester.engine().log.segments.last();
        begun += last.map_or(0, Segment::generation);
        assert_eq!(tester.disk.early_units(), 0, "seed {seed}");
    }
    assert!(begun > 60, "{begun} segments were begun");
}

/// Its unit had failed and its file was removed; a file system that brings the file back must not
/// bring back what was refused.
#[test]
fn a_segment_that_was_passed_over_does_not_come_back() {
    let mut tester = Tester::new(1 << 20);
    tester.receive();
    tester.engine().log.seal_active();
    let mut other = Tester::new(1 << 20);
    other.receive();
    other.engine().log.seal_active();
    // On one disk the unit is stored, on the other it fails. The header takes one or two calls.
    let stored = other.receive();
    let failing = (0..6).find(|&call| {
        let mut fork = Tester::new(1 << 20);
        fork.receive();
        fork.engine().log.seal_active();
        fork.disk.set_fault(call, Fault::Io(1));
        let refused = fork.receive();
        fork.known[&refused].received == (false, true)
            && fork.disk.names() == tester.disk.names()
            && fork.engine().log.segments.len() == 1
    });
    tester
        .disk
        .set_fault(failing.expect("one call is the unit's"), Fault::Io(1));
    let refused = tester.receive();
    assert_eq!(refused, stored);
    tester.disk.clear_fault();
    let next = tester.receive();
    let name = file_name(other.engine().log.segments[1].name);
    let revenant = other.disk.contents(&name);
    assert!(!tester.disk.names().contains(&name), "it was removed");
    tester.disk.put_back(&name, revenant);
    tester.crash(Keep::Everything);
    assert!(tester.open());
    assert_eq!(phase(&mut tester, refused), None);
    assert!(is_queued(&mut tester, next));
}

/// What the server has acknowledged is not told as lost when its segment is gone.
#[test]
fn acknowledged_output_whose_segment_was_retired_is_no_hole() {
    for keep in KEEPS {
        let mut tester = Tester::new(256 << 10);
        let number = tester.receive();
        tester.start(number);
        for round in 0.. {
            tester.append(number, OUT, 5);
            let last = tester.known[&number].last[0].0;
            tester.acknowledge(number, OUT, last - 2);
            let segments = &tester.engine().log.segments;
            let begun = segments.last().map_or(0, Segment::generation);
            if begun > segments.len() as u64 + 2 {
                break;
            }
            assert!(round < 2_000, "segments are retired");
        }
        power_cut(&mut tester, keep);
        let mark = &tester.engine().attempts[&ids(number).key()]
            .stream(OUT)
            .mark;
        assert!(!mark.truncated, "{keep:?}: {mark:?}");
    }
}

/// The acknowledgements below a refused chunk were known to memory alone: after a restart nobody
/// could send what they were for, and the attempt stayed open for good.
#[test]
fn acknowledgements_below_a_refused_chunk_outlive_their_segment() {
    for keep in KEEPS {
        let mut tester = Tester::new(96 << 10);
        let number = tester.receive();
        tester.start(number);
        tester.append(number, OUT, 6);
        tester.engine().log.seal_active();
        tester.finish(number);
        for sequence in 1..=5 {
            tester.acknowledge_alone(number, OUT, sequence);
        }
        tester.reject(number, OUT, 6);
        let first = oldest_generation(tester.engine());
        let other = tester.receive();
        tester.start(other);
        for round in 0.. {
            tester.append(other, OUT, 5);
            if oldest_generation(tester.engine()) > first {
                break;
            }
            assert!(round < 200, "the cap is reached");
        }
        power_cut(&mut tester, keep);
        let attempt = &tester.engine().attempts[&ids(number).key()];
        assert_eq!(attempt.stream(OUT).waiting(), 0, "{keep:?}");
    }
}

/// A header on a bad block can be blanked as little as any other part of the file. The log stood
/// still for good, since everything behind a guarded segment waits for it.
#[test]
fn a_guarded_segment_on_a_bad_block_is_removed() {
    let mut tester = Tester::new(96 << 10);
    let number = tester.receive();
    tester.start(number);
    tester.append(number, OUT, 2);
    tester.disk.set_fault(0, Fault::BadFile);
    tester.append(number, OUT, 2);
    for _ in 0..200 {
        tester.append(number, OUT, 5);
        let last = tester.known[&number].last[OUT.index()].0;
        tester.acknowledge(number, OUT, last);
        tester.check();
    }
    let (confirmed, last) = tester.known[&number].last[OUT.index()];
    assert!(
        confirmed == last && confirmed > 900,
        "{confirmed} of {last}"
    );
    power_cut(&mut tester, Keep::Nothing);

    let mut tester = Tester::new(1 << 20);
    tester.receive();
    let first = oldest_generation(tester.engine());
    tester.disk.set_fault(0, Fault::BadFile);
    tester.receive();
    tester.receive();
    let log = &mut tester.engine().log;
    let guard = &log.segments[1].header;
    assert!(guard.guards_predecessor && guard.predecessor == first);
    assert!(log.retire(first).is_ok());
    assert!(log.position(first).is_none());
}

/// Seed 200152317 of the simulator: the final was stored, the disk failed before it was noted that
/// it was reported already, and it was sent once more.
#[test]
fn a_final_that_was_reported_first_is_stored_as_such_or_not_at_all() {
    let (mut stored, mut refused) = (0, 0);
    for keep in KEEPS {
        for call in 0..6 {
            let mut tester = Tester::new(1 << 20);
            let number = tester.receive();
            tester.start(number);
            tester.disk.set_fault(call, Fault::Io(100));
            tester.finish_reported(number);
            tester.disk.clear_fault();
            let found = phase(&mut tester, number);
            if tester.known[&number].finished.0 {
                assert_eq!(found, Some(Phase::Finished { held: false }), "call {call}");
                stored += 1;
            } else {
                assert_eq!(found, Some(Phase::Started), "call {call}");
                refused += 1;
            }
            power_cut(&mut tester, keep);
            let found = phase(&mut tester, number);
            let is_interrupted = tester.known[&number].interrupted;
            let held = is_interrupted && !tester.known[&number].finished.0;
            assert_eq!(found, Some(Phase::Finished { held }), "call {call}");
        }
    }
    assert!(
        stored > 0 && refused > 0,
        "{stored} stored, {refused} refused"
    );
}

/// A batch ends before a chunk that has no room in it. All of that chunk's unit was read to find this
/// out, and once more by the next read.
#[test]
fn what_has_no_room_in_a_batch_is_not_read() {
    let mut tester = Tester::new(64 << 20);
    let number = tester.receive();
    tester.start(number);
    let key = ids(number).key();
    let units = 6;
    for unit in 0..units {
        let full = || Chunk::new(ChunkBuffer::from_slice(&[b'x'; CHUNK_BYTES_MAX]).expect("fits"));
        let batch: ChunkBatch = std::iter::repeat_with(full).take(8).collect();
        let first = 8 * unit + 1;
        let answer = tester.ask(|engine, reply| engine.append(key, OUT, first, batch, reply));
        assert!(answer.is_ok());
    }
    let mut from = Cursor::START;
    for unit in 0..units {
        let before = tester.disk.bytes_read();
        let batch = tester.engine().read(ReadRequest {
            from,
            max_messages: WINDOW_MESSAGES,
            max_bytes: READ_BYTES_MAX,
            ..ReadRequest::default()
        });
        let read = tester.disk.bytes_read() - before;
        let payload = batch.messages.iter().map(|message| match &message.body {
            Body::Output { data, .. } => data.len(),
            Body::Final { .. } => 0,
        });
        assert_eq!(payload.sum::<usize>(), READ_BYTES_MAX, "unit {unit}");
        // With the heads, and what else stands at the begin of the log.
        let bound = READ_BYTES_MAX + 16 * 1024;
        assert!(read <= bound as u64, "unit {unit}: {read} bytes were read");
        from = batch.next;
    }
}
