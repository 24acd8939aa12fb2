//! Runs one task: a process group of its own, its output captured into fixed buffers, its end
//! certain.
//!
//! - [`script`]: how the command becomes a process.
//! - [`setup`], [`account`]: what is done in that process first: user, limits, place.
//! - [`capture`]: from the pipe to the store, in chunks. When the store is slow the child waits.
//! - [`filling`]: the buffers between the two.
//! - [`flush`], [`utf8`], [`tail`]: when a chunk is cut, where, and what the final keeps.
//! - [`process`]: signals, exit and reaping.
//! - [`host`], [`cgroup`], [`procfs`], [`ending`], [`emptying`]: whose a process is, who lives, and how all of them end.
//! - [`record`]: the leaders, for the next start of the agent.
//! - [`timeout`]: the bound of its run time.
//!
//! Invariants: the shell is reaped last, so that its process group id stays its own as long as
//! signals may be sent; sequences count from 1 without holes; no chunk is dropped while the store
//! can come back.

pub mod account;
pub mod capture;
pub mod cgroup;
mod emptying;
mod ending;
mod filling;
pub mod flush;
pub mod host;
mod process;
mod procfs;
mod record;
mod script;
pub mod setup;
pub mod tail;
#[cfg(test)]
mod tests;
mod timeout;
pub mod utf8;

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use futures_lite::future;
use smol::Timer;

use self::capture::{Capture, Captured};
use self::host::{Host, Leftovers};
use self::process::Group;
use self::script::Started;
pub use self::tail::Tail;
use crate::ids::{FinalStatus, Ids, Stream};
use crate::limits::{ChunkBatch, LEFTOVER_PIPE_WAIT};

/// One attempt, ready to run.
#[derive(Debug, Clone)]
pub struct Spec {
    pub host: Rc<Host>,
    pub ids: Ids,
    /// Script text: run by its `#!` interpreter, or by `/bin/sh`.
    pub command: Vec<u8>,
    /// Time in suspend counts.
    pub timeout: Option<Duration>,
    /// From TERM to KILL, for every process of the group: a shell dies of TERM at once, while the
    /// program that it was running may still be tidying up.
    pub kill_grace: Duration,
    pub flush: Flush,
    /// What a final may carry of each stream.
    pub tail_bytes: usize,
    /// Bytes of both streams that are stored; what comes later is read and dropped.
    pub output_max: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
pub struct Flush {
    /// At most one flush in this time, after the first bytes.
    pub interval: Duration,
    /// Or as soon as so much is there; 1 to [`crate::limits::CHUNK_BYTES_MAX`].
    pub threshold: usize,
}

/// Where captured chunks go.
pub trait OutputStore {
    /// One durable append of consecutive chunks of one stream. The buffers come back for reuse:
    /// as `Ok` when stored, as `Err` unchanged when not; then the same chunks are tried again.
    fn append(
        &self,
        stream: Stream,
        first_sequence: u64,
        batch: ChunkBatch,
    ) -> impl Future<Output = Result<ChunkBatch, ChunkBatch>>;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    pub reason: String,
}

/// How a running task is steered.
pub struct Controls {
    /// The first stop ends the task: TERM, grace, KILL.
    pub stop: Receiver<Stop>,
    /// Somebody watches: flush at the interval of the settings, not at the offline one.
    pub watched: Rc<Cell<bool>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    Exited(i32),
    Signalled(i32),
    TimedOut(Duration),
    Stopped(Stop),
    /// No process ran; says why.
    NotStarted(String),
}

impl Cause {
    /// Whether a KILL has ended it, or its shell says that one has ended its command.
    fn is_by_kill(&self) -> bool {
        const SIGNAL: i32 = rustix::process::Signal::KILL.as_raw();
        matches!(self, Cause::Signalled(SIGNAL)) || *self == Cause::Exited(128 + SIGNAL)
    }
}

/// How a task ended.
#[derive(Debug)]
pub struct Ended {
    pub cause: Cause,
    pub stdout: Tail,
    pub stderr: Tail,
    /// Chunks stored of each stream, indexed by [`Stream::index`].
    pub last_sequence: [u64; 2],
    /// There was more output than [`Spec::output_max`].
    pub is_cut: bool,
    /// Chunks that the store did not take in [`crate::limits::STORE_GIVE_UP`] after the end.
    pub chunks_given_up: u64,
    pub wall: Duration,
    pub usage: Usage,
    /// The kernel has killed in this task for want of memory.
    pub out_of_memory: bool,
}

/// What a task has used: all of it where it has a cgroup, else its shell and what the shell has
/// waited for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub user: Duration,
    pub system: Duration,
    /// Never less than what the agent held when it started the task: the kernel counts what a
    /// process was before it became another program.
    pub memory_peak_bytes: u64,
}

impl Ended {
    /// Status and exit code of the final (PROTOCOL.md 3, `task.final`).
    pub fn status(&self) -> (FinalStatus, i32) {
        match &self.cause {
            Cause::Exited(0) => (FinalStatus::Completed, 0),
            Cause::Exited(code) => (FinalStatus::Failed, *code),
            Cause::Signalled(_) | Cause::TimedOut(_) | Cause::NotStarted(_) => {
                (FinalStatus::Failed, -1)
            }
            Cause::Stopped(_) => (FinalStatus::Interrupted, -1),
        }
    }

