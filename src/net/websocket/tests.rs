//! Both sides of the connection, against servers on real sockets.

use std::cell::Cell;
use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use tungstenite::WebSocket;
use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::CloseFrame;

use super::*;
use crate::limits::{MIB, WRITE_BUFFER_BYTES};
use crate::net::testing::{self, Received, Scripted, answer, read_request, run, serve};
use crate::net::write_loop::{Control, write_loop};
use crate::net::{Dialer, verify_signature};

/// A server that upgrades every connection and then does what the test wants with the socket.
fn upgrading(session: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    serve(move |number, mut stream| {
        let mut reader = BufReader::with_capacity(1, stream.try_clone().expect("clone"));
        let request = read_request(number, &mut reader).expect("request");
        stream
            .write_all(accepted(&request).as_bytes())
            .expect("upgraded");
        session(stream);
    })
}

fn accepted(request: &Received) -> String {
    let key = request.header("sec-websocket-key").expect("key");
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {}\r\n\r\n",
        derive_accept_key(key.as_bytes())
    )
}

/// The server's side as the library speaks it, without limits.
fn peer(stream: TcpStream) -> WebSocket<TcpStream> {
    let config = WebSocketConfig::default()
        .max_frame_size(None)
        .max_message_size(None);
    WebSocket::from_raw_socket(stream, tungstenite::protocol::Role::Server, Some(config))
}

async fn connect(port: u16) -> Result<(WsWriter, WsReader), NetError> {
    connect_within(port, Duration::from_secs(20), Duration::from_secs(20)).await
}

async fn connect_within(
    port: u16,
    upgrade: Duration,
    write: Duration,
) -> Result<(WsWriter, WsReader), NetError> {
    let base = format!("http://127.0.0.1:{port}");
    let mut settings = testing::settings(&base);
    settings.timeouts.upgrade = upgrade;
    settings.timeouts.write = write;
    let url = settings.websocket.clone();
    let signer = testing::signer("agent-1", &base);
    connect_websocket(&Dialer::new(settings), &url, &signer).await
}

/// Lanes for a write loop: the senders, and the loop itself.
fn writing(
    writer: WsWriter,
) -> (
    Sender<Control>,
    Sender<Vec<u8>>,
    impl Future<Output = String>,
) {
    let (control, control_lane) = async_channel::bounded(16);
    let (data, data_lane) = async_channel::bounded(4);
    (control, data, write_loop(writer, control_lane, data_lane))
}

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
        let _ = stream.shutdown(std::net::Shutdown::Write);
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
    check(b"\x89\x7e\x00\x80", "ontrol frame");
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
        let (_control, _data, writing) = writing(writer);
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
        let (_control, _data, writing) = writing(writer);
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

// ---- writing ----------------------------------------------------------------------------------

#[test]
fn messages_of_all_sizes_arrive_whole_and_masked() {
    let sizes = [
        0,
        1,
        125,
        126,
        127,
        17_000,
        65_535,
        65_536,
        WRITE_BUFFER_BYTES - 14,
        WRITE_BUFFER_BYTES + 3,
        3 * MIB + 5,
    ];
    let text = |size: usize| -> Vec<u8> { (0..size).map(|at| b'a' + (at % 23) as u8).collect() };
    let (seen_sender, seen) = async_channel::bounded(1);
    let port = upgrading(move |stream| {
        let mut peer = peer(stream);
        loop {
            match peer.read() {
                Ok(message) => seen_sender.send_blocking(message).expect("seen"),
                Err(_) => return,
            }
        }
    });
    run(async {
        let (writer, _reader) = connect(port).await.expect("connected");
        let (control, data, writing) = writing(writer);
        let send = async {
            for size in sizes {
                data.send(text(size)).await.expect("open");
                match seen.recv().await {
                    Ok(Message::Text(got)) => assert!(got.as_bytes() == text(size), "{size}"),
                    other => panic!("{size}: {other:?}"),
                }
            }
            control.send(Control::Ping).await.expect("open");
            assert!(matches!(seen.recv().await, Ok(Message::Ping(_))));
            control.send(Control::Close).await.expect("open");
            assert!(matches!(seen.recv().await, Ok(Message::Close(Some(_)))));
        };
        let (reason, ()) = future::zip(writing, send).await;
        assert_eq!(reason, "a close was sent");
    });
}

