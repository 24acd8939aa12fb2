//! One WebSocket connection of the scripted server (PROTOCOL.md 3).

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};

use async_tungstenite::tungstenite::handshake::derive_accept_key;
use async_tungstenite::tungstenite::protocol::Role;
use async_tungstenite::tungstenite::{Message, WebSocket};
use hostlink_edge::ids::{Ids, Stream};
use hostlink_edge::wire::Timestamp;
use hostlink_edge::wire::agent_message::ReceivedMessage;
use hostlink_edge::wire::envelope::Envelope;
use serde_json::{Value, json};

use super::http::Request;
use super::log::{Event, Frame};
use super::rules::ConnectionRules;
use super::server::{AGENT_ID, Inner};
use super::{Task, lock};

/// What a script says about a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// The server reacts as it always does.
    Default,
    /// The script has done what is to be done, possibly nothing.
    Handled,
}

/// Reads from the socket; what the library wants to write by itself goes nowhere, since another
/// instance writes.
struct ReadOnly(TcpStream);

impl Read for ReadOnly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for ReadOnly {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub struct Link {
    /// From 1, in the order of opening.
    pub conn: usize,
    inner: Arc<Inner>,
    socket: TcpStream,
    writer: Mutex<WebSocket<TcpStream>>,
    rules: Mutex<ConnectionRules>,
}

/// Answers the upgrade and serves the connection to its end.
pub fn upgrade(mut socket: &TcpStream, request: &Request, inner: &Arc<Inner>) {
    let key = request.header("sec-websocket-key").unwrap_or_default();
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {}\r\n\r\n",
        derive_accept_key(key.as_bytes())
    );
    let (Ok(reading), Ok(writing), Ok(control)) =
        (socket.try_clone(), socket.try_clone(), socket.try_clone())
    else {
        return;
    };
    let conn = inner.record_opened();
    if let Err(error) = socket.write_all(head.as_bytes()) {
        let why = error.to_string();
        inner.record(Event::Closed { conn, why });
        return;
    }
    let link = Arc::new(Link {
        conn,
        inner: Arc::clone(inner),
        socket: control,
        writer: Mutex::new(WebSocket::from_raw_socket(writing, Role::Server, None)),
        rules: Mutex::new(ConnectionRules::new()),
    });
    let reader = WebSocket::from_raw_socket(ReadOnly(reading), Role::Server, None);
    let why = read_frames(&link, reader);
    let mut active = lock(&inner.active);
    if active.as_ref().is_some_and(|active| active.conn == conn) {
        *active = None;
    }
    drop(active);
    let _ = link.socket.shutdown(Shutdown::Both);
    inner.record(Event::Closed { conn, why });
}

/// Returns why the connection ended.
fn read_frames(link: &Arc<Link>, mut reader: WebSocket<ReadOnly>) -> String {
    loop {
        match reader.read() {
            Ok(Message::Text(text)) => handle(link, text.as_str()),
            Ok(Message::Ping(data)) => link.send_message(Message::Pong(data)),
            Ok(Message::Close(frame)) => return format!("closed by the agent: {frame:?}"),
            Ok(Message::Pong(_)) => {}
            Ok(other) => {
                let what = format!("the agent sent a frame that is no text: {other:?}");
                link.inner.record(Event::Broken(what));
            }
            Err(error) => return error.to_string(),
        }
    }
}

fn handle(link: &Arc<Link>, text: &str) {
    let inner = &link.inner;
    let decoded = Envelope::decode(text, AGENT_ID).and_then(|envelope| {
        let message = ReceivedMessage::decode(&envelope)?;
        Ok(Frame::new(link.conn, &envelope.message_id, message, text))
    });
    let frame = match decoded {
        Ok(frame) => frame,
        Err(error) => {
            let start: String = text.chars().take(500).collect();
            inner.record(Event::Broken(format!("{error}: {start}")));
            return;
        }
    };
    let checked = {
        let mut rules = lock(&link.rules);
        lock(&inner.ledger).check(&mut rules, &frame, text.len())
    };
    inner.record(Event::Frame(Box::new(frame.clone())));
    if let Err(rule) = checked {
        inner.record(Event::Broken(rule));
    }
    let script = Arc::clone(&lock(&inner.policy).on_frame);
    if script(link, &frame) == Reaction::Default {
        link.react(&frame);
    }
    let greeted = frame.hello().is_some() && lock(&link.rules).hello_acked;
    if greeted {
        activate(link);
    }
}

/// The session is active: tests may use it from now on.
fn activate(link: &Arc<Link>) {
    *lock(&link.inner.active) = Some(Arc::clone(link));
    let what = format!("session {} is active", link.conn);
    link.inner.record(Event::Note(what));
    let tasks = lock(&link.inner.policy).deliver_on_hello.clone();
    for task in &tasks {
        link.deliver(task);
    }
}

impl Link {
    /// What the server does without a script.
    pub fn react(&self, frame: &Frame) {
        match &frame.message {
            ReceivedMessage::Hello(_) => self.hello_ack(frame, json!({})),
            ReceivedMessage::Output {
                ids,
                sequence,
                output,
            } => self.take(frame, ids, *sequence, output),
            ReceivedMessage::Final { .. } => self.ack(frame),
            ReceivedMessage::Received(_)
            | ReceivedMessage::Started(_)
            | ReceivedMessage::LeaseHeartbeat(_)
            | ReceivedMessage::Unknown(_) => {}
        }
    }

