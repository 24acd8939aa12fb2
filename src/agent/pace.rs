//! Keeps what tasks print near to what the session reads.
//!
//! A child can print faster than anything can be sent. Then the log grows, new segments are made, and
//! what is sent has to be read back from the disk, all for nothing: the output comes no sooner. So
//! while the session reads quickly, chunks that are stored far ahead of it wait for its next read before
//! their buffers are filled again. A slow or silent server holds nobody up for long: it is waited for
//! shortly, only just after a read, and once for many bytes.

use std::cell::Cell;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use futures_lite::future;

use super::clock::Clock;
use crate::limits::{PACE_BYTES, PACE_PATIENCE, PACE_STEP_BYTES};

pub struct Pace {
    /// Bytes of the log behind what was read last, about: some may be stored while that is told.
    ahead_bytes: Cell<u64>,
    /// Stored since somebody has waited.
    step_bytes: Cell<usize>,
    read_at: Cell<Option<Duration>>,
    /// Of the reads at most the last one.
    reads: (Sender<()>, Receiver<()>),
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            ahead_bytes: Cell::new(0),
            step_bytes: Cell::new(0),
            read_at: Cell::new(None),
            reads: async_channel::bounded(1),
        }
    }
}

impl Pace {
    /// The session has read; so many bytes of the log are behind that.
    pub fn read(&self, behind_bytes: u64, clock: &Clock) {
        self.ahead_bytes.set(behind_bytes);
        self.read_at.set(Some(clock.now()));
        let (has_read, _) = &self.reads;
        // If one is there already, whoever waits is woken by that.
        let _ = has_read.try_send(());
    }

    /// So many bytes were stored: waits while that is far ahead of a session that reads quickly.
    pub async fn stored(&self, bytes: usize, clock: &Clock) {
        let ahead = self.ahead_bytes.get().saturating_add(bytes as u64);
        self.ahead_bytes.set(ahead);
        let step = self.step_bytes.get().saturating_add(bytes);
        self.step_bytes.set(step);
        let reads_quickly = self
            .read_at
            .get()
            .is_some_and(|at| clock.now() < at + PACE_PATIENCE);
        if ahead > PACE_BYTES && step >= PACE_STEP_BYTES && reads_quickly {
            self.step_bytes.set(0);
            let (_, next_read) = &self.reads;
            // One that is over says nothing. It may be what another stream waits for: then that one
            // waits for the next read, too, and output comes nearer all the sooner.
            let _ = next_read.try_recv();
            let read = async {
                // The sender is here, so this is a read.
                let _ = next_read.recv().await;
            };
            future::or(read, clock.sleep(PACE_PATIENCE)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::super::simulation::VirtualTime;
    use super::*;

    const MOMENT: Duration = Duration::from_micros(1);

    struct Bench {
        time: Rc<VirtualTime>,
        clock: Clock,
        pace: Pace,
    }

    impl Bench {
        /// The session has just read.
        fn new(behind_bytes: u64) -> Bench {
            let time = Rc::new(VirtualTime::default());
            let clock = Clock::Virtual(time.clone());
            let pace = Pace::default();
            pace.read(behind_bytes, &clock);
            Bench { time, clock, pace }
        }

        /// Whether somebody who stores so much goes on at once.
        fn goes_on(&self, bytes: usize) -> bool {
            let mut stored = Box::pin(self.pace.stored(bytes, &self.clock));
            smol::block_on(future::poll_once(&mut stored)).is_some()
        }
    }

    const STEP: usize = PACE_STEP_BYTES;

    #[test]
    fn what_is_near_to_the_reader_does_not_wait() {
        let bench = Bench::new(PACE_BYTES - 2 * STEP as u64);
        assert!(bench.goes_on(STEP) && bench.goes_on(STEP));
        assert!(!bench.goes_on(1), "the last read is over");
        bench.pace.read(0, &bench.clock);
        assert!(bench.goes_on(STEP));
    }

    #[test]
    fn a_read_lets_one_go_on() {
        let bench = Bench::new(PACE_BYTES);
        let mut first = Box::pin(bench.pace.stored(STEP, &bench.clock));
        let mut second = Box::pin(bench.pace.stored(STEP, &bench.clock));
        let mut gone = || {
            [&mut first, &mut second]
                .map(|stored| smol::block_on(future::poll_once(stored)).is_some())
        };
        assert_eq!(gone(), [false, false]);
        bench.pace.read(PACE_BYTES, &bench.clock);
        assert_eq!(gone().iter().filter(|gone| **gone).count(), 1);
    }

    #[test]
    fn a_reader_that_pauses_holds_up_nobody_for_long() {
        let bench = Bench::new(PACE_BYTES);
        let mut stored = Box::pin(bench.pace.stored(STEP, &bench.clock));
        assert!(smol::block_on(future::poll_once(&mut stored)).is_none());
        bench.time.advance_to(PACE_PATIENCE - MOMENT);
        assert!(smol::block_on(future::poll_once(&mut stored)).is_none());
        bench.time.advance_to(PACE_PATIENCE);
        assert!(smol::block_on(future::poll_once(&mut stored)).is_some());
        assert!(bench.goes_on(STEP), "the last read was long ago");
    }

    /// Chunks may be as short as the settings say.
    #[test]
    fn many_small_chunks_wait_once_for_all_of_them() {
        let bench = Bench::new(PACE_BYTES);
        let chunk = STEP / 64;
        let waits = |_: &usize| !bench.goes_on(chunk);
        assert_eq!((0..192).filter(waits).count(), 3);
    }

    #[test]
    fn without_a_session_nobody_waits() {
        let time = Rc::new(VirtualTime::default());
        let (clock, pace) = (Clock::Virtual(time), Pace::default());
        let mut stored = Box::pin(pace.stored(10 * PACE_BYTES as usize, &clock));
        assert!(smol::block_on(future::poll_once(&mut stored)).is_some());
    }
}
