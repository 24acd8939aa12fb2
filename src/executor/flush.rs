//! When captured bytes are flushed (DESIGN.md, "Capture and flush"): the first bytes after silence
//! at once, after that at most once per interval.

use std::time::Duration;

/// Pure: time comes in as an argument, counted from any fixed moment.
#[derive(Debug, Default)]
pub struct FlushPolicy {
    last_flush: Option<Duration>,
}

impl FlushPolicy {
    /// When bytes that wait now are to be flushed. In the past: at once.
    pub fn due_at(&self, interval: Duration) -> Duration {
        self.last_flush
            .map_or(Duration::ZERO, |flushed| flushed + interval)
    }

    pub fn flushed(&mut self, now: Duration) {
        self.last_flush = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_go_at_once_then_once_an_interval() {
        let interval = Duration::from_millis(100);
        let at = Duration::from_millis;
        let mut policy = FlushPolicy::default();
        assert!(policy.due_at(interval) <= at(5), "leading edge");
        policy.flushed(at(5));
        assert_eq!(policy.due_at(interval), at(105));
        policy.flushed(at(105));
        assert_eq!(policy.due_at(interval), at(205));
        assert!(policy.due_at(interval) <= at(300), "silence has passed");
        assert_eq!(
            policy.due_at(Duration::from_secs(1)),
            at(1105),
            "nobody watches"
        );
    }
}
