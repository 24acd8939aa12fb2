//! A control plane that keeps every word of PROTOCOL.md, and on demand breaks it. What it says is
//! decided here; when it arrives is the network's matter ([`super::world`]).

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use super::ledger::{ACCEPTED, Attempt, LIED, Ledger, REFUSED, RELEASED};
use super::outside::OtherWay;
use super::rules::{check_content, check_id};
use super::toggles::{Dice, Toggles};
use crate::ids::Stream;
use crate::wire::agent_message::{FinalPayload, ReceivedOutput};
use crate::wire::envelope::Envelope;
use crate::wire::server_message::{Ack, OUTPUT_SEQUENCE_GAP, ServerError};
use crate::wire::{Hello, Piece, ServerMessage, TaskOffer};

pub const AGENT_ID: &str = "agent";
/// The name of the store, in all message ids.
pub const INCARNATION: &str = "0123456789abcdef";

/// What the server remembers of an attempt.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub received: bool,
    pub accepted: [u64; 2],
    pub has_final: bool,
    pub offered_at: Option<Duration>,
    /// By any way. Not forgotten, since it is about what the agent may know.
    pub offers: u32,
}

/// The server's end of one connection.
#[derive(Debug, Default)]
pub struct Talk {
    pub hello_answered: bool,
    /// What had become over HTTP of the final in the frame at hand when it went to the socket.
    pub other_way: OtherWay,
    pub delivery: bool,
    pub cancel: bool,
    /// Of each attempt and stream: all up to here was sent, or need not be.
    pub passed: Vec<[u64; 2]>,
    pub spoke: Vec<[bool; 2]>,
    /// Offered over this connection although known: its final may come out of turn.
    pub delivered: BTreeSet<usize>,
}

pub struct Server {
    pub toggles: Toggles,
    pub dice: Dice,
    pub ledger: Rc<RefCell<Ledger>>,
    /// The server is good.
    pub healed: bool,
    pub(super) known: Vec<Known>,
    messages: u64,
}

/// What is to be said, and after what pause.
pub type Says = Vec<(Duration, Say)>;

#[derive(Debug)]
pub enum Say {
    Message(Box<ServerMessage>),
    Raw(String),
    Close,
}

impl Say {
    pub fn message(message: ServerMessage) -> Say {
        Say::Message(Box::new(message))
    }
}

impl Server {
    pub fn new(toggles: Toggles, dice: Dice, ledger: Rc<RefCell<Ledger>>) -> Server {
        Server {
            toggles,
            dice,
            ledger,
            healed: false,
            known: Vec::new(),
            messages: 0,
        }
    }

    /// Whether this time something bad happens that may happen once in `n` times.
    pub(super) fn trouble(&mut self, toggle: bool, n: u64) -> bool {
        toggle && !self.healed && self.dice.one_in(n)
    }

    /// A new task is there to be run.
    pub fn add_task(&mut self) {
        self.known.push(Known::default());
    }

    pub fn forget(&mut self) {
        for known in &mut self.known {
            *known = Known {
                offers: known.offers,
                ..Known::default()
            };
        }
    }

    pub fn encode(&mut self, message: &ServerMessage) -> String {
        self.messages += 1;
        let mut frame = Vec::with_capacity(256);
        let id = format!("s{}", self.messages);
        message.encode(&id, AGENT_ID, crate::wire::Timestamp(0), &mut frame);
        String::from_utf8(frame).expect("JSON")
    }

    pub(super) fn pause(&mut self) -> Duration {
        if self.toggles.late_acks && !self.healed {
            return match self.dice.below(8) {
                0 => self.dice.millis(20_000, 40_000),
                1 | 2 => self.dice.millis(500, 3_000),
                _ => self.dice.millis(0, 300),
            };
        }
        Duration::ZERO
    }

    pub(super) fn say(&mut self, says: &mut Says, message: ServerMessage) {
        let pause = self.pause();
        says.push((pause, Say::message(message)));
    }

    // ---- what the agent sends -----------------------------------------------------------------

