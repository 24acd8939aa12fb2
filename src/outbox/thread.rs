//! The storage thread: takes commands in order and commits what it found together.

use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};

use super::engine::{Engine, answer};
use super::handle::Command;
use super::opening::Reopening;
use super::types::*;
use crate::limits::{STORAGE_QUEUE, STORE_REOPEN_INTERVAL};

pub(super) struct Storage {
    pub engine: Engine,
    pub commands: Receiver<Command>,
    pub appended: Sender<()>,
    /// Set while the store is in memory.
    pub volatile: Option<Volatile>,
    /// The store has just moved: cursors are of the other one, and nothing is read from here until
    /// a hello has been told.
    pub moved: bool,
}

/// Commands that are handled together.
pub(super) type Batch = heapless::Vec<Command, STORAGE_QUEUE>;

/// Why the store is in memory, and how it may leave it.
pub(super) struct Volatile {
    /// `None`: it was chosen.
    pub reason: Option<String>,
    pub reopening: Option<Reopening>,
}

impl Storage {
    /// Runs until the store is closed or the last handle is gone.
    pub fn run(mut self) {
        let mut next_reopen = Instant::now() + STORE_REOPEN_INTERVAL;
        loop {
            let reopens = self
                .volatile
                .as_ref()
                .is_some_and(|v| v.reopening.is_some());
            let wait = reopens.then(|| next_reopen.saturating_duration_since(Instant::now()));
            match next_command(&self.commands, wait) {
                Next::Command(command) => {
                    if let Some(closing) = self.turn(command) {
                        self.close();
                        // Who waits may open the folder again at once.
                        drop(self);
                        answer(closing, ());
                        return;
                    }
                }
                Next::Nothing => {}
                Next::Gone => return self.close(),
            }
            if reopens && Instant::now() >= next_reopen {
                self.try_to_leave_memory();
                next_reopen = Instant::now() + STORE_REOPEN_INTERVAL;
            }
        }
    }

    /// Handles a command and those that wait behind it, at most a queue's length, then commits.
    pub(super) fn turn(&mut self, first: Command) -> Option<Sender<()>> {
        let waiting = std::iter::from_fn(|| self.commands.try_recv().ok());
        let batch: Batch = std::iter::once(first)
            .chain(waiting)
            .take(STORAGE_QUEUE)
            .collect();
        self.carry_out(batch)
    }

    /// Handles commands and commits what they have staged together.
    pub fn carry_out(&mut self, batch: Batch) -> Option<Sender<()>> {
        let mut closing = None;
        for command in batch {
            match command {
                Command::Close(reply) => closing = Some(reply),
                other => self.handle(other),
            }
        }
        self.engine.commit_and_tell(Some(&self.appended));
        if std::mem::take(&mut self.engine.news) {
            // If a signal waits already, this news is covered by it.
            let _ = self.appended.try_send(());
        }
        closing
    }

    fn handle(&mut self, command: Command) {
        let engine = &mut self.engine;
        match command {
            Command::Receive(receipt, reply) => engine.receive(*receipt, reply),
            Command::LoadTask(key, reply) => answer(reply, engine.load_task(key)),
            Command::Start(key, at_ms, reply) => engine.start(key, at_ms, reply),
            Command::Append {
                key,
                stream,
                first_sequence,
                batch,
                reply,
            } => engine.append(key, stream, first_sequence, batch, reply),
            Command::Finish(key, fin, is_reported, reply) => {
                engine.finish(key, fin, is_reported, Some(reply));
            }
            Command::Reported(key, reply) => engine.final_done(key, false, reply),
            Command::DropFinal(key, reply) => engine.final_done(key, true, reply),
            Command::Discard(key, reply) => engine.discard(key, reply),
            Command::GiveUpStream(key, stream, reply) => engine.give_up_stream(key, stream, reply),
            Command::Reject(key, piece, reply) => engine.reject(key, piece, reply),
            Command::Acknowledge(acks) => {
                for ack in *acks {
                    engine.acknowledge(ack);
                }
            }
            Command::Read(request, reply) if self.moved => answer(reply, request.nothing()),
            Command::Read(request, reply) => answer(reply, engine.read(*request)),
            Command::Rewind(.., reply) if self.moved => answer(reply, None),
            Command::Rewind(key, stream, from, reply) => {
                answer(reply, engine.rewind(key, stream, from));
            }
            Command::FinalOf(key, reply) => answer(reply, engine.final_of(key)),
            Command::PhaseOf(key, reply) => {
                answer(reply, engine.phase_anywhere(key).ok().flatten())
            }
            Command::FinalsWaiting(max, reply) => answer(reply, engine.finals_waiting(max)),
            Command::Snapshot(budget, reply) => {
                self.moved = false;
                let mut snapshot = engine.snapshot(budget);
                self.say_volatile(&mut snapshot.counts);
                answer(reply, snapshot);
            }
            Command::Counts(reply) => {
                let mut counts = engine.counts();
                self.say_volatile(&mut counts);
                answer(reply, counts);
            }
            Command::Close(reply) => answer(reply, ()),
        }
    }

    fn say_volatile(&self, counts: &mut Counts) {
        if let Some(volatile) = &self.volatile {
            counts.volatile = true;
            counts.volatile_reason = volatile.reason.clone();
        }
    }

    /// Tries the disk again.
    pub(super) fn try_to_leave_memory(&mut self) {
        let Some(volatile) = &mut self.volatile else {
            return;
        };
        let Some(reopening) = &mut volatile.reopening else {
            return;
        };
        match reopening.try_disk(&mut self.engine) {
            Ok(engine) => {
                self.engine = engine;
                self.volatile = None;
                self.moved = true;
            }
            Err(why) => volatile.reason = Some(why),
        }
    }

    pub fn close(&mut self) {
        // The last chance of what is in memory alone.
        self.try_to_leave_memory();
        let mut counts = self.engine.counts();
        self.say_volatile(&mut counts);
        if let Err(why) = self.engine.close(&counts) {
            log::warn!("the outbox was not closed cleanly: {why}; the next start reads all of it");
        }
    }
}

enum Next {
    Command(Command),
    Nothing,
    Gone,
}

fn next_command(commands: &Receiver<Command>, wait: Option<Duration>) -> Next {
    let Some(wait) = wait else {
        return commands.recv_blocking().map_or(Next::Gone, Next::Command);
    };
    let timeout = async {
        smol::Timer::after(wait).await;
        Next::Nothing
    };
    let command = async { commands.recv().await.map_or(Next::Gone, Next::Command) };
    smol::block_on(smol::future::or(command, timeout))
}
