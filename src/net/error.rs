//! Why something on the network failed. All of it is tried again later; what differs is when.

use std::fmt;
use std::time::Duration;

use crate::limits::RETRY_AFTER_MAX;

/// A failed dial, upgrade or request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetError {
    /// What was tried, on what, why it failed and, where that is known, what to do.
    pub why: String,
    /// The server's `Retry-After`, at most [`RETRY_AFTER_MAX`].
    pub retry_after: Option<Duration>,
    /// The HTTP status, if an answer came.
    pub status: Option<u16>,
}

impl NetError {
    pub fn new(why: impl Into<String>) -> NetError {
        NetError {
            why: why.into(),
            retry_after: None,
            status: None,
        }
    }
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for NetError {}

/// An error with its causes, which most libraries leave out of `Display`.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let detail = error.to_string();
        if !text.contains(&detail) {
            text.push_str(": ");
            text.push_str(&detail);
        }
        cause = error.source();
    }
    text
}

/// Text of a peer, fit for one line of a log: at most 200 characters, none of them control.
pub(super) fn quoted(bytes: &[u8]) -> String {
    const CHARACTERS_MAX: usize = 200;
    let start = &bytes[..bytes.len().min(4 * CHARACTERS_MAX)];
    String::from_utf8_lossy(start)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(CHARACTERS_MAX)
        .collect::<String>()
        .trim()
        .to_string()
}

/// `Retry-After` as seconds or as a date (RFC 9110 section 10.2.3), cut at [`RETRY_AFTER_MAX`].
pub(super) fn retry_after(value: &str, now_unix: u64) -> Option<Duration> {
    let value = value.trim();
    let seconds = match value.bytes().all(|byte| byte.is_ascii_digit()) {
        true if !value.is_empty() => value.parse().unwrap_or(u64::MAX),
        _ => super::clock::parse_http_date(value)?.saturating_sub(now_unix),
    };
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_and_bounded() {
        let check = |value: &str, expected: Option<u64>| {
            assert_eq!(
                retry_after(value, 784_111_777),
                expected.map(Duration::from_secs),
                "{value}"
            );
        };
        check("17", Some(17));
        check(" 0 ", Some(0));
        check("99999999999999999999999", Some(3600));
        check("Sun, 06 Nov 1994 08:50:37 GMT", Some(60));
        check("Sun, 06 Nov 1994 08:00:00 GMT", Some(0));
        check("", None);
        check("-1", None);
        check("soon", None);
    }

    #[test]
    fn text_of_a_peer_cannot_forge_log_lines() {
        assert_eq!(quoted(b"a\nERROR\x1b[31m b\xff "), "a ERROR [31m b\u{fffd}");
        assert_eq!(quoted(&[b'x'; 10_000]).len(), 200);
    }
}
