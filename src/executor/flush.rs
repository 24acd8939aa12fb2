//! When captured bytes are flushed (DESIGN.md, "Capture and flush"): the first bytes after silence
//! at once, after that at most once per interval.

use std::time::Duration;

use crate::limits::{HASTY_BYTES, HASTY_LOOKS, HASTY_TIME};

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

/// When a pipe that has run empty is left alone for a moment. A child that prints lines quickly would
/// wake the agent for each of them, for nothing: they are flushed together. Pure, as above.
#[derive(Debug, Default)]
pub struct Looks {
    /// Bytes since it ran empty last.
    found_bytes: usize,
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    /// Whenever there is something. So many looks have found a little since then.
    AtOnce { since: Duration, looks: u32 },
    /// After a rest each, as long as they find a little.
    AfterRests,
}

impl Default for Mode {
    fn default() -> Mode {
        Mode::AtOnce {
            since: Duration::ZERO,
            looks: 0,
        }
    }
}

impl Looks {
    /// A read has brought so much.
    pub fn found(&mut self, bytes: usize) {
        self.found_bytes = self.found_bytes.saturating_add(bytes);
    }

    /// There is nothing more: whether to rest before the next look.
    pub fn ran_empty(&mut self, now: Duration) -> bool {
        let found = std::mem::take(&mut self.found_bytes);
        match &mut self.mode {
            // Who prints much is not held up.
            mode if found > HASTY_BYTES => *mode = Mode::default(),
            Mode::AfterRests if found > 0 => return true,
            Mode::AfterRests => self.mode = Mode::default(),
            Mode::AtOnce { since, looks } if found > 0 => {
                if now.saturating_sub(*since) > HASTY_TIME {
                    (*since, *looks) = (now, 0);
                }
                *looks += 1;
                if *looks == HASTY_LOOKS {
                    self.mode = Mode::AfterRests;
                    return true;
                }
            }
            Mode::AtOnce { .. } => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_lines_are_looked_for_after_rests_as_long_as_there_are_any() {
        let mut looks = Looks::default();
        let mut now = Duration::from_secs(1);
        let mut line = |looks: &mut Looks, after: Duration| {
            now += after;
            looks.found(HASTY_BYTES / 2);
            looks.found(HASTY_BYTES / 2);
            looks.ran_empty(now)
        };
        let (quick, slow) = (HASTY_TIME / (2 * HASTY_LOOKS), HASTY_TIME / 4);
        for _ in 0..100 {
            assert!(!line(&mut looks, slow), "each is looked for at once");
        }
        // The first one begins the count anew.
        assert!(!line(&mut looks, HASTY_TIME * 2));
        for _ in 2..HASTY_LOOKS {
            assert!(!line(&mut looks, quick));
        }
        for _ in 0..100 {
            assert!(line(&mut looks, quick));
        }
        let later = Duration::from_secs(9);
        assert!(!looks.ran_empty(later), "the last rest has brought nothing");
        for _ in 1..HASTY_LOOKS {
            assert!(!line(&mut looks, quick), "it has to be quick again");
        }
        assert!(line(&mut looks, quick));
        looks.found(HASTY_BYTES);
        looks.found(1);
        assert!(!looks.ran_empty(later), "much is read without rests");
        assert!(!line(&mut looks, quick));
    }

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
