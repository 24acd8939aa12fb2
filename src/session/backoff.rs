//! Reconnect delays: exponential, full jitter above a floor (DESIGN.md, Settings).

use std::time::Duration;

use crate::limits::{RECONNECT_FLOOR, RETRY_AFTER_MAX};

/// Small generator for jitter and names (SplitMix64). Its seed is an argument, so that a run can
/// be repeated.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly from nothing up to `bound`.
    pub fn up_to(&mut self, bound: Duration) -> Duration {
        let nanos = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(match nanos.checked_add(1) {
            Some(range) => self.next_u64() % range,
            None => self.next_u64(),
        })
    }
}

/// Delay before the next try. The bound of the jitter doubles from `min` to `max`.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub fn new(min: Duration, max: Duration) -> Backoff {
        Backoff {
            min,
            max: max.max(min),
            failures: 0,
        }
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// A failure: how long to wait. A server's `Retry-After` is obeyed, up to an hour.
    pub fn fail(&mut self, retry_after: Option<Duration>, random: &mut Random) -> Duration {
        let bound = self
            .min
            .saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX))
            .min(self.max);
        self.failures = self.failures.saturating_add(1).min(31);
        let jittered = random.up_to(bound).max(RECONNECT_FLOOR);
        jittered.max(retry_after.unwrap_or_default().min(RETRY_AFTER_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_between_the_floor_and_the_doubled_bound() {
        let mut random = Random::new(7);
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut longest = Duration::ZERO;
        for failure in 0..200u32 {
            let bound = Duration::from_secs(1 << failure.min(6)).min(Duration::from_secs(60));
            let delay = backoff.fail(None, &mut random);
            assert!(
                delay >= RECONNECT_FLOOR && delay <= bound,
                "{failure}: {delay:?}"
            );
            longest = longest.max(delay);
        }
        assert!(
            longest > Duration::from_secs(30),
            "jitter uses the range: {longest:?}"
        );
        backoff.reset();
        assert!(backoff.fail(None, &mut random) <= Duration::from_secs(1));
    }

    #[test]
    fn retry_after_is_obeyed_and_bounded() {
        let mut random = Random::new(7);
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let mut delay = |after| backoff.fail(Some(Duration::from_secs(after)), &mut random);
        assert_eq!(delay(17), Duration::from_secs(17));
        assert_eq!(delay(1_000_000), RETRY_AFTER_MAX);
    }
}
