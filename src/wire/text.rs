//! Bytes as JSON strings (PROTOCOL.md 4.10 and extension `binary_output`).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Serialize, Serializer};

use super::escape::push_escaped;

/// Bytes shown as text: every sequence that is no UTF-8 becomes U+FFFD.
///
/// Serializes as a JSON string without an intermediate copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lossy<'a>(pub &'a [u8]);

impl fmt::Display for Lossy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            f.write_str(chunk.valid())?;
            if !chunk.invalid().is_empty() {
                f.write_str("\u{fffd}")?;
            }
        }
        Ok(())
    }
}

impl Serialize for Lossy<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => serializer.collect_str(self),
        }
    }
}

/// Appends text as a JSON string (RFC 8259 section 7), byte for byte as serde_json writes it.
pub(super) fn push_string(out: &mut Vec<u8>, text: &str) {
    push_lossy(out, text.as_bytes());
}

/// As [`push_string`] if the bytes are UTF-8. If they are not, `out` stays as it was.
#[must_use]
pub(super) fn push_text(out: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let begin = out.len();
    out.push(b'"');
    let is_text = push_escaped(out, bytes);
    match is_text {
        true => out.push(b'"'),
        false => out.truncate(begin),
    }
    is_text
}

/// As [`push_string`], with U+FFFD for every sequence that is no UTF-8.
pub(super) fn push_lossy(out: &mut Vec<u8>, bytes: &[u8]) {
    if push_text(out, bytes) {
        return;
    }
    out.push(b'"');
    for chunk in bytes.utf8_chunks() {
        if !chunk.valid().is_empty() {
            push_escaped(out, chunk.valid().as_bytes());
        }
        if !chunk.invalid().is_empty() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
    out.push(b'"');
}

/// Appends bytes as a JSON string of base64, standard alphabet, padded.
pub(super) fn push_base64(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    let begin = out.len();
    out.resize(begin + bytes.len().div_ceil(3) * 4, 0);
    STANDARD
        .encode_slice(bytes, &mut out[begin..])
        .expect("three bytes make four letters, padding included");
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::super::escape::PIECE_BYTES;
    use super::*;

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters() {
        let check = |bytes: &[u8], json: &str| {
            assert_eq!(serde_json::to_string(&Lossy(bytes)).expect("json"), json);
        };
        check(b"plain", "\"plain\"");
        check("Stra\u{df}e\n".as_bytes(), "\"Stra\u{df}e\\n\"");
        check(b"a\xffb", "\"a\u{fffd}b\"");
        check(b"\xe2\x82", "\"\u{fffd}\"");
        check(b"", "\"\"");
    }

    #[test]
    fn text_is_written_as_serde_json_does() {
        let check = |bytes: &[u8]| {
            let mut out = b"before".to_vec();
            push_lossy(&mut out, bytes);
            let expected = serde_json::to_string(&Lossy(bytes)).expect("json");
            // As bytes: what is no text would look like the character that stands for it.
            let written = String::from_utf8(out.split_off(6)).expect("JSON is UTF-8");
            assert_eq!(written, expected, "{bytes:?}");
        };
        let all: Vec<u8> = (0..=255).collect();
        check(&all);
        // A piece of the longest escapes, and what crosses the border of two.
        check(&[1; 2 * PIECE_BYTES + 1]);
        for length in PIECE_BYTES - 3..PIECE_BYTES + 3 {
            let mut bytes = vec![b'a'; length];
            bytes.extend("\"\n\u{20ac}".as_bytes());
            check(&bytes);
        }
        // Every byte at every place of a block and behind the last one, between others of all kinds.
        for byte in 0..=255 {
            for place in 0..36 {
                for around in [b'a', b'"', 0x1f, 0x20, 0x7f, 0x80, 0xc3] {
                    let mut bytes = [around; 36];
                    bytes[place] = byte;
                    check(&bytes);
                }
            }
        }
        // Longer than a piece, and only its end is no text, with and without other letters before it.
        for begin in ["a", "\u{e4}"] {
            let mut long = begin.repeat(PIECE_BYTES + 20).into_bytes();
            check(&long);
            long.push(0xff);
            check(&long);
        }
        check("\u{0}\u{8}\u{c}\t\r\n\u{1f}\u{7f}\u{80}\u{20ac}\u{1f600}\"\\/".as_bytes());
    }

    #[test]
    fn base64_is_padded() {
        let check = |bytes: &[u8], expected: &str| {
            let mut out = Vec::new();
            push_base64(&mut out, bytes);
            assert_eq!(String::from_utf8_lossy(&out), expected);
        };
        check(b"\x00\xff\x01\x02", "\"AP8BAg==\"");
        check(b"\x00\xff\x01", "\"AP8B\"");
        check(b"", "\"\"");
    }
}
