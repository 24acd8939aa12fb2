//! The protocol as a state machine without I/O.
//!
//! One mutation in (a method of [`Session`] with `now`), then drain [`Session::next_effect`], then
//! wait until [`Session::next_deadline`] or for the next thing that happens. There is no clock, no
//! socket, no disk and no randomness in here, so that every order of events can be tested.
//!
//! - [`delivery`]: the cursor, the window, acknowledgements, gaps and repeats.
//! - [`reports`] and [`polling`]: what goes by HTTP when the WebSocket cannot.
//! - [`tasks`]: what waits and what runs.
//! - [`hello`], [`backoff`], [`failures`], [`window`]: their parts.
//! - [`connection`]: one connection from its dial to its end.
//! - [`incoming`]: what the server says; [`offers`]: tasks from their offer to their end;
//!   [`answers`]: what a repeated offer is to be answered with later.

mod answers;
pub mod backoff;
mod connection;
pub mod delivery;
pub mod failures;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod hello;
mod incoming;
mod offers;
pub mod polling;
pub mod reports;
pub mod tasks;
#[cfg(test)]
mod tests;
pub mod window;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};

use self::answers::Answers;
use self::backoff::{Backoff, Random};
use self::connection::Link;
use self::delivery::{Action, Admission, Candidate, Delivery, ReadOrder};
use self::failures::Failures;
use self::polling::{Gate, Repeating};
use self::reports::{Channel, ReportResult, Reports, WaitingFinal};
use self::tasks::{QueuedTask, Tasks};
use crate::ids::{AttemptKey, Ids, Incarnation, Stream};
use crate::limits::WINDOW_MESSAGES;
use crate::wire::{Hello, Piece, TaskOffer};

pub use self::connection::LinkState;

/// Time since the agent started, on a monotonic clock that counts suspend.
pub type Now = Duration;

/// Extensions that the agent offers (PROTOCOL.md 5).
pub const EXTENSIONS: [&str; 4] = ["binary_output", "cancel", "lease", "usage"];

/// What the session needs to know of the settings.
#[derive(Debug, Clone)]
pub struct Settings {
    pub agent_id: String,
    /// `HOSTLINK_WS_ENABLED`: without it everything goes by HTTP.
    pub websocket: bool,
    pub results: bool,
    pub delivery: bool,
    pub reconnect_min: Duration,
    pub reconnect_max: Duration,
    pub ping_interval: Duration,
    pub fallback_threshold: Duration,
    pub poll_interval: Duration,
    /// Zero: no heartbeats.
    pub heartbeat_interval: Duration,
    pub concurrency: usize,
}

/// An acknowledgement for the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// This chunk, and all before it if `cumulative`.
    Output {
        key: AttemptKey,
        stream: Stream,
        sequence: u64,
        cumulative: bool,
    },
    Final {
        key: AttemptKey,
    },
}

pub type Acks = heapless::Vec<Ack, WINDOW_MESSAGES>;

/// How the outbox answered a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    New,
    /// Waits for its start.
    Received,
    Started,
    /// Ended; its final is still unacknowledged if `held`.
    Finished {
        held: bool,
    },
    Discarded,
    /// Nothing was recorded.
    NoRoom,
}

/// What has to be remembered of an offer until it is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// By `task.deliver`: it wants an answer also if the attempt is known.
    pub delivered: bool,
    pub command_bytes: usize,
}

