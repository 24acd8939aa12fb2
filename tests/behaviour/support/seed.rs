//! Reproducible randomness: SplitMix64 from `HOSTLINK_TEST_SEED`, or from the clock.

use std::time::{SystemTime, UNIX_EPOCH};

pub struct Random {
    pub seed: u64,
    state: u64,
}

impl Random {
    /// The seed is printed; the test harness shows it where the test fails.
    pub fn from_environment() -> Random {
        let given = std::env::var("HOSTLINK_TEST_SEED").ok();
        let seed = match given {
            Some(text) => text.parse().expect("HOSTLINK_TEST_SEED is a number"),
            None => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |now| now.as_micros() as u64),
        };
        eprintln!("seed {seed}: set HOSTLINK_TEST_SEED={seed} to repeat this run");
        Random { seed, state: seed }
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}
