//! What stands in the place of the world: the agent's calls are noted and answered by the
//! simulation, its tasks follow scripts, its frames go into a simulated socket.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use futures_lite::future;

use super::dropped::Dropped;
use super::flight::Flight;
use super::ledger::{self, Ledger};
use super::server::AGENT_ID;
use super::time::VirtualTime;
use crate::agent::outside::FrameReader;
use crate::executor::{Cause, Controls, Ended, OutputStore, Spec, Stop, Tail, Usage};
use crate::ids::Stream;
use crate::limits::{
    Chunk, ChunkBatch, ChunkBuffer, STORE_GIVE_UP, STORE_RETRY_DELAY, TASK_QUEUE_MAX, WINDOW_BYTES,
    WINDOW_MESSAGES, WRITE_TIMEOUT,
};
use crate::net::{Control, Incoming, NetError, ReportOutcome};
use crate::outbox::Cursor;
use crate::outbox::simulated::{MARK_BYTES, SimDisk, Store, Turn};
use crate::session::delivery::Candidate;
use crate::session::{Effect, LinkState, Now, Session};
use crate::wire::envelope::Envelope;
use crate::wire::http::{PolledTasks, Report};
use crate::wire::{Piece, ServerMessage};

/// What the agent wants of the world.
pub enum Call {
    Dial(Sender<Result<Line, NetError>>),
    Poll(Sender<Result<PolledTasks, NetError>>),
    Heartbeat(Sender<Result<PolledTasks, NetError>>),
    /// Of the attempt with this number.
    Report(usize, Sender<ReportOutcome>),
}

/// The driver may not turn more often than this without time passing.
const TURNS_AT_ONCE_MAX: u32 = 3_000;

pub struct Outside {
    pub time: Rc<VirtualTime>,
    pub ledger: Rc<RefCell<Ledger>>,
    pub disk: SimDisk,
    pub calls: RefCell<Vec<Call>>,
    /// Output of tasks goes over the WebSocket.
    pub results: bool,
    /// When the session became active, while it is.
    pub active_since: Cell<Option<Now>>,
    turns: Cell<(Duration, u32)>,
    flight: RefCell<Flight>,
    dropped: RefCell<Dropped>,
}

thread_local! {
    /// Buffers of chunks, used again.
    static SPARE: RefCell<Vec<Chunk>> = const { RefCell::new(Vec::new()) };
}

impl Outside {
    pub fn new(
        time: Rc<VirtualTime>,
        ledger: Rc<RefCell<Ledger>>,
        disk: SimDisk,
        results: bool,
    ) -> Outside {
        Outside {
            time,
            ledger,
            disk,
            calls: RefCell::default(),
            results,
            active_since: Cell::new(None),
            turns: Cell::default(),
            flight: RefCell::default(),
            dropped: RefCell::default(),
        }
    }

    async fn ask<T>(&self, call: impl FnOnce(Sender<T>) -> Call) -> Option<T> {
        let (answer, answered) = async_channel::bounded(1);
        self.calls.borrow_mut().push(call(answer));
        answered.recv().await.ok()
    }

    pub async fn connect(&self) -> Result<Line, NetError> {
        let line = self.ask(Call::Dial).await;
        line.unwrap_or_else(|| Err(NetError::new("no route to host")))
    }

    pub async fn poll(&self) -> Result<PolledTasks, NetError> {
        let answer = self.ask(Call::Poll).await;
        answer.unwrap_or_else(|| Err(NetError::new("no answer")))
    }

    pub async fn heartbeat(&self) -> Result<PolledTasks, NetError> {
        let answer = self.ask(Call::Heartbeat).await;
        answer.unwrap_or_else(|| Err(NetError::new("no answer")))
    }

