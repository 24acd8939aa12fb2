//! The asynchronous side of the outbox: each call is one command to the storage thread and one
//! answer from it. The queue is bounded ([`STORAGE_QUEUE`]): a further sender waits.

use std::sync::{Arc, OnceLock};

use async_channel::{Receiver, Sender};

use super::types::*;
use crate::ids::{AttemptKey, Ids, Incarnation, Stream};
use crate::limits::{ChunkBatch, WINDOW_MESSAGES};

#[cfg(doc)]
use crate::limits::STORAGE_QUEUE;

/// Acknowledgements that are handed over together.
pub type Acks = heapless::Vec<Ack, WINDOW_MESSAGES>;

/// Chunks that could not be stored, handed back with the reason.
pub type AppendError = (ChunkBatch, StoreError);
/// A final that could not be stored, handed back with the reason.
pub type FinishError = (Final, StoreError);

pub(super) type Reply<T> = Sender<T>;

/// One wish to the storage thread.
pub(super) enum Command {
    Receive(Box<Receipt>, Reply<Result<Reception, StoreError>>),
    LoadTask(AttemptKey, Reply<Result<Option<Receipt>, StoreError>>),
    Start(AttemptKey, u64, Reply<Result<Start, StoreError>>),
    Append {
        key: AttemptKey,
        stream: Stream,
        first_sequence: u64,
        batch: ChunkBatch,
        reply: Reply<Result<ChunkBatch, AppendError>>,
    },
    /// True: its report has succeeded.
    Finish(AttemptKey, Final, bool, Reply<Result<(), FinishError>>),
    Reported(AttemptKey, Reply<Result<(), StoreError>>),
    DropFinal(AttemptKey, Reply<Result<(), StoreError>>),
    Discard(AttemptKey, Reply<Result<(), StoreError>>),
    GiveUpStream(AttemptKey, Stream, Reply<Result<(), StoreError>>),
    Reject(AttemptKey, Piece, Reply<Result<(), StoreError>>),
    Acknowledge(Box<Acks>),
    Read(Box<ReadRequest>, Reply<Batch>),
    Rewind(AttemptKey, Stream, u64, Reply<Option<Cursor>>),
    FinalOf(AttemptKey, Reply<Option<StoredFinal>>),
    PhaseOf(AttemptKey, Reply<Option<Phase>>),
    FinalsWaiting(usize, Reply<Vec<FinalWaiting>>),
    Snapshot(usize, Reply<Snapshot>),
    Counts(Reply<Counts>),
    Close(Reply<()>),
}

/// Names of the store: that of the volatile one it began as, and that of the disk it moved to.
pub(super) struct Incarnations {
    pub first: Incarnation,
    pub second: OnceLock<Incarnation>,
}

/// The way to the storage thread. Clones talk to the same store.
#[derive(Clone)]
pub struct Handle {
    pub(super) commands: Sender<Command>,
    pub(super) appended: Receiver<()>,
    pub(super) reopened: Receiver<Recovered>,
    pub(super) incarnations: Arc<Incarnations>,
}

/// A task on its way to the disk.
pub struct Submitted(Receiver<Result<Reception, StoreError>>);

impl Submitted {
    pub async fn recorded(self) -> Result<Reception, StoreError> {
        self.0.recv().await.unwrap_or(Err(StoreError::Closed))
    }
}

/// What was asked to be read, on its way.
pub struct Reading {
    from: Cursor,
    batch: Receiver<Batch>,
}

impl Reading {
    /// Empty and `at_end` if nothing waits at the cursor.
    pub async fn batch(self) -> Batch {
        self.batch.recv().await.unwrap_or(Batch {
            next: self.from,
            at_end: true,
            ..Batch::default()
        })
    }
}

impl Handle {
    /// Random name of this store. It changes only when a volatile store has been left for the disk
    /// ([`Handle::reopened`]); messages keep the name that they were born with.
    pub fn incarnation(&self) -> Incarnation {
        let names = &self.incarnations;
        *names.second.get().unwrap_or(&names.first)
    }

