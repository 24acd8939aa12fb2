//! Client of the operator API, for `submit`, `agents` and `demo`.
//!
//! One connection a request. A stream of output that breaks is opened again behind the last line
//! that was taken, so that nothing is printed twice and nothing is left out.

use std::time::{Duration, Instant};

use async_native_tls::{Certificate, TlsConnector};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_lite::{AsyncWrite, AsyncWriteExt, FutureExt, future};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode, Uri};
use serde::de::DeserializeOwned;
use serde_json::json;
use smol::Timer;
use smol::net::TcpStream;
use smol_hyper::rt::FuturesIo;

pub use super::operator_types::*;
use super::peer::Peer;
use crate::ids::Stream;
use crate::limits::{
    CONNECT_TIMEOUT, GATEWAY_BODY_BYTES_MAX, GATEWAY_STREAM_KEEPALIVE,
    GATEWAY_STREAM_LINE_BYTES_MAX, REQUEST_TIMEOUT, RESPONSE_HEAD_BYTES_MAX,
};
use crate::wire::http::ErrorResponse;

/// Between attempts to open a stream again.
const RETRY_DELAY: Duration = Duration::from_millis(300);
/// A gateway that has not come back after this is given up.
const RETRY_FOR: Duration = Duration::from_secs(300);

/// Where the operator API is, and what opens it.
#[derive(Clone)]
pub struct OperatorClient {
    secure: bool,
    host: String,
    port: u16,
    path: String,
    operator_token: Option<String>,
    roots: Vec<Certificate>,
}

/// Why a request failed.
enum Failure {
    /// Trying again may help: the gateway was not reached, went away or is overloaded.
    Passing(String),
    /// The gateway has refused it.
    Refused(String),
}

impl Failure {
    fn into_text(self) -> String {
        match self {
            Failure::Passing(why) | Failure::Refused(why) => why,
        }
    }
}

/// Where the stream of a task stands.
#[derive(Default)]
struct Progress {
    offset: u64,
    chunks: u64,
    stderr_bytes: u64,
}

