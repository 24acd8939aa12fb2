//! The WebSocket connection: upgrade and reading side. The writing side is [`write_loop`].
//!
//! The byte stream is split in two. The reading half belongs to the WebSocket library, which checks
//! and reassembles frames; the writing half belongs to the write loop alone. What the library would
//! write by itself (answers to pings and closes) is thrown away and goes to the write loop as a
//! [`Reply`] through a channel with room for one: the latest wins. So a server that pings without
//! reading costs nothing, and a blocked write never stops reading. (Left to itself, the library
//! queues the answers in its write buffer, up to that buffer's limit.)
//!
//! [`write_loop`]: super::write_loop

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_channel::{Receiver, Sender};
use async_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use async_tungstenite::tungstenite::handshake::client::generate_key;
use async_tungstenite::tungstenite::protocol::WebSocketConfig;
use async_tungstenite::tungstenite::{self, Bytes, Message, http};
use async_tungstenite::{WebSocketStream, client_async_with_config};
use futures_lite::io::{ReadHalf, WriteHalf};
use futures_lite::{AsyncRead, AsyncWrite, Stream as _, future, ready};
use hyper::header;
use smol::Timer;

use super::dial::{Connection, Dialer};
use super::error::{NetError, quoted, retry_after, with_causes};
use super::http::USER_AGENT;
use super::signature::Signer;
use super::url::Url;
use crate::limits::{
    INBOUND_MESSAGE_BYTES_MAX, READ_BUFFER_BYTES, READ_TURN_BYTES, READ_TURN_MESSAGES,
};

pub use async_tungstenite::tungstenite::Utf8Bytes;

/// The handshake is read by the library, which gives up beyond 64 KiB: the budget, which is not
/// renewed during the handshake, must not end it before.
const HANDSHAKE_BUDGET_BYTES: usize = 128 * 1024;

/// What arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    Text(Utf8Bytes),
    /// Its answer is already on its way.
    Ping,
    Pong,
    /// The server ends the connection; code and reason, for a log. Its answer is on its way.
    Closed(String),
}

/// What the reading side wants written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Pong(Bytes),
    /// A status code of RFC 6455 section 7.4, or none; the connection ends after it.
    Close(Option<u16>),
}

#[derive(Debug)]
pub struct WsReader {
    socket: WebSocketStream<ReadSide>,
    replies: Sender<Reply>,
    messages_in_turn: u32,
    says_goodbye: bool,
}

/// Consumed by [`super::write_loop`].
#[derive(Debug)]
pub struct WsWriter {
    pub(super) half: WriteHalf<Connection>,
    pub(super) replies: Receiver<Reply>,
    pub(super) timeout: Duration,
}

/// Connects and upgrades (PROTOCOL.md 3). A 401 corrects the clock by the answer's `Date` and is
/// tried once more at once.
pub async fn connect_websocket(
    dialer: &Dialer,
    url: &Url,
    signer: &Signer,
) -> Result<(WsWriter, WsReader), NetError> {
    match dial_and_upgrade(dialer, url, signer).await {
        Err(Refusal {
            date: Some(date),
            error,
        }) if error.status == Some(401) && signer.clock().learn(&date, url.tls) => {
            dial_and_upgrade(dialer, url, signer).await
        }
        other => other,
    }
    .map_err(|refusal| refusal.error)
}

/// Why there is no connection, with the `Date` of the answer if there was one.
pub(super) struct Refusal {
    pub(super) error: NetError,
    date: Option<String>,
}

impl From<NetError> for Refusal {
    fn from(error: NetError) -> Refusal {
        Refusal { error, date: None }
    }
}

async fn dial_and_upgrade(
    dialer: &Dialer,
    url: &Url,
    signer: &Signer,
) -> Result<(WsWriter, WsReader), Refusal> {
    let stream = dialer.connect(url).await?;
    let timeouts = dialer.timeouts();
    future::or(upgrade(stream, url, signer, timeouts.write), async {
        Timer::after(timeouts.upgrade).await;
        Err(Refusal::from(NetError::new(format!(
            "cannot open the WebSocket {url}: the server did not answer the upgrade within {:?}",
            timeouts.upgrade
        ))))
    })
    .await
}

