//! A model control plane that costs much less than the agent: blocking threads, frames read where
//! they lie, one cumulative acknowledgement a stream for all that one read has brought.
//!
//! It checks that sequences have no holes and counts bytes; that the bytes are the right ones is
//! what the behaviour tests check.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_tungstenite::tungstenite::handshake::derive_accept_key;
use openssl::ssl::{SslAcceptor, SslStream};

use crate::frames::{self, Frame};
use crate::print::monotonic_ns;

pub const AGENT_ID: &str = "bench-agent";
/// Nothing that is waited for takes longer.
const DEADLINE: Duration = Duration::from_secs(120);
const READ_BYTES: usize = 512 * 1024;

/// What has arrived of one attempt; per stream: stdout, stderr.
#[derive(Debug, Clone, Default)]
pub struct Attempt {
    pub last_sequence: [u64; 2],
    pub bytes: [u64; 2],
    pub repeats: u64,
    pub started_at: Option<Instant>,
    pub ended_at: Option<Instant>,
    pub exit_code: Option<i64>,
}

impl Attempt {
    pub fn chunks(&self) -> u64 {
        self.last_sequence.iter().sum()
    }

    pub fn total_bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }
}

pub struct State {
    /// Whether sessions are taken, and whether messages are acknowledged.
    pub takes_sessions: bool,
    pub acknowledges: bool,
    /// Output is acknowledged when so many chunks of a stream have come, or the final; 0: at once.
    pub acknowledges_every: u64,
    /// The oldest output may have been given up on the device.
    pub allows_holes: bool,
    /// Lines begin with the time at which they were printed: keep it and that of their arrival.
    pub keeps_arrivals: bool,
    pub attempts: HashMap<String, Attempt>,
    /// Printed and arrived, monotonic nanoseconds.
    pub arrivals: Vec<(u64, u64)>,
    pub accepted_at: Option<Instant>,
    /// When the last handshake was answered.
    pub active_at: Option<Instant>,
    pub finals: u64,
    /// The first breach of the protocol.
    pub wrong: Option<String>,
    /// Whoever waits is told of output, too: woken for each chunk, on the processors that are measured.
    pub tells_output: bool,
    /// Something that is waited for may have happened.
    has_news: bool,
    link: Option<Arc<Mutex<TcpStream>>>,
    deliveries: Vec<String>,
}

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
    address: SocketAddr,
    tls: bool,
}