    /// The storage thread has ended: every call fails from now on.
    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// Gets a signal (at most one waits) when something new to send has been committed.
    pub fn appended(&self) -> Receiver<()> {
        self.appended.clone()
    }

    /// Gets one value if a volatile store could be left for the disk: what recovery found there,
    /// to be handled like the first one. What memory held has moved there and is not named again.
    /// Cursors have lost their meaning: nothing is read until the next [`Handle::snapshot`], so the
    /// session must begin anew.
    pub fn reopened(&self) -> Receiver<Recovered> {
        self.reopened.clone()
    }

    /// Records a task durably, unless its attempt is known. [`StoreError::Full`] if there is no
    /// room for it and its worst-case final.
    pub async fn receive(&self, receipt: Receipt) -> Result<Reception, StoreError> {
        self.submit(receipt).await.recorded().await
    }

    /// As [`Handle::receive`], without waiting for the disk: what is submitted one after another
    /// is recorded in this order.
    pub async fn submit(&self, receipt: Receipt) -> Submitted {
        let (reply, answer) = async_channel::bounded(1);
        // A closed store drops the command, and with it the other end.
        let command = Command::Receive(Box::new(receipt), reply);
        let _ = self.commands.send(command).await;
        Submitted(answer)
    }

    /// Reads a task that has not started back from the log. `None` if it is not held.
    pub async fn load_task(&self, key: AttemptKey) -> Result<Option<Receipt>, StoreError> {
        self.ask(|reply| Command::LoadTask(key, reply)).await?
    }

    /// Makes "starting" durable. [`Start::Go`] is given once for an attempt, ever.
    pub async fn start(&self, key: AttemptKey, started_at_ms: u64) -> Result<Start, StoreError> {
        self.ask(|reply| Command::Start(key, started_at_ms, reply))
            .await?
    }

    /// Stores consecutive chunks of one stream in one durable append. The buffers come back in
    /// either case. The chunks of a discarded attempt are accepted and thrown away.
    pub async fn append(
        &self,
        key: AttemptKey,
        stream: Stream,
        first_sequence: u64,
        batch: ChunkBatch,
    ) -> Result<ChunkBatch, AppendError> {
        let (reply, answer) = async_channel::bounded(1);
        let command = Command::Append {
            key,
            stream,
            first_sequence,
            batch,
            reply,
        };
        if let Err(refused) = self.commands.send(command).await {
            return match refused.0 {
                Command::Append { batch, .. } => Err((batch, StoreError::Closed)),
                _ => Err((ChunkBatch::new(), StoreError::Closed)),
            };
        }
        answer
            .recv()
            .await
            .unwrap_or_else(|_| Err((ChunkBatch::new(), StoreError::Closed)))
    }

    /// Stores the end of an attempt durably; also of one that never started. The first wins, a
    /// second changes nothing.
    pub async fn finish(&self, key: AttemptKey, fin: Final) -> Result<(), FinishError> {
        self.finish_as(key, fin, false).await
    }

    /// Stores the end of an attempt whose report has succeeded, and with it that it has: no restart
    /// and no reader finds the one without the other.
    pub async fn finish_reported(&self, key: AttemptKey, fin: Final) -> Result<(), FinishError> {
        self.finish_as(key, fin, true).await
    }

    async fn finish_as(
        &self,
        key: AttemptKey,
        fin: Final,
        is_reported: bool,
    ) -> Result<(), FinishError> {
        let (reply, answer) = async_channel::bounded(1);
        let command = Command::Finish(key, fin, is_reported, reply);
        if let Err(refused) = self.commands.send(command).await {
            return match refused.0 {
                Command::Finish(_, fin, ..) => Err((fin, StoreError::Closed)),
                _ => Err((Final::nothing(), StoreError::Closed)),
            };
        }
        answer
            .recv()
            .await
            .unwrap_or_else(|_| Err((Final::nothing(), StoreError::Closed)))
    }

    /// A report has succeeded: the final is done, durably.
    pub async fn reported(&self, key: AttemptKey) -> Result<(), StoreError> {
        self.ask(|reply| Command::Reported(key, reply)).await?
    }

