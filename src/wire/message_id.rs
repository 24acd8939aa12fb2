//! Message ids of the agent. They name store, attempt, stream and sequence (PROTOCOL.md 3), so
//! that an acknowledgement can be read without a table, in this life of the process or the next:
//! `<store incarnation>-<attempt key>-<o, e or f>-<sequence>`.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::ids::{AttemptKey, Stream};

/// Which message of an attempt an id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Piece {
    Output(Stream, u64),
    Final,
    /// `task.received`; never stored, so nothing acknowledges it.
    Received,
    /// `task.started`; never stored either.
    Started,
}

/// The id of a message that belongs to an attempt: the same whenever that message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageId<'a> {
    pub incarnation: &'a str,
    pub key: AttemptKey,
    pub piece: Piece,
}

impl<'a> MessageId<'a> {
    /// `None` for anything that this agent did not make.
    pub fn parse(text: &'a str) -> Option<MessageId<'a>> {
        let mut parts = text.split('-');
        let incarnation = parts.next().filter(|part| !part.is_empty())?;
        let key = AttemptKey::parse(parts.next()?)?;
        let letter = parts.next()?;
        let digits = parts.next()?;
        if parts.next().is_some() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let sequence: u64 = digits.parse().ok()?;
        let piece = match (letter, sequence) {
            ("o", 1..) => Piece::Output(Stream::Stdout, sequence),
            ("e", 1..) => Piece::Output(Stream::Stderr, sequence),
            ("f", 1) => Piece::Final,
            ("r", 1) => Piece::Received,
            ("s", 1) => Piece::Started,
            _ => return None,
        };
        Some(MessageId {
            incarnation,
            key,
            piece,
        })
    }
}

impl fmt::Display for MessageId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (letter, sequence) = match self.piece {
            Piece::Output(Stream::Stdout, sequence) => ('o', sequence),
            Piece::Output(Stream::Stderr, sequence) => ('e', sequence),
            Piece::Final => ('f', 1),
            Piece::Received => ('r', 1),
            Piece::Started => ('s', 1),
        };
        write!(f, "{}-{}-{letter}-{sequence}", self.incarnation, self.key)
    }
}

impl Serialize for MessageId<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_printing_and_parsing() {
        for piece in [
            Piece::Output(Stream::Stdout, 1),
            Piece::Output(Stream::Stderr, u64::MAX),
            Piece::Final,
            Piece::Received,
            Piece::Started,
        ] {
            let id = MessageId {
                incarnation: "0123456789abcdef",
                key: AttemptKey::of("t", "a"),
                piece,
            };
            assert_eq!(MessageId::parse(&id.to_string()), Some(id));
        }
    }

    #[test]
    fn foreign_ids_are_not_ours() {
        let key = AttemptKey::of("t", "a");
        for text in [
            "",
            "-",
            "6f9619ff-8b86-d011-b42d-00cf4fc964ff",
            &format!("inc-{key}-o-0"),
            &format!("inc-{key}-o-+1"),
            &format!("inc-{key}-f-2"),
            &format!("inc-{key}-x-1"),
            &format!("inc-{key}-o-18446744073709551616"),
            &format!("inc-{key}-o-1-"),
            &format!("-{key}-o-1"),
        ] {
            assert_eq!(MessageId::parse(text), None, "{text}");
        }
    }
}
