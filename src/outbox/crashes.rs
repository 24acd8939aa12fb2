//! Crashes at every call, damage and faults, against the model.

use super::model::{STORE, Tester, bounds, command, content, final_of, ids, number_of};
use super::recovery;
use super::sim::{Fault, Keep, Random, SimDisk, SimIndex};
use super::types::*;
use crate::ids::Stream;

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

const KEEPS: [Keep; 9] = [
    Keep::Nothing,
    Keep::Everything,
    Keep::FirstHalf,
    Keep::LastHalf,
    Keep::Some(1),
    Keep::Some(2),
    Keep::Some(3),
    Keep::Pages(1),
    Keep::Pages(2),
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

/// After each crash of the script the power fails again, after each call of the recovery.
#[test]
fn a_crash_at_each_call_of_the_recovery_keeps_every_promise() {
    let mut whole = Tester::new(64 << 10);
    let before = whole.disk.calls();
    scripted(&mut whole);
    let calls = whole.disk.calls() - before;
    let mut longest = 0;
    for crashed_at in 0..=calls {
        let mut crashed = Tester::new(64 << 10);
        crashed.disk.set_fault(crashed_at, Fault::Crash);
        scripted(&mut crashed);
        crashed.crash(Keep::Some(crashed_at));
        for call in 0.. {
            let mut reached = false;
            for keep in [Keep::Nothing, Keep::Everything, Keep::Some(call)] {
                let mut tester = crashed.fork();
                let before = tester.disk.calls();
                tester.disk.set_fault(call, Fault::Crash);
                let run = || {
                    let opened = tester.open();
                    reached |= !opened || tester.disk.calls() > before + call;
                    tester.crash(keep);
                    assert!(tester.open());
                    tester.settle();
                    tester.check();
                };
                let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
                assert!(
                    run.is_ok(),
                    "crash at {crashed_at}, again at {call}, {keep:?}"
                );
            }
            longest = longest.max(call);
            if !reached {
                break;
            }
        }
    }
    assert!(longest > 5, "recovery works the disk: {longest} calls");
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

/// Every bit and every byte. What is left of a store that was damaged must be as it was, and the damage told.
#[test]
fn any_flipped_bit_and_any_cut_costs_only_what_it_hit() {
    let mut tester = Tester::new(128 << 10);
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
    let disk = &tester.disk;
    let try_with = |damaged: Vec<u8>, place: usize| {
        let fork = disk.fork();
        fork.overwrite(&name, damaged);
        check_damaged(fork, number, other, place);
    };
    const WORKERS: usize = 4;
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (whole, try_with) = (&whole, &try_with);
            scope.spawn(move || {
                for bit in (worker..used * 8).step_by(WORKERS) {
                    let mut damaged = whole.clone();
                    damaged[bit / 8] ^= 1 << (bit % 8);
                    try_with(damaged, bit);
                }
                for cut in (worker..used).step_by(WORKERS) {
                    try_with(whole[..cut].to_vec(), cut);
                }
            });
        }
    });
}

fn check_damaged(disk: SimDisk, number: u64, other: u64, place: usize) {
    let (mut engine, _) = reopened(&disk, 128 << 10);
    let (mut before, mut messages) = (0, 0);
    let mut batch = Batch::default();
    // A damaged length can end a batch before its time.
    while !batch.at_end {
        batch = engine.read(ReadRequest {
            from: batch.next,
            max_messages: 100,
            max_bytes: 1 << 20,
            ..ReadRequest::default()
        });
        messages += batch.messages.len() as i64;
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
    }
    let snapshot = engine.snapshot(1 << 20);
    if before < 9 && engine.attempts.contains_key(&ids(number).key()) && before > 0 {
        assert!(engine.tally.records_damaged > 0, "untold damage at {place}");
    }
    let lost_chunks = 9 - (messages - 1).max(0);
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

/// A disk that lies about syncs may lose what was confirmed. Even then the store opens, and what it
/// gives is what was written.
#[test]
fn a_disk_that_lies_costs_messages_but_changes_none() {
    for seed in 0..150 {
        let random = &mut Random::new(seed);
        let mut tester = Tester::new(96 << 10);
        tester.disk.set_fault(random.below(60), Fault::LyingSync);
        for _ in 0..random.below(120) {
            tester.step(random);
        }
        tester.crash(match seed % 3 {
            0 => Keep::Nothing,
            1 => Keep::Some(seed),
            _ => Keep::Pages(seed),
        });
        let (mut engine, _) = reopened(&tester.disk, 96 << 10);
        let batch = engine.read(ReadRequest {
            max_messages: 10_000,
            max_bytes: 1 << 24,
            ..ReadRequest::default()
        });
        for message in &batch.messages {
            let number = number_of(&message.ids);
            match &message.body {
                Body::Output {
                    stream,
                    sequence,
                    data,
                    ..
                } => {
                    let expected = content(number, *stream, *sequence);
                    assert_eq!(batch.buffer[data.clone()], expected, "seed {seed}");
                }
                Body::Final {
                    exit_code, output, ..
                } if *exit_code != -1 => {
                    let expected = final_of(number).output;
                    assert_eq!(batch.buffer[output.clone()], expected, "seed {seed}");
                }
                Body::Final { .. } => {}
            }
        }
    }
}

/// Whatever was done to it, it opens.
fn reopened(disk: &SimDisk, cap_bytes: u64) -> (super::engine::Engine, Recovered) {
    let opened = recovery::open(
        Box::new(disk.clone()),
        Box::new(SimIndex::open(disk)),
        bounds(cap_bytes),
        STORE,
        || 1_000,
    );
    opened.expect("the store opens")
}
