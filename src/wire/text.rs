//! Bytes as JSON strings (PROTOCOL.md 4.10 and extension `binary_output`).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Serialize, Serializer};

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
    out.push(b'"');
    push_escaped(out, text);
    out.push(b'"');
}

/// As [`push_string`], with U+FFFD for every sequence that is no UTF-8.
pub(super) fn push_lossy(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    match std::str::from_utf8(bytes) {
        Ok(text) => push_escaped(out, text),
        Err(_) => {
            for chunk in bytes.utf8_chunks() {
                push_escaped(out, chunk.valid());
                if !chunk.invalid().is_empty() {
                    out.extend_from_slice("\u{fffd}".as_bytes());
                }
            }
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

/// Output is mostly text with few escapes: what lies between two of them is copied at once.
fn push_escaped(out: &mut Vec<u8>, text: &str) {
    let mut rest = text.as_bytes();
    loop {
        let (plain, behind) = rest.split_at(plain_bytes(rest));
        out.extend_from_slice(plain);
        let Some((&special, behind)) = behind.split_first() else {
            return;
        };
        rest = behind;
        let letter = match special {
            b'"' | b'\\' => special,
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            0x08 => b'b',
            0x0c => b'f',
            control => {
                let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
                let (high, low) = (digit(control >> 4), digit(control & 0xf));
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
                continue;
            }
        };
        out.extend_from_slice(&[b'\\', letter]);
    }
}

/// How many bytes from the begin on a JSON string may hold as they are: eight are looked at in one
/// step.
fn plain_bytes(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    // The high bit of each byte below `bound`, which is at most 0x80; a borrow may mark bytes
    // after the first that is marked rightly, and only the first counts.
    let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound) & !word & HIGH;
    let (words, remainder) = bytes.as_chunks::<8>();
    for (at, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let quote = below(word ^ (ONES * u64::from(b'"')), 1);
        let backslash = below(word ^ (ONES * u64::from(b'\\')), 1);
        let special = below(word, 0x20) | quote | backslash;
        if special != 0 {
            return 8 * at + special.trailing_zeros() as usize / 8;
        }
    }
    let special = |byte: &u8| *byte < 0x20 || matches!(byte, b'"' | b'\\');
    let tail = remainder.iter().position(special);
    8 * words.len() + tail.unwrap_or(remainder.len())
}

#[cfg(test)]
mod tests {
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
            assert_eq!(String::from_utf8_lossy(&out[6..]), expected, "{bytes:?}");
        };
        let all: Vec<u8> = (0..=255).collect();
        check(&all);
        // Every byte at every place of a word and behind the last one, between others of all kinds.
        for byte in 0..=255 {
            for place in 0..20 {
                for around in [b'a', b'"', 0x1f, 0x20, 0x7f, 0x80, 0xc3] {
                    let mut bytes = [around; 20];
                    bytes[place] = byte;
                    check(&bytes);
                }
            }
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
