//! The record of everything that the server saw and said, in order, and questions about it.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::{Duration, Instant};

use hostlink_edge::ids::{FinalStatus, Ids, Stream};
use hostlink_edge::wire::agent_message::ReceivedMessage;
use hostlink_edge::wire::http::{ReceivedReport, RegisterRequest};
use hostlink_edge::wire::{FinalPayload, Hello};

/// Longer frames are kept decoded only.
const RAW_BYTES_KEPT: usize = 4096;
const TIMELINE_ENTRIES: usize = 250;
const TIMELINE_CHARS: usize = 260;

/// One frame of the agent.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Number of the connection, from 1.
    pub conn: usize,
    pub message_id: String,
    pub kind: String,
    pub message: ReceivedMessage,
    /// The text as received, cut at 4 KiB.
    pub raw: String,
}

impl Frame {
    pub fn new(conn: usize, message_id: &str, message: ReceivedMessage, raw: &str) -> Frame {
        let kind = match &message {
            ReceivedMessage::Hello(_) => "agent.hello",
            ReceivedMessage::Received(_) => "task.received",
            ReceivedMessage::Started(_) => "task.started",
            ReceivedMessage::Output { .. } => "task.output",
            ReceivedMessage::Final { .. } => "task.final",
            ReceivedMessage::LeaseHeartbeat(_) => "task.lease_heartbeat",
            ReceivedMessage::Unknown(kind) => kind,
        };
        Frame {
            conn,
            message_id: message_id.to_owned(),
            kind: kind.to_owned(),
            raw: raw.chars().take(RAW_BYTES_KEPT).collect(),
            message,
        }
    }

    pub fn ids(&self) -> Option<&Ids> {
        match &self.message {
            ReceivedMessage::Received(ids)
            | ReceivedMessage::Started(ids)
            | ReceivedMessage::Output { ids, .. }
            | ReceivedMessage::Final { ids, .. }
            | ReceivedMessage::LeaseHeartbeat(ids) => Some(ids),
            ReceivedMessage::Hello(_) | ReceivedMessage::Unknown(_) => None,
        }
    }

    pub fn is_about(&self, kind: &str, ids: &Ids) -> bool {
        self.kind == kind && self.ids() == Some(ids)
    }

    pub fn hello(&self) -> Option<&Hello> {
        match &self.message {
            ReceivedMessage::Hello(hello) => Some(hello),
            _ => None,
        }
    }

    pub fn result(&self) -> Option<&FinalPayload<String>> {
        match &self.message {
            ReceivedMessage::Final { result, .. } => Some(result),
            _ => None,
        }
    }

    /// Stream, sequence and text of an output chunk.
    pub fn output(&self) -> Option<(Stream, u64, &str)> {
        match &self.message {
            ReceivedMessage::Output {
                sequence, output, ..
            } => Some((output.stream, *sequence, &output.data)),
            _ => None,
        }
    }

    pub fn sequence(&self) -> Option<u64> {
        self.output().map(|(_, sequence, _)| sequence)
    }
}

#[derive(Debug)]
pub enum Event {
    Registration {
        request: Box<RegisterRequest>,
        status: u16,
    },
    /// A request whose signature, time or agent was not accepted.
    Unauthorized {
        path: String,
        why: String,
    },
    Poll,
    Heartbeat,
    Report {
        task_id: String,
        report: ReceivedReport,
    },
    ReportAnswered {
        task_id: String,
        status: u16,
    },
    UpgradeRefused {
        status: u16,
    },
    Opened {
        conn: usize,
    },
    Frame(Box<Frame>),
    Sent {
        conn: usize,
        text: String,
    },
    Closed {
        conn: usize,
        why: String,
    },
    /// The agent broke a rule of PROTOCOL.md.
    Broken(String),
    /// A remark of the test.
    Note(String),
}

