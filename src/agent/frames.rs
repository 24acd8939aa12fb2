//! What the store holds, as the wire wants it.

use std::sync::Arc;

use crate::ids::{AttemptKey, Ids, Incarnation, Stream};
use crate::outbox::{self, Body, Final, Snapshot, StoredFinal};
use crate::session::Granted;
use crate::session::delivery::Candidate;
use crate::wire::agent_message::{
    Capabilities, FinalPayload, LastSequences, ReceivedTask, RunningTask, SpoolStatus,
    UnackedFinal, UnackedOutput, lossy_string, optional_text,
};
use crate::wire::message_id::Piece;
use crate::wire::{AgentMessage, Hello, Lossy, MessageId, OutputPayload, Timestamp};

/// The envelope around a chunk and the JSON escapes of ordinary text.
const FRAME_OVERHEAD: usize = 1024;

/// What a session has to know of a stored message.
pub fn candidate(message: &outbox::Message) -> Candidate<outbox::Cursor> {
    let (piece, bytes, after_hole) = match &message.body {
        Body::Output {
            stream,
            sequence,
            data,
            after_hole,
        } => (Piece::Output(*stream, *sequence), data.len(), *after_hole),
        Body::Final { output, error, .. } => (Piece::Final, output.len() + error.len(), false),
    };
    Candidate {
        at: message.at,
        key: message.key,
        piece,
        bytes,
        after_hole,
    }
}

/// Appends one message of a batch to `frame`; `payload` is the batch's buffer.
pub fn encode(
    frame: &mut Vec<u8>,
    message: &outbox::Message,
    payload: &[u8],
    truncated_locally: bool,
    granted: Granted,
    agent_id: &str,
) {
    let piece = candidate(message).piece;
    let id = message_id(&message.store, message.key, piece);
    match &message.body {
        Body::Output {
            stream,
            sequence,
            data,
            ..
        } => {
            let bytes = &payload[data.clone()];
            frame.reserve(bytes.len() + bytes.len() / 16 + FRAME_OVERHEAD);
            let output = OutputPayload {
                stream: *stream,
                bytes,
                truncated_locally,
                binary_granted: granted.binary_output,
            };
            AgentMessage::Output {
                ids: &message.ids,
                sequence: *sequence,
                payload: output,
            }
            .encode(id, agent_id, Timestamp::now(), frame);
        }
        Body::Final {
            status,
            exit_code,
            output,
            error,
            output_truncated,
            error_truncated,
            usage,
        } => {
            let result = FinalPayload {
                status: *status,
                exit_code: *exit_code,
                output: optional_text(&payload[output.clone()]),
                error: optional_text(&payload[error.clone()]),
                output_truncated: *output_truncated,
                error_truncated: *error_truncated,
                usage: usage.filter(|_| granted.usage),
            };
            encode_final(frame, &message.ids, &result, &message.store, agent_id);
        }
    }
}

/// A final outside the order of the log: the answer to a repeated delivery.
pub fn encode_stored_final(
    ids: &Ids,
    stored: &StoredFinal,
    granted: Granted,
    agent_id: &str,
) -> Vec<u8> {
    let fin = &stored.fin;
    let result = FinalPayload {
        status: fin.status,
        exit_code: fin.exit_code,
        output: optional_text(&fin.output),
        error: optional_text(&fin.error),
        output_truncated: fin.output_truncated,
        error_truncated: fin.error_truncated,
        usage: fin.usage.filter(|_| granted.usage),
    };
    let mut frame = Vec::new();
    encode_final(&mut frame, ids, &result, &stored.store, agent_id);
    frame
}

fn encode_final(
    frame: &mut Vec<u8>,
    ids: &Ids,
    result: &FinalPayload<Lossy<'_>>,
    store: &Incarnation,
    agent_id: &str,
) {
    let text = |text: &Option<Lossy<'_>>| text.map_or(0, |text| text.0.len());
    let size = text(&result.output) + text(&result.error);
    frame.reserve(size + size / 16 + FRAME_OVERHEAD);
    let id = message_id(store, ids.key(), Piece::Final);
    let message = AgentMessage::Final {
        ids,
        payload: result,
    };
    message.encode(id, agent_id, Timestamp::now(), frame);
}

