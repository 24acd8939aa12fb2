//! Random orders of events against a strict server that accepts only the next sequence: chunks
//! that it loses, acknowledgements late, never, twice or out of order, gap reports, refusals,
//! cuts, silence. In the end the server is good, and everything must have arrived.
//!
//! A seed reproduces a run: `HOSTLINK_SIMULATION_SEED=n`; `HOSTLINK_SIMULATIONS=n` runs more.

use std::collections::HashMap;

use super::*;
use crate::limits::{WINDOW_BYTES, WINDOW_MESSAGES};
use crate::session::backoff::Random;

const ATTEMPTS: [&str; 4] = ["a", "b", "c", "d"];
const STEPS: u64 = 300;
/// With a good server everything is acknowledged within this virtual time.
const HEALING_TIME: Duration = Duration::from_secs(900);
/// More effects than this without time passing are a busy loop.
const EFFECTS_PER_STEP_MAX: usize = 2000;

#[derive(Debug, Clone)]
enum Answer {
    Ack(AttemptKey, Piece, Option<u64>),
    Gap(AttemptKey, Stream, u64, u64),
    Busy(AttemptKey, Piece),
}

/// What a run may do; drawn once for each, so that rare combinations occur.
#[derive(Debug)]
struct Toggles {
    loses: bool,
    withholds_acks: bool,
    repeats_answers: bool,
    acks_cumulatively: bool,
    shuffles: bool,
    cuts: bool,
    busy: bool,
    large: bool,
    large_steps_of_time: bool,
    /// The server answers hellos with what it has.
    directs: bool,
    /// The server loses its memory at a cut.
    forgets: bool,
    /// The socket takes batches slowly.
    slow_writer: bool,
}

