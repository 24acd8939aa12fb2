//! A gateway in a directory of its own, and a device that does what the test says.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_tungstenite::WebSocketStream;
use async_tungstenite::tungstenite::client::IntoClientRequest;
use async_tungstenite::tungstenite::{Error as WsError, Message};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_lite::{AsyncReadExt, AsyncWriteExt, FutureExt, StreamExt};
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::{Padding, Rsa};
use openssl::sign::{RsaPssSaltlen, Signer};
use smol::LocalExecutor;
use smol::net::TcpStream;

use crate::gateway::operator_client::{OperatorClient, Submission, Submitted};
use crate::gateway::{Gateway, GatewayError, Options, Settings};
use crate::ids::{FinalStatus, Ids, Stream};
use crate::wire::agent_message::{
    AgentMessage, Capabilities, FinalPayload, Hello, OutputPayload, SpoolStatus, optional_text,
};
use crate::wire::http::{REGISTER_PATH, RegisterRequest, RegisterResponse, Tag, WEBSOCKET_PATH};
use crate::wire::server_message::{HelloAck, ServerMessage};
use crate::wire::{TaskOffer, Timestamp};

/// A directory that is removed at the end.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Directory {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hostlink-gateway-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a test with a deadline.
pub fn run<F: Future<Output = ()>>(test: impl FnOnce(Rc<LocalExecutor<'static>>) -> F) {
    let executor = Rc::new(LocalExecutor::new());
    let test = test(executor.clone());
    let deadline = async {
        smol::Timer::after(Duration::from_secs(60)).await;
        panic!("the test hangs");
    };
    smol::block_on(executor.run(test.or(deadline)));
}

/// A gateway that runs.
pub struct Running {
    pub address: SocketAddr,
    pub token: (String, String),
    stop: async_channel::Sender<()>,
    task: smol::Task<Result<(), GatewayError>>,
}

impl Running {
    pub async fn start(
        executor: &LocalExecutor<'static>,
        directory: &Directory,
        change: impl FnOnce(&mut Settings),
    ) -> Running {
        let mut settings = Settings::new(([127, 0, 0, 1], 0).into(), &directory.0);
        change(&mut settings);
        let gateway = Gateway::bind(settings).await.unwrap();
        let (address, token) = (gateway.address(), gateway.registration_token());
        let (stop, stopped) = async_channel::bounded(1);
        let task = executor.spawn(gateway.run(stopped));
        Running {
            address,
            token,
            stop,
            task,
        }
    }

    pub async fn plain(executor: &LocalExecutor<'static>, directory: &Directory) -> Running {
        Running::start(executor, directory, |_| {}).await
    }

    pub async fn with(
        executor: &LocalExecutor<'static>,
        directory: &Directory,
        options: Options,
    ) -> Running {
        Running::start(executor, directory, |settings| settings.options = options).await
    }

    pub async fn stop(self) {
        drop(self.stop);
        self.task.await.unwrap();
    }

    pub fn operator(&self) -> OperatorClient {
        OperatorClient::new(&format!("http://{}", self.address), None).unwrap()
    }

    pub async fn submit(&self, command: &str) -> Submitted {
        let submission = Submission {
            command: command.into(),
            ..Submission::default()
        };
        self.operator().submit_detached(&submission).await.unwrap()
    }
}

/// Key pair of all devices: making one takes long.
pub fn device_key() -> &'static PKey<Private> {
    static KEY: OnceLock<PKey<Private>> = OnceLock::new();
    KEY.get_or_init(|| PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap())
}

pub fn registration(fingerprint: &str, token: &(String, String)) -> RegisterRequest {
    let public_key = device_key().public_key_to_der().unwrap();
    RegisterRequest {
        fingerprint: fingerprint.into(),
        token_id: token.0.clone(),
        token_key: token.1.clone(),
        public_key: STANDARD.encode(public_key),
        public_key_type: "RSA".into(),
        tags: vec![Tag {
            key: "hostname".into(),
            value: "test-host".into(),
        }],
    }
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

/// One HTTP request on a connection of its own.
pub async fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(String, String)],
    body: &[u8],
) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .expect("an answer has a head");
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    Answer {
        status: head[9..12].parse().unwrap(),
        head: head.to_lowercase(),
        body: answer[end + 4..].to_vec(),
    }
}

/// A registered device.
#[derive(Clone)]
pub struct Device {
    pub id: String,
    pub address: SocketAddr,
}

impl Device {
    pub async fn register(gateway: &Running, fingerprint: &str) -> Device {
        let body = serde_json::to_vec(&registration(fingerprint, &gateway.token)).unwrap();
        let answer = request(gateway.address, "POST", REGISTER_PATH, &[], &body).await;
        assert_eq!(
            answer.status,
            200,
            "{}",
            String::from_utf8_lossy(&answer.body)
        );
        let response: RegisterResponse = serde_json::from_slice(&answer.body).unwrap();
        Device {
            id: response.id,
            address: gateway.address,
        }
    }

