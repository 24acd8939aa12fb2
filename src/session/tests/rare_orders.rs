//! Orders of events that are seldom met, each of which once lost or repeated something.

use super::*;
use crate::ids::FinalStatus;
use crate::limits::LANES_MAX;
use crate::wire::agent_message::{FinalPayload, UnackedFinal};

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

fn offer(name: &str) -> Box<TaskOffer> {
    Box::new(TaskOffer {
        ids: Ids::clone(&ids(name)),
        command: "true".into(),
        priority: 0,
        timeout_seconds: None,
    })
}

fn queued(ids: Arc<Ids>) -> QueuedTask {
    QueuedTask {
        ids,
        priority: 0,
        timeout_seconds: None,
    }
}

fn starts_told(bench: &Bench) -> usize {
    let told = |effect: &&Effect<usize>| matches!(effect, Effect::SendStarted(_));
    bench.effects.iter().filter(told).count()
}

#[test]
fn a_task_that_starts_during_the_handshake_is_told_after_it() {
    let mut bench = Bench::new();
    bench.session.recovered([queued(ids("t"))].into_iter());
    while bench.session.link_state() != LinkState::Connecting {
        bench.advance(SECOND / 10);
    }
    // The snapshot is taken before the process runs, so the hello names no running task.
    bench.session.connected(bench.now);
    bench.run();
    bench.session.task_started(key("t"), bench.now);
    bench.acknowledge_hello(HelloAck::default());
    assert_eq!(starts_told(&bench), 1);
}

#[test]
fn an_attempt_without_result_channel_has_no_lease() {
    let mut bench = Bench::new();
    bench.connect(HelloAck {
        extensions: Some(vec!["lease".into()]),
        lease_interval_seconds: Some(5),
        ..HelloAck::default()
    });
    let old = Arc::new(Ids::new("old", "").expect("short"));
    bench.session.recovered([queued(old.clone())].into_iter());
    bench.run();
    bench.session.task_started(old.key(), bench.now);
    bench.advance(6 * SECOND);
    assert!(!bench.has(|effect| matches!(effect, Effect::SendLease(..))));
}

#[test]
fn a_cancel_that_meets_the_receipt_under_way_is_kept() {
    let mut bench = Bench::new();
    bench.connect(HelloAck {
        extensions: Some(vec!["cancel".into()]),
        ..HelloAck::default()
    });
    bench.say(ServerMessage::Deliver(offer("t")));
    bench.say(ServerMessage::Cancel {
        ids: Ids::clone(&ids("t")),
        reason: Some("not needed".into()),
    });
    let origin = Origin {
        delivered: true,
        command_bytes: 4,
    };
    bench
        .session
        .recorded(queued(ids("t")), Recorded::New, origin, bench.now);
    bench.run();
    assert!(!bench.has(|effect| matches!(effect, Effect::Start(_))));
    assert!(bench.has(
        |effect| matches!(effect, Effect::Interrupt { reason, .. } if reason.contains("not needed"))
    ));
}

#[test]
fn a_refused_task_is_polled_for_until_a_poll_succeeds() {
    let mut bench = Bench::connected();
    bench.session.polled(None, bench.now);
    let origin = Origin {
        delivered: true,
        command_bytes: 0,
    };
    bench.forget();
    bench
        .session
        .recorded(queued(ids("t")), Recorded::NoRoom, origin, bench.now);
    bench.poll_fails = true;
    bench.advance(11 * SECOND);
    bench.poll_fails = false;
    let polls = |bench: &Bench| {
        let poll = |effect: &&Effect<usize>| matches!(effect, Effect::Poll);
        bench.effects.iter().filter(poll).count()
    };
    assert_eq!(polls(&bench), 1);
    for _ in 0..7 {
        bench.session.heard(bench.now);
        bench.advance(10 * SECOND);
    }
    assert_eq!(bench.session.link_state(), LinkState::Active);
    assert_eq!(polls(&bench), 2);
}

fn unacked_final(name: &str) -> UnackedFinal {
    UnackedFinal {
        message_id: Bench::id(name, Piece::Final),
        task_id: name.into(),
        execution_attempt_id: "a".into(),
        result: FinalPayload {
            status: FinalStatus::Completed,
            exit_code: 0,
            output: None,
            error: None,
            output_truncated: false,
            error_truncated: false,
            usage: None,
        },
    }
}

#[test]
fn a_final_that_went_with_the_hello_is_not_reported_before_its_answer() {
    let mut bench = Bench::new();
    let mut hello = Bench::hello();
    hello.unacked_finals.push(unacked_final("t"));
    bench.hello = hello;
    let waiting = |name: &str| WaitingFinal {
        ids: ids(name),
        key: key(name),
        output_waits: false,
    };
    while bench.session.link_state() != LinkState::Connecting {
        bench.advance(SECOND / 10);
    }
    bench.session.connected(bench.now);
    bench.run();
    bench.session.finals_listed(&[waiting("t"), waiting("u")]);
    bench.run();
    let reported = |bench: &Bench, name: &str| {
        bench.has(|effect| matches!(effect, Effect::Report(of) if of.key() == key(name)))
    };
    assert!(!reported(&bench, "t"));
    assert!(reported(&bench, "u"), "it has come after the hello");
    let gone = ReportResult::Gone;
    bench.session.reported(&ids("u"), &gone, bench.now);
    // Nothing came of it.
    bench.session.disconnected("test", bench.now);
    bench.run();
    bench.session.finals_listed(&[waiting("t")]);
    bench.run();
    assert!(reported(&bench, "t"));
}

