//! Bytes as decisions, and what an arbitrary server says with them.

use std::time::Duration;

use super::INCARNATION;
use super::world::{self, World};
use crate::ids::{AttemptKey, Stream};
use crate::limits::RETRY_AFTER_MAX;
use crate::wire::server_message::{
    Ack, DiscardedAttempt, OUTPUT_SEQUENCE_GAP, OutputReplay, ServerError,
};
use crate::wire::{DecodeError, HelloAck, MessageId, Piece, ServerMessage, TaskOffer};

/// Task names; each has the attempt `a`, and the last one none, as old servers send it.
const TASKS: [&str; 5] = ["t0", "t1", "t2", "t3", "t4"];

/// The bytes that decide. Where there are none left, zeros.
pub struct Choices<'a>(pub &'a [u8]);

impl Choices<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    pub fn toss(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// Small ones, and those at the ends of the range.
    pub fn number(&mut self) -> u64 {
        match self.byte() {
            small @ 0..=0xef => u64::from(small),
            0xf0..=0xf3 => u64::MAX,
            0xf4..=0xf7 => u64::MAX - 1,
            0xf8..=0xfb => 1 << 63,
            _ => u64::from(u32::MAX),
        }
    }

    pub fn task(&mut self) -> &'static str {
        TASKS[self.below(TASKS.len())]
    }

    pub fn stream(&mut self) -> Stream {
        Stream::ALL[self.below(2)]
    }

    pub fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.toss().then(|| make(self))
    }

    fn many<T>(&mut self, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = match self.byte() {
            few @ 0..=0xf7 => few % 4,
            many => many,
        };
        (0..count).map(|_| make(self)).collect()
    }

    /// An id of a message: mostly one that this store may have made.
    fn message_id(&mut self, world: &World) -> String {
        let key = match self.byte() {
            0..=0xdf => world::ids(self.task()).key(),
            _ => AttemptKey::of("foreign", &self.byte().to_string()),
        };
        let piece = match self.below(12) {
            0..=6 => Piece::Output(self.stream(), self.number().max(1)),
            7 => Piece::Final,
            8 => Piece::Received,
            9 => Piece::Started,
            10 => return world.hello_id.clone(),
            _ => return format!("{INCARNATION}-{}-{}", self.task(), self.number()),
        };
        let incarnation = INCARNATION;
        MessageId {
            incarnation,
            key,
            piece,
        }
        .to_string()
    }

    pub fn offer(&mut self) -> TaskOffer {
        TaskOffer {
            ids: world::ids(self.task()),
            command: "x".repeat(if self.byte() < 250 { 1 } else { 1 << 20 }),
            priority: self.number() as i64,
            timeout_seconds: self.maybe(Choices::number),
        }
    }

    pub fn retry_after(&mut self) -> Option<Duration> {
        self.maybe(|choices| Duration::from_secs(choices.number()).min(RETRY_AFTER_MAX))
    }

    pub fn server_message(&mut self, world: &World) -> Result<ServerMessage, DecodeError> {
        Ok(match self.below(16) {
            0 => return Err(DecodeError::Invalid("sequence")),
            1 => ServerMessage::Unknown("task.dance".into()),
            2 => ServerMessage::Cancel {
                ids: world::ids(self.task()),
                reason: self.maybe(|choices| "é".repeat(choices.below(2) * 2000)),
            },
            3 | 4 => ServerMessage::Deliver(Box::new(self.offer())),
            5..=8 => ServerMessage::Ack(Ack {
                acked_message_id: self.message_id(world),
                acked_type: "task.output".into(),
                task_id: None,
                execution_attempt_id: None,
                highest_output_sequence: self.maybe(Choices::number),
            }),
            9..=12 => ServerMessage::Error(ServerError {
                code: match self.toss() {
                    true => OUTPUT_SEQUENCE_GAP.into(),
                    false => "busy".into(),
                },
                message: String::new(),
                // A session that is ended at once is no deep history.
                retryable: self.byte() >= 40,
                related_message_id: (self.byte() >= 20).then(|| self.message_id(world)),
                highest_accepted_sequence: self.maybe(Choices::number),
            }),
            _ => ServerMessage::HelloAck(Box::new(self.hello_ack(world))),
        })
    }

    fn hello_ack(&mut self, world: &World) -> HelloAck {
        let attempt = |choices: &mut Self| {
            let ids = world::ids(choices.task());
            (ids.task.to_string(), ids.attempt.to_string())
        };
        HelloAck {
            acked_message_id: match self.byte() {
                0 => self.message_id(world),
                _ => world.hello_id.clone(),
            },
            acked_type: "agent.hello".into(),
            delivery_enabled: self.toss(),
            acknowledged_final_message_ids: self
                .maybe(|choices| choices.many(|choices| choices.message_id(world))),
            discarded_attempts: self.maybe(|choices| {
                choices.many(|choices| {
                    let (task_id, execution_attempt_id) = attempt(choices);
                    DiscardedAttempt {
                        task_id,
                        execution_attempt_id,
                        reason: None,
                    }
                })
            }),
            output_replay: self.maybe(|choices| {
                choices.many(|choices| {
                    let (task_id, execution_attempt_id) = attempt(choices);
                    OutputReplay {
                        task_id,
                        execution_attempt_id,
                        stream: choices.stream(),
                        next_sequence: choices.number(),
                    }
                })
            }),
            extensions: self.maybe(|_| vec!["cancel".into(), "lease".into()]),
            lease_interval_seconds: self.maybe(Choices::number),
        }
    }
}