    pub async fn report(&self, task: &str, report: &Report<'_>) -> ReportOutcome {
        let number = {
            let mut ledger = self.ledger.borrow_mut();
            let number = ledger.by_name(task);
            let life = ledger.life;
            let attempt = &mut ledger.attempts[number];
            let done = attempt.reported_in == Some(life);
            assert!(
                !done,
                "attempt {number} is reported twice by one life of the agent"
            );
            assert!(
                !attempt.reporting,
                "attempt {number} is being reported twice"
            );
            attempt.reporting = true;
            number
        };
        let _ = report;
        let answer = self.ask(|answer| Call::Report(number, answer)).await;
        let outcome = answer.unwrap_or_else(|| ReportOutcome::Retry {
            after: None,
            why: "no answer".into(),
        });
        let mut ledger = self.ledger.borrow_mut();
        let life = ledger.life;
        let attempt = &mut ledger.attempts[number];
        attempt.reporting = false;
        if outcome == ReportOutcome::Done {
            attempt.reported_in = Some(life);
        }
        outcome
    }

    /// Between two turns of the driver.
    pub fn look_at(&self, session: &Session<Cursor>, now: Now) {
        let (messages, bytes) = session.in_flight();
        assert!(messages <= WINDOW_MESSAGES, "{messages} messages in flight");
        let fits = bytes <= WINDOW_BYTES || messages == 1;
        assert!(fits, "{messages} messages of {bytes} bytes in flight");
        assert!(session.tasks().waiting() <= TASK_QUEUE_MAX);
        let due = session.next_deadline(now);
        assert!(
            due.is_none_or(|at| at > now),
            "woken again at once, without an end"
        );
        let since = match (session.link_state(), self.active_since.get()) {
            (LinkState::Active, None) => Some(self.time.now()),
            (LinkState::Active, since) => since,
            _ => None,
        };
        self.active_since.set(since);
        if since.is_none() {
            self.flight.borrow_mut().clear();
        }
        let turns = match self.turns.get() {
            (at, turns) if at == self.time.now() => turns + 1,
            _ => 0,
        };
        assert!(turns < TURNS_AT_ONCE_MAX, "a busy loop");
        self.turns.set((self.time.now(), turns));
    }

    /// The session lets this message go.
    pub fn sends(&self, message: &Candidate<Cursor>) {
        self.dropped.borrow().check(message);
        self.flight.borrow_mut().sends(message, self.time.now());
    }

    /// The session wants this done.
    pub fn does(&self, effect: &Effect<Cursor>) {
        let mut flight = self.flight.borrow_mut();
        match *effect {
            Effect::Locate { key, stream, from } => flight.withdrawn(key, stream, from),
            Effect::GiveUpStream { key, stream } => flight.withdrawn(key, stream, 1),
            _ => {}
        }
    }

    /// The session has dealt with this frame. What closes it, or comes before its time, does not
    /// count.
    pub fn heard(&self, frame: &str, session: &Session<Cursor>) {
        if session.link_state() != LinkState::Active {
            return;
        }
        let ledger = self.ledger.borrow();
        let Ok(message) = ServerMessage::decode(frame, AGENT_ID) else {
            return;
        };
        let now = self.time.now();
        self.flight.borrow_mut().hears(&message, now);
        self.dropped.borrow_mut().hears(&message, &ledger);
    }

    /// Something was dropped from the store, or could not be: that may be sent again.
    pub fn settled(&self, is_dropped: bool) {
        if !is_dropped {
            self.dropped.borrow_mut().forget();
        }
    }

    /// After a turn of the store.
    pub fn store_has_noted(&self, turn: &Turn, store: &Store) {
        self.dropped
            .borrow_mut()
            .given_up(&turn.given_up, &self.ledger.borrow());
        let mut flight = self.flight.borrow_mut();
        for &(key, stream, sequence) in &turn.acknowledged {
            let is_noted = !store.waits(key, stream, sequence);
            assert!(
                !flight.take_answered(key, Piece::Output(stream, sequence)) || is_noted,
                "the acknowledgement of chunk {sequence} of {stream:?} of {key} is not noted"
            );
        }
    }

