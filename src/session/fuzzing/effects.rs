//! Carries out what the session wants, and checks that it may want it.

use super::world::{Drop, Running, World, lane};
use crate::ids::AttemptKey;
use crate::limits::{
    BATCHES_IN_WRITER, REASON_BYTES_MAX, TASK_QUEUE_MAX, WINDOW_BYTES, WINDOW_MESSAGES,
};
use crate::session::reports::WaitingFinal;
use crate::session::{Effect, LinkState};
use crate::wire::{Hello, Piece};

/// More effects than this in one turn are a loop without end.
const EFFECTS_PER_TURN_MAX: usize = 20_000;

impl World {
    /// One turn of the driver: everything that the session wants now.
    pub fn drain(&mut self) {
        for _ in 0..EFFECTS_PER_TURN_MAX {
            let Some(effect) = self.session.next_effect(self.now) else {
                return self.check();
            };
            self.carry_out(effect);
        }
        panic!("effects without end");
    }

    fn carry_out(&mut self, effect: Effect<usize>) {
        match effect {
            Effect::Dial => {
                assert!(self.settings.websocket, "the WebSocket is off");
                assert_eq!(self.connection, None, "dialled twice");
                self.connections += 1;
                self.connection = Some(self.connections);
            }
            Effect::Close => self.connection_is_gone(),
            Effect::Ping => {
                self.control_frame();
                self.pings += 1;
            }
            Effect::PrepareHello => {
                let (hello, first_held) = self.snapshot();
                if let Some(number) = self.connection {
                    self.hellos.push_back((number, hello, first_held));
                }
            }
            Effect::SendHello { hello, message_id } => self.hello(&hello, message_id),
            Effect::SendReceived(ids) | Effect::SendStarted(ids) => {
                assert!(ids.has_result_channel(), "a word without a channel");
                self.control_frame();
            }
            Effect::SendLease(ids, message_id) => {
                assert!(self.running.iter().any(|task| task.ids == ids));
                assert!(self.names.insert(message_id), "a name twice");
                self.control_frame();
            }
            Effect::SendFinalAgain(_) => {}
            Effect::Read(order) => {
                assert!(self.batch.is_none(), "read twice");
                assert_eq!(self.session.link_state(), LinkState::Active);
                assert!(self.settings.results, "results are off");
                assert!(self.drops.is_empty(), "read while something is dropped");
                self.batch = Some(self.read(&order));
            }
            Effect::Locate { key, stream, from } => {
                let at = self.locate(key, stream, from);
                self.located.push_back((key, stream, from, at));
            }
            Effect::Acknowledge(acks) => {
                assert!(!acks.is_empty());
                for ack in acks.iter() {
                    self.acknowledge(*ack);
                }
            }
            Effect::Reject { key, piece } => {
                assert!(matches!(piece, Piece::Output(..) | Piece::Final));
                self.drops.push_back(Drop::Message(key, piece));
            }
            Effect::GiveUpStream { key, stream } => {
                self.drops.push_back(Drop::Stream(key, stream));
            }
            Effect::Discard(key) => self.drops.push_back(Drop::Attempt(key)),
            Effect::Record { offer, origin } => {
                assert_eq!(offer.command.len(), origin.command_bytes);
                self.records.push_back((offer, origin));
                assert!(self.records.len() <= TASK_QUEUE_MAX, "tasks without bound");
            }
            Effect::Start(task) => {
                let key = task.ids.key();
                assert!(self.known.contains(&key), "started before it is recorded");
                assert!(self.started.insert(key), "started twice");
                assert!(self.running.len() < self.settings.concurrency, "no place");
                self.running.push(Running {
                    ids: task.ids,
                    started: false,
                });
            }
            Effect::Stop { key, reason } => {
                assert!(
                    reason.len() <= REASON_BYTES_MAX,
                    "{} bytes of reason",
                    reason.len()
                );
                assert!(self.running.iter().any(|task| task.ids.key() == key));
            }
            Effect::Interrupt { ids, reason } => {
                assert!(
                    reason.len() <= REASON_BYTES_MAX,
                    "{} bytes of reason",
                    reason.len()
                );
                assert!(!self.started.contains(&ids.key()), "it has started");
                self.to_interrupt.push(ids);
            }
            Effect::ListFinals => {
                assert!(self.finals.is_none(), "listed twice");
                self.finals = Some(self.waiting_finals());
            }
            Effect::Report(ids) => {
                assert!(self.report.is_none(), "two reports at once");
                assert!(!self.is_in_unanswered_hello(ids.key()), "sent two ways");
                self.report = Some(ids);
            }
            Effect::DropFinal(key) => self.forget_final(key),
            Effect::Poll => assert!(!std::mem::replace(&mut self.polling, true)),
            Effect::Heartbeat => assert!(!std::mem::replace(&mut self.heartbeat, true)),
        }
    }

