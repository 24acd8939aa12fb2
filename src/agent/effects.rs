//! What the session wants done. Each effect becomes a command to the store, a frame, or a task on
//! the executor that answers with an input; none makes the driver wait, except for room in the
//! store's queue when acknowledgements and reads come faster than the store takes them.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_channel::{Receiver, TrySendError};
use log::warn;

use super::connection::{Connection, ToSend};
use super::driver::{Driver, Input};
use super::{Context, frames, report, task};
use crate::executor::Stop;
use crate::ids::{AttemptKey, Ids};
use crate::limits::{
    ANSWERS_IN_WRITER, COMMAND_BYTES_MAX, HELLO_BYTES_MAX, OPEN_ATTEMPTS_MAX, STORE_RETRY_DELAY,
};
use crate::net::{Control, NetError};
use crate::outbox::{self, Cursor, Phase, ReadRequest, Receipt, Reception, Submitted};
use crate::session::reports::WaitingFinal;
use crate::session::tasks::QueuedTask;
use crate::session::{Ack, Effect, Origin, Recorded};
use crate::wire::http::PolledTasks;
use crate::wire::message_id::Piece;
use crate::wire::{AgentMessage, TaskOffer, Timestamp};

impl Driver {
    pub(super) async fn carry_out(&mut self, effect: Effect<Cursor>) {
        let context = self.context.clone();
        if drops_messages(&effect) {
            self.in_hand.void();
        }
        match effect {
            Effect::Dial => {
                self.connections_made += 1;
                self.connection = Some(Connection::dial(&context, self.connections_made));
            }
            Effect::Close => {
                if let Some(connection) = self.connection.take() {
                    let closing = context.clone();
                    context.spawn(async move { connection.close(&closing.clock).await });
                }
            }
            Effect::Ping => self.send(Control::Ping),
            Effect::PrepareHello => {
                let id = self.connections_made;
                context.clone().spawn(async move {
                    let snapshot = context.outbox.snapshot(HELLO_BYTES_MAX).await;
                    context.tell(Input::Snapshot(id, Box::new(snapshot))).await;
                });
            }
            Effect::SendHello { hello, message_id } => {
                let message = AgentMessage::Hello(&hello);
                let frame = frames::encode_named(message, &message_id, &context.agent_id);
                self.send(Control::Text(frame));
            }
            Effect::SendReceived(ids) => {
                self.send_word(AgentMessage::Received(&ids), &ids, Piece::Received);
            }
            Effect::SendStarted(ids) => {
                self.send_word(AgentMessage::Started(&ids), &ids, Piece::Started);
            }
            Effect::SendLease(ids, message_id) => {
                let message = AgentMessage::LeaseHeartbeat(&ids);
                let frame = frames::encode_named(message, &message_id, &context.agent_id);
                self.send(Control::Text(frame));
            }
            Effect::SendFinalAgain(ids) => self.send_final_again(ids),
            Effect::Read(order) => {
                if let Some(rest) = self.in_hand.take(&order) {
                    return self.take_in_hand(rest, order.from);
                }
                let (buffer, messages) = self.spare_buffers.pop().unwrap_or_default();
                let request = ReadRequest {
                    from: order.from,
                    max_messages: order.max_messages,
                    max_bytes: order.max_bytes,
                    skip: order.skip,
                    buffer,
                    messages,
                };
                // Before more is stored: its commit would have to be waited for.
                let reading = context.outbox.begin_to_read(request).await;
                context.clone().spawn(async move {
                    let batch = reading.batch().await;
                    context
                        .tell(Input::Batch(Box::new(batch), order.skip))
                        .await;
                });
            }
            Effect::Locate { key, stream, from } => context.clone().spawn(async move {
                let at = context.outbox.rewind(key, stream, from).await;
                context.tell(Input::Located(key, stream, from, at)).await;
            }),
            Effect::Acknowledge(acks) => {
                for ack in &*acks {
                    self.in_hand.acknowledged(ack);
                }
                let acks = acks.iter().map(|&ack| stored_ack(ack)).collect();
                context.outbox.acknowledge(acks).await;
            }
            Effect::Reject { key, piece } => context.clone().spawn(async move {
                let piece = match piece {
                    Piece::Output(stream, sequence) => outbox::Piece::Output { stream, sequence },
                    Piece::Final => outbox::Piece::Final,
                    Piece::Received | Piece::Started => {
                        return context.tell(Input::Settled(true)).await;
                    }
                };
                let rejected = context.outbox.reject(key, piece).await;
                settle(&context, "remove a refused message", rejected).await;
            }),
            Effect::GiveUpStream { key, stream } => context.clone().spawn(async move {
                let given_up = context.outbox.give_up_stream(key, stream).await;
                settle(&context, "give up a stream", given_up).await;
            }),
            Effect::Discard(key) => context.clone().spawn(async move {
                let discarded = context.outbox.discard(key).await;
                settle(&context, "discard an attempt", discarded).await;
            }),
            Effect::DropFinal(key) => context.clone().spawn(async move {
                report::until_stored(&context, "the end of a final that has no other way", || {
                    context.outbox.drop_final(key)
                })
                .await;
            }),
            Effect::Record { offer, origin } => {
                // The session bounds them; only at the end is nobody there.
                let _ = self.offers.try_send((offer, origin));
            }
            Effect::Start(queued) => {
                let (stop, stopped) = async_channel::bounded(1);
                self.running.insert(queued.ids.key(), stop);
                context.clone().spawn(task::run(context, queued, stopped));
            }
            Effect::Stop { key, reason } => {
                if let Some(stop) = self.running.get(&key) {
                    // A second stop changes nothing.
                    let _ = stop.try_send(Stop { reason });
                }
            }
            Effect::Interrupt { ids, reason } => context.clone().spawn(async move {
                task::store_final(&context, &ids, task::interrupted(&reason)).await;
                context.tell(Input::FinalStored).await;
            }),
            Effect::ListFinals => context.clone().spawn(async move {
                let waiting = context.outbox.finals_waiting(OPEN_ATTEMPTS_MAX).await;
                let waiting = waiting.into_iter().map(|entry| WaitingFinal {
                    ids: entry.ids,
                    key: entry.key,
                    output_waits: entry.output_waits,
                });
                context.tell(Input::Finals(waiting.collect())).await;
            }),
            Effect::Report(ids) => context.clone().spawn(async move {
                let result = report::report_stored(&context, &ids).await;
                context.tell(Input::Reported(ids, result)).await;
            }),
            Effect::Poll => context.clone().spawn(async move {
                let answer = context.poll().await;
                let failed = offer(&context, "polling for tasks", answer).await;
                context.tell(Input::Polled(failed)).await;
            }),
            Effect::Heartbeat => context.clone().spawn(async move {
                let answer = context.heartbeat().await;
                let failed = offer(&context, "heartbeat", answer).await;
                context.tell(Input::HeartbeatDone(failed)).await;
            }),
        }
    }