/// What the session wants done. Each is to be carried out in order.
#[derive(Debug)]
pub enum Effect<C> {
    /// Open a WebSocket; answer with [`Session::connected`] or [`Session::dial_failed`].
    Dial,
    /// End the connection, or the dialling. Nothing of it may reach the session afterwards.
    Close,
    Ping,
    /// Read a snapshot of the store; answer with [`Session::hello_ready`].
    PrepareHello,
    SendHello {
        hello: Box<Hello>,
        message_id: String,
    },
    SendReceived(Arc<Ids>),
    SendStarted(Arc<Ids>),
    /// Answer a repeated delivery of an attempt that ended, under the final's own id. One that is
    /// in flight goes behind all that was admitted before; one that is done waits while output of
    /// its attempt is not acknowledged. Answer with [`Session::answered`].
    SendFinalAgain(Arc<Ids>),
    SendLease(Arc<Ids>, String),
    /// Read the outbox; answer with [`Session::batch_read`].
    Read(ReadOrder<C>),
    /// Find a chunk; answer with [`Session::located`].
    Locate {
        key: AttemptKey,
        stream: Stream,
        from: u64,
    },
    Acknowledge(Box<Acks>),
    /// The server will never take this message.
    Reject {
        key: AttemptKey,
        piece: Piece,
    },
    /// The server will never take this stream.
    GiveUpStream {
        key: AttemptKey,
        stream: Stream,
    },
    /// This and the two before it are answered with [`Session::settled`]: until then nothing is
    /// read, so that nothing goes out that has just been dropped.
    Discard(AttemptKey),
    /// Record a task durably; answer with [`Session::recorded`].
    Record {
        offer: Box<TaskOffer>,
        origin: Origin,
    },
    /// Start a recorded task; answer with [`Session::task_started`], [`Session::task_ended`].
    Start(QueuedTask),
    /// End a running task with this reason.
    Stop {
        key: AttemptKey,
        reason: String,
    },
    /// End an attempt that never ran; answer with [`Session::final_stored`].
    Interrupt {
        ids: Arc<Ids>,
        reason: String,
    },
    /// List the unacknowledged finals; answer with [`Session::finals_listed`].
    ListFinals,
    /// Report a final by HTTP; answer with [`Session::reported`].
    Report(Arc<Ids>),
    /// No way is left for this final.
    DropFinal(AttemptKey),
    /// Poll for tasks; answer with [`Session::offered`] and [`Session::polled`].
    Poll,
    /// Send a heartbeat; answer with [`Session::offered`] and [`Session::heartbeat_done`].
    Heartbeat,
}

/// Extensions that change how messages are written (PROTOCOL.md 5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Granted {
    pub binary_output: bool,
    pub usage: bool,
}

#[derive(Debug)]
pub struct Session<C> {
    settings: Settings,
    /// Of the store: part of all message ids.
    incarnation: String,
    /// Other stores, whose messages have moved into this one.
    inherited: Vec<Incarnation>,
    /// Makes the ids of messages that are not stored unique for ever.
    boot_nonce: u64,
    messages_made: u64,
    random: Random,
    link: Link,
    backoff: Backoff,
    down_since: Now,
    granted: Granted,
    cancel_granted: bool,
    lease: Option<Lease>,
    delivery: Delivery<C>,
    failures: Failures,
    reports: Reports,
    gate: Gate,
    poll: Repeating,
    heartbeat: Repeating,
    tasks: Tasks,
    answers: Answers,
    /// A task was refused for want of room, and when.
    room_wanted: Option<Now>,
    /// The poll under way is for such a task.
    polls_for_refused: bool,
    acks: Acks,
    effects: VecDeque<Effect<C>>,
    last_error: Option<String>,
}

#[derive(Debug)]
struct Lease {
    interval: Duration,
    next_at: Now,
}

impl<C: Copy + Ord + Default> Session<C> {
    /// `seed` feeds jitter and names; it must differ from start to start.
    pub fn new(settings: Settings, incarnation: String, seed: u64, now: Now) -> Session<C> {
        let mut random = Random::new(seed);
        let boot_nonce = random.next_u64();
        let link = if settings.websocket {
            Link::Down {
                dial_at: now + random.up_to(settings.reconnect_min),
                is_told: false,
            }
        } else {
            Link::Off
        };
        Session {
            incarnation,
            inherited: Vec::new(),
            boot_nonce,
            messages_made: 0,
            link,
            backoff: Backoff::new(settings.reconnect_min, settings.reconnect_max),
            down_since: now,
            granted: Granted::default(),
            cancel_granted: false,
            lease: None,
            delivery: Delivery::default(),
            failures: Failures::default(),
            reports: Reports::default(),
            gate: Gate::new(settings.fallback_threshold),
            poll: Repeating::new(settings.poll_interval),
            heartbeat: Repeating::new(settings.heartbeat_interval),
            tasks: Tasks::new(settings.concurrency),
            answers: Answers::default(),
            room_wanted: None,
            polls_for_refused: false,
            acks: Acks::new(),
            effects: VecDeque::new(),
            last_error: None,
            random,
            settings,
        }
    }

