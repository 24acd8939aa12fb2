//! What is around the session: a store that is a list, tasks, a connection, and what is owed to the
//! session. [`effects`](super::effects) carries out what the
//! session wants, and checks that it may want it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::{Choices, INCARNATION};
use crate::ids::{AttemptKey, FinalStatus, Ids, Stream};
use crate::limits::{WINDOW_BYTES, WINDOW_MESSAGES};
use crate::session::delivery::{Candidate, ReadOrder};
use crate::session::reports::WaitingFinal;
use crate::session::{Ack, Now, Origin, Session, Settings};
use crate::wire::agent_message::{Capabilities, FinalPayload, SpoolStatus, UnackedFinal};
use crate::wire::{Hello, Piece, TaskOffer};

pub fn ids(task: &str) -> Ids {
    let attempt = if task == "t4" { "" } else { "a" };
    Ids::new(task, attempt).expect("short names")
}

/// A stored message.
#[derive(Debug)]
pub struct Held {
    pub ids: Ids,
    pub piece: Piece,
    bytes: usize,
    after_hole: bool,
    pub gone: bool,
}

pub struct Running {
    pub ids: Arc<Ids>,
    pub started: bool,
}

/// First sequence held of each stream that waits.
pub type FirstHeld = Vec<(AttemptKey, Stream, u64)>;

/// The store's answer to a read.
pub struct Batch {
    pub candidates: Vec<Candidate<usize>>,
    pub next: usize,
    pub at_end: bool,
}

/// Something that is being dropped from the store.
pub enum Drop {
    Message(AttemptKey, Piece),
    Stream(AttemptKey, Stream),
    Attempt(AttemptKey),
}

pub struct World {
    pub session: Session<usize>,
    pub settings: Settings,
    pub now: Now,
    /// Number of the connection that is dialled or open.
    pub connection: Option<u64>,
    pub(super) connections: u64,
    pub is_open: bool,
    pub hello_id: String,
    /// Over this connection.
    pub hello_sent: bool,
    pub log: Vec<Held>,
    /// Attempts that are not to be recorded anew.
    pub known: HashSet<AttemptKey>,
    pub ended: HashSet<AttemptKey>,
    discarded: HashSet<AttemptKey>,
    pub(super) started: HashSet<AttemptKey>,
    pub running: Vec<Running>,
    pub to_interrupt: Vec<Arc<Ids>>,
    /// What waits for its answer; hellos and written batches with their connection.
    pub hellos: VecDeque<(u64, Hello, FirstHeld)>,
    pub batch: Option<Batch>,
    pub in_writer: VecDeque<u64>,
    pub located: VecDeque<(AttemptKey, Stream, u64, Option<usize>)>,
    pub drops: VecDeque<Drop>,
    pub records: VecDeque<(Box<TaskOffer>, Origin)>,
    pub finals: Option<Vec<WaitingFinal>>,
    pub report: Option<Arc<Ids>>,
    pub polling: bool,
    pub heartbeat: bool,
    pub pings: usize,
    /// What went over this connection.
    pub sent: Vec<(AttemptKey, Piece)>,
    /// Of those, how many the good server has acknowledged.
    pub answered: usize,
    pub(super) names: HashSet<String>,
    /// Finals that the last hello of this connection carried.
    pub(super) in_hello: Vec<AttemptKey>,
    /// The next control frame finds its lane full.
    pub lane_is_full: bool,
}

impl World {
    pub fn new(choices: &mut Choices) -> World {
        let second = Duration::from_secs(1);
        let settings = Settings {
            agent_id: "agent".into(),
            websocket: choices.byte() != 1,
            results: choices.byte() != 1,
            delivery: choices.byte() != 1,
            reconnect_min: second,
            reconnect_max: 60 * second,
            ping_interval: 30 * second,
            fallback_threshold: 30 * second,
            poll_interval: 10 * second,
            heartbeat_interval: 5 * second * u32::from(choices.toss()),
            concurrency: 1 + choices.below(4),
        };
        World {
            session: Session::new(settings.clone(), INCARNATION.into(), 7, Now::ZERO),
            settings,
            now: Now::ZERO,
            connection: None,
            connections: 0,
            is_open: false,
            hello_id: String::new(),
            hello_sent: false,
            log: Vec::new(),
            known: HashSet::new(),
            ended: HashSet::new(),
            discarded: HashSet::new(),
            started: HashSet::new(),
            running: Vec::new(),
            to_interrupt: Vec::new(),
            hellos: VecDeque::new(),
            batch: None,
            in_writer: VecDeque::new(),
            located: VecDeque::new(),
            drops: VecDeque::new(),
            records: VecDeque::new(),
            finals: None,
            report: None,
            polling: false,
            heartbeat: false,
            pings: 0,
            sent: Vec::new(),
            answered: 0,
            names: HashSet::new(),
            in_hello: Vec::new(),
            lane_is_full: false,
        }
    }

    // ---- the store ----------------------------------------------------------------------------

    pub fn held(&self) -> impl Iterator<Item = &Held> {
        self.log.iter().filter(|held| !held.gone)
    }

