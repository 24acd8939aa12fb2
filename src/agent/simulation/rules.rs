//! What must hold of every frame that the agent sends (PROTOCOL.md section 4).

use std::cell::RefCell;

use super::ledger::{Ledger, fill};
use super::server::{INCARNATION, Server, Talk};
use crate::ids::{Ids, Stream};
use crate::limits::ChunkBuffer;
use crate::wire::agent_message::{FinalPayload, ReceivedOutput};
use crate::wire::{MessageId, Piece};

impl Server {
    /// The same message again is the same message.
    pub(super) fn see_final(&mut self, number: usize, fin: &FinalPayload<String>) {
        let mut ledger = self.ledger.borrow_mut();
        let attempt = &mut ledger.attempts[number];
        let is_done = attempt.final_released || attempt.final_refused || attempt.reports > 0;
        if is_done && fin.output_truncated && fin.error_truncated {
            // Its texts are gone with the acknowledgement.
            return;
        }
        let text = format!(
            "{:?} {} {:?} {:?}",
            fin.status, fin.exit_code, fin.output, fin.error
        );
        match &attempt.final_text {
            None => attempt.final_text = Some(text),
            Some(first) => {
                let same = *first == text || attempt.discarded;
                assert!(same, "two finals of attempt {number}: {first} and {text}");
            }
        }
    }

    /// PROTOCOL.md 4.4: what comes before this chunk was sent over this connection, or is over.
    pub(super) fn check_order(
        &mut self,
        talk: &mut Talk,
        number: usize,
        stream: Stream,
        sequence: u64,
    ) {
        let at = stream.index();
        if talk.passed.len() <= number {
            talk.passed.resize(number + 1, [0; 2]);
            talk.spoke.resize(number + 1, [false; 2]);
        }
        let mut ledger = self.ledger.borrow_mut();
        let attempt = &mut ledger.attempts[number];
        if !std::mem::replace(&mut talk.spoke[number][at], true) {
            attempt.connections[at] += 1;
        }
        let passed = &mut talk.passed[number][at];
        while *passed + 1 < sequence && attempt.is_over(stream, *passed + 1) {
            *passed += 1;
        }
        assert!(
            *passed + 1 >= sequence,
            "chunk {sequence} of {stream:?} of attempt {number} overtakes number {}",
            *passed + 1
        );
        *passed = (*passed).max(sequence);
    }

    /// PROTOCOL.md 4.4: a final never before all output of its attempt.
    pub(super) fn check_output_first(&mut self, talk: &Talk, number: usize) {
        let ledger = self.ledger.borrow();
        let attempt = &ledger.attempts[number];
        for stream in Stream::ALL {
            let at = stream.index();
            let passed = talk.passed.get(number).map_or(0, |passed| passed[at]);
            for sequence in passed + 1..=attempt.stored[at] {
                assert!(
                    attempt.is_over(stream, sequence),
                    "the final of attempt {number} comes before chunk {sequence} of {stream:?}"
                );
            }
        }
    }
}

pub fn check_content(
    ledger: &Ledger,
    number: usize,
    stream: Stream,
    sequence: u64,
    output: &ReceivedOutput,
) {
    thread_local! {
        static EXPECTED: RefCell<Box<ChunkBuffer>> = RefCell::new(Box::new(ChunkBuffer::new()));
    }
    EXPECTED.with_borrow_mut(|expected| {
        let large = ledger.attempts[number].script.large;
        fill(expected, number, stream, sequence, large);
        assert!(
            output.data.as_bytes() == expected.as_slice(),
            "chunk {sequence} of {stream:?} of attempt {number} is another one"
        );
        assert_eq!(output.byte_count, expected.len() as u64);
    });
}

/// PROTOCOL.md 4.3: an id names its message for ever.
pub fn check_id(ids: &Ids, id: &str, piece: Piece) {
    let expected = MessageId {
        incarnation: INCARNATION,
        key: ids.key(),
        piece,
    };
    assert_eq!(MessageId::parse(id), Some(expected), "the id of {piece:?}");
}
