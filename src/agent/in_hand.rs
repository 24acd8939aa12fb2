//! What was read and found no room in the window: it is not read once more, and the store is not
//! waited for, when room returns.
//!
//! Only a short cut: the session asks for it from its own cursor, as if nothing were here. What is
//! acknowledged or dropped meanwhile voids what is here.

use std::rc::Rc;

use crate::ids::{AttemptKey, Stream};
use crate::outbox::{Batch, Body, Cursor};
use crate::session::Ack;
use crate::session::delivery::ReadOrder;

/// What a read passes over ([`ReadOrder::skip`]).
pub type Skip = Option<(AttemptKey, Stream)>;

/// A batch, or the end of one.
pub struct Rest {
    pub batch: Rc<Batch>,
    /// The messages before this one are not in it.
    pub first: usize,
    pub skip: Skip,
}

#[derive(Default)]
pub struct InHand(Option<(Cursor, Rest)>);

impl InHand {
    /// Keeps what a batch has at this place and behind it. Of one with finals that were read before
    /// their turn nothing is kept: who reads on from this place must meet them.
    pub fn keep(&mut self, batch: &Rc<Batch>, from: Cursor, skip: Skip) {
        let is_in_order = batch.messages.is_sorted_by_key(|it| it.at);
        let at_place = || batch.messages.iter().position(|it| it.at == from);
        let first = is_in_order.then(at_place).flatten();
        let batch = Rc::clone(batch);
        self.0 = first.map(|first| (from, Rest { batch, first, skip }));
    }

    /// Gives what is here if it is what a read of the store would give, or the begin of it.
    pub fn take(&mut self, order: &ReadOrder<Cursor>) -> Option<Rest> {
        let (_, rest) = self
            .0
            .take_if(|(from, rest)| *from == order.from && rest.skip == order.skip)?;
        Some(rest)
    }

    /// It may have gone from the store, or be of another session.
    pub fn void(&mut self) {
        self.0 = None;
    }

    /// The server has this: it need not be sent once more.
    pub fn acknowledged(&mut self, ack: &Ack) {
        self.0.take_if(|(_, rest)| rest.has(ack));
    }
}

impl Rest {
    fn has(&self, ack: &Ack) -> bool {
        let mut messages = self.batch.messages[self.first..].iter();
        messages.any(|message| match (&message.body, *ack) {
            (
                Body::Output {
                    stream, sequence, ..
                },
                Ack::Output {
                    key,
                    stream: of,
                    sequence: acked,
                    cumulative,
                },
            ) => {
                message.key == key
                    && *stream == of
                    && (*sequence == acked || (cumulative && *sequence < acked))
            }
            (Body::Final { .. }, Ack::Final { key }) => message.key == key,
            _ => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ids::{FinalStatus, Ids, Incarnation};
    use crate::outbox::Message;

    /// Four chunks of one stream and the final of another attempt.
    fn batch(places: &[Cursor; 5]) -> Rc<Batch> {
        let message = |at: usize, ids: Ids, body: Body| Message {
            at: places[at],
            key: ids.key(),
            store: Incarnation::of(1),
            ids: Arc::new(ids),
            body,
        };
        let chunk = |number: usize| {
            let body = Body::Output {
                stream: Stream::Stdout,
                sequence: number as u64 + 1,
                data: 0..0,
                after_hole: false,
            };
            message(number, ids("t"), body)
        };
        let fin = Body::Final {
            status: FinalStatus::Completed,
            exit_code: 0,
            output: 0..0,
            error: 0..0,
            output_truncated: false,
            error_truncated: false,
            usage: None,
        };
        let mut messages: Vec<Message> = (0..4).map(chunk).collect();
        messages.push(message(4, ids("u"), fin));
        let next = places[4];
        Rc::new(Batch {
            messages,
            next,
            ..Batch::default()
        })
    }

    fn ids(name: &str) -> Ids {
        Ids::new(name, "a").expect("short")
    }

    fn order(from: Cursor, skip: Skip) -> ReadOrder<Cursor> {
        ReadOrder {
            from,
            max_messages: 1,
            max_bytes: 1,
            skip,
        }
    }

    fn output(sequence: u64, cumulative: bool) -> Ack {
        Ack::Output {
            key: ids("t").key(),
            stream: Stream::Stdout,
            sequence,
            cumulative,
        }
    }

    #[test]
    fn only_what_was_left_is_given_and_only_to_who_asks_for_it() {
        let places = Cursor::some();
        let skip = Some((ids("v").key(), Stream::Stderr));
        let mut in_hand = InHand::default();
        in_hand.keep(&batch(&places), places[2], skip);
        assert!(
            in_hand.take(&order(places[1], skip)).is_none(),
            "from before"
        );
        assert!(in_hand.take(&order(places[2], None)).is_none(), "of all");
        let rest = in_hand.take(&order(places[2], skip));
        assert_eq!(rest.map(|rest| rest.first), Some(2));
        assert!(in_hand.take(&order(places[2], skip)).is_none(), "once");
        in_hand.keep(&batch(&places), Cursor::START, None);
        assert!(
            in_hand.take(&order(Cursor::START, None)).is_none(),
            "no such place"
        );
        in_hand.keep(&batch(&places), places[0], None);
        in_hand.void();
        assert!(in_hand.take(&order(places[0], None)).is_none(), "void");
    }

    /// A final that was read early stands in front, and behind the place from which is read on.
    #[test]
    fn of_a_batch_that_is_not_in_order_nothing_is_kept() {
        let [first, second, third, fourth, last] = Cursor::some();
        let mut in_hand = InHand::default();
        in_hand.keep(&batch(&[fourth, first, second, third, last]), first, None);
        assert!(in_hand.take(&order(first, None)).is_none());
    }

    #[test]
    fn what_is_acknowledged_meanwhile_is_not_given() {
        let places = Cursor::some();
        let is_given = |ack: Ack| {
            let mut in_hand = InHand::default();
            in_hand.keep(&batch(&places), places[2], None);
            in_hand.acknowledged(&ack);
            in_hand.take(&order(places[2], None)).is_some()
        };
        assert!(is_given(output(2, true)), "sent before");
        assert!(is_given(output(2, false)));
        assert!(!is_given(output(3, false)));
        assert!(!is_given(output(9, true)), "and all before");
        assert!(is_given(output(9, false)));
        let other = |name| Ack::Final {
            key: ids(name).key(),
        };
        assert!(is_given(other("t")), "has none here");
        assert!(!is_given(other("u")));
    }
}
