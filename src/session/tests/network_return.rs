//! What the return of the network means in each state of the link.

use super::*;
use crate::limits::{HANDSHAKE_TIMEOUT, NETWORK_PROBE_TIMEOUT, NETWORK_RETURN_JITTER};

/// Soon enough for a person who has just plugged the cable in.
const SOON: Duration = Duration::from_millis(600);

impl Bench {
    fn state(&self) -> LinkState {
        self.session.link_state()
    }

    fn network_returned(&mut self, was_gone: bool) {
        self.session.network_returned(was_gone, self.now);
        self.run();
    }

    /// Until the backoff has grown to a minute, the last dial just failed.
    fn offline(&mut self, retry_after: Option<Duration>) {
        for _ in 0..10 {
            while self.state() != LinkState::Connecting {
                self.advance(SECOND);
            }
            self.session.dial_failed("no route", retry_after, self.now);
            self.run();
        }
    }

    /// From now to the next dial.
    fn until_dial(&mut self) -> Duration {
        let begun = self.now;
        while self.state() != LinkState::Connecting {
            self.advance(Duration::from_millis(50));
        }
        self.now - begun
    }
}

#[test]
fn a_dial_that_waits_comes_soon_and_the_backoff_begins_anew() {
    // Of many seeds none has drawn a short delay by chance alone.
    let mut bench = Bench::new();
    bench.offline(None);
    assert!(NETWORK_RETURN_JITTER < SOON);
    bench.network_returned(false);
    assert!(bench.until_dial() <= SOON);
    bench.session.dial_failed("no route yet", None, bench.now);
    bench.run();
    assert!(bench.until_dial() <= SECOND + SOON, "the backoff is reset");
}

#[test]
fn a_time_that_the_server_has_named_is_kept() {
    let mut bench = Bench::new();
    bench.offline(Some(120 * SECOND));
    bench.network_returned(true);
    assert!(bench.until_dial() >= 120 * SECOND);
}

#[test]
fn a_dial_or_handshake_into_nothing_is_begun_anew() {
    let mut bench = Bench::new();
    bench.until_dial();
    bench.network_returned(true);
    assert_eq!(bench.state(), LinkState::Connecting, "it has just begun");
    bench.advance(5 * SECOND);
    bench.network_returned(false);
    assert_eq!(bench.state(), LinkState::Connecting, "nothing was gone");
    bench.network_returned(true);
    assert_eq!(bench.state(), LinkState::Down);
    assert!(bench.has(|effect| matches!(effect, Effect::Close)));
    assert!(bench.until_dial() <= SOON);

    bench.session.connected(bench.now);
    bench.run();
    assert!(HANDSHAKE_TIMEOUT > 5 * SECOND);
    bench.network_returned(true);
    assert_eq!(bench.state(), LinkState::Handshake, "it has just begun");
    bench.advance(5 * SECOND);
    bench.network_returned(true);
    assert_eq!(bench.state(), LinkState::Down);
    assert!(bench.until_dial() <= SOON);
}

#[test]
fn a_session_is_probed_and_stays_if_anything_comes() {
    let mut bench = Bench::connected();
    bench.forget();
    bench.network_returned(false);
    assert!(!bench.has(|effect| matches!(effect, Effect::Ping)));
    bench.network_returned(true);
    assert!(bench.has(|effect| matches!(effect, Effect::Ping)));
    bench.advance(NETWORK_PROBE_TIMEOUT / 2);
    bench.session.heard(bench.now);
    bench.advance(NETWORK_PROBE_TIMEOUT);
    assert_eq!(bench.state(), LinkState::Active);
}

#[test]
fn a_session_that_is_silent_after_the_return_is_replaced_at_once() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=3);
    // Longer than the ping's interval, shorter than its patience.
    bench.advance(35 * SECOND);
    assert_eq!(bench.state(), LinkState::Active);
    bench.network_returned(true);
    bench.advance(NETWORK_PROBE_TIMEOUT - Duration::from_millis(1));
    assert_eq!(bench.state(), LinkState::Active);
    // A further return does not put it off.
    bench.network_returned(true);
    bench.advance(Duration::from_millis(1));
    assert_eq!(bench.state(), LinkState::Down);
    assert!(bench.until_dial() <= SOON);
}
