//! What an agent sends to its control plane (PROTOCOL.md 3, "Agent to server").

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::envelope::{
    DecodeError, Empty, Envelope, Header, push_json, write_frame, write_frame_around,
};
use super::text::{Lossy, push_base64, push_lossy, push_string, push_text};
use super::timestamp::Timestamp;
use crate::ids::{FinalStatus, Ids, Stream, Usage};

/// Payload of `agent.hello`: what this device holds and does, at this moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub client_version: String,
    pub capabilities: Capabilities,
    pub running_task: Option<RunningTask>,
    pub received_not_started: Vec<ReceivedTask>,
    pub unacked_finals: Vec<UnackedFinal>,
    pub unacked_output: Vec<UnackedOutput>,
    pub spool_status: SpoolStatus,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub results_enabled: bool,
    pub delivery_enabled: bool,
    /// Extensions that the agent offers (PROTOCOL.md 5).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningTask {
    pub task_id: String,
    pub execution_attempt_id: String,
    pub started_at: String,
    pub last_output_sequence: LastSequences,
}

/// Highest sequence stored of each stream; 0 = none yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastSequences {
    pub stdout: u64,
    pub stderr: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceivedTask {
    pub task_id: String,
    pub execution_attempt_id: String,
    pub received_at: String,
}

/// A final as the hello carries it: whole, or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnackedFinal {
    pub message_id: String,
    pub task_id: String,
    pub execution_attempt_id: String,
    #[serde(flatten)]
    pub result: FinalPayload<String>,
}

/// The range of one stream that waits, one entry a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnackedOutput {
    pub task_id: String,
    pub execution_attempt_id: String,
    pub stream: Stream,
    pub first_sequence: u64,
    pub last_sequence: u64,
    pub truncated_locally: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolStatus {
    pub bytes_used: u64,
    pub byte_cap: u64,
    pub has_rotated_chunks: bool,
    /// The store is in memory only.
    #[serde(default, skip_serializing_if = "is_false")]
    pub volatile: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Payload of `task.final`. `T` is the text type: [`Lossy`] to write, `String` to read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
pub struct FinalPayload<T> {
    pub status: FinalStatus,
    pub exit_code: i32,
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub output: Option<T>,
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub error: Option<T>,
    pub output_truncated: bool,
    pub error_truncated: bool,
    /// Extension `usage`, if it was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

fn none<T>() -> Option<T> {
    None
}

/// Payload of `task.output` as written: `data` stands for exactly `bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputPayload<'a> {
    pub stream: Stream,
    pub bytes: &'a [u8],
    /// Tells the server to accept a jump in the sequence.
    pub truncated_locally: bool,
    /// Extension `binary_output` is granted: bytes that are no UTF-8 travel exactly.
    pub binary_granted: bool,
}

impl OutputPayload<'_> {
    /// Appends the JSON object: the bytes go from where they lie into the frame in one step.
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"stream\":");
        push_string(out, self.stream.as_str());
        let begin = out.len();
        out.extend_from_slice(b",\"data\":");
        if !self.binary_granted {
            push_lossy(out, self.bytes);
        } else if !push_text(out, self.bytes) {
            out.truncate(begin);
            out.extend_from_slice(b",\"encoding\":\"base64\",\"data\":");
            push_base64(out, self.bytes);
        }
        out.extend_from_slice(b",\"byte_count\":");
        push_json(out, &self.bytes.len());
        if self.truncated_locally {
            out.extend_from_slice(b",\"truncated_locally\":true");
        }
        out.push(b'}');
    }
}

/// Payload of `task.output` as read by a control plane.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ReceivedOutput {
    pub stream: Stream,
    pub data: String,
    pub byte_count: u64,
    #[serde(default)]
    pub truncated_locally: Option<bool>,
    /// `base64`, or absent for text.
    #[serde(default)]
    pub encoding: Option<String>,
}

