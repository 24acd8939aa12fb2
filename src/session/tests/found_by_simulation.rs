//! What the simulation of the whole agent (`agent/simulation`) has found, each in its shortest form.

use super::*;
use crate::limits::ACK_SPAN;

/// The server says of chunk `related` that it misses what comes after `highest`; the store has not
/// answered yet where that is.
fn hear_of_a_gap(bench: &mut Bench, related: u64, highest: u64) {
    bench.session.received(
        Ok(ServerMessage::Error(ServerError {
            code: OUTPUT_SEQUENCE_GAP.into(),
            message: String::new(),
            retryable: true,
            related_message_id: Some(Bench::id("t", Piece::Output(Stream::Stdout, related))),
            highest_accepted_sequence: Some(highest),
        })),
        bench.now,
    );
    while let Some(effect) = bench.session.next_effect(bench.now) {
        assert!(matches!(effect, Effect::Locate { .. }), "{effect:?}");
    }
}

#[test]
fn a_chunk_that_flags_a_jump_waits_until_its_stream_has_nothing_in_flight() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=3);
    bench.holes.push((key("t"), Stream::Stdout));
    bench.store("t", 5..=5);
    assert_eq!(bench.sequences("t"), [1, 2, 3]);
    // The server may still want one of the three once more, and would jump over it.
    bench.ack("t", 1, Some(2));
    assert_eq!(bench.sequences("t"), [1, 2, 3]);
    bench.ack("t", 3, None);
    assert_eq!(bench.sequences("t"), [1, 2, 3, 5]);
    assert_eq!(bench.sent.last().map(|sent| sent.2), Some(true));
}

#[test]
fn no_chunk_goes_further_ahead_than_its_own_acknowledgement_can_be_noted() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=200);
    // The first one is never acknowledged, all others are at once.
    let mut acked = 1;
    while let Some(next) = bench.sequences("t").into_iter().find(|n| *n > acked) {
        acked = next;
        bench.ack("t", next, None);
    }
    assert_eq!(acked, ACK_SPAN);
    bench.ack("t", 1, None);
    assert_eq!(bench.sequences("t").last(), Some(&(ACK_SPAN + 32)));
}

#[test]
fn what_the_store_could_not_drop_is_sent_again() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=2);
    let related = Some(Bench::id("t", Piece::Output(Stream::Stdout, 1)));
    bench.session.received(
        Ok(ServerMessage::Error(ServerError {
            code: "bad".into(),
            message: String::new(),
            retryable: false,
            related_message_id: related,
            highest_accepted_sequence: None,
        })),
        bench.now,
    );
    let effect = bench.session.next_effect(bench.now);
    assert!(matches!(effect, Some(Effect::Reject { .. })), "{effect:?}");
    bench.run();
    assert_eq!(bench.sequences("t"), [1, 2]);
    bench.session.settled(false);
    bench.run();
    assert_eq!(bench.sequences("t"), [1, 2, 1]);
}

#[test]
fn an_answer_about_another_gap_opens_nothing() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=5);
    hear_of_a_gap(&mut bench, 5, 1);
    // Late, of an earlier connection: the server then missed what came after 3.
    let (key, stream) = (key("t"), Stream::Stdout);
    bench.session.located(key, stream, 4, Some(3), bench.now);
    bench.run();
    assert_eq!(bench.sequences("t"), [1, 2, 3, 4, 5]);
    bench.session.located(key, stream, 2, Some(1), bench.now);
    bench.run();
    assert_eq!(bench.sequences("t"), [1, 2, 3, 4, 5, 2, 3, 4, 5]);
    assert!(bench.sent.iter().all(|sent| !sent.2), "nothing is lost");
}

#[test]
fn a_second_gap_further_on_leaves_nothing_behind() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=8);
    bench.ack("t", 2, None);
    bench.ack("t", 3, None);
    hear_of_a_gap(&mut bench, 7, 0);
    hear_of_a_gap(&mut bench, 8, 6);
    // 1, 4, 5 and 6 are not on their way any more, and neither are they acknowledged.
    let (key, stream) = (key("t"), Stream::Stdout);
    bench.session.located(key, stream, 1, Some(0), bench.now);
    bench.session.located(key, stream, 7, Some(6), bench.now);
    bench.run();
    assert_eq!(bench.sequences("t")[8..], [1, 4, 5, 6, 7, 8]);
    assert!(bench.sent.iter().all(|sent| !sent.2), "nothing is lost");
}

#[test]
fn a_gap_beyond_a_stream_that_was_passed_over_leaves_nothing_behind() {
    let mut bench = Bench::connected();
    let room = WINDOW_STREAM_MESSAGES as u64;
    bench.store("t", 1..=room + 2);
    assert_eq!(bench.sequences("t").len(), WINDOW_STREAM_MESSAGES);
    // It stands still: others go on without it.
    bench.advance(2 * SECOND);
    bench.store("other", 1..=1);
    assert_eq!(bench.sequences("other"), [1]);
    let beyond = room + 2;
    bench.gap("t", room, beyond);
    bench.ack("t", room, Some(room));
    assert_eq!(
        bench.sequences("t")[WINDOW_STREAM_MESSAGES..],
        [room + 1, room + 2]
    );
}
