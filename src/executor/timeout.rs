//! The time bound of a task, on the clock that counts suspend (DESIGN.md, "Settings"): a task of
//! 60 s whose device slept for an hour is over when the device wakes.

use std::time::Duration;

use async_io::Async;
use rustix::fd::OwnedFd;
use rustix::io;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use smol::Timer;

/// Returns after this time. Where the kernel gives no such timer, time asleep is not counted.
pub async fn elapse(after: Duration) {
    if let Ok(timer) = suspend_aware_timer(after)
        && let Ok(timer) = Async::new_nonblocking(timer)
        && timer.readable().await.is_ok()
    {
        return;
    }
    Timer::after(after).await;
}

fn suspend_aware_timer(after: Duration) -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
    let once = Itimerspec {
        it_interval: Timespec::default(),
        // Zero would disarm it.
        it_value: after
            .max(Duration::from_nanos(1))
            .try_into()
            .map_err(|_| io::Errno::INVAL)?,
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
    Ok(timer)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::time::Instant;

    use futures_lite::future;

    use super::*;

    #[test]
    fn time_asleep_counts() {
        let timer = suspend_aware_timer(Duration::from_secs(60)).expect("since Linux 3.15");
        let info = format!("/proc/self/fdinfo/{}", timer.as_raw_fd());
        let info = std::fs::read_to_string(info).expect("readable");
        assert!(info.contains("clockid: 7"), "CLOCK_BOOTTIME: {info}");
    }

    #[test]
    fn it_ends_neither_early_nor_never() {
        for after in [Duration::ZERO, Duration::from_millis(50)] {
            let begun = Instant::now();
            smol::block_on(elapse(after));
            assert!(begun.elapsed() >= after);
        }
        let never_ends = async {
            elapse(Duration::MAX).await;
            false
        };
        let time_passes = async {
            Timer::after(Duration::from_millis(20)).await;
            true
        };
        assert!(smol::block_on(future::or(never_ends, time_passes)));
    }
}