impl Gateway {
    pub fn start(tls: Option<SslAcceptor>) -> io::Result<Gateway> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let inner = Arc::new(Inner {
            state: Mutex::new(State {
                takes_sessions: true,
                acknowledges: true,
                acknowledges_every: 0,
                allows_holes: false,
                keeps_arrivals: false,
                attempts: HashMap::new(),
                arrivals: Vec::new(),
                accepted_at: None,
                active_at: None,
                finals: 0,
                wrong: None,
                tells_output: false,
                has_news: false,
                link: None,
                deliveries: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let gateway = Gateway {
            inner: inner.clone(),
            address: listener.local_addr()?,
            tls: tls.is_some(),
        };
        std::thread::spawn(move || {
            crate::begin_gateway_thread();
            for socket in listener.incoming().flatten() {
                let (inner, tls) = (inner.clone(), tls.clone());
                let accepted_at = Instant::now();
                std::thread::spawn(move || {
                    crate::begin_gateway_thread();
                    // An agent that goes away in the middle of something is what some works are for.
                    let _ = serve(&inner, socket, accepted_at, tls);
                });
            }
        });
        Ok(gateway)
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.inner.lock()
    }

    /// Sends a task, now or with the next session.
    pub fn deliver(&self, name: &str, command: &str) {
        let frame = frames::deliver(name, command);
        let mut state = self.inner.lock();
        match state.link.clone().filter(|_| !self.tls) {
            Some(link) => {
                drop(state);
                let mut link = link.lock().unwrap_or_else(PoisonError::into_inner);
                // A cut session gets no tasks; whoever waits for the task says so.
                let _ = link.write_all(&frames::server_frame(frames::TEXT, frame.as_bytes()));
            }
            None => state.deliveries.push(frame),
        }
    }

    /// Ends the session and takes no other one.
    pub fn cut(&self) {
        let mut state = self.inner.lock();
        state.takes_sessions = false;
        if let Some(link) = state.link.take() {
            let link = link.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = link.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Waits until `check` gives something.
    pub fn wait<T>(
        &self,
        what: &str,
        mut check: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, String> {
        let until = Instant::now() + DEADLINE;
        let mut state = self.inner.lock();
        loop {
            if let Some(wrong) = &state.wrong {
                return Err(format!("the agent broke the protocol: {wrong}"));
            }
            if let Some(found) = check(&mut state) {
                return Ok(found);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("waited in vain for {what}"));
            }
            let waited = self.inner.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until somebody has made this file.
    pub fn wait_for_file(&self, path: &Path) -> Result<(), String> {
        let until = Instant::now() + DEADLINE;
        while !path.exists() {
            if Instant::now() > until {
                return Err(format!("waited in vain for {}", path.display()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub fn wait_active(&self) -> Result<(), String> {
        self.wait("a session", |state| state.active_at.map(drop))
    }

    pub fn wait_started(&self, name: &str) -> Result<Instant, String> {
        self.wait("the start of a task", |state| {
            state.attempts.get(name)?.started_at
        })
    }

    /// Waits for the final and gives what has arrived.
    pub fn wait_final(&self, name: &str) -> Result<Attempt, String> {
        let attempt = self.wait("the end of a task", |state| {
            let attempt = state.attempts.get(name)?;
            attempt.ended_at.map(|_| attempt.clone())
        })?;
        match attempt.exit_code {
            Some(0) => Ok(attempt),
            code => Err(format!("task {name} ended with {code:?}")),
        }
    }
}

enum Socket {
    Plain(TcpStream),
    Tls(Box<SslStream<TcpStream>>),
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Plain(socket) => socket.read(buffer),
            Socket::Tls(socket) => socket.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Plain(socket) => socket.write(bytes),
            Socket::Tls(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serve(
    inner: &Inner,
    socket: TcpStream,
    accepted_at: Instant,
    tls: Option<SslAcceptor>,
) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let own = socket.try_clone()?;
    let is_plain = tls.is_none();
    let mut socket = match tls {
        None => Socket::Plain(socket),
        Some(acceptor) => Socket::Tls(Box::new(acceptor.accept(socket).map_err(io::Error::other)?)),
    };
    while let Some((head, _body)) = read_request(&mut socket)? {
        let mut words = head.split_whitespace();
        let (method, path) = (words.next(), words.next().unwrap_or_default());
        let answer = match (method, path) {
            (_, "/api/v1/agents/ws") => {
                if !inner.lock().takes_sessions {
                    answer(503, "{}")
                } else {
                    socket.write_all(upgrade_answer(&head).as_bytes())?;
                    return session(inner, socket, own, accepted_at, is_plain);
                }
            }
            (_, "/api/v1/agents/register") => answer(
                200,
                &format!(
                    r#"{{"id":"{AGENT_ID}","fingerprint":"f","status":"active","message":"","registered_at":""}}"#
                ),
            ),
            (Some("GET"), "/api/v1/tasks") => answer(200, "[]"),
            (Some("POST"), _) => answer(200, r#"{"message":"","pending_tasks":[]}"#),
            (Some("PUT"), _) => {
                inner.lock().wrong = Some(format!("a report although a session works: {path}"));
                inner.changed.notify_all();
                answer(200, "{}")
            }
            _ => answer(404, "{}"),
        };
        socket.write_all(answer.as_bytes())?;
    }
    Ok(())
}

fn answer(status: u16, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn upgrade_answer(head: &str) -> String {
    let key = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("sec-websocket-key")
            .then(|| value.trim())
    });
    format!(
        "HTTP/1.1 101 -\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {}\r\n\r\n",
        derive_accept_key(key.unwrap_or_default().as_bytes())
    )
}

/// Head and body of a request; `None` at the end of the connection.
fn read_request(socket: &mut Socket) -> io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let mut block = [0; 4096];
    loop {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.trim().parse::<usize>().ok())?
            });
            let mut body = bytes.split_off(end + 4);
            let missing = length.unwrap_or(0).saturating_sub(body.len());
            let have = body.len();
            body.resize(have + missing, 0);
            socket.read_exact(&mut body[have..])?;
            return Ok(Some((head, body)));
        }
        match socket.read(&mut block)? {
            0 => return Ok(None),
            count => bytes.extend_from_slice(&block[..count]),
        }
    }
}

/// One WebSocket session until its end.
fn session(
    inner: &Inner,
    mut socket: Socket,
    own: TcpStream,
    accepted_at: Instant,
    is_plain: bool,
) -> io::Result<()> {
    let link = Arc::new(Mutex::new(own));
    let mut buffer = vec![0; READ_BYTES];
    let mut filled = 0;
    let mut out = Vec::new();
    let mut acks = Acks::default();
    loop {
        let count = socket.read(&mut buffer[filled..])?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        let mut at = 0;
        let mut begins = false;
        let has_news;
        {
            let mut state = inner.lock();
            while let Some(frame) = frames::take(&mut buffer[at..filled]) {
                match frame.opcode {
                    frames::TEXT => {
                        begins |= handle(&mut state, &frame, &mut acks, &mut out);
                    }
                    frames::PING => {
                        out.extend(frames::server_frame(frames::PONG, frame.payload));
                    }
                    frames::CLOSE => return Ok(()),
                    _ => {}
                }
                at += frame.bytes;
            }
            if state.acknowledges {
                acks.write(&mut out, state.acknowledges_every);
            } else {
                acks.clear();
            }
            has_news = std::mem::take(&mut state.has_news);
        }
        if !out.is_empty() {
            match &mut socket {
                Socket::Plain(_) => {
                    let mut link = link.lock().unwrap_or_else(PoisonError::into_inner);
                    link.write_all(&out)?;
                }
                Socket::Tls(socket) => socket.write_all(&out)?,
            }
            out.clear();
        }
        if begins {
            // Only now: a task must not overtake the answer to the hello.
            let mut state = inner.lock();
            state.link = is_plain.then(|| link.clone());
            state.accepted_at = Some(accepted_at);
            state.active_at = Some(Instant::now());
        }
        if begins || has_news {
            inner.changed.notify_all();
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
        if filled == buffer.len() {
            buffer.resize(2 * filled, 0);
        }
    }
}

/// Takes a message in. True if it begins a session, whose answer is then in `out`.
fn handle(state: &mut State, frame: &Frame<'_>, acks: &mut Acks, out: &mut Vec<u8>) -> bool {
    match read(state, frame, acks) {
        Ok(Some(hello_id)) => {
            out.extend(frames::server_frame(
                frames::TEXT,
                frames::hello_ack(&hello_id).as_bytes(),
            ));
            for task in std::mem::take(&mut state.deliveries) {
                out.extend(frames::server_frame(frames::TEXT, task.as_bytes()));
            }
            true
        }
        Ok(None) => false,
        Err(why) => {
            let text = String::from_utf8_lossy(frame.payload);
            let shown: String = text.chars().take(300).collect();
            state.wrong.get_or_insert(format!("{why}: {shown}"));
            state.has_news = true;
            false
        }
    }
}

/// Takes one message in. Gives the id of a hello.
fn read(state: &mut State, frame: &Frame<'_>, acks: &mut Acks) -> Result<Option<String>, String> {
    let head = frames::Head::read(frame.payload)?;
    if head.kind == "agent.hello" {
        return Ok(Some(head.message_id.to_owned()));
    }
    if !state.attempts.contains_key(head.attempt) {
        let name = head.attempt.to_owned();
        state.attempts.insert(name, Attempt::default());
    }
    state.has_news |= state.tells_output || head.kind != "task.output";
    let attempt = state.attempts.get_mut(head.attempt).ok_or("no attempt")?;
    match head.kind {
        "task.received" | "task.lease_heartbeat" => {}
        "task.started" => attempt.started_at = Some(Instant::now()),
        "task.output" => {
            let output = frames::Output::read(&head, frame.payload)?;
            let stream = usize::from(output.is_stderr);
            let last = attempt.last_sequence[stream];
            if head.sequence > last + 1 && !state.allows_holes {
                return Err(format!("sequence {} after {last}", head.sequence));
            }
            if head.sequence > last {
                attempt.last_sequence[stream] = head.sequence;
                attempt.bytes[stream] += output.byte_count;
                if state.keeps_arrivals {
                    let now = monotonic_ns();
                    // A chunk may cut its first and its last line, and the time in it. All lines of
                    // a work are equally long.
                    let lines = || output.data.split("\\n");
                    let whole = lines().map(str::len).max();
                    let whole_lines = lines().filter(|line| Some(line.len()) == whole);
                    let stamps =
                        whole_lines.filter_map(|line| line.split(' ').next()?.parse().ok());
                    state.arrivals.extend(stamps.map(|stamp: u64| (stamp, now)));
                }
            } else {
                attempt.repeats += 1;
            }
            acks.output(&head, stream);
        }
        "task.final" => {
            attempt.exit_code = head.exit_code();
            if attempt.ended_at.is_none() {
                attempt.ended_at = Some(Instant::now());
                state.finals += 1;
            }
            acks.fin(&head);
        }
        other => return Err(format!("message type {other}")),
    }
    Ok(None)
}

/// What one read has brought, to be acknowledged: of output the last chunk of each stream.
#[derive(Default)]
struct Acks {
    /// Message id, attempt, stream, sequence; and what is acknowledged already.
    output: Vec<(String, String, usize, u64, u64)>,
    finals: Vec<(String, String)>,
}

impl Acks {
    fn output(&mut self, head: &frames::Head<'_>, stream: usize) {
        let known = self.output.iter_mut();
        let mut mine = known.filter(|entry| entry.1 == head.attempt && entry.2 == stream);
        match mine.next() {
            Some(entry) => {
                entry.0.clear();
                entry.0.push_str(head.message_id);
                entry.3 = head.sequence;
            }
            None => self.output.push((
                head.message_id.to_owned(),
                head.attempt.to_owned(),
                stream,
                head.sequence,
                0,
            )),
        }
    }

    fn fin(&mut self, head: &frames::Head<'_>) {
        self.finals
            .push((head.message_id.to_owned(), head.attempt.to_owned()));
    }

    /// Takes out what is due. `every`: see [`State::acknowledges_every`].
    fn write(&mut self, out: &mut Vec<u8>, every: u64) {
        let ends = !self.finals.is_empty();
        self.output.retain_mut(|(id, attempt, _, sequence, done)| {
            let due = match every {
                0 => *sequence,
                _ if ends => *sequence,
                every => *sequence / every * every,
            };
            if due > *done {
                // The id of a chunk ends with its sequence.
                let stem = id.rsplit_once('-').map_or(id.as_str(), |(stem, _)| stem);
                let id = format!("{stem}-{due}");
                let ack = frames::ack(&id, "task.output", attempt, Some(due));
                out.extend(frames::server_frame(frames::TEXT, ack.as_bytes()));
                *done = due;
            }
            every > 0 && !ends
        });
        for (id, attempt) in self.finals.drain(..) {
            let ack = frames::ack(&id, "task.final", &attempt, None);
            out.extend(frames::server_frame(frames::TEXT, ack.as_bytes()));
        }
    }

    fn clear(&mut self) {
        self.output.clear();
        self.finals.clear();
    }
}