    /// The next thing to do. `now` decides what is due.
    pub fn next_effect(&mut self, now: Now) -> Option<Effect<C>> {
        if let Some(effect) = self.effects.pop_front() {
            return Some(effect);
        }
        if !self.acks.is_empty() {
            return Some(Effect::Acknowledge(Box::new(std::mem::take(
                &mut self.acks,
            ))));
        }
        // Behind the acknowledgements: the store knows them when it is asked.
        if let Some(ids) = self.answers.next() {
            return Some(Effect::SendFinalAgain(ids));
        }
        self.on_time(now);
        if let Some(effect) = self.effects.pop_front() {
            return Some(effect);
        }
        if let Some(task) = self.tasks.start_next() {
            return Some(Effect::Start(task));
        }
        if self.reports.want_list(self.channel(now), now) {
            return Some(Effect::ListFinals);
        }
        if (self.gate.is_open(now) || self.room_has_returned(now)) && self.poll.due(now) {
            self.polls_for_refused = self.room_wanted.take().is_some();
            return Some(Effect::Poll);
        }
        if self.heartbeat.due(now) {
            return Some(Effect::Heartbeat);
        }
        if self.link.is_active() && self.settings.results {
            return self.delivery.next_read(now).map(Effect::Read);
        }
        None
    }

