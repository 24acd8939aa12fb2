//! One attempt from "about to start" to its stored final (PROTOCOL.md 4.6, 4.7).

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use async_channel::Receiver;
use futures_lite::future;
use log::{error, info, warn};

use super::driver::Input;
use super::{Context, report};
use crate::executor::{Cause, Controls, Ended, Flush, OutputStore, Spec, Stop, Usage};
use crate::ids::{self, AttemptKey, FinalStatus, Ids, Stream};
use crate::limits::{ChunkBatch, KIB, RETRY_AFTER_MAX, STORE_GIVE_UP, STORE_RETRY_DELAY};
use crate::outbox::{Final, Phase, Start, StoreError};
use crate::session::reports::ReportResult;
use crate::session::tasks::QueuedTask;
use crate::wire::Timestamp;

/// Runs an attempt and tells the driver of its start and its end.
pub async fn run(context: Rc<Context>, task: QueuedTask, stop: Receiver<Stop>) {
    let ids = task.ids.clone();
    let key = ids.key();
    // The store lets the command go once the attempt has started.
    let command = load_command(&context, key).await;
    let fin = match may_start(&context, &ids, &stop).await {
        MayStart::Yes => match command {
            Ok(command) if command == UNUSABLE => Some(failed(UNUSABLE_REASON)),
            Ok(command) => Some(execute(&context, &task, command, stop).await),
            Err(why) => Some(failed(&why)),
        },
        // Stopped with the agent it stays received, and starts after the next start.
        MayStart::Stopped(_) if context.stopping.get() => None,
        MayStart::Stopped(stop) => Some(interrupted(&stop.reason)),
        MayStart::Never => None,
    };
    if let Some(fin) = fin {
        store_final(&context, &ids, fin).await;
    }
    context.tell(Input::TaskEnded(key)).await;
}

/// What is recorded in place of a command that can never run; no command contains a NUL.
pub const UNUSABLE: &[u8] = b"\0";
/// For one whose own reason was lost with the agent's end.
const UNUSABLE_REASON: &str = "the command is too long or contains a NUL character";

enum MayStart {
    Yes,
    /// Stopped before it could.
    Stopped(Stop),
    /// It has been before, or has ended.
    Never,
}

/// Makes the start durable. While the store cannot, the task waits.
async fn may_start(context: &Rc<Context>, ids: &Ids, stop: &Receiver<Stop>) -> MayStart {
    let mut told = false;
    loop {
        let started_at = Timestamp::now().0;
        match context.outbox.start(ids.key(), started_at).await {
            Ok(Start::Go) => return MayStart::Yes,
            Ok(Start::Refused(phase)) => {
                if !matches!(phase, Phase::Finished { .. } | Phase::Discarded) {
                    warn!("task {ids}: not started, it has been before");
                }
                return MayStart::Never;
            }
            Err(StoreError::Unknown | StoreError::Closed) => return MayStart::Never,
            Err(error) => {
                if !told {
                    told = true;
                    warn!("task {ids}: waits, its start cannot be recorded: {error}");
                }
                let stopped = async { stop.recv().await.ok() };
                let retry = async {
                    context.clock.sleep(STORE_RETRY_DELAY).await;
                    None
                };
                if let Some(stop) = future::or(stopped, retry).await {
                    return MayStart::Stopped(stop);
                }
            }
        }
    }
}

async fn load_command(context: &Rc<Context>, key: AttemptKey) -> Result<Vec<u8>, String> {
    match context.outbox.load_task(key).await {
        Ok(Some(receipt)) => Ok(receipt.command),
        Ok(None) => Err("its command is no longer in the outbox".to_owned()),
        Err(error) => Err(format!("its command cannot be read back: {error}")),
    }
}

