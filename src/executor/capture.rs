//! One stream from its pipe to the store.
//!
//! Two loops share a fixed set of buffers: the reader fills one and cuts chunks, the storer commits
//! those that wait, several at once. A buffer is either filling, waiting, in a commit or free; when
//! none is free the pipe is not read, and the child waits.

use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use async_io::Async;
use futures_lite::future;
use log::warn;
use smol::Timer;

use super::filling::{Filling, PipeReader, Taken};
use super::flush::{FlushPolicy, Looks};
use super::tail::{Tail, TailRing};
use super::{Flush, OutputStore};
use crate::ids::Stream;
use crate::limits::{
    CHUNK_BUFFERS_MAX, CHUNK_BYTES_MAX, CHUNKS_WAITING_MAX, Chunk, ChunkBatch,
    FLUSH_INTERVAL_OFFLINE, HASTY_PIPE_BYTES, LEFTOVER_PIPE_BYTES, LOOK_REST, STORE_GIVE_UP,
    STORE_RETRY_DELAY,
};

/// What one stream needs to be captured.
pub struct Capture<'a> {
    pub stream: Stream,
    pub flush: Flush,
    pub tail_bytes: usize,
    pub watched: Rc<Cell<bool>>,
    /// When the process ended.
    pub ended_at: &'a Cell<Option<Instant>>,
    /// Closed when the pipe is to be let go, although somebody still holds it.
    pub let_go: Receiver<()>,
    /// Dropped when the stream has reached its end.
    pub reading: Sender<()>,
    /// Bytes of both streams together that may still be stored.
    pub room: &'a Cell<u64>,
}

#[derive(Debug, Default)]
pub struct Captured {
    pub tail: Tail,
    /// There was more than the room.
    pub is_cut: bool,
    pub last_sequence: u64,
    pub chunks_given_up: u64,
}