    /// Signature headers of a clock that is off by so many seconds.
    pub fn signature(&self, clock_offset: i64) -> Vec<(String, String)> {
        let mut nonce = [0; 16];
        openssl::rand::rand_bytes(&mut nonce).unwrap();
        let nonce = STANDARD.encode(nonce);
        let now = i64::try_from(Timestamp::now().0 / 1000).unwrap() + clock_offset;
        let mut signer = Signer::new(MessageDigest::sha256(), device_key()).unwrap();
        signer.set_rsa_padding(Padding::PKCS1_PSS).unwrap();
        signer
            .set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH)
            .unwrap();
        let text = format!("{}|{now}|{nonce}", self.id);
        let signature = signer.sign_oneshot_to_vec(text.as_bytes()).unwrap();
        [
            ("X-Agent-ID", self.id.clone()),
            ("X-Timestamp", now.to_string()),
            ("X-Nonce", nonce),
            ("X-Signature", STANDARD.encode(signature)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    pub async fn request(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        request(self.address, method, path, &self.signature(0), body).await
    }

    /// A session up to the answer to its hello.
    pub async fn connect(&self, hello: &Hello) -> (Wire, HelloAck) {
        let mut wire = self.dial().await;
        wire.send("hello-1", AgentMessage::Hello(hello)).await;
        match wire.receive().await {
            ServerMessage::HelloAck(ack) => {
                assert_eq!(ack.acked_message_id, "hello-1");
                (wire, *ack)
            }
            other => panic!("no hello_ack: {other:?}"),
        }
    }

    /// A session without its hello.
    pub async fn dial(&self) -> Wire {
        self.upgrade(self.signature(0)).await.unwrap()
    }

    /// The status if the upgrade is refused.
    pub async fn upgrade(&self, headers: Vec<(String, String)>) -> Result<Wire, u16> {
        let url = format!("ws://{}{WEBSOCKET_PATH}", self.address);
        let mut request = url.into_client_request().unwrap();
        for (name, value) in headers {
            let name = hyper::header::HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let tcp = TcpStream::connect(self.address).await.unwrap();
        match async_tungstenite::client_async(request, tcp).await {
            Ok((socket, answer)) => {
                assert!(answer.headers().contains_key("date"), "{answer:?}");
                Ok(Wire {
                    socket,
                    agent_id: self.id.clone(),
                })
            }
            Err(WsError::Http(answer)) => {
                assert!(answer.headers().contains_key("date"), "{answer:?}");
                Err(answer.status().as_u16())
            }
            Err(error) => panic!("no answer to the upgrade: {error}"),
        }
    }
}

pub fn hello() -> Hello {
    Hello {
        client_version: "test".into(),
        capabilities: Capabilities {
            results_enabled: true,
            delivery_enabled: true,
            extensions: ["binary_output", "cancel", "lease"]
                .map(Into::into)
                .to_vec(),
        },
        running_task: None,
        received_not_started: vec![],
        unacked_finals: vec![],
        unacked_output: vec![],
        spool_status: SpoolStatus {
            bytes_used: 0,
            byte_cap: 1,
            has_rotated_chunks: false,
            volatile: false,
        },
    }
}

/// The device's end of a session.
pub struct Wire {
    pub socket: WebSocketStream<TcpStream>,
    agent_id: String,
}

impl Wire {
    pub async fn send(&mut self, message_id: &str, message: AgentMessage<'_>) {
        let mut frame = Vec::new();
        message.encode(message_id, &self.agent_id, Timestamp::now(), &mut frame);
        let text = String::from_utf8(frame).unwrap();
        self.socket.send(Message::text(text)).await.unwrap();
    }

    pub async fn output(&mut self, ids: &Ids, stream: Stream, sequence: u64, bytes: &[u8]) {
        self.chunk(ids, stream, sequence, bytes, false).await;
    }

    pub async fn chunk(
        &mut self,
        ids: &Ids,
        stream: Stream,
        sequence: u64,
        bytes: &[u8],
        truncated_locally: bool,
    ) {
        let payload = OutputPayload {
            stream,
            bytes,
            truncated_locally,
            binary_granted: true,
        };
        let message_id = chunk_id(stream, sequence);
        let message = AgentMessage::Output {
            ids,
            sequence,
            payload,
        };
        self.send(&message_id, message).await;
    }

    pub async fn end(&mut self, ids: &Ids, status: FinalStatus, exit_code: i32) {
        let payload = FinalPayload {
            status,
            exit_code,
            output: optional_text(b"tail"),
            error: None,
            output_truncated: false,
            error_truncated: false,
            usage: None,
        };
        let message = AgentMessage::Final {
            ids,
            payload: &payload,
        };
        self.send("final-1", message).await;
    }

    /// The next message of the gateway.
    pub async fn receive(&mut self) -> ServerMessage {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    return ServerMessage::decode(&text, &self.agent_id).unwrap();
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => panic!("no message: {other:?}"),
            }
        }
    }

    pub async fn receive_delivery(&mut self) -> TaskOffer {
        match self.receive().await {
            ServerMessage::Deliver(offer) => *offer,
            other => panic!("no task.deliver: {other:?}"),
        }
    }

    /// The highest sequence of whichever acknowledgement is next.
    pub async fn receive_any_ack(&mut self) -> Option<u64> {
        match self.receive().await {
            ServerMessage::Ack(ack) => ack.highest_output_sequence,
            other => panic!("no ack: {other:?}"),
        }
    }

    /// The highest sequence of the acknowledgement of `message_id`.
    pub async fn receive_ack(&mut self, message_id: &str) -> Option<u64> {
        match self.receive().await {
            ServerMessage::Ack(ack) => {
                assert_eq!(ack.acked_message_id, message_id, "{ack:?}");
                ack.highest_output_sequence
            }
            other => panic!("no ack of {message_id}: {other:?}"),
        }
    }
}

pub fn chunk_id(stream: Stream, sequence: u64) -> String {
    format!("chunk-{}-{sequence}", stream.as_str())
}

pub fn ids(submitted: &Submitted) -> Ids {
    Ids::new(&submitted.task_id, &submitted.execution_attempt_id).unwrap()
}
