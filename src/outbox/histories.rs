//! Random histories with crashes, also inside the recovery, against the model.
//!
//! A seed reproduces a history. One that fails is made short: what it chose is cut and lowered as
//! long as it still fails, and the choices that are left are named.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::model::Tester;
use super::sim::{Fault, Keep, Random};

/// Of each of the three tests below, when nothing else is said.
const HISTORIES: u64 = 3_334;
/// Runs that making a failure short may take.
const SHRINKING_RUNS: usize = 3_000;

thread_local! {
    static TRYING: Cell<bool> = const { Cell::new(false) };
}

fn history(random: &mut Random, cap_bytes: u64) {
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
            _ if random.below(2) == 0 => Keep::Pages(random.below(1 << 32)),
            _ => Keep::Some(random.below(1 << 32)),
        };
        tester.crash(keep);
        if random.below(2) == 0 {
            tester.disk.set_fault(random.below(20), Fault::Crash);
            let _ = tester.open();
            tester.crash(Keep::Some(random.below(1 << 32)));
        }
        assert!(tester.open(), "a good disk opens");
        tester.settle();
        tester.check();
        if random.below(4) == 0 {
            tester.detour(random);
        }
    }
}

/// `HOSTLINK_HISTORIES` makes the run longer, and `HOSTLINK_HISTORY_SEED` is the first seed:
/// `HOSTLINK_HISTORIES=100000 cargo test --release --lib outbox::histories`.
/// `HOSTLINK_HISTORY_CHOICES` makes these choices instead, as a failure has named them.
fn histories(cap_bytes: u64) {
    if let Ok(text) = std::env::var("HOSTLINK_HISTORY_CHOICES") {
        let choices = text.split(',').map(|choice| choice.trim().parse());
        let choices = choices.collect::<Result<_, _>>().expect("numbers");
        return history(&mut Random::replay(choices), cap_bytes);
    }
    let number = |name: &str, default: u64| match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    };
    let first = number("HOSTLINK_HISTORY_SEED", 0);
    let count = number("HOSTLINK_HISTORIES", HISTORIES);
    for seed in first..first + count {
        let mut random = Random::new(seed);
        if fails(|| history(&mut random, cap_bytes)) {
            let choices = shortest(random.into_choices(), |choices| {
                fails(|| history(&mut Random::replay(choices.to_vec()), cap_bytes))
            });
            eprintln!(
                "history {seed} with a cap of {cap_bytes} bytes fails. Made short:\n\
                 HOSTLINK_HISTORY_CHOICES={}",
                choices
                    .iter()
                    .map(u64::to_string)
                    .collect::<Vec<_>>()
                    .join(",")
            );
            history(&mut Random::replay(choices), cap_bytes);
            panic!("history {seed} with a cap of {cap_bytes} bytes failed");
        }
        if count > 10 * HISTORIES && (seed + 1 - first).is_multiple_of(HISTORIES) {
            let done = seed + 1 - first;
            eprintln!("{done} histories with a cap of {cap_bytes} bytes");
        }
    }
}

/// What it says when it fails is not heard: the short history says it again.
fn fails(run: impl FnOnce()) -> bool {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !TRYING.get() {
                usual(info);
            }
        }));
    });
    TRYING.set(true);
    let failed = catch_unwind(AssertUnwindSafe(run)).is_err();
    TRYING.set(false);
    failed
}

/// Choices that still fail and are no longer or greater than these: runs of them are left out, each
/// half as long as the one before, and then each choice is lowered.
fn shortest(mut choices: Vec<u64>, mut fails: impl FnMut(&[u64]) -> bool) -> Vec<u64> {
    let mut runs = SHRINKING_RUNS;
    let mut still_fails = |choices: &[u64]| {
        runs = runs.saturating_sub(1);
        runs > 0 && fails(choices)
    };
    let mut len = choices.len().next_power_of_two();
    while len > 0 {
        let mut from = choices.len();
        while from > 0 {
            from = from.saturating_sub(len);
            let to = (from + len).min(choices.len());
            let mut shorter = choices.clone();
            shorter.drain(from..to);
            if still_fails(&shorter) {
                choices = shorter;
            }
        }
        len /= 2;
    }
    for at in 0..choices.len() {
        for lower in [0, choices[at] / 2, choices[at].saturating_sub(1)] {
            let mut lowered = choices.clone();
            lowered[at] = lower;
            if lower < choices[at] && still_fails(&lowered) {
                choices = lowered;
                break;
            }
        }
    }
    choices
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

#[test]
fn a_failure_is_made_short() {
    let choices = Random::new(7);
    let mut random = choices;
    for _ in 0..500 {
        random.below(100);
    }
    let choices = random.into_choices();
    // Fails when a large choice comes before an even one.
    let fails = |choices: &[u64]| {
        let large = choices.iter().position(|&choice| choice > 90);
        large.is_some_and(|at| choices[at..].iter().skip(1).any(|choice| choice % 2 == 0))
    };
    assert!(fails(&choices));
    let short = shortest(choices, fails);
    assert!(fails(&short));
    assert_eq!(short.len(), 2, "{short:?}");
    assert_eq!(short[1], 0);
}
