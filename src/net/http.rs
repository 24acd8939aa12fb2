//! HTTP/1.1 client for one server: at most one kept connection, everything bounded.
//!
//! A request drives its own connection, so there is no background task: a kept connection is not
//! watched while it is idle, and one that the server has closed meanwhile is noticed when it is
//! used again. The request then goes once more over a fresh one. Redirects are not followed.

use std::cell::RefCell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use futures_lite::future;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{HeaderMap, Method, Request, Response, header};
use smol::Timer;
use smol_hyper::rt::FuturesIo;

use super::clock::since_boot;
use super::dial::{Connection, Dialer, HttpConnection};
use super::error::{NetError, quoted, with_causes};
use super::proxy::Proxy;
use super::url::Url;
use crate::limits::{RESPONSE_BODY_BYTES_MAX, RESPONSE_HEAD_BYTES_MAX, RESPONSE_HEADERS_MAX};
use crate::wire::http::ErrorResponse;

/// One request; its path is relative to the base URL.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    pub method: Method,
    pub path: String,
    pub headers: Vec<(&'static str, String)>,
    /// JSON, or nothing.
    pub body: Option<Bytes>,
}

#[derive(Debug)]
pub struct HttpAnswer {
    pub status: u16,
    pub headers: HeaderMap,
    /// An error if only the head arrived whole, or if the body is over its bound.
    pub body: Result<Vec<u8>, String>,
}

impl HttpAnswer {
    pub fn header(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// What the server says about a refusal, for one line of a log: `404 (no such task)`.
    pub fn described(&self) -> String {
        let body = self.body.as_deref().unwrap_or_default();
        let said = match serde_json::from_slice::<ErrorResponse>(body) {
            Ok(response) if !response.error.is_empty() => quoted(response.error.as_bytes()),
            _ => quoted(body),
        };
        match self.header(header::LOCATION) {
            Some(location) if (300..400).contains(&self.status) => format!(
                "{}, a redirect to {:?}, which is not followed: name that URL in the settings",
                self.status,
                quoted(location.as_bytes())
            ),
            _ if said.is_empty() => self.status.to_string(),
            _ => format!("{} ({said})", self.status),
        }
    }
}

pub struct HttpClient {
    dialer: Rc<Dialer>,
    base: Url,
    kept: RefCell<Option<Kept>>,
}

type Exchange = http1::Connection<FuturesIo<Connection>, Full<Bytes>>;

/// A connection with no request on it.
pub(super) struct Kept {
    sender: http1::SendRequest<Full<Bytes>>,
    exchange: Driven,
    forwarded_by: Option<Proxy>,
    /// Time since boot.
    idle_since: Duration,
}

/// The connection's own work, which must be polled beside whatever waits for it.
struct Driven {
    exchange: Pin<Box<Exchange>>,
    ended: bool,
}

impl HttpClient {
    pub fn new(dialer: Rc<Dialer>, base: Url) -> HttpClient {
        HttpClient {
            dialer,
            base,
            kept: RefCell::default(),
        }
    }

    /// Closes the kept connection if it was not used for as long as the settings allow.
    pub fn close_idle(&self) {
        let mut kept = self.kept.borrow_mut();
        if kept.as_ref().is_some_and(|kept| self.is_expired(kept)) {
            *kept = None;
        }
    }

    fn is_expired(&self, kept: &Kept) -> bool {
        let idle = since_boot().saturating_sub(kept.idle_since);
        idle > self.dialer.timeouts().keep_alive
    }

    /// Sends a request and reads the whole answer, whatever its status, within the timeout.
    pub async fn request(&self, request: &HttpRequest) -> Result<HttpAnswer, NetError> {
        let timeout = self.dialer.timeouts().request;
        let what = || format!("{} {}{}", request.method, self.base, request.path);
        future::or(self.attempts(request), async {
            Timer::after(timeout).await;
            Err(NetError::new(format!("no answer within {timeout:?}")))
        })
        .await
        .map_err(|error| NetError {
            why: format!("{}: {}", what(), error.why),
            ..error
        })
    }

    async fn attempts(&self, request: &HttpRequest) -> Result<HttpAnswer, NetError> {
        if let Some(kept) = self.take_kept().await {
            match self.exchange(kept, request).await {
                Ok(answer) => return Ok(answer),
                // The server may close an idle connection at any time: that is no failure yet.
                Err(error) => log::debug!("kept HTTP connection is stale: {error}"),
            }
        }
        let fresh = self.open().await?;
        self.exchange(fresh, request).await
    }

