//! What the server says, message by message (PROTOCOL.md 3).

use std::sync::Arc;

use log::{debug, info, warn};

use super::{Ack, Effect, Now, Session};
use crate::ids::Stream;
use crate::limits::REASON_BYTES_MAX;
use crate::wire::message_id::Piece;
use crate::wire::server_message::{self, OUTPUT_SEQUENCE_GAP, ServerError};
use crate::wire::{DecodeError, ServerMessage};

impl<C: Copy + Ord + Default> Session<C> {
    /// A text frame has arrived and was decoded, or could not be: that ends the session.
    pub fn received(&mut self, message: Result<ServerMessage, DecodeError>, now: Now) {
        self.heard(now);
        let message = match message {
            Ok(message) => message,
            Err(error) => return self.close(&error.to_string(), None, now),
        };
        match message {
            ServerMessage::HelloAck(ack) => self.hello_acknowledged(*ack, now),
            ServerMessage::Error(error) => self.error_received(&error, now),
            ServerMessage::Unknown(kind) => {
                info!("a message of unknown type {kind:.80?} from the server is ignored");
            }
            _ if !self.link.is_active() => {
                info!("a message from the server before its hello_ack is ignored");
            }
            ServerMessage::Ack(ack) => self.ack_received(&ack, now),
            ServerMessage::Deliver(offer) => self.offered(*offer, true, now),
            ServerMessage::Cancel { ids, reason } => {
                if self.cancel_granted {
                    self.cancel(Arc::new(ids), reason.as_deref());
                } else {
                    info!("task {ids}: a cancel that was not granted is ignored");
                }
            }
        }
    }

    fn ack_received(&mut self, ack: &server_message::Ack, now: Now) {
        let Some((key, piece)) = self.own_message(&ack.acked_message_id) else {
            debug!(
                "an acknowledgement of {:.80} is not for this store",
                ack.acked_message_id
            );
            return;
        };
        self.prove_link();
        match piece {
            Piece::Output(stream, sequence) => {
                let through = ack.highest_output_sequence;
                self.delivery
                    .acknowledged(key, piece, through, &mut self.failures, now);
                self.push_ack(Ack::Output {
                    key,
                    stream,
                    sequence,
                    cumulative: false,
                });
                if let Some(sequence) = through.filter(|&through| through > 0) {
                    self.push_ack(Ack::Output {
                        key,
                        stream,
                        sequence,
                        cumulative: true,
                    });
                }
            }
            Piece::Final => {
                self.delivery
                    .acknowledged(key, piece, None, &mut self.failures, now);
                self.push_ack(Ack::Final { key });
            }
            // These are not stored: nothing waits for their acknowledgement.
            Piece::Received | Piece::Started => {}
        }
    }

    fn error_received(&mut self, error: &ServerError, now: Now) {
        let text = format!("{:.80}: {:.300}", error.code, error.message);
        let related = error.related_message_id.as_deref();
        let about_hello = self.in_handshake() || related.is_some_and(|id| self.is_hello(id));
        if !error.retryable && (about_hello || related.is_none()) {
            self.close(&format!("the server ends the session: {text}"), None, now);
            return;
        }
        let Some((key, piece)) = related.and_then(|id| self.own_message(id)) else {
            warn!("error from the server: {text}");
            return;
        };
        if !error.retryable {
            warn!("the server will never take {}: {text}", describe(piece));
            if matches!(piece, Piece::Output(..) | Piece::Final) {
                self.delivery.refused(key, piece);
                self.delivery.hold();
                self.effects.push_back(Effect::Reject { key, piece });
            }
            return;
        }
        match (piece, error.highest_accepted_sequence) {
            (Piece::Output(stream, related), Some(highest))
                if error.code == OUTPUT_SEQUENCE_GAP =>
            {
                info!(
                    "the server misses {} of attempt {key} after number {highest}",
                    stream.as_str()
                );
                self.delivery
                    .gap(key, stream, related, highest, &mut self.failures, now);
            }
            (Piece::Output(..) | Piece::Final, _) => {
                warn!("the server cannot take {} now: {text}", describe(piece));
                self.delivery.postponed(key, piece, now);
            }
            (Piece::Received | Piece::Started, _) => warn!("error from the server: {text}"),
        }
    }

    fn cancel(&mut self, ids: Arc<crate::ids::Ids>, reason: Option<&str>) {
        let key = ids.key();
        let reason = cancel_reason(reason);
        if let Some(task) = self.tasks.remove(key) {
            info!("task {ids}: cancelled before its start");
            let ids = task.ids;
            self.effects.push_back(Effect::Interrupt { ids, reason });
        } else if self.tasks.running().iter().any(|task| task.key == key) {
            info!("task {ids}: cancelled, ending it");
            self.effects.push_back(Effect::Stop { key, reason });
        } else if self.tasks.cancel_recording(key, &reason) {
            info!("task {ids}: cancelled before its start");
        } else {
            info!("task {ids}: a cancel of what neither waits nor runs is ignored");
        }
    }
}

/// At most [`REASON_BYTES_MAX`] bytes: room for a longer one is not reserved.
fn cancel_reason(reason: Option<&str>) -> String {
    let mut text = match reason {
        Some(reason) if !reason.is_empty() => format!("cancelled: {reason:.900}"),
        _ => "cancelled by the server".to_owned(),
    };
    // A character may have four bytes.
    while text.len() > REASON_BYTES_MAX {
        text.pop();
    }
    text
}

fn describe(piece: Piece) -> String {
    match piece {
        Piece::Output(Stream::Stdout, sequence) => format!("chunk {sequence} of stdout"),
        Piece::Output(Stream::Stderr, sequence) => format!("chunk {sequence} of stderr"),
        Piece::Final => "a final".to_owned(),
        Piece::Received => "a receipt".to_owned(),
        Piece::Started => "the word of a start".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_of_long_characters_keeps_its_bound_in_bytes() {
        let check = |reason: Option<&str>, bytes: usize| {
            assert_eq!(cancel_reason(reason).len(), bytes, "{reason:.20?}");
        };
        check(None, 23);
        check(Some(""), 23);
        check(Some(&"x".repeat(2000)), 911);
        check(Some(&"\u{1f512}".repeat(2000)), 1023);
    }
}