    /// When [`Session::next_effect`] has to be asked again at the latest.
    pub fn next_deadline(&self, now: Now) -> Option<Now> {
        let active = self.link.is_active();
        let poll_at = self.poll.next_deadline().and_then(|due| {
            let room = self.room_wanted.filter(|_| self.tasks.has_room());
            let opens = self.gate.opens_at().into_iter().chain(room).min()?;
            Some(due.max(opens))
        });
        [
            self.link.next_deadline(&self.settings),
            self.lease
                .as_ref()
                .filter(|_| active)
                .map(|lease| lease.next_at),
            self.delivery.next_deadline().filter(|_| active),
            self.reports.next_deadline(now),
            poll_at,
            self.heartbeat.next_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn on_time(&mut self, now: Now) {
        self.advance_link(now);
        if !self.link.is_active() {
            return;
        }
        self.delivery.on_time(&mut self.failures, now);
        let mut expired = None;
        while let Some(action) = self.delivery.next_action() {
            match action {
                Action::Locate { key, stream, from } => {
                    self.effects.push_back(Effect::Locate { key, stream, from });
                }
                Action::GiveUp { key, stream } => self.give_up_stream(key, stream),
                Action::Expired(lane) => {
                    expired = Some(lane);
                    if self.failures.stalled(lane) {
                        self.failures.clear(lane);
                        match lane.stream {
                            Some(stream) => self.give_up_stream(lane.key, stream),
                            None => self.reports.force(lane.key),
                        }
                    }
                }
            }
        }
        if let Some(lane) = expired {
            let what = lane.stream.map_or("a final", Stream::as_str);
            self.close(
                &format!(
                    "no acknowledgement of {what} of attempt {} after a repeat",
                    lane.key
                ),
                None,
                now,
            );
        }
        if let Some(lease) = &mut self.lease
            && now >= lease.next_at
        {
            lease.next_at = now + lease.interval;
            for index in 0..self.tasks.running().len() {
                let task = &self.tasks.running()[index];
                if task.started_at.is_some() && task.ids.has_result_channel() {
                    let ids = task.ids.clone();
                    let message_id = self.make_message_id("lease");
                    self.effects.push_back(Effect::SendLease(ids, message_id));
                }
            }
        }
    }

    fn give_up_stream(&mut self, key: AttemptKey, stream: Stream) {
        warn!(
            "the server does not take {} of attempt {key}: what is held of it is dropped and marked truncated",
            stream.as_str()
        );
        self.delivery.hold();
        self.effects.push_back(Effect::GiveUpStream { key, stream });
    }

    // ---- the store ----------------------------------------------------------------------------

    /// Something new to send was stored.
    pub fn appended(&mut self) {
        self.delivery.appended();
    }

    /// Answer to [`Effect::Read`]: what of it is to be sent. If anything is, tell when it has been
    /// written: [`Session::transmitted`].
    pub fn batch_read(
        &mut self,
        candidates: impl Iterator<Item = Candidate<C>>,
        next: C,
        at_end: bool,
        now: Now,
    ) -> Admission {
        self.delivery.admit(candidates, next, at_end, now)
    }

    /// Where the last batch was left, if there was no room for the rest of it. That is read next, unless
    /// something comes between.
    pub fn stopped_at(&self) -> Option<C> {
        self.delivery.stopped_at()
    }

    /// A batch of this connection has gone to the socket.
    pub fn transmitted(&mut self) {
        self.delivery.transmitted();
    }

    /// Answer to [`Effect::Locate`].
    pub fn located(&mut self, key: AttemptKey, stream: Stream, from: u64, at: Option<C>, now: Now) {
        self.delivery.located(key, stream, from, at, now);
    }

    /// Something has been dropped from the store; or could not be, and then it is sent once more:
    /// the server will say the same again.
    pub fn settled(&mut self, is_dropped: bool) {
        self.delivery.release(is_dropped);
        self.answers.dropped();
    }

    /// A final was stored.
    pub fn final_stored(&mut self) {
        self.delivery.appended();
        self.reports.look_again();
    }

    /// The snapshot for the hello has messages that were born in these stores: their ids are ours.
    pub fn inherits(&mut self, stores: Vec<Incarnation>) {
        self.inherited = stores;
    }

    /// A volatile store was left for the disk: cursors are void, so the session begins anew.
    pub fn store_changed(&mut self, incarnation: String, now: Now) {
        self.incarnation = incarnation;
        self.close("the store has moved back to the disk", None, now);
    }

    // ---- reports and polls --------------------------------------------------------------------

    fn channel(&self, now: Now) -> Channel {
        if !self.settings.websocket || !self.settings.results {
            return Channel::Closed;
        }
        if self.link.is_active() {
            return Channel::Open;
        }
        let until = self.down_since + self.settings.fallback_threshold;
        if now >= until {
            Channel::Closed
        } else {
            Channel::Interrupted { until }
        }
    }

    /// Answer to [`Effect::ListFinals`], oldest first.
    pub fn finals_listed(&mut self, waiting: &[WaitingFinal]) {
        if let Some(ids) = self.reports.choose(waiting) {
            self.delivery.withhold(Some(ids.key()));
            self.effects.push_back(Effect::Report(ids));
        }
    }

    /// Answer to [`Effect::Report`]. After [`ReportResult::Done`] the outbox must already know.
    pub fn reported(&mut self, ids: &Ids, result: &ReportResult, now: Now) {
        match result {
            ReportResult::Done => info!("task {ids}: result reported over HTTP"),
            ReportResult::Refused { why } => {
                warn!("task {ids}: the server refuses the report of its result: {why}");
            }
            ReportResult::Retry { why, .. } => {
                warn!("task {ids}: its result could not be reported, trying again: {why}");
            }
            ReportResult::Gone => {}
        }
        if self.reports.finished(ids, result, &mut self.random, now) {
            self.effects.push_back(Effect::DropFinal(ids.key()));
        }
        self.delivery.withhold(None);
    }

    /// A poll has ended; `failed` carries the server's `Retry-After`, if it named one.
    pub fn polled(&mut self, failed: Option<Option<Duration>>, now: Now) {
        if failed.is_some() && self.polls_for_refused {
            self.room_wanted.get_or_insert(now);
        }
        self.poll.finished(failed, &mut self.random, now);
    }

    pub fn heartbeat_done(&mut self, failed: Option<Option<Duration>>, now: Now) {
        self.heartbeat.finished(failed, &mut self.random, now);
    }

    fn room_has_returned(&self, now: Now) -> bool {
        self.tasks.has_room() && self.room_wanted.is_some_and(|at| at <= now)
    }

    // ---- what status and logs show ------------------------------------------------------------

    pub fn link_state(&self) -> LinkState {
        self.link.state()
    }

    /// Since when the link is in its state.
    pub fn link_since(&self) -> Now {
        self.link.since().unwrap_or(self.down_since)
    }

    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    pub fn is_polling(&self, now: Now) -> bool {
        self.gate.is_open(now)
    }

    /// What is granted in this session.
    pub fn granted(&self) -> Granted {
        self.granted
    }

    /// Messages and bytes sent and not yet acknowledged.
    pub fn in_flight(&self) -> (usize, usize) {
        self.delivery.in_flight()
    }

    fn make_message_id(&mut self, kind: &str) -> String {
        self.messages_made += 1;
        format!(
            "{}-{kind}-{:016x}-{}",
            self.incarnation, self.boot_nonce, self.messages_made
        )
    }
}
