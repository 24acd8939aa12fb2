//! What has been sent and not yet acknowledged: at most [`WINDOW_MESSAGES`] messages and
//! [`WINDOW_BYTES`], of both at most half for one stream; a larger message goes alone.

#[cfg(any(test, feature = "fuzzing"))]
use std::collections::HashSet;

use super::Now;
use super::failures::LaneId;
use crate::ids::{AttemptKey, Stream};
use crate::limits::{
    ACK_SPAN, WINDOW_BYTES, WINDOW_MESSAGES, WINDOW_STREAM_BYTES, WINDOW_STREAM_MESSAGES,
};
use crate::wire::Piece;

/// One message on its way.
#[derive(Debug, Clone)]
pub struct InFlight<C> {
    pub key: AttemptKey,
    pub piece: Piece,
    /// Raw payload.
    pub bytes: usize,
    /// Where to read it again.
    pub at: C,
    pub sent_at: Now,
    /// A later message of its stream is acknowledged, or the server asked to have it again: it is
    /// sent again by itself when its time is over.
    pub overtaken: bool,
}

impl<C> InFlight<C> {
    pub fn lane(&self) -> LaneId {
        lane_of(self.key, self.piece)
    }

    pub fn sequence(&self) -> Option<u64> {
        match self.piece {
            Piece::Output(_, sequence) => Some(sequence),
            Piece::Final | Piece::Received | Piece::Started => None,
        }
    }
}

pub fn lane_of(key: AttemptKey, piece: Piece) -> LaneId {
    let stream = match piece {
        Piece::Output(stream, _) => Some(stream),
        Piece::Final | Piece::Received | Piece::Started => None,
    };
    LaneId { key, stream }
}

/// Whether one more message may be sent now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    Yes,
    /// The whole window is in use.
    WindowFull,
    /// This stream has its half in use; others may go on.
    StreamFull,
}

#[derive(Debug)]
pub struct Window<C> {
    entries: heapless::Vec<InFlight<C>, WINDOW_MESSAGES>,
    bytes: usize,
}

impl<C> Default for Window<C> {
    fn default() -> Window<C> {
        Window {
            entries: heapless::Vec::new(),
            bytes: 0,
        }
    }
}

impl<C: Copy> Window<C> {
    pub fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn iter(&self) -> impl Iterator<Item = &InFlight<C>> {
        self.entries.iter()
    }

    pub fn contains(&self, key: AttemptKey, piece: Piece) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.piece == piece && entry.key == key)
    }

    /// Messages and bytes in flight of one lane.
    pub fn used_by(&self, lane: LaneId) -> (usize, usize) {
        self.entries
            .iter()
            .filter(|entry| entry.lane() == lane)
            .fold((0, 0), |(messages, bytes), entry| {
                (messages + 1, bytes + entry.bytes)
            })
    }

    pub fn room_for(&self, key: AttemptKey, piece: Piece, bytes: usize) -> Room {
        if self.entries.is_empty() {
            return Room::Yes;
        }
        if self.entries.is_full() || self.bytes + bytes > WINDOW_BYTES {
            return Room::WindowFull;
        }
        let (stream_messages, stream_bytes) = self.used_by(lane_of(key, piece));
        let full = stream_messages >= WINDOW_STREAM_MESSAGES
            || (stream_messages > 0 && stream_bytes + bytes > WINDOW_STREAM_BYTES);
        if full { Room::StreamFull } else { Room::Yes }
    }

    /// Whether a chunk is so far ahead of the first one in flight of its stream that its own
    /// acknowledgement could not be noted.
    pub fn is_too_far_ahead(&self, key: AttemptKey, piece: Piece) -> bool {
        let lane = lane_of(key, piece);
        let mine = self.entries.iter().filter(|entry| entry.lane() == lane);
        let first = mine.filter_map(InFlight::sequence).min();
        match (piece, first) {
            (Piece::Output(_, sequence), Some(first)) => sequence >= first.saturating_add(ACK_SPAN),
            _ => false,
        }
    }

    /// Adds a message for which there is [`Room::Yes`].
    pub fn push(&mut self, entry: InFlight<C>) {
        self.bytes += entry.bytes;
        let pushed = self.entries.push(entry);
        assert!(pushed.is_ok(), "room_for() said that there is room");
    }

    /// Removes every message that `gone` names and hands each to it first.
    pub fn remove(&mut self, mut gone: impl FnMut(&InFlight<C>) -> bool) -> usize {
        let before = self.entries.len();
        let bytes = &mut self.bytes;
        self.entries.retain(|entry| {
            let goes = gone(entry);
            if goes {
                *bytes -= entry.bytes;
            }
            !goes
        });
        before - self.entries.len()
    }

    /// Marks what was sent before an acknowledged chunk of the same stream.
    pub fn overtake(&mut self, key: AttemptKey, stream: Stream, acknowledged: u64) {
        for entry in &mut self.entries {
            if let Piece::Output(of, sequence) = entry.piece
                && entry.key == key
                && of == stream
                && sequence < acknowledged
            {
                entry.overtaken = true;
            }
        }
    }

    /// The counters agree with what is in flight.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn check_counters(&self) {
        let bytes: usize = self.entries.iter().map(|entry| entry.bytes).sum();
        assert_eq!(bytes, self.bytes, "bytes in flight");
        let names: HashSet<_> = self.iter().map(|entry| (entry.key, entry.piece)).collect();
        assert_eq!(names.len(), self.len(), "a message twice in flight");
    }

    /// The server wants this message again, later.
    pub fn postpone(&mut self, key: AttemptKey, piece: Piece, now: Now) -> bool {
        let entry = self
            .entries
            .iter_mut()
            .find(|entry| entry.piece == piece && entry.key == key);
        if let Some(entry) = entry {
            entry.sent_at = now;
            entry.overtaken = true;
            return true;
        }
        false
    }
}
