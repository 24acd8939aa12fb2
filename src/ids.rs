//! Names that more than one layer speaks of: tasks, attempts, streams and how an attempt ends.
//!
//! The layers above never import each other (see ARCHITECTURE.md); what they have in common is
//! only this vocabulary, and it has no behaviour.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::limits::ID_BYTES_MAX;

/// An identifier given by the control plane, at most [`ID_BYTES_MAX`] bytes.
pub type Id = heapless::String<ID_BYTES_MAX, u8>;

/// What names one execution of one task (PROTOCOL.md 4.6).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ids {
    pub task: Id,
    /// Empty for a task of an old control plane: it has no result channel (PROTOCOL.md 2, Poll).
    pub attempt: Id,
}

impl Ids {
    /// `None` if either id is longer than [`ID_BYTES_MAX`] bytes or the task id is empty.
    pub fn new(task: &str, attempt: &str) -> Option<Ids> {
        if task.is_empty() {
            return None;
        }
        Some(Ids {
            task: Id::try_from(task).ok()?,
            attempt: Id::try_from(attempt).ok()?,
        })
    }

    pub fn key(&self) -> AttemptKey {
        AttemptKey::of(&self.task, &self.attempt)
    }

    /// Whether output and the final can travel over the WebSocket.
    pub fn has_result_channel(&self) -> bool {
        !self.attempt.is_empty()
    }
}

impl fmt::Display for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.attempt.is_empty() {
            write!(f, "{}", self.task)
        } else {
            write!(f, "{}/{}", self.task, self.attempt)
        }
    }
}

/// Fixed-size name of an attempt: the first 16 bytes of SHA-256 over the length-prefixed ids.
///
/// Displayed and parsed as 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AttemptKey(pub [u8; 16]);

impl AttemptKey {
    pub fn of(task_id: &str, attempt_id: &str) -> AttemptKey {
        let mut hasher = openssl::sha::Sha256::new();
        hasher.update(&(task_id.len() as u64).to_le_bytes());
        hasher.update(task_id.as_bytes());
        hasher.update(attempt_id.as_bytes());
        let digest = hasher.finish();
        let mut key = [0; 16];
        key.copy_from_slice(&digest[..16]);
        AttemptKey(key)
    }

    pub fn parse(hex: &str) -> Option<AttemptKey> {
        let mut key = [0; 16];
        if hex.len() != 32 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        for (byte, pair) in key.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(digits, 16).ok()?;
        }
        Some(AttemptKey(key))
    }
}

const HEX: &[u8; 16] = b"0123456789abcdef";

impl fmt::Display for AttemptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Printed in the id of every message: one piece instead of sixteen.
        let mut digits = [0; 32];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(self.0) {
            pair[0] = HEX[usize::from(byte >> 4)];
            pair[1] = HEX[usize::from(byte & 0xf)];
        }
        f.write_str(std::str::from_utf8(&digits).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for AttemptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Random name of a store, 16 hexadecimal digits. It is part of the id of every message that is born
/// in the store (PROTOCOL.md 3), and stays with the message if that moves to another store.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation([u8; Incarnation::BYTES]);

impl Incarnation {
    pub const BYTES: usize = 16;

    /// `None` unless these are hexadecimal digits as [`Incarnation::of`] writes them.
    pub fn from_digits(digits: &[u8]) -> Option<Incarnation> {
        let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let digits: [u8; Incarnation::BYTES] = digits.try_into().ok()?;
        digits.iter().all(is_digit).then_some(Incarnation(digits))
    }

    pub const fn of(number: u64) -> Incarnation {
        let mut name = [0; Incarnation::BYTES];
        let mut at = 0;
        while at < Incarnation::BYTES {
            let nibble = (number >> (4 * at) & 0xf) as usize;
            name[at] = b"0123456789abcdef"[nibble];
            at += 1;
        }
        Incarnation(name)
    }

    pub fn digits(&self) -> &[u8; Incarnation::BYTES] {
        &self.0
    }

    pub fn as_str(&self) -> &str {
        // Digits alone are let in.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One of the two output streams of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub const ALL: [Stream; 2] = [Stream::Stdout, Stream::Stderr];

    pub fn as_str(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }

    pub fn index(self) -> usize {
        match self {
            Stream::Stdout => 0,
            Stream::Stderr => 1,
        }
    }
}

/// What the processes of an attempt have used; extension `usage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// From the start to the last chunk.
    pub wall_ms: u64,
    pub user_ms: u64,
    pub system_ms: u64,
    pub memory_peak_bytes: u64,
}

/// How an attempt ended (PROTOCOL.md 3, `task.final`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinalStatus {
    /// The process exited with status 0.
    Completed,
    /// Any other exit, a signal or a timeout, or the task could not be started.
    Failed,
    /// Cancelled, or the agent or the device stopped under it.
    Interrupted,
}

impl FinalStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            FinalStatus::Completed => "completed",
            FinalStatus::Failed => "failed",
            FinalStatus::Interrupted => "interrupted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_does_not_confuse_the_border_between_the_ids() {
        assert_ne!(AttemptKey::of("ab", "c"), AttemptKey::of("a", "bc"));
        assert_eq!(AttemptKey::of("ab", "c"), AttemptKey::of("ab", "c"));
    }

    #[test]
    fn key_survives_printing_and_parsing() {
        let key = AttemptKey::of("task", "attempt");
        assert_eq!(AttemptKey::parse(&key.to_string()), Some(key));
        for bad in ["", "00", &key.to_string().to_uppercase(), &"+1".repeat(16)] {
            assert_eq!(AttemptKey::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn ids_are_bounded() {
        assert!(Ids::new("", "a").is_none());
        assert!(Ids::new(&"x".repeat(ID_BYTES_MAX + 1), "").is_none());
        assert!(Ids::new(&"x".repeat(ID_BYTES_MAX), "").is_some());
    }
}