struct Simulation {
    bench: Bench,
    random: Random,
    toggles: Toggles,
    to_server: Vec<(AttemptKey, Piece, bool)>,
    to_agent: Vec<Answer>,
    accepted: HashMap<(AttemptKey, Stream), u64>,
    finals: HashSet<AttemptKey>,
    /// Next sequence of each stream, and whether the attempt has its final.
    stored: HashMap<(&'static str, Stream), u64>,
    ended: HashSet<&'static str>,
    sent_in_session: HashSet<Stored>,
    taken: usize,
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let mut random = Random::new(seed);
        let mut toss = |one_in: u64| random.next_u64().is_multiple_of(one_in);
        let toggles = Toggles {
            loses: toss(2),
            withholds_acks: toss(3),
            repeats_answers: toss(3),
            acks_cumulatively: toss(2),
            shuffles: toss(3),
            cuts: toss(2),
            busy: toss(4),
            large: toss(2),
            large_steps_of_time: toss(3),
            directs: toss(2),
            forgets: toss(5),
            slow_writer: toss(3),
        };
        let mut bench = Bench::new();
        bench.in_writer = toggles.slow_writer.then_some(0);
        if toggles.large {
            bench.bytes = |piece| match piece {
                Piece::Output(_, sequence) => (sequence as usize % 4) * 5461,
                _ => WINDOW_BYTES + 1,
            };
        }
        Simulation {
            bench,
            random,
            toggles,
            to_server: Vec::new(),
            to_agent: Vec::new(),
            accepted: HashMap::new(),
            finals: HashSet::new(),
            stored: HashMap::new(),
            ended: HashSet::new(),
            sent_in_session: HashSet::new(),
            taken: 0,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    fn run(&mut self) {
        for _ in 0..STEPS {
            match self.below(20) {
                0..=6 => self.serve(true),
                7..=11 => self.answer(),
                12..=15 => self.store_something(),
                16..=17 => self.pass_time(),
                _ if self.write_batch() => {}
                18 if self.toggles.cuts => self.cut(),
                _ => self.bench.session.heard(self.bench.now),
            }
            self.settle();
        }
        self.heal();
    }

    /// The socket has taken a batch.
    fn write_batch(&mut self) -> bool {
        match &mut self.bench.in_writer {
            Some(batches) if *batches > 0 => {
                *batches -= 1;
                self.bench.session.transmitted();
                self.bench.run();
                true
            }
            _ => false,
        }
    }

    /// After every step: a session, what was sent on its way, and the invariants.
    fn settle(&mut self) {
        if self.bench.session.link_state() == LinkState::Connecting {
            self.to_server.clear();
            self.to_agent.clear();
            self.sent_in_session.clear();
            self.taken = self.bench.sent.len();
            if let Some(batches) = &mut self.bench.in_writer {
                *batches = 0;
            }
            let ack = self.hello_ack();
            self.bench.connect(ack);
        }
        assert!(self.bench.effects.len() < EFFECTS_PER_STEP_MAX, "busy loop");
        if self.bench.has(|effect| matches!(effect, Effect::Ping)) {
            self.bench.session.heard(self.bench.now);
        }
        self.bench.effects.clear();
        for index in self.taken..self.bench.sent.len() {
            let (key, piece, flagged) = self.bench.sent[index];
            self.check_order(key, piece);
            self.sent_in_session.insert((key, piece));
            self.to_server.push((key, piece, flagged));
        }
        self.taken = self.bench.sent.len();
        self.bench.run();
        let now = self.bench.now;
        if let Some(deadline) = self.bench.session.next_deadline(now) {
            assert!(deadline > now, "a busy loop: {:?}", self.toggles);
        }
        let (messages, bytes) = self.bench.session.in_flight();
        assert!(messages <= WINDOW_MESSAGES);
        assert!(
            bytes <= WINDOW_BYTES || messages == 1,
            "{messages} messages, {bytes} bytes"
        );
    }

    fn hello_ack(&self) -> HelloAck {
        if !self.toggles.directs {
            return HelloAck::default();
        }
        let finals = ATTEMPTS
            .iter()
            .filter(|name| self.finals.contains(&key(name)));
        let replays = self.accepted.iter().map(|(&(of, stream), highest)| {
            let name = ATTEMPTS.iter().find(|name| key(name) == of);
            OutputReplay {
                task_id: (*name.expect("an attempt of this run")).into(),
                execution_attempt_id: "a".into(),
                stream,
                next_sequence: highest + 1,
            }
        });
        HelloAck {
            acknowledged_final_message_ids: Some(
                finals.map(|name| Bench::id(name, Piece::Final)).collect(),
            ),
            output_replay: Some(replays.collect()),
            ..HelloAck::default()
        }
    }

    /// PROTOCOL.md 4.4: a final never before all output of its attempt has been sent.
    fn check_order(&self, key: AttemptKey, piece: Piece) {
        if piece != Piece::Final {
            return;
        }
        for stored in &self.bench.log {
            let before = stored.0 == key && matches!(stored.1, Piece::Output(..));
            let done = self.bench.acked.contains(stored) || self.sent_in_session.contains(stored);
            assert!(!before || done, "a final before {stored:?}");
        }
    }

    /// The server takes one frame. `flawed`: with the faults of this run.
    fn serve(&mut self, flawed: bool) {
        if self.to_server.is_empty() {
            return;
        }
        let (key, piece, flagged) = self.to_server.remove(0);
        if flawed && self.toggles.loses && self.below(8) == 0 {
            return;
        }
        if flawed && self.toggles.busy && self.below(12) == 0 {
            self.to_agent.push(Answer::Busy(key, piece));
            return;
        }
        let answer = match piece {
            Piece::Output(stream, sequence) => {
                let highest = self.accepted.entry((key, stream)).or_insert(0);
                if sequence == *highest + 1 || (flagged && sequence > *highest) {
                    *highest = sequence;
                }
                if sequence > *highest {
                    Answer::Gap(key, stream, sequence, *highest)
                } else {
                    let through = self.toggles.acks_cumulatively.then_some(*highest);
                    Answer::Ack(key, piece, through)
                }
            }
            _ => {
                self.finals.insert(key);
                Answer::Ack(key, piece, None)
            }
        };
        let is_ack = matches!(answer, Answer::Ack(..));
        if flawed && is_ack && self.toggles.withholds_acks && self.below(4) == 0 {
            return;
        }
        if flawed && self.toggles.repeats_answers && self.below(4) == 0 {
            self.to_agent.push(answer.clone());
        }
        self.to_agent.push(answer);
    }

    /// The agent hears one answer.
    fn answer(&mut self) {
        if self.to_agent.is_empty() {
            return;
        }
        let count = self.to_agent.len() as u64;
        let index = if self.toggles.shuffles {
            self.below(count)
        } else {
            0
        };
        let answer = self.to_agent.remove(index as usize);
        let id = |key, piece| {
            let incarnation = INCARNATION;
            MessageId {
                incarnation,
                key,
                piece,
            }
            .to_string()
        };
        match answer {
            Answer::Ack(key, piece, through) => {
                self.bench.say(ServerMessage::Ack(server_message::Ack {
                    acked_message_id: id(key, piece),
                    acked_type: "task.output".into(),
                    task_id: None,
                    execution_attempt_id: None,
                    highest_output_sequence: through,
                }));
            }
            Answer::Gap(key, stream, related, highest) => {
                let related = Some(id(key, Piece::Output(stream, related)));
                self.bench
                    .error(true, OUTPUT_SEQUENCE_GAP, related, Some(highest));
            }
            Answer::Busy(key, piece) => self.bench.error(true, "busy", Some(id(key, piece)), None),
        }
    }

    fn store_something(&mut self) {
        let name = ATTEMPTS[self.below(4) as usize];
        if self.ended.contains(name) {
            return;
        }
        if self.below(30) == 0 {
            self.ended.insert(name);
            self.bench.store_final(name);
            return;
        }
        let stream = Stream::ALL[self.below(2) as usize];
        let count = 1 + self.below(12);
        let last = self.stored.entry((name, stream)).or_insert(0);
        let (first, last_now) = (*last + 1, *last + count);
        *last = last_now;
        let sequences = (first..=last_now).map(|n| (key(name), Piece::Output(stream, n)));
        self.bench.log.extend(sequences);
        self.bench.session.appended();
        self.bench.run();
    }

    fn pass_time(&mut self) {
        let most = if self.toggles.large_steps_of_time {
            40_000
        } else {
            500
        };
        let by = Duration::from_millis(self.below(most));
        self.bench.advance(by);
    }

    fn cut(&mut self) {
        let now = self.bench.now;
        self.bench.session.disconnected("cut", now);
        self.to_server.clear();
        self.to_agent.clear();
        if self.toggles.forgets && self.below(3) == 0 {
            self.accepted.clear();
        }
        self.bench.run();
    }

    /// The server is good from now on: everything arrives in bounded time.
    fn heal(&mut self) {
        let until = self.bench.now + HEALING_TIME;
        self.toggles.shuffles = false;
        for name in ATTEMPTS {
            if self.ended.insert(name) {
                self.bench.store_final(name);
            }
        }
        loop {
            self.settle();
            while self.write_batch() {
                self.settle();
            }
            while !self.to_server.is_empty() || !self.to_agent.is_empty() {
                self.serve(false);
                self.answer();
                self.settle();
            }
            let log = &self.bench.log;
            if log.iter().all(|stored| self.bench.acked.contains(stored)) {
                break;
            }
            assert!(
                self.bench.now < until,
                "not everything arrived: {:?}",
                self.toggles
            );
            self.bench.session.heard(self.bench.now);
            self.bench.advance(Duration::from_millis(500));
        }
        for name in ATTEMPTS {
            assert!(
                self.finals.contains(&key(name)),
                "the final of {name} is missing"
            );
        }
        if self.toggles.forgets {
            return;
        }
        for (&(name, stream), &last) in &self.stored {
            let accepted = self
                .accepted
                .get(&(key(name), stream))
                .copied()
                .unwrap_or(0);
            let given_up = self.bench.holes.contains(&(key(name), stream));
            assert!(
                accepted == last || given_up,
                "{name} {stream:?}: {accepted} of {last}"
            );
        }
    }
}

#[test]
fn whatever_the_order_of_events_everything_arrives_in_order_once_the_server_is_good() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seeds = match number("HOSTLINK_SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("HOSTLINK_SIMULATIONS").unwrap_or(500),
    };
    for seed in seeds {
        let run = std::panic::catch_unwind(|| Simulation::new(seed).run());
        assert!(
            run.is_ok(),
            "HOSTLINK_SIMULATION_SEED={seed} repeats this failure"
        );
    }
}