    /// A frame has arrived.
    pub fn receive(&mut self, talk: &mut Talk, frame: &[u8]) -> Says {
        let mut says = Says::new();
        let text = std::str::from_utf8(frame).expect("a text frame");
        let envelope = Envelope::decode(text, AGENT_ID).expect("a valid envelope");
        if envelope.kind == "agent.hello" {
            let hello: Hello = envelope.payload().expect("a valid hello");
            let id = envelope.message_id.into_owned();
            self.hello(talk, id, &hello, &mut says);
            return says;
        }
        let id = envelope.message_id.clone().into_owned();
        let ids = envelope.attempt().expect("it names its attempt");
        let number = self.ledger.borrow().by_name(&ids.task);
        match envelope.kind.as_ref() {
            "task.received" | "task.started" => {
                self.known[number].received |= !self.trouble(self.toggles.loses_frames, 4);
            }
            "task.lease_heartbeat" => {}
            "task.output" => {
                let sequence = envelope.sequence.expect("output is numbered");
                let output: ReceivedOutput = envelope.payload().expect("valid output");
                check_id(&ids, &id, Piece::Output(output.stream, sequence));
                self.output(talk, number, sequence, &output, id, &mut says);
            }
            "task.final" => {
                let fin: FinalPayload<String> = envelope.payload().expect("a valid final");
                check_id(&ids, &id, Piece::Final);
                self.fin(talk, number, &fin, id, &mut says);
            }
            other => panic!("a frame of type {other}"),
        }
        says
    }

    fn output(
        &mut self,
        talk: &mut Talk,
        number: usize,
        sequence: u64,
        output: &ReceivedOutput,
        id: String,
        says: &mut Says,
    ) {
        let stream = output.stream;
        let at = stream.index();
        let flagged = output.truncated_locally == Some(true);
        check_content(&self.ledger.borrow(), number, stream, sequence, output);
        self.check_order(talk, number, stream, sequence);
        let is_hello_over = talk.hello_answered;
        assert!(is_hello_over, "output before hello_ack");
        if self.trouble(self.toggles.loses_frames, 8) {
            return;
        }
        if self.trouble(self.toggles.busy, 8) {
            return self.say(says, error("busy", true, Some(id), None));
        }
        if self.trouble(self.toggles.refuses, 12) {
            let mut ledger = self.ledger.borrow_mut();
            let attempt = &mut ledger.attempts[number];
            // One that it has taken already is not refused afterwards.
            if attempt.flags(stream, sequence) & ACCEPTED == 0 {
                attempt.set(stream, sequence, REFUSED);
                drop(ledger);
                return self.say(says, error("no", false, Some(id), None));
            }
        }
        let highest = self.known[number].accepted[at];
        let jumps = sequence > highest + 1;
        if jumps && (!flagged || (self.toggles.old && !self.healed)) {
            return self.gap(number, stream, highest, id, says);
        }
        if jumps {
            let ledger = self.ledger.borrow();
            let attempt = &ledger.attempts[number];
            for skipped in highest + 1..sequence {
                assert!(
                    attempt.is_over(stream, skipped),
                    "chunk {skipped} of {stream:?} of attempt {number} is flagged as lost"
                );
            }
        }
        if self.trouble(self.toggles.false_gaps, 10) {
            let false_highest = self.dice.below(sequence + 3);
            return self.gap(number, stream, false_highest, id, says);
        }
        let known = &mut self.known[number];
        known.accepted[at] = highest.max(sequence);
        known.received = true;
        let highest = known.accepted[at];
        {
            let mut ledger = self.ledger.borrow_mut();
            ledger.attempts[number].set(stream, sequence, ACCEPTED);
        }
        let withholds = if self.toggles.late.withholds_few {
            12
        } else {
            2
        };
        if self.trouble(self.toggles.withholds_acks, withholds) {
            return;
        }
        let mut through = self.toggles.cumulative_acks.then_some(highest);
        let mut flag = RELEASED;
        if self.trouble(self.toggles.false_acks, 12) {
            through = Some(highest + self.dice.below(4));
            flag |= LIED;
        }
        let mut ledger = self.ledger.borrow_mut();
        let attempt = &mut ledger.attempts[number];
        attempt.set(stream, sequence, RELEASED);
        (1..=through.unwrap_or(0)).for_each(|it| attempt.set(stream, it, flag));
        drop(ledger);
        self.ack(id, "task.output", through, says);
    }

