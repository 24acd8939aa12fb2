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

/// The fields of an object in their order, those of objects in it among them: name and value, which
/// is empty for an object. Ends where the text is cut off, and at anything else.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let is_quote = |byte| byte == b'"';
        let (_, behind) = split(self.0, is_quote)?;
        let (name, behind) = split(behind, is_quote)?;
        let value = behind.strip_prefix(b":")?;
        let (value, behind) = match value.first()? {
            b'"' => split(&value[1..], is_quote).unwrap_or((&value[1..], b"")),
            b'{' => (&value[..0], value),
            _ => split(value, |byte| matches!(byte, b',' | b'}'))?,
        };
        self.0 = behind;
        Some((name, value))
    }
}

impl<'a> Fields<'a> {
    fn value(mut self, wanted: &str) -> Option<&'a [u8]> {
        let (_, value) = self.find(|(name, _)| *name == wanted.as_bytes())?;
        Some(value)
    }
}

/// What stands before the first such byte, and what behind it.
fn split(bytes: &[u8], is_end: impl Fn(u8) -> bool) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| is_end(*byte))?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// The fields of an envelope before its payload.
pub struct Head<'a> {
    pub message_id: &'a str,
    pub kind: &'a str,
    pub attempt: &'a str,
    pub sequence: u64,
    payload: Fields<'a>,
}

impl<'a> Head<'a> {
    pub fn read(frame: &'a [u8]) -> Result<Head<'a>, String> {
        let (mut message_id, mut kind, mut attempt, mut sequence) = (None, None, "", 0);
        let mut fields = Fields(&frame[..frame.len().min(EDGE_BYTES)]);
        loop {
            let (name, value) = fields.next().ok_or("no payload")?;
            match name {
                b"payload" => break,
                b"message_id" => message_id = Some(text(value)),
                b"type" => kind = Some(text(value)),
                b"execution_attempt_id" => attempt = text(value),
                b"sequence" => sequence = number(value).ok_or("no sequence")?,
                _ => {}
            }
        }
        Ok(Head {
            message_id: message_id.ok_or("no message id")?,
            kind: kind.ok_or("no type")?,
            attempt,
            sequence,
            payload: fields,
        })
    }

    pub fn exit_code(&self) -> Option<i64> {
        number(self.payload.value("exit_code")?)
    }
}

pub struct Output<'a> {
    pub is_stderr: bool,
    /// As JSON writes it, cut off where the frame is long, and at the first `"` in it.
    pub data: &'a str,
    pub byte_count: u64,
}

impl<'a> Output<'a> {
    pub fn read(head: &Head<'a>, frame: &'a [u8]) -> Result<Output<'a>, String> {
        const COUNT: &[u8] = b"\"byte_count\":";
        let stream = head.payload.value("stream").ok_or("no stream")?;
        let data = head.payload.value("data").ok_or("no data")?;
        let last = &frame[frame.len().saturating_sub(EDGE_BYTES)..];
        let mut places = last.windows(COUNT.len());
        let at = places.rposition(|place| place == COUNT);
        let count = at.and_then(|at| Fields(&last[at..]).next());
        Ok(Output {
            is_stderr: stream == b"stderr",
            data: text(data),
            byte_count: count
                .and_then(|(_, count)| number(count))
                .ok_or("no byte count")?,
        })
    }
}

/// The text up to where it is none: a character may be cut in two by the edge.
fn text(bytes: &[u8]) -> &str {
    bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid())
}

fn number<T: std::str::FromStr>(value: &[u8]) -> Option<T> {
    text(value).parse().ok()
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
    number(Fields(ack.as_bytes()).value("highest_output_sequence")?)
}
