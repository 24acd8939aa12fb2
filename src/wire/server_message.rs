//! What a control plane sends to its agent (PROTOCOL.md 3, "Server to agent").

use serde::{Deserialize, Serialize};

use super::envelope::{DecodeError, Envelope, Header, write_frame};
use super::timestamp::Timestamp;
use crate::ids::{Ids, Stream};

/// A task as it is offered, by whichever way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskOffer {
    pub ids: Ids,
    pub command: String,
    /// A larger number is more urgent.
    pub priority: i64,
    /// Bound of the run time, seconds; `None` or 0 means none.
    pub timeout_seconds: Option<u64>,
}

/// Payload of `agent.hello_ack`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    pub acked_message_id: String,
    pub acked_type: String,
    pub delivery_enabled: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged_final_message_ids: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discarded_attempts: Option<Vec<DiscardedAttempt>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_replay: Option<Vec<OutputReplay>>,
    /// Extensions granted (PROTOCOL.md 5).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extensions: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_interval_seconds: Option<u64>,
}

impl HelloAck {
    /// Whether any of the three directive lists is there; `[]` counts (PROTOCOL.md 4.5).
    pub fn has_directives(&self) -> bool {
        self.acknowledged_final_message_ids.is_some()
            || self.discarded_attempts.is_some()
            || self.output_replay.is_some()
    }

    pub fn grants(&self, extension: &str) -> bool {
        self.extensions
            .as_ref()
            .is_some_and(|granted| granted.iter().any(|name| name == extension))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardedAttempt {
    pub task_id: String,
    pub execution_attempt_id: String,
    #[serde(default)]
    pub reason: Option<String>,
}

/// Acknowledges everything below `next_sequence` and asks for the stream from there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputReplay {
    pub task_id: String,
    pub execution_attempt_id: String,
    pub stream: Stream,
    pub next_sequence: u64,
}

/// Payload of `ack`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    pub acked_message_id: String,
    pub acked_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution_attempt_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest_output_sequence: Option<u64>,
}

/// The code of a retryable error that reports a hole in a stream.
pub const OUTPUT_SEQUENCE_GAP: &str = "output_sequence_gap";

/// Payload of `error`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerError {
    pub code: String,
    #[serde(default)]
    pub message: String,
    pub retryable: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub related_message_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub highest_accepted_sequence: Option<u64>,
}

/// One message of a control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerMessage {
    HelloAck(Box<HelloAck>),
    Deliver(Box<TaskOffer>),
    Ack(Ack),
    Error(ServerError),
    /// Extension `cancel`.
    Cancel {
        ids: Ids,
        reason: Option<String>,
    },
    /// A type that the agent does not know: logged and ignored.
    Unknown(String),
}

