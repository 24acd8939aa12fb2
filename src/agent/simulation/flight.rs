//! The window, counted at the agent's end and not by the session: a message is in flight from its
//! admission until the agent hears an answer to it, or repeats its stream or gives it up.
//!
//! The server's end cannot tell. What it said was perhaps not heard yet when a message was sent, and
//! a message may arrive behind an answer that the agent has heard: a false acknowledgement, or the
//! gap error about a chunk before it.

use std::time::Duration;

use super::server::INCARNATION;
use super::tell;
use crate::ids::{AttemptKey, Stream};
use crate::limits::{ACK_TIMEOUT, WINDOW_BYTES, WINDOW_MESSAGES};
use crate::session::delivery::Candidate;
use crate::wire::server_message::OUTPUT_SEQUENCE_GAP;
use crate::wire::{MessageId, Piece, ServerMessage};

#[derive(Debug)]
struct Unanswered {
    key: AttemptKey,
    piece: Piece,
    bytes: usize,
    /// Or the server was last busy for it.
    sent_at: Duration,
    /// A later one of its stream was acknowledged, or the server was busy: it is sent again alone.
    overtaken: bool,
    /// When the server last said something of its stream, or something was sent of it while nothing
    /// of it was in flight.
    stream_heard_at: Duration,
}

impl Unanswered {
    fn lane(&self) -> (AttemptKey, Option<Stream>) {
        lane(self.key, self.piece)
    }

    fn is_after(&self, highest: u64) -> bool {
        matches!(self.piece, Piece::Output(_, sequence) if sequence > highest)
    }
}

fn lane(key: AttemptKey, piece: Piece) -> (AttemptKey, Option<Stream>) {
    match piece {
        Piece::Output(stream, _) => (key, Some(stream)),
        _ => (key, None),
    }
}

/// What one session has in flight.
#[derive(Debug, Default)]
pub struct Flight {
    unanswered: Vec<Unanswered>,
    /// Acknowledged while in flight: the store is to note that.
    acknowledged: Vec<(AttemptKey, Piece)>,
}

impl Flight {
    /// The session is over.
    pub fn clear(&mut self) {
        self.unanswered.clear();
        self.acknowledged.clear();
    }

    /// The agent sends this: the window is kept.
    pub fn sends<C>(&mut self, message: &Candidate<C>, now: Duration) {
        let (key, piece) = (message.key, message.piece);
        self.expire(now);
        self.unanswered
            .retain(|it| (it.key, it.piece) != (key, piece));
        let others = self.unanswered.iter();
        let others = others.filter(|it| it.lane() == lane(key, piece));
        let stream_heard_at = others.map(|it| it.stream_heard_at).min().unwrap_or(now);
        self.unanswered.push(Unanswered {
            key,
            piece,
            bytes: message.bytes,
            sent_at: now,
            overtaken: false,
            stream_heard_at,
        });
        let messages = self.unanswered.len();
        let bytes: usize = self.unanswered.iter().map(|it| it.bytes).sum();
        let is_kept = messages <= WINDOW_MESSAGES && (bytes <= WINDOW_BYTES || messages == 1);
        if !is_kept {
            for it in &self.unanswered {
                tell!("{now:?}: unanswered {it:?}");
            }
        }
        assert!(
            is_kept,
            "{messages} messages of {bytes} bytes are sent and unanswered"
        );
    }

    /// What has no answer for so long is sent again: alone if the server has passed it over, or with
    /// all of its stream if it says nothing of that.
    fn expire(&mut self, now: Duration) {
        let silent = |it: &&Unanswered| it.stream_heard_at + ACK_TIMEOUT <= now;
        let repeated: Vec<_> = self
            .unanswered
            .iter()
            .filter(silent)
            .map(Unanswered::lane)
            .collect();
        self.unanswered.retain(|it| {
            let goes_alone = it.overtaken && it.sent_at + ACK_TIMEOUT <= now;
            !goes_alone && !repeated.contains(&it.lane())
        });
    }

    /// Whether this was in flight when its acknowledgement came. Asked once.
    pub fn take_answered(&mut self, key: AttemptKey, piece: Piece) -> bool {
        let found = self.acknowledged.iter().position(|it| *it == (key, piece));
        found.is_some_and(|at| {
            self.acknowledged.swap_remove(at);
            true
        })
    }

    /// The agent does not count what it has sent of this stream from there on: it is sent again,
    /// since the server misses something before it, or given up.
    pub fn withdrawn(&mut self, key: AttemptKey, stream: Stream, from: u64) {
        self.unanswered
            .retain(|it| it.lane() != (key, Some(stream)) || !it.is_after(from - 1));
    }

