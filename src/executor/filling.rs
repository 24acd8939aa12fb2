//! The buffers that a stream is read into.

use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;

use async_channel::{Receiver, Sender};

use super::tail::TailRing;
use super::utf8::complete_prefix;
use crate::limits::{CHUNK_BUFFERS_MAX, CHUNK_BYTES_MAX, CHUNKS_WAITING_MAX, Chunk};

/// What a read has brought.
pub(super) enum Taken {
    /// `all_room`: as much as there was room for.
    Bytes {
        count: usize,
        all_room: bool,
    },
    NotYet,
    End,
}

/// A pipe end whose reads do not need `&mut`.
pub(super) struct PipeReader<P>(pub P);

impl<P: AsFd> AsFd for PipeReader<P> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl<P: AsFd> PipeReader<P> {
    pub fn read_now(&self, rooms: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(rustix::io::readv(&self.0, rooms)?)
    }
}

/// The buffer that is being filled, and the way to others.
pub(super) struct Filling {
    /// Always of full length; the first `filled` bytes count.
    buffer: Option<Chunk>,
    filled: usize,
    /// Empty ones, of full length: while the child prints without pause one read fills several. It
    /// costs one call, and the child is woken once.
    reserved: heapless::Vec<Chunk, { CHUNKS_WAITING_MAX - 1 }>,
    allocated: usize,
    full: Sender<Chunk>,
    to_fill: Receiver<Chunk>,
}

impl Filling {
    pub fn new(full: Sender<Chunk>, to_fill: Receiver<Chunk>) -> Filling {
        Filling {
            buffer: None,
            filled: 0,
            reserved: heapless::Vec::new(),
            allocated: 0,
            full,
            to_fill,
        }
    }

    /// Drops the begin of a character that will not be completed.
    pub fn end_on_a_character(&mut self) {
        self.filled = self.complete();
    }

    /// Up to where the current buffer is filled: the threshold, and at least one byte more.
    fn end(&self, threshold: usize) -> usize {
        threshold.max(self.filled + 1).min(CHUNK_BYTES_MAX)
    }

    async fn ensure_buffer(&mut self) {
        if self.buffer.is_none() {
            self.buffer = Some(self.take_buffer().await);
        }
    }

    /// Takes as many buffers as one read may fill beside the current one.
    fn reserve(&mut self) {
        while !self.reserved.is_full()
            && let Some(buffer) = self.free_buffer()
        {
            let reserved = self.reserved.push(buffer);
            debug_assert!(reserved.is_ok(), "there was room for it");
        }
    }

