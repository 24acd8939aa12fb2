//! A device without a battery-backed clock starts in 1970, where no certificate is valid yet. So at
//! the start the system clock is set forward, if it is behind, to the later of the time this agent
//! was built and the last time that the server has told (as systemd does with its build time).
//!
//! It is never set back, unless what it was set to was nonsense that the server had told. That is
//! so if the server now tells an earlier time: then that one is kept instead, and the clock follows
//! it. And it is so if the server's certificate is expired by then, so that nothing could ever put
//! it right: then the step is undone.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::{debug, error, info, warn};
use rustix::time::{ClockId, Timespec, clock_settime};
use smol::Timer;

use super::boot_time;
use crate::limits::SERVER_TIME_WRITE_INTERVAL;
use crate::net::{ServerClock, state_file, system_unix};

/// Unix time of the build: `SOURCE_DATE_EPOCH`, which every reproducible build sets, else the date
/// of this version.
const BUILT_UNIX: u64 = match option_env!("SOURCE_DATE_EPOCH") {
    Some(text) => match number(text.as_bytes()) {
        Some(built) if built > RELEASED_UNIX => built,
        _ => RELEASED_UNIX,
    },
    None => RELEASED_UNIX,
};
/// 23 November 2026, 00:00 UTC.
const RELEASED_UNIX: u64 = 1_795_392_000;

const FILE: &str = "server-time";

/// Times that differ by less are the same to a certificate.
const FRESH_SECONDS: u64 = SERVER_TIME_WRITE_INTERVAL.as_secs();

/// The system clock, or a test's.
trait SystemClock {
    fn now_unix(&self) -> u64;
    fn set_unix(&self, seconds: u64) -> io::Result<()>;
    fn since_boot(&self) -> Duration;
}

#[derive(Debug, Clone, Copy)]
struct Step {
    /// What the clock said before, and when that was since boot.
    from_unix: u64,
    at: Duration,
}

/// What was done at the start, and what the file holds.
#[derive(Debug, Default)]
pub struct ClockFloor {
    path: Option<PathBuf>,
    stored_unix: Cell<u64>,
    /// The step that was made because of what the server had told.
    believed: Cell<Option<Step>>,
}

impl ClockFloor {
    /// Sets the clock if it is behind. Without `may_set` nothing is set and nothing is kept.
    pub fn at_start(state_path: &Path, may_set: bool) -> ClockFloor {
        match may_set {
            true => ClockFloor::raise(state_path.join(FILE), &Real),
            false => ClockFloor::default(),
        }
    }

    fn raise(path: PathBuf, clock: &impl SystemClock) -> ClockFloor {
        let stored = read(&path);
        let floor = ClockFloor {
            path: Some(path),
            stored_unix: Cell::new(stored),
            believed: Cell::new(None),
        };
        let from_unix = clock.now_unix();
        let to = stored.max(BUILT_UNIX);
        if from_unix >= to {
            return floor;
        }
        let why = match stored > BUILT_UNIX {
            true => "the last time that the server has told",
            false => "the time when this agent was built",
        };
        match clock.set_unix(to) {
            Ok(()) => {
                info!("the system clock stood at {from_unix} (Unix time): set to {to}, {why}");
                if stored > BUILT_UNIX {
                    let at = clock.since_boot();
                    floor.believed.set(Some(Step { from_unix, at }));
                }
            }
            Err(error) => warn!(
                "the system clock stands at {from_unix} (Unix time), before {why}, and cannot be \
                 set ({error}): certificates may seem not yet valid; set the clock, or let the \
                 agent do it (CAP_SYS_TIME)"
            ),
        }
        floor
    }

    /// Keeps the server's time on disk, at most once in [`SERVER_TIME_WRITE_INTERVAL`]: flash wears,
    /// and a floor that is a day old serves as well.
    pub async fn keep(&self, clock: &ServerClock) {
        if self.path.is_none() {
            return;
        }
        // Soon at first: a device may be on for minutes only.
        let mut pause = Duration::from_secs(15);
        loop {
            Timer::after(pause).await;
            if let Some(told_unix) = clock.told_unix() {
                self.correct(told_unix, &Real);
                self.store(told_unix);
            }
            pause = SERVER_TIME_WRITE_INTERVAL / 144;
        }
    }

