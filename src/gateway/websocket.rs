//! One WebSocket session with one agent (PROTOCOL.md 3).
//!
//! The session reads what is ready, stages it, and while one commit is on its way to the disk it
//! goes on reading into the next batch. Acknowledgements leave when the commit behind them is
//! durable, one a stream and batch, with `highest_output_sequence`. Batches are bounded: a session
//! whose next batch is full does not read its socket until the commit before it is done.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Instant;

use async_channel::Receiver;
use async_tungstenite::WebSocketStream;
use async_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use async_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use async_tungstenite::tungstenite::{Error as WsError, Message};
use futures_lite::{FutureExt, StreamExt, future};
use smol::Timer;
use smol::net::TcpStream;

use super::commits::Batch;
use super::hello;
use super::hub::Hub;
use super::inbound::{self, Reply};
use super::peer::Peer;
use super::store;
use crate::limits::{
    GATEWAY_BATCH_BYTES, GATEWAY_BATCH_MESSAGES, GATEWAY_DELIVERIES_WAITING, GATEWAY_IDLE_TIMEOUT,
    GATEWAY_MESSAGE_BYTES_MAX, GATEWAY_PING_INTERVAL, HANDSHAKE_TIMEOUT, INBOUND_MESSAGE_BYTES_MAX,
    KIB, WRITE_BUFFER_BYTES, WRITE_TIMEOUT,
};
use crate::wire::agent_message::ReceivedMessage;
use crate::wire::server_message::ServerError;
use crate::wire::{Envelope, ServerMessage, TaskOffer, Timestamp};

/// Read buffer of a session; several chunks fit, so that a burst takes few reads.
const READ_BUFFER_BYTES: usize = 128 * KIB;

/// Limits of the WebSocket library. What is written is bounded by the largest command.
pub fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_BYTES + 6 * INBOUND_MESSAGE_BYTES_MAX + 64 * KIB)
        .max_message_size(Some(GATEWAY_MESSAGE_BYTES_MAX))
        .max_frame_size(Some(GATEWAY_MESSAGE_BYTES_MAX))
}

/// Why a session ended.
#[derive(Debug)]
enum End {
    /// The other side closed it or went away.
    Gone(String),
    /// It is closed from here, with this code and reason.
    Close(CloseCode, String),
}

impl From<WsError> for End {
    fn from(error: WsError) -> End {
        match error {
            WsError::Capacity(error) => End::Close(CloseCode::Size, error.to_string()),
            WsError::Utf8(error) => End::Close(CloseCode::Invalid, error.to_string()),
            error => End::Gone(error.to_string()),
        }
    }
}

enum Event {
    Committed(store::Answer<()>),
    Stopping,
    Woken,
    Tick,
    Frame(Option<Result<Message, WsError>>),
}

struct Session {
    hub: Rc<Hub>,
    agent_id: String,
    socket: WebSocketStream<Peer>,
    /// Staged, not yet on its way.
    batch: Batch,
    /// To be sent when `batch` is durable.
    replies: Vec<Reply>,
    messages: usize,
    /// The commit on its way, and what it will allow to be sent.
    commit: Option<(Receiver<store::Answer<()>>, Vec<Reply>)>,
    woken: Receiver<()>,
    last_heard: Instant,
    next_tick: Instant,
    next_message: u64,
    deliver: bool,
    cancel_granted: bool,
    /// Tasks that the device has, or that were delivered in this session.
    known: HashSet<String>,
    /// Delivered in this session and not answered yet.
    waiting: HashSet<String>,
    cancelled: HashSet<String>,
}

/// Serves a session from its upgrade to its end.
pub async fn serve(hub: Rc<Hub>, agent_id: String, tcp: TcpStream, socket: WebSocketStream<Peer>) {
    let (_, woken) = async_channel::bounded(1);
    let now = Instant::now();
    let mut session = Session {
        hub: hub.clone(),
        agent_id: agent_id.clone(),
        socket,
        batch: Batch::default(),
        replies: Vec::new(),
        messages: 0,
        commit: None,
        woken,
        last_heard: now,
        next_tick: now + GATEWAY_PING_INTERVAL,
        next_message: 1,
        deliver: false,
        cancel_granted: false,
        known: HashSet::new(),
        waiting: HashSet::new(),
        cancelled: HashSet::new(),
    };
    let end = match session.handshake().await {
        Err(end) => end,
        Ok(()) => {
            let (number, woken) = hub.open_session(&agent_id, tcp);
            session.woken = woken;
            log::info!("agent {agent_id}: session {number} is active");
            let end = session.run().await;
            hub.close_session(&agent_id, number);
            end
        }
    };
    match end {
        End::Gone(why) => log::info!("agent {agent_id}: session ended: {why}"),
        End::Close(code, why) => {
            log::warn!("agent {agent_id}: session closed: {why}");
            // A reason has room for 123 bytes (RFC 6455, 5.5).
            let frame = CloseFrame {
                code,
                reason: why.chars().take(60).collect::<String>().into(),
            };
            let close = async {
                // Whether it arrives does not matter: the connection is dropped after it.
                let _ = session.socket.close(Some(frame)).await;
                while let Some(Ok(_)) = session.socket.next().await {}
            };
            let timeout = async {
                Timer::after(crate::limits::GATEWAY_STOP_WAIT / 3).await;
            };
            close.or(timeout).await;
        }
    }
    // What was staged must not be lost to the next session, which builds on it.
    drop(hub.commit(std::mem::take(&mut session.batch)));
}

