//! How the server answers a hello: with directives, without, with nonsense, or not at all.

use std::time::Duration;

use super::ledger::{LIED, RELEASED};
use super::server::{Say, Says, Server, Talk, error};
use crate::ids::Stream;
use crate::wire::server_message::{DiscardedAttempt, OutputReplay};
use crate::wire::{Hello, HelloAck, ServerMessage};

impl Server {
    pub(super) fn hello(&mut self, talk: &mut Talk, id: String, hello: &Hello, says: &mut Says) {
        if self.trouble(self.toggles.never_answers_hello, 2) {
            return;
        }
        if self.trouble(self.toggles.ends_sessions, 4) {
            says.push((
                Duration::ZERO,
                Say::message(error("go_away", false, None, None)),
            ));
            return;
        }
        for entry in &hello.unacked_finals {
            let number = self.ledger.borrow().by_name(&entry.task_id);
            self.see_final(number, &entry.result);
        }
        for task in &hello.received_not_started {
            let number = self.ledger.borrow().by_name(&task.task_id);
            self.known[number].received = true;
        }
        if let Some(task) = &hello.running_task {
            let number = self.ledger.borrow().by_name(&task.task_id);
            self.known[number].received = true;
        }
        let mut ack = HelloAck {
            acked_message_id: id,
            acked_type: "agent.hello".into(),
            delivery_enabled: hello.capabilities.delivery_enabled && !self.dice.one_in(8),
            ..HelloAck::default()
        };
        if self.toggles.grants {
            ack.extensions = Some(vec!["cancel".into(), "usage".into(), "lease".into()]);
            ack.lease_interval_seconds = Some(7);
        }
        if self.toggles.directs {
            self.direct(hello, &mut ack);
        }
        if self.trouble(self.toggles.directs_nonsense, 2) {
            self.direct_nonsense(&mut ack);
        }
        talk.delivery = ack.delivery_enabled;
        talk.cancel = self.toggles.grants;
        talk.hello_answered = true;
        if self.trouble(self.toggles.repeats_acks, 8) {
            // Out of turn: the agent must end the session.
            says.push((
                Duration::ZERO,
                Say::message(ServerMessage::HelloAck(Box::new(ack.clone()))),
            ));
        }
        says.push((
            Duration::ZERO,
            Say::message(ServerMessage::HelloAck(Box::new(ack))),
        ));
    }

    /// Directives that tell the truth.
    fn direct(&mut self, hello: &Hello, ack: &mut HelloAck) {
        let mut finals = Vec::new();
        for entry in &hello.unacked_finals {
            let mut ledger = self.ledger.borrow_mut();
            let number = ledger.by_name(&entry.task_id);
            let known = &mut self.known[number];
            known.has_final |= self.toggles.takes_finals_from_hello;
            if known.has_final {
                ledger.attempts[number].final_released = true;
                finals.push(entry.message_id.clone());
            }
        }
        ack.acknowledged_final_message_ids = Some(finals);
        let mut replays = Vec::new();
        for range in &hello.unacked_output {
            let mut ledger = self.ledger.borrow_mut();
            let number = ledger.by_name(&range.task_id);
            let highest = self.known[number].accepted[range.stream.index()];
            let attempt = &mut ledger.attempts[number];
            (1..=highest).for_each(|sequence| attempt.set(range.stream, sequence, RELEASED));
            replays.push(OutputReplay {
                task_id: range.task_id.clone(),
                execution_attempt_id: range.execution_attempt_id.clone(),
                stream: range.stream,
                next_sequence: highest + 1,
            });
        }
        ack.output_replay = Some(replays);
        let mut ledger = self.ledger.borrow_mut();
        let count = ledger.attempts.len() as u64;
        if self.toggles.discards && !self.healed && count > 0 && self.dice.one_in(2) {
            let attempt = &mut ledger.attempts[self.dice.below(count) as usize];
            attempt.discarded = true;
            ack.discarded_attempts = Some(vec![DiscardedAttempt {
                task_id: attempt.ids.task.to_string(),
                execution_attempt_id: attempt.ids.attempt.to_string(),
                reason: None,
            }]);
        }
    }

    fn direct_nonsense(&mut self, ack: &mut HelloAck) {
        let mut ledger = self.ledger.borrow_mut();
        let count = ledger.attempts.len() as u64;
        let mut replays = vec![OutputReplay {
            task_id: "nobody's".into(),
            execution_attempt_id: "a".into(),
            stream: Stream::Stdout,
            next_sequence: u64::MAX,
        }];
        if count > 0 {
            let attempt = &mut ledger.attempts[self.dice.below(count) as usize];
            let stream = self.dice.pick(&Stream::ALL);
            let stored = attempt.stored[stream.index()];
            let next = self.dice.below(stored + 4);
            for sequence in 1..next {
                attempt.set(stream, sequence, RELEASED | LIED);
            }
            replays.push(OutputReplay {
                task_id: attempt.ids.task.to_string(),
                execution_attempt_id: attempt.ids.attempt.to_string(),
                stream,
                next_sequence: next,
            });
        }
        ack.output_replay = Some(replays);
        ack.acknowledged_final_message_ids = Some(vec!["nonsense".into(), String::new()]);
    }
}
