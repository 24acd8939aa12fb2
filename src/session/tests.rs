//! The session against a scripted server and a store that is a list, in virtual time.

mod found_by_simulation;
mod network_return;
mod rare_orders;
mod simulation;

use std::collections::HashSet;

use super::*;
use crate::limits::{ACK_TIMEOUT, GAP_ROUND, WINDOW_STREAM_MESSAGES};
use crate::wire::agent_message::{Capabilities, SpoolStatus};
use crate::wire::server_message::{self, OUTPUT_SEQUENCE_GAP, OutputReplay, ServerError};
use crate::wire::{HelloAck, MessageId, ServerMessage};

const INCARNATION: &str = "0123456789abcdef";
const SECOND: Duration = Duration::from_secs(1);

fn settings() -> Settings {
    Settings {
        agent_id: "agent".into(),
        websocket: true,
        results: true,
        delivery: true,
        reconnect_min: SECOND,
        reconnect_max: 60 * SECOND,
        ping_interval: 30 * SECOND,
        fallback_threshold: 30 * SECOND,
        poll_interval: 10 * SECOND,
        heartbeat_interval: Duration::ZERO,
        concurrency: 1,
    }
}

fn key(name: &str) -> AttemptKey {
    AttemptKey::of(name, "a")
}

fn ids(name: &str) -> Arc<Ids> {
    Arc::new(Ids::new(name, "a").expect("short"))
}

/// A stored message: its attempt and piece.
type Stored = (AttemptKey, Piece);

