//! Orders of events that are seldom met, each of which once lost or repeated something.

use super::*;

#[test]
fn a_silent_server_is_left_also_if_pings_are_frequent() {
    let mut bench = Bench::new();
    bench.session.settings.ping_interval = 5 * SECOND;
    bench.connect(HelloAck::default());
    for _ in 0..25 {
        bench.advance(SECOND);
    }
    assert_ne!(bench.session.link_state(), LinkState::Active);
    let said = bench.session.last_error().expect("it says why");
    assert!(said.contains("pings"), "{said}");
}

#[test]
fn what_was_stored_before_a_read_that_does_not_count_is_sent() {
    let mut bench = Bench::connected();
    bench.log.push((key("t"), Piece::Output(Stream::Stdout, 1)));
    bench.session.appended();
    let order = loop {
        match bench.session.next_effect(bench.now) {
            Some(Effect::Read(order)) => break order,
            Some(_) => {}
            None => panic!("nothing is read"),
        }
    };
    // While the store reads, the server refuses a message.
    bench.session.received(
        Ok(ServerMessage::Error(ServerError {
            code: "bad".into(),
            message: String::new(),
            retryable: false,
            related_message_id: Some(Bench::id("other", Piece::Final)),
            highest_accepted_sequence: None,
        })),
        bench.now,
    );
    bench.read(order);
    bench.run();
    assert_eq!(bench.sequences("t"), [1]);
}

#[test]
fn a_server_that_says_not_now_again_and_again_keeps_its_session() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=1);
    let related = Bench::id("t", Piece::Output(Stream::Stdout, 1));
    for repeats in 1..=10 {
        assert_eq!(bench.sequences("t").len(), repeats);
        bench.advance(SECOND / 100);
        bench.error(true, "busy", Some(related.clone()), None);
        bench.advance(ACK_TIMEOUT / 2);
        bench.session.heard(bench.now);
        bench.advance(ACK_TIMEOUT / 2);
        bench.session.heard(bench.now);
        assert_eq!(bench.session.link_state(), LinkState::Active);
    }
    assert!(!bench.has(|effect| matches!(effect, Effect::GiveUpStream { .. })));
}
