//! The last bytes of a stream, for `task.final` (PROTOCOL.md 4.9).

/// What a final carries of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tail {
    /// The last bytes; begins on a UTF-8 border if anything was cut off.
    pub bytes: Vec<u8>,
    /// There was more.
    pub truncated: bool,
}

/// Keeps the last `capacity` bytes of what is pushed; grows only as far as needed.
#[derive(Debug)]
pub struct TailRing {
    capacity: usize,
    bytes: Vec<u8>,
    /// Where the oldest byte is, once the ring is full.
    start: usize,
    truncated: bool,
}

impl TailRing {
    pub fn new(capacity: usize) -> TailRing {
        TailRing {
            capacity,
            bytes: Vec::new(),
            start: 0,
            truncated: false,
        }
    }

    /// Of so many bytes that come now, the first so many would not stay: they need not be pushed.
    pub fn pass_over(&mut self, coming: usize) -> usize {
        let passed = coming.saturating_sub(self.capacity);
        self.truncated |= passed > 0;
        passed
    }

    pub fn push(&mut self, mut new: &[u8]) {
        if new.len() > self.capacity {
            self.truncated = true;
            new = &new[new.len() - self.capacity..];
        }
        let room = self.capacity - self.bytes.len();
        let (append, wrap) = new.split_at(room.min(new.len()));
        if !append.is_empty() {
            self.bytes.reserve_exact(append.len().max(self.growth()));
            self.bytes.extend_from_slice(append);
        }
        self.truncated |= !wrap.is_empty();
        let first = wrap.len().min(self.capacity - self.start);
        self.bytes[self.start..self.start + first].copy_from_slice(&wrap[..first]);
        self.bytes[..wrap.len() - first].copy_from_slice(&wrap[first..]);
        if self.capacity > 0 {
            self.start = (self.start + wrap.len()) % self.capacity;
        }
    }

    /// Doubling, but never beyond the capacity.
    fn growth(&self) -> usize {
        if self.bytes.len() == self.bytes.capacity() {
            self.bytes.len().min(self.capacity - self.bytes.len())
        } else {
            0
        }
    }

    pub fn finish(mut self) -> Tail {
        self.bytes.rotate_left(self.start);
        if self.truncated {
            let continuation = |byte: &&u8| matches!(byte, 0x80..=0xbf);
            let split = self.bytes.iter().take(3).take_while(continuation).count();
            self.bytes.drain(..split);
        }
        Tail {
            bytes: self.bytes,
            truncated: self.truncated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept_whatever_the_pieces() {
        let text: Vec<u8> = (0..1000u32).map(|n| b'a' + (n % 26) as u8).collect();
        for capacity in [0, 1, 7, 100, 999, 1000, 2000] {
            for piece in [1, 3, 64, 1000] {
                let mut ring = TailRing::new(capacity);
                text.chunks(piece).for_each(|part| ring.push(part));
                let tail = ring.finish();
                let kept = capacity.min(text.len());
                assert_eq!(tail.bytes, &text[text.len() - kept..], "{capacity} {piece}");
                assert_eq!(tail.truncated, capacity < text.len());
                assert!(tail.bytes.capacity() <= capacity.max(8));
            }
        }
    }

    #[test]
    fn what_would_not_stay_need_not_be_pushed() {
        let mut ring = TailRing::new(4);
        ring.push(b"ab");
        assert_eq!(ring.pass_over(2), 0);
        ring.push(b"cd");
        assert!(!ring.truncated);
        assert_eq!(ring.pass_over(7), 3);
        ring.push(b"defg");
        let tail = ring.finish();
        assert_eq!((tail.bytes, tail.truncated), (b"defg".to_vec(), true));
    }

    #[test]
    fn a_truncated_tail_begins_with_a_whole_character() {
        let mut ring = TailRing::new(4);
        ring.push("\u{20ac}\u{20ac}".as_bytes());
        let tail = ring.finish();
        assert_eq!(tail.bytes, "\u{20ac}".as_bytes());
        assert!(tail.truncated);
    }
}