#[derive(Serialize, Deserialize)]
struct DeliverPayload {
    command: String,
    #[serde(default)]
    priority: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timeout_seconds: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct CancelPayload {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl ServerMessage {
    /// Reads one text frame that should be addressed to `agent_id`.
    pub fn decode(frame: &str, agent_id: &str) -> Result<ServerMessage, DecodeError> {
        let envelope = Envelope::decode(frame, agent_id)?;
        Ok(match envelope.kind.as_ref() {
            "agent.hello_ack" => ServerMessage::HelloAck(envelope.payload()?),
            "ack" => ServerMessage::Ack(envelope.payload()?),
            "error" => ServerMessage::Error(envelope.payload()?),
            "task.deliver" => {
                let payload: DeliverPayload = envelope.payload()?;
                ServerMessage::Deliver(Box::new(TaskOffer {
                    ids: envelope.attempt()?,
                    command: payload.command,
                    priority: payload.priority.unwrap_or(0),
                    timeout_seconds: payload.timeout_seconds.filter(|&seconds| seconds > 0),
                }))
            }
            "task.cancel" => ServerMessage::Cancel {
                ids: envelope.attempt()?,
                reason: envelope.payload::<CancelPayload>()?.reason,
            },
            other => ServerMessage::Unknown(other.to_owned()),
        })
    }

    /// Appends the frame to `out`; the other direction of [`ServerMessage::decode`].
    pub fn encode(&self, message_id: &str, agent_id: &str, sent_at: Timestamp, out: &mut Vec<u8>) {
        let header = Header {
            message_id,
            agent_id,
            sent_at,
        };
        match self {
            ServerMessage::HelloAck(ack) => {
                write_frame(out, header, "agent.hello_ack", None, None, ack);
            }
            ServerMessage::Ack(ack) => {
                write_frame(out, header, "ack", None, None, ack);
            }
            ServerMessage::Error(error) => {
                write_frame(out, header, "error", None, None, error);
            }
            ServerMessage::Deliver(offer) => {
                let payload = DeliverPayload {
                    command: offer.command.clone(),
                    priority: Some(offer.priority),
                    timeout_seconds: offer.timeout_seconds,
                };
                let ids = Some(&offer.ids);
                write_frame(out, header, "task.deliver", ids, None, payload);
            }
            ServerMessage::Cancel { ids, reason } => {
                let payload = CancelPayload {
                    reason: reason.clone(),
                };
                let ids = Some(ids);
                write_frame(out, header, "task.cancel", ids, None, payload);
            }
            ServerMessage::Unknown(_) => {
                debug_assert!(false, "an unknown message is never sent");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(message: &ServerMessage) {
        let mut out = Vec::new();
        message.encode("m", "agent", Timestamp(0), &mut out);
        let frame = String::from_utf8(out).expect("JSON is UTF-8");
        assert_eq!(
            ServerMessage::decode(&frame, "agent").as_ref(),
            Ok(message),
            "{frame}"
        );
    }

    #[test]
    fn messages_survive_the_wire() {
        let ids = Ids::new("t", "a").expect("short");
        round_trip(&ServerMessage::HelloAck(Box::new(HelloAck {
            acked_message_id: "h".into(),
            acked_type: "agent.hello".into(),
            delivery_enabled: true,
            acknowledged_final_message_ids: Some(vec![]),
            discarded_attempts: Some(vec![DiscardedAttempt {
                task_id: "t".into(),
                execution_attempt_id: "a".into(),
                reason: None,
            }]),
            output_replay: None,
            extensions: Some(vec!["cancel".into()]),
            lease_interval_seconds: Some(5),
        })));
        round_trip(&ServerMessage::Deliver(Box::new(TaskOffer {
            ids: ids.clone(),
            command: "echo \u{0}".into(),
            priority: -3,
            timeout_seconds: Some(9),
        })));
        round_trip(&ServerMessage::Cancel {
            ids,
            reason: Some("why".into()),
        });
        round_trip(&ServerMessage::Error(ServerError {
            code: OUTPUT_SEQUENCE_GAP.into(),
            message: String::new(),
            retryable: true,
            related_message_id: None,
            highest_accepted_sequence: Some(0),
        }));
    }

    #[test]
    fn null_directive_lists_are_absent_and_empty_ones_are_not() {
        let check = |lists: &str, expected: bool| {
            let frame = format!(
                r#"{{"protocol_version":1,"message_id":"m","type":"agent.hello_ack","agent_id":"a",
                "payload":{{"acked_message_id":"h","acked_type":"agent.hello","delivery_enabled":false
                {lists}}}}}"#
            );
            let Ok(ServerMessage::HelloAck(ack)) = ServerMessage::decode(&frame, "a") else {
                panic!("not a hello_ack: {frame}");
            };
            assert_eq!(ack.has_directives(), expected, "{lists}");
        };
        check("", false);
        check(
            r#","acknowledged_final_message_ids":null,"discarded_attempts":null,"output_replay":null"#,
            false,
        );
        check(r#","output_replay":[]"#, true);
    }

    #[test]
    fn a_delivery_without_an_attempt_is_refused() {
        let frame = r#"{"protocol_version":1,"message_id":"m","type":"task.deliver","agent_id":"a",
            "task_id":"t","payload":{"command":"true","priority":0}}"#;
        assert_eq!(
            ServerMessage::decode(frame, "a"),
            Err(DecodeError::Invalid("task_id or execution_attempt_id"))
        );
    }

    #[test]
    fn unknown_types_are_told_by_name() {
        let frame = r#"{"protocol_version":1,"message_id":"m","type":"task.dance","agent_id":"a"}"#;
        assert_eq!(
            ServerMessage::decode(frame, "a"),
            Ok(ServerMessage::Unknown("task.dance".into()))
        );
    }
}