/// The session, a list as its store, and everything it asked for.
struct Bench {
    session: Session<usize>,
    now: Now,
    log: Vec<Stored>,
    acked: HashSet<Stored>,
    /// What went to the server: attempt, piece, flagged as truncated.
    sent: Vec<(AttemptKey, Piece, bool)>,
    effects: Vec<Effect<usize>>,
    /// Streams of which chunks were given up: the next one follows a hole.
    holes: Vec<(AttemptKey, Stream)>,
    /// Payload of a message.
    bytes: fn(Piece) -> usize,
    /// Batches that the writer holds; `None`: it writes at once.
    in_writer: Option<usize>,
    poll_fails: bool,
    /// What the store's snapshot gives.
    hello: Hello,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            session: Session::new(settings(), INCARNATION.into(), 7, Now::ZERO),
            now: Now::ZERO,
            log: Vec::new(),
            acked: HashSet::new(),
            sent: Vec::new(),
            effects: Vec::new(),
            holes: Vec::new(),
            bytes: |_| 100,
            in_writer: None,
            poll_fails: false,
            hello: Bench::hello(),
        }
    }

    fn connected() -> Bench {
        let mut bench = Bench::new();
        bench.connect(HelloAck::default());
        bench
    }

    fn connect(&mut self, ack: HelloAck) {
        while self.session.link_state() != LinkState::Connecting {
            self.advance(SECOND);
        }
        self.session.connected(self.now);
        self.run();
        self.acknowledge_hello(ack);
    }

    fn acknowledge_hello(&mut self, ack: HelloAck) {
        let hello_id = self.effects.iter().rev().find_map(|effect| match effect {
            Effect::SendHello { message_id, .. } => Some(message_id.clone()),
            _ => None,
        });
        self.say(ServerMessage::HelloAck(Box::new(HelloAck {
            acked_message_id: hello_id.expect("a hello was sent"),
            acked_type: "agent.hello".into(),
            delivery_enabled: true,
            ..ack
        })));
        assert_eq!(self.session.link_state(), LinkState::Active);
    }

    fn hello() -> Hello {
        Hello {
            client_version: "1".into(),
            capabilities: Capabilities {
                results_enabled: true,
                delivery_enabled: true,
                extensions: vec![],
            },
            running_task: None,
            received_not_started: vec![],
            unacked_finals: vec![],
            unacked_output: vec![],
            spool_status: SpoolStatus {
                bytes_used: 0,
                byte_cap: 0,
                has_rotated_chunks: false,
                volatile: false,
            },
        }
    }

    fn advance(&mut self, by: Duration) {
        self.now += by;
        self.run();
    }

    fn say(&mut self, message: ServerMessage) {
        self.session.received(Ok(message), self.now);
        self.run();
    }

    /// Carries out what the session wants, as an agent with a perfect store would.
    fn run(&mut self) {
        while let Some(effect) = self.session.next_effect(self.now) {
            match &effect {
                Effect::PrepareHello => {
                    let first_held = self.first_held();
                    self.session.hello_ready(self.hello.clone(), first_held);
                }
                Effect::Read(order) => self.read(*order),
                Effect::Locate { key, stream, from } => {
                    let at = self.log.iter().position(|&(of, piece)| {
                        matches!(piece, Piece::Output(on, sequence)
                            if of == *key && on == *stream && sequence >= *from)
                            && !self.acked.contains(&(of, piece))
                    });
                    self.session.located(*key, *stream, *from, at, self.now);
                }
                Effect::Acknowledge(acks) => {
                    for ack in acks.iter() {
                        self.acknowledge(*ack);
                    }
                }
                Effect::Reject { key, piece } => {
                    self.acked.insert((*key, *piece));
                    self.session.settled(true);
                }
                Effect::GiveUpStream { key, stream } => {
                    self.holes.push((*key, *stream));
                    let dropped = self.log.iter().copied().filter(|(of, piece)| {
                        of == key && matches!(piece, Piece::Output(on, _) if on == stream)
                    });
                    self.acked.extend(dropped);
                    self.session.settled(true);
                }
                Effect::Discard(_) => self.session.settled(true),
                Effect::Poll => {
                    let failed = self.poll_fails.then_some(None);
                    self.session.polled(failed, self.now);
                }
                Effect::ListFinals => self.session.finals_listed(&[]),
                _ => {}
            }
            self.effects.push(effect);
        }
    }

    fn read(&mut self, order: ReadOrder<usize>) {
        let held: Vec<_> = (order.from..self.log.len())
            .map(|at| (at, self.log[at]))
            .filter(|(_, stored)| !self.acked.contains(stored))
            .filter(|(_, (of, piece))| match (order.skip, piece) {
                (Some((key, stream)), Piece::Output(on, _)) => (key, stream) != (*of, *on),
                (Some((key, _)), _) => key != *of,
                (None, _) => true,
            })
            .take(order.max_messages)
            .collect();
        let next = held.last().map_or(self.log.len(), |(at, _)| at + 1);
        let candidates = held.iter().map(|&(at, (key, piece))| Candidate {
            at,
            key,
            piece,
            bytes: (self.bytes)(piece),
            after_hole: match piece {
                Piece::Output(stream, _) => self.holes.contains(&(key, stream)),
                _ => false,
            },
        });
        let admission = self
            .session
            .batch_read(candidates, next, next == self.log.len(), self.now);
        for admitted in &admission {
            let (_, (key, piece)) = held[admitted.index];
            self.sent.push((key, piece, admitted.truncated));
        }
        if !admission.is_empty() {
            match &mut self.in_writer {
                Some(batches) => *batches += 1,
                None => self.session.transmitted(),
            }
        }
    }

    fn acknowledge(&mut self, ack: Ack) {
        match ack {
            Ack::Final { key } => {
                self.acked.insert((key, Piece::Final));
            }
            Ack::Output {
                key,
                stream,
                sequence,
                cumulative,
            } => {
                let first = if cumulative { 1 } else { sequence };
                self.acked
                    .extend((first..=sequence).map(|n| (key, Piece::Output(stream, n))));
            }
        }
    }

    fn first_held(&self) -> Vec<(AttemptKey, Stream, u64)> {
        let mut first: Vec<(AttemptKey, Stream, u64)> = Vec::new();
        for &(key, piece) in &self.log {
            if let Piece::Output(stream, sequence) = piece
                && !self.acked.contains(&(key, piece))
                && !first.iter().any(|&(of, on, _)| (of, on) == (key, stream))
            {
                first.push((key, stream, sequence));
            }
        }
        first
    }

    fn store(&mut self, name: &str, sequences: impl Iterator<Item = u64>) {
        self.log
            .extend(sequences.map(|n| (key(name), Piece::Output(Stream::Stdout, n))));
        self.session.appended();
        self.run();
    }

    fn store_final(&mut self, name: &str) {
        self.log.push((key(name), Piece::Final));
        self.session.final_stored();
        self.run();
    }

    fn id(name: &str, piece: Piece) -> String {
        MessageId {
            incarnation: INCARNATION,
            key: key(name),
            piece,
        }
        .to_string()
    }

    fn ack(&mut self, name: &str, sequence: u64, through: Option<u64>) {
        self.say(ServerMessage::Ack(server_message::Ack {
            acked_message_id: Bench::id(name, Piece::Output(Stream::Stdout, sequence)),
            acked_type: "task.output".into(),
            task_id: None,
            execution_attempt_id: None,
            highest_output_sequence: through,
        }));
    }

    fn gap(&mut self, name: &str, related: u64, highest: u64) {
        self.error(
            true,
            OUTPUT_SEQUENCE_GAP,
            Some(Bench::id(name, Piece::Output(Stream::Stdout, related))),
            Some(highest),
        );
    }

    fn error(
        &mut self,
        retryable: bool,
        code: &str,
        related_message_id: Option<String>,
        highest_accepted_sequence: Option<u64>,
    ) {
        self.say(ServerMessage::Error(ServerError {
            code: code.into(),
            message: "test".into(),
            retryable,
            related_message_id,
            highest_accepted_sequence,
        }));
    }

    /// Sequences of stdout sent for an attempt, since the last call of [`Bench::forget`].
    fn sequences(&self, name: &str) -> Vec<u64> {
        self.sent
            .iter()
            .filter_map(|&(of, piece, _)| match piece {
                Piece::Output(Stream::Stdout, sequence) if of == key(name) => Some(sequence),
                _ => None,
            })
            .collect()
    }

    fn forget(&mut self) {
        self.sent.clear();
        self.effects.clear();
    }

    fn has(&self, wanted: impl Fn(&Effect<usize>) -> bool) -> bool {
        self.effects.iter().any(wanted)
    }
}

