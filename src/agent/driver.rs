//! The one loop that owns the session: takes what has happened, lets the session decide, carries
//! out what it wants, waits.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_channel::{Receiver, Sender, TrySendError};
use async_tungstenite::tungstenite::Utf8Bytes;
use futures_lite::{FutureExt, future};
use log::{debug, info, warn};

use super::connection::{Connection, OutBatch, ToSend};
use super::effects::{self, RunningStops};
use super::in_hand::{InHand, Rest, Skip};
use super::status::Status;
use super::{Context, frames};
use crate::executor::Stop;
use crate::ids::{AttemptKey, Ids, Incarnation, Stream};
use crate::limits::{BATCH_BUFFER_BYTES, BATCHES_IN_WRITER, STOP_GIVE_UP, TASK_QUEUE_MAX};
use crate::net::NetError;
use crate::outbox::{self, Cursor, Recovered, Snapshot};
use crate::session::reports::{ReportResult, WaitingFinal};
use crate::session::tasks::QueuedTask;
use crate::session::{Granted, LinkState, Now, Origin, Recorded, Session};
use crate::wire::{ServerMessage, TaskOffer};

/// Inputs that are taken in one turn before effects are carried out and others get a chance.
const INPUTS_PER_TURN: usize = 32;

/// Something that has happened. Those of a connection carry its number.
pub enum Input {
    DialFailed(u64, NetError),
    Connected(u64),
    Frame(u64, Utf8Bytes),
    Heard(u64),
    Disconnected(u64, String),
    Snapshot(u64, Box<Snapshot>),
    /// A batch has been handed to the socket; its buffers come back.
    Transmitted(u64, Rc<outbox::Batch>),
    Batch(Box<outbox::Batch>, Skip),
    /// The place of the first chunk held of a stream from a sequence on.
    Located(AttemptKey, Stream, u64, Option<Cursor>),
    Offered(Box<TaskOffer>),
    Recorded(QueuedTask, Recorded, Origin),
    /// Everything that was told before has been dealt with.
    Passed(Sender<()>),
    /// Something was dropped from the store, or could not be.
    Settled(bool),
    TaskStarted(AttemptKey),
    TaskEnded(AttemptKey),
    FinalStored,
    /// A final that answers a repeated delivery over this connection has gone out, or waits.
    Answered {
        connection: u64,
        ids: Arc<Ids>,
        waits: bool,
    },
    /// Whether it, or a part of it, was gone before.
    NetworkReturned(bool),
    Finals(Vec<WaitingFinal>),
    Reported(Arc<Ids>, ReportResult),
    Polled(Option<Option<Duration>>),
    HeartbeatDone(Option<Option<Duration>>),
    HttpFailed(String),
    /// A volatile store has been left for the disk.
    Reopened(Recovered),
    /// Somebody asks for the status.
    Status(Sender<Status>),
    /// TERM or INT.
    Terminate,
}

/// Waits until the driver has dealt with everything that was told before. False if it has ended.
pub async fn has_caught_up(driver: &Sender<Input>) -> bool {
    let (passed, has_passed) = async_channel::bounded(1);
    let _ = driver.send(Input::Passed(passed)).await;
    has_passed.recv().await.is_ok()
}

pub struct Driver {
    pub(super) context: Rc<Context>,
    session: Box<Session<Cursor>>,
    begun: Duration,
    pub(super) incarnation: Incarnation,
    pub(super) connection: Option<Connection>,
    pub(super) connections_made: u64,
    pub(super) running: RunningStops,
    /// To be recorded, in this order.
    pub(super) offers: Sender<(Box<TaskOffer>, Origin)>,
    pub(super) in_hand: InHand,
    pub(super) spare_buffers: Vec<(Vec<u8>, Vec<outbox::Message>)>,
    stopping: Option<Stopping>,
    last_http_error: Option<String>,
}

/// How far an orderly stop has come.
enum Stopping {
    /// Running tasks may still end by themselves.
    Waiting { until: Now },
    /// They have been told to end, and are waited for until then.
    Told { until: Now },
}

