//! What has really happened, whatever the agent and the server believe: what was stored, what the
//! server took, what it said of it. The rules of PROTOCOL.md section 4 are checked against this.

use std::collections::HashMap;
use std::rc::Rc;

use super::tell;
use super::toggles::{Dice, Toggles};
use crate::ids::{AttemptKey, Ids, Stream};
use crate::limits::{ChunkBuffer, STREAM_FAILURES_MAX};
use crate::outbox::simulated::MARK_BYTES;

/// What is known of one chunk.
pub const ACCEPTED: u8 = 1;
/// The server has said that it has it.
pub const RELEASED: u8 = 2;
/// And that was not so.
pub const LIED: u8 = 4;
/// The server has said that it will never take it.
pub const REFUSED: u8 = 8;
/// Dropped by the device, with a reason.
pub const LOST: u8 = 16;

/// What a task does.
#[derive(Debug)]
pub struct Script {
    /// For each stream: pause before, and chunks that are stored together.
    pub prints: [Vec<(u32, u8)>; 2],
    pub ends_after_ms: u32,
    pub exit_code: i32,
    pub large: bool,
}

impl Script {
    pub fn draw(dice: &mut Dice, toggles: &Toggles) -> Script {
        let most = match (toggles.many_chunks && dice.one_in(2), toggles.large_chunks) {
            _ if toggles.late.bulk => 40,
            (true, true) => 12,
            (true, false) => 40,
            (false, _) => 3,
        };
        let mut prints = || {
            let count = dice.below(most + 1);
            let pause = dice.pick(&[5, 100, 2000]);
            let print = |_| (dice.below(pause) as u32, 1 + dice.below(4) as u8);
            (0..count).map(print).collect::<Vec<_>>()
        };
        Script {
            prints: [prints(), prints()],
            ends_after_ms: dice.below(3000) as u32,
            exit_code: dice.below(2) as i32,
            large: toggles.large_chunks,
        }
    }
}

#[derive(Debug)]
pub struct Attempt {
    pub ids: Ids,
    pub key: AttemptKey,
    pub script: Rc<Script>,
    pub begun: bool,
    /// Last chunk of each stream that the store has confirmed.
    pub stored: [u64; 2],
    /// Of each stream, by sequence, from 1.
    chunks: [Vec<u8>; 2],
    /// Text of its final, once the server has seen it.
    pub final_text: Option<String>,
    pub final_released: bool,
    pub final_refused: bool,
    pub reports: u32,
    /// A report is on its way.
    pub reporting: bool,
    /// The agent has been told that its report was taken, in this life.
    pub reported_in: Option<u32>,
    pub report_refused: bool,
    pub discarded: bool,
    pub gaps_told: [u32; 2],
    /// Connections over which each stream was sent.
    pub connections: [u32; 2],
}

pub struct Ledger {
    pub attempts: Vec<Attempt>,
    by_key: HashMap<AttemptKey, usize>,
    /// Starts of the agent.
    pub life: u32,
    /// Output may have to make room.
    pub may_rotate: bool,
}

impl Ledger {
    pub fn new(may_rotate: bool) -> Ledger {
        Ledger {
            attempts: Vec::new(),
            by_key: HashMap::new(),
            life: 0,
            may_rotate,
        }
    }

    pub fn add(&mut self, ids: Ids, script: Script) {
        let key = ids.key();
        self.by_key.insert(key, self.attempts.len());
        self.attempts.push(Attempt {
            ids,
            key,
            script: Rc::new(script),
            begun: false,
            stored: [0; 2],
            chunks: Default::default(),
            final_text: None,
            final_released: false,
            final_refused: false,
            reports: 0,
            reporting: false,
            reported_in: None,
            report_refused: false,
            discarded: false,
            gaps_told: [0; 2],
            connections: [0; 2],
        });
    }

    pub fn number(&self, key: AttemptKey) -> usize {
        *self.by_key.get(&key).expect("an attempt of this history")
    }

    /// By the name that [`name`] has given.
    pub fn by_name(&self, task: &str) -> usize {
        let number = task.strip_prefix('t').and_then(|text| text.parse().ok());
        number.expect("a task of this history")
    }

    /// Whether the message with this mark need not be sent any more.
    pub fn is_over(&self, mark: &[u8; MARK_BYTES]) -> bool {
        let digits = |part: &[u8]| {
            part.iter()
                .fold(0, |all, it| all * 10 + u64::from(it - b'0'))
        };
        let Some(attempt) = self.attempts.get(digits(&mark[1..3]) as usize) else {
            return false;
        };
        if attempt.discarded {
            return true;
        }
        match mark[3] {
            b'o' => attempt.is_over(Stream::Stdout, digits(&mark[4..])),
            b'e' => attempt.is_over(Stream::Stderr, digits(&mark[4..])),
            _ => attempt.final_released || attempt.final_refused || attempt.reports > 0,
        }
    }

