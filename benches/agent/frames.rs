//! WebSocket frames and envelopes, read where they lie (RFC 6455 section 5.2, PROTOCOL.md 3).

use crate::gateway::AGENT_ID;

pub const TEXT: u8 = 1;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// Of a longer text only this much at its begin and its end is unmasked: nothing else is read.
const EDGE_BYTES: usize = 1024;

pub struct Frame<'a> {
    pub opcode: u8,
    pub payload: &'a [u8],
    /// Of the frame, with its head.
    pub bytes: usize,
}

/// The first frame of a buffer, if all of it is there. It must be final and masked.
pub fn take(buffer: &mut [u8]) -> Option<Frame<'_>> {
    let (first, second) = (*buffer.first()?, *buffer.get(1)?);
    let (length, head) = match second & 0x7f {
        126 => {
            let length = u16::from_be_bytes(buffer.get(2..4)?.try_into().ok()?);
            (usize::from(length), 4)
        }
        127 => {
            let length = u64::from_be_bytes(buffer.get(2..10)?.try_into().ok()?);
            (usize::try_from(length).ok()?, 10)
        }
        short => (usize::from(short), 2),
    };
    let mask: [u8; 4] = buffer.get(head..head + 4)?.try_into().ok()?;
    let payload = buffer.get_mut(head + 4..head + 4 + length)?;
    if length <= 2 * EDGE_BYTES {
        unmask(payload, mask, 0);
    } else {
        unmask(&mut payload[..EDGE_BYTES], mask, 0);
        let from = length - EDGE_BYTES;
        unmask(&mut payload[from..], mask, from);
    }
    Some(Frame {
        opcode: first & 0x0f,
        payload,
        bytes: head + 4 + length,
    })
}

fn unmask(bytes: &mut [u8], mask: [u8; 4], offset: usize) {
    let mut key = mask;
    key.rotate_left(offset % 4);
    let (words, rest) = bytes.as_chunks_mut();
    for word in words {
        *word = (u32::from_ne_bytes(*word) ^ u32::from_ne_bytes(key)).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(key) {
        *byte ^= key;
    }
}

pub fn server_frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        short @ ..126 => frame.push(short as u8),
        long => {
            frame.push(126);
            frame.extend((long as u16).to_be_bytes());
        }
    }
    frame.extend(payload);
    frame
}

/// The fields of an envelope before its payload.
pub struct Head<'a> {
    pub message_id: &'a str,
    pub kind: &'a str,
    pub attempt: &'a str,
    pub sequence: u64,
}

impl<'a> Head<'a> {
    pub fn read(frame: &'a [u8]) -> Result<Head<'a>, String> {
        let edge = text(&frame[..frame.len().min(EDGE_BYTES)]);
        let end = edge.find("\"payload\":").ok_or("no payload")?;
        let fields = &edge[..end];
        Ok(Head {
            message_id: string(fields, "message_id").ok_or("no message id")?,
            kind: string(fields, "type").ok_or("no type")?,
            attempt: string(fields, "execution_attempt_id").unwrap_or_default(),
            sequence: number(fields, "sequence").unwrap_or(0) as u64,
        })
    }
}

pub struct Output<'a> {
    pub is_stderr: bool,
    /// As JSON writes it, cut off where the frame is long.
    pub data: &'a str,
    pub byte_count: u64,
}

impl<'a> Output<'a> {
    pub fn read(frame: &'a [u8]) -> Result<Output<'a>, String> {
        let edge = text(&frame[..frame.len().min(EDGE_BYTES)]);
        let last = text(&frame[frame.len().saturating_sub(EDGE_BYTES)..]);
        let stream = string(edge, "stream").ok_or("no stream")?;
        let from = edge.find("\"data\":\"").ok_or("no data")? + "\"data\":\"".len();
        let data = edge[from..].split('"').next().unwrap_or_default();
        let at = last.rfind("\"byte_count\":").ok_or("no byte count")?;
        let byte_count = number(&last[at..], "byte_count").ok_or("no byte count")?;
        Ok(Output {
            is_stderr: stream == "stderr",
            data,
            byte_count: byte_count as u64,
        })
    }
}

pub fn exit_code(frame: &[u8]) -> Option<i64> {
    number(text(&frame[..frame.len().min(EDGE_BYTES)]), "exit_code")
}

/// The text up to where it is none: a character may be cut in two by the edge.
fn text(bytes: &[u8]) -> &str {
    // The begin of a character that was cut off stands before the first whole one.
    let from = bytes
        .iter()
        .position(|byte| byte & 0xc0 != 0x80)
        .unwrap_or(0);
    match std::str::from_utf8(&bytes[from..]) {
        Ok(text) => text,
        Err(error) => {
            std::str::from_utf8(&bytes[from..from + error.valid_up_to()]).unwrap_or_default()
        }
    }
}

fn string<'a>(fields: &'a str, name: &str) -> Option<&'a str> {
    let value = value(fields, name)?.strip_prefix('"')?;
    value.split('"').next()
}

fn number(fields: &str, name: &str) -> Option<i64> {
    let value = value(fields, name)?;
    let end = value
        .find(|c: char| !c.is_ascii_digit() && c != '-')
        .unwrap_or(value.len());
    value[..end].parse().ok()
}

fn value<'a>(fields: &'a str, name: &str) -> Option<&'a str> {
    let at = fields
        .match_indices(name)
        .find(|(at, _)| {
            fields[..*at].ends_with('"') && fields[at + name.len()..].starts_with("\":")
        })?
        .0;
    Some(&fields[at + name.len() + 2..])
}

pub fn hello_ack(hello_id: &str) -> String {
    format!(
        r#"{{"protocol_version":1,"message_id":"g","type":"agent.hello_ack","agent_id":"{AGENT_ID}","sent_at":"2026-01-01T00:00:00Z","payload":{{"acked_message_id":"{hello_id}","acked_type":"agent.hello","delivery_enabled":true}}}}"#
    )
}

/// The task's name is also that of its attempt.
pub fn deliver(name: &str, command: &str) -> String {
    format!(
        r#"{{"protocol_version":1,"message_id":"g","type":"task.deliver","agent_id":"{AGENT_ID}","task_id":"{name}","execution_attempt_id":"{name}","sent_at":"2026-01-01T00:00:00Z","payload":{{"command":{},"priority":0}}}}"#,
        serde_json::Value::from(command)
    )
}

pub fn ack(message_id: &str, kind: &str, attempt: &str, highest: Option<u64>) -> String {
    let highest = highest.map_or(String::new(), |highest| {
        format!(r#","highest_output_sequence":{highest}"#)
    });
    format!(
        r#"{{"protocol_version":1,"message_id":"g","type":"ack","agent_id":"{AGENT_ID}","task_id":"{attempt}","execution_attempt_id":"{attempt}","sent_at":"2026-01-01T00:00:00Z","payload":{{"acked_message_id":"{message_id}","acked_type":"{kind}","task_id":"{attempt}","execution_attempt_id":"{attempt}"{highest}}}}}"#
    )
}

/// The highest sequence that an acknowledgement names.
pub fn highest(ack: &str) -> Option<u64> {
    number(ack, "highest_output_sequence").map(|highest| highest as u64)
}
