//! HTTP/1.1 of the scripted server: requests, signatures, default answers (PROTOCOL.md 1 and 2).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hostlink_edge::wire::Timestamp;
use hostlink_edge::wire::http::{
    REGISTER_PATH, ReceivedReport, RegisterRequest, TASKS_PATH, WEBSOCKET_PATH, heartbeat_path,
};
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Verifier};
use serde_json::json;

use super::link;
use super::lock;
use super::log::Event;
use super::server::{AGENT_ID, Inner, TOKEN_ID, TOKEN_KEY};

const TIMESTAMP_TOLERANCE_SECONDS: i64 = 300;

pub struct Request {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The task id of a report, if it is one.
    pub fn reported_task(&self) -> Option<&str> {
        let id = self.path.strip_prefix(TASKS_PATH)?.strip_prefix('/')?;
        (self.method == "PUT").then_some(id)
    }
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn status(status: u16) -> Answer {
        let body = match status {
            200 => "{}".to_owned(),
            _ => json!({"error": format!("scripted status {status}")}).to_string(),
        };
        Answer {
            status,
            headers: Vec::new(),
            body,
        }
    }

    pub fn json(body: &serde_json::Value) -> Answer {
        Answer {
            body: body.to_string(),
            ..Answer::status(200)
        }
    }