    fn take(
        &self,
        frame: &Frame,
        ids: &Ids,
        sequence: u64,
        output: &hostlink_edge::wire::agent_message::ReceivedOutput,
    ) {
        let highest = {
            let mut taken = lock(&self.inner.taken);
            let highest = taken.entry((ids.clone(), output.stream)).or_default();
            if sequence == *highest + 1 || output.truncated_locally == Some(true) {
                *highest = sequence.max(*highest);
            }
            *highest
        };
        if sequence <= highest {
            self.ack(frame);
        } else {
            self.gap(frame, highest);
        }
    }

    /// Highest sequence that this server has taken of each stream.
    pub fn taken(&self) -> Vec<(Ids, Stream, u64)> {
        let taken = lock(&self.inner.taken);
        let entry =
            |((ids, stream), highest): (&(Ids, Stream), &u64)| (ids.clone(), *stream, *highest);
        taken.iter().map(entry).collect()
    }

    /// Acknowledges the hello; the fields of `directives` are added to the payload.
    pub fn hello_ack(&self, hello: &Frame, directives: Value) {
        let delivery_enabled = lock(&self.inner.policy).delivery_enabled;
        let mut payload = json!({
            "acked_message_id": hello.message_id,
            "acked_type": "agent.hello",
            "delivery_enabled": delivery_enabled,
        });
        if let (Some(payload), Value::Object(fields)) = (payload.as_object_mut(), directives) {
            payload.extend(fields);
        }
        lock(&self.rules).hello_acked = true;
        self.send("agent.hello_ack", None, payload);
    }

    /// Acknowledges the hello and asks every stream from where this server has it.
    pub fn hello_ack_from_taken(&self, hello: &Frame) {
        let replay = |(ids, stream, highest): (Ids, Stream, u64)| {
            json!({"task_id": ids.task.as_str(), "execution_attempt_id": ids.attempt.as_str(),
                "stream": stream, "next_sequence": highest + 1})
        };
        let replays: Vec<Value> = self.taken().into_iter().map(replay).collect();
        self.hello_ack(hello, json!({ "output_replay": replays }));
    }

    pub fn ack(&self, frame: &Frame) {
        self.send("ack", None, self.ack_payload(frame));
    }

    /// Also acknowledges all lower chunks of the stream.
    pub fn ack_through(&self, frame: &Frame, highest: u64) {
        let mut payload = self.ack_payload(frame);
        payload["highest_output_sequence"] = highest.into();
        self.send("ack", None, payload);
    }

    fn ack_payload(&self, frame: &Frame) -> Value {
        let mut payload = json!({"acked_message_id": frame.message_id, "acked_type": frame.kind});
        if let Some(ids) = frame.ids() {
            payload["task_id"] = ids.task.as_str().into();
            payload["execution_attempt_id"] = ids.attempt.as_str().into();
        }
        payload
    }

    pub fn gap(&self, frame: &Frame, highest_accepted: u64) {
        lock(&self.rules).repeats_allowed = true;
        let payload = json!({
            "code": "output_sequence_gap",
            "message": "a chunk is missing",
            "retryable": true,
            "related_message_id": frame.message_id,
            "highest_accepted_sequence": highest_accepted,
        });
        self.send("error", None, payload);
    }

    pub fn error(&self, code: &str, retryable: bool, related_message_id: Option<&str>) {
        let mut payload = json!({"code": code, "message": "scripted", "retryable": retryable});
        if let Some(id) = related_message_id {
            payload["related_message_id"] = id.into();
        }
        self.send("error", None, payload);
    }

    pub fn deliver(&self, task: &Task) {
        lock(&self.rules).repeats_allowed = true;
        lock(&self.inner.ledger).delivered(task.ids.task.as_str());
        self.send("task.deliver", Some(&task.ids), task.delivery());
    }

    /// A valid envelope with a payload of the test's choice.
    pub fn send(&self, kind: &str, ids: Option<&Ids>, payload: Value) {
        self.send_text(&envelope(kind, ids, payload).to_string());
    }

    pub fn send_text(&self, text: &str) {
        self.inner.record(Event::Sent {
            conn: self.conn,
            text: text.chars().take(300).collect(),
        });
        self.send_message(Message::text(text));
    }

    /// A connection that is gone shows itself at the reading side.
    pub fn send_message(&self, message: Message) {
        let _ = lock(&self.writer).send(message);
    }

    /// Ends the connection without a close handshake, as a broken network does.
    pub fn cut(&self) {
        self.inner.record(Event::Note(format!("cut {}", self.conn)));
        let mut active = lock(&self.inner.active);
        if active.as_ref().is_some_and(|a| a.conn == self.conn) {
            *active = None;
        }
        drop(active);
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The envelope of a frame to the agent, as JSON that a test may spoil.
pub fn envelope(kind: &str, ids: Option<&Ids>, payload: Value) -> Value {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut envelope = json!({
        "protocol_version": 1,
        "message_id": format!("server-{}", NEXT.fetch_add(1, Ordering::Relaxed)),
        "type": kind,
        "agent_id": AGENT_ID,
        "sent_at": Timestamp::now(),
        "payload": payload,
    });
    if let Some(ids) = ids {
        envelope["task_id"] = ids.task.as_str().into();
        envelope["execution_attempt_id"] = ids.attempt.as_str().into();
    }
    envelope
}
