//! What the agent was told to drop, or has dropped at its own wish, must not go out any more: the
//! session reads nothing while it is being dropped (ARCHITECTURE.md, invariant 5).

use std::collections::{HashMap, HashSet};

use super::ledger::Ledger;
use super::server::INCARNATION;
use crate::ids::{AttemptKey, Stream};
use crate::session::delivery::Candidate;
use crate::wire::{MessageId, Piece, ServerMessage};

/// What one life of the agent has dropped.
#[derive(Debug, Default)]
pub struct Dropped {
    refused: HashSet<(AttemptKey, Piece)>,
    /// Attempts that had begun when the server discarded them.
    discarded: HashSet<AttemptKey>,
    /// The last chunk that was dropped of each.
    streams: HashMap<(AttemptKey, Stream), u64>,
}

impl Dropped {
    /// A drop has failed: what was to be dropped is sent again.
    pub fn forget(&mut self) {
        *self = Dropped::default();
    }

    pub fn hears(&mut self, message: &ServerMessage, ledger: &Ledger) {
        match message {
            ServerMessage::HelloAck(ack) => {
                for discarded in ack.discarded_attempts.iter().flatten() {
                    let key = AttemptKey::of(&discarded.task_id, &discarded.execution_attempt_id);
                    if ledger.attempts[ledger.number(key)].begun {
                        self.discarded.insert(key);
                    }
                }
            }
            ServerMessage::Error(error) if !error.retryable => {
                let related = error.related_message_id.as_deref();
                let id = related.and_then(MessageId::parse);
                if let Some(id) = id.filter(|id| id.incarnation == INCARNATION) {
                    self.refused.insert((id.key, id.piece));
                }
            }
            _ => {}
        }
    }

    /// These streams have been given up.
    pub fn given_up(&mut self, streams: &[(AttemptKey, Stream)], ledger: &Ledger) {
        for &(key, stream) in streams {
            let stored = ledger.attempts[ledger.number(key)].stored[stream.index()];
            self.streams.insert((key, stream), stored);
        }
    }

    /// The session lets this message go.
    pub fn check<C>(&self, message: &Candidate<C>) {
        let (key, piece) = (message.key, message.piece);
        let is_given_up = matches!(piece, Piece::Output(stream, sequence)
            if self.streams.get(&(key, stream)).is_some_and(|last| sequence <= *last));
        let is_dropped =
            is_given_up || self.discarded.contains(&key) || self.refused.contains(&(key, piece));
        assert!(!is_dropped, "{piece:?} of {key} was dropped, and is sent");
    }
}