    fn waiting_finals(&self) -> Vec<WaitingFinal> {
        let finals = self.held().filter(|held| held.piece == Piece::Final);
        finals
            .map(|held| {
                let key = held.ids.key();
                WaitingFinal {
                    ids: held.ids.clone().into(),
                    key,
                    output_waits: self
                        .held()
                        .any(|other| other.ids.key() == key && lane(other.piece).is_some()),
                }
            })
            .collect()
    }

    fn hello(&mut self, hello: &Hello, message_id: String) {
        assert!(self.names.insert(message_id.clone()), "a name twice");
        self.in_hello = hello
            .unacked_finals
            .iter()
            .map(|entry| AttemptKey::of(&entry.task_id, &entry.execution_attempt_id))
            .collect();
        if let Some(ids) = &self.report {
            assert!(!self.in_hello.contains(&ids.key()), "sent two ways");
        }
        if self.connection.is_none() {
            self.in_hello.clear();
        }
        self.hello_id = message_id;
        self.hello_sent = self.connection.is_some();
        self.control_frame();
    }

    fn is_in_unanswered_hello(&self, key: AttemptKey) -> bool {
        self.session.link_state() == LinkState::Handshake && self.in_hello.contains(&key)
    }

    /// As the driver: a full lane ends the connection.
    fn control_frame(&mut self) {
        if self.connection.is_some() && std::mem::take(&mut self.lane_is_full) {
            self.connection_is_gone();
            let now = self.now;
            self.session.disconnected("the server does not read", now);
        }
    }

    /// Nothing of it reaches the session any more.
    pub fn connection_is_gone(&mut self) {
        self.connection = None;
        self.is_open = false;
        self.hello_sent = false;
        self.sent.clear();
        self.answered = 0;
        self.in_hello.clear();
        self.pings = 0;
    }

    /// The batch that was read reaches the session.
    pub fn batch_arrives(&mut self) {
        let Some(batch) = self.batch.take() else {
            return;
        };
        let candidates = batch.candidates.iter().copied();
        let admission = self
            .session
            .batch_read(candidates, batch.next, batch.at_end, self.now);
        self.check_window();
        if admission.is_empty() {
            return;
        }
        let number = self.connection.expect("sent without a connection");
        assert!(self.is_open && self.drops.is_empty());
        for admitted in &admission {
            let candidate = &batch.candidates[admitted.index];
            self.check_may_be_sent(candidate.key, candidate.piece);
            self.sent.push((candidate.key, candidate.piece));
        }
        self.in_writer.push_back(number);
        let of_this = self.in_writer.iter().filter(|&&of| of == number);
        assert!(of_this.count() <= BATCHES_IN_WRITER, "the writer is full");
    }

    /// PROTOCOL.md 4.4: a final never before all output of its attempt has been sent; and a final
    /// that is being reported not at all.
    fn check_may_be_sent(&self, key: AttemptKey, piece: Piece) {
        if piece != Piece::Final {
            return;
        }
        let reported = self.report.as_ref().is_some_and(|ids| ids.key() == key);
        assert!(!reported, "sent two ways");
        let mine = self.held().filter(|held| held.ids.key() == key);
        for held in mine.filter(|held| lane(held.piece).is_some()) {
            let sent = self.sent.contains(&(key, held.piece));
            assert!(sent, "a final before {:?}", held.piece);
        }
    }

    fn check_window(&self) {
        let (messages, bytes) = self.session.in_flight();
        assert!(messages <= WINDOW_MESSAGES, "{messages} messages in flight");
        let fits = bytes <= WINDOW_BYTES || messages == 1;
        assert!(fits, "{messages} messages of {bytes} bytes in flight");
        self.session.delivery.check_counters();
    }

    /// What must hold between two turns.
    fn check(&self) {
        self.check_window();
        let (messages, _) = self.session.in_flight();
        let active = self.session.link_state() == LinkState::Active;
        assert!(active || messages == 0, "in flight without a session");
        let linked = matches!(
            self.session.link_state(),
            LinkState::Connecting | LinkState::Handshake | LinkState::Active
        );
        assert_eq!(linked, self.connection.is_some(), "link and connection");
        assert!(self.session.tasks().waiting() <= TASK_QUEUE_MAX);
        assert_eq!(self.session.tasks().running().len(), self.running.len());
        if let Some(deadline) = self.session.next_deadline(self.now) {
            assert!(deadline > self.now, "woken again at once, without an end");
        }
    }
}