#[test]
fn the_control_lane_goes_first_and_closed_lanes_end_the_loop_when_they_are_empty() {
    let (seen_sender, seen) = async_channel::bounded(16);
    let port = upgrading(move |stream| {
        let mut peer = peer(stream);
        while let Ok(Message::Text(text)) = peer.read() {
            seen_sender.send_blocking(text.to_string()).expect("seen");
        }
    });
    run(async {
        let (writer, _reader) = connect(port).await.expect("connected");
        let (control, data, writing) = writing(writer);
        for text in ["d1", "d2", "d3"] {
            data.try_send(text.into()).expect("room");
        }
        for text in ["c1", "c2"] {
            control.try_send(Control::Text(text.into())).expect("room");
        }
        drop((control, data));
        assert_eq!(writing.await, "nothing more is to be sent");
        for expected in ["c1", "c2", "d1", "d2", "d3"] {
            assert_eq!(seen.recv().await.as_deref(), Ok(expected));
        }
    });
}

#[test]
fn one_closed_lane_leaves_the_other_working() {
    let (seen_sender, seen) = async_channel::bounded(16);
    let port = upgrading(move |stream| {
        let mut peer = peer(stream);
        while let Ok(Message::Text(text)) = peer.read() {
            seen_sender.send_blocking(text.to_string()).expect("seen");
        }
    });
    run(async {
        let (writer, _reader) = connect(port).await.expect("connected");
        let (control, data, writing) = writing(writer);
        drop(data);
        let send = async {
            for text in ["a", "b"] {
                control
                    .send(Control::Text(text.into()))
                    .await
                    .expect("open");
                assert_eq!(seen.recv().await.as_deref(), Ok(text));
            }
            drop(control);
        };
        let (reason, ()) = future::zip(writing, send).await;
        assert_eq!(reason, "nothing more is to be sent");
    });
}

#[test]
fn a_blocked_write_ends_by_its_deadline_and_reading_goes_on_meanwhile() {
    let (go_sender, go) = async_channel::bounded::<()>(1);
    let (stop_sender, stop) = async_channel::bounded::<()>(1);
    let port = upgrading(move |mut stream| {
        let _ = go.recv_blocking();
        stream.write_all(b"\x81\x02hi").expect("sent");
        let _ = stop.recv_blocking();
    });
    run(async {
        let day = Duration::from_secs(86_400);
        let (mut writer, mut reader) = connect_within(port, day, day).await.expect("connected");
        writer.timeout = Duration::from_millis(300);
        let (_control, data, writing) = writing(writer);
        let fill = async {
            // More than the buffers of both sockets take; the last sends wait for room.
            let filled = async {
                loop {
                    data.send(vec![b'x'; MIB]).await.expect("open");
                }
            };
            let idle = async {
                while data.len() < 4 {
                    future::yield_now().await;
                }
                go_sender.send(()).await.expect("waiting");
                assert_eq!(reader.next().await, Ok(Incoming::Text("hi".into())));
                future::pending::<()>().await;
            };
            future::or(filled, idle).await;
        };
        let reason = future::or(writing, async {
            fill.await;
            "filled".to_string()
        })
        .await;
        assert!(reason.contains("took no data for 300ms"), "{reason}");
        assert!(
            go_sender.is_empty(),
            "the message was read while the write was blocked"
        );
        drop(stop_sender);
    });
}

#[test]
fn a_server_that_has_gone_ends_the_write_loop() {
    let port = upgrading(drop);
    run(async {
        let (writer, mut reader) = connect(port).await.expect("connected");
        reader.next().await.expect_err("closed");
        let (_control, data, writing) = writing(writer);
        let fill = async {
            while data.send(vec![b'x'; MIB]).await.is_ok() {}
            future::pending().await
        };
        let reason: String = future::or(writing, fill).await;
        assert!(
            reason.contains("writing to the connection failed"),
            "{reason}"
        );
    });
}

/// Throughput of frames of 17 KiB over loopback, printed; run it in release to measure.
#[test]
fn throughput_of_the_write_loop() {
    const FRAME_BYTES: usize = 17 * 1024;
    let frames = if cfg!(debug_assertions) { 200 } else { 60_000 };
    let port = upgrading(move |mut stream| {
        let mut buffer = vec![0; 1 << 18];
        while let Ok(1..) = stream.read(&mut buffer) {}
    });
    run(async {
        let (writer, _reader) = connect(port).await.expect("connected");
        let (control, data, writing) = writing(writer);
        let started = Instant::now();
        let send = async {
            for _ in 0..frames {
                data.send(vec![b'x'; FRAME_BYTES]).await.expect("open");
            }
            drop((control, data));
        };
        future::zip(writing, send).await;
        let mebibytes = (frames * FRAME_BYTES) as f64 / MIB as f64;
        let seconds = started.elapsed().as_secs_f64();
        println!("write loop: {:.0} MiB/s", mebibytes / seconds);
    });
}
