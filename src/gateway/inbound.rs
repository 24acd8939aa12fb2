//! Messages of an agent: what each one changes, and what is answered once that is durable.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::borrow::Cow;

use super::commits::Batch;
use super::delivery::{Chunk, FinalVerdict, OutputVerdict, Progress};
use super::hub::Hub;
use super::journal::{Header, Kind};
use super::operator_types::TaskResult;
use crate::ids::{Ids, Stream};
use crate::wire::agent_message::{FinalPayload, ReceivedMessage, ReceivedOutput};
use crate::wire::server_message::{Ack, OUTPUT_SEQUENCE_GAP, ServerError};
use crate::wire::{Envelope, ServerMessage};

/// An answer that waits for its commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub message: ServerMessage,
    /// The stream whose chunks up to this one it acknowledges.
    stream: Option<(Ids, Stream)>,
}

/// What came of one message.
#[derive(Default)]
pub struct Outcome {
    pub reply: Option<Reply>,
    /// The task of a message that shows that the device has it.
    pub answers: Option<String>,
}

/// Judges one message and stages what is accepted. The task it names is in memory, if it exists.
pub fn take(hub: &Hub, agent_id: &str, envelope: &Envelope<'_>, batch: &mut Batch) -> Outcome {
    let message = match ReceivedMessage::decode(envelope) {
        Ok(message) => message,
        Err(error) => return refuse(agent_id, envelope, "invalid_message", error.to_string()),
    };
    let ids = match &message {
        ReceivedMessage::Received(ids)
        | ReceivedMessage::Started(ids)
        | ReceivedMessage::Output { ids, .. }
        | ReceivedMessage::Final { ids, .. }
        | ReceivedMessage::LeaseHeartbeat(ids) => ids.clone(),
        ReceivedMessage::Unknown(kind) => {
            let why = format!("messages of type {kind:.60?} are not known here");
            return refuse(agent_id, envelope, "unknown_type", why);
        }
        // The session has dealt with it.
        ReceivedMessage::Hello(_) => return Outcome::default(),
    };
    let progress = hub.with_task(&ids.task, |live| {
        let task = &live.attempt.task;
        let same = task.agent_id == agent_id && task.attempt_id == ids.attempt.as_str();
        same.then_some(live.attempt.progress)
    });
    let Some(progress) = progress.flatten() else {
        let why = format!("attempt {ids} is not one of this agent's");
        return refuse(agent_id, envelope, "unknown_attempt", why);
    };
    // Also a repeat is acknowledged when what it repeats is durable.
    hub.touch(batch, &ids.task);
    let mut outcome = match message {
        ReceivedMessage::Received(_) => {
            if progress < Progress::Received {
                hub.stage(batch, &ids.task, Header::plain(Kind::Received, b""), b"");
            }
            acknowledge(envelope, &ids, None)
        }
        ReceivedMessage::Started(_) => {
            if progress < Progress::Started {
                hub.stage(batch, &ids.task, Header::plain(Kind::Started, b""), b"");
            }
            acknowledge(envelope, &ids, None)
        }
        ReceivedMessage::Output {
            sequence, output, ..
        } => take_output(hub, agent_id, envelope, batch, &ids, sequence, &output),
        ReceivedMessage::Final { result, .. } => {
            take_final(hub, agent_id, batch, &ids, result);
            acknowledge(envelope, &ids, None)
        }
        // A sign of life, which the session has noted; it is no message of the outbox.
        ReceivedMessage::LeaseHeartbeat(_)
        | ReceivedMessage::Hello(_)
        | ReceivedMessage::Unknown(_) => Outcome::default(),
    };
    outcome.answers = Some(ids.task.as_str().to_owned());
    outcome
}

fn take_output(
    hub: &Hub,
    agent_id: &str,
    envelope: &Envelope<'_>,
    batch: &mut Batch,
    ids: &Ids,
    sequence: u64,
    output: &ReceivedOutput,
) -> Outcome {
    let (bytes, exact) = match decode_data(output) {
        Ok(decoded) => decoded,
        Err(why) => return refuse(agent_id, envelope, "invalid_output", why),
    };
    let chunk = Chunk {
        stream: output.stream,
        sequence,
        bytes: &bytes,
        byte_count: output.byte_count,
        exact,
        truncated_locally: output.truncated_locally == Some(true),
    };
    let verdict = hub.with_task(&ids.task, |live| live.attempt.judge_output(&chunk));
    let name = output.stream.as_str();
    match verdict {
        None => return Outcome::default(),
        Some(OutputVerdict::Store(header)) => {
            hub.stage(batch, &ids.task, header, &bytes);
            let jumped = header.flags & super::journal::FLAG_JUMP != 0;
            if jumped {
                log::warn!(
                    "attempt {ids}: output before chunk {sequence} of {name} was lost there"
                );
            }
            hub.count(agent_id, |counters| {
                counters.chunks += 1;
                counters.bytes += bytes.len() as u64;
                counters.truncated_jumps += u64::from(jumped);
            });
        }
        Some(OutputVerdict::Repeat) => hub.count(agent_id, |counters| counters.duplicates += 1),
        Some(OutputVerdict::ChangedRepeat) => {
            log::error!(
                "attempt {ids}: agent {agent_id} sent chunk {sequence} of {name} again with other \
                 bytes; the first ones are kept"
            );
            hub.count(agent_id, |counters| counters.changed_repeats += 1);
        }
        Some(OutputVerdict::Gap { highest }) => {
            log::warn!(
                "attempt {ids}: chunk {sequence} of {name} came after {highest}; asking for {}",
                highest + 1
            );
            hub.count(agent_id, |counters| counters.gaps += 1);
            return error(ServerError {
                code: OUTPUT_SEQUENCE_GAP.into(),
                message: format!("{name}: {sequence} came, {} is expected", highest + 1),
                retryable: true,
                related_message_id: Some(envelope.message_id.to_string()),
                highest_accepted_sequence: Some(highest),
            });
        }
    }
    acknowledge(envelope, ids, Some((hub, output.stream)))
}