impl Driver {
    pub fn new(context: Rc<Context>, session: Box<Session<Cursor>>, begun: Duration) -> Driver {
        let (offers, offered) = async_channel::bounded(TASK_QUEUE_MAX);
        context
            .clone()
            .spawn(effects::record_offers(context.clone(), offered));
        Driver {
            offers,
            incarnation: context.outbox.incarnation(),
            context,
            session,
            begun,
            connection: None,
            connections_made: 0,
            running: RunningStops::new(),
            in_hand: InHand::default(),
            spare_buffers: Vec::with_capacity(BATCHES_IN_WRITER + 1),
            stopping: None,
            last_http_error: None,
        }
    }

    pub(super) fn granted(&self) -> Granted {
        self.session.granted()
    }

    fn now(&self) -> Now {
        self.context.clock.now().saturating_sub(self.begun)
    }

    /// Runs until an orderly stop is complete.
    pub async fn run(mut self, inputs: Receiver<Input>) {
        self.context.notifier.serving();
        let appended = self.context.outbox.appended();
        loop {
            let now = self.now();
            while let Some(effect) = self.session.next_effect(now) {
                #[cfg(test)]
                if let Some(outside) = &self.context.simulated {
                    outside.does(&effect);
                }
                self.carry_out(effect).await;
            }
            #[cfg(test)]
            if let Some(outside) = &self.context.simulated {
                outside.look_at(&self.session, now);
            }
            let active = self.session.link_state() == LinkState::Active;
            if self.context.watched.replace(active) != active {
                self.notify(active);
            }
            if self.stop_is_complete(now) {
                break;
            }
            self.context.api.close_idle();
            self.wait(&inputs, &appended).await;
            for _ in 0..INPUTS_PER_TURN {
                match inputs.try_recv() {
                    Ok(input) => self.take(input),
                    Err(_) => break,
                }
            }
            future::yield_now().await;
        }
        if let Some(connection) = self.connection.take() {
            connection.close(&self.context.clock).await;
        }
    }

    /// Waits for an input, for news of the store or for the next deadline.
    async fn wait(&mut self, inputs: &Receiver<Input>, appended: &Receiver<()>) {
        enum Woken {
            Input(Input),
            Appended,
            Deadline,
        }
        let now = self.now();
        let stop_at = match self.stopping {
            Some(Stopping::Waiting { until } | Stopping::Told { until }) => Some(until),
            None => None,
        };
        let deadline = self
            .session
            .next_deadline(now)
            .into_iter()
            .chain(stop_at)
            .min();
        let input = async {
            match inputs.recv().await {
                Ok(input) => Woken::Input(input),
                Err(_) => future::pending().await,
            }
        };
        let news = async {
            match appended.recv().await {
                Ok(()) => Woken::Appended,
                Err(_) => future::pending().await,
            }
        };
        let timer = async {
            match deadline {
                Some(at) => self.context.clock.sleep(at.saturating_sub(now)).await,
                None => future::pending().await,
            };
            Woken::Deadline
        };
        match input.or(news).or(timer).await {
            Woken::Input(input) => self.take(input),
            Woken::Appended => self.session.appended(),
            Woken::Deadline => {}
        }
    }

