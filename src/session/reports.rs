//! Which finals go by HTTP report instead of the WebSocket (PROTOCOL.md 4.7). One at a time.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::Now;
use super::backoff::{Backoff, Random};
use crate::ids::{AttemptKey, Ids};
use crate::limits::OPEN_ATTEMPTS_MAX;

/// An unacknowledged final of the outbox.
#[derive(Debug, Clone)]
pub struct WaitingFinal {
    pub ids: Arc<Ids>,
    pub key: AttemptKey,
    /// Unacknowledged output of the same attempt is held.
    pub output_waits: bool,
}

/// How a report ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportResult {
    Done,
    /// Never again by this way.
    Refused {
        why: String,
    },
    Retry {
        after: Option<Duration>,
        why: String,
    },
    /// The final is gone from the outbox: acknowledged meanwhile.
    Gone,
}

/// What the WebSocket can do for finals right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// A session is active and takes results.
    Open,
    /// No session is active, but not for long yet.
    Interrupted { until: Now },
    /// Results are disabled, or the session has been down for the threshold.
    Closed,
}

#[derive(Debug)]
pub struct Reports {
    busy: Option<AttemptKey>,
    listing: bool,
    /// There may be something to report.
    wanted: bool,
    channel: Channel,
    not_before: Now,
    backoff: Backoff,
    /// Finals that the server refused to take by report; they wait for the WebSocket.
    refused: HashSet<AttemptKey>,
    /// Finals that the server never acknowledges over the WebSocket.
    forced: HashSet<AttemptKey>,
    /// Finals of a hello that is not answered yet: the server may take them from there.
    in_hello: Vec<AttemptKey>,
    /// The one that was tried last and waits: the others come before it is tried again.
    tried: Option<AttemptKey>,
}

impl Default for Reports {
    fn default() -> Reports {
        Reports {
            busy: None,
            listing: false,
            wanted: true,
            channel: Channel::Closed,
            not_before: Now::ZERO,
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            refused: HashSet::new(),
            forced: HashSet::new(),
            in_hello: Vec::new(),
            tried: None,
        }
    }
}

impl Reports {
    /// The final that is on its way by HTTP.
    pub fn busy(&self) -> Option<AttemptKey> {
        self.busy
    }

    /// Something has changed that may make a final due.
    pub fn look_again(&mut self) {
        self.wanted = true;
    }

    pub fn force(&mut self, key: AttemptKey) {
        if self.forced.len() < OPEN_ATTEMPTS_MAX {
            self.forced.insert(key);
        }
        self.wanted = true;
    }

    /// These went with a hello. Without an answer to it, or after, there are none.
    pub fn set_in_hello(&mut self, keys: Vec<AttemptKey>) {
        self.in_hello = keys;
    }

    /// Whether the unacknowledged finals should be listed now.
    pub fn want_list(&mut self, channel: Channel, now: Now) -> bool {
        if channel != self.channel {
            self.channel = channel;
            self.wanted = true;
        }
        let due = self.wanted && self.busy.is_none() && !self.listing && now >= self.not_before;
        if due {
            self.listing = true;
            self.wanted = false;
        }
        due
    }

    /// Chooses the next final to report, oldest first; after one that failed, the one behind it.
    pub fn choose(&mut self, waiting: &[WaitingFinal]) -> Option<Arc<Ids>> {
        self.listing = false;
        // What is no longer waiting need not be remembered.
        for remembered in [&mut self.refused, &mut self.forced] {
            if !remembered.is_empty() {
                remembered.retain(|key| waiting.iter().any(|entry| entry.key == *key));
            }
        }
        let is_chosen = |entry: &&WaitingFinal| {
            let due = match self.channel {
                Channel::Closed => true,
                Channel::Interrupted { .. } => {
                    !entry.output_waits || self.forced.contains(&entry.key)
                }
                Channel::Open => false,
            };
            (due || !entry.ids.has_result_channel())
                && !self.refused.contains(&entry.key)
                && !self.in_hello.contains(&entry.key)
        };
        let behind = waiting
            .iter()
            .position(|entry| Some(entry.key) == self.tried)
            .map_or(0, |index| index + 1);
        let (before, after) = waiting.split_at(behind);
        let chosen = after.iter().chain(before).find(is_chosen);
        self.busy = chosen.map(|entry| entry.key);
        chosen.map(|entry| entry.ids.clone())
    }

    /// The report has ended. True if the final has to be dropped: it has no other way.
    pub fn finished(
        &mut self,
        ids: &Ids,
        result: &ReportResult,
        random: &mut Random,
        now: Now,
    ) -> bool {
        let key = ids.key();
        self.busy = None;
        self.wanted = true;
        self.tried = None;
        match result {
            ReportResult::Done => self.backoff.reset(),
            // If its text only cannot be read, it is listed again.
            ReportResult::Gone => {
                self.tried = Some(key);
                self.not_before = now + self.backoff.fail(None, random);
            }
            ReportResult::Refused { .. } => {
                self.backoff.reset();
                // Also one that is to be dropped: the store may not have done so yet.
                if self.refused.len() < OPEN_ATTEMPTS_MAX {
                    self.refused.insert(key);
                }
                return !ids.has_result_channel();
            }
            ReportResult::Retry { after, .. } => {
                self.tried = Some(key);
                self.not_before = now + self.backoff.fail(*after, random);
            }
        }
        false
    }