    /// Reads once, what there is, in a burst into several buffers. What is read is to be taken in:
    /// [`Filling::take_in`].
    pub async fn read<P: AsFd>(
        &mut self,
        pipe: &PipeReader<P>,
        threshold: usize,
        in_burst: bool,
        tail: &mut TailRing,
    ) -> io::Result<Taken> {
        self.ensure_buffer().await;
        if in_burst {
            self.reserve();
        }
        let (begin, end) = (self.filled, self.end(threshold));
        let current = self.buffer.iter_mut().map(|it| &mut it[begin..end]);
        let reserved = self.reserved.iter_mut().map(|it| &mut it[..]);
        let most = if in_burst { CHUNKS_WAITING_MAX } else { 1 };
        let rooms = current.chain(reserved).map(IoSliceMut::new).take(most);
        let mut rooms: heapless::Vec<_, CHUNKS_WAITING_MAX> = rooms.collect();
        let room: usize = rooms.iter().map(|room| room.len()).sum();
        let count = loop {
            match pipe.read_now(&mut rooms) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Taken::NotYet);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(0) => return Ok(Taken::End),
                Ok(count) => break count,
            }
        };
        let mut passed = tail.pass_over(count);
        let mut rest = count;
        for room in &rooms {
            let read = &room[..rest.min(room.len())];
            rest -= read.len();
            let (before, kept) = read.split_at(passed.min(read.len()));
            passed -= before.len();
            tail.push(kept);
        }
        Ok(Taken::Bytes {
            count,
            all_room: count == room,
        })
    }

    /// So many bytes were read. What is full goes; whether anything has gone.
    pub async fn take_in(&mut self, count: usize, threshold: usize) -> bool {
        let first = count.min(self.end(threshold) - self.filled);
        self.filled += first;
        let mut rest = count - first;
        // Apart from those that are empty.
        let mut read = heapless::Vec::<Chunk, { CHUNKS_WAITING_MAX - 1 }>::new();
        for _ in 0..rest.div_ceil(CHUNK_BYTES_MAX) {
            let moved = read.push(self.reserved.remove(0));
            debug_assert!(moved.is_ok(), "there are no more of them");
        }
        let mut has_gone = !read.is_empty();
        for next in read {
            if self.filled == CHUNK_BYTES_MAX {
                self.flush().await;
            }
            let bytes = rest.min(next.len());
            rest -= bytes;
            if self.filled == 0 {
                self.buffer = Some(next);
                self.filled = bytes;
            } else {
                // The begin of a character stands there already, or what had no room behind it.
                self.append(&next[..bytes]).await;
                let kept = self.reserved.push(next);
                debug_assert!(kept.is_ok(), "it was there before");
            }
        }
        if self.filled >= threshold {
            self.flush().await;
            has_gone = true;
        }
        has_gone
    }

    async fn append(&mut self, mut bytes: &[u8]) {
        while let Some(buffer) = &mut self.buffer {
            let room = &mut buffer[self.filled..];
            let (now, later) = bytes.split_at(bytes.len().min(room.len()));
            room[..now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if bytes.is_empty() {
                return;
            }
            self.flush().await;
            self.ensure_buffer().await;
        }
    }

    async fn take_buffer(&mut self) -> Chunk {
        if let Some(buffer) = self.reserved.pop() {
            return buffer;
        }
        match self.free_buffer() {
            Some(buffer) => buffer,
            // The storer outlives the reader, so this ends.
            None => whole(self.to_fill.recv().await.unwrap_or_default()),
        }
    }

    fn free_buffer(&mut self) -> Option<Chunk> {
        if let Ok(buffer) = self.to_fill.try_recv() {
            return Some(whole(buffer));
        }
        (self.allocated < CHUNK_BUFFERS_MAX).then(|| {
            self.allocated += 1;
            whole(Chunk::default())
        })
    }

    /// Whether there is anything that may go without splitting a character.
    pub fn can_flush(&self) -> bool {
        self.complete() > 0
    }

    fn complete(&self) -> usize {
        self.buffer
            .as_ref()
            .map_or(0, |buffer| complete_prefix(&buffer[..self.filled]))
    }

    pub async fn flush(&mut self) {
        let cut = self.complete();
        self.flush_to(cut).await;
    }

    /// The end of the stream: an incomplete character goes, too.
    pub async fn flush_all(&mut self) {
        self.flush_to(self.filled).await;
    }

    async fn flush_to(&mut self, cut: usize) {
        if cut == 0 {
            return;
        }
        let Some(mut buffer) = self.buffer.take() else {
            return;
        };
        let mut held_back = heapless::Vec::<u8, 4>::new();
        let held = held_back.extend_from_slice(&buffer[cut..self.filled]);
        debug_assert!(held.is_ok(), "a character has at most four bytes");
        buffer.truncate(cut);
        self.filled = 0;
        // The storer outlives the reader; a closed channel cannot be.
        let _ = self.full.send(buffer).await;
        if !held_back.is_empty() {
            let mut next = self.take_buffer().await;
            next[..held_back.len()].copy_from_slice(&held_back);
            self.filled = held_back.len();
            self.buffer = Some(next);
        }
    }
}

/// A buffer of full length.
fn whole(mut buffer: Chunk) -> Chunk {
    let resized = buffer.resize(CHUNK_BYTES_MAX, 0);
    debug_assert!(resized.is_ok(), "the length is the capacity");
    buffer
}
