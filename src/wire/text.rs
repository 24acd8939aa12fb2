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

/// As [`push_string`] if the bytes are UTF-8. If they are not, `out` stays as it was.
#[must_use]
pub(super) fn push_text(out: &mut Vec<u8>, bytes: &[u8]) -> bool {
    match std::str::from_utf8(bytes) {
        Ok(text) => {
            push_string(out, text);
            true
        }
        Err(_) => false,
    }
}

/// As [`push_string`], with U+FFFD for every sequence that is no UTF-8.
pub(super) fn push_lossy(out: &mut Vec<u8>, bytes: &[u8]) {
    if push_text(out, bytes) {
        return;
    }
    out.push(b'"');
    for chunk in bytes.utf8_chunks() {
        if !chunk.valid().is_empty() {
            push_escaped(out, chunk.valid());
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

/// Text is escaped this much at a time, into a buffer that has room for the worst of it.
const PIECE_BYTES: usize = 1024;
/// A name, or what is text between bytes that are none: not worth a large buffer.
const SHORT_BYTES: usize = 64;
/// `\u001f`.
const ESCAPE_BYTES_MAX: usize = 6;
const WORD_BYTES: usize = 8;

/// How each byte is escaped: the letter behind the backslash, [`PLAIN`] or [`HEX`].
static LETTERS: [u8; 256] = {
    let mut letters = [PLAIN; 256];
    let mut control = 0;
    while control < 0x20 {
        letters[control] = HEX;
        control += 1;
    }
    letters[b'"' as usize] = b'"';
    letters[b'\\' as usize] = b'\\';
    letters[b'\n' as usize] = b'n';
    letters[b'\r' as usize] = b'r';
    letters[b'\t' as usize] = b't';
    letters[0x08] = b'b';
    letters[0x0c] = b'f';
    letters
};
const PLAIN: u8 = 0;
const HEX: u8 = b'u';

fn push_escaped(out: &mut Vec<u8>, text: &str) {
    if text.len() <= SHORT_BYTES {
        let mut escaped = [0; ESCAPE_BYTES_MAX * SHORT_BYTES + WORD_BYTES];
        let length = escape(&mut escaped, text.as_bytes());
        return out.extend_from_slice(&escaped[..length]);
    }
    let mut escaped = [0; ESCAPE_BYTES_MAX * PIECE_BYTES + WORD_BYTES];
    for piece in text.as_bytes().chunks(PIECE_BYTES) {
        let length = escape(&mut escaped, piece);
        out.extend_from_slice(&escaped[..length]);
    }
}

/// Writes one piece, gives its length. Output is mostly text with few escapes: a word is written
/// whole, and what stands behind its first special byte is written over by what comes next.
///
/// Whole words in and out, helpers that are inlined, and the rare long escape apart: the release
/// build is optimised for size, and would call a function for each short slice (0.5 GiB/s instead of
/// 1.8).
fn escape<const N: usize>(out: &mut [u8; N], piece: &[u8]) -> usize {
    let mut length = 0;
    let mut rest = piece;
    while let Some((word, behind)) = rest.split_first_chunk::<WORD_BYTES>() {
        let word = u64::from_le_bytes(*word);
        put(out, length, word.to_le_bytes());
        let special = special_bytes(word);
        if special == 0 {
            length += WORD_BYTES;
            rest = behind;
        } else {
            // The lowest set bit is the highest of its byte.
            let plain = (special.trailing_zeros() / 8) as usize;
            length += plain;
            length += put_escape(out, length, rest[plain]);
            rest = &rest[plain + 1..];
        }
    }
    for &byte in rest {
        length += match LETTERS[usize::from(byte)] {
            PLAIN => put(out, length, [byte]),
            _ => put_escape(out, length, byte),
        };
    }
    length
}

/// Writes the escape of a byte that has one and gives its length.
#[inline(always)]
fn put_escape<const N: usize>(out: &mut [u8; N], at: usize, byte: u8) -> usize {
    match LETTERS[usize::from(byte)] {
        HEX => put_hex(out, at, byte),
        letter => put(out, at, [b'\\', letter]),
    }
}

/// A call of its own: where the next byte goes does not wait for the table.
#[cold]
#[inline(never)]
fn put_hex<const N: usize>(out: &mut [u8; N], at: usize, byte: u8) -> usize {
    let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
    let (high, low) = (digit(byte >> 4), digit(byte & 0xf));
    put(out, at, [b'\\', b'u', b'0', b'0', high, low])
}

/// Gives how many bytes it has written.
#[inline(always)]
fn put<const N: usize, const M: usize>(out: &mut [u8; N], at: usize, bytes: [u8; M]) -> usize {
    let place = out[at..].first_chunk_mut::<M>();
    *place.expect("behind what a piece may become there is room for a word") = bytes;
    M
}

/// The high bit of the first byte that a JSON string cannot hold as it is; of later ones it may be
/// set without reason. The word is little-endian.
#[inline(always)]
fn special_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([0x01; WORD_BYTES]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; WORD_BYTES]);
    // Of each byte below `bound`, which is at most 0x80; a borrow may mark bytes after the first that
    // is marked rightly.
    let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound) & !word;
    let quote = below(word ^ (ONES * u64::from(b'"')), 1);
    let backslash = below(word ^ (ONES * u64::from(b'\\')), 1);
    (below(word, 0x20) | quote | backslash) & HIGH
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
        // A piece of the longest escapes, and what crosses the border of two.
        check(&[1; 2 * PIECE_BYTES + 1]);
        for length in PIECE_BYTES - 3..PIECE_BYTES + 3 {
            let mut bytes = vec![b'a'; length];
            bytes.extend("\"\n\u{20ac}".as_bytes());
            check(&bytes);
        }
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
        // Longer than a piece, and only its end is no text.
        let mut long = vec![b'a'; PIECE_BYTES + 20];
        long.push(0xff);
        check(&long);
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