pub(super) async fn upgrade(
    stream: Connection,
    url: &Url,
    signer: &Signer,
    write_timeout: Duration,
) -> Result<(WsWriter, WsReader), Refusal> {
    let failed = |reason: String| {
        Refusal::from(NetError::new(format!(
            "cannot open the WebSocket {url}: {reason}"
        )))
    };
    let request = request(url, signer)?;
    let (read_half, write_half) = futures_lite::io::split(stream);
    let side = ReadSide {
        half: read_half,
        handshake: Some(write_half),
        budget_bytes: HANDSHAKE_BUDGET_BYTES,
    };
    let upgraded = client_async_with_config(request, side, Some(config())).await;
    let (mut socket, response) = upgraded.map_err(|error| match error {
        tungstenite::Error::Http(response) => refused(&response, url, signer),
        error => failed(explained(&error)),
    })?;
    let date = text_of(&response, header::DATE);
    signer.clock().told(date, url.tls);
    let half = socket.get_mut().handshake.take();
    let half = half.ok_or_else(|| failed("the handshake lost its stream".to_string()))?;
    let (reply_sender, replies) = async_channel::bounded(1);
    let writer = WsWriter {
        half,
        replies,
        timeout: write_timeout,
    };
    let reader = WsReader {
        socket,
        replies: reply_sender,
        messages_in_turn: 0,
        says_goodbye: false,
    };
    Ok((writer, reader))
}

fn request(url: &Url, signer: &Signer) -> Result<http::Request<()>, NetError> {
    let mut request = http::Request::builder()
        .uri(url.to_string())
        .header("Host", url.authority())
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", generate_key())
        .header("User-Agent", USER_AGENT);
    for (name, value) in signer.headers()? {
        request = request.header(name, value);
    }
    request.body(()).map_err(|error| {
        NetError::new(format!(
            "cannot write the request for the WebSocket {url}: {error}"
        ))
    })
}

/// All limits of the library. It writes nothing to the socket, so its write buffer stays small.
fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .max_message_size(Some(INBOUND_MESSAGE_BYTES_MAX))
        .max_frame_size(Some(INBOUND_MESSAGE_BYTES_MAX))
        .write_buffer_size(0)
        .max_write_buffer_size(READ_BUFFER_BYTES)
        .accept_unmasked_frames(false)
}

fn refused(response: &http::Response<Option<Vec<u8>>>, url: &Url, signer: &Signer) -> Refusal {
    let status = response.status().as_u16();
    let said = response.body().as_deref().map(quoted).unwrap_or_default();
    let detail = match text_of(response, header::LOCATION) {
        Some(location) if (300..400).contains(&status) => format!(
            ", a redirect to {:?}, which is not followed: name that URL in HOSTLINK_WS_URL",
            quoted(location.as_bytes())
        ),
        _ if said.is_empty() => String::new(),
        _ => format!(" ({said})"),
    };
    Refusal {
        error: NetError {
            why: format!("cannot open the WebSocket {url}: the server answered {status}{detail}"),
            retry_after: text_of(response, header::RETRY_AFTER)
                .and_then(|value| retry_after(value, signer.clock().now_unix())),
            status: Some(status),
        },
        date: text_of(response, header::DATE).map(str::to_string),
    }
}