    /// PROTOCOL.md 4.6.
    pub fn begin(&mut self, key: AttemptKey) -> usize {
        let number = self.number(key);
        let attempt = &mut self.attempts[number];
        assert!(!attempt.begun, "attempt {number} is run twice");
        attempt.begun = true;
        number
    }

    /// The session gives a stream up.
    pub fn give_up(&mut self, key: AttemptKey, stream: Stream) {
        let number = self.number(key);
        let attempt = &self.attempts[number];
        let at = stream.index();
        let allowed = attempt.gaps_told[at] >= STREAM_FAILURES_MAX
            || attempt.connections[at] >= STREAM_FAILURES_MAX;
        assert!(
            allowed,
            "{stream:?} of attempt {number} is given up too early"
        );
    }

    /// Chunks that are not held any more, although nothing allows the device to drop them.
    pub fn drop_chunks(
        &mut self,
        given_up: &[(AttemptKey, Stream)],
        held: impl Fn(AttemptKey, Stream, u64) -> bool,
    ) {
        let may_rotate = self.may_rotate;
        for (number, attempt) in self.attempts.iter_mut().enumerate() {
            for stream in Stream::ALL {
                for sequence in 1..=attempt.stored[stream.index()] {
                    if attempt.is_over(stream, sequence) || held(attempt.key, stream, sequence) {
                        continue;
                    }
                    assert!(
                        may_rotate || given_up.contains(&(attempt.key, stream)),
                        "chunk {sequence} of {stream:?} of attempt {number} was dropped"
                    );
                    tell!("chunk {sequence} of {stream:?} of attempt {number} is dropped");
                    attempt.set(stream, sequence, LOST);
                }
            }
        }
    }

    /// Everything has been acknowledged: is all there?
    pub fn check_all(&self, expect_final: impl Fn(usize) -> bool) {
        for (number, attempt) in self.attempts.iter().enumerate() {
            if attempt.discarded {
                continue;
            }
            for stream in Stream::ALL {
                for sequence in 1..=attempt.stored[stream.index()] {
                    let flags = attempt.flags(stream, sequence);
                    assert!(
                        flags & (ACCEPTED | LIED | REFUSED | LOST) != 0,
                        "chunk {sequence} of {stream:?} of attempt {number} never arrived"
                    );
                }
            }
            let has_final = attempt.final_text.is_some() || attempt.reports > 0;
            let excused = attempt.final_refused || attempt.report_refused;
            assert!(
                has_final || excused || !expect_final(number),
                "attempt {number} has no final"
            );
        }
    }
}

impl Attempt {
    pub fn flags(&self, stream: Stream, sequence: u64) -> u8 {
        let chunks = &self.chunks[stream.index()];
        let at = usize::try_from(sequence).expect("small") - 1;
        chunks.get(at).copied().unwrap_or(0)
    }

    pub fn set(&mut self, stream: Stream, sequence: u64, flag: u8) {
        let chunks = &mut self.chunks[stream.index()];
        let at = usize::try_from(sequence).expect("small") - 1;
        if chunks.len() <= at {
            chunks.resize(at + 1, 0);
        }
        chunks[at] |= flag;
    }

    /// The agent need not send it any more.
    pub fn is_over(&self, stream: Stream, sequence: u64) -> bool {
        self.discarded || self.flags(stream, sequence) & (RELEASED | REFUSED | LOST) != 0
    }
}

pub fn name(number: usize, with_channel: bool) -> Ids {
    let attempt = if with_channel { "a" } else { "" };
    Ids::new(&format!("t{number}"), attempt).expect("short")
}

/// What is in each chunk and each final, so that the disk can be asked for it.
pub fn mark(number: usize, letter: u8, sequence: u64) -> [u8; MARK_BYTES] {
    let mut mark = *b"~00o00000";
    mark[1] = b'0' + (number / 10 % 10) as u8;
    mark[2] = b'0' + (number % 10) as u8;
    mark[3] = letter;
    let mut rest = sequence;
    for digit in mark[4..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    mark
}

pub fn letter(stream: Stream) -> u8 {
    match stream {
        Stream::Stdout => b'o',
        Stream::Stderr => b'e',
    }
}

/// The content of a chunk follows from its name.
pub fn fill(buffer: &mut ChunkBuffer, number: usize, stream: Stream, sequence: u64, large: bool) {
    const FILLER: [u8; 64] = *b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789\n.";
    buffer.clear();
    let fits = buffer.extend_from_slice(&mark(number, letter(stream), sequence));
    let length = match large {
        true => (sequence as usize + number) % 4 * 5400,
        false => (sequence as usize * 7 + number) % 50,
    };
    let mut left = length;
    while left > 0 {
        let part = left.min(FILLER.len());
        let fits = buffer.extend_from_slice(&FILLER[..part]);
        assert!(fits.is_ok());
        left -= part;
    }
    assert!(fits.is_ok());
}