    /// Why it failed, `None` if it did not (PROTOCOL.md 4.9).
    pub fn reason(&self) -> Option<String> {
        let reason = self.cause_of_failure()?;
        Some(match self.out_of_memory {
            true => format!("{reason}: out of memory, the kernel killed it"),
            false => reason,
        })
    }

    fn cause_of_failure(&self) -> Option<String> {
        match &self.cause {
            Cause::Exited(0) => None,
            Cause::Exited(code) => Some(format!("exit status {code}")),
            Cause::Signalled(signal) => Some(format!("killed by signal {signal}")),
            Cause::TimedOut(after) => Some(format!("timed out after {} s", after.as_secs_f64())),
            Cause::Stopped(stop) => Some(stop.reason.clone()),
            Cause::NotStarted(why) => Some(why.clone()),
        }
    }
}

/// Runs a task to its end. `on_started` gets the process id.
///
/// Dropping the future kills the process group.
pub async fn run(
    spec: Spec,
    store: &impl OutputStore,
    controls: Controls,
    on_started: impl FnOnce(u32),
) -> Ended {
    let begun = Instant::now();
    process::collect_dropped();
    let kills = procfs::kills_for_memory();
    let Started {
        mut group,
        stdout,
        stderr,
        report,
    } = match script::spawn(&spec) {
        Ok(started) => started,
        Err(why) => {
            spec.host.leave_cgroup(spec.ids.key());
            return not_started(why, begun);
        }
    };
    on_started(group.id());

    let room = Cell::new(spec.output_max.unwrap_or(u64::MAX));
    let ended_at = Cell::new(None);
    let (reading, all_read) = async_channel::bounded(1);
    let (holding, let_go) = async_channel::bounded(1);
    let capture = |stream, reading: Sender<()>| Capture {
        stream,
        flush: spec.flush,
        tail_bytes: spec.tail_bytes,
        watched: controls.watched.clone(),
        ended_at: &ended_at,
        let_go: let_go.clone(),
        reading,
        room: &room,
    };
    let out = capture(Stream::Stdout, reading.clone());
    let err = capture(Stream::Stderr, reading);
    let ending = async {
        let cause = end(&spec, &mut group, &controls.stop).await;
        let read_by_itself = async {
            // Closed when both streams have reached their end.
            let _ = all_read.recv().await;
        };
        future::or(read_by_itself, async {
            Timer::after(LEFTOVER_PIPE_WAIT).await;
        })
        .await;
        if cause.is_some() || spec.host.leftovers == Leftovers::Kill {
            group.end_leftovers().await;
        }
        ended_at.set(Some(Instant::now()));
        drop(holding);
        cause
    };
    let (cause, (stdout, stderr)) = future::zip(
        ending,
        future::zip(out.run(stdout, store), err.run(stderr, store)),
    )
    .await;
    let (status, usage) = group.reap();
    let is_killed = cause.is_none() && status.is_by_kill();
    let failed = report.as_ref().and_then(setup::read_report);
    let cause = failed.map_or(cause.unwrap_or(status), Cause::NotStarted);
    let in_cgroup = spec.host.leave_cgroup(spec.ids.key());
    let mut ended = finish(cause, stdout, stderr, begun);
    ended.usage = usage;
    let counted = in_cgroup.and_then(|used| used.out_of_memory);
    // Without a count of its own: it was killed, and meanwhile the kernel has killed for memory.
    let by_the_kernel = || is_killed && procfs::kills_for_memory() > kills;
    ended.out_of_memory = counted.unwrap_or_else(by_the_kernel);
    if let Some(used) = in_cgroup {
        if let Some((user, system)) = used.user_and_system {
            ended.usage.user = user;
            ended.usage.system = system;
        }
        // What the kernel counts there holds file pages, too, so the larger is the truth.
        let peak = used.memory_peak_bytes.unwrap_or(0);
        ended.usage.memory_peak_bytes = ended.usage.memory_peak_bytes.max(peak);
    }
    ended
}

/// Waits for the end of the shell, or brings it about. `None`: it ended by itself.
async fn end(spec: &Spec, group: &mut Group, stop: &Receiver<Stop>) -> Option<Cause> {
    let timeout = async {
        match spec.timeout {
            Some(after) => {
                timeout::elapse(after).await;
                Cause::TimedOut(after)
            }
            None => future::pending().await,
        }
    };
    let stopped = async {
        match stop.recv().await {
            Ok(stop) => Cause::Stopped(stop),
            Err(_) => future::pending().await,
        }
    };
    let exited = async {
        group.exited().await;
        None
    };
    let forced = async { Some(future::or(stopped, timeout).await) };
    let cause = future::or(exited, forced).await?;
    group.terminate();
    if !ending::within(spec.kill_grace, group.ended()).await {
        group.kill().await;
    }
    Some(cause)
}

fn not_started(why: String, begun: Instant) -> Ended {
    finish(
        Cause::NotStarted(why),
        Captured::default(),
        Captured::default(),
        begun,
    )
}

fn finish(cause: Cause, stdout: Captured, stderr: Captured, begun: Instant) -> Ended {
    Ended {
        cause,
        is_cut: stdout.is_cut || stderr.is_cut,
        last_sequence: [stdout.last_sequence, stderr.last_sequence],
        chunks_given_up: stdout.chunks_given_up + stderr.chunks_given_up,
        stdout: stdout.tail,
        stderr: stderr.tail,
        wall: begun.elapsed(),
        usage: Usage::default(),
        out_of_memory: false,
    }
}
