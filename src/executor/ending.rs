//! Ends a set of processes for certain, whoever is in it by then.
//!
//! The set is asked for again and again (`look`), since its members start others meanwhile. Before
//! KILL everybody is stopped: a process that is stopped starts no other, so that also those that
//! fork faster than they are found come to an end.

use std::time::Duration;

use futures_lite::future;
use log::warn;
use rustix::process::Signal;
use smol::Timer;

use super::procfs::Process;
use crate::limits::{
    GROUP_POLL_INTERVAL_MAX, GROUP_POLL_INTERVAL_MIN, KILL_PATIENCE, STOP_ROUNDS_MAX,
};

/// TERM, up to `grace`, KILL. Returns when nobody is left, or nobody who can be killed.
pub async fn end(look: impl Fn() -> Vec<Process>, grace: Duration) {
    let members = look();
    if members.is_empty() {
        return;
    }
    terminate(&members);
    if !gone_within(&look, grace).await {
        kill(&look).await;
    }
}

pub fn terminate(members: &[Process]) {
    for member in members {
        member.signal(Signal::TERM);
        // A stopped process takes no signal but KILL before it goes on.
        if member.is_stopped {
            member.signal(Signal::CONT);
        }
    }
}

/// Whether nobody is left in this time.
pub async fn gone_within(look: impl Fn() -> Vec<Process>, time: Duration) -> bool {
    let gone = async {
        gone(&look).await;
        true
    };
    let late = async {
        Timer::after(time).await;
        false
    };
    future::or(gone, late).await
}

/// Waits until nobody is left.
pub async fn gone(look: impl Fn() -> Vec<Process>) {
    let mut pause = GROUP_POLL_INTERVAL_MIN;
    while !look().is_empty() {
        Timer::after(pause).await;
        pause = (pause * 2).min(GROUP_POLL_INTERVAL_MAX);
    }
}

/// KILL, until nobody is left. One that sleeps where no signal reaches it is given up after
/// [`KILL_PATIENCE`]: it ends when the kernel lets it.
pub async fn kill(look: impl Fn() -> Vec<Process>) {
    let ended = async {
        kill_all(&look).await;
        true
    };
    let late = async {
        Timer::after(KILL_PATIENCE).await;
        false
    };
    if !future::or(ended, late).await {
        let left = look();
        if let Some(one) = left.first() {
            warn!(
                "{} processes of a task do not die, process {} is one of them; they hang in the \
                 kernel",
                left.len(),
                one.id.as_raw_pid()
            );
        }
    }
}

async fn kill_all(look: impl Fn() -> Vec<Process>) {
    let mut pause = GROUP_POLL_INTERVAL_MIN;
    loop {
        let mut stopped: Vec<Process> = Vec::new();
        let mut members = look();
        for _ in 0..STOP_ROUNDS_MAX {
            let is_new = |it: &&Process| {
                !stopped
                    .iter()
                    .any(|known| known.id == it.id && known.started == it.started)
            };
            let new: Vec<Process> = members.iter().filter(is_new).copied().collect();
            if new.is_empty() {
                break;
            }
            for member in &new {
                member.signal(Signal::STOP);
            }
            stopped.extend(new);
            future::yield_now().await;
            members = look();
        }
        if members.is_empty() {
            return;
        }
        for member in &members {
            member.signal(Signal::KILL);
        }
        Timer::after(pause).await;
        pause = (pause * 2).min(GROUP_POLL_INTERVAL_MAX);
    }
}
