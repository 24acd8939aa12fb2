//! What is due when: repeats of what was not acknowledged, further rounds of a gap, expired lanes.

use super::{Action, Delivery, Wait};
use crate::limits::{ACK_TIMEOUT, GAP_ROUND, LANES_MAX, STREAM_STALL};
use crate::session::Now;
use crate::session::failures::{Failures, LaneId};

impl<C: Copy + Ord + Default> Delivery<C> {
    /// Does what is due: repeats, further rounds of a gap. Expired lanes come out as actions.
    pub fn on_time(&mut self, failures: &mut Failures, now: Now) {
        let mut back_to: Option<C> = None;
        let mut again = heapless::Vec::<LaneId, LANES_MAX>::new();
        self.window.remove(|entry| {
            let due = entry.overtaken && entry.sent_at + ACK_TIMEOUT <= now;
            if due {
                back_to = Some(back_to.map_or(entry.at, |at| at.min(entry.at)));
                // A window has fewer messages than there may be lanes.
                let _ = again.push(entry.lane());
            }
            due
        });
        for index in 0..self.lanes.len() {
            let lane = &mut self.lanes[index];
            let id = lane.id;
            if let Some(gap) = lane.gap
                && let Some(related) = gap.again
                && gap.resent_at + GAP_ROUND <= now
                && let Some(stream) = id.stream
            {
                self.begin_gap_round(id, stream, related, gap.highest_accepted, failures, now);
                // The lane may be gone now; what else is due is found at the next turn.
                break;
            }
            if lane.since + ACK_TIMEOUT > now || self.window.used_by(id).0 == 0 {
                continue;
            }
            if lane.resent {
                self.act(Action::Expired(id));
                continue;
            }
            lane.resent = true;
            lane.since = now;
            let _ = again.push(id);
            self.window.remove(|entry| {
                let again = entry.lane() == id;
                if again {
                    back_to = Some(back_to.map_or(entry.at, |at| at.min(entry.at)));
                }
                again
            });
        }
        // A lane that was passed over would be passed over again.
        for id in again {
            let parked = self.unpark(id);
            back_to = back_to.into_iter().chain(parked).min();
        }
        if let Some(at) = back_to {
            self.rewind_to(at);
        }
    }

    /// When [`Delivery::on_time`] or [`Delivery::next_read`] should be asked again at the latest.
    pub fn next_deadline(&self) -> Option<Now> {
        let repeats = self
            .window
            .iter()
            .filter(|entry| entry.overtaken)
            .map(|entry| entry.sent_at + ACK_TIMEOUT);
        let lanes = self.lanes.iter().flat_map(|lane| {
            let expiry = (self.window.used_by(lane.id).0 > 0).then_some(lane.since + ACK_TIMEOUT);
            let round = lane
                .gap
                .filter(|gap| gap.again.is_some())
                .map(|gap| gap.resent_at + GAP_ROUND);
            [expiry, round].into_iter().flatten()
        });
        let stall = match self.wait {
            Wait::Stream(id, _) if self.parked().is_none() && self.wants_to_read() => {
                self.lane(id).map(|lane| lane.since + STREAM_STALL)
            }
            _ => None,
        };
        repeats.chain(lanes).chain(stall).min()
    }
}