/// The bytes of a chunk, and whether they are exactly the agent's.
fn decode_data(output: &ReceivedOutput) -> Result<(Cow<'_, [u8]>, bool), String> {
    let (bytes, exact) = match output.encoding.as_deref() {
        None => {
            let exact = !output.data.contains('\u{fffd}');
            (Cow::Borrowed(output.data.as_bytes()), exact)
        }
        Some("base64") => {
            let bytes = STANDARD
                .decode(&output.data)
                .map_err(|error| format!("data is no base64: {error}"))?;
            (Cow::Owned(bytes), true)
        }
        Some(other) => return Err(format!("encoding {other:.40?} is not known here")),
    };
    if exact && bytes.len() as u64 != output.byte_count {
        return Err(format!(
            "byte_count is {}, data stands for {}",
            output.byte_count,
            bytes.len()
        ));
    }
    Ok((bytes, exact))
}

fn take_final(
    hub: &Hub,
    agent_id: &str,
    batch: &mut Batch,
    ids: &Ids,
    result: FinalPayload<String>,
) {
    let result = TaskResult {
        status: result.status.as_str().to_owned(),
        exit_code: result.exit_code,
        output: result.output,
        error: result.error,
        output_truncated: result.output_truncated,
        error_truncated: result.error_truncated,
        via: "websocket".into(),
    };
    match hub.with_task(&ids.task, |live| live.attempt.judge_final(&result)) {
        None => {}
        Some(FinalVerdict::Store) => {
            let payload = serde_json::to_vec(&result).expect("a result is JSON");
            hub.stage(
                batch,
                &ids.task,
                Header::plain(Kind::Final, &payload),
                &payload,
            );
            hub.count(agent_id, |counters| counters.finals += 1);
            log::info!(
                "attempt {ids}: {}, exit code {}",
                result.status,
                result.exit_code
            );
        }
        Some(FinalVerdict::Repeat) => hub.count(agent_id, |counters| counters.duplicates += 1),
        Some(FinalVerdict::Changed) => {
            hub.count(agent_id, |counters| counters.changed_repeats += 1);
            log::error!(
                "attempt {ids}: agent {agent_id} sent another final than before; the first is kept"
            );
        }
    }
}

/// An `ack`; of a chunk with the highest sequence, which is durable when the ack is sent.
fn acknowledge(envelope: &Envelope<'_>, ids: &Ids, output: Option<(&Hub, Stream)>) -> Outcome {
    let highest = output.and_then(|(hub, stream)| {
        hub.with_task(&ids.task, |live| {
            live.attempt.streams[stream.index()].highest
        })
    });
    Outcome {
        reply: Some(Reply {
            message: ServerMessage::Ack(Ack {
                acked_message_id: envelope.message_id.to_string(),
                acked_type: envelope.kind.to_string(),
                task_id: Some(ids.task.as_str().to_owned()),
                execution_attempt_id: Some(ids.attempt.as_str().to_owned()),
                highest_output_sequence: highest,
            }),
            stream: output.map(|(_, stream)| (ids.clone(), stream)),
        }),
        answers: None,
    }
}

/// The message will never be taken; the agent is to remove it.
fn refuse(agent_id: &str, envelope: &Envelope<'_>, code: &str, why: String) -> Outcome {
    log::warn!(
        "agent {agent_id}: message {:.80} refused as {code}: {why}",
        envelope.message_id
    );
    error(ServerError {
        code: code.to_owned(),
        message: why,
        retryable: false,
        related_message_id: Some(envelope.message_id.to_string()),
        highest_accepted_sequence: None,
    })
}

fn error(error: ServerError) -> Outcome {
    Outcome {
        reply: Some(Reply {
            message: ServerMessage::Error(error),
            stream: None,
        }),
        answers: None,
    }
}

/// Leaves out the acknowledgements that a later one of the same stream contains.
pub fn coalesce(replies: Vec<Reply>) -> Vec<ServerMessage> {
    let mut kept = Vec::with_capacity(replies.len());
    let mut seen: Vec<(Ids, Stream)> = Vec::new();
    for reply in replies.into_iter().rev() {
        if let Some(stream) = reply.stream {
            if seen.contains(&stream) {
                continue;
            }
            seen.push(stream);
        }
        kept.push(reply.message);
    }
    kept.reverse();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_acknowledgement_a_stream_is_enough_and_all_else_stays_in_order() {
        let ids = |task| Ids::new(task, "a").expect("short");
        let ack = |message_id: &str, stream: Option<(Ids, Stream)>| Reply {
            message: ServerMessage::Ack(Ack {
                acked_message_id: message_id.into(),
                acked_type: String::new(),
                task_id: None,
                execution_attempt_id: None,
                highest_output_sequence: None,
            }),
            stream,
        };
        let out = |task| Some((ids(task), Stream::Stdout));
        let replies = vec![
            ack("started", None),
            ack("t-out-1", out("t")),
            ack("t-err-1", Some((ids("t"), Stream::Stderr))),
            ack("u-out-1", out("u")),
            ack("t-out-2", out("t")),
            ack("final", None),
        ];
        let kept: Vec<String> = coalesce(replies)
            .into_iter()
            .map(|message| match message {
                ServerMessage::Ack(ack) => ack.acked_message_id,
                other => panic!("no ack: {other:?}"),
            })
            .collect();
        assert_eq!(kept, ["started", "t-err-1", "u-out-1", "t-out-2", "final"]);
    }
}