    /// The kept connection, if it is still good as far as can be seen.
    pub(super) async fn take_kept(&self) -> Option<Kept> {
        let mut kept = self.kept.borrow_mut().take()?;
        if self.is_expired(&kept) {
            return None;
        }
        // Lets the connection see an end that has arrived meanwhile.
        let ready = future::poll_once(kept.exchange.beside(future::pending::<()>())).await;
        (ready.is_none() && !kept.exchange.ended && kept.sender.is_ready()).then_some(kept)
    }

    async fn open(&self) -> Result<Kept, NetError> {
        HttpClient::begin(self.dialer.connect_http(&self.base).await?).await
    }

    pub(super) async fn begin(connection: HttpConnection) -> Result<Kept, NetError> {
        let (sender, exchange) = http1::Builder::new()
            .max_buf_size(RESPONSE_HEAD_BYTES_MAX)
            .max_headers(RESPONSE_HEADERS_MAX)
            .handshake(FuturesIo::new(connection.stream))
            .await
            .map_err(|error| NetError::new(with_causes(&error)))?;
        Ok(Kept {
            sender,
            exchange: Driven {
                exchange: Box::pin(exchange),
                ended: false,
            },
            forwarded_by: connection.forwarded_by,
            idle_since: since_boot(),
        })
    }

    /// One request over one connection, which is kept afterwards if it can be used again.
    pub(super) async fn exchange(
        &self,
        mut connection: Kept,
        request: &HttpRequest,
    ) -> Result<HttpAnswer, NetError> {
        let request = self.assembled(request, connection.forwarded_by.as_ref())?;
        let response = connection
            .exchange
            .beside(connection.sender.send_request(request))
            .await
            .map_err(|error| NetError::new(no_answer(&error)))?;
        let (head, body) = Response::into_parts(response);
        let answer = HttpAnswer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: connection.exchange.beside(read_body(body)).await,
        };
        if answer.body.is_ok() {
            let Kept {
                sender, exchange, ..
            } = &mut connection;
            let is_ready = future::poll_once(exchange.beside(sender.ready())).await;
            if matches!(is_ready, Some(Ok(()))) && !connection.exchange.ended {
                connection.idle_since = since_boot();
                *self.kept.borrow_mut() = Some(connection);
            }
        }
        Ok(answer)
    }

    fn assembled(
        &self,
        request: &HttpRequest,
        forwarded_by: Option<&Proxy>,
    ) -> Result<Request<Full<Bytes>>, NetError> {
        let target = match forwarded_by {
            Some(_) => format!("{}{}", self.base, request.path),
            None => format!("{}{}", self.base.path, request.path),
        };
        let mut assembled = Request::builder()
            .method(&request.method)
            .uri(target)
            .header(header::HOST, self.base.authority())
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, USER_AGENT);
        for (name, value) in &request.headers {
            assembled = assembled.header(*name, value);
        }
        if let Some(authorization) = forwarded_by.and_then(|proxy| proxy.authorization.as_ref()) {
            assembled = assembled.header(header::PROXY_AUTHORIZATION, authorization);
        }
        if request.body.is_some() {
            assembled = assembled.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::new(request.body.clone().unwrap_or_default());
        assembled
            .body(body)
            .map_err(|error| NetError::new(format!("the request cannot be written: {error}")))
    }
}

pub(super) const USER_AGENT: &str = concat!("hostlink-edge/", env!("CARGO_PKG_VERSION"));

impl Driven {
    /// Polls the connection and `future` together until `future` is ready. The connection's own
    /// error is not lost: it reaches whatever waits for it.
    async fn beside<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        future::poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(output);
            }
            if !self.ended {
                self.ended = self.exchange.as_mut().poll(cx).is_ready();
            }
            // What the connection did just now may be what the future waits for.
            future.as_mut().poll(cx)
        })
        .await
    }
}

async fn read_body(mut body: Incoming) -> Result<Vec<u8>, String> {
    let too_large = || format!("the answer's body is larger than {RESPONSE_BODY_BYTES_MAX} bytes");
    if body.size_hint().lower() > RESPONSE_BODY_BYTES_MAX as u64 {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|error| format!("the answer's body is not whole: {}", with_causes(&error)))?;
        if let Some(data) = frame.data_ref() {
            if bytes.len() + data.len() > RESPONSE_BODY_BYTES_MAX {
                return Err(too_large());
            }
            bytes.extend_from_slice(data);
        }
    }
    Ok(bytes)
}

fn no_answer(error: &hyper::Error) -> String {
    let detail = with_causes(error);
    if error.is_parse() {
        format!(
            "the answer is not HTTP, or its head is longer than {RESPONSE_HEAD_BYTES_MAX} bytes ({detail})"
        )
    } else if error.is_incomplete_message() || error.is_canceled() {
        format!("the server closed the connection before it answered ({detail})")
    } else {
        detail
    }
}