    pub fn store(&mut self, ids: &Ids, piece: impl Fn(u64) -> Piece, bytes: usize) {
        let key = ids.key();
        let mine = self.log.iter().filter(|held| held.ids.key() == key);
        let (mut last, mut after_hole) = (0, false);
        let stream = lane(piece(1));
        for held in mine {
            if let Piece::Output(_, sequence) = held.piece
                && lane(held.piece) == stream
            {
                (last, after_hole) = (sequence, held.gone && held.after_hole);
            }
        }
        let piece = piece(last + 1);
        let is_final = piece == Piece::Final;
        if self.ended.contains(&key) || (!ids.has_result_channel() && !is_final) {
            return;
        }
        self.known.insert(key);
        if is_final {
            self.ended.insert(key);
        }
        if !self.discarded.contains(&key) {
            self.log.push(Held {
                ids: ids.clone(),
                piece,
                bytes,
                after_hole,
                gone: false,
            });
        }
    }

    fn remove(&mut self, gone: impl Fn(&Held) -> bool) {
        for held in &mut self.log {
            held.gone |= gone(held);
        }
    }

    pub(super) fn acknowledge(&mut self, ack: Ack) {
        self.remove(|held| match (ack, held.piece) {
            (
                Ack::Output {
                    key,
                    stream,
                    sequence,
                    cumulative,
                },
                Piece::Output(on, number),
            ) => {
                let names = number == sequence || (cumulative && number <= sequence);
                held.ids.key() == key && on == stream && names
            }
            (Ack::Final { key }, Piece::Final) => held.ids.key() == key,
            _ => false,
        });
    }

    pub fn forget_final(&mut self, key: AttemptKey) {
        self.remove(|held| held.ids.key() == key && held.piece == Piece::Final);
    }

    pub fn drop_from_store(&mut self, what: &Drop) {
        match *what {
            Drop::Message(key, piece) => {
                self.remove(|held| held.ids.key() == key && held.piece == piece);
            }
            Drop::Stream(key, stream) => {
                for held in &mut self.log {
                    if held.ids.key() == key && lane(held.piece) == Some(stream) {
                        (held.gone, held.after_hole) = (true, true);
                    }
                }
            }
            Drop::Attempt(key) => {
                self.known.insert(key);
                self.discarded.insert(key);
                self.remove(|held| held.ids.key() == key);
            }
        }
    }

    pub(super) fn read(&self, order: &ReadOrder<usize>) -> Batch {
        assert!(order.max_messages > 0 && order.max_messages <= WINDOW_MESSAGES);
        assert!(order.max_bytes > 0 && order.max_bytes <= WINDOW_BYTES);
        let mut batch = Batch {
            candidates: Vec::new(),
            next: self.log.len(),
            at_end: true,
        };
        let mut bytes = 0;
        for (at, held) in self.log.iter().enumerate().skip(order.from) {
            let key = held.ids.key();
            let skipped = order.skip.is_some_and(|(of, stream)| {
                of == key && lane(held.piece).is_none_or(|on| on == stream)
            });
            if held.gone || skipped || !held.ids.has_result_channel() {
                continue;
            }
            let full = batch.candidates.len() == order.max_messages
                || (bytes > 0 && bytes + held.bytes > order.max_bytes);
            if full {
                (batch.next, batch.at_end) = (at, false);
                break;
            }
            bytes += held.bytes;
            batch.candidates.push(Candidate {
                at,
                key,
                piece: held.piece,
                bytes: held.bytes,
                after_hole: held.after_hole,
            });
        }
        batch
    }

    pub(super) fn locate(&self, key: AttemptKey, stream: Stream, from: u64) -> Option<usize> {
        self.log.iter().position(|held| {
            !held.gone
                && held.ids.key() == key
                && matches!(held.piece, Piece::Output(on, n) if on == stream && n >= from)
        })
    }

    pub(super) fn snapshot(&self) -> (Hello, FirstHeld) {
        let finals = self.held().filter(|held| held.piece == Piece::Final);
        let unacked_finals = finals.map(|held| UnackedFinal {
            message_id: "m".into(),
            task_id: held.ids.task.to_string(),
            execution_attempt_id: held.ids.attempt.to_string(),
            result: FinalPayload {
                status: FinalStatus::Completed,
                exit_code: 0,
                output: None,
                error: None,
                output_truncated: false,
                error_truncated: false,
                usage: None,
            },
        });
        let mut first_held = FirstHeld::new();
        for held in self.held() {
            if let Piece::Output(stream, sequence) = held.piece {
                let key = held.ids.key();
                if !first_held.iter().any(|it| (it.0, it.1) == (key, stream)) {
                    first_held.push((key, stream, sequence));
                }
            }
        }
        let hello = Hello {
            client_version: "1".into(),
            capabilities: Capabilities {
                results_enabled: true,
                delivery_enabled: true,
                extensions: vec![],
            },
            running_task: None,
            received_not_started: vec![],
            unacked_finals: unacked_finals.collect(),
            unacked_output: vec![],
            spool_status: SpoolStatus {
                bytes_used: 0,
                byte_cap: 0,
                has_rotated_chunks: false,
                volatile: false,
            },
        };
        (hello, first_held)
    }
}

pub fn lane(piece: Piece) -> Option<Stream> {
    match piece {
        Piece::Output(stream, _) => Some(stream),
        _ => None,
    }
}