#[test]
fn a_hello_without_results_carries_no_finals() {
    let mut bench = Bench::new();
    bench.session.settings.results = false;
    bench.hello.unacked_finals.push(unacked_final("t"));
    bench.connect(HelloAck::default());
    assert!(bench.has(
        |effect| matches!(effect, Effect::SendHello { hello, .. } if hello.unacked_finals.is_empty())
    ));
}

#[test]
fn a_connection_that_comes_after_its_dial_was_given_up_is_none() {
    let mut bench = Bench::new();
    while bench.session.link_state() != LinkState::Connecting {
        bench.advance(SECOND / 10);
    }
    bench.session.store_changed(INCARNATION.into(), bench.now);
    bench.session.connected(bench.now);
    assert_eq!(bench.session.link_state(), LinkState::Down);
}

#[test]
fn gap_errors_about_what_is_not_held_do_not_use_up_the_lanes() {
    let mut bench = Bench::connected();
    for number in 0..LANES_MAX + 1 {
        bench.gap(&format!("old-{number}"), 2, 1);
    }
    bench.log.push((key("t"), Piece::Output(Stream::Stdout, 1)));
    bench.session.appended();
    // Without a lane it would be read for ever and never sent.
    for _ in 0..100 {
        if let Some(Effect::Read(order)) = bench.session.next_effect(bench.now) {
            bench.read(order);
        }
    }
    assert_eq!(bench.sequences("t"), [1]);
    bench.run();
}

#[test]
fn a_final_that_is_being_reported_answers_no_delivery() {
    let mut bench = Bench::new();
    bench.session.finals_listed(&[WaitingFinal {
        ids: ids("t"),
        key: key("t"),
        output_waits: false,
    }]);
    bench.connect(HelloAck::default());
    let origin = Origin {
        delivered: true,
        command_bytes: 4,
    };
    // The server may have acknowledged it meanwhile, or not.
    for held in [true, false] {
        let finished = Recorded::Finished { held };
        let task = queued(ids("t"));
        bench.session.recorded(task, finished, origin, bench.now);
        bench.run();
        assert!(!bench.has(|effect| matches!(effect, Effect::SendFinalAgain(_))));
    }
    let retry = ReportResult::Retry {
        after: None,
        why: "503".into(),
    };
    bench.session.reported(&ids("t"), &retry, bench.now);
    let finished = Recorded::Finished { held: false };
    let task = queued(ids("t"));
    bench.session.recorded(task, finished, origin, bench.now);
    bench.run();
    assert!(bench.has(|effect| matches!(effect, Effect::SendFinalAgain(_))));
}

#[test]
fn a_final_that_answers_a_delivery_waits_for_the_output_of_its_attempt() {
    let mut bench = Bench::connected();
    bench.store("t", 1..=2);
    bench.store("other", 1..=1);
    let asked = |bench: &mut Bench| {
        bench.run();
        let acknowledges = |effect: &Effect<usize>| matches!(effect, Effect::Acknowledge(_));
        let answers = |effect: &Effect<usize>| matches!(effect, Effect::SendFinalAgain(_));
        let acknowledged = bench.effects.iter().rposition(acknowledges);
        let answered = bench.effects.iter().position(answers);
        assert!(answered.is_none() || acknowledged < answered, "too early");
        bench.forget();
        answered.is_some()
    };
    let deliver = |bench: &mut Bench| {
        let origin = Origin {
            delivered: true,
            command_bytes: 4,
        };
        let finished = Recorded::Finished { held: false };
        let task = queued(ids("t"));
        bench.session.recorded(task, finished, origin, bench.now);
    };
    deliver(&mut bench);
    assert!(asked(&mut bench), "the server wants it");
    deliver(&mut bench);
    assert!(!asked(&mut bench), "the store is being asked");
    bench.session.answered(&ids("t"), true);
    assert!(!asked(&mut bench));
    bench.ack("other", 1, None);
    assert!(!asked(&mut bench));
    bench.ack("t", 1, None);
    assert!(asked(&mut bench), "some of its output was acknowledged");
    bench.session.answered(&ids("t"), true);
    assert!(!asked(&mut bench), "once for each acknowledgement");

    bench.session.settled(true);
    assert!(asked(&mut bench), "the rest may have been dropped");
    bench.ack("t", 2, None);
    assert!(!asked(&mut bench), "the store is being asked");
    bench.session.answered(&ids("t"), true);
    assert!(
        asked(&mut bench),
        "its last output was acknowledged meanwhile"
    );
    bench.session.answered(&ids("t"), false);
    bench.session.settled(true);
    assert!(!asked(&mut bench), "it has gone out");

    deliver(&mut bench);
    assert!(asked(&mut bench), "the server wants it once more");
    bench.session.answered(&ids("t"), true);
    bench.session.disconnected("cut", bench.now);
    bench.connect(HelloAck::default());
    bench.session.settled(true);
    assert!(!asked(&mut bench), "the session that asked is over");
}