    /// The agent hears this.
    pub fn hears(&mut self, message: &ServerMessage, now: Duration) {
        let about = |id: &str| {
            let id = MessageId::parse(id).filter(|id| id.incarnation == INCARNATION)?;
            Some((id.key, id.piece))
        };
        match message {
            ServerMessage::Ack(ack) => {
                let Some((key, piece)) = about(&ack.acked_message_id) else {
                    return;
                };
                let through = ack.highest_output_sequence.unwrap_or(0);
                if self
                    .unanswered
                    .iter()
                    .any(|it| (it.key, it.piece) == (key, piece))
                {
                    self.acknowledged.push((key, piece));
                }
                self.unanswered.retain(|it| {
                    let mine = it.lane() == lane(key, piece);
                    let is_output = matches!(it.piece, Piece::Output(..));
                    !(mine && (it.piece == piece || is_output && !it.is_after(through)))
                });
                if let Piece::Output(_, sequence) = piece {
                    let highest = sequence.max(through);
                    for it in &mut self.unanswered {
                        let mine = it.lane() == lane(key, piece);
                        it.overtaken |= mine && !it.is_after(highest);
                    }
                }
                self.heard_of(key, piece, now);
            }
            ServerMessage::Error(error) => {
                let Some((key, piece)) = error.related_message_id.as_deref().and_then(about) else {
                    return;
                };
                match error.highest_accepted_sequence {
                    _ if !error.retryable => self
                        .unanswered
                        .retain(|it| (it.key, it.piece) != (key, piece)),
                    Some(_) if error.code == OUTPUT_SEQUENCE_GAP => {}
                    _ => {
                        let named = |it: &&mut Unanswered| (it.key, it.piece) == (key, piece);
                        if let Some(it) = self.unanswered.iter_mut().find(named) {
                            (it.sent_at, it.overtaken) = (now, true);
                            self.heard_of(key, piece, now);
                        }
                    }
                }
            }
            _ => {}
        }
    }

    fn heard_of(&mut self, key: AttemptKey, piece: Piece, now: Duration) {
        for it in &mut self.unanswered {
            if it.lane() == lane(key, piece) {
                it.stream_heard_at = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::server_message::{Ack, ServerError};

    const NOW: Duration = Duration::from_secs(1);

    fn key() -> AttemptKey {
        AttemptKey::of("t0", "a")
    }

    fn id(sequence: u64) -> String {
        format!("{INCARNATION}-{}-o-{sequence}", key())
    }

    fn send(flight: &mut Flight, sequences: std::ops::RangeInclusive<u64>, now: Duration) {
        for sequence in sequences {
            let candidate = Candidate {
                at: (),
                key: key(),
                piece: Piece::Output(Stream::Stdout, sequence),
                bytes: 1,
                after_hole: false,
            };
            flight.sends(&candidate, now);
        }
    }

    fn hear(flight: &mut Flight, message: &ServerMessage) {
        flight.hears(message, NOW);
    }

    fn error(code: &str, sequence: u64, highest: Option<u64>) -> ServerMessage {
        ServerMessage::Error(ServerError {
            code: code.into(),
            message: String::new(),
            retryable: true,
            related_message_id: Some(id(sequence)),
            highest_accepted_sequence: highest,
        })
    }

    #[test]
    #[should_panic(expected = "65 messages of 65 bytes are sent and unanswered")]
    fn more_than_the_window_is_noticed() {
        let mut flight = Flight::default();
        send(&mut flight, 1..=64, NOW);
        hear(&mut flight, &error("busy", 1, None));
        send(&mut flight, 65..=65, NOW);
    }

    #[test]
    fn answers_and_repeats_make_room() {
        let mut flight = Flight::default();
        send(&mut flight, 1..=64, NOW);
        let ack = Ack {
            acked_message_id: id(40),
            acked_type: "task.output".into(),
            task_id: None,
            execution_attempt_id: None,
            highest_output_sequence: Some(10),
        };
        hear(&mut flight, &ServerMessage::Ack(ack));
        assert_eq!(flight.unanswered.len(), 53);
        hear(&mut flight, &error(OUTPUT_SEQUENCE_GAP, 61, Some(60)));
        assert_eq!(flight.unanswered.len(), 53);
        flight.withdrawn(key(), Stream::Stdout, 61);
        assert_eq!(flight.unanswered.len(), 49);
        send(&mut flight, 61..=61, NOW + ACK_TIMEOUT);
        assert_eq!(flight.unanswered.len(), 1);
        send(&mut flight, 62..=64, NOW + ACK_TIMEOUT);
        let ack = Ack {
            acked_message_id: id(63),
            acked_type: "task.output".into(),
            task_id: None,
            execution_attempt_id: None,
            highest_output_sequence: None,
        };
        let later = NOW + ACK_TIMEOUT + ACK_TIMEOUT / 2;
        flight.hears(&ServerMessage::Ack(ack), later);
        send(&mut flight, 65..=65, NOW + 2 * ACK_TIMEOUT);
        let left = flight.unanswered.iter().map(|it| it.piece);
        let output = |sequence| Piece::Output(Stream::Stdout, sequence);
        // 61 and 62 were overtaken; what came behind them waits for its stream.
        assert_eq!(left.collect::<Vec<_>>(), [output(64), output(65)]);
        // About one that is answered already: nothing is heard of its stream by that.
        let busy = error("busy", 63, None);
        flight.hears(&busy, NOW + 2 * ACK_TIMEOUT);
        send(&mut flight, 66..=66, later + ACK_TIMEOUT);
        assert_eq!(flight.unanswered.len(), 1);
        flight.withdrawn(key(), Stream::Stderr, 1);
        assert_eq!(flight.unanswered.len(), 1);
        flight.withdrawn(key(), Stream::Stdout, 1);
        assert_eq!(flight.unanswered.len(), 0);
    }
}
