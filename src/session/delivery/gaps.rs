//! Gap errors: a stream is sent again from where the server misses it, once however often the gap
//! is reported, and given up when the server reports the same gap time and again (PROTOCOL.md 3).

use super::{Action, Delivery, Flow, GapRound};
use crate::ids::{AttemptKey, Stream};
use crate::limits::GAP_ROUND;
use crate::session::Now;
use crate::session::failures::{Failures, LaneId};

impl<C: Copy + Ord + Default> Delivery<C> {
    /// The server misses what follows `highest_accepted`, as it saw from chunk `related`.
    pub fn gap(
        &mut self,
        key: AttemptKey,
        stream: Stream,
        related: u64,
        highest_accepted: u64,
        failures: &mut Failures,
        now: Now,
    ) {
        let id = LaneId {
            key,
            stream: Some(stream),
        };
        if !self.follow(id, now) {
            return;
        }
        if let Some(lane) = self.lane_mut(id)
            && let Some(gap) = &mut lane.gap
            && gap.highest_accepted == highest_accepted
        {
            if lane.flow == Flow::Rewinding {
                return;
            }
            if related > gap.last_related && related <= gap.round_high {
                gap.last_related = related;
                return;
            }
            if now < gap.resent_at + GAP_ROUND {
                gap.again = Some(related);
                return;
            }
        }
        self.begin_gap_round(id, stream, related, highest_accepted, failures, now);
    }

    pub(super) fn begin_gap_round(
        &mut self,
        id: LaneId,
        stream: Stream,
        related: u64,
        highest_accepted: u64,
        failures: &mut Failures,
        now: Now,
    ) {
        let key = id.key;
        let mut round_high = related;
        let mut back_to: Option<C> = None;
        let never = failures.gap(id, highest_accepted);
        self.window.remove(|entry| {
            let Some(sequence) = entry.sequence().filter(|_| entry.lane() == id) else {
                return false;
            };
            round_high = round_high.max(sequence);
            let goes = never || sequence > highest_accepted;
            if goes {
                back_to = Some(back_to.map_or(entry.at, |at| at.min(entry.at)));
            }
            goes
        });
        if never {
            failures.clear(id);
            self.give_up(id, stream);
            return;
        }
        // The answer to this round's question may lie further on, or never count because the server
        // has named another gap by then: what is no longer on its way is met again all the same.
        for at in back_to.into_iter().chain(self.unpark(id)) {
            self.pass_over(at);
        }
        if let Some(lane) = self.lane_mut(id) {
            lane.flow = Flow::Rewinding;
            lane.since = now;
            lane.gap = Some(GapRound {
                highest_accepted,
                last_related: related,
                round_high,
                resent_at: now,
                again: None,
            });
        }
        self.act(Action::Locate {
            key,
            stream,
            from: highest_accepted.saturating_add(1),
        });
    }

    fn give_up(&mut self, id: LaneId, stream: Stream) {
        let passed_over = self.lane(id).and_then(|lane| match lane.flow {
            Flow::Parked(at) => Some(at),
            Flow::Open | Flow::Rewinding => self.passed_over,
        });
        self.forget(id);
        if let Some(at) = passed_over {
            self.rewind_to(at);
        }
        self.act(Action::GiveUp {
            key: id.key,
            stream,
        });
    }

    /// Answer to [`Action::Locate`]: where to read the stream again, `None` if nothing is held. An
    /// answer to a question that is no longer open changes nothing.
    pub fn located(&mut self, key: AttemptKey, stream: Stream, from: u64, at: Option<C>, now: Now) {
        let id = LaneId {
            key,
            stream: Some(stream),
        };
        let Some(lane) = self.lane_mut(id) else {
            return;
        };
        if lane.flow != Flow::Rewinding {
            return;
        }
        // Without a gap an acknowledgement has filled it meanwhile.
        if let Some(gap) = &mut lane.gap {
            if gap.highest_accepted.saturating_add(1) != from {
                return;
            }
            gap.resent_at = now;
            lane.flow = Flow::Open;
            self.expect(key, stream, from);
        } else {
            lane.flow = Flow::Open;
        }
        let back_to = [at, self.passed_over.take()].into_iter().flatten().min();
        if let Some(at) = back_to {
            self.rewind_to(at);
        }
    }
}