#[test]
fn a_window_is_filled_and_no_more_and_half_is_for_one_stream() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=200);
    assert_eq!(bench.sequences("t").len(), WINDOW_STREAM_MESSAGES);
    bench.ack("t", 20, Some(20));
    let sent = bench.sequences("t");
    assert_eq!(sent, (1..=sent.len() as u64).collect::<Vec<_>>());
    assert!(sent.len() > WINDOW_STREAM_MESSAGES);
}

#[test]
fn a_stalled_stream_is_passed_over_and_comes_back() {
    let mut bench = Bench::connected();
    bench.store("stalled", 1..=50);
    bench.store_final("stalled");
    bench.store("other", 1..=3);
    assert!(bench.sequences("other").is_empty());
    bench.advance(SECOND);
    assert_eq!(bench.sequences("other"), [1, 2, 3]);
    assert!(!bench.sent.contains(&(key("stalled"), Piece::Final, false)));
    bench.ack("stalled", 32, Some(32));
    assert_eq!(bench.sequences("stalled"), (1..=50).collect::<Vec<_>>());
    assert_eq!(
        bench.sent.last(),
        Some(&(key("stalled"), Piece::Final, false))
    );
    assert_eq!(
        bench.sequences("other"),
        [1, 2, 3],
        "in flight, not sent again"
    );
}

#[test]
fn after_a_reconnect_everything_unacknowledged_comes_again_in_order() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=5);
    bench.ack("t", 2, None);
    bench.session.disconnected("cut", bench.now);
    bench.forget();
    bench.store("t", 6..=7);
    assert_eq!(bench.sent, []);
    bench.connect(HelloAck::default());
    assert_eq!(bench.sequences("t"), [1, 3, 4, 5, 6, 7]);
}

#[test]
fn a_gap_is_sent_again_once_however_often_it_is_reported() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=6);
    bench.ack("t", 2, Some(2));
    bench.forget();
    // One report for each chunk that followed the lost one, all caused by the first copies.
    for related in 4..=6 {
        bench.gap("t", related, 2);
    }
    assert_eq!(bench.sequences("t"), [3, 4, 5, 6]);
    bench.ack("t", 6, Some(6));
    bench.advance(GAP_ROUND);
    assert_eq!(bench.sequences("t"), [3, 4, 5, 6]);
}

