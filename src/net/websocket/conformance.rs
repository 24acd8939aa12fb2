//! The case groups of the Autobahn test suite against this client, with the product's limits.
//!
//! The suite itself runs on Python 2.7 alone, so its cases are told again here: what a server
//! sends, and what the client must read and answer. `tests/autobahn.md` is the result; after a
//! deliberate change the test writes it anew with `HOSTLINK_WRITE_RESULTS=1`. Groups 12 and 13 are
//! about compression, which is not offered.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use futures_lite::future;

use super::*;
use crate::net::testing::{connect, lanes, run, upgrading};

mod cases;

use cases::{Case, Ending, all};

/// What the client did.
#[derive(Debug, Default, PartialEq, Eq)]
struct Observed {
    texts: Vec<String>,
    pongs: Vec<Vec<u8>>,
    /// Status of the close that it sent; `Some(None)`: a close without one.
    close: Option<Option<u16>>,
    reason: String,
}

/// Sends the case's bytes and then a close, and reads what the client writes to the end.
fn serve_case(mut stream: TcpStream, pieces: &[Vec<u8>], written: &Mutex<Vec<u8>>) {
    // So that pieces arrive as such.
    let _ = stream.set_nodelay(true);
    for piece in pieces {
        if stream.write_all(piece).is_err() {
            break;
        }
    }
    let _ = stream.write_all(b"\x88\x02\x03\xe8");
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    *written.lock().expect("one writer") = bytes;
}

fn observe(case: &Case) -> Observed {
    let written = Arc::new(Mutex::new(Vec::new()));
    let (done_sender, done) = async_channel::bounded::<()>(1);
    let (pieces, result) = (case.pieces.clone(), Arc::clone(&written));
    let port = upgrading(move |stream| {
        serve_case(stream, &pieces, &result);
        let _ = done_sender.send_blocking(());
    });
    let (texts, reason) = run(async {
        let (writer, mut reader) = connect(port).await.expect("connected");
        let (_control, _data, writing) = lanes(writer);
        let mut texts = Vec::new();
        let read = async {
            loop {
                match reader.next().await {
                    Ok(Incoming::Text(text)) => texts.push(text.as_str().to_owned()),
                    Ok(Incoming::Ping | Incoming::Pong) => {}
                    Ok(Incoming::Closed(reason)) | Err(reason) => return reason,
                }
                // The write loop has its turn, as in the agent.
                future::yield_now().await;
            }
        };
        let (_, reason) = future::zip(writing, read).await;
        (texts, reason)
    });
    let _ = done.recv_blocking();
    let written = written.lock().expect("one writer");
    let mut observed = Observed {
        texts,
        reason,
        ..Observed::default()
    };
    for (opcode, payload) in client_frames(&written) {
        match opcode {
            0xa => observed.pongs.push(payload),
            0x8 => {
                let status = payload.first_chunk().map(|code| u16::from_be_bytes(*code));
                observed.close = Some(status);
            }
            other => panic!("{}: a frame of opcode {other}", case.id),
        }
    }
    observed
}

/// Opcodes and payloads of a client's frames, none of which is longer than 125 bytes.
fn client_frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while let [first, second, rest @ ..] = bytes {
        assert_eq!(first & 0xf0, 0x80, "one frame, no reserved bits");
        assert_eq!(second & 0x80, 0x80, "masked");
        let len = usize::from(second & 0x7f);
        assert!(len <= 125 && rest.len() >= 4 + len, "a whole frame");
        let (mask, rest) = rest.split_at(4);
        let payload = rest[..len].iter().zip(mask.iter().cycle());
        frames.push((first & 0xf, payload.map(|(byte, key)| byte ^ key).collect()));
        bytes = &rest[len..];
    }
    frames
}

/// `None` if all is as it must be.
fn fault(case: &Case, observed: &Observed) -> Option<String> {
    if observed.texts != case.texts {
        return Some(format!("{} messages were read", observed.texts.len()));
    }
    let pongs_fit = match case.only_last_pong {
        // RFC 6455, 5.5.3: the latest may stand for those before it.
        true => observed.pongs.last() == case.pongs.last(),
        false => observed.pongs == case.pongs,
    };
    if !pongs_fit {
        return Some(format!("{} pongs were sent", observed.pongs.len()));
    }
    let expected = match case.ending {
        Ending::Clean(status) => Some(status),
        Ending::Violation(status) => Some(Some(status)),
    };
    (observed.close != expected).then(|| format!("the close was {:?}", observed.close))
}

#[test]
fn the_cases_of_autobahn() {
    let mut groups: BTreeMap<(u32, &str), usize> = BTreeMap::new();
    let mut failures = Vec::new();
    for case in all() {
        let observed = observe(&case);
        let number = case.id.split('.').next().and_then(|text| text.parse().ok());
        *groups
            .entry((number.expect("a number"), case.group))
            .or_default() += 1;
        if let Some(what) = fault(&case, &observed) {
            failures.push(format!("{} {}: {what}; {observed:?}", case.id, case.what));
        }
    }
    assert!(
        failures.is_empty(),
        "{} cases failed:\n{:.4000}",
        failures.len(),
        failures.join("\n")
    );
    let mut table = String::new();
    for ((number, group), cases) in &groups {
        // All of them have passed, or this is not reached.
        let _ = writeln!(table, "| {number} | {group} | {cases} | {cases} |");
    }
    let text = format!("{HEAD}{table}{NOTES}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/autobahn.md");
    if std::env::var_os("HOSTLINK_WRITE_RESULTS").is_some() {
        std::fs::write(path, &text).expect("the results can be written");
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(committed, text, "tests/autobahn.md is out of date");
}

const HEAD: &str = "\
# WebSocket conformance

The case groups of the Autobahn test suite, run by `src/net/websocket/conformance.rs` against the
agent's own client with the product's limits. The test compares this page with its results.

| group | what | cases | passed |
| --- | --- | --- | --- |
";

const NOTES: &str = "
What the client does on purpose where the suite lets it choose, or would have it otherwise:

- Binary messages (1.2) are refused with status 1003: the protocol has text frames only.
- Messages over 1 MiB (9) are refused with status 1009, by the length that the frame announces.
- Of several pings that arrive at once only the last may be answered (2.10), as RFC 6455, 5.5.3
  allows: one pong waits at most, so a server that does not read costs no memory.
- Invalid UTF-8 (6.3, 6.4) ends the session when the frame that holds it is complete, not at the byte.
- Compression (12, 13) is not offered.
";