    fn ack(&mut self, id: String, kind: &str, through: Option<u64>, says: &mut Says) {
        let ack = ServerMessage::Ack(Ack {
            acked_message_id: id,
            acked_type: kind.into(),
            task_id: None,
            execution_attempt_id: None,
            highest_output_sequence: through,
        });
        if self.trouble(self.toggles.foreign_acks, 4) {
            let foreign = ServerMessage::Ack(Ack {
                acked_message_id: "ffffffffffffffff-00000000000000000000000000000000-f-1".into(),
                acked_type: kind.into(),
                task_id: None,
                execution_attempt_id: None,
                highest_output_sequence: Some(u64::MAX),
            });
            self.say(says, foreign);
        }
        if self.trouble(self.toggles.repeats_acks, 3) {
            self.say(says, ack.clone());
        }
        self.say(says, ack);
    }

    fn gap(&mut self, number: usize, stream: Stream, highest: u64, id: String, says: &mut Says) {
        let times = 1 + u64::from(self.trouble(self.toggles.repeats_gaps, 2)) * self.dice.below(3);
        for _ in 0..times {
            let mut ledger = self.ledger.borrow_mut();
            ledger.attempts[number].gaps_told[stream.index()] += 1;
            drop(ledger);
            let gap = error(OUTPUT_SEQUENCE_GAP, true, Some(id.clone()), Some(highest));
            self.say(says, gap);
        }
    }

    fn fin(
        &mut self,
        talk: &mut Talk,
        number: usize,
        fin: &FinalPayload<String>,
        id: String,
        says: &mut Says,
    ) {
        let goes_two_ways = match talk.other_way {
            OtherWay::No => false,
            OtherWay::OnIt => true,
            // One that is done may be asked for once more.
            OtherWay::Done => !talk.delivered.contains(&number) || self.known[number].offers < 2,
        };
        assert!(
            !goes_two_ways,
            "the final of attempt {number} goes two ways"
        );
        self.check_output_first(talk, number);
        self.see_final(number, fin);
        if self.trouble(self.toggles.loses_frames, 6) {
            return;
        }
        if self.trouble(self.toggles.busy, 8) {
            return self.say(says, error("busy", true, Some(id), None));
        }
        if !self.known[number].has_final && self.trouble(self.toggles.refuses, 16) {
            self.ledger.borrow_mut().attempts[number].final_refused = true;
            return self.say(says, error("no", false, Some(id), None));
        }
        self.known[number].has_final = true;
        self.known[number].received = true;
        if self.trouble(self.toggles.withholds_acks, 2) {
            return;
        }
        self.ledger.borrow_mut().attempts[number].final_released = true;
        self.ack(id, "task.final", None, says);
    }

    // ---- what it says by itself ---------------------------------------------------------------

    /// Now and then: tasks that nobody has received, and nonsense.
    pub fn speak(&mut self, talk: &mut Talk, now: Duration) -> Says {
        let mut says = Says::new();
        if !talk.hello_answered {
            return says;
        }
        if talk.delivery {
            for number in 0..self.known.len() {
                if let Some(offer) = self.offer(number, now, true) {
                    talk.delivered.insert(number);
                    says.push((
                        Duration::ZERO,
                        Say::message(ServerMessage::Deliver(Box::new(offer))),
                    ));
                }
            }
        }
        let count = self.known.len() as u64;
        if talk.cancel && count > 0 && self.trouble(self.toggles.cancels, 8) {
            let number = self.dice.below(count) as usize;
            let ids = self.ledger.borrow().attempts[number].ids.clone();
            let cancel = ServerMessage::Cancel { ids, reason: None };
            says.push((Duration::ZERO, Say::message(cancel)));
        }
        if self.trouble(self.toggles.ends_sessions, 20) {
            says.push((
                Duration::ZERO,
                Say::message(error("go_away", false, None, None)),
            ));
        }
        if self.trouble(self.toggles.garbage, 8) {
            let text = match self.dice.below(4) {
                0 => "{".to_owned(),
                1 => self
                    .encode(&error("odd", true, Some("x-y-z".into()), Some(u64::MAX)))
                    .replace("\"error\"", "\"task.unheard_of\""),
                2 => self
                    .encode(&error("odd", true, None, None))
                    .replace("agent", "stranger"),
                _ => self.encode(&error("odd", true, Some("a-b-o-0".into()), None)),
            };
            says.push((Duration::ZERO, Say::Raw(text)));
        }
        if self.trouble(self.toggles.restarts, 30) {
            says.push((Duration::ZERO, Say::Close));
        }
        says
    }