#[test]
fn the_same_gap_reported_three_times_gives_the_stream_up_and_the_final_goes() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=4);
    bench.store_final("t");
    bench.store("next", 1..=1);
    bench.gap("t", 2, 0);
    bench.advance(GAP_ROUND);
    bench.gap("t", 2, 0);
    bench.advance(GAP_ROUND);
    assert!(!bench.has(|effect| matches!(effect, Effect::GiveUpStream { .. })));
    bench.gap("t", 2, 0);
    bench.advance(GAP_ROUND);
    assert!(bench.has(|effect| matches!(effect, Effect::GiveUpStream { .. })));
    assert_eq!(bench.sequences("t"), [1, 2, 3, 4].repeat(3));
    assert!(bench.sent.contains(&(key("t"), Piece::Final, false)));
    assert_eq!(bench.sequences("next"), [1]);
}

#[test]
fn a_gap_before_what_is_held_is_answered_with_a_flagged_jump() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=5);
    bench.ack("t", 3, Some(3));
    bench.forget();
    bench.gap("t", 4, 1);
    let flags: Vec<_> = bench.sent.iter().map(|&(_, _, flag)| flag).collect();
    assert_eq!(bench.sequences("t"), [4, 5]);
    assert_eq!(flags, [true, false]);
}

#[test]
fn unacknowledged_messages_are_sent_again_once_then_the_session_ends() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=3);
    bench.advance(ACK_TIMEOUT - SECOND);
    bench.session.heard(bench.now);
    assert_eq!(bench.sequences("t"), [1, 2, 3]);
    bench.advance(SECOND);
    assert_eq!(bench.sequences("t"), [1, 2, 3, 1, 2, 3]);
    bench.session.heard(bench.now);
    bench.advance(ACK_TIMEOUT / 2);
    bench.session.heard(bench.now);
    bench.advance(ACK_TIMEOUT / 2);
    assert_ne!(bench.session.link_state(), LinkState::Active);
    assert!(bench.has(|effect| matches!(effect, Effect::Close)));
}

#[test]
fn a_stream_without_progress_in_three_sessions_is_given_up() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=2);
    for session in 0..3 {
        assert!(
            !bench.has(|effect| matches!(effect, Effect::GiveUpStream { .. })),
            "{session}"
        );
        while bench.session.link_state() == LinkState::Active {
            bench.session.heard(bench.now);
            bench.advance(SECOND);
        }
        bench.connect(HelloAck::default());
    }
    assert!(bench.has(|effect| matches!(effect, Effect::GiveUpStream { .. })));
}

#[test]
fn a_poisoned_message_is_removed_and_the_session_goes_on() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=3);
    let poisoned = Piece::Output(Stream::Stdout, 2);
    bench.error(false, "invalid", Some(Bench::id("t", poisoned)), None);
    assert_eq!(bench.session.link_state(), LinkState::Active);
    assert!(bench.has(|effect| matches!(effect,
        Effect::Reject { piece, .. } if *piece == poisoned)));
    bench.error(false, "fatal", None, None);
    assert_ne!(bench.session.link_state(), LinkState::Active);
}

#[test]
fn a_retryable_error_keeps_the_session_and_repeats_later() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=3);
    let related = Bench::id("t", Piece::Output(Stream::Stdout, 2));
    bench.error(true, "busy", Some(related), None);
    bench.ack("t", 1, None);
    bench.ack("t", 3, None);
    bench.forget();
    bench.session.heard(bench.now);
    bench.advance(ACK_TIMEOUT);
    assert_eq!(bench.session.link_state(), LinkState::Active);
    assert_eq!(bench.sequences("t"), [2]);
}

#[test]
fn replay_directives_acknowledge_and_flag() {
    let mut bench = Bench::new();
    bench.store("held", 1..=5);
    bench.store("rotated", 4..=6);
    let replay = |name: &str, next_sequence| OutputReplay {
        task_id: name.into(),
        execution_attempt_id: "a".into(),
        stream: Stream::Stdout,
        next_sequence,
    };
    bench.connect(HelloAck {
        output_replay: Some(vec![replay("held", 3), replay("rotated", 2)]),
        ..HelloAck::default()
    });
    assert_eq!(bench.sequences("held"), [3, 4, 5]);
    let rotated: Vec<_> = bench
        .sent
        .iter()
        .filter(|sent| sent.0 == key("rotated"))
        .collect();
    assert!(rotated[0].2, "the jump from 2 to 4 is flagged");
    assert!(!rotated[1].2);
}