async fn execute(
    context: &Rc<Context>,
    task: &QueuedTask,
    command: Vec<u8>,
    stop: Receiver<Stop>,
) -> Final {
    let ids = &task.ids;
    let config = &context.config;
    let spec = Spec {
        host: context.host.clone(),
        ids: Ids::clone(ids),
        command,
        timeout: bound_timeout(task.timeout_seconds, config.task_timeout),
        kill_grace: config.task_kill_grace,
        flush: Flush {
            interval: config.flush_interval,
            threshold: config.flush_threshold,
        },
        tail_bytes: config.final_output_bytes,
        output_max: config.task_output_max,
    };
    let store = TaskStore {
        context,
        ids,
        key: ids.key(),
        stored: ids.has_result_channel() && context.results_over_websocket(),
        waits: Cell::new(false),
    };
    let controls = Controls {
        stop,
        watched: context.watched.clone(),
    };
    let on_started = |pid| {
        info!("task {ids}: started, process {pid}");
        let (context, key) = (context.clone(), ids.key());
        context.clone().spawn(async move {
            context.tell(Input::TaskStarted(key)).await;
        });
    };
    let ended = context
        .run_process(spec, &store, controls, on_started)
        .await;
    let seconds = ended.wall.as_secs_f32();
    let used = Used(ended.usage);
    match ended.reason() {
        None => info!("task {ids}: completed after {seconds:.1} s{used}"),
        Some(reason) => info!("task {ids}: ended after {seconds:.1} s{used}: {reason}"),
    }
    if ended.is_cut {
        warn!("task {ids}: it printed more than HOSTLINK_TASK_OUTPUT_MAX, the rest is not kept");
    }
    if ended.chunks_given_up > 0 {
        error!(
            "task {ids}: {} chunks of its output are lost, the outbox did not take them",
            ended.chunks_given_up
        );
    }
    final_of(ended, config.final_output_bytes)
}

/// What a task has used, for people; nothing if no process ran.
struct Used(Usage);

impl fmt::Display for Used {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Usage {
            user,
            system,
            memory_peak_bytes,
        } = self.0;
        if self.0 == Usage::default() {
            return Ok(());
        }
        write!(
            f,
            " (cpu {:.2} s user, {:.2} s system; memory {} KiB at most)",
            user.as_secs_f32(),
            system.as_secs_f32(),
            memory_peak_bytes / KIB as u64
        )
    }
}

/// The shorter of the task's own bound and that of the settings.
fn bound_timeout(of_task: Option<u64>, of_settings: Option<Duration>) -> Option<Duration> {
    let of_task = of_task.map(Duration::from_secs);
    of_task.into_iter().chain(of_settings).min()
}