impl OperatorClient {
    /// `gateway_url` is `http://…` or `https://…`. The error says what is wrong with it.
    pub fn new(
        gateway_url: &str,
        operator_token: Option<String>,
    ) -> Result<OperatorClient, String> {
        let wrong = |why: &str| format!("gateway URL {gateway_url:?}: {why}");
        let uri: Uri = gateway_url
            .parse()
            .map_err(|error| wrong(&format!("{error}")))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wrong("it must begin with http:// or https://")),
        };
        let host = uri.host().ok_or_else(|| wrong("it names no host"))?;
        Ok(OperatorClient {
            secure,
            host: host.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            path: uri.path().trim_end_matches('/').to_owned(),
            operator_token,
            roots: Vec::new(),
        })
    }

    /// Trusts the certificates of a PEM file as well as those of the system.
    pub fn trust(mut self, pem: &[u8]) -> Result<OperatorClient, String> {
        self.roots = Certificate::stack_from_pem(pem)
            .map_err(|error| format!("the certificates cannot be read: {error}"))?;
        Ok(self)
    }

    /// Submits a task, copies its live output to `stdout` and `stderr` byte for byte, and returns
    /// the exit code for this process: the task's own, or 1 where it has none (failed by a signal
    /// or timeout, interrupted), with the reason on `stderr`. A gateway that goes away after the
    /// task was accepted is dialled again and the output goes on from where it was.
    pub async fn submit(
        &self,
        submission: &Submission,
        stdout: &mut (impl AsyncWrite + Unpin),
        stderr: &mut (impl AsyncWrite + Unpin),
    ) -> Result<i32, String> {
        let task = self.submit_detached(submission).await?;
        self.follow(&task.task_id, stdout, stderr).await
    }

    /// Submits a task and returns at once.
    pub async fn submit_detached(&self, submission: &Submission) -> Result<Submitted, String> {
        let body = serde_json::to_vec(submission).expect("a submission is JSON");
        self.ask(Method::POST, "tasks", Some(body)).await
    }

    /// The second half of [`OperatorClient::submit`], for a task submitted before.
    pub async fn follow(
        &self,
        task_id: &str,
        stdout: &mut (impl AsyncWrite + Unpin),
        stderr: &mut (impl AsyncWrite + Unpin),
    ) -> Result<i32, String> {
        let mut progress = Progress::default();
        let mut last_success = Instant::now();
        let mut lost = false;
        loop {
            let before = progress.offset;
            match self.stream(task_id, &mut progress, stdout, stderr).await {
                Ok(result) => return conclude(&result, &progress, stdout, stderr).await,
                Err(Failure::Refused(why)) => return Err(why),
                Err(Failure::Passing(why)) => {
                    if progress.offset > before {
                        last_success = Instant::now();
                    }
                    if last_success.elapsed() > RETRY_FOR {
                        return Err(format!("{why}; task {task_id} may still be running"));
                    }
                    if !lost {
                        log::warn!("{why}; the gateway is dialled until it is back");
                        lost = true;
                    }
                    Timer::after(RETRY_DELAY).await;
                }
            }
        }
    }

    pub async fn task(&self, task_id: &str) -> Result<TaskInfo, String> {
        self.ask(Method::GET, &format!("tasks/{task_id}"), None)
            .await
    }

    /// Asks for the task to be ended (extension `cancel`).
    pub async fn cancel(&self, task_id: &str, reason: Option<&str>) -> Result<(), String> {
        let body = match reason {
            Some(reason) => json!({"reason": reason}),
            None => json!({}),
        };
        let path = format!("tasks/{task_id}/cancel");
        let body = Some(body.to_string().into_bytes());
        let _: serde_json::Value = self.ask(Method::POST, &path, body).await?;
        Ok(())
    }

    pub async fn agents(&self) -> Result<Vec<AgentInfo>, String> {
        self.ask(Method::GET, "agents", None).await
    }

    /// Cuts the TCP connection of the agent's session and refuses another one for so many seconds.
    /// `true` if there was one.
    pub async fn disconnect(&self, agent_id: &str, seconds: u64) -> Result<bool, String> {
        let path = format!("agents/{agent_id}/disconnect?seconds={seconds}");
        let answer: serde_json::Value = self.ask(Method::POST, &path, Some(Vec::new())).await?;
        Ok(answer["disconnected"] == true)
    }

    // ---- requests -------------------------------------------------------------------------

    /// One request with a JSON answer.
    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, String> {
        let exchange = async {
            let read = async |answer: Response<Incoming>| read_json(answer).await;
            self.exchange(method, path, body, read).await
        };
        let timeout = async {
            Timer::after(REQUEST_TIMEOUT).await;
            Err(Failure::Passing(format!("{} does not answer", self.name())))
        };
        exchange.or(timeout).await.map_err(Failure::into_text)
    }

    /// Sends a request and hands the answer to `read`, for as long as it reads.
    async fn exchange<T>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        read: impl AsyncFnOnce(Response<Incoming>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let passing =
            |error: &dyn std::fmt::Display| Failure::Passing(format!("{}: {error}", self.name()));
        let timeout = async {
            Timer::after(CONNECT_TIMEOUT).await;
            Err(passing(&"the connection timed out"))
        };
        let connect = async {
            self.connect().await.map_err(|error| {
                passing(&format!("cannot connect: {error}; is the gateway running?"))
            })
        };
        let stream = connect.or(timeout).await?;
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(RESPONSE_HEAD_BYTES_MAX)
            .handshake(FuturesIo::new(stream))
            .await
            .map_err(|error| passing(&error))?;
        let mut request = Request::builder()
            .method(method)
            .uri(format!(
                "{}{}{path}",
                self.path,
                super::operator_api::PREFIX
            ))
            .header(HOST, self.authority())
            .header(CONTENT_TYPE, "application/json");
        if let Some(token) = &self.operator_token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| Failure::Refused(format!("the request cannot be made: {error}")))?;
        let exchange = async {
            let answer = sender
                .send_request(request)
                .await
                .map_err(|error| passing(&error))?;
            let status = answer.status();
            if status == StatusCode::OK {
                return read(answer).await;
            }
            let body = Limited::new(answer.into_body(), RESPONSE_HEAD_BYTES_MAX).collect();
            let error = match body.await {
                Ok(body) => serde_json::from_slice(&body.to_bytes()).unwrap_or_default(),
                Err(_) => ErrorResponse::default(),
            };
            let why = format!("{}: {} ({status})", self.name(), error.error);
            if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                Err(Failure::Passing(why))
            } else {
                Err(Failure::Refused(why))
            }
        };
        // The connection has to be driven while the answer is read; its errors reach the reader.
        let drive = async {
            let _ = connection.await;
            future::pending().await
        };
        exchange.or(drive).await
    }

    async fn connect(&self) -> Result<Peer, String> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port))
            .await
            .map_err(|error| error.to_string())?;
        if !self.secure {
            return Ok(Peer::Plain(tcp));
        }
        let mut connector = TlsConnector::new();
        for root in &self.roots {
            connector = connector.add_root_certificate(root.clone());
        }
        let stream = connector.connect(self.host.as_str(), tcp).await;
        Ok(Peer::Tls(Box::new(
            stream.map_err(|error| error.to_string())?,
        )))
    }

    fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    fn name(&self) -> String {
        format!("gateway {}", self.authority())
    }

    // ---- the stream of a task -------------------------------------------------------------

    /// Copies the stream from `progress` on, until its final.
    async fn stream(
        &self,
        task_id: &str,
        progress: &mut Progress,
        stdout: &mut (impl AsyncWrite + Unpin),
        stderr: &mut (impl AsyncWrite + Unpin),
    ) -> Result<TaskResult, Failure> {
        let path = format!("tasks/{task_id}/stream?offset={}", progress.offset);
        let read = async |answer: Response<Incoming>| {
            let mut body = answer.into_body();
            let mut pending: Vec<u8> = Vec::new();
            loop {
                let silence = async {
                    Timer::after(4 * GATEWAY_STREAM_KEEPALIVE).await;
                    Err(Failure::Passing("the gateway has fallen silent".into()))
                };
                let frame = async { Ok(body.frame().await) };
                let part = match frame.or(silence).await? {
                    None => return Err(Failure::Passing("the gateway has gone away".into())),
                    Some(Err(error)) => {
                        return Err(Failure::Passing(format!("the stream broke: {error}")));
                    }
                    Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
                };
                let mut searched = pending.len();
                pending.extend_from_slice(&part);
                let mut taken = 0;
                while let Some(end) = pending[searched..].iter().position(|&byte| byte == b'\n') {
                    let line = &pending[taken..searched + end];
                    let result = take_line(line, progress, stdout, stderr).await?;
                    if let Some(result) = result {
                        return Ok(result);
                    }
                    taken = searched + end + 1;
                    searched = taken;
                }
                pending.drain(..taken);
                if pending.len() > GATEWAY_STREAM_LINE_BYTES_MAX {
                    return Err(Failure::Refused("a line of the stream is too long".into()));
                }
                stdout.flush().await.map_err(write_failed)?;
                stderr.flush().await.map_err(write_failed)?;
            }
        };
        self.exchange(Method::GET, &path, None, read).await
    }
}

