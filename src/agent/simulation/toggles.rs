//! What one history may do. Drawn once for each seed, so that rare combinations occur.

use std::time::Duration;

use crate::session::backoff::Random;

/// Draws.
#[derive(Debug, Clone)]
pub struct Dice(Random);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(Random::new(seed))
    }

    pub fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// From 0 up to, and without, `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.next_u64() % bound
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from + 1))
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

#[derive(Debug, Clone)]
pub struct Toggles {
    // The server's answers.
    pub loses_frames: bool,
    pub withholds_acks: bool,
    pub repeats_acks: bool,
    /// Its acknowledgements take their time, each its own: they overtake one another.
    pub late_acks: bool,
    pub cumulative_acks: bool,
    /// Acknowledges what it has not got.
    pub false_acks: bool,
    pub foreign_acks: bool,
    pub false_gaps: bool,
    pub repeats_gaps: bool,
    pub busy: bool,
    pub refuses: bool,
    pub ends_sessions: bool,
    /// Never accepts a jump, whatever is flagged.
    pub old: bool,
    pub never_answers_hello: bool,
    pub directs: bool,
    pub directs_nonsense: bool,
    pub takes_finals_from_hello: bool,
    pub discards: bool,
    pub cancels: bool,
    pub offers_again: bool,
    pub restarts: bool,
    pub forgets: bool,
    pub garbage: bool,
    pub grants: bool,
    // HTTP.
    pub http_fails: bool,
    pub http_hangs: bool,
    pub http_loses_answers: bool,
    pub http_refuses: bool,
    // The network.
    pub dials_fail: bool,
    pub dials_hang: bool,
    pub cuts: bool,
    pub stalls: bool,
    pub slow: bool,
    /// Frames that the socket takes while the server does not read.
    pub socket_frames: usize,
    // The device.
    pub kills: bool,
    pub power_cuts: bool,
    pub stops: bool,
    pub suspends: bool,
    pub disk_errors: bool,
    pub disk_full: bool,
    pub bad_block: bool,
    pub slow_disk: bool,
    pub small_cap: bool,
    // Tasks.
    pub large_chunks: bool,
    pub many_chunks: bool,
    pub without_channel: bool,
    pub tasks: u64,
    pub troubled_for: Duration,
    pub late: LateToggles,
}

/// Drawn from dice of their own: without them a history is the one that its seed named before they
/// were there.
#[derive(Debug, Clone, Default)]
pub struct LateToggles {
    /// Withholds one acknowledgement in twelve, not every second.
    pub withholds_few: bool,
    /// Output of several windows.
    pub bulk: bool,
    /// The disk fails when something is to be dropped.
    pub fails_at_drops: bool,
}

impl LateToggles {
    pub fn draw(seed: u64) -> LateToggles {
        let mut dice = Dice::new(seed ^ 0x5deece66d);
        LateToggles {
            withholds_few: dice.one_in(2),
            bulk: dice.one_in(100),
            fails_at_drops: dice.one_in(6),
        }
    }
}

impl Toggles {
    pub fn draw(dice: &mut Dice, late: LateToggles) -> Toggles {
        let mut toss = |one_in: u64| dice.one_in(one_in);
        let (large_chunks, small_cap) = (toss(12) || late.bulk, toss(10));
        Toggles {
            loses_frames: toss(4),
            withholds_acks: toss(5),
            repeats_acks: toss(4),
            late_acks: toss(3),
            cumulative_acks: toss(2),
            false_acks: toss(12),
            foreign_acks: toss(8),
            false_gaps: toss(8),
            repeats_gaps: toss(6),
            busy: toss(6),
            refuses: toss(8),
            ends_sessions: toss(12),
            old: toss(10),
            never_answers_hello: toss(12),
            directs: toss(2),
            directs_nonsense: toss(10),
            takes_finals_from_hello: toss(2),
            discards: toss(12),
            cancels: toss(10),
            offers_again: toss(3),
            restarts: toss(5),
            forgets: toss(3),
            garbage: toss(10),
            grants: toss(2),
            http_fails: toss(5),
            http_hangs: toss(12),
            http_loses_answers: toss(8),
            http_refuses: toss(10),
            dials_fail: toss(5),
            dials_hang: toss(12),
            cuts: toss(2),
            stalls: toss(4),
            slow: toss(5),
            socket_frames: if toss(3) { 2 } else { 40 },
            kills: toss(4),
            power_cuts: toss(3),
            stops: toss(12),
            suspends: toss(10),
            disk_errors: toss(6),
            disk_full: toss(10),
            bad_block: toss(20),
            slow_disk: toss(8),
            small_cap: small_cap && !large_chunks,
            large_chunks,
            many_chunks: toss(6),
            without_channel: toss(8),
            tasks: 1 + dice.below(4),
            troubled_for: match dice.below(8) {
                0 => dice.millis(30_000, 150_000),
                _ => dice.millis(500, 30_000),
            },
            late,
        }
    }
}