    pub fn next_deadline(&self, now: Now) -> Option<Now> {
        let retry = (self.wanted && self.not_before > now).then_some(self.not_before);
        let threshold = match self.channel {
            Channel::Interrupted { until } => Some(until),
            Channel::Open | Channel::Closed => None,
        };
        retry.into_iter().chain(threshold).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(name: &str, attempt: &str, output_waits: bool) -> WaitingFinal {
        let ids = Arc::new(Ids::new(name, attempt).expect("short"));
        WaitingFinal {
            key: ids.key(),
            ids,
            output_waits,
        }
    }

    #[test]
    fn each_case_of_the_fallback_rule() {
        let interrupted = Channel::Interrupted {
            until: Now::from_secs(30),
        };
        let check = |channel, entry: WaitingFinal, due: bool| {
            let mut reports = Reports::default();
            assert!(reports.want_list(channel, Now::ZERO));
            let chosen = reports.choose(std::slice::from_ref(&entry));
            assert_eq!(chosen.is_some(), due, "{channel:?} {entry:?}");
        };
        check(Channel::Open, waiting("t", "a", false), false);
        check(Channel::Open, waiting("t", "", false), true);
        check(interrupted, waiting("t", "a", false), true);
        check(interrupted, waiting("t", "a", true), false);
        check(Channel::Closed, waiting("t", "a", true), true);
    }

    #[test]
    fn a_refused_report_is_not_repeated_and_without_channel_it_is_dropped() {
        let mut random = Random::new(1);
        let mut reports = Reports::default();
        let entry = waiting("t", "a", false);
        let refused = ReportResult::Refused { why: "404".into() };
        assert!(reports.want_list(Channel::Closed, Now::ZERO));
        assert_eq!(
            reports.choose(std::slice::from_ref(&entry)),
            Some(entry.ids.clone())
        );
        assert!(
            !reports.want_list(Channel::Closed, Now::ZERO),
            "one at a time"
        );
        assert!(!reports.finished(&entry.ids, &refused, &mut random, Now::ZERO));
        assert!(reports.want_list(Channel::Closed, Now::ZERO));
        assert_eq!(reports.choose(std::slice::from_ref(&entry)), None);
        let old = waiting("t", "", false);
        assert!(reports.finished(&old.ids, &refused, &mut random, Now::ZERO));
    }

    #[test]
    fn a_retry_waits_for_its_backoff() {
        let mut random = Random::new(1);
        let mut reports = Reports::default();
        let entry = waiting("t", "a", false);
        assert!(reports.want_list(Channel::Closed, Now::ZERO));
        reports.choose(std::slice::from_ref(&entry));
        let retry = ReportResult::Retry {
            after: Some(Duration::from_secs(9)),
            why: "503".into(),
        };
        reports.finished(&entry.ids, &retry, &mut random, Now::ZERO);
        assert!(!reports.want_list(Channel::Closed, Now::from_secs(8)));
        assert_eq!(
            reports.next_deadline(Now::from_secs(8)),
            Some(Now::from_secs(9))
        );
        assert!(reports.want_list(Channel::Closed, Now::from_secs(9)));
    }

    #[test]
    fn a_report_that_fails_does_not_hold_up_the_others() {
        let mut random = Random::new(1);
        let mut reports = Reports::default();
        let finals = ["a", "b", "c"].map(|name| waiting(name, "a", false));
        let retry = ReportResult::Retry {
            after: None,
            why: "500".into(),
        };
        let mut now = Now::ZERO;
        let mut tried = Vec::new();
        for _ in 0..4 {
            now += Duration::from_secs(100);
            assert!(reports.want_list(Channel::Closed, now));
            let ids = reports.choose(&finals).expect("one is due");
            reports.finished(&ids, &retry, &mut random, now);
            tried.push(ids.task.to_string());
        }
        assert_eq!(tried, ["a", "b", "c", "a"]);
    }

    #[test]
    fn what_cannot_be_dropped_or_read_is_not_reported_without_pause() {
        let mut random = Random::new(1);
        let mut reports = Reports::default();
        let old = waiting("t", "", false);
        let refused = ReportResult::Refused { why: "404".into() };
        assert!(reports.want_list(Channel::Closed, Now::ZERO));
        assert!(reports.choose(std::slice::from_ref(&old)).is_some());
        assert!(reports.finished(&old.ids, &refused, &mut random, Now::ZERO));
        assert!(reports.want_list(Channel::Closed, Now::ZERO));
        assert_eq!(reports.choose(std::slice::from_ref(&old)), None, "dropped");

        let damaged = waiting("d", "a", false);
        reports.look_again();
        assert!(reports.want_list(Channel::Closed, Now::ZERO));
        assert!(reports.choose(std::slice::from_ref(&damaged)).is_some());
        reports.finished(&damaged.ids, &ReportResult::Gone, &mut random, Now::ZERO);
        assert!(!reports.want_list(Channel::Closed, Now::ZERO));
    }
}
