//! The system clock. The standard library asks the C library for it, and on 32-bit devices with
//! musl it does so by the old call that fails from 19 January 2038 on: every start would end in a
//! panic. The kernel is asked directly instead, by the call with 64-bit seconds.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time since 1 January 1970 by the system clock; zero if the clock stands before.
pub fn since_epoch() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Realtime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn it_is_the_system_clock() {
        let before = SystemTime::now();
        let now = SystemTime::UNIX_EPOCH + since_epoch();
        assert!(before <= now && now <= SystemTime::now());
    }
}