/// One line of the timeline.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Registration { request, status } => {
                let fingerprint = &request.fingerprint;
                write!(f, "registration of {fingerprint}: {status}")
            }
            Event::Unauthorized { path, why } => write!(f, "401 for {path}: {why}"),
            Event::Poll => f.write_str("poll"),
            Event::Heartbeat => f.write_str("heartbeat"),
            Event::Report { task_id, report } => write!(f, "report of {task_id}: {report:?}"),
            Event::ReportAnswered { task_id, status } => {
                write!(f, "report of {task_id} was answered {status}")
            }
            Event::UpgradeRefused { status } => write!(f, "upgrade refused with {status}"),
            Event::Opened { conn } => write!(f, "connection {conn} opened"),
            Event::Frame(frame) => write!(f, "<- [{}] {}", frame.conn, frame.raw),
            Event::Sent { conn, text } => write!(f, "-> [{conn}] {text}"),
            Event::Closed { conn, why } => write!(f, "connection {conn} closed: {why}"),
            Event::Broken(rule) => write!(f, "BROKEN RULE: {rule}"),
            Event::Note(text) => write!(f, "# {text}"),
        }
    }
}

#[derive(Debug)]
pub struct Entry {
    /// Since the server started.
    pub at: Duration,
    pub event: Event,
}

/// How an attempt ended, whichever way the server was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub status: FinalStatus,
    pub exit_code: i32,
    pub output: String,
    pub error: String,
}

impl End {
    /// A report knows no `interrupted`: its error says so (PROTOCOL.md 2, Report).
    fn reported(report: &ReceivedReport) -> End {
        let error = report.error.clone().unwrap_or_default();
        let status = match report.status.as_str() {
            "completed" => FinalStatus::Completed,
            _ if error.contains("interrupted") => FinalStatus::Interrupted,
            _ => FinalStatus::Failed,
        };
        End {
            status,
            exit_code: report.exit_code,
            output: report.output.clone().unwrap_or_default(),
            error,
        }
    }
}

pub struct Log {
    started: Instant,
    pub entries: Vec<Entry>,
}

impl Log {
    pub fn new() -> Log {
        Log {
            started: Instant::now(),
            entries: Vec::new(),
        }
    }

    pub fn push(&mut self, event: Event) {
        let at = self.started.elapsed();
        self.entries.push(Entry { at, event });
    }

    /// Position of the next entry: with [`Log::after`] a mark for "from now on".
    pub fn mark(&self) -> usize {
        self.entries.len()
    }

    pub fn after(&self, mark: usize) -> impl Iterator<Item = &Event> {
        self.entries[mark..].iter().map(|entry| &entry.event)
    }

    pub fn frames(&self) -> impl DoubleEndedIterator<Item = &Frame> {
        self.entries.iter().filter_map(|entry| match &entry.event {
            Event::Frame(frame) => Some(frame.as_ref()),
            _ => None,
        })
    }

    pub fn frames_after(&self, mark: usize) -> impl Iterator<Item = &Frame> {
        self.after(mark).filter_map(|event| match event {
            Event::Frame(frame) => Some(frame.as_ref()),
            _ => None,
        })
    }

    pub fn frames_of(&self, kind: &str, ids: &Ids) -> Vec<&Frame> {
        self.frames().filter(|f| f.is_about(kind, ids)).collect()
    }

    pub fn has(&self, kind: &str, ids: &Ids) -> bool {
        self.frames().any(|frame| frame.is_about(kind, ids))
    }

    pub fn first_final(&self, ids: &Ids) -> Option<&Frame> {
        self.frames().find(|f| f.is_about("task.final", ids))
    }

    /// Chunks of one stream as they came, repeats included.
    pub fn chunks(&self, ids: &Ids, stream: Stream) -> Vec<&Frame> {
        self.frames()
            .filter(|frame| frame.ids() == Some(ids))
            .filter(|frame| frame.output().is_some_and(|(of, _, _)| of == stream))
            .collect()
    }

