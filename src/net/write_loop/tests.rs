//! The writing side, against servers on real sockets.

use std::io::{BufReader, Read as _, Write as _};
use std::time::Instant;

use async_tungstenite::tungstenite::protocol::Role;
use async_tungstenite::tungstenite::{Message, WebSocket};

use super::*;
use crate::limits::MIB;
use crate::net::testing::{
    self, accepted, connect, connect_within, lanes, peer, read_request, run, serve, upgrading,
};
use crate::net::{Dialer, Incoming, connect_websocket};

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
        let (control, data, writing) = lanes(writer);
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
        let (control, data, writing) = lanes(writer);
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
        let (control, data, writing) = lanes(writer);
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
        let (_control, data, writing) = lanes(writer);
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
        let (_control, data, writing) = lanes(writer);
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

#[test]
fn tls_carries_both_directions_at_once() {
    const MESSAGES: usize = 64;
    let directory = testing::TempDir::new();
    let ca = testing::authority("CA");
    let acceptor = testing::acceptor(&testing::leaf("127.0.0.1", &ca, (-1, 1)), None);
    let port = serve(move |number, stream| {
        let stream = acceptor.accept(stream).expect("TLS");
        let mut reader = BufReader::with_capacity(1, stream);
        let request = read_request(number, &mut reader).expect("request");
        let mut stream = reader.into_inner();
        stream
            .write_all(accepted(&request).as_bytes())
            .expect("upgraded");
        let mut peer = WebSocket::from_raw_socket(stream, Role::Server, None);
        while let Ok(message @ Message::Text(_)) = peer.read() {
            peer.send(message).expect("echoed");
        }
    });
    let base = format!("https://127.0.0.1:{port}");
    let mut settings = testing::settings(&base);
    settings.ca_file = Some(directory.file("ca.pem", &ca.pem()));
    let url = settings.websocket.clone();
    let text = |number: usize| format!("{number:0>50000}").repeat(4);
    run(async {
        let signer = testing::signer("agent-1", &base);
        let dialer = Dialer::new(settings);
        let (writer, mut reader) = connect_websocket(&dialer, &url, &signer)
            .await
            .expect("connected");
        let (control, data, writing) = lanes(writer);
        let send = async {
            for number in 0..MESSAGES {
                data.send(text(number).into_bytes()).await.expect("open");
            }
        };
        let receive = async {
            for number in 0..MESSAGES {
                match reader.next().await {
                    Ok(Incoming::Text(got)) => assert!(got.as_str() == text(number), "{number}"),
                    other => panic!("{number}: {other:?}"),
                }
            }
            control.send(Control::Close).await.expect("open");
        };
        let (reason, _) = future::zip(writing, future::zip(send, receive)).await;
        assert_eq!(reason, "a close was sent");
    });
}

/// Throughput of frames of 17 KiB over loopback, up to the last byte at the server; printed, run
/// it in release to measure.
#[test]
fn throughput_of_the_write_loop() {
    const FRAME_BYTES: usize = 17 * 1024;
    // Two bytes, two more of length, and the mask.
    const HEADER_BYTES: usize = 8;
    let frames = if cfg!(debug_assertions) { 200 } else { 60_000 };
    let (total_sender, total) = async_channel::bounded(1);
    let port = upgrading(move |mut stream| {
        let mut buffer = vec![0; 1 << 18];
        let mut received = 0;
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            received += count;
        }
        total_sender.send_blocking(received).expect("awaited");
    });
    run(async {
        let (writer, reader) = connect(port).await.expect("connected");
        let (control, data, writing) = lanes(writer);
        let started = Instant::now();
        let send = async {
            for _ in 0..frames {
                data.send(vec![b'x'; FRAME_BYTES]).await.expect("open");
            }
            drop((control, data));
        };
        let (reason, ()) = future::zip(writing, send).await;
        assert_eq!(reason, "nothing more is to be sent");
        drop(reader);
        let received = total.recv().await.expect("counted");
        let seconds = started.elapsed().as_secs_f64();
        assert_eq!(received, frames * (HEADER_BYTES + FRAME_BYTES));
        let mebibytes = received as f64 / MIB as f64;
        println!("write loop: {:.0} MiB/s", mebibytes / seconds);
    });
}