/// A message about an attempt without a payload.
pub fn encode_word(
    message: AgentMessage<'_>,
    key: AttemptKey,
    piece: Piece,
    store: &Incarnation,
    agent_id: &str,
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_OVERHEAD);
    let id = message_id(store, key, piece);
    message.encode(id, agent_id, Timestamp::now(), &mut frame);
    frame
}

/// A message whose id the session has made.
pub fn encode_named(message: AgentMessage<'_>, message_id: &str, agent_id: &str) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_OVERHEAD);
    message.encode(message_id, agent_id, Timestamp::now(), &mut frame);
    frame
}

fn message_id(store: &Incarnation, key: AttemptKey, piece: Piece) -> MessageId<'_> {
    MessageId {
        incarnation: store.as_str(),
        key,
        piece,
    }
}

/// The first sequence held of each stream that waits.
pub type FirstHeld = Vec<(AttemptKey, Stream, u64)>;

/// The hello that tells what a snapshot holds. Capabilities are the session's to fill in.
pub fn hello(snapshot: Snapshot) -> (Hello, FirstHeld) {
    let first_held = snapshot
        .streams
        .iter()
        .map(|range| (range.key, range.stream, range.first_sequence))
        .collect();
    let hello = Hello {
        client_version: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: Capabilities {
            results_enabled: true,
            delivery_enabled: true,
            extensions: Vec::new(),
        },
        running_task: snapshot
            .started
            .iter()
            .find(|(ids, ..)| ids.has_result_channel())
            .map(running_task),
        received_not_started: snapshot
            .received
            .iter()
            .filter(|(ids, _)| ids.has_result_channel())
            .map(|(ids, received_at_ms)| ReceivedTask {
                task_id: ids.task.to_string(),
                execution_attempt_id: ids.attempt.to_string(),
                received_at: Timestamp(*received_at_ms).to_string(),
            })
            .collect(),
        unacked_finals: snapshot
            .finals
            .into_iter()
            .map(|(ids, stored)| UnackedFinal {
                message_id: message_id(&stored.store, stored.key, Piece::Final).to_string(),
                task_id: ids.task.to_string(),
                execution_attempt_id: ids.attempt.to_string(),
                result: owned_final(&stored.fin),
            })
            .collect(),
        unacked_output: snapshot
            .streams
            .iter()
            .map(|range| UnackedOutput {
                task_id: range.ids.task.to_string(),
                execution_attempt_id: range.ids.attempt.to_string(),
                stream: range.stream,
                first_sequence: range.first_sequence,
                last_sequence: range.last_sequence,
                truncated_locally: range.truncated,
            })
            .collect(),
        spool_status: SpoolStatus {
            bytes_used: snapshot.counts.bytes_used,
            byte_cap: snapshot.counts.byte_cap,
            has_rotated_chunks: snapshot.counts.has_rotated_chunks,
            volatile: snapshot.counts.volatile,
        },
    };
    (hello, first_held)
}

fn running_task((ids, started_at_ms, last): &(Arc<Ids>, u64, [u64; 2])) -> RunningTask {
    RunningTask {
        task_id: ids.task.to_string(),
        execution_attempt_id: ids.attempt.to_string(),
        started_at: Timestamp(*started_at_ms).to_string(),
        last_output_sequence: LastSequences {
            stdout: last[Stream::Stdout.index()],
            stderr: last[Stream::Stderr.index()],
        },
    }
}

fn owned_final(fin: &Final) -> FinalPayload<String> {
    let text = |bytes: &[u8]| (!bytes.is_empty()).then(|| lossy_string(bytes));
    FinalPayload {
        status: fin.status,
        exit_code: fin.exit_code,
        output: text(&fin.output),
        error: text(&fin.error),
        output_truncated: fin.output_truncated,
        error_truncated: fin.error_truncated,
        // Nothing is granted yet.
        usage: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_names_no_attempt_without_result_channel() {
        let started = |name: &str, attempt: &str| {
            let ids = Arc::new(Ids::new(name, attempt).expect("short"));
            (ids, 1, [0, 0])
        };
        let snapshot = Snapshot {
            started: vec![started("old", ""), started("t", "a")],
            ..Snapshot::default()
        };
        let (hello, _) = hello(snapshot);
        assert_eq!(
            hello.running_task.map(|task| task.task_id),
            Some("t".into())
        );
    }
}