impl Capture<'_> {
    /// Reads the pipe to its end and stores all of it.
    pub async fn run(self, pipe: impl AsFd + io::Read, store: &impl OutputStore) -> Captured {
        // Together these hold every buffer, so sending never waits for long: the reader waits for
        // a free buffer, the storer for a full one.
        let (full, to_store) = async_channel::bounded(CHUNKS_WAITING_MAX);
        let (free, to_fill) = async_channel::bounded(CHUNK_BUFFERS_MAX);
        let (stream, ended_at) = (self.stream, self.ended_at);
        let reader = self.read(pipe, full, to_fill);
        let storer = store_chunks(stream, ended_at, store, to_store, free);
        let ((tail, is_cut), (last_sequence, chunks_given_up)) = future::zip(reader, storer).await;
        Captured {
            tail,
            is_cut,
            last_sequence,
            chunks_given_up,
        }
    }

    async fn read(
        self,
        pipe: impl AsFd + io::Read,
        full: Sender<Chunk>,
        to_fill: Receiver<Chunk>,
    ) -> (Tail, bool) {
        let mut tail = TailRing::new(self.tail_bytes);
        let mut filling = Filling::new(full, to_fill);
        let read = self.read_to_end(pipe, &mut filling, &mut tail).await;
        filling.flush_all().await;
        let mut tail = tail.finish();
        if let Err(error) = &read {
            warn!(
                "what a task still writes to {} is lost, its pipe cannot be read: {error}",
                self.stream.as_str()
            );
            tail.truncated = true;
        }
        let is_cut = matches!(read, Ok(Read::Cut));
        tail.truncated |= is_cut;
        (tail, is_cut)
    }

    async fn read_to_end(
        &self,
        pipe: impl AsFd + io::Read,
        filling: &mut Filling,
        tail: &mut TailRing,
    ) -> io::Result<Read> {
        // Larger than the default of 64 KiB: fewer switches between child and agent. A refusal
        // (the user's pipe quota) changes nothing else.
        let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES);
        let size = rustix::pipe::fcntl_getpipe_size(&pipe);
        let may_rest = size.is_ok_and(|bytes| bytes >= HASTY_PIPE_BYTES);
        let pipe = Async::new(PipeReader(pipe))?;
        let threshold = self.flush.threshold.clamp(1, CHUNK_BYTES_MAX);
        let begun = Instant::now();
        let mut policy = FlushPolicy::default();
        let mut looks = Looks::default();
        // What was printed meanwhile goes with this flush, not with the next one.
        let mut has_rested = false;
        let mut left_over = None;
        // The last read has filled all that it was given: the child prints faster than this reads.
        let mut is_full = false;
        loop {
            // Asked for here and not only in the wait: whoever holds the pipe may never let it
            // run empty.
            if left_over.is_none() && self.let_go.is_closed() {
                left_over = Some(LEFTOVER_PIPE_BYTES);
            }
            let due = filling.can_flush().then(|| policy.due_at(self.interval()));
            if !std::mem::take(&mut has_rested) && due.is_some_and(|due| due <= begun.elapsed()) {
                filling.flush().await;
                policy.flushed(begun.elapsed());
            }
            let in_burst = is_full
                && threshold == CHUNK_BYTES_MAX
                && left_over.is_none()
                && self.room.get() >= (CHUNKS_WAITING_MAX * CHUNK_BYTES_MAX) as u64;
            let count = match filling
                .read(pipe.get_ref(), threshold, in_burst, tail)
                .await?
            {
                Taken::Bytes { count, all_room } => {
                    is_full = all_room;
                    count
                }
                Taken::End => return Ok(Read::All),
                Taken::NotYet if left_over.is_some() => return Ok(Read::All),
                Taken::NotYet => {
                    is_full = false;
                    let due_at = policy.due_at(self.interval());
                    let now = begun.elapsed();
                    let due = due_at.saturating_sub(now);
                    if looks.ran_empty(now) && may_rest && !due.is_zero() {
                        self.rest(due.min(LOOK_REST)).await;
                        has_rested = true;
                    } else {
                        let due = filling.can_flush().then_some(due);
                        self.wait(&pipe, due).await?;
                    }
                    continue;
                }
            };
            looks.found(count);
            let room = self.room.get();
            self.room.set(room.saturating_sub(count as u64));
            if count as u64 > room {
                let kept = usize::try_from(room).unwrap_or(count);
                filling.take_in(kept, threshold).await;
                filling.end_on_a_character();
                filling.flush().await;
                self.drain(&pipe, tail).await?;
                return Ok(Read::Cut);
            }
            if filling.take_in(count, threshold).await {
                policy.flushed(begun.elapsed());
            }
            if let Some(left) = &mut left_over {
                *left = left.saturating_sub(count);
                if *left == 0 {
                    return Ok(Read::All);
                }
            }
        }
    }

    /// Reads on without storing, so that the task is not held up and the final has the last bytes.
    async fn drain<P: AsFd>(
        &self,
        pipe: &Async<PipeReader<P>>,
        tail: &mut TailRing,
    ) -> io::Result<()> {
        let mut scratch = vec![0; CHUNK_BYTES_MAX];
        let mut left_over = LEFTOVER_PIPE_BYTES;
        while left_over > 0 {
            let is_let_go = self.let_go.is_closed();
            match pipe
                .get_ref()
                .read_now(&mut [IoSliceMut::new(&mut scratch)])
            {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if is_let_go {
                        break;
                    }
                    self.wait(pipe, None).await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(0) => break,
                Ok(count) => {
                    tail.push(&scratch[..count]);
                    if is_let_go {
                        left_over = left_over.saturating_sub(count);
                    }
                    // Nothing else here makes a task wait that writes without pause.
                    future::yield_now().await;
                }
            }
        }
        Ok(())
    }

    /// Waits for bytes, for the flush, or until the pipe is to be let go.
    async fn wait<T: AsFd>(&self, pipe: &Async<T>, due: Option<Duration>) -> io::Result<()> {
        let other = async {
            match due {
                Some(after) => self.rest(after).await,
                None => self.is_let_go().await,
            }
            Ok(())
        };
        future::or(pipe.readable(), other).await
    }

    /// Waits for this time, or until the pipe is to be let go.
    async fn rest(&self, time: Duration) {
        let over = async {
            Timer::after(time).await;
        };
        future::or(over, self.is_let_go()).await;
    }

    async fn is_let_go(&self) {
        // Nothing is ever sent: it is closed.
        let _ = self.let_go.recv().await;
    }

    fn interval(&self) -> Duration {
        if self.watched.get() {
            self.flush.interval
        } else {
            FLUSH_INTERVAL_OFFLINE.max(self.flush.interval)
        }
    }
}

/// How much of a stream was taken in.
enum Read {
    All,
    /// There was more than may be stored.
    Cut,
}

const PIPE_BYTES: usize = 256 * 1024;

/// Commits what waits until the reader is done. Returns the last sequence stored and how many
/// chunks were given up.
async fn store_chunks(
    stream: Stream,
    ended_at: &Cell<Option<Instant>>,
    store: &impl OutputStore,
    to_store: Receiver<Chunk>,
    free: Sender<Chunk>,
) -> (u64, u64) {
    let mut last_sequence = 0;
    let mut given_up = 0;
    while let Ok(first) = to_store.recv().await {
        let mut batch = ChunkBatch::new();
        let mut next = Some(first);
        while let Some(chunk) = next {
            let pushed = batch.push(chunk);
            debug_assert!(pushed.is_ok(), "a batch has room for all chunks that wait");
            next = (!batch.is_full())
                .then(|| to_store.try_recv().ok())
                .flatten();
        }
        loop {
            if given_up > 0 {
                given_up += batch.len() as u64;
                break;
            }
            let count = batch.len() as u64;
            match store.append(stream, last_sequence + 1, batch).await {
                Ok(buffers) => {
                    last_sequence += count;
                    batch = buffers;
                    break;
                }
                Err(refused) => batch = refused,
            }
            let ended = ended_at
                .get()
                .is_some_and(|at| at.elapsed() > STORE_GIVE_UP);
            if ended {
                given_up += batch.len() as u64;
                break;
            }
            Timer::after(STORE_RETRY_DELAY).await;
        }
        while let Some(buffer) = batch.pop() {
            // The reader may be gone already; then nobody needs it.
            let _ = free.try_send(buffer);
        }
    }
    (last_sequence, given_up)
}
