//! When tasks are polled for and heartbeats are sent (PROTOCOL.md 4.8).

use std::time::Duration;

use super::Now;
use super::backoff::{Backoff, Random};

/// A request that is repeated: at its interval, or after a backoff when it fails.
#[derive(Debug)]
pub struct Repeating {
    interval: Duration,
    next_at: Now,
    busy: bool,
    backoff: Backoff,
}

impl Repeating {
    /// `interval` zero means never.
    pub fn new(interval: Duration) -> Repeating {
        Repeating {
            interval,
            next_at: Now::ZERO,
            busy: false,
            backoff: Backoff::new(
                interval.max(Duration::from_millis(100)),
                interval.max(Duration::from_secs(60)),
            ),
        }
    }

    /// True if a request is due; then its end must be told by [`Repeating::finished`].
    pub fn due(&mut self, now: Now) -> bool {
        let due = !self.interval.is_zero() && !self.busy && now >= self.next_at;
        self.busy |= due;
        due
    }

    pub fn finished(&mut self, failed: Option<Option<Duration>>, random: &mut Random, now: Now) {
        self.busy = false;
        self.next_at = match failed {
            None => {
                self.backoff.reset();
                now + self.interval
            }
            Some(retry_after) => now + self.backoff.fail(retry_after, random).max(self.interval),
        };
    }

    pub fn at_once(&mut self) {
        self.next_at = Now::ZERO;
    }

    pub fn next_deadline(&self) -> Option<Now> {
        (!self.interval.is_zero() && !self.busy).then_some(self.next_at)
    }
}

/// Whether polling is paused.
#[derive(Debug)]
pub struct Gate {
    threshold: Duration,
    delivering: bool,
    resumes_at: Now,
}

impl Gate {
    pub fn new(threshold: Duration) -> Gate {
        Gate {
            threshold,
            delivering: false,
            resumes_at: Now::ZERO,
        }
    }

    /// A session has become active. Without delivery, polling goes on at once.
    pub fn session_active(&mut self, delivery_enabled: bool, now: Now) {
        self.delivering = delivery_enabled;
        if !delivery_enabled {
            self.resumes_at = now;
        }
    }

    pub fn session_down(&mut self, now: Now) {
        if self.delivering {
            self.delivering = false;
            self.resumes_at = now + self.threshold;
        }
    }

    pub fn is_open(&self, now: Now) -> bool {
        !self.delivering && now >= self.resumes_at
    }

    /// When it opens by itself.
    pub fn opens_at(&self) -> Option<Now> {
        (!self.delivering).then_some(self.resumes_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn polling_runs_from_the_start_pauses_and_resumes_after_the_threshold() {
        let mut gate = Gate::new(30 * SECOND);
        assert!(gate.is_open(Now::ZERO));
        gate.session_active(true, SECOND);
        assert!(!gate.is_open(1000 * SECOND));
        gate.session_down(1000 * SECOND);
        assert!(!gate.is_open(1029 * SECOND));
        assert!(gate.is_open(1030 * SECOND));
        gate.session_active(false, 1031 * SECOND);
        assert!(gate.is_open(1031 * SECOND));
        gate.session_down(1032 * SECOND);
        assert!(gate.is_open(1032 * SECOND));
    }

    #[test]
    fn a_failing_request_backs_off_and_recovers() {
        let mut random = Random::new(3);
        let mut request = Repeating::new(SECOND);
        assert!(request.due(Now::ZERO));
        assert!(!request.due(Now::ZERO), "one at a time");
        request.finished(Some(Some(20 * SECOND)), &mut random, Now::ZERO);
        assert!(!request.due(19 * SECOND));
        assert!(request.due(20 * SECOND));
        request.finished(None, &mut random, 20 * SECOND);
        assert_eq!(request.next_deadline(), Some(21 * SECOND));
        assert!(!Repeating::new(Duration::ZERO).due(SECOND), "zero is off");
    }
}