fn write_failed(error: std::io::Error) -> Failure {
    Failure::Refused(format!("the output cannot be written: {error}"))
}

async fn read_json<T: DeserializeOwned>(answer: Response<Incoming>) -> Result<T, Failure> {
    let body = Limited::new(answer.into_body(), GATEWAY_BODY_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| Failure::Passing(format!("the answer broke off: {error}")))?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| Failure::Refused(format!("the answer is not understood: {error}")))
}

/// Prints one line of a stream; the final if it is that.
async fn take_line(
    line: &[u8],
    progress: &mut Progress,
    stdout: &mut (impl AsyncWrite + Unpin),
    stderr: &mut (impl AsyncWrite + Unpin),
) -> Result<Option<TaskResult>, Failure> {
    let event: StreamEvent = serde_json::from_slice(line)
        .map_err(|error| Failure::Refused(format!("the stream is not understood: {error}")))?;
    if let Some(error) = event.error {
        return Err(Failure::Refused(format!("the gateway says: {error}")));
    }
    if event.truncated_before == Some(true) {
        let notice = "hostlink-edge: output before this point was lost at the agent\n";
        let written = stderr.write_all(notice.as_bytes()).await;
        written.map_err(write_failed)?;
    }
    if let (Some(stream), Some(data)) = (event.stream, event.data_base64) {
        let bytes = STANDARD
            .decode(data)
            .map_err(|error| Failure::Refused(format!("the stream is not understood: {error}")))?;
        match stream {
            Stream::Stdout => stdout.write_all(&bytes).await,
            Stream::Stderr => stderr.write_all(&bytes).await,
        }
        .map_err(write_failed)?;
        progress.chunks += 1;
        if stream == Stream::Stderr {
            progress.stderr_bytes += bytes.len() as u64;
        }
    }
    progress.offset = progress.offset.max(event.offset);
    Ok(event.result)
}

