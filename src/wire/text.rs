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

/// Text is escaped this much at a time, into a buffer that has room for the worst of it.
const PIECE_BYTES: usize = 1024;
/// A name, or what is text between bytes that are none: not worth a large buffer.
const SHORT_BYTES: usize = 64;
/// `\u001f`.
const ESCAPE_BYTES_MAX: usize = 6;
const WORD_BYTES: usize = 8;
/// Of each byte of a word the highest one.
const HIGH_BITS: u64 = u64::from_ne_bytes([0x80; WORD_BYTES]);

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

/// Appends the bytes, escaped; `false` if they are no UTF-8: then what has been appended is void.
fn push_escaped(out: &mut Vec<u8>, bytes: &[u8]) -> bool {
    match bytes.len() {
        0..=SHORT_BYTES => push_pieces::<SHORT_BYTES, { room(SHORT_BYTES) }>(out, bytes),
        _ => push_pieces::<PIECE_BYTES, { room(PIECE_BYTES) }>(out, bytes),
    }
}

/// Bytes that a piece may become, and a word behind them.
const fn room(piece: usize) -> usize {
    ESCAPE_BYTES_MAX * piece + WORD_BYTES
}

fn push_pieces<const PIECE: usize, const ROOM: usize>(out: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let mut escaped = [0; ROOM];
    let mut is_known_as_text = false;
    for piece in bytes.chunks(PIECE) {
        let (length, is_ascii) = escape(&mut escaped, piece);
        // Most output is ASCII, and needs no look of its own.
        if !is_ascii && !is_known_as_text {
            if std::str::from_utf8(bytes).is_err() {
                return false;
            }
            is_known_as_text = true;
        }
        out.extend_from_slice(&escaped[..length]);
    }
    true
}

/// Writes one piece; gives its length, and whether all of it is ASCII.
///
/// Whole words in and out, helpers that are inlined, and the rare long escape apart: the release
/// build is optimised for size, and would call a function for each short slice. Where the next word is
/// read does not depend on what this one has. Not inlined itself: among its caller's values those of the
/// loop find no registers, and it takes twice as long.
#[inline(never)]
fn escape<const N: usize>(out: &mut [u8; N], piece: &[u8]) -> (usize, bool) {
    let mut length = 0;
    let mut all = 0;
    let (words, rest) = piece.as_chunks::<WORD_BYTES>();
    for word in words {
        let word = u64::from_le_bytes(*word);
        all |= word;
        length += put_word(out, length, word);
    }
    for &byte in rest {
        all |= u64::from(byte);
        length += match LETTERS[usize::from(byte)] {
            PLAIN => put(out, length, [byte]),
            _ => put_escape(out, length, byte),
        };
    }
    (length, all & HIGH_BITS == 0)
}

/// Writes the word whole, and whatever follows a special byte of it once more behind the escape.
/// Gives the length of what counts.
#[inline(always)]
fn put_word<const N: usize>(out: &mut [u8; N], at: usize, word: u64) -> usize {
    put(out, at, word.to_le_bytes());
    let mut special = special_bytes(word);
    let (mut length, mut done_bits) = (0, 0);
    while special != 0 {
        // The highest bit of a byte stands for it.
        let byte_bits = special.trailing_zeros() & !7;
        special &= special - 1;
        length += ((byte_bits - done_bits) / 8) as usize;
        length += put_escape(out, at + length, (word >> byte_bits) as u8);
        put(out, at + length, (word >> byte_bits >> 8).to_le_bytes());
        done_bits = byte_bits + 8;
    }
    length + WORD_BYTES - (done_bits / 8) as usize
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

/// The high bit of every byte that a JSON string cannot hold as it is: controls, `"` and `\`.
#[inline(always)]
fn special_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([0x01; WORD_BYTES]);
    const BACKSLASHES: u64 = ONES * b'\\' as u64;
    // Sums of bytes without their high bits stay in their byte. With bit 1 flipped, `"` is 0x20, the
    // space 0x22, and the controls are among themselves: all that is special is below 0x21.
    let not_low = ((word ^ (ONES * 0x02)) & !HIGH_BITS) + ONES * (0x80 - 0x21);
    let not_backslash = ((word ^ BACKSLASHES) & !HIGH_BITS) + ONES * 0x7f;
    !((not_low & not_backslash) | word) & HIGH_BITS
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
