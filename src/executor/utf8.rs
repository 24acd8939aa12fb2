//! Where a chunk may be cut so that no UTF-8 character is split (PROTOCOL.md 4.10).

/// Length of the longest prefix that does not end inside a character. At most three bytes shorter
/// than the whole; bytes that cannot begin a character are never held back.
pub fn complete_prefix(bytes: &[u8]) -> usize {
    let tail_start = bytes.len().saturating_sub(3);
    for start in (tail_start..bytes.len()).rev() {
        let needed = match bytes[start] {
            // A continuation byte: its character began earlier.
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => return bytes.len(),
        };
        let is_incomplete = start + needed > bytes.len() && can_continue(&bytes[start..]);
        return if is_incomplete { start } else { bytes.len() };
    }
    bytes.len()
}

/// Whether further bytes can make a character of these.
fn can_continue(bytes: &[u8]) -> bool {
    match std::str::from_utf8(bytes) {
        Ok(_) => true,
        Err(error) => error.valid_up_to() == 0 && error.error_len().is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_never_split() {
        let text = "a\u{df}\u{20ac}\u{1f980}z".as_bytes();
        for end in 0..=text.len() {
            let cut = complete_prefix(&text[..end]);
            assert!(cut <= end && end - cut <= 3);
            assert!(std::str::from_utf8(&text[..cut]).is_ok(), "{end} {cut}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_not_held_back() {
        let check =
            |bytes: &[u8], cut: usize| assert_eq!(complete_prefix(bytes), cut, "{bytes:x?}");
        check(b"", 0);
        check(b"\xff", 1);
        check(b"a\x80\x80\x80", 4);
        check(b"\xe0\x80", 2);
        check(b"\xed\xa0", 2);
        check(b"\xf5\x80", 2);
        check(b"\xc1", 1);
        check(b"ab\xe2\x82", 2);
        check(b"\xf0\x9f\xa6", 0);
    }
}