    fn take(&mut self, input: Input) {
        let now = self.now();
        match input {
            Input::DialFailed(id, error) if self.is_current(id) => {
                self.connection = None;
                self.context.clock_floor.doubt(&error.why);
                self.session.dial_failed(&error.why, error.retry_after, now);
            }
            Input::Connected(id) if self.is_current(id) => self.session.connected(now),
            Input::Frame(id, frame) if self.is_current(id) => {
                let message = ServerMessage::decode(&frame, &self.context.agent_id);
                self.session.received(message, now);
                #[cfg(test)]
                if let Some(outside) = &self.context.simulated {
                    outside.heard(&frame, &self.session);
                }
            }
            Input::Heard(id) if self.is_current(id) => self.session.heard(now),
            Input::Disconnected(id, why) if self.is_current(id) => self.disconnected(&why),
            Input::Snapshot(id, snapshot) if self.is_current(id) => {
                self.session.inherits(snapshot.inherited.clone());
                let (hello, first_held) = frames::hello(*snapshot);
                self.session.hello_ready(hello, first_held);
            }
            Input::Transmitted(id, batch) => {
                self.keep_buffers(batch);
                if self.is_current(id) {
                    self.session.transmitted();
                }
            }
            Input::Answered {
                connection,
                ids,
                waits,
            } if self.is_current(connection) => self.session.answered(&ids, waits),
            // Of a connection that has ended.
            Input::DialFailed(..)
            | Input::Connected(_)
            | Input::Frame(..)
            | Input::Heard(_)
            | Input::Disconnected(..)
            | Input::Snapshot(..)
            | Input::Answered { .. } => {}
            Input::Batch(batch, skip) => {
                let (batch, first) = (Rc::new(*batch), 0);
                let at_end = batch.at_end;
                let context = &self.context;
                context.pace.read(batch.behind_bytes, &context.clock);
                self.take_batch(Rest { batch, first, skip }, at_end);
            }
            Input::Located(key, stream, from, at) => {
                self.session.located(key, stream, from, at, now);
            }
            Input::Offered(offer) => self.session.offered(*offer, false, now),
            Input::Recorded(task, outcome, origin) => {
                self.session.recorded(task, outcome, origin, now);
            }
            // Whoever waits may be gone already.
            Input::Passed(tell) => drop(tell.try_send(())),
            Input::Settled(is_dropped) => {
                #[cfg(test)]
                if let Some(outside) = &self.context.simulated {
                    outside.settled(is_dropped);
                }
                self.session.settled(is_dropped);
            }
            Input::TaskStarted(key) => self.session.task_started(key, now),
            Input::TaskEnded(key) => {
                self.running.remove(&key);
                self.session.task_ended(key);
            }
            Input::FinalStored => self.session.final_stored(),
            Input::NetworkReturned(was_gone) => self.session.network_returned(was_gone, now),
            Input::Finals(waiting) => self.session.finals_listed(&waiting),
            Input::Reported(ids, result) => {
                // It is done, and goes nowhere else.
                self.in_hand.void();
                self.session.reported(&ids, &result, now);
            }
            Input::Polled(failed) => {
                self.forget_http_error(failed.is_none());
                self.session.polled(failed, now);
            }
            Input::HeartbeatDone(failed) => {
                self.forget_http_error(failed.is_none());
                self.session.heartbeat_done(failed, now);
            }
            Input::HttpFailed(why) => {
                self.context.clock_floor.doubt(&why);
                // The same trouble is told once.
                if self.last_http_error.as_deref() == Some(why.as_str()) {
                    debug!("{why}");
                } else {
                    warn!("{why}");
                    self.last_http_error = Some(why);
                }
            }
            Input::Reopened(recovered) => self.reopened(recovered, now),
            Input::Status(reply) => {
                // Whoever asked may be gone already.
                let _ = reply.try_send(self.status(now));
            }
            Input::Terminate => self.terminate(now),
        }
    }

    /// After a success, the same trouble is told again.
    fn forget_http_error(&mut self, success: bool) {
        if success {
            self.last_http_error = None;
        }
    }