    pub fn header(mut self, name: &str, value: &str) -> Answer {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// Serves one connection until it ends or becomes a WebSocket.
pub fn serve(socket: &TcpStream, inner: &Arc<Inner>) {
    let mut reader = BufReader::new(socket);
    while let Ok(Some(request)) = read_request(&mut reader) {
        let is_upgrade = request.path == WEBSOCKET_PATH;
        let answer = answer(&request, inner);
        if is_upgrade && answer.status == 101 {
            link::upgrade(socket, &request, inner);
            return;
        }
        if write_answer(socket, &answer, inner).is_err() {
            return;
        }
    }
}

fn answer(request: &Request, inner: &Arc<Inner>) -> Answer {
    if request.path == REGISTER_PATH {
        return register(request, inner);
    }
    if let Err(why) = authenticate(request, inner) {
        inner.record(Event::Unauthorized {
            path: request.path.clone(),
            why: why.clone(),
        });
        let body = json!({ "error": why }).to_string();
        return Answer {
            body,
            ..Answer::status(401)
        };
    }
    let (script, refusal) = {
        let policy = lock(&inner.policy);
        (Arc::clone(&policy.on_http), policy.refuse_upgrades.clone())
    };
    if request.path == WEBSOCKET_PATH {
        return match script(request).or(refusal) {
            None => Answer::status(101),
            Some(answer) => {
                let status = answer.status;
                inner.record(Event::UpgradeRefused { status });
                answer
            }
        };
    }
    if let Some(task_id) = request.reported_task() {
        return report(request, task_id, &script, inner);
    }
    let is_poll = request.method == "GET" && request.path == TASKS_PATH;
    let is_heartbeat = request.method == "POST" && request.path == heartbeat_path(AGENT_ID);
    if is_poll || is_heartbeat {
        inner.record(if is_poll {
            Event::Poll
        } else {
            Event::Heartbeat
        });
        return script(request).unwrap_or_else(|| {
            let policy = lock(&inner.policy);
            Answer::json(&match is_poll {
                true => json!(policy.poll_tasks),
                false => json!({"message": "ok", "pending_tasks": policy.heartbeat_tasks}),
            })
        });
    }
    let unknown = format!("unknown request {} {}", request.method, request.path);
    inner.record(Event::Broken(unknown));
    Answer::status(404)
}

fn register(request: &Request, inner: &Inner) -> Answer {
    let body: RegisterRequest = match serde_json::from_slice(&request.body) {
        Ok(body) => body,
        Err(error) => {
            inner.record(Event::Broken(format!("registration body: {error}")));
            return Answer::status(400);
        }
    };
    let tagged = |name: &str| body.tags.iter().any(|tag| tag.key == name);
    if !tagged("hostname") || !tagged("os") || body.public_key_type != "RSA" {
        let what = format!("registration lacks tags or key type: {body:?}");
        inner.record(Event::Broken(what));
    }
    let script = Arc::clone(&lock(&inner.policy).on_http);
    let accepted = body.token_id == TOKEN_ID && body.token_key == TOKEN_KEY;
    let answer = match script(request) {
        Some(answer) => answer,
        None if !accepted => Answer::status(401),
        None => Answer::json(&json!({
            "id": AGENT_ID,
            "fingerprint": body.fingerprint,
            "status": "active",
            "message": "registered",
            "registered_at": Timestamp::now(),
        })),
    };
    if answer.status == 200 {
        match decode_public_key(&body.public_key) {
            Ok(key) => *lock(&inner.public_key) = Some(key),
            Err(why) => inner.record(Event::Broken(format!("registered public key: {why}"))),
        }
    }
    inner.record(Event::Registration {
        request: Box::new(body),
        status: answer.status,
    });
    answer
}

fn decode_public_key(text: &str) -> Result<PKey<openssl::pkey::Public>, String> {
    let der = STANDARD.decode(text).map_err(|error| error.to_string())?;
    PKey::public_key_from_der(&der).map_err(|error| error.to_string())
}

fn report(
    request: &Request,
    task_id: &str,
    script: &super::server::HttpScript,
    inner: &Inner,
) -> Answer {
    match serde_json::from_slice::<ReceivedReport>(&request.body) {
        Ok(report) => {
            let fits = match report.status.as_str() {
                "completed" => report.exit_code == 0,
                "failed" => report.exit_code != 0,
                _ => false,
            };
            if !fits {
                inner.record(Event::Broken(format!("impossible report: {report:?}")));
            }
            inner.record(Event::Report {
                task_id: task_id.to_owned(),
                report,
            });
        }
        Err(error) => inner.record(Event::Broken(format!("report body: {error}"))),
    }
    let answer = script(request).unwrap_or_else(|| Answer::status(200));
    if answer.status == 200 {
        lock(&inner.ledger).reported(task_id);
    }
    inner.record(Event::ReportAnswered {
        task_id: task_id.to_owned(),
        status: answer.status,
    });
    answer
}

/// Checks the signature headers (PROTOCOL.md 1); the error says which of them is wrong.
fn authenticate(request: &Request, inner: &Inner) -> Result<(), String> {
    let header = |name: &str| request.header(name).ok_or(format!("{name} is missing"));
    let (agent, timestamp) = (header("x-agent-id")?, header("x-timestamp")?);
    let (nonce, signature) = (header("x-nonce")?, header("x-signature")?);
    if agent != AGENT_ID {
        return Err(format!("unknown agent {agent:?}"));
    }
    let seconds: i64 = timestamp.parse().map_err(|_| "X-Timestamp is no number")?;
    let shift = (seconds - inner.unix_seconds()).abs();
    if shift > TIMESTAMP_TOLERANCE_SECONDS {
        return Err(format!("the timestamp is {shift} s off"));
    }
    let nonce_bytes = STANDARD.decode(nonce).map_err(|_| "X-Nonce is no base64")?;
    if nonce_bytes.len() != 16 {
        return Err(format!("the nonce has {} bytes", nonce_bytes.len()));
    }
    if lock(&inner.nonces).insert(nonce.to_owned(), ()).is_some() {
        inner.record(Event::Broken(format!("nonce {nonce} was used twice")));
    }
    let signature = STANDARD
        .decode(signature)
        .map_err(|_| "X-Signature is no base64")?;
    let signed = format!("{agent}|{timestamp}|{nonce}");
    let key = lock(&inner.public_key).clone().ok_or("nobody registered")?;
    let check = || -> Result<bool, openssl::error::ErrorStack> {
        let mut verifier = Verifier::new(MessageDigest::sha256(), &key)?;
        verifier.set_rsa_padding(Padding::PKCS1_PSS)?;
        verifier.set_rsa_mgf1_md(MessageDigest::sha256())?;
        verifier.set_rsa_pss_saltlen(RsaPssSaltlen::custom(32))?;
        verifier.verify_oneshot(&signature, signed.as_bytes())
    };
    match check() {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err("the signature does not fit".into()),
    }
}

/// `Ok(None)` at the end of the connection.
fn read_request(reader: &mut BufReader<&TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let path = words.next().unwrap_or_default().to_owned();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
            None => break,
        }
    }
    let mut request = Request {
        method,
        path,
        headers,
        body: Vec::new(),
    };
    if request.header("expect").is_some() {
        reader
            .get_mut()
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    if request.header("transfer-encoding").is_some() {
        request.body = read_chunked(reader)?;
    } else if let Some(length) = request.header("content-length") {
        let length = length.parse().map_err(std::io::Error::other)?;
        request.body = vec![0; length];
        reader.read_exact(&mut request.body)?;
    }
    Ok(Some(request))
}

fn read_chunked(reader: &mut BufReader<&TcpStream>) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let digits = line.trim_end();
        let length = u64::from_str_radix(digits, 16).map_err(std::io::Error::other)?;
        reader.take(length).read_to_end(&mut body)?;
        reader.read_line(&mut line)?;
        if length == 0 {
            return Ok(body);
        }
    }
}

fn write_answer(mut socket: &TcpStream, answer: &Answer, inner: &Inner) -> std::io::Result<()> {
    let mut head = format!(
        "HTTP/1.1 {} Scripted\r\nContent-Type: application/json\r\nContent-Length: {}\r\n",
        answer.status,
        answer.body.len()
    );
    if !answer.headers.iter().any(|(name, _)| name == "Date") {
        head.push_str(&format!("Date: {}\r\n", http_date(inner.unix_seconds())));
    }
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    head.push_str(&answer.body);
    socket.write_all(head.as_bytes())
}

/// RFC 9110 section 5.6.7, from the RFC 3339 form.
pub fn http_date(unix_seconds: i64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let text = Timestamp(unix_seconds as u64 * 1000).to_string();
    let month: usize = text[5..7].parse().expect("two digits");
    format!(
        "{}, {} {} {} {} GMT",
        DAYS[(unix_seconds / 86_400 % 7) as usize],
        &text[8..10],
        MONTHS[month - 1],
        &text[..4],
        &text[11..19]
    )
}
