//! The JSON envelope of every WebSocket text frame (PROTOCOL.md 3).

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::text::push_string;
use super::timestamp::Timestamp;
use crate::ids::Ids;
use crate::limits::NAME_BYTES_MAX;

pub const PROTOCOL_VERSION: u32 = 1;

/// Why a frame is no valid envelope. All of them end the session (PROTOCOL.md 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DecodeError {
    /// No JSON, a missing field, or a field of the wrong type or range.
    Malformed(String),
    /// Another version of the protocol.
    Version(u32),
    /// Addressed to somebody else.
    WrongAgent(String),
    /// Well-formed, with a value that the contract does not allow.
    Invalid(&'static str),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::Malformed(why) => write!(f, "the frame is no valid envelope: {why}"),
            DecodeError::Version(version) => {
                write!(
                    f,
                    "protocol version {version}, only {PROTOCOL_VERSION} is known"
                )
            }
            DecodeError::WrongAgent(agent) => write!(f, "the frame is for agent {agent:?}"),
            DecodeError::Invalid(what) => write!(f, "the frame has an invalid {what}"),
        }
    }
}

impl std::error::Error for DecodeError {}

impl From<serde_json::Error> for DecodeError {
    fn from(error: serde_json::Error) -> DecodeError {
        DecodeError::Malformed(error.to_string())
    }
}

/// A decoded envelope whose payload is still text. Sizes of all names are checked.
#[derive(Debug)]
pub struct Envelope<'a> {
    pub message_id: Cow<'a, str>,
    pub kind: Cow<'a, str>,
    pub agent_id: Cow<'a, str>,
    pub ids: Option<Ids>,
    /// At least 1 where present.
    pub sequence: Option<u64>,
    pub sent_at: Cow<'a, str>,
    payload: Option<&'a RawValue>,
}

impl<'a> Envelope<'a> {
    /// Reads one text frame that should be addressed to (or come from) `agent_id`.
    pub fn decode(frame: &'a str, agent_id: &str) -> Result<Envelope<'a>, DecodeError> {
        // serde borrows what stands in a field itself; in an `Option` it would copy a `Cow`.
        #[derive(Deserialize)]
        #[serde(transparent)]
        struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
        #[derive(Deserialize)]
        struct Raw<'a> {
            protocol_version: u32,
            #[serde(borrow)]
            message_id: Cow<'a, str>,
            #[serde(borrow, rename = "type")]
            kind: Cow<'a, str>,
            #[serde(borrow)]
            agent_id: Cow<'a, str>,
            #[serde(borrow)]
            task_id: Option<Text<'a>>,
            #[serde(borrow)]
            execution_attempt_id: Option<Text<'a>>,
            sequence: Option<u64>,
            #[serde(borrow)]
            sent_at: Option<Text<'a>>,
            #[serde(borrow)]
            payload: Option<&'a RawValue>,
        }
        let raw: Raw<'a> = serde_json::from_str(frame)?;
        if raw.protocol_version != PROTOCOL_VERSION {
            return Err(DecodeError::Version(raw.protocol_version));
        }
        for (name, value) in [
            ("message_id", &raw.message_id),
            ("type", &raw.kind),
            ("agent_id", &raw.agent_id),
        ] {
            if value.is_empty() || value.len() > NAME_BYTES_MAX {
                return Err(DecodeError::Invalid(name));
            }
        }
        if raw.agent_id != agent_id {
            return Err(DecodeError::WrongAgent(raw.agent_id.into_owned()));
        }
        if raw.sequence == Some(0) {
            return Err(DecodeError::Invalid("sequence"));
        }
        let text = |field: Option<Text<'a>>| field.map_or(Cow::Borrowed(""), |text| text.0);
        let attempt_id = text(raw.execution_attempt_id);
        let ids = match text(raw.task_id) {
            task_id if task_id.is_empty() => None,
            task_id => Some(
                Ids::new(&task_id, &attempt_id)
                    .ok_or(DecodeError::Invalid("task_id or execution_attempt_id"))?,
            ),
        };
        Ok(Envelope {
            message_id: raw.message_id,
            kind: raw.kind,
            agent_id: raw.agent_id,
            ids,
            sequence: raw.sequence,
            sent_at: text(raw.sent_at),
            payload: raw.payload,
        })
    }

    /// The payload as `T`. An absent or `null` one reads as `{}`.
    pub fn payload<T: Deserialize<'a>>(&self) -> Result<T, DecodeError> {
        let text = match self.payload.map(RawValue::get) {
            None | Some("null") => "{}",
            Some(text) => text,
        };
        serde_json::from_str(text)
            .map_err(|error| DecodeError::Malformed(format!("payload of {}: {error}", self.kind)))
    }

    /// The attempt that a `task.*` message must name, with a result channel.
    pub fn attempt(&self) -> Result<Ids, DecodeError> {
        self.ids
            .clone()
            .filter(Ids::has_result_channel)
            .ok_or(DecodeError::Invalid("task_id or execution_attempt_id"))
    }
}