    /// Queues a control frame. A server that lets them pile up is not reading.
    pub(super) fn send(&mut self, control: Control) {
        let Some(connection) = &self.connection else {
            return;
        };
        // A closed lane means that the word of the connection's end is on its way.
        if let Err(TrySendError::Full(_)) = connection.control.try_send(control) {
            self.disconnected("the server does not read");
        }
    }

    fn send_word(&mut self, message: AgentMessage<'_>, ids: &Ids, piece: Piece) {
        let agent_id = &self.context.agent_id;
        let frame = frames::encode_word(message, ids.key(), piece, &self.incarnation, agent_id);
        self.send(Control::Text(frame));
    }

    fn send_final_again(&self, ids: Arc<Ids>) {
        let context = self.context.clone();
        let Some(connection) = &self.connection else {
            return;
        };
        let id = connection.id;
        let (control, to_send) = (connection.control.clone(), connection.to_send.clone());
        let granted = self.granted();
        context.clone().spawn(async move {
            let stored = context.outbox.final_of(ids.key()).await;
            let waits = |it: &outbox::StoredFinal| it.output_waits && !it.texts_held;
            let is_waiting = stored.as_ref().is_some_and(waits);
            if let Some(stored) = stored.filter(|it| !waits(it)) {
                let frame = frames::encode_stored_final(&ids, &stored, granted, &context.agent_id);
                // The server asked; if it does not read, it will ask again.
                if !stored.texts_held {
                    // Without its texts it is small.
                    let _ = control.try_send(Control::Text(frame));
                } else if to_send.len() < ANSWERS_IN_WRITER {
                    // The other places are those of batches.
                    let _ = to_send.try_send(ToSend::Answer(frame));
                }
            }
            let answered = Input::Answered {
                connection: id,
                ids,
                waits: is_waiting,
            };
            context.tell(answered).await;
        });
    }
}