    /// Runs a script in the place of a process.
    pub async fn run_process(
        &self,
        spec: &Spec,
        store: &impl OutputStore,
        controls: Controls,
        on_started: impl FnOnce(u32),
    ) -> Ended {
        let begun = self.time.now();
        let (number, script) = {
            let mut ledger = self.ledger.borrow_mut();
            let number = ledger.begin(spec.ids.key());
            (number, ledger.attempts[number].script.clone())
        };
        on_started(1);
        let process = Process {
            outside: self,
            number,
            has_channel: spec.ids.has_result_channel(),
            script: &script,
            stop: &controls.stop,
            stopped: RefCell::new(None),
            ended_at: Cell::new(None),
        };
        let streams = future::zip(
            process.print(Stream::Stdout, store),
            process.print(Stream::Stderr, store),
        );
        let ((out, out_lost), (err, err_lost)) = streams.await;
        let cause = match process.stopped.take() {
            Some(stop) => Cause::Stopped(stop),
            None => Cause::Exited(script.exit_code),
        };
        Ended {
            cause,
            stdout: Tail {
                bytes: ledger::mark(number, b'f', 1).to_vec(),
                truncated: false,
            },
            stderr: Tail::default(),
            last_sequence: [out, err],
            is_cut: false,
            chunks_given_up: out_lost + err_lost,
            wall: self.time.now().saturating_sub(begun),
            usage: Usage::default(),
            out_of_memory: false,
        }
    }
}

struct Process<'a> {
    outside: &'a Outside,
    number: usize,
    has_channel: bool,
    script: &'a ledger::Script,
    stop: &'a Receiver<Stop>,
    stopped: RefCell<Option<Stop>>,
    ended_at: Cell<Option<Duration>>,
}

impl Process<'_> {
    fn is_stopped(&self) -> bool {
        let mut stopped = self.stopped.borrow_mut();
        if stopped.is_none() {
            *stopped = self.stop.try_recv().ok();
        }
        stopped.is_some()
    }

    /// Prints one stream to its end: how many chunks were stored, and how many given up.
    async fn print(&self, stream: Stream, store: &impl OutputStore) -> (u64, u64) {
        let time = &self.outside.time;
        let (mut last, mut given_up) = (0, 0);
        for &(pause_ms, count) in &self.script.prints[stream.index()] {
            time.sleep(Duration::from_millis(pause_ms.into())).await;
            if self.is_stopped() {
                break;
            }
            let mut batch = self.chunks(stream, last + 1, count);
            loop {
                if given_up > 0 {
                    given_up += u64::from(count);
                    break;
                }
                match store.append(stream, last + 1, batch).await {
                    Ok(buffers) => {
                        last += u64::from(count);
                        self.confirmed(stream, last);
                        SPARE.with_borrow_mut(|spare| spare.extend(buffers));
                        break;
                    }
                    Err(refused) => batch = refused,
                }
                let ended = self.ended_at.get();
                if ended.is_some_and(|at| time.now() > at + STORE_GIVE_UP) {
                    given_up += u64::from(count);
                    break;
                }
                time.sleep(STORE_RETRY_DELAY).await;
            }
        }
        if !self.is_stopped() {
            let rest = Duration::from_millis(self.script.ends_after_ms.into());
            time.sleep(rest).await;
        }
        self.ended_at.set(Some(time.now()));
        (last, given_up)
    }

    fn chunks(&self, stream: Stream, first: u64, count: u8) -> ChunkBatch {
        let chunk = |sequence| {
            let spare = SPARE.with_borrow_mut(Vec::pop);
            let mut chunk = spare.unwrap_or_else(|| Chunk::new(ChunkBuffer::new()));
            ledger::fill(&mut chunk, self.number, stream, sequence, self.script.large);
            chunk
        };
        (first..first + u64::from(count)).map(chunk).collect()
    }

    fn confirmed(&self, stream: Stream, last: u64) {
        if self.has_channel && self.outside.results {
            let mut ledger = self.outside.ledger.borrow_mut();
            ledger.attempts[self.number].stored[stream.index()] = last;
        }
    }
}

