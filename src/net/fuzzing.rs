//! Entry points of the fuzz targets in `fuzz/`: any bytes where a server or a proxy answers.
//!
//! The clients are the agent's own, over a stream in memory. Nothing may panic, hang, or keep more
//! than its bound.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

use async_tungstenite::tungstenite::handshake::derive_accept_key;
use futures_lite::{AsyncRead, AsyncWrite, future};
use hyper::{Method, header};
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;

use super::dial::HttpConnection;
use super::error::retry_after;
use super::http::{HttpAnswer, HttpClient, HttpRequest};
use super::proxy::Proxy;
use super::websocket::upgrade;
use super::{Connection, Dialer, Incoming, ServerClock, Settings, Signer, Timeouts, Url};
use crate::limits::{INBOUND_MESSAGE_BYTES_MAX, RESPONSE_BODY_BYTES_MAX, RETRY_AFTER_MAX};
use crate::wire::ServerMessage;
use crate::wire::http::{RegisterResponse, decode_heartbeat, decode_tasks};

/// A line of a log: 200 characters of the peer, and what is said about them.
const WHY_BYTES_MAX: usize = 2048;

/// A server that says all it says, in pieces, once it was told anything, and takes everything. (An
/// answer before its request is refused unread.)
struct Scripted {
    says: Vec<u8>,
    was_told: bool,
    waits: Option<Waker>,
    at: usize,
    piece_bytes: usize,
    /// What it was told, if it answers an upgrade as it should before it says the rest.
    request: Option<Vec<u8>>,
}

impl Scripted {
    fn connection(bytes: &[u8], upgrades: bool) -> Connection {
        let (piece, says) = bytes.split_first().unwrap_or((&0, &[]));
        Connection::new(Scripted {
            says: says.to_vec(),
            was_told: false,
            waits: None,
            at: 0,
            piece_bytes: match piece {
                0..=127 => usize::MAX,
                small => usize::from(small - 127),
            },
            request: upgrades.then(Vec::new),
        })
    }

    fn answer_upgrade(&mut self) {
        let Some(request) = self.request.take_if(|it| it.ends_with(b"\r\n\r\n")) else {
            return;
        };
        let head = String::from_utf8_lossy(&request);
        let key = head
            .lines()
            .find_map(|line| line.strip_prefix("Sec-WebSocket-Key: "))
            .expect("the request has a key");
        let mut says = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.trim().as_bytes())
        )
        .into_bytes();
        says.append(&mut self.says);
        self.says = says;
    }
}

