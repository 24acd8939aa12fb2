//! What the store says against what the model knows.

use std::collections::BTreeMap;

use super::super::recovery;
use super::super::types::*;
use super::{Tester, content, final_of, ids, number_of};
use crate::ids::Stream;

impl Tester {
    /// Reads all that waits and compares.
    pub fn check(&mut self) {
        self.note_drops();
        let mut streams: BTreeMap<(u64, usize), Vec<(u64, bool)>> = BTreeMap::new();
        let mut finals: Vec<u64> = Vec::new();
        // Read before their turn: they come in their turn, too, and once.
        let mut early: Vec<u64> = Vec::new();
        let mut from = Cursor::START;
        loop {
            let batch = self.engine().read(ReadRequest {
                from,
                max_messages: 5,
                max_bytes: 4000,
                ..ReadRequest::default()
            });
            assert!(
                batch.at_end || !batch.messages.is_empty(),
                "reading goes on"
            );
            for message in &batch.messages {
                let number = number_of(&message.ids);
                let born = self.known[&number].born.unwrap_or(self.store);
                assert_eq!(message.store, born, "the ids of {number} have changed");
                match &message.body {
                    Body::Output {
                        stream,
                        sequence,
                        data,
                        after_hole,
                    } => {
                        assert_eq!(
                            batch.buffer[data.clone()],
                            content(number, *stream, *sequence),
                            "chunk {sequence} of {number} changed"
                        );
                        assert!(
                            !finals.contains(&number) && !early.contains(&number),
                            "output after the final of {number}"
                        );
                        let seen = streams.entry((number, stream.index())).or_default();
                        seen.push((*sequence, *after_hole));
                    }
                    Body::Final {
                        exit_code,
                        output,
                        error,
                        usage,
                        ..
                    } => {
                        let known = &self.known[&number];
                        if *exit_code != -1 {
                            let expected = final_of(number);
                            assert_eq!(*exit_code, expected.exit_code);
                            assert_eq!(*usage, expected.usage);
                            assert_eq!(batch.buffer[output.clone()], expected.output);
                            assert_eq!(batch.buffer[error.clone()], expected.error);
                        } else {
                            assert!(!known.finished.0, "{number} had ended: {known:?}");
                        }
                        let (list, what) = match message.at < batch.next {
                            true => (&mut finals, "in its turn"),
                            false => (&mut early, "before it"),
                        };
                        assert!(!list.contains(&number), "{number} ends twice {what}");
                        list.push(number);
                    }
                }
            }
            from = batch.next;
            if batch.at_end {
                break;
            }
        }
        let snapshot = self.engine().snapshot(1 << 20);
        let read = streams.values().map(Vec::len).sum::<usize>() + finals.len();
        assert_eq!(
            read as u64, snapshot.counts.messages_waiting,
            "something waits that cannot be read"
        );
        for (number, known) in &self.known {
            let gone = known.discarded.0;
            let seen_final = finals.iter().filter(|&other| other == number).count();
            assert!(seen_final <= 1, "the final of {number} came twice");
            let done = known.final_acked || known.reported.1;
            let ends = known.finished.0 || known.interrupted;
            if ends && !done && !known.discarded.1 {
                assert_eq!(seen_final, 1, "the final of {number} is lost: {known:?}");
            }
            assert!(
                !(gone || known.reported.0) || seen_final == 0,
                "{number}: {known:?}"
            );
            for stream in Stream::ALL {
                let none = Vec::new();
                let seen = streams.get(&(*number, stream.index())).unwrap_or(&none);
                assert!(!gone || seen.is_empty(), "{number} was discarded");
                let range = snapshot
                    .streams
                    .iter()
                    .find(|range| range.key == ids(*number).key() && range.stream == stream);
                let truncated = range.is_some_and(|range| range.truncated);
                let cut = known.given_up[stream.index()].1 > 0
                    || !known.rejected[stream.index()].is_empty();
                assert!(
                    self.dropped || cut || !truncated,
                    "{number} {stream:?} was not cut: {known:?}"
                );
                let (confirmed, tried) = known.last[stream.index()];
                let mut before = 0;
                for &(sequence, after_hole) in seen {
                    assert!(
                        sequence <= tried,
                        "chunk {sequence} of {number} was never printed"
                    );
                    assert!(
                        sequence > before,
                        "chunk {sequence} of {number} comes after {before}"
                    );
                    assert!(
                        !known.must_be_gone(stream, sequence),
                        "chunk {sequence} of {number} came back: {known:?}"
                    );
                    let mut missing = before + 1..sequence;
                    let excused = missing
                        .clone()
                        .all(|missing| known.may_be_gone(stream, missing));
                    assert!(
                        excused || (self.dropped && after_hole && truncated),
                        "a hole before {sequence} of {number} {stream:?}: {known:?}"
                    );
                    let was_cut = missing.any(|missing| known.was_cut(stream, missing));
                    assert!(
                        self.dropped || was_cut || !after_hole,
                        "no hole before {sequence} of {number} {stream:?}: {known:?}"
                    );
                    before = sequence;
                }
                let complete =
                    (before + 1..=confirmed).all(|missing| known.may_be_gone(stream, missing));
                assert!(
                    complete || known.discarded.1 || (self.dropped && seen.is_empty()),
                    "{number} {stream:?} ends with {before}: {known:?}"
                );
            }
        }
        let most = self.cap_bytes + 2 * recovery::segment_bytes(self.cap_bytes);
        assert!(snapshot.counts.bytes_used <= most, "the cap is exceeded");
        assert!(self.disk.bytes() <= most, "the files exceed the cap");
        let log = &self.engine().log;
        let known = log.used_bytes() + log.free.len() as u64 * log.segment_bytes;
        assert!(self.disk.bytes() <= known, "a file is forgotten");
    }

