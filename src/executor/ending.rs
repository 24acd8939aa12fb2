//! Ends a set of processes for certain, whoever is in it by then.
//!
//! The set is asked for again and again, since its members start others meanwhile. Before anybody
//! is ended everybody is stopped: a process that is stopped starts no other and leaves no child
//! behind without a trace, so that also those that fork faster than they are found come to an end.
//! Whoever was seen in the set once stays in it, even if nothing tells it any more.

use std::collections::HashSet;
use std::time::Duration;

use futures_lite::future;
use log::warn;
use rustix::process::Signal;
use smol::Timer;

use super::procfs::Process;
use crate::limits::{
    GROUP_POLL_INTERVAL_MAX, GROUP_POLL_INTERVAL_MIN, KILL_PATIENCE, STOP_ROUNDS_MAX,
};

/// Processes that are being ended. `look` gets those that were found before, and returns those of
/// them and of the set that are alive.
pub struct Hunt<L> {
    look: L,
    known: Vec<Process>,
}

impl<L: Fn(&[Process]) -> Vec<Process>> Hunt<L> {
    pub fn new(look: L) -> Hunt<L> {
        let known = Vec::new();
        Hunt { look, known }
    }

    /// Who is alive now.
    pub fn look(&mut self) -> &[Process] {
        self.known = (self.look)(&self.known);
        &self.known
    }

    /// TERM, up to `grace`, KILL. Returns how many there were, when nobody is left, or nobody who
    /// can be killed.
    pub async fn end(mut self, grace: Duration) -> usize {
        if self.look().is_empty() {
            return 0;
        }
        self.stop().await;
        let count = self.known.len();
        self.terminate(|_| true);
        if !self.gone_within(grace).await {
            self.kill().await;
        }
        count
    }

    /// TERM to those that were found and are `meant`.
    pub fn terminate(&self, meant: impl Fn(&Process) -> bool) {
        let meant = self.known.iter().filter(|it| meant(it));
        meant.for_each(Process::terminate);
    }

    /// Whether nobody is left in this time.
    async fn gone_within(&mut self, time: Duration) -> bool {
        within(time, self.gone()).await
    }

    /// Waits until nobody is left.
    pub async fn gone(&mut self) {
        until(|| self.look().is_empty()).await;
    }

    /// Stops everybody, until a look finds nobody else.
    async fn stop(&mut self) {
        let mut stopped = HashSet::new();
        for _ in 0..STOP_ROUNDS_MAX {
            let mut new = self.look().to_vec();
            let has_stopped = new.iter().all(|it| it.is_stopped);
            new.retain(|it| stopped.insert((it.id, it.started)));
            if new.is_empty() && has_stopped {
                return;
            }
            for member in &new {
                member.signal(Signal::STOP);
            }
            future::yield_now().await;
        }
    }

    /// KILL, until nobody is left. One that sleeps where no signal reaches it is given up after
    /// [`KILL_PATIENCE`]: it ends when the kernel lets it.
    pub async fn kill(&mut self) {
        if within(KILL_PATIENCE, self.kill_all()).await {
            return;
        }
        if let [one, others @ ..] = self.look() {
            warn!(
                "process {} of a task does not die, it hangs in the kernel; and {} others",
                one.id.as_raw_pid(),
                others.len()
            );
        }
    }

    async fn kill_all(&mut self) {
        let mut pause = GROUP_POLL_INTERVAL_MIN;
        while !self.look().is_empty() {
            self.stop().await;
            for member in &self.known {
                member.signal(Signal::KILL);
            }
            Timer::after(pause).await;
            pause = (pause * 2).min(GROUP_POLL_INTERVAL_MAX);
        }
    }
}

/// Whether it comes to its end in this time.
pub async fn within(time: Duration, awaited: impl Future<Output = ()>) -> bool {
    let ended = async {
        awaited.await;
        true
    };
    let over = async {
        Timer::after(time).await;
        false
    };
    future::or(ended, over).await
}

/// Asks soon at first, then less often, until it is so.
pub async fn until(mut is_so: impl FnMut() -> bool) {
    let mut pause = GROUP_POLL_INTERVAL_MIN;
    while !is_so() {
        Timer::after(pause).await;
        pause = (pause * 2).min(GROUP_POLL_INTERVAL_MAX);
    }
}