    /// The task, if it is to be offered now.
    fn offer(&mut self, number: usize, now: Duration, delivered: bool) -> Option<TaskOffer> {
        let again = self.trouble(self.toggles.offers_again, 10);
        let ledger = self.ledger.borrow();
        let attempt = &ledger.attempts[number];
        let known = &mut self.known[number];
        let done = known.has_final || (attempt.reports > 0 && !attempt.ids.has_result_channel());
        let wanted = !known.received && !done && !attempt.discarded;
        let recently = known
            .offered_at
            .is_some_and(|at| now < at + Duration::from_secs(5));
        if (delivered && !attempt.ids.has_result_channel())
            || !(wanted && !recently || again)
            || attempt.final_refused
        {
            return None;
        }
        known.offered_at = Some(now);
        known.offers += 1;
        Some(TaskOffer {
            ids: attempt.ids.clone(),
            command: "true".into(),
            priority: number as i64 % 2,
            timeout_seconds: None,
        })
    }

    /// The answer to a poll or a heartbeat.
    pub fn offers(&mut self, now: Duration) -> Vec<Result<TaskOffer, String>> {
        let count = self.known.len();
        let offers: Vec<_> = (0..count)
            .filter_map(|number| self.offer(number, now, false))
            .collect();
        offers.into_iter().map(Ok).collect()
    }

    /// A report has arrived.
    pub fn reported(&mut self, number: usize) {
        self.ledger.borrow_mut().attempts[number].reports += 1;
        self.known[number].has_final = true;
    }

    pub fn refuses_report(&mut self, number: usize) -> bool {
        let refuses = self.trouble(self.toggles.http_refuses, 4);
        if refuses {
            let mut ledger = self.ledger.borrow_mut();
            let attempt = &mut ledger.attempts[number];
            attempt.report_refused |= !attempt.ids.has_result_channel();
        }
        refuses
    }
}

pub fn error(
    code: &str,
    retryable: bool,
    related_message_id: Option<String>,
    highest_accepted_sequence: Option<u64>,
) -> ServerMessage {
    ServerMessage::Error(ServerError {
        code: code.into(),
        message: String::new(),
        retryable,
        related_message_id,
        highest_accepted_sequence,
    })
}

impl Server {
    /// Whether the agent may ever have heard of it.
    pub fn has_been_offered(&self, number: usize) -> bool {
        self.known[number].offers > 0
    }

    pub fn describe(&self) -> String {
        let ledger = self.ledger.borrow();
        let attempts = self.known.iter().zip(&ledger.attempts);
        let describe = |(number, (known, attempt)): (usize, (&Known, &Attempt))| {
            format!(
                "\n{number}: {known:?}, stored {:?}, begun {}, reports {}, final {:?}",
                attempt.stored, attempt.begun, attempt.reports, attempt.final_text
            )
        };
        attempts.enumerate().map(describe).collect()
    }

    /// All tasks have ended here, and nothing more is to come.
    pub fn has_all(&self, ledger: &Ledger) -> bool {
        ledger.attempts.iter().all(|attempt| {
            let has_final = attempt.final_text.is_some() || attempt.reports > 0;
            has_final || attempt.discarded || attempt.final_refused || attempt.report_refused
        })
    }
}