/// What has become of a final over HTTP when it goes to the socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OtherWay {
    #[default]
    No,
    /// Its report is on its way.
    OnIt,
    /// This life of the agent was told that its report was taken.
    Done,
}

/// What the agent's socket has taken.
pub enum Sent {
    Text { frame: Vec<u8>, way: OtherWay },
    Ping,
    Close,
}

#[derive(Debug)]
pub enum Arrival {
    Text(String),
    Pong,
}

/// The agent's end of a connection.
pub struct Line {
    pub arrivals: Receiver<Arrival>,
    pub socket: Sender<Sent>,
    pub outside: Rc<Outside>,
}

impl FrameReader for Line {
    async fn next(&mut self) -> Result<Incoming, String> {
        match self.arrivals.recv().await {
            Ok(Arrival::Text(text)) => Ok(Incoming::Text(text.into())),
            Ok(Arrival::Pong) => Ok(Incoming::Pong),
            Err(_) => Err("the connection was cut".to_owned()),
        }
    }

    fn says_goodbye(&self) -> bool {
        false
    }
}

impl Line {
    pub fn writer(&self) -> Writer {
        Writer {
            socket: self.socket.clone(),
            outside: self.outside.clone(),
        }
    }
}

/// Control frames go first, as in the real write loop.
pub struct Writer {
    socket: Sender<Sent>,
    outside: Rc<Outside>,
}

impl Writer {
    pub async fn run(self, control: Receiver<Control>, data: Receiver<Vec<u8>>) -> String {
        loop {
            let from_control = async { control.recv().await.ok() };
            let from_data = async { data.recv().await.ok().map(Control::Text) };
            let Some(next) = future::or(from_control, from_data).await else {
                return "both lanes are closed".to_owned();
            };
            let closes = next == Control::Close;
            let sent = match next {
                Control::Text(frame) => {
                    self.check_is_durable(&frame);
                    let way = self.other_way(&frame);
                    Sent::Text { frame, way }
                }
                Control::Ping => Sent::Ping,
                Control::Close => Sent::Close,
            };
            let written = async {
                match self.socket.send(sent).await {
                    Ok(()) => Ok(()),
                    Err(_) => Err("the connection was cut"),
                }
            };
            let late = async {
                self.outside.time.sleep(WRITE_TIMEOUT).await;
                Err("the server does not read")
            };
            if let Err(why) = future::or(written, late).await {
                return why.to_owned();
            }
            if closes {
                return "closed".to_owned();
            }
        }
    }

    /// PROTOCOL.md 4.7: while a report is on its way the final is not sent over the WebSocket. One
    /// that was in the socket before may still arrive: the session ended, and the report began, when
    /// the goodbye was yet to be written behind it.
    fn other_way(&self, frame: &[u8]) -> OtherWay {
        let text = std::str::from_utf8(frame).expect("a text frame");
        let envelope = Envelope::decode(text, AGENT_ID).expect("a valid envelope");
        if envelope.kind != "task.final" {
            return OtherWay::No;
        }
        let ids = envelope.attempt().expect("it names its attempt");
        let ledger = self.outside.ledger.borrow();
        let attempt = &ledger.attempts[ledger.by_name(&ids.task)];
        if attempt.reporting {
            OtherWay::OnIt
        } else if attempt.reported_in == Some(ledger.life) {
            OtherWay::Done
        } else {
            OtherWay::No
        }
    }

    /// PROTOCOL.md 4.1: what goes to the socket would survive a power cut now.
    fn check_is_durable(&self, frame: &[u8]) {
        let mut rest = frame;
        while rest.contains(&b'~') {
            let at = rest.iter().position(|byte| *byte == b'~').unwrap_or(0);
            rest = &rest[at..];
            let mark: &[u8; MARK_BYTES] = rest.first_chunk().expect("marks are whole");
            let is_over = self.outside.ledger.borrow().is_over(mark);
            assert!(
                is_over || self.outside.disk.holds_mark(mark),
                "{} is sent and would not survive a power cut",
                mark.escape_ascii()
            );
            rest = &rest[MARK_BYTES..];
        }
    }
}