/// Says on `stderr` what an exit code cannot say, and returns the exit code of this process.
async fn conclude(
    result: &TaskResult,
    progress: &Progress,
    stdout: &mut (impl AsyncWrite + Unpin),
    stderr: &mut (impl AsyncWrite + Unpin),
) -> Result<i32, String> {
    let failed = |error: std::io::Error| format!("the output cannot be written: {error}");
    let error = result.error.as_deref().unwrap_or_default();
    let output = result.output.as_deref().unwrap_or_default();
    let mut notice = String::new();
    // Without a result channel all output there is comes with the report.
    let unstreamed = result.via == "report" && progress.chunks == 0;
    if unstreamed {
        stdout.write_all(output.as_bytes()).await.map_err(failed)?;
        stderr.write_all(error.as_bytes()).await.map_err(failed)?;
    } else if result.via == "report" {
        notice += "hostlink-edge: the result came by report, while the session was down; output \
                   that the agent still holds is not shown\n";
    }
    let has_exit_code = result.status != "interrupted" && (0..=255).contains(&result.exit_code);
    if !has_exit_code {
        notice += &match progress.stderr_bytes == 0 && !unstreamed && !error.is_empty() {
            true if error.starts_with(&result.status) => {
                format!("hostlink-edge: {}\n", error.trim_end())
            }
            true => format!("hostlink-edge: {}: {}\n", result.status, error.trim_end()),
            false => format!("hostlink-edge: {} without an exit code\n", result.status),
        };
    }
    stderr.write_all(notice.as_bytes()).await.map_err(failed)?;
    stdout.flush().await.map_err(failed)?;
    stderr.flush().await.map_err(failed)?;
    Ok(if has_exit_code { result.exit_code } else { 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_urls_are_taken_apart() {
        let check = |url: &str, expected: Option<(&str, &str)>| {
            let client = OperatorClient::new(url, None).ok();
            let parts = client.map(|client| (client.authority(), client.path));
            let expected = expected.map(|(authority, path)| (authority.into(), path.into()));
            assert_eq!(parts, expected, "{url}");
        };
        check("http://127.0.0.1:8080", Some(("127.0.0.1:8080", "")));
        check(
            "https://edge.example/base/",
            Some(("edge.example:443", "/base")),
        );
        check("http://[::1]:9", Some(("[::1]:9", "")));
        check("ftp://x", None);
        check("edge.example", None);
        check("", None);
    }
}
