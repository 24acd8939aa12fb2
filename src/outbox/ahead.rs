//! Finals that are read before their turn.
//!
//! A task that prints faster than the server takes it puts all it can behind the cursor. A final
//! behind that would come when the server has taken the most that the store holds; and where room is
//! made all the time, never: it is copied forward, behind output that came later, again and again.
//! So a final that needs nothing before it, since no output of its attempt waits, does not queue
//! behind much of others.

use std::collections::HashSet;

use super::attempts::Attempt;
use super::engine::Engine;
use super::reader::push_message;
use super::record::Record;
use super::types::*;
use crate::ids::{AttemptKey, Stream};

/// Up to here, in segments, everything comes in the order of the log.
const SEGMENTS_IN_ORDER: u64 = 3;

/// Which finals were read before their turn.
#[derive(Default)]
pub(super) struct Ahead {
    keys: HashSet<AttemptKey>,
    /// Those of the last read.
    last: Vec<AttemptKey>,
}

impl Ahead {
    fn begin(&mut self, from: Cursor) {
        self.last.clear();
        // A new session reads everything.
        if from == Cursor::START {
            self.keys.clear();
        }
    }

    /// It was copied forward: if there was no room for it, it is read once more.
    pub fn has_moved(&mut self, key: AttemptKey) {
        self.keys.remove(&key);
    }

    /// It is in the batch already that is being read.
    pub fn has_just_given(&self, message: &Message) -> bool {
        matches!(message.body, Body::Final { .. }) && self.last.contains(&message.key)
    }

    fn add(&mut self, key: AttemptKey) {
        self.keys.insert(key);
        self.last.push(key);
    }
}

impl Engine {
    /// Adds such finals to a batch that begins at its cursor: each of them once in a session, and once
    /// more for each time that it is copied forward.
    pub(super) fn read_ahead(
        &mut self,
        max_messages: usize,
        max_bytes: usize,
        skip: Option<(AttemptKey, Stream)>,
        batch: &mut Batch,
    ) {
        self.ahead.begin(batch.next);
        let attempts = &self.attempts;
        self.ahead
            .keys
            .retain(|key| attempts.get(key).is_some_and(Attempt::final_waits));
        let first = self.log.segments.first().map_or(0, |it| it.generation());
        let far = batch.next.generation.max(first) + SEGMENTS_IN_ORDER;
        let is_far = |(key, attempt): (&AttemptKey, &Attempt)| {
            let at = attempt.fin.filter(|_| attempt.final_waits())?.at;
            let waits_for_nothing = attempt.sends() && !attempt.output_waits();
            let is_new = !self.ahead.keys.contains(key);
            (at.generation >= far && waits_for_nothing && is_new).then_some((at, *key))
        };
        let mut found: Vec<(Cursor, AttemptKey)> =
            self.attempts.iter().filter_map(is_far).collect();
        found.sort_unstable();
        for (at, key) in found.into_iter().take(max_messages) {
            let Some(position) = self.log.position(at.generation) else {
                continue;
            };
            let end = self.log.segments[position].end;
            let Some(mut reader) = self.take_reader(position) else {
                continue;
            };
            let mut is_full = false;
            if let Some((head, body)) = reader.record_at(at.byte(), end)
                && let Some(record) = Record::decode(&head, body)
                && let Some(message) = self.message(at, head.key, &record, skip)
            {
                is_full = !batch.has_room(body.len(), max_messages, max_bytes);
                if !is_full {
                    push_message(batch, message, &record);
                }
            }
            reader.shrink();
            self.reading = Some((at.generation, reader));
            if is_full {
                break;
            }
            self.ahead.add(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::model::{Tester, ids};

    const OUT: Stream = Stream::Stdout;

    /// One batch from this place: whose finals it has, how many chunks, and where to go on.
    fn read(tester: &mut Tester, from: Cursor) -> (Vec<AttemptKey>, usize, Cursor) {
        let batch = tester.engine().read(ReadRequest {
            from,
            max_messages: 6,
            max_bytes: 4000,
            ..ReadRequest::default()
        });
        let is_final = |it: &&Message| matches!(it.body, Body::Final { .. });
        let finals: Vec<AttemptKey> = batch
            .messages
            .iter()
            .filter(is_final)
            .map(|it| it.key)
            .collect();
        let chunks = batch.messages.len() - finals.len();
        (finals, chunks, batch.next)
    }

    fn running(tester: &mut Tester) -> u64 {
        let number = tester.receive();
        tester.start(number);
        number
    }

    /// Prints until so many segments have begun since.
    fn print(tester: &mut Tester, number: u64, segments: u64) {
        let newest = |tester: &mut Tester| {
            let last = tester.engine().log.segments.last();
            last.map_or(0, |it| it.generation())
        };
        let until = newest(tester) + segments;
        while newest(tester) < until {
            tester.append(number, OUT, 5);
        }
    }

    #[test]
    fn a_final_does_not_queue_behind_much_output_of_others() {
        let mut tester = Tester::new(128 << 10);
        let bomb = running(&mut tester);
        print(&mut tester, bomb, 4);
        let quick = running(&mut tester);
        tester.finish(quick);
        // With output of its own that waits it keeps its place.
        let chatty = running(&mut tester);
        tester.append(chatty, OUT, 1);
        tester.finish(chatty);
        let key = ids(quick).key();
        let (finals, chunks, next) = read(&mut tester, Cursor::START);
        assert_eq!(finals, [key]);
        assert!(chunks > 0, "the output goes on, too");
        let (finals, chunks, _) = read(&mut tester, next);
        assert_eq!((finals.len(), chunks > 0), (0, true), "once in a session");
        let (finals, ..) = read(&mut tester, next);
        assert_eq!(finals, [], "it was not in the last batch");
        let (finals, ..) = read(&mut tester, Cursor::START);
        assert_eq!(finals, [key], "a new session gets it again");
        tester.check();
    }

    /// A store that makes room all the time copies it forward, always behind newer output.
    #[test]
    fn a_final_that_is_copied_forward_again_and_again_is_read() {
        let mut tester = Tester::new(128 << 10);
        let quick = running(&mut tester);
        tester.finish(quick);
        let bomb = running(&mut tester);
        print(&mut tester, bomb, 20);
        let (finals, ..) = read(&mut tester, Cursor::START);
        assert_eq!(finals, [ids(quick).key()]);
        tester.acknowledge_final(quick);
        let (finals, ..) = read(&mut tester, Cursor::START);
        assert_eq!(finals, []);
        tester.check();
    }

    /// What stands near comes in the order in which it was stored.
    #[test]
    fn little_output_before_it_is_sent_first() {
        let mut tester = Tester::new(128 << 10);
        let other = running(&mut tester);
        tester.append(other, OUT, 6);
        tester.append(other, OUT, 6);
        let quick = running(&mut tester);
        tester.finish(quick);
        let (finals, chunks, next) = read(&mut tester, Cursor::START);
        assert_eq!((finals.len(), chunks > 0), (0, true));
        let mut at = next;
        let mut found = Vec::new();
        while found.is_empty() {
            let (finals, _, next) = read(&mut tester, at);
            assert!(next > at, "reading goes on");
            found = finals;
            at = next;
        }
        assert_eq!(found, [ids(quick).key()]);
    }
}