    /// What was tried without an answer is settled by what the store says now.
    pub fn settle(&mut self) {
        let numbers: Vec<u64> = self.known.keys().copied().collect();
        for number in numbers {
            let key = ids(number).key();
            let phase = self.engine().known_phase(key).expect("the index answers");
            let lasts = self
                .engine()
                .attempts
                .get(&key)
                .map(|attempt| attempt.streams.each_ref().map(|state| state.mark.last));
            let stored = self.engine().final_of(key);
            let Some(known) = self.known.get_mut(&number) else {
                continue;
            };
            // Also by a recovery that crashed after it.
            known.interrupted |= stored.is_some_and(|stored| stored.fin.exit_code == -1);
            assert!(
                phase.is_some() || !known.received.0,
                "{number} is forgotten: {known:?}"
            );
            known.received = (phase.is_some(), phase.is_some());
            let discarded = phase == Some(Phase::Discarded);
            assert!(
                discarded || !known.discarded.0,
                "{number} came back: {phase:?} {known:?}"
            );
            known.discarded = (discarded, discarded);
            let ended = matches!(phase, Some(Phase::Finished { .. }));
            if !discarded {
                let finished = ended && !known.interrupted;
                assert!(
                    finished || !known.finished.0,
                    "{number}: {phase:?} {known:?}"
                );
                known.finished = (finished, finished);
                known.started.0 = known.started.1 && phase != Some(Phase::Received);
                known.started.1 = known.started.0;
                let reported = ended && phase == Some(Phase::Finished { held: false });
                assert!(
                    reported || !known.reported.0,
                    "{number} is to be reported again"
                );
                known.reported = (known.reported.1 && reported, known.reported.1 && reported);
            }
            if let Some(lasts) = lasts {
                for (last, (confirmed, tried)) in lasts.into_iter().zip(&mut known.last) {
                    *confirmed = last;
                    *tried = last;
                }
            }
        }
    }
}
