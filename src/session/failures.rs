//! What a server has refused to take, remembered between sessions (PROTOCOL.md 3, Errors): the
//! same gap reported again and again, or sessions without progress on a stream.
//!
//! Bounded: the entry that was touched longest ago makes room.

use crate::ids::{AttemptKey, Stream};
use crate::limits::{STREAM_FAILURES_MAX, STREAM_FAILURES_REMEMBERED};

/// Where messages must arrive in order: a stream of an attempt, or its final (`None`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneId {
    pub key: AttemptKey,
    pub stream: Option<Stream>,
}

#[derive(Debug, Clone)]
struct Failure {
    lane: LaneId,
    /// Highest accepted sequence that the server named, and how often.
    gap: Option<(u64, u32)>,
    stalled_sessions: u32,
}

#[derive(Debug, Default)]
pub struct Failures {
    /// Most recently touched last.
    entries: heapless::Vec<Failure, STREAM_FAILURES_REMEMBERED>,
}

impl Failures {
    /// The server reports a gap after `highest`. True if it has done so too often.
    pub fn gap(&mut self, lane: LaneId, highest: u64) -> bool {
        let entry = self.touch(lane);
        let reports = match entry.gap {
            Some((known, reports)) if known == highest => reports + 1,
            _ => 1,
        };
        entry.gap = Some((highest, reports));
        reports >= STREAM_FAILURES_MAX
    }

    /// A session has ended without any progress here, repeats included. True if that happened too
    /// often.
    pub fn stalled(&mut self, lane: LaneId) -> bool {
        let entry = self.touch(lane);
        entry.stalled_sessions += 1;
        entry.stalled_sessions >= STREAM_FAILURES_MAX
    }

    /// The server has taken something, or nothing is left to take.
    pub fn clear(&mut self, lane: LaneId) {
        self.entries.retain(|entry| entry.lane != lane);
    }

    fn touch(&mut self, lane: LaneId) -> &mut Failure {
        let known = self.entries.iter().position(|entry| entry.lane == lane);
        let entry = match known {
            Some(index) => self.entries.remove(index),
            None => {
                if self.entries.is_full() {
                    self.entries.remove(0);
                }
                Failure {
                    lane,
                    gap: None,
                    stalled_sessions: 0,
                }
            }
        };
        let pushed = self.entries.push(entry);
        debug_assert!(pushed.is_ok(), "room was made");
        self.entries.last_mut().expect("an entry was pushed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(number: usize) -> LaneId {
        LaneId {
            key: AttemptKey::of(&number.to_string(), "a"),
            stream: Some(Stream::Stdout),
        }
    }

    #[test]
    fn only_the_same_gap_again_counts() {
        let mut failures = Failures::default();
        assert!(!failures.gap(lane(1), 4));
        assert!(!failures.gap(lane(1), 4));
        assert!(!failures.gap(lane(1), 5), "progress was made");
        assert!(!failures.gap(lane(1), 5));
        assert!(failures.gap(lane(1), 5));
        failures.clear(lane(1));
        assert!(!failures.gap(lane(1), 5));
    }

    #[test]
    fn memory_is_bounded_and_keeps_the_recent_ones() {
        let mut failures = Failures::default();
        for number in 0..STREAM_FAILURES_REMEMBERED + 10 {
            assert!(!failures.stalled(lane(number)));
        }
        let recent = lane(STREAM_FAILURES_REMEMBERED + 9);
        assert!(!failures.stalled(recent));
        assert!(failures.stalled(recent));
    }
}