/// The payload `{}`.
#[derive(Serialize, Deserialize)]
pub(super) struct Empty {}

/// What every frame of one sender has in common.
pub(super) struct Header<'a, I> {
    pub message_id: I,
    pub agent_id: &'a str,
    pub sent_at: Timestamp,
}

/// Appends one frame to `out`. `payload` must serialize as an object.
pub(super) fn write_frame<I: Serialize, P: Serialize>(
    out: &mut Vec<u8>,
    header: Header<'_, I>,
    kind: &'static str,
    ids: Option<&Ids>,
    sequence: Option<u64>,
    payload: P,
) {
    let payload = |out: &mut Vec<u8>| push_json(out, &payload);
    write_frame_around(out, header, kind, ids, sequence, payload);
}

/// Appends one frame to `out`, field by field in the order of PROTOCOL.md 3. `payload` appends a
/// JSON object.
pub(super) fn write_frame_around<I: Serialize>(
    out: &mut Vec<u8>,
    header: Header<'_, I>,
    kind: &'static str,
    ids: Option<&Ids>,
    sequence: Option<u64>,
    payload: impl FnOnce(&mut Vec<u8>),
) {
    out.extend_from_slice(b"{\"protocol_version\":");
    push_json(out, &PROTOCOL_VERSION);
    out.extend_from_slice(b",\"message_id\":");
    push_json(out, &header.message_id);
    out.extend_from_slice(b",\"type\":");
    push_string(out, kind);
    out.extend_from_slice(b",\"agent_id\":");
    push_string(out, header.agent_id);
    if let Some(ids) = ids {
        out.extend_from_slice(b",\"task_id\":");
        push_string(out, &ids.task);
        out.extend_from_slice(b",\"execution_attempt_id\":");
        push_string(out, &ids.attempt);
    }
    if let Some(sequence) = sequence {
        out.extend_from_slice(b",\"sequence\":");
        push_json(out, &sequence);
    }
    out.extend_from_slice(b",\"sent_at\":");
    push_json(out, &header.sent_at);
    out.extend_from_slice(b",\"payload\":");
    payload(out);
    out.push(b'}');
}

/// Appends a value as serde_json writes it.
pub(super) fn push_json(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value)
        .expect("writing to memory does not fail and the types have only string keys");
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: &str = r#"{"protocol_version":1,"message_id":"m","type":"ack","agent_id":"a",
        "task_id":null,"sequence":null,"future":[1],"payload":null}"#;

    #[test]
    fn null_reads_as_absent_and_unknown_fields_are_ignored() {
        let envelope = Envelope::decode(ACK, "a").expect("valid");
        assert_eq!(envelope.kind, "ack");
        assert_eq!(envelope.ids, None);
        envelope.payload::<Empty>().expect("reads as {}");
    }

    #[test]
    fn fields_are_read_where_they_lie() {
        let frame = ACK.replace("\"future\":[1]", "\"sent_at\":\"2026-01-31T12:00:00Z\"");
        let envelope = Envelope::decode(&frame, "a").expect("valid");
        for field in [&envelope.kind, &envelope.message_id, &envelope.sent_at] {
            assert!(matches!(field, Cow::Borrowed(_)), "{field:?} was copied");
        }
    }

    #[test]
    fn what_is_no_envelope_is_refused() {
        let check = |frame: &str| Envelope::decode(frame, "a").expect_err(frame);
        for frame in [
            "",
            "[]",
            "nonsense",
            "{}",
            &ACK.replace("\"message_id\":\"m\",", ""),
            &ACK.replace("\"m\"", "\"\""),
            &ACK.replace("\"m\"", &format!("\"{}\"", "m".repeat(NAME_BYTES_MAX + 1))),
            &ACK.replace("\"sequence\":null", "\"sequence\":0"),
            &ACK.replace("\"sequence\":null", "\"sequence\":-1"),
            &ACK.replace("\"sequence\":null", "\"sequence\":1e400"),
            &ACK.replace("\"type\"", "\"message_id\":\"n\",\"type\""),
            &ACK.replace(
                "\"task_id\":null",
                &format!("\"task_id\":\"{}\"", "t".repeat(200)),
            ),
        ] {
            check(frame);
        }
        assert_eq!(
            check(&ACK.replace("\"protocol_version\":1", "\"protocol_version\":2")),
            DecodeError::Version(2)
        );
        assert_eq!(
            Envelope::decode(ACK, "b").expect_err("wrong agent"),
            DecodeError::WrongAgent("a".into())
        );
    }
}