    fn is_current(&self, id: u64) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|connection| connection.id == id)
    }

    pub(super) fn disconnected(&mut self, why: &str) {
        self.connection = None;
        self.in_hand.void();
        let now = self.now();
        self.session.disconnected(why, now);
    }

    /// Offers to the session what it wanted to read. `at_end`: nothing waits behind it.
    pub(super) fn take_batch(&mut self, rest: Rest, at_end: bool) {
        let now = self.now();
        let Rest { batch, first, skip } = rest;
        let candidates = batch.messages[first..].iter().map(frames::candidate);
        let admission = self.session.batch_read(candidates, batch.next, at_end, now);
        if let Some(from) = self.session.stopped_at() {
            self.in_hand.keep(&batch, from, skip);
        }
        if admission.is_empty() {
            self.keep_buffers(batch);
            return;
        }
        #[cfg(test)]
        if let Some(outside) = &self.context.simulated {
            for admitted in &admission {
                outside.sends(&frames::candidate(&batch.messages[first + admitted.index]));
            }
        }
        let out = OutBatch {
            batch,
            first,
            admission,
            granted: self.granted(),
        };
        if let Some(connection) = &self.connection {
            let sent = connection.to_send.try_send(ToSend::Batch(out));
            debug_assert!(
                !matches!(sent, Err(TrySendError::Full(_))),
                "the session counts the batches in the writer"
            );
        }
    }

    /// Offers what was left of a batch, the first of which is at this place.
    pub(super) fn take_in_hand(&mut self, rest: Rest, from: Cursor) {
        // More may wait behind it by now.
        self.take_batch(rest, false);
        if self.session.stopped_at() == Some(from) {
            // Not for want of room in the window: without the store's answer to wait for, the session
            // would ask for it again and again, and nothing else would be taken in.
            self.in_hand.void();
        }
    }

    /// Buffers are used again, unless a rare large message has blown them up.
    fn keep_buffers(&mut self, batch: Rc<outbox::Batch>) {
        let Some(outbox::Batch {
            mut messages,
            mut buffer,
            ..
        }) = Rc::into_inner(batch)
        else {
            // The rest of it is in hand.
            return;
        };
        if self.spare_buffers.len() <= BATCHES_IN_WRITER {
            messages.clear();
            buffer.clear();
            if buffer.capacity() > BATCH_BUFFER_BYTES {
                buffer = Vec::new();
            }
            self.spare_buffers.push((buffer, messages));
        }
    }

    fn reopened(&mut self, recovered: Recovered, now: Now) {
        self.in_hand.void();
        self.incarnation = self.context.outbox.incarnation();
        self.session
            .store_changed(self.incarnation.to_string(), now);
        self.session.recovered(queued_tasks(recovered));
    }

    // ---- the orderly stop ---------------------------------------------------------------------

    fn terminate(&mut self, now: Now) {
        match self.stopping {
            None => {
                self.session.stop_taking_tasks();
                self.context.stopping.set(true);
                let grace = self.context.config.task_kill_grace;
                match self.running.len() {
                    0 => info!("stopping"),
                    running => info!(
                        "stopping; {running} running tasks may end within {} s",
                        grace.as_secs_f32()
                    ),
                }
                self.stopping = Some(Stopping::Waiting { until: now + grace });
            }
            Some(Stopping::Waiting { .. }) => self.end_running_tasks(now),
            Some(Stopping::Told { .. }) => {}
        }
    }

    fn end_running_tasks(&mut self, now: Now) {
        let until = now + self.context.config.task_kill_grace + STOP_GIVE_UP;
        self.stopping = Some(Stopping::Told { until });
        for stop in self.running.values() {
            let reason = "interrupted: the agent was stopped".to_owned();
            // A task that is already being ended keeps its reason.
            let _ = stop.try_send(Stop { reason });
        }
    }

    fn stop_is_complete(&mut self, now: Now) -> bool {
        match self.stopping {
            None => false,
            Some(_) if self.running.is_empty() => true,
            Some(Stopping::Waiting { until }) => {
                if now >= until {
                    self.end_running_tasks(now);
                }
                false
            }
            Some(Stopping::Told { until }) => {
                let given_up = now >= until;
                if given_up {
                    warn!(
                        "{} tasks have not come to an end, the outbox does not take it; the next start records them as interrupted",
                        self.running.len()
                    );
                }
                given_up
            }
        }
    }

    fn notify(&self, active: bool) {
        let notifier = &self.context.notifier;
        match active {
            true => notifier.connected(),
            false => {
                notifier.disconnected(self.session.last_error().unwrap_or("the session ended"))
            }
        }
    }

    fn status(&self, now: Now) -> Status {
        let since = now.saturating_sub(self.session.link_since());
        let session = match self.session.link_state() {
            LinkState::Off => "off",
            LinkState::Down => "down",
            LinkState::Connecting => "connecting",
            LinkState::Handshake => "handshake",
            LinkState::Active => "active",
        };
        let tasks = self.session.tasks();
        Status {
            agent_id: Some(self.context.agent_id.clone()),
            session_since_seconds: since.as_secs(),
            last_error: self.session.last_error().map(str::to_owned),
            running: tasks
                .running()
                .iter()
                .map(|task| task.ids.to_string())
                .collect(),
            queued: tasks.queued(),
            polling: self.session.is_polling(now),
            ..Status::of_this_process(session)
        }
    }
}

/// What recovery found waiting, as the session wants it.
pub fn queued_tasks(recovered: Recovered) -> impl Iterator<Item = QueuedTask> {
    recovered.queued.into_iter().map(|task| QueuedTask {
        ids: Arc::new(task.ids),
        priority: task.priority,
        timeout_seconds: task.timeout_seconds,
    })
}