impl AsyncRead for Scripted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !self.was_told {
            self.waits = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let rest = &self.says[self.at..];
        let count = rest.len().min(buffer.len()).min(self.piece_bytes);
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.was_told = true;
        if let Some(waits) = self.waits.take() {
            waits.wake();
        }
        if let Some(request) = &mut self.request {
            request.extend_from_slice(bytes);
            self.answer_upgrade();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn base() -> Url {
    Url::parse("http://server.example", super::Kind::Http).expect("a good URL")
}

/// Any bytes as the answer to HTTP requests; two, if the connection may be used again.
pub fn http_response(bytes: &[u8]) {
    answers_in(bytes);
}

/// How many answers were read.
fn answers_in(bytes: &[u8]) -> usize {
    let dialer = Rc::new(Dialer::new(Settings::new(base())));
    let client = HttpClient::new(dialer, base());
    let request = HttpRequest {
        method: Method::GET,
        path: "/api/v1/tasks".to_owned(),
        headers: Vec::new(),
        body: None,
    };
    future::block_on(async {
        let connection = HttpConnection {
            stream: Scripted::connection(bytes, false),
            forwarded_by: None,
        };
        let mut kept = HttpClient::begin(connection).await.ok();
        let mut answers = 0;
        for _ in 0..2 {
            let Some(connection) = kept.take() else {
                break;
            };
            match client.exchange(connection, &request).await {
                Ok(answer) => {
                    understand(&answer);
                    answers += 1;
                }
                Err(error) => assert!(error.why.len() <= WHY_BYTES_MAX, "{}", error.why),
            }
            kept = client.take_kept().await;
        }
        answers
    })
}

/// All that is ever read in an answer.
fn understand(answer: &HttpAnswer) {
    let described = answer.described();
    assert!(described.len() <= WHY_BYTES_MAX, "{described}");
    assert!(!described.contains(char::is_control), "{described:?}");
    let body = answer.body.as_deref().unwrap_or_default();
    assert!(body.len() <= RESPONSE_BODY_BYTES_MAX);
    if let Some(after) = answer.header(header::RETRY_AFTER) {
        assert!(retry_after(after, 1_000).is_none_or(|it| it <= RETRY_AFTER_MAX));
    }
    if let Some(date) = answer.header(header::DATE) {
        let clock = ServerClock::new(&base());
        clock.learn(date, false);
        clock.now_unix();
    }
    let _ = serde_json::from_slice::<RegisterResponse>(body);
    for tasks in [decode_tasks(body), decode_heartbeat(body)] {
        for offer in tasks.into_iter().flatten().flatten() {
            assert!(!offer.ids.task.is_empty() && offer.command.len() <= body.len());
        }
    }
}

/// Any bytes as a proxy's answer to `CONNECT`, and as the answer to the upgrade.
pub fn handshakes(bytes: &[u8]) {
    future::block_on(async {
        let proxy = Proxy::parse("http://proxy.example:3128").expect("a good URL");
        let stream = Scripted::connection(bytes, false);
        if let Err(error) = proxy.tunnel(stream, "server.example:443").await {
            assert!(error.why.len() <= WHY_BYTES_MAX, "{}", error.why);
        }
    });
    websocket_over(Scripted::connection(bytes, false));
}

/// Any bytes behind an upgrade that has succeeded.
pub fn frames(bytes: &[u8]) {
    websocket_over(Scripted::connection(bytes, true));
}

/// How many texts were read.
fn websocket_over(stream: Connection) -> usize {
    let write_timeout = Timeouts::default().write;
    future::block_on(async {
        let url = base().websocket();
        let (_writer, mut reader) = match upgrade(stream, &url, &signer(), write_timeout).await {
            Ok(upgraded) => upgraded,
            Err(refusal) => {
                let why = refusal.error.why;
                assert!(why.len() <= WHY_BYTES_MAX, "{why}");
                return 0;
            }
        };
        let mut texts = 0;
        loop {
            match reader.next().await {
                Ok(Incoming::Text(text)) => {
                    assert!(text.len() <= INBOUND_MESSAGE_BYTES_MAX);
                    let _ = ServerMessage::decode(&text, "agent");
                    texts += 1;
                }
                Ok(Incoming::Ping | Incoming::Pong) => {}
                Ok(Incoming::Closed(why)) => assert!(why.len() <= WHY_BYTES_MAX, "{why}"),
                Err(why) => {
                    assert!(why.len() <= WHY_BYTES_MAX, "{why}");
                    return texts;
                }
            }
        }
    })
}

/// Its key is made once: that takes longer than a run.
fn signer() -> Signer {
    static KEY: OnceLock<PKey<Private>> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        let rsa = Rsa::generate(2048).expect("a key");
        PKey::from_rsa(rsa).expect("a key")
    });
    Signer::new("agent", key.clone(), ServerClock::new(&base()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator, so that a failure can be repeated.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (self.0 >> 33) as usize % bound
        }

        fn any_of<'a>(&mut self, pieces: &[&'a [u8]]) -> &'a [u8] {
            pieces[self.below(pieces.len())]
        }
    }

    const HTTP: [&[u8]; 22] = [
        b"HTTP/1.1 ",
        b"200 OK\r\n",
        b"101 Switching Protocols\r\n",
        b"401 No\r\n",
        b"302 Found\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"ffffffffffffffff\r\n",
        b"5\r\nhello\r\n0\r\n",
        b"Connection: close\r\n",
        b"Upgrade: websocket\r\n",
        b"Sec-WebSocket-Accept: x\r\n",
        b"Location: \x1b[31m\xff\r\n",
        b"Retry-After: 18446744073709551616\r\n",
        b"Date: Sun, 31 Feb 9999 99:99:99 GMT\r\n",
        b"[{\"id\":\"1\",\"command\":\"a\"}]",
        b"{\"error\":\"a\nb\"}",
        b"\xff\x00: \r",
        b"100 Continue\r\n\r\n",
    ];

    const FRAMES: [&[u8]; 14] = [
        b"\x81\x02{}",
        b"\x01\x01{",
        b"\x80\x01}",
        b"\x89\x02hi",
        b"\x8a\x00",
        b"\x88\x02\x03\xe8",
        b"\x88\x05\x03\xe8b\xff!",
        b"\x81\x7e\x00\x7e",
        b"\x81\x7f\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x81\x7f\x00\x00\x00\x00\x00\x10\x00\x00",
        b"\x81\x82\x01\x02\x03\x04zz",
        b"\xc1\x00",
        b"\x83\x00",
        b"\x82\x01x",
    ];

    /// Pieces of the grammar, with a byte of noise here and there, for each target.
    fn many(target: fn(&[u8]), pieces: &[&[u8]]) {
        for seed in 0..2_000 {
            let random = &mut Random(seed);
            let mut bytes = vec![random.below(256) as u8];
            if random.below(2) == 0 {
                bytes.extend_from_slice(pieces[0]);
                bytes.extend_from_slice(pieces[1]);
            }
            for _ in 0..random.below(24) {
                bytes.extend_from_slice(random.any_of(pieces));
                if random.below(12) == 0 {
                    bytes.push(random.below(256) as u8);
                }
            }
            let outcome = std::panic::catch_unwind(|| target(&bytes));
            assert!(outcome.is_ok(), "seed {seed}: {}", bytes.escape_ascii());
        }
    }

    #[test]
    fn any_bytes_may_be_an_http_answer() {
        let one = b"\0HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]";
        assert_eq!(answers_in(one), 1);
        many(http_response, &HTTP);
    }

    #[test]
    fn any_bytes_may_answer_an_upgrade_or_a_proxy() {
        many(handshakes, &HTTP);
    }

    #[test]
    fn any_bytes_may_follow_an_upgrade() {
        let two = b"\0\x81\x02{}\x01\x01{\x80\x01}\x82\x00";
        assert_eq!(websocket_over(Scripted::connection(two, true)), 2);
        many(frames, &FRAMES);
    }
}