impl Session {
    /// Reads the hello, which must be the first frame, and answers it.
    async fn handshake(&mut self) -> Result<(), End> {
        let timeout = async {
            Timer::after(HANDSHAKE_TIMEOUT).await;
            Err(End::Close(
                CloseCode::Policy,
                "no agent.hello came in time".into(),
            ))
        };
        let text = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Text(text))) => return Ok(text),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(_)) => {
                        let why = "the first frame is no agent.hello".into();
                        return Err(End::Close(CloseCode::Policy, why));
                    }
                    Some(Err(error)) => return Err(error.into()),
                    None => return Err(End::Gone("closed before agent.hello".into())),
                }
            }
        };
        let text = text.or(timeout).await?;
        let decoded = Envelope::decode(&text, &self.agent_id).and_then(|envelope| {
            let message = ReceivedMessage::decode(&envelope)?;
            Ok((envelope.message_id.into_owned(), message))
        });
        let (message_id, hello) = match decoded {
            Ok((message_id, ReceivedMessage::Hello(hello))) => (message_id, hello),
            Ok(_) => {
                let why = "the first frame is no agent.hello".to_owned();
                return Err(self.refuse_session("hello_expected", why, None).await);
            }
            Err(error) => {
                let why = error.to_string();
                return Err(self.refuse_session("invalid_hello", why, None).await);
            }
        };
        let handshake = hello::answer(&self.hub, &self.agent_id, &message_id, &hello)
            .await
            .map_err(storage_failed)?;
        let committed = self.hub.commit_and_wait(handshake.batch).await;
        committed.map_err(storage_failed)?;
        self.known = handshake.known;
        self.cancel_granted = handshake.cancel_granted;
        self.deliver = self.hub.options.delivery_enabled && hello.capabilities.delivery_enabled;
        self.send(&ServerMessage::HelloAck(Box::new(handshake.ack)))
            .await
    }

    async fn run(&mut self) -> End {
        match self.serve().await {
            Ok(()) => End::Close(CloseCode::Away, "the gateway stops".into()),
            Err(end) => end,
        }
    }

    /// `Ok` when the gateway stops.
    async fn serve(&mut self) -> Result<(), End> {
        self.deliver_tasks().await?;
        loop {
            self.start_commit();
            match self.next_event().await {
                Event::Committed(result) => {
                    let replies = self.commit.take().map(|(_, replies)| replies);
                    result.map_err(storage_failed)?;
                    self.start_commit();
                    self.send_replies(replies.unwrap_or_default()).await?;
                }
                Event::Stopping => return Ok(()),
                Event::Woken => self.deliver_tasks().await?,
                Event::Tick => self.tick().await?,
                Event::Frame(frame) => {
                    self.take_frame(frame).await?;
                    // All that is ready goes into the same commit.
                    while self.has_room() {
                        match future::poll_once(self.socket.next()).await {
                            Some(frame) => self.take_frame(frame).await?,
                            None => break,
                        }
                    }
                    // Other sessions have their turn, however fast this agent sends.
                    future::yield_now().await;
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        self.batch.bytes < GATEWAY_BATCH_BYTES && self.messages < GATEWAY_BATCH_MESSAGES
    }

    /// Hands the batch over, if there is one and no other is on its way.
    fn start_commit(&mut self) {
        if self.commit.is_none() && self.messages > 0 {
            let batch = std::mem::take(&mut self.batch);
            let replies = std::mem::take(&mut self.replies);
            self.messages = 0;
            self.commit = Some((self.hub.commit(batch), replies));
        }
    }

    async fn next_event(&mut self) -> Event {
        let has_room = self.has_room();
        let commit = &self.commit;
        let committed = async {
            match commit {
                None => future::pending().await,
                Some((answer, _)) => Event::Committed(match answer.recv().await {
                    Ok(result) => result,
                    Err(_) => Err("the gateway is stopping".into()),
                }),
            }
        };
        let stopping = async {
            // Nothing is ever sent: the end of the channel is the signal.
            let _ = self.hub.stopping.recv().await;
            Event::Stopping
        };
        let woken = async {
            match self.woken.recv().await {
                Ok(()) => Event::Woken,
                // Another session has replaced this one, whose connection was cut.
                Err(_) => future::pending().await,
            }
        };
        let tick = async {
            Timer::at(self.next_tick).await;
            Event::Tick
        };
        let socket = &mut self.socket;
        let frame = async {
            match has_room {
                true => Event::Frame(socket.next().await),
                false => future::pending().await,
            }
        };
        committed.or(stopping).or(woken).or(frame).or(tick).await
    }

    async fn tick(&mut self) -> Result<(), End> {
        let quiet = self.last_heard.elapsed();
        if quiet >= GATEWAY_IDLE_TIMEOUT {
            return Err(End::Gone(format!("nothing came for {} s", quiet.as_secs())));
        }
        self.next_tick = Instant::now() + GATEWAY_PING_INTERVAL;
        self.write(Message::Ping(Default::default())).await
    }

    async fn take_frame(&mut self, frame: Option<Result<Message, WsError>>) -> Result<(), End> {
        let frame = match frame {
            None => return Err(End::Gone("closed by the agent".into())),
            Some(frame) => frame?,
        };
        self.last_heard = Instant::now();
        match frame {
            Message::Text(text) => self.take_message(&text).await,
            Message::Binary(_) => {
                let why = "a binary frame came; only text frames are spoken here".into();
                Err(End::Close(CloseCode::Unsupported, why))
            }
            // The library answers pings and the closing handshake by itself.
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => Ok(()),
        }
    }

    async fn take_message(&mut self, text: &str) -> Result<(), End> {
        let envelope = match Envelope::decode(text, &self.agent_id) {
            Ok(envelope) => envelope,
            Err(error) => {
                let why = error.to_string();
                return Err(self.refuse_session("invalid_envelope", why, None).await);
            }
        };
        if envelope.kind == "agent.hello" {
            let related = Some(envelope.message_id.into_owned());
            let why = "agent.hello comes once, first".to_owned();
            return Err(self.refuse_session("unexpected_hello", why, related).await);
        }
        if let Some(ids) = &envelope.ids {
            // May have to read the journal of an attempt that ended long ago.
            self.hub.load(&ids.task).await.map_err(storage_failed)?;
        }
        let outcome = inbound::take(&self.hub, &self.agent_id, &envelope, &mut self.batch);
        self.messages += 1;
        self.replies.extend(outcome.reply);
        if let Some(task_id) = outcome.answers {
            self.known.insert(task_id.clone());
            if self.waiting.remove(&task_id) {
                // There is room for a further delivery.
                self.hub.wake(&self.agent_id);
            }
        }
        Ok(())
    }

    /// Delivers what is pending and cancels what is to be cancelled.
    async fn deliver_tasks(&mut self) -> Result<(), End> {
        for task_id in self.hub.open_tasks(&self.agent_id) {
            let Some((ids, cancel_reason)) = self.hub.with_task(&task_id, |live| {
                (live.attempt.ids.clone(), live.attempt.cancel_reason.clone())
            }) else {
                continue;
            };
            if !ids.has_result_channel() {
                continue;
            }
            let is_new = !self.known.contains(&task_id);
            if is_new && self.deliver && self.waiting.len() < GATEWAY_DELIVERIES_WAITING {
                self.known.insert(task_id.clone());
                self.waiting.insert(task_id.clone());
                let offer = self.hub.with_task(&task_id, |live| {
                    live.offered = true;
                    ServerMessage::Deliver(Box::new(TaskOffer {
                        ids: ids.clone(),
                        command: live.attempt.task.command.clone(),
                        priority: live.attempt.task.priority,
                        timeout_seconds: live.attempt.task.timeout_seconds,
                    }))
                });
                if let Some(offer) = offer {
                    self.send(&offer).await?;
                }
            }
            if let Some(reason) = cancel_reason
                && self.cancel_granted
                && self.known.contains(&task_id)
                && self.cancelled.insert(task_id)
            {
                let reason = Some(reason);
                self.send(&ServerMessage::Cancel { ids, reason }).await?;
            }
        }
        Ok(())
    }

    async fn send_replies(&mut self, replies: Vec<Reply>) -> Result<(), End> {
        for reply in inbound::coalesce(replies) {
            self.send(&reply).await?;
        }
        Ok(())
    }

    /// Tells the agent why its session is closed.
    async fn refuse_session(
        &mut self,
        code: &str,
        message: String,
        related_message_id: Option<String>,
    ) -> End {
        let error = ServerMessage::Error(ServerError {
            code: code.to_owned(),
            message: message.clone(),
            retryable: false,
            related_message_id,
            highest_accepted_sequence: None,
        });
        match self.send(&error).await {
            Ok(()) => End::Close(CloseCode::Policy, message),
            Err(end) => end,
        }
    }

    async fn send(&mut self, message: &ServerMessage) -> Result<(), End> {
        let message_id = format!("gateway-{}", self.next_message);
        self.next_message += 1;
        let mut frame = Vec::new();
        message.encode(&message_id, &self.agent_id, Timestamp::now(), &mut frame);
        let text = String::from_utf8(frame).expect("JSON is UTF-8");
        self.write(Message::text(text)).await
    }

    async fn write(&mut self, message: Message) -> Result<(), End> {
        let timeout = async {
            Timer::after(WRITE_TIMEOUT).await;
            Err(End::Gone("the agent does not read".into()))
        };
        let send = async { self.socket.send(message).await.map_err(End::from) };
        send.or(timeout).await
    }
}

fn storage_failed(error: String) -> End {
    End::Close(CloseCode::Again, format!("storage failed: {error}"))
}
