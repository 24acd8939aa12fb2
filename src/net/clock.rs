//! The server's time, learnt from the `Date` header of its answers.
//!
//! A device may have no battery-backed clock, so its system clock can be years off and can be
//! stepped at any time. What was learnt is therefore carried forward by the clock that counts
//! from boot and through suspend: a step of the system clock does not move it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::url::Url;
use crate::clock;

/// A smaller correction is the age of the header and the rounding of its seconds.
const WORTH_TELLING_SECONDS: u64 = 5;

/// Shared by all who sign; clones see what one learns.
#[derive(Debug, Clone)]
pub struct ServerClock {
    learnt: Rc<Cell<Option<Learnt>>>,
    /// What a server was last heard to tell.
    told: Rc<Cell<Option<Learnt>>>,
    /// Whether a `Date` that came without TLS is believed: only where there is no TLS at all.
    plain_trusted: bool,
}

#[derive(Debug, Clone, Copy)]
struct Learnt {
    server_unix: u64,
    /// Time since boot when it was learnt.
    at: Duration,
}

impl ServerClock {
    /// The system clock, until something else is learnt.
    pub fn new(control_plane: &Url) -> ServerClock {
        ServerClock {
            learnt: Rc::default(),
            told: Rc::default(),
            plain_trusted: !control_plane.tls,
        }
    }

    /// Unix time in seconds at the server, as far as is known.
    pub fn now_unix(&self) -> u64 {
        match self.learnt.get() {
            Some(learnt) => learnt.after(since_boot()),
            None => system_unix(),
        }
    }

    /// What time it is now by the last server that was heard to tell, Unix seconds.
    pub fn told_unix(&self) -> Option<u64> {
        self.told.get().map(|told| told.after(since_boot()))
    }

    /// Notes the `Date` of an answer that was accepted. `tls`: as for [`ServerClock::learn`].
    pub fn told(&self, date: Option<&str>, tls: bool) {
        if let Some(server_unix) = date.and_then(|date| self.trusted(date, tls)) {
            self.told.set(Some(Learnt {
                server_unix,
                at: since_boot(),
            }));
        }
    }

    /// Takes the time from a `Date` header. `tls`: the answer came from an authenticated server.
    /// False, and nothing is changed, if the text is no date or is not to be trusted.
    pub fn learn(&self, date: &str, tls: bool) -> bool {
        let Some(server_unix) = self.trusted(date, tls) else {
            return false;
        };
        let correction_seconds = server_unix.abs_diff(self.now_unix());
        self.learnt.set(Some(Learnt {
            server_unix,
            at: since_boot(),
        }));
        if correction_seconds > WORTH_TELLING_SECONDS {
            log::warn!(
                "the system clock differs from the server's by {} s; requests are signed with the \
                 server's time",
                server_unix.abs_diff(system_unix())
            );
        }
        true
    }

    /// The time that a `Date` header tells, if it is one and may be believed.
    fn trusted(&self, date: &str, tls: bool) -> Option<u64> {
        parse_http_date(date).filter(|_| tls || self.plain_trusted)
    }
}

impl Learnt {
    fn after(self, since_boot: Duration) -> u64 {
        self.server_unix
            .saturating_add(since_boot.saturating_sub(self.at).as_secs())
    }
}

/// What the system clock says, Unix seconds; 0 before 1970.
pub fn system_unix() -> u64 {
    clock::since_epoch().as_secs()
}

/// Counts through suspend and is never stepped.
pub(super) fn since_boot() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// Unix time of an IMF-fixdate, `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 section 5.6.7). The
/// two obsolete forms are not read: no server of today sends them.
pub(super) fn parse_http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let text = text.trim();
    let bytes = text.as_bytes();
    if bytes.len() != 29 || !text.is_ascii() || !text.ends_with(" GMT") {
        return None;
    }
    for (at, separator) in [
        (3, ", "),
        (7, " "),
        (11, " "),
        (16, " "),
        (19, ":"),
        (22, ":"),
    ] {
        if !text[at..].starts_with(separator) {
            return None;
        }
    }
    let number = |range: std::ops::Range<usize>| -> Option<u64> {
        let digits = &text[range];
        digits
            .bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| digits.parse().ok())?
    };
    let (day, year) = (number(5..7)?, number(12..16)?);
    let (hour, minute, second) = (number(17..19)?, number(20..22)?, number(23..25)?);
    let month = MONTHS.iter().position(|name| *name == &text[8..11])? as u64;
    let leap_year =
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let days_of_month = match month {
        1 if leap_year => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    };
    // A leap second is the last one of its minute.
    if year < 1970 || day < 1 || day > days_of_month || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days before this year's 1 January, by the leap years since year 1.
    let days_to = |year: u64| 365 * year + year / 4 - year / 100 + year / 400;
    const BEFORE_MONTH: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let days = days_to(year - 1) - days_to(1969)
        + BEFORE_MONTH[month as usize]
        + u64::from(leap_year && month > 1)
        + (day - 1);
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::url::Kind;

    fn clock(url: &str) -> ServerClock {
        ServerClock::new(&Url::parse(url, Kind::Http).expect("good"))
    }

    #[test]
    fn dates_are_read_or_refused() {
        let check = |text: &str, expected: Option<u64>| {
            assert_eq!(parse_http_date(text), expected, "{text}");
        };
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777));
        check("Thu, 01 Jan 1970 00:00:00 GMT", Some(0));
        check("Tue, 29 Feb 2000 23:59:59 GMT", Some(951_868_799));
        check("Fri, 01 Mar 2024 00:00:00 GMT", Some(1_709_251_200));
        check("Mon, 01 Mar 2100 00:00:00 GMT", Some(4_107_542_400));
        check("Fri, 31 Dec 9999 23:59:60 GMT", Some(253_402_300_800));
        for bad in [
            "",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
            "Sun, 06 Nov 1994 08:49:37 UTC",
            "Sun, 06 nov 1994 08:49:37 GMT",
            "Sun, +6 Nov 1994 08:49:37 GMT",
            "Sun, 31 Nov 1994 08:49:37 GMT",
            "Sun, 29 Feb 2100 08:49:37 GMT",
            "Sun, 06 Nov 1969 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:49:37 GMT",
            "Sun, 06 N\u{f6}v 194 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 \u{e9}GMT",
        ] {
            check(bad, None);
        }
    }

    #[test]
    fn what_was_learnt_goes_on_with_the_time_since_boot_alone() {
        let learnt = Learnt {
            server_unix: 1000,
            at: Duration::from_secs(50),
        };
        assert_eq!(learnt.after(Duration::from_secs(50)), 1000);
        assert_eq!(learnt.after(Duration::from_millis(7_250_999)), 8200);
        assert_eq!(learnt.after(Duration::ZERO), 1000);
    }

    #[test]
    fn clones_share_what_is_learnt_and_plain_answers_do_not_move_a_tls_clock() {
        let date = "Fri, 01 Mar 2024 00:00:00 GMT";
        let plain = clock("http://a");
        let signer = plain.clone();
        assert!(plain.learn(date, false));
        assert!((1_709_251_200..1_709_251_210).contains(&signer.now_unix()));

        let secure = clock("https://a");
        assert!(!secure.learn(date, false));
        assert!(secure.now_unix().abs_diff(system_unix()) <= 1);
        assert!(!secure.learn("yesterday", true));
        assert!(secure.learn(date, true));
        assert!((1_709_251_200..1_709_251_210).contains(&secure.now_unix()));
    }
}
