//! Bytes as JSON strings (PROTOCOL.md 4.10 and extension `binary_output`).

use std::fmt;

use base64::display::Base64Display;
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

/// Bytes as base64, standard alphabet, padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base64<'a>(pub &'a [u8]);

impl fmt::Display for Base64<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Base64Display::new(self.0, &STANDARD).fmt(f)
    }
}

impl Serialize for Base64<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
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
    fn base64_is_padded() {
        assert_eq!(
            serde_json::to_string(&Base64(b"\x00\xff\x01\x02")).expect("json"),
            "\"AP8BAg==\""
        );
    }
}