/// What the server is told of the end (PROTOCOL.md 4.9). Why a task was ended from outside stands
/// in `error` even if it had written there.
fn final_of(ended: Ended, bound: usize) -> Final {
    let (status, exit_code) = ended.status();
    let reason = ended.reason();
    let from_outside =
        matches!(ended.cause, Cause::Stopped(_) | Cause::TimedOut(_)) || ended.out_of_memory;
    let lost = ended.chunks_given_up > 0;
    let usage = (!matches!(ended.cause, Cause::NotStarted(_))).then(|| ids::Usage {
        wall_ms: millis(ended.wall),
        user_ms: millis(ended.usage.user),
        system_ms: millis(ended.usage.system),
        memory_peak_bytes: ended.usage.memory_peak_bytes,
    });
    let mut error = ended.stderr.bytes;
    let mut error_truncated = ended.stderr.truncated;
    if let Some(reason) = reason
        && (from_outside || (error.is_empty() && !error_truncated))
    {
        if !error.is_empty() && !error.ends_with(b"\n") {
            error.push(b'\n');
        }
        error.extend_from_slice(reason.as_bytes());
        let over = error.len().saturating_sub(bound.max(reason.len()));
        error_truncated |= over > 0;
        error.drain(..over);
    }
    Final {
        status,
        exit_code,
        output: ended.stdout.bytes,
        error,
        output_truncated: ended.stdout.truncated || lost,
        error_truncated,
        usage,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The final of an attempt that never ran.
pub fn failed(reason: &str) -> Final {
    unstarted(FinalStatus::Failed, reason)
}

/// The final of an attempt that was ended before its start.
pub fn interrupted(reason: &str) -> Final {
    unstarted(FinalStatus::Interrupted, reason)
}

fn unstarted(status: FinalStatus, reason: &str) -> Final {
    Final {
        status,
        exit_code: -1,
        output: Vec::new(),
        error: reason.as_bytes().to_vec(),
        output_truncated: false,
        error_truncated: false,
        usage: None,
    }
}

/// Stores a final. One that cannot be stored is reported at once, and then its end is recorded as
/// soon as the disk takes it, so that it is never sent a second time (PROTOCOL.md 4.7).
pub async fn store_final(context: &Rc<Context>, ids: &Ids, mut fin: Final) {
    let key = ids.key();
    let mut reported = false;
    // When it may be reported, `None` once the server has refused that for ever.
    let mut report_at = Some(context.clock.now());
    let mut delay = STORE_RETRY_DELAY;
    loop {
        let stored = if reported {
            context.outbox.finish_reported(key, fin).await
        } else {
            context.outbox.finish(key, fin).await
        };
        match stored {
            Ok(()) => break,
            Err((_, StoreError::Unknown | StoreError::Closed)) => return,
            Err((refused, error)) => {
                fin = refused;
                if !reported && report_at.is_some_and(|at| at <= context.clock.now()) {
                    warn!("task {ids}: its final cannot be stored, reporting it at once: {error}");
                    match report::send(context, ids, &fin).await {
                        ReportResult::Done => reported = true,
                        ReportResult::Refused { why } => {
                            warn!("task {ids}: the server refuses the report of its result: {why}");
                            // With a result channel it goes over the WebSocket once it is stored.
                            reported = !ids.has_result_channel();
                            report_at = None;
                        }
                        ReportResult::Retry { after, .. } => {
                            let after = after.unwrap_or_default().min(RETRY_AFTER_MAX);
                            report_at = Some(context.clock.now() + after);
                        }
                        ReportResult::Gone => {}
                    }
                }
            }
        }
        context.clock.sleep(delay).await;
        delay = (delay * 2).min(STORE_GIVE_UP);
    }
    if reported {
        report::record_reported(context, key).await;
    }
}

/// The way of a task's chunks into the outbox.
struct TaskStore<'a> {
    context: &'a Rc<Context>,
    ids: &'a Ids,
    key: AttemptKey,
    /// Without a result channel no chunk is stored: nothing could ever take it.
    stored: bool,
    /// The store refuses output, and that has been told.
    waits: Cell<bool>,
}

impl OutputStore for TaskStore<'_> {
    async fn append(
        &self,
        stream: Stream,
        first_sequence: u64,
        batch: ChunkBatch,
    ) -> Result<ChunkBatch, ChunkBatch> {
        if !self.stored {
            return Ok(batch);
        }
        let last = first_sequence + batch.len() as u64 - 1;
        let outbox = &self.context.outbox;
        match outbox.append(self.key, stream, first_sequence, batch).await {
            Ok(buffers) => {
                if self.waits.replace(false) {
                    info!("task {}: its output is stored again", self.ids);
                }
                let bytes = buffers.iter().map(|buffer| buffer.len()).sum();
                self.context.pace.stored(bytes, &self.context.clock).await;
                Ok(buffers)
            }
            Err((batch, error)) => match error {
                StoreError::Full | StoreError::Io(_) => {
                    if !self.waits.replace(true) {
                        warn!("task {}: output waits: {error}", self.ids);
                    }
                    Err(batch)
                }
                // Stored by an earlier try whose outcome was unknown.
                StoreError::Sequence { last: stored } if stored >= last => Ok(batch),
                StoreError::Sequence { .. } | StoreError::Unknown => {
                    error!("task {}: output is lost: {error}", self.ids);
                    Ok(batch)
                }
                StoreError::Closed => Ok(batch),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Tail;

    fn ended(cause: Cause, stderr: &str, truncated: bool) -> Ended {
        Ended {
            cause,
            stdout: Tail::default(),
            stderr: Tail {
                bytes: stderr.into(),
                truncated,
            },
            last_sequence: [0, 0],
            is_cut: false,
            chunks_given_up: 0,
            wall: Duration::ZERO,
            usage: Usage::default(),
            out_of_memory: false,
        }
    }

    #[test]
    fn the_error_text_says_why_where_nothing_else_does() {
        let check = |cause: Cause, stderr: &str, expected: &str| {
            let fin = final_of(ended(cause, stderr, false), 1024);
            assert_eq!(String::from_utf8_lossy(&fin.error), expected);
        };
        let cancelled = || {
            Cause::Stopped(Stop {
                reason: "cancelled".into(),
            })
        };
        check(Cause::Exited(0), "", "");
        check(Cause::Exited(3), "", "exit status 3");
        check(Cause::Exited(3), "no such file\n", "no such file\n");
        check(cancelled(), "half a line", "half a line\ncancelled");
        let fin = final_of(ended(cancelled(), &"x".repeat(100), false), 20);
        assert_eq!(fin.error, b"xxxxxxxxxx\ncancelled");
        assert!(fin.error_truncated);
    }

    #[test]
    fn the_shorter_timeout_counts() {
        let settings = Some(Duration::from_secs(10));
        assert_eq!(bound_timeout(None, None), None);
        assert_eq!(bound_timeout(None, settings), settings);
        assert_eq!(bound_timeout(Some(60), settings), settings);
        assert_eq!(
            bound_timeout(Some(3), settings),
            Some(Duration::from_secs(3))
        );
    }
}