    /// Text of one stream, each sequence once. Fails on a hole.
    pub fn text(&self, ids: &Ids, stream: Stream) -> String {
        let mut chunks = BTreeMap::new();
        for frame in self.chunks(ids, stream) {
            if let Some((_, sequence, data)) = frame.output() {
                chunks.entry(sequence).or_insert(data);
            }
        }
        let sequences: Vec<u64> = chunks.keys().copied().collect();
        let expected: Vec<u64> = (1..=sequences.len() as u64).collect();
        assert!(
            sequences == expected,
            "stream {} of {ids} has a hole: got sequences {sequences:?}",
            stream.as_str()
        );
        chunks.into_values().collect()
    }

    pub fn stdout(&self, ids: &Ids) -> String {
        self.text(ids, Stream::Stdout)
    }

    pub fn stderr(&self, ids: &Ids) -> String {
        self.text(ids, Stream::Stderr)
    }

    /// How an attempt ended, by `task.final` or by a report that was taken, whichever came first.
    pub fn end(&self, ids: &Ids) -> Option<End> {
        let mut report = None;
        for entry in &self.entries {
            match &entry.event {
                Event::Frame(frame) if frame.ids() == Some(ids) => {
                    if let Some(result) = frame.result() {
                        return Some(End {
                            status: result.status,
                            exit_code: result.exit_code,
                            output: result.output.clone().unwrap_or_default(),
                            error: result.error.clone().unwrap_or_default(),
                        });
                    }
                }
                Event::Report {
                    task_id,
                    report: body,
                } if *task_id == *ids.task => {
                    report = Some(End::reported(body));
                }
                Event::ReportAnswered {
                    task_id,
                    status: 200,
                } if *task_id == *ids.task => return report,
                _ => {}
            }
        }
        None
    }

    pub fn hello(&self, conn: usize) -> Option<&Hello> {
        self.frames()
            .find(|frame| frame.conn == conn && frame.hello().is_some())
            .and_then(Frame::hello)
    }

    pub fn connections(&self) -> usize {
        self.count(|event| matches!(event, Event::Opened { .. }))
    }

    pub fn is_closed(&self, connection: usize) -> bool {
        let closed =
            |event: &Event| matches!(event, Event::Closed { conn, .. } if *conn == connection);
        self.entries.iter().any(|entry| closed(&entry.event))
    }

    pub fn count(&self, wanted: impl Fn(&Event) -> bool) -> usize {
        self.entries.iter().filter(|e| wanted(&e.event)).count()
    }

    pub fn reports(&self, ids: &Ids) -> Vec<&ReceivedReport> {
        self.entries
            .iter()
            .filter_map(|entry| match &entry.event {
                Event::Report { task_id, report } if *task_id == *ids.task => Some(report),
                _ => None,
            })
            .collect()
    }

    /// When each event of a kind happened, since the start.
    pub fn times(&self, wanted: impl Fn(&Event) -> bool) -> Vec<Duration> {
        let entries = self.entries.iter().filter(|e| wanted(&e.event));
        entries.map(|entry| entry.at).collect()
    }

    pub fn broken(&self) -> Option<&str> {
        self.entries.iter().find_map(|entry| match &entry.event {
            Event::Broken(rule) => Some(rule.as_str()),
            _ => None,
        })
    }

    /// The last entries, one a line, for a failure message.
    pub fn timeline(&self) -> String {
        let left_out = self.entries.len().saturating_sub(TIMELINE_ENTRIES);
        let mut text = format!("--- server timeline ({left_out} older entries left out)\n");
        for (order, entry) in self.entries.iter().enumerate().skip(left_out) {
            let line: String = entry
                .event
                .to_string()
                .chars()
                .take(TIMELINE_CHARS)
                .collect();
            let at = entry.at.as_secs_f64();
            writeln!(text, "{order:5} {at:8.3} {line}").expect("a string takes all writes");
        }
        text
    }
}
