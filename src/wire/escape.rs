//! Escapes of JSON strings (RFC 8259 section 7): most of what the agent computes for its output.
//!
//! Whole blocks in and out, helpers that are inlined, and the rare long escape apart: the release build
//! is optimised for size, and would call a function for each short slice. Where the next block is read
//! does not depend on what this one has.

/// Text is escaped about this much at a time, into a buffer that has room for the worst of it.
pub(super) const PIECE_BYTES: usize = 2048;
/// A line, and what is text between bytes that are none: not worth a large buffer.
const SHORT_BYTES: usize = 256;
const SHORTEST_BYTES: usize = 32;
/// `\u001f`.
const ESCAPE_BYTES_MAX: usize = 6;
const BLOCK_BYTES: usize = 16;
type Block = [u8; BLOCK_BYTES];

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
pub(super) fn push_escaped(out: &mut Vec<u8>, bytes: &[u8]) -> bool {
    if bytes.len() <= SHORTEST_BYTES {
        push_pieces::<SHORTEST_BYTES, { room(SHORTEST_BYTES) }>(out, bytes)
    } else if bytes.len() <= SHORT_BYTES {
        push_pieces::<SHORT_BYTES, { room(SHORT_BYTES) }>(out, bytes)
    } else {
        push_pieces::<PIECE_BYTES, { room(PIECE_BYTES) }>(out, bytes)
    }
}

/// What a piece and a block that begins in it may become, and two blocks behind that.
const fn room(piece: usize) -> usize {
    ESCAPE_BYTES_MAX * (piece + BLOCK_BYTES) + 2 * BLOCK_BYTES
}

fn push_pieces<const PIECE: usize, const ROOM: usize>(out: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let mut escaped = [0; ROOM];
    let mut is_known_as_text = false;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (taken, length, is_ascii) = escape::<PIECE, ROOM>(&mut escaped, rest);
        // Most output is ASCII, and needs no look of its own.
        if !is_ascii && !is_known_as_text {
            if std::str::from_utf8(bytes).is_err() {
                return false;
            }
            is_known_as_text = true;
        }
        out.extend_from_slice(&escaped[..length]);
        rest = &rest[taken..];
    }
    true
}

/// Escapes a piece from the begin of the text, or all of it if only a block more is there. Gives how
/// many bytes that was, how many it has become, and whether all of it is ASCII.
///
/// Not inlined: among its caller's values those of the loop find no registers, and it takes twice as
/// long.
#[inline(never)]
fn escape<const PIECE: usize, const ROOM: usize>(
    out: &mut [u8; ROOM],
    text: &[u8],
) -> (usize, usize, bool) {
    let (mut rest, mut length, mut high) = (text, 0, 0);
    let left = text.len().saturating_sub(PIECE);
    while rest.len() > left
        && let Some(source) = rest.first_chunk()
    {
        let found = Found::of(block(source, 0));
        high |= found.high;
        length += put_block(out, length, source, found.special);
        rest = &rest[BLOCK_BYTES..];
    }
    if rest.len() > left {
        for &byte in rest {
            high |= u32::from(byte & 0x80);
            length += match LETTERS[usize::from(byte)] {
                PLAIN => put(out, length, [byte]),
                _ => put_escape(out, length, byte),
            };
        }
        rest = &[];
    }
    (text.len() - rest.len(), length, high == 0)
}

/// The block at `from`, which is at most the length of one.
#[inline(always)]
fn block(source: &[u8; 2 * BLOCK_BYTES], from: usize) -> Block {
    *source[from..]
        .first_chunk()
        .expect("one more lies behind the first one")
}

/// Writes the first block of the source whole, and what follows a special byte of it once more behind
/// the escape, with bytes of the next block that do not count. Gives the length of what counts.
#[inline(always)]
fn put_block<const N: usize>(
    out: &mut [u8; N],
    at: usize,
    source: &[u8; 2 * BLOCK_BYTES],
    mut special: u32,
) -> usize {
    put(out, at, block(source, 0));
    let (mut length, mut done) = (0, 0);
    while special != 0 {
        let place = special.trailing_zeros() as usize % BLOCK_BYTES;
        special &= special - 1;
        length += place - done;
        length += put_escape(out, at + length, source[place]);
        done = place + 1;
        put(out, at + length, block(source, done));
    }
    length + BLOCK_BYTES - done
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
    *place.expect("behind what a piece may become there is room for a block") = bytes;
    M
}

/// What there is in a block.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// A bit, the lowest one first, for every byte that a JSON string cannot hold as it is: controls,
    /// `"` and `\`.
    special: u32,
    /// 0 if all bytes are ASCII.
    high: u32,
}

impl Found {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn of(block: Block) -> Found {
        use wide::u8x16;
        let block = u8x16::new(block);
        let is_control = block.min(u8x16::splat(0x1f)).simd_eq(block);
        let is_quote = block.simd_eq(u8x16::splat(b'"'));
        let is_backslash = block.simd_eq(u8x16::splat(b'\\'));
        Found {
            special: (is_control | is_quote | is_backslash).to_bitmask(),
            high: block.to_bitmask(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    #[inline(always)]
    fn of(block: Block) -> Found {
        Found::of_words(block)
    }

    /// For processors that may have no vectors.
    #[cfg(any(test, not(target_arch = "x86_64")))]
    #[inline(always)]
    fn of_words(block: Block) -> Found {
        let both = u128::from_le_bytes(block);
        let (first, second) = (both as u64, (both >> 64) as u64);
        let (low, high) = (special_bits(first), special_bits(second));
        // Each product has the eight bits in its highest byte.
        let gather = |bits: u64| ((bits >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32;
        Found {
            special: match low | high {
                0 => 0,
                _ => gather(low) | gather(high) << 8,
            },
            high: u32::from((first | second) & HIGH_BITS != 0),
        }
    }
}

/// Of each byte of a word the highest bit.
#[cfg(any(test, not(target_arch = "x86_64")))]
const HIGH_BITS: u64 = u64::from_ne_bytes([0x80; 8]);

/// The high bit of every special byte of a word.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline(always)]
fn special_bits(word: u64) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
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
    fn both_ways_find_the_same_bytes() {
        for byte in 0..=255 {
            for place in 0..BLOCK_BYTES {
                for around in [b'a', b'"', 0x1f, 0x20, 0x7f, 0x80, 0xc3] {
                    let mut block = [around; BLOCK_BYTES];
                    block[place] = byte;
                    let is_special = |at: &usize| LETTERS[usize::from(block[*at])] != PLAIN;
                    let expected: u32 = (0..BLOCK_BYTES).filter(is_special).map(|at| 1 << at).sum();
                    for found in [Found::of(block), Found::of_words(block)] {
                        assert_eq!(found.special, expected, "{block:?}");
                        assert_eq!(found.high == 0, block.is_ascii(), "{block:?}");
                    }
                }
            }
        }
    }
}