    fn store(&self, told_unix: u64) {
        let Some(path) = &self.path else {
            return;
        };
        let stored_unix = self.stored_unix.get();
        let is_news = told_unix >= stored_unix.max(BUILT_UNIX) + FRESH_SECONDS;
        // What was kept is a time that has not come yet.
        let is_correction =
            (BUILT_UNIX..stored_unix.saturating_sub(FRESH_SECONDS)).contains(&told_unix);
        if !(is_news || is_correction) {
            return;
        }
        // Also if it fails: the next try comes as late as the next success would.
        self.stored_unix.set(told_unix);
        let path = path.clone();
        let write = move || {
            if let Err(why) = state_file::replace(&path, told_unix.to_string().as_bytes(), 0o600) {
                debug!("the server's time is not kept in {}: {why}", path.display());
            }
        };
        smol::unblock(write).detach();
    }

    /// The server tells a time well before the one to which the clock was set because of what the
    /// server had told earlier: one of the two is wrong, and only the later word can be corrected
    /// by a further one.
    fn correct(&self, told_unix: u64, clock: &impl SystemClock) {
        let now_unix = clock.now_unix();
        if told_unix < BUILT_UNIX || now_unix < told_unix + FRESH_SECONDS {
            return;
        }
        if self.believed.take().is_none() {
            // Somebody else has set it.
            return;
        }
        error!(
            "the system clock was set to a time that the server had told, and now it tells an \
             earlier one: the clock is set back from {now_unix} to {told_unix} (Unix time)"
        );
        if let Err(why) = clock.set_unix(told_unix) {
            warn!("the clock cannot be set back: {why}");
        }
    }

    /// A connection has failed: if its certificate is expired by a clock that was set to what the
    /// server had told, that was nonsense.
    pub fn doubt(&self, why: &str) {
        if why.contains("has expired") {
            self.undo(&Real);
        }
    }

    fn undo(&self, clock: &impl SystemClock) {
        let (Some(step), Some(path)) = (self.believed.take(), &self.path) else {
            return;
        };
        let passed = clock.since_boot().saturating_sub(step.at).as_secs();
        let to = step.from_unix.max(BUILT_UNIX) + passed;
        let forgotten = std::fs::remove_file(path);
        self.stored_unix.set(0);
        error!(
            "the system clock was set to a time that the server had told, and its certificate is \
             expired by then: that time is forgotten and the clock set back to {to} (Unix time)"
        );
        if let Err(why) = forgotten.and_then(|()| clock.set_unix(to)) {
            warn!("the clock cannot be set back: {why}");
        }
    }
}

struct Real;

impl SystemClock for Real {
    fn now_unix(&self) -> u64 {
        system_unix()
    }

    fn set_unix(&self, seconds: u64) -> io::Result<()> {
        let tv_sec = seconds.try_into().map_err(io::Error::other)?;
        let time = Timespec { tv_sec, tv_nsec: 0 };
        Ok(clock_settime(ClockId::Realtime, time)?)
    }

    fn since_boot(&self) -> Duration {
        boot_time()
    }
}

/// 0 if there is none, or it cannot be read.
fn read(path: &Path) -> u64 {
    let bytes = state_file::read(path).ok().flatten();
    bytes.and_then(|bytes| number(&bytes)).unwrap_or(0)
}