/// One message of an agent, to be written.
#[derive(Debug, Clone, Copy)]
pub enum AgentMessage<'a> {
    Hello(&'a Hello),
    Received(&'a Ids),
    Started(&'a Ids),
    Output {
        ids: &'a Ids,
        sequence: u64,
        payload: OutputPayload<'a>,
    },
    Final {
        ids: &'a Ids,
        payload: &'a FinalPayload<Lossy<'a>>,
    },
    LeaseHeartbeat(&'a Ids),
}

impl AgentMessage<'_> {
    /// Appends the frame to `out`. `message_id` must be the message's own on every repeat.
    pub fn encode(
        &self,
        message_id: impl Serialize,
        agent_id: &str,
        sent_at: Timestamp,
        out: &mut Vec<u8>,
    ) {
        let header = Header {
            message_id,
            agent_id,
            sent_at,
        };
        match *self {
            AgentMessage::Hello(hello) => {
                write_frame(out, header, "agent.hello", None, None, hello);
            }
            AgentMessage::Received(ids) => {
                let ids = Some(ids);
                write_frame(out, header, "task.received", ids, None, Empty {});
            }
            AgentMessage::Started(ids) => {
                let ids = Some(ids);
                write_frame(out, header, "task.started", ids, None, Empty {});
            }
            AgentMessage::Output {
                ids,
                sequence,
                payload,
            } => {
                let (ids, sequence) = (Some(ids), Some(sequence));
                let write = |out: &mut Vec<u8>| payload.write(out);
                write_frame_around(out, header, "task.output", ids, sequence, write);
            }
            AgentMessage::Final { ids, payload } => {
                let ids = Some(ids);
                write_frame(out, header, "task.final", ids, None, payload);
            }
            AgentMessage::LeaseHeartbeat(ids) => {
                let (kind, ids) = ("task.lease_heartbeat", Some(ids));
                write_frame(out, header, kind, ids, None, Empty {});
            }
        }
    }
}

/// One message of an agent, as read by a control plane.
#[derive(Debug, Clone, PartialEq)]
pub enum ReceivedMessage {
    Hello(Box<Hello>),
    Received(Ids),
    Started(Ids),
    Output {
        ids: Ids,
        sequence: u64,
        output: ReceivedOutput,
    },
    Final {
        ids: Ids,
        result: FinalPayload<String>,
    },
    LeaseHeartbeat(Ids),
    Unknown(String),
}

impl ReceivedMessage {
    pub fn decode(envelope: &Envelope<'_>) -> Result<ReceivedMessage, DecodeError> {
        Ok(match envelope.kind.as_ref() {
            "agent.hello" => ReceivedMessage::Hello(envelope.payload()?),
            "task.received" => ReceivedMessage::Received(envelope.attempt()?),
            "task.started" => ReceivedMessage::Started(envelope.attempt()?),
            "task.output" => ReceivedMessage::Output {
                ids: envelope.attempt()?,
                sequence: envelope.sequence.ok_or(DecodeError::Invalid("sequence"))?,
                output: envelope.payload()?,
            },
            "task.final" => ReceivedMessage::Final {
                ids: envelope.attempt()?,
                result: envelope.payload()?,
            },
            "task.lease_heartbeat" => ReceivedMessage::LeaseHeartbeat(envelope.attempt()?),
            other => ReceivedMessage::Unknown(other.to_owned()),
        })
    }
}

/// A text of a final, `None` if it is empty: empty optional fields are left out (PROTOCOL.md).
pub fn optional_text(bytes: &[u8]) -> Option<Lossy<'_>> {
    (!bytes.is_empty()).then_some(Lossy(bytes))
}

/// Bytes as an owned text, every sequence that is no UTF-8 as U+FFFD.
pub fn lossy_string(bytes: &[u8]) -> String {
    match String::from_utf8_lossy(bytes) {
        Cow::Borrowed(text) => text.to_owned(),
        Cow::Owned(text) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::MessageId;
    use crate::wire::Piece;

    fn ids() -> Ids {
        Ids::new("t1", "a1").expect("short")
    }

    fn encode(message: AgentMessage<'_>) -> String {
        let mut out = Vec::new();
        message.encode("m-1", "agent", Timestamp(0), &mut out);
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    fn decode(frame: &str) -> ReceivedMessage {
        ReceivedMessage::decode(&Envelope::decode(frame, "agent").expect(frame)).expect(frame)
    }

    #[test]
    fn output_is_written_to_the_letter() {
        let frame = encode(AgentMessage::Output {
            ids: &ids(),
            sequence: 7,
            payload: OutputPayload {
                stream: Stream::Stderr,
                bytes: b"a\"b\n",
                truncated_locally: false,
                binary_granted: true,
            },
        });
        assert_eq!(
            frame,
            concat!(
                r#"{"protocol_version":1,"message_id":"m-1","type":"task.output","agent_id":"agent","#,
                r#""task_id":"t1","execution_attempt_id":"a1","sequence":7,"#,
                r#""sent_at":"1970-01-01T00:00:00.000Z","#,
                r#""payload":{"stream":"stderr","data":"a\"b\n","byte_count":4}}"#
            )
        );
    }

    #[test]
    fn binary_output_travels_exactly_only_where_granted() {
        let check = |binary_granted, data: &str, encoding: Option<&str>| {
            let message = decode(&encode(AgentMessage::Output {
                ids: &ids(),
                sequence: 1,
                payload: OutputPayload {
                    stream: Stream::Stdout,
                    bytes: b"\xff\x00",
                    truncated_locally: true,
                    binary_granted,
                },
            }));
            let expected = ReceivedMessage::Output {
                ids: ids(),
                sequence: 1,
                output: ReceivedOutput {
                    stream: Stream::Stdout,
                    data: data.into(),
                    byte_count: 2,
                    truncated_locally: Some(true),
                    encoding: encoding.map(Into::into),
                },
            };
            assert_eq!(message, expected);
        };
        check(true, "/wA=", Some("base64"));
        check(false, "\u{fffd}\0", None);
    }

    #[test]
    fn a_final_leaves_out_empty_texts_and_writes_the_rest() {
        let payload = FinalPayload {
            status: FinalStatus::Failed,
            exit_code: -1,
            output: optional_text(b""),
            error: optional_text(b"killed by signal 9"),
            output_truncated: false,
            error_truncated: false,
            usage: None,
        };
        let frame = encode(AgentMessage::Final {
            ids: &ids(),
            payload: &payload,
        });
        assert!(frame.ends_with(concat!(
            r#""payload":{"status":"failed","exit_code":-1,"error":"killed by signal 9","#,
            r#""output_truncated":false,"error_truncated":false}}"#
        )));
        let ReceivedMessage::Final { result, .. } = decode(&frame) else {
            panic!("not a final: {frame}");
        };
        assert_eq!(result.output, None);
        assert_eq!(result.error.as_deref(), Some("killed by signal 9"));
    }

    #[test]
    fn hello_survives_the_wire_and_running_task_is_null_when_idle() {
        let hello = Hello {
            client_version: "1".into(),
            capabilities: Capabilities {
                results_enabled: true,
                delivery_enabled: true,
                extensions: vec!["binary_output".into()],
            },
            running_task: None,
            received_not_started: vec![],
            unacked_finals: vec![UnackedFinal {
                message_id: "i".into(),
                task_id: "t".into(),
                execution_attempt_id: "a".into(),
                result: FinalPayload {
                    status: FinalStatus::Completed,
                    exit_code: 0,
                    output: Some("x".into()),
                    error: None,
                    output_truncated: false,
                    error_truncated: false,
                    usage: None,
                },
            }],
            unacked_output: vec![],
            spool_status: SpoolStatus {
                bytes_used: 1,
                byte_cap: 2,
                has_rotated_chunks: false,
                volatile: false,
            },
        };
        let frame = encode(AgentMessage::Hello(&hello));
        assert!(frame.contains(r#""running_task":null"#), "{frame}");
        assert!(!frame.contains("volatile"), "{frame}");
        assert_eq!(decode(&frame), ReceivedMessage::Hello(Box::new(hello)));
    }

    #[test]
    fn an_attempt_message_keeps_its_id() {
        let id = MessageId {
            incarnation: "i",
            key: ids().key(),
            piece: Piece::Received,
        };
        let mut out = Vec::new();
        AgentMessage::Received(&ids()).encode(id, "agent", Timestamp(0), &mut out);
        let frame = String::from_utf8(out).expect("JSON is UTF-8");
        let envelope = Envelope::decode(&frame, "agent").expect("valid");
        assert_eq!(MessageId::parse(&envelope.message_id), Some(id));
        assert_eq!(
            ReceivedMessage::decode(&envelope).expect("valid"),
            ReceivedMessage::Received(ids())
        );
    }
}