#[test]
fn a_hello_ack_for_another_hello_ends_the_handshake() {
    let mut bench = Bench::new();
    while bench.session.link_state() != LinkState::Connecting {
        bench.advance(SECOND);
    }
    bench.session.connected(bench.now);
    bench.run();
    bench.say(ServerMessage::HelloAck(Box::new(HelloAck {
        acked_message_id: "other".into(),
        acked_type: "agent.hello".into(),
        ..HelloAck::default()
    })));
    assert_eq!(bench.session.link_state(), LinkState::Down);
}

#[test]
fn polling_pauses_while_tasks_are_delivered_and_resumes() {
    let mut bench = Bench::new();
    let polls = |bench: &Bench| {
        let is_poll = |effect: &&Effect<usize>| matches!(effect, Effect::Poll);
        bench.effects.iter().filter(is_poll).count()
    };
    bench.run();
    assert_eq!(polls(&bench), 1, "polling runs from the start");
    bench.connect(HelloAck::default());
    bench.forget();
    for _ in 0..20 {
        bench.session.heard(bench.now);
        bench.advance(SECOND);
    }
    assert_eq!(polls(&bench), 0);
    bench.session.disconnected("cut", bench.now);
    bench.advance(29 * SECOND);
    assert_eq!(polls(&bench), 0);
    bench.advance(SECOND);
    assert_eq!(polls(&bench), 1);
}

#[test]
fn a_final_that_is_being_reported_is_kept_from_the_websocket() {
    let mut bench = Bench::new();
    bench.log.push((key("t"), Piece::Final));
    let waiting = WaitingFinal {
        ids: ids("t"),
        key: key("t"),
        output_waits: false,
    };
    bench.session.finals_listed(std::slice::from_ref(&waiting));
    bench.connect(HelloAck::default());
    bench.store("other", 1..=1);
    assert_eq!(bench.sequences("other"), [1]);
    assert!(!bench.sent.contains(&(key("t"), Piece::Final, false)));
    let retry = ReportResult::Retry {
        after: None,
        why: "503".into(),
    };
    bench.session.reported(&ids("t"), &retry, bench.now);
    bench.run();
    assert!(bench.sent.contains(&(key("t"), Piece::Final, false)));
}

#[test]
fn a_repeated_delivery_is_answered_by_what_is_known() {
    let mut bench = Bench::connected();
    let task = || QueuedTask {
        ids: ids("t"),
        priority: 0,
        timeout_seconds: None,
    };
    let mut answer = |outcome, delivered| {
        bench.forget();
        let origin = Origin {
            delivered,
            command_bytes: 4,
        };
        bench.session.recorded(task(), outcome, origin, bench.now);
        bench.run();
        let started = bench.has(|effect| matches!(effect, Effect::Start(_)));
        let words: Vec<_> = bench
            .effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::SendReceived(_) => Some("received"),
                Effect::SendStarted(_) => Some("started"),
                Effect::SendFinalAgain(_) => Some("final"),
                _ => None,
            })
            .collect();
        (words, started)
    };
    assert_eq!(answer(Recorded::New, true), (vec!["received"], true));
    assert_eq!(answer(Recorded::Received, true), (vec!["received"], false));
    assert_eq!(answer(Recorded::Started, true), (vec!["started"], false));
    let held = Recorded::Finished { held: true };
    assert_eq!(answer(held, true), (vec![], false));
    let gone = Recorded::Finished { held: false };
    assert_eq!(answer(gone, true), (vec!["final"], false));
    assert_eq!(
        answer(gone, false),
        (vec![], false),
        "a poll is not answered"
    );
    assert_eq!(answer(Recorded::NoRoom, true), (vec![], false));
}

#[test]
fn a_server_that_is_silent_after_a_ping_is_left() {
    let mut bench = Bench::connected();
    bench.advance(30 * SECOND);
    assert!(bench.has(|effect| matches!(effect, Effect::Ping)));
    bench.advance(19 * SECOND);
    assert_eq!(bench.session.link_state(), LinkState::Active);
    bench.advance(SECOND);
    assert_ne!(bench.session.link_state(), LinkState::Active);
}

#[test]
fn deadlines_never_lie_in_the_past_once_everything_due_is_done() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=100);
    for _ in 0..500 {
        bench.run();
        if let Some(deadline) = bench.session.next_deadline(bench.now) {
            assert!(deadline > bench.now, "a busy loop at {:?}", bench.now);
            bench.now = deadline;
        }
        if bench.session.link_state() == LinkState::Connecting {
            bench.connect(HelloAck::default());
        }
    }
}