/// Whether what was read before may not be sent after this.
fn drops_messages(effect: &Effect<Cursor>) -> bool {
    matches!(
        effect,
        Effect::Dial
            | Effect::Close
            | Effect::Reject { .. }
            | Effect::GiveUpStream { .. }
            | Effect::Discard(_)
            | Effect::DropFinal(_)
            | Effect::Report(_)
    )
}

fn stored_ack(ack: Ack) -> outbox::Ack {
    match ack {
        Ack::Output {
            key,
            stream,
            sequence,
            cumulative,
        } => outbox::Ack::Output {
            key,
            stream,
            sequence,
            cumulative,
        },
        Ack::Final { key } => outbox::Ack::Final { key },
    }
}

/// Tells the session whether something was dropped. After a failure it is sent once more, but not
/// without pause: the disk may go on failing, and the server saying the same.
async fn settle(context: &Rc<Context>, what: &str, result: Result<(), outbox::StoreError>) {
    let is_dropped = result.is_ok();
    if let Err(error) = result {
        warn!("cannot {what}: {error}");
        context.clock.sleep(STORE_RETRY_DELAY).await;
    }
    context.tell(Input::Settled(is_dropped)).await;
}

/// Hands the tasks of a poll or heartbeat to the driver. Returns the failure, if there is one.
async fn offer(
    context: &Rc<Context>,
    what: &str,
    answer: Result<PolledTasks, NetError>,
) -> Option<Option<Duration>> {
    match answer {
        Ok(tasks) => {
            for task in tasks {
                match task {
                    Ok(offer) => context.tell(Input::Offered(Box::new(offer))).await,
                    Err(why) => warn!("{what}: a task that cannot be read is passed over: {why}"),
                }
            }
            None
        }
        Err(error) => {
            context
                .tell(Input::HttpFailed(format!("{what}: {}", error.why)))
                .await;
            Some(error.retry_after)
        }
    }
}

/// Hands offered tasks to the store in the order in which they came.
pub(super) async fn record_offers(
    context: Rc<Context>,
    offers: Receiver<(Box<TaskOffer>, Origin)>,
) {
    while let Ok((offer, origin)) = offers.recv().await {
        let unusable = why_unusable(&offer.command);
        let (ids, priority, timeout_seconds) = (offer.ids, offer.priority, offer.timeout_seconds);
        let receipt = Receipt {
            ids: ids.clone(),
            command: match &unusable {
                Some(_) => task::UNUSABLE.to_vec(),
                None => offer.command.into_bytes(),
            },
            priority,
            timeout_seconds,
            received_at_ms: Timestamp::now().0,
        };
        let submitted = context.outbox.submit(receipt).await;
        let task = QueuedTask {
            ids: Arc::new(ids),
            priority,
            timeout_seconds,
        };
        let context = context.clone();
        context
            .clone()
            .spawn(record(context, task, unusable, submitted, origin));
    }
}

/// Why a command can never run.
fn why_unusable(command: &str) -> Option<String> {
    if command.len() > COMMAND_BYTES_MAX {
        Some(format!(
            "the command is longer than {COMMAND_BYTES_MAX} bytes"
        ))
    } else if command.contains('\0') {
        Some("the command contains a NUL character".to_owned())
    } else {
        None
    }
}

/// Waits until a task is recorded. A command that can never run ends at once.
async fn record(
    context: Rc<Context>,
    task: QueuedTask,
    unusable: Option<String>,
    submitted: Submitted,
    origin: Origin,
) {
    let ids = task.ids.clone();
    let outcome = match submitted.recorded().await {
        Ok(Reception::New) => match &unusable {
            None => Recorded::New,
            Some(why) => {
                warn!("task {ids}: not run: {why}");
                task::store_final(&context, &ids, task::failed(why)).await;
                context.tell(Input::FinalStored).await;
                Recorded::Finished { held: true }
            }
        },
        Ok(Reception::Known(phase)) => match phase {
            Phase::Received => Recorded::Received,
            Phase::Started => Recorded::Started,
            Phase::Finished { held } => Recorded::Finished { held },
            Phase::Discarded => Recorded::Discarded,
        },
        Err(error) => {
            warn!("task {ids}: refused, it cannot be recorded: {error}");
            Recorded::NoRoom
        }
    };
    context.tell(Input::Recorded(task, outcome, origin)).await;
}

/// The key that names an attempt in the driver's tables.
pub(super) type RunningStops = std::collections::HashMap<AttemptKey, async_channel::Sender<Stop>>;
