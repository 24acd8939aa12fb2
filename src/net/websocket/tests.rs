//! The upgrade and the reading side, against servers on real sockets.

use std::cell::Cell;
use std::io::{BufReader, Write as _};
use std::net::Shutdown;

use tungstenite::protocol::CloseFrame;

use super::*;
use crate::net::testing::{
    self, Scripted, answer, connect, connect_within, lanes, peer, read_request, run, serve,
    upgrading,
};
use crate::net::verify_signature;

// ---- upgrade ----------------------------------------------------------------------------------

#[test]
fn the_upgrade_is_signed_and_a_401_corrects_the_clock_once() {
    let date = "Date: Fri, 01 Mar 2024 00:00:00 GMT\r\n";
    let server = Scripted::new([
        answer("401 Unauthorized", date, ""),
        answer("401 Unauthorized", date, "unknown agent"),
    ]);
    let error = run(connect(server.port)).expect_err("refused twice");
    assert_eq!(error.status, Some(401));
    let received = server.received();
    assert_eq!(received.len(), 2);
    let public_key = testing::key().public_key_to_der().expect("der");
    for request in &received {
        assert_eq!(request.line(), "GET /api/v1/agents/ws HTTP/1.1");
        let header = |name| request.header(name).expect("header");
        assert!(verify_signature(
            &public_key,
            header("x-agent-id"),
            header("x-timestamp"),
            header("x-nonce"),
            header("x-signature"),
        ));
    }
    let corrected: u64 = received[1]
        .header("x-timestamp")
        .expect("header")
        .parse()
        .expect("number");
    assert!((1_709_251_200..1_709_251_260).contains(&corrected));
}

#[test]
fn refusals_of_the_upgrade_are_told_with_status_and_delay() {
    let check = |status: &str, headers: &str, expected: &str, seconds: Option<u64>| {
        let server = Scripted::new([answer(status, headers, "because")]);
        let error = run(connect(server.port)).expect_err(expected);
        assert!(error.why.contains(expected), "{error}");
        assert_eq!(error.retry_after, seconds.map(Duration::from_secs));
        assert_eq!(
            error.status.map(|status| status.to_string()).as_deref(),
            status.get(..3)
        );
    };
    check("503 Busy", "Retry-After: 7\r\n", "answered 503", Some(7));
    check("403 Forbidden", "", "answered 403", None);
    check(
        "302 Found",
        "Location: wss://b/\r\n",
        "redirect to \"wss://b/\"",
        None,
    );
    check("200 OK", "", "answered 200", None);
}

#[test]
fn a_server_that_breaks_the_handshake_is_left() {
    let check = |answer: &'static str, again: &'static str, expected: &str| {
        let port = serve(move |number, mut stream| {
            let mut reader = BufReader::new(stream.try_clone().expect("clone"));
            let _ = read_request(number, &mut reader);
            let _ = stream.write_all(answer.as_bytes());
            while !again.is_empty() && stream.write_all(again.as_bytes()).is_ok() {}
        });
        let error = run(connect(port)).expect_err(expected);
        assert!(error.why.contains(expected), "{expected}: {error}");
    };
    check(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
        "",
        "Sec-WebSocket-Accept",
    );
    check("HTTP/1.1 101 Switching Protocols\r\n\r\n", "", "pgrade");
    check("HTTP/1.1 101 Switch", "", "andshake");
    check("HTTP/1.1 101 X\r\nX: ", "0123456789abcdef", "too long");
    check("SSH-2.0-x\r\n", "", "HTTP");
}

#[test]
fn a_server_that_does_not_answer_the_upgrade_is_left_after_the_timeout() {
    let port = serve(|_, mut stream| {
        testing::drain(&mut stream);
    });
    let short = Duration::from_millis(50);
    let error = run(connect_within(port, short, short)).expect_err("silent");
    assert!(
        error.why.contains("did not answer the upgrade within 50ms"),
        "{error}"
    );
}

// ---- reading ----------------------------------------------------------------------------------

/// Connects to a server that sends these bytes, and collects what the reader says up to the end.
fn read_all(sent: impl Into<Vec<u8>>) -> (Vec<Incoming>, String) {
    let sent = sent.into();
    let port = upgrading(move |mut stream| {
        let _ = stream.write_all(&sent);
        let _ = stream.shutdown(Shutdown::Write);
        testing::drain(&mut stream);
    });
    run(async {
        let (_writer, mut reader) = connect(port).await.expect("connected");
        let mut incoming = Vec::new();
        loop {
            match reader.next().await {
                Ok(message) => incoming.push(message),
                Err(reason) => return (incoming, reason),
            }
        }
    })
}

#[test]
fn messages_are_read_also_in_fragments_with_control_frames_between() {
    let mut sent = b"\x81\x02hi".to_vec();
    sent.extend(b"\x01\x02a\xc3\x89\x01x\x00\x00\x80\x02\xa4b");
    sent.extend(b"\x8a\x00");
    sent.extend(b"\x88\x05\x03\xe9bye");
    let (incoming, reason) = read_all(sent);
    assert_eq!(
        incoming,
        [
            Incoming::Text("hi".into()),
            Incoming::Ping,
            Incoming::Text("a\u{e4}b".into()),
            Incoming::Pong,
            Incoming::Closed("the server closed the session: 1001 bye".to_string()),
        ]
    );
    assert_eq!(reason, "the server closed the connection");
}