/// A decimal number, seconds of some year before 2200.
const fn number(digits: &[u8]) -> Option<u64> {
    let mut value = 0;
    let mut at = 0;
    while at < digits.len() {
        if !digits[at].is_ascii_digit() || at > 10 {
            return None;
        }
        value = value * 10 + (digits[at] - b'0') as u64;
        at += 1;
    }
    match value {
        1..7_258_118_400 => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing::TempDir;

    /// A clock that can be set, or not.
    struct Fake {
        unix: Cell<u64>,
        boot: Cell<Duration>,
        settable: bool,
    }

    impl Fake {
        fn at(unix: u64) -> Fake {
            Fake {
                unix: Cell::new(unix),
                boot: Cell::new(Duration::from_secs(10)),
                settable: true,
            }
        }

        fn passes(&self, seconds: u64) {
            self.unix.set(self.unix.get() + seconds);
            self.boot
                .set(self.boot.get() + Duration::from_secs(seconds));
        }
    }

    impl SystemClock for Fake {
        fn now_unix(&self) -> u64 {
            self.unix.get()
        }

        fn set_unix(&self, seconds: u64) -> io::Result<()> {
            if !self.settable {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            self.unix.set(seconds);
            Ok(())
        }

        fn since_boot(&self) -> Duration {
            self.boot.get()
        }
    }

    const LATER: u64 = BUILT_UNIX + 400 * 86_400;

    #[test]
    fn a_clock_that_is_behind_is_set_to_the_later_of_both() {
        let folder = TempDir::new();
        let check = |content: &[u8], before: u64, after: u64| {
            let clock = Fake::at(before);
            ClockFloor::raise(folder.file(FILE, content), &clock);
            let content = String::from_utf8_lossy(content);
            assert_eq!(clock.now_unix(), after, "{before}, file {content:?}");
        };
        let later = LATER.to_string();
        check(b"", 30, BUILT_UNIX);
        check(later.as_bytes(), 30, LATER);
        check(b"1000000000", 30, BUILT_UNIX);
        check(later.as_bytes(), LATER + 1, LATER + 1);
        check(b"", BUILT_UNIX, BUILT_UNIX);
        // What cannot be a time of this device is no reason to go anywhere.
        for nonsense in [
            &b"soon"[..],
            b"-1",
            b"99999999999",
            b"18446744073709551616",
            b"1\n",
        ] {
            check(nonsense, 30, BUILT_UNIX);
        }
    }

    #[test]
    fn one_that_may_not_be_set_is_left_alone() {
        let folder = TempDir::new();
        let clock = Fake {
            settable: false,
            ..Fake::at(30)
        };
        let floor = ClockFloor::raise(folder.file(FILE, b""), &clock);
        assert_eq!(clock.now_unix(), 30);
        floor.undo(&clock);
        assert_eq!(clock.now_unix(), 30);
    }

    #[test]
    fn a_step_to_nonsense_is_undone_once() {
        let folder = TempDir::new();
        let clock = Fake::at(30);
        let path = folder.file(FILE, LATER.to_string().as_bytes());
        let floor = ClockFloor::raise(path.clone(), &clock);
        clock.passes(60);
        floor.undo(&clock);
        assert_eq!(clock.now_unix(), BUILT_UNIX + 60);
        assert!(!path.exists());
        clock.passes(1);
        floor.undo(&clock);
        assert_eq!(clock.now_unix(), BUILT_UNIX + 61);
    }

    #[test]
    fn a_step_to_the_build_time_is_not_doubted() {
        let folder = TempDir::new();
        let clock = Fake::at(30);
        let floor = ClockFloor::raise(folder.file(FILE, b""), &clock);
        clock.passes(60);
        floor.undo(&clock);
        assert_eq!(clock.now_unix(), BUILT_UNIX + 60);
    }

    #[test]
    fn a_time_that_has_not_come_yet_is_corrected_by_the_next_that_is_told() {
        let folder = TempDir::new();
        let path = folder.file(FILE, LATER.to_string().as_bytes());
        let clock = Fake::at(30);
        let floor = ClockFloor::raise(path.clone(), &clock);
        assert_eq!(clock.now_unix(), LATER);
        clock.passes(60);
        // Less than a day apart, and before the build: no reason.
        for told in [LATER - 86_000, BUILT_UNIX - 1, 0] {
            floor.correct(told, &clock);
            floor.store(told);
            assert_eq!(clock.now_unix(), LATER + 60, "{told}");
            assert_eq!(floor.stored_unix.get(), LATER, "{told}");
        }
        let told = BUILT_UNIX + 90 * 86_400;
        floor.correct(told, &clock);
        floor.store(told);
        assert_eq!(clock.now_unix(), told);
        assert_eq!(stored(&path, told), told);
        // Later than that nobody else's clock is touched.
        clock.passes(500 * 86_400);
        floor.correct(told, &clock);
        assert_eq!(clock.now_unix(), told + 500 * 86_400);
    }

    #[test]
    fn a_clock_that_was_not_set_from_what_was_told_is_not_corrected() {
        let folder = TempDir::new();
        let ahead = LATER + 900 * 86_400;
        for (content, from) in [(&b""[..], 30), (LATER.to_string().as_bytes(), ahead)] {
            let clock = Fake::at(from);
            let floor = ClockFloor::raise(folder.file(FILE, content), &clock);
            clock.passes(ahead);
            let now = clock.now_unix();
            floor.correct(BUILT_UNIX, &clock);
            assert_eq!(clock.now_unix(), now);
        }
    }

    /// What the file holds at last.
    fn stored(path: &Path, expected: u64) -> u64 {
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while read(path) != expected && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        read(path)
    }

    #[test]
    fn the_servers_time_is_kept_once_a_day() {
        let folder = TempDir::new();
        let path = folder.path().join(FILE);
        let floor = ClockFloor::raise(path.clone(), &Fake::at(LATER));
        floor.store(LATER);
        assert_eq!(stored(&path, LATER), LATER);
        std::fs::remove_file(&path).expect("just written");
        floor.store(LATER + 86_399);
        assert_eq!(floor.stored_unix.get(), LATER, "not yet");
        floor.store(LATER + 86_400);
        assert_eq!(stored(&path, LATER + 86_400), LATER + 86_400);
    }
}