    /// A report was refused for ever and there is no other way: the final is dropped and counted.
    pub async fn drop_final(&self, key: AttemptKey) -> Result<(), StoreError> {
        self.ask(|reply| Command::DropFinal(key, reply)).await?
    }

    /// Drops an attempt with its output, durably; if it has not started, it never will.
    pub async fn discard(&self, key: AttemptKey) -> Result<(), StoreError> {
        self.ask(|reply| Command::Discard(key, reply)).await?
    }

    /// Drops what is held of a stream and marks it truncated, durably.
    pub async fn give_up_stream(&self, key: AttemptKey, stream: Stream) -> Result<(), StoreError> {
        self.ask(|reply| Command::GiveUpStream(key, stream, reply))
            .await?
    }

    /// Removes one message that the server will never take, durably.
    pub async fn reject(&self, key: AttemptKey, piece: Piece) -> Result<(), StoreError> {
        self.ask(|reply| Command::Reject(key, piece, reply)).await?
    }

    /// Removes what the server has. A lost acknowledgement costs only a repeat, so this is not
    /// durable by itself and returns as soon as it is queued.
    pub async fn acknowledge(&self, acks: Acks) {
        // A closed store keeps the messages; the server gets them once more.
        let _ = self
            .commands
            .send(Command::Acknowledge(Box::new(acks)))
            .await;
    }

    /// Reads forward from a cursor.
    pub async fn read(&self, request: ReadRequest) -> Batch {
        self.begin_to_read(request).await.batch().await
    }

    /// As [`Handle::read`], without waiting for the disk: it is read before anything that is stored
    /// by a later call.
    pub async fn begin_to_read(&self, request: ReadRequest) -> Reading {
        let (reply, batch) = async_channel::bounded(1);
        let from = request.from;
        // A closed store drops the command, and with it the other end.
        let command = Command::Read(Box::new(request), reply);
        let _ = self.commands.send(command).await;
        Reading { from, batch }
    }

    /// Where the first held, unacknowledged chunk of a stream with at least this sequence is.
    pub async fn rewind(
        &self,
        key: AttemptKey,
        stream: Stream,
        from_sequence: u64,
    ) -> Option<Cursor> {
        self.ask(|reply| Command::Rewind(key, stream, from_sequence, reply))
            .await
            .ok()?
    }

    /// The final of an attempt that has ended and is remembered, with its texts if still held.
    pub async fn final_of(&self, key: AttemptKey) -> Option<StoredFinal> {
        self.ask(|reply| Command::FinalOf(key, reply)).await.ok()?
    }

    /// `None`: never seen, or forgotten.
    pub async fn phase_of(&self, key: AttemptKey) -> Option<Phase> {
        self.ask(|reply| Command::PhaseOf(key, reply)).await.ok()?
    }

    /// Unacknowledged finals, oldest first, also those without a result channel.
    pub async fn finals_waiting(&self, max: usize) -> Vec<FinalWaiting> {
        self.ask(|reply| Command::FinalsWaiting(max, reply))
            .await
            .unwrap_or_default()
    }

    /// Everything that a hello tells; the texts of its finals are at most this many bytes.
    pub async fn snapshot(&self, text_budget_bytes: usize) -> Snapshot {
        self.ask(|reply| Command::Snapshot(text_budget_bytes, reply))
            .await
            .unwrap_or_default()
    }

    pub async fn counts(&self) -> Counts {
        self.ask(Command::Counts).await.unwrap_or_default()
    }

    /// Commits what waits, brings the index up to date, marks the stop as clean and ends the
    /// storage thread. Later calls on clones get [`StoreError::Closed`].
    pub async fn close(self) {
        let _ = self.ask(Command::Close).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, StoreError> {
        let (reply, answer) = async_channel::bounded(1);
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| StoreError::Closed)?;
        answer.recv().await.map_err(|_| StoreError::Closed)
    }
}

impl Final {
    fn nothing() -> Final {
        Final {
            status: crate::ids::FinalStatus::Interrupted,
            exit_code: -1,
            output: Vec::new(),
            error: Vec::new(),
            output_truncated: true,
            error_truncated: true,
            usage: None,
        }
    }
}

const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<Handle>();
    is_send::<Ids>();
};