#[test]
fn bad_frames_end_the_session_with_the_reason() {
    let check = |sent: &[u8], expected: &str| {
        let (incoming, reason) = read_all(sent);
        assert_eq!(incoming, [], "{expected}");
        assert!(reason.contains(expected), "{expected}: {reason}");
    };
    check(b"\x82\x01x", "binary frame");
    check(
        b"\x81\x7f\x00\x00\x00\x00\x00\x20\x00\x00",
        "2097152 bytes, allowed are 1048576",
    );
    check(
        b"\x81\x7f\xff\xff\xff\xff\xff\xff\xff\xff",
        "allowed are 1048576",
    );
    check(b"\x81\x02\xff\xfe", "no UTF-8");
    check(b"\x01\x01\xe4\x80\x01x", "no UTF-8");
    check(b"\x81\x82\0\0\0\0hi", "masked");
    check(b"\xc1\x02hi", "eserved bit");
    check(b"\x83\x00", "invalid opcode: 3");
    check(b"\x8b\x00", "invalid opcode: 11");
    check(b"\x09\x00", "ragmented control");
    let long_ping = [b"\x89\x7e\x00\x80".as_slice(), &[0; 128]].concat();
    check(&long_ping, "ontrol frame");
    check(b"\x80\x00", "ontinue frame");
    check(b"\x01\x01a\x81\x01b", "fragment");
    check(b"\x88\x01x", "lose");
    check(b"", "without a close frame");
    check(b"\x81\x05he", "without a close frame");
}

#[test]
fn a_message_of_many_fragments_is_bounded_as_a_whole() {
    let mut sent = b"\x01\x00".to_vec();
    let fragment = [b"\x00\x7e\xff\xff".as_slice(), &[b'x'; 0xffff]].concat();
    for _ in 0..17 {
        sent.extend(&fragment);
    }
    let (incoming, reason) = read_all(sent);
    assert_eq!(incoming, []);
    assert!(reason.contains("allowed are 1048576"), "{reason}");
}

#[test]
fn a_server_that_sends_without_pause_does_not_keep_others_waiting() {
    // Neither messages nor fragments that never become one hold the thread.
    let check = |first: &'static [u8], again: &'static [u8]| {
        let port = upgrading(move |mut stream| {
            let block = again.repeat(65_536 / again.len());
            let _ = stream.write_all(first);
            while stream.write_all(&block).is_ok() {}
        });
        let turns = Cell::new(0);
        run(async {
            let (_writer, mut reader) = connect(port).await.expect("connected");
            let read = async { while reader.next().await.is_ok() {} };
            let other = async {
                while turns.get() < 100 {
                    turns.set(turns.get() + 1);
                    future::yield_now().await;
                }
            };
            future::or(read, other).await;
        });
        assert_eq!(turns.get(), 100);
    };
    check(b"", b"\x81\x00");
    check(b"\x01\x00", b"\x00\x00");
}

// ---- replies ----------------------------------------------------------------------------------

#[test]
fn pings_are_answered_while_nothing_is_written_and_closes_too() {
    let (seen_sender, seen) = async_channel::bounded(4);
    let port = upgrading(move |stream| {
        let mut peer = peer(stream);
        peer.send(Message::Ping("are you there".into()))
            .expect("sent");
        seen_sender
            .send_blocking(peer.read().expect("pong"))
            .expect("seen");
        let frame = CloseFrame {
            code: 1001.into(),
            reason: "bye".into(),
        };
        peer.close(Some(frame)).expect("closing");
        seen_sender
            .send_blocking(peer.read().expect("close"))
            .expect("seen");
    });
    run(async {
        let (writer, mut reader) = connect(port).await.expect("connected");
        let (_control, _data, writing) = lanes(writer);
        let read = async {
            assert_eq!(reader.next().await, Ok(Incoming::Ping));
            assert!(matches!(reader.next().await, Ok(Incoming::Closed(_))));
            assert!(reader.next().await.is_err());
        };
        let (reason, ()) = future::zip(writing, read).await;
        assert!(reason.contains("close was answered"), "{reason}");
        assert_eq!(seen.recv().await, Ok(Message::Pong("are you there".into())));
        let echoed = CloseFrame {
            code: 1001.into(),
            reason: "".into(),
        };
        assert_eq!(seen.recv().await, Ok(Message::Close(Some(echoed))));
    });
}

#[test]
fn a_violation_is_answered_with_its_status() {
    let (seen_sender, seen) = async_channel::bounded(1);
    let port = upgrading(move |stream| {
        let mut peer = peer(stream);
        peer.send(Message::Binary("x".into())).expect("sent");
        seen_sender
            .send_blocking(peer.read().expect("close"))
            .expect("seen");
    });
    run(async {
        let (writer, mut reader) = connect(port).await.expect("connected");
        let (_control, _data, writing) = lanes(writer);
        reader.next().await.expect_err("binary");
        writing.await;
        let Ok(Message::Close(Some(frame))) = seen.recv().await else {
            panic!("no close frame");
        };
        assert_eq!(u16::from(frame.code), 1003);
    });
}

#[test]
fn a_hundred_thousand_pings_of_a_server_that_does_not_read_cost_one_pong_of_memory() {
    const PINGS: usize = 100_000;
    let (stop_sender, stop) = async_channel::bounded::<()>(1);
    let port = upgrading(move |mut stream| {
        let mut block = Vec::new();
        for number in 0..PINGS {
            block.extend(b"\x89\x06");
            block.extend(format!("{number:06}").as_bytes());
        }
        stream.write_all(&block).expect("sent");
        let _ = stop.recv_blocking();
    });
    run(async {
        let (writer, mut reader) = connect(port).await.expect("connected");
        // Nothing is written for now, as if the socket were blocked.
        for _ in 0..PINGS {
            assert_eq!(reader.next().await, Ok(Incoming::Ping));
        }
        assert_eq!(writer.replies.len(), 1);
        assert_eq!(
            writer.replies.recv().await,
            Ok(Reply::Pong("099999".into()))
        );
        drop(stop_sender);
    });
}