/// A header of an answer, if it is text.
fn text_of<B>(response: &http::Response<B>, name: header::HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

impl WsReader {
    /// The next message. An error says why the connection is over; so does the second call after
    /// [`Incoming::Closed`]. To be called again soon, always: nothing else reads the socket.
    pub async fn next(&mut self) -> Result<Incoming, String> {
        if self.messages_in_turn >= READ_TURN_MESSAGES {
            self.messages_in_turn = 0;
            future::yield_now().await;
        }
        let message = poll_fn(|cx| {
            self.socket.get_mut().budget_bytes = READ_TURN_BYTES;
            let polled = Pin::new(&mut self.socket).poll_next(cx);
            self.messages_in_turn = match polled {
                Poll::Ready(_) => self.messages_in_turn + 1,
                Poll::Pending => 0,
            };
            polled
        })
        .await;
        match message {
            Some(Ok(Message::Text(text))) => Ok(Incoming::Text(text)),
            Some(Ok(Message::Ping(data))) => {
                self.reply(Reply::Pong(data));
                Ok(Incoming::Ping)
            }
            Some(Ok(Message::Pong(_))) => Ok(Incoming::Pong),
            Some(Ok(Message::Close(frame))) => {
                let code = frame.as_ref().map(|frame| u16::from(frame.code));
                self.reply(Reply::Close(code));
                Ok(Incoming::Closed(match frame {
                    Some(frame) => format!(
                        "the server closed the session: {} {}",
                        u16::from(frame.code),
                        quoted(frame.reason.as_bytes())
                    ),
                    None => "the server closed the session without a reason".to_string(),
                }))
            }
            Some(Ok(Message::Binary(_))) => {
                self.reply(Reply::Close(Some(1003)));
                Err("the server sent a binary frame; the protocol has text frames only".to_string())
            }
            Some(Ok(Message::Frame(_))) => Err("the library returned a raw frame".to_string()),
            Some(Err(error)) => {
                if let Some(code) = close_code(&error) {
                    self.reply(Reply::Close(Some(code)));
                }
                Err(explained(&error))
            }
            None => Err("the server closed the connection".to_string()),
        }
    }

    /// Whether a close is on its way: the write loop ends by itself when it is written.
    pub fn says_goodbye(&self) -> bool {
        self.says_goodbye
    }

    /// Replaces a reply that is not written yet. A write loop that has ended needs none.
    fn reply(&mut self, reply: Reply) {
        self.says_goodbye |= matches!(reply, Reply::Close(_));
        let _ = self.replies.force_send(reply);
    }
}

fn explained(error: &tungstenite::Error) -> String {
    match error {
        tungstenite::Error::Io(error) => format!("the connection broke: {error}"),
        tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            "the server closed the connection without a close frame".to_string()
        }
        tungstenite::Error::Capacity(CapacityError::MessageTooLong { size, max_size }) => {
            format!("the server sent a message of {size} bytes, allowed are {max_size}")
        }
        tungstenite::Error::Utf8(_) => "the server sent text that is no UTF-8".to_string(),
        tungstenite::Error::AttackAttempt => {
            "the head of the server's answer is too long or comes in too small pieces".to_string()
        }
        error => with_causes(error),
    }
}

/// The status of RFC 6455 section 7.4.1 for a violation; none if the connection is gone.
fn close_code(error: &tungstenite::Error) -> Option<u16> {
    match error {
        tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
        tungstenite::Error::Protocol(_) => Some(1002),
        tungstenite::Error::Utf8(_) => Some(1007),
        tungstenite::Error::Capacity(_) => Some(1009),
        _ => None,
    }
}

/// The stream as the library sees it.
#[derive(Debug)]
struct ReadSide {
    half: ReadHalf<Connection>,
    /// During the handshake what is written goes out; later it is thrown away.
    handshake: Option<WriteHalf<Connection>>,
    /// What may still be read in this turn of the event loop.
    budget_bytes: usize,
}

impl AsyncRead for ReadSide {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.budget_bytes == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let length = buffer.len().min(self.budget_bytes);
        let count = ready!(Pin::new(&mut self.half).poll_read(cx, &mut buffer[..length]))?;
        self.budget_bytes -= count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for ReadSide {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.handshake {
            Some(half) => Pin::new(half).poll_write(cx, bytes),
            None => Poll::Ready(Ok(bytes.len())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.handshake {
            Some(half) => Pin::new(half).poll_flush(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod tests;
