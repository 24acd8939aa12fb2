//! The whole agent under deterministic simulation: the real driver, session and outbox, with a
//! virtual clock, a simulated disk, scripted tasks, and a network and a server that misbehave.
//!
//! - [`world`]: one history; [`toggles`]: what may happen in it; [`trouble`]: what goes wrong.
//! - [`device`]: the agent's lives; [`outside`]: what it reaches of the world; [`time`]: its clock.
//! - [`flight`]: what it has sent and has no answer to; [`dropped`]: what it must not send any more.
//! - [`server`] and [`hello`]: the control plane; [`ledger`]: what has really happened; [`rules`]:
//!   what must hold of every frame.
//!
//! In the end the network and the server are good, and everything must arrive. A seed repeats a
//! history: `HOSTLINK_AGENT_SEED=n`; `HOSTLINK_AGENT_HISTORIES=n` runs so many, beginning with
//! `HOSTLINK_AGENT_FIRST_SEED`. See `tests/simulator.md`.

mod device;
mod dropped;
mod flight;
mod hello;
mod ledger;
mod outside;
mod rules;
mod server;
mod time;
mod toggles;
mod trouble;
mod world;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use self::toggles::LateToggles;
use self::world::World;

pub use self::outside::Outside;
pub use self::time::VirtualTime;

/// Where nothing is optimised. `tests/optimised.toml` wants 20,000.
const HISTORIES: u64 = 3_000;
/// A campaign tells how far it is after so many.
const TELL_EACH: u64 = 50_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Shows what happens, with the log of the agent.
fn tell_all() {
    struct Stdout;
    impl log::Log for Stdout {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            println!("    {}: {}", record.level(), record.args());
        }
        fn flush(&self) {}
    }
    static LOGGER: Stdout = Stdout;
    // Another test may have set one.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(log::LevelFilter::Debug);
    TELLS.store(true, Ordering::Relaxed);
}

static TELLS: AtomicBool = AtomicBool::new(false);

/// Prints what happens while one history is repeated.
macro_rules! tell {
    ($($arguments:tt)*) => {
        if $crate::agent::simulation::TELLS.load(std::sync::atomic::Ordering::Relaxed) {
            println!($($arguments)*);
        }
    };
}
use tell;

/// Runs one history.
fn history(seed: u64) -> u64 {
    notice_panics();
    let mut world = World::new(seed);
    world.run();
    world.events.get()
}

/// A history that was found before [`LateToggles`] were there.
fn early_history(seed: u64) {
    notice_panics();
    World::with(seed, LateToggles::default()).run();
}

thread_local! {
    static HAS_PANICKED: Cell<bool> = const { Cell::new(false) };
}

/// The executor keeps the panic of a task for whoever awaits the task, which nobody may do: the
/// driver would seem to have stopped. From here on [`HAS_PANICKED`] tells of any in this thread.
fn notice_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            HAS_PANICKED.set(true);
            before(info);
        }));
    });
    HAS_PANICKED.set(false);
}

/// The task hears that its last chunks are stored when the same turn of the store has given them up.
#[test]
fn chunks_stored_and_given_up_in_one_turn_are_lost() {
    for seed in [1_004_070, 2_005_535] {
        early_history(seed);
    }
}

/// A session ends and its final is reported, while the final is already in the socket.
#[test]
fn a_final_may_be_in_the_socket_when_its_report_begins() {
    early_history(2_007_100);
}

/// A chunk waits for room in the socket, and is acknowledged falsely or is part of a gap before it
/// is there. The agent does not count it any more.
#[test]
fn what_was_answered_before_it_was_sent_takes_no_room_in_the_window() {
    for seed in [10_018_129, 10_019_680, 20_004_444, 20_016_203] {
        early_history(seed);
    }
}

/// The power goes while a stream is given up. That may be on the disk by then.
#[test]
fn a_stream_may_be_given_up_when_the_power_goes() {
    for seed in [10_004_116, 20_003_522, 20_026_431] {
        early_history(seed);
    }
}

#[test]
fn whatever_happens_nothing_is_lost_or_run_twice() {
    if let Some(seed) = number("HOSTLINK_AGENT_SEED") {
        tell_all();
        println!("{:#?}", World::new(seed).toggles);
        history(seed);
        return;
    }
    // With it the campaign goes on behind a failure.
    let goes_on = number("HOSTLINK_AGENT_GO_ON").is_some();
    let first = number("HOSTLINK_AGENT_FIRST_SEED").unwrap_or(0);
    let count = number("HOSTLINK_AGENT_HISTORIES").unwrap_or(HISTORIES);
    let next = AtomicU64::new(first);
    let failures = AtomicU64::new(0);
    let events = AtomicU64::new(0);
    let begun = Instant::now();
    let run = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count || (!goes_on && failures.load(Ordering::Relaxed) > 0) {
                return;
            }
            if seed > first && (seed - first).is_multiple_of(TELL_EACH) {
                // The other threads still have one each.
                let seconds = begun.elapsed().as_secs();
                println!("{} histories before seed {seed}, {seconds} s", seed - first);
            }
            match catch_unwind(AssertUnwindSafe(|| history(seed))) {
                Ok(happened) => {
                    events.fetch_add(happened, Ordering::Relaxed);
                }
                Err(_) => {
                    println!("HOSTLINK_AGENT_SEED={seed} repeats this failure");
                    failures.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(run);
        }
    });
    println!(
        "{count} histories from seed {first}, {} events, {:.1} s",
        events.load(Ordering::Relaxed),
        begun.elapsed().as_secs_f64()
    );
    assert_eq!(failures.load(Ordering::Relaxed), 0, "histories have failed");
}
