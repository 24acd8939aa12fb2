//! What the tests of this layer share: keys, certificates and small hand-written servers.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_channel::Sender;
use async_tungstenite::tungstenite::WebSocket;
use async_tungstenite::tungstenite::handshake::derive_accept_key;
use async_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use futures_lite::future;
use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{SslAcceptor, SslMethod, SslVerifyMode};
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509Name};

use super::clock::ServerClock;
use super::signature::Signer;
use super::url::{Kind, Url};
use super::{Control, Dialer, NetError, Settings, WsReader, WsWriter};
use super::{connect_websocket, write_loop};

/// Runs a test's future; one that stands still fails instead of hanging.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    smol::block_on(future::or(test, async {
        smol::Timer::after(Duration::from_secs(60)).await;
        panic!("the test stands still")
    }))
}

pub fn key() -> &'static PKey<Private> {
    static KEY: OnceLock<PKey<Private>> = OnceLock::new();
    KEY.get_or_init(|| {
        let rsa = Rsa::generate(2048).expect("key");
        PKey::from_rsa(rsa).expect("key")
    })
}

pub fn url(text: &str) -> Url {
    Url::parse(text, Kind::Http).expect("a good URL")
}

pub fn signer(agent_id: &str, control_plane: &str) -> Signer {
    let clock = ServerClock::new(&url(control_plane));
    Signer::new(agent_id, key().clone(), clock)
}

/// Settings for a server of a test: short waits, except for what must not fail on a busy machine.
pub fn settings(base: &str) -> Settings {
    let mut settings = Settings::new(url(base));
    settings.timeouts.connect = Duration::from_secs(20);
    settings.timeouts.request = Duration::from_secs(20);
    settings
}

pub fn dialer(base: &str) -> Dialer {
    Dialer::new(settings(base))
}

/// A directory of its own for each test, removed at the end.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "hostlink-net-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("temp directory");
        TempDir(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("write");
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

// ---- servers ----------------------------------------------------------------------------------

/// Listens on a free port of loopback; each connection has a thread and its number from 0.
pub fn serve(handler: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    let handler = Arc::new(handler);
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let handler = handler.clone();
            std::thread::spawn(move || handler(number, stream));
        }
    });
    port
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    pub connection: usize,
    pub head: String,
    pub body: Vec<u8>,
}

impl Received {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    pub fn line(&self) -> &str {
        self.head.lines().next().unwrap_or_default()
    }
}

/// Reads one request with its body; `None` at the end of the connection.
pub fn read_request(connection: usize, reader: &mut impl std::io::BufRead) -> Option<Received> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let mut received = Received {
        connection,
        head,
        body: Vec::new(),
    };
    let length = received
        .header("content-length")
        .map_or(0, |length| length.parse::<usize>().expect("a number"));
    received.body.resize(length, 0);
    reader.read_exact(&mut received.body).ok()?;
    Some(received)
}

/// What a scripted server does with a request.
#[derive(Debug, Clone)]
pub enum Step {
    Answer(String),
    AnswerAndClose(String),
    Close,
    /// Writes the first text once and the second until the client has enough.
    Endless(&'static str, &'static str),
    Silence,
}

pub fn answer(status: &str, headers: &str, body: &str) -> Step {
    let length = body.len();
    Step::Answer(format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    ))
}

/// A server that answers one request after the other as the script says.
pub struct Scripted {
    pub port: u16,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Scripted {
    pub fn new(steps: impl IntoIterator<Item = Step>) -> Scripted {
        let steps = Mutex::new(steps.into_iter().collect::<VecDeque<_>>());
        let received = Arc::new(Mutex::new(Vec::new()));
        let log = received.clone();
        let port = serve(move |number, mut stream| {
            let mut reader = BufReader::new(stream.try_clone().expect("clone"));
            while let Some(request) = read_request(number, &mut reader) {
                log.lock().expect("lock").push(request);
                let step = steps.lock().expect("lock").pop_front();
                match step.expect("no more requests than steps") {
                    Step::Answer(text) => {
                        let _ = stream.write_all(text.as_bytes());
                    }
                    Step::AnswerAndClose(text) => {
                        let _ = stream.write_all(text.as_bytes());
                        return;
                    }
                    Step::Close => return,
                    Step::Endless(first, again) => {
                        let _ = stream.write_all(first.as_bytes());
                        while stream.write_all(again.as_bytes()).is_ok() {}
                        return;
                    }
                    Step::Silence => {}
                }
            }
        });
        Scripted { port, received }
    }

    pub fn base(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn received(&self) -> Vec<Received> {
        self.received.lock().expect("lock").clone()
    }
}

/// A TLS server that answers each connection's first request with 200 and `[]`.
pub fn serve_tls(certificate: &Certified, client_ca: Option<&X509>) -> u16 {
    let acceptor = acceptor(certificate, client_ca);
    serve(move |number, stream| {
        if let Ok(stream) = acceptor.accept(stream) {
            let mut reader = BufReader::new(stream);
            if read_request(number, &mut reader).is_some() {
                let text = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]";
                let _ = reader.get_mut().write_all(text);
            }
        }
    })
}

pub fn acceptor(certificate: &Certified, client_ca: Option<&X509>) -> SslAcceptor {
    let mut acceptor =
        SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).expect("acceptor");
    acceptor.set_private_key(&certificate.key).expect("key");
    acceptor
        .set_certificate(&certificate.certificate)
        .expect("certificate");
    if let Some(ca) = client_ca {
        acceptor.cert_store_mut().add_cert(ca.clone()).expect("CA");
        acceptor.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
    }
    acceptor.build()
}

/// Copies bytes between two sockets until both have ended.
pub fn relay(mut client: TcpStream, mut server: TcpStream) {
    let mut client_in = client.try_clone().expect("clone");
    let mut server_out = server.try_clone().expect("clone");
    let upward = std::thread::spawn(move || {
        let _ = std::io::copy(&mut client_in, &mut server_out);
        let _ = server_out.shutdown(std::net::Shutdown::Write);
    });
    let _ = std::io::copy(&mut server, &mut client);
    let _ = client.shutdown(std::net::Shutdown::Write);
    let _ = upward.join();
}

/// Reads until the other side has closed; how many bytes came.
pub fn drain(stream: &mut TcpStream) -> usize {
    let mut buffer = vec![0; 65_536];
    let mut count = 0;
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        count += length;
    }
    count
}

// ---- WebSocket --------------------------------------------------------------------------------

/// A server that upgrades every connection and then does what the test wants with the socket.
pub fn upgrading(session: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    serve(move |number, mut stream| {
        let mut reader = BufReader::with_capacity(1, stream.try_clone().expect("clone"));
        let request = read_request(number, &mut reader).expect("request");
        stream
            .write_all(accepted(&request).as_bytes())
            .expect("upgraded");
        session(stream);
    })
}

pub fn accepted(request: &Received) -> String {
    let key = request.header("sec-websocket-key").expect("key");
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {}\r\n\r\n",
        derive_accept_key(key.as_bytes())
    )
}

/// The server's side as the library speaks it, without limits.
pub fn peer(stream: TcpStream) -> WebSocket<TcpStream> {
    let config = WebSocketConfig::default()
        .max_frame_size(None)
        .max_message_size(None);
    WebSocket::from_raw_socket(stream, Role::Server, Some(config))
}

pub async fn connect(port: u16) -> Result<(WsWriter, WsReader), NetError> {
    connect_within(port, Duration::from_secs(20), Duration::from_secs(20)).await
}

pub async fn connect_within(
    port: u16,
    upgrade: Duration,
    write: Duration,
) -> Result<(WsWriter, WsReader), NetError> {
    let base = format!("http://127.0.0.1:{port}");
    let mut settings = settings(&base);
    settings.timeouts.upgrade = upgrade;
    settings.timeouts.write = write;
    let url = settings.websocket.clone();
    let signer = signer("agent-1", &base);
    connect_websocket(&Dialer::new(settings), &url, &signer).await
}

/// Lanes for a write loop: the senders, and the loop itself.
pub fn lanes(
    writer: WsWriter,
) -> (
    Sender<Control>,
    Sender<Vec<u8>>,
    impl Future<Output = String>,
) {
    let (control, control_lane) = async_channel::bounded(16);
    let (data, data_lane) = async_channel::bounded(4);
    // Nobody takes the buffers back.
    let (spent, _) = async_channel::bounded(1);
    let written = write_loop(writer, control_lane, data_lane, spent);
    (control, data, written)
}

// ---- certificates -----------------------------------------------------------------------------

/// A certificate and its key.
#[derive(Clone)]
pub struct Certified {
    pub certificate: X509,
    pub key: PKey<Private>,
}

impl Certified {
    pub fn pem(&self) -> Vec<u8> {
        self.certificate.to_pem().expect("PEM")
    }

    pub fn key_pem(&self) -> Vec<u8> {
        self.key.private_key_to_pem_pkcs8().expect("PEM")
    }
}

pub fn authority(name: &str) -> Certified {
    certified(name, None, None, (-10, 10))
}

/// A certificate for the address 127.0.0.1 or a DNS name, valid for the given days from today;
/// without `issuer` it signs itself.
pub fn leaf(name: &str, issuer: &Certified, days: (i64, i64)) -> Certified {
    certified("leaf", Some(name), Some(issuer), days)
}

fn certified(
    common_name: &str,
    alternative: Option<&str>,
    issuer: Option<&Certified>,
    days: (i64, i64),
) -> Certified {
    static SERIAL: AtomicU32 = AtomicU32::new(1);
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).expect("curve");
    let key = EcKey::generate(&group).expect("key");
    let key = PKey::from_ec_key(key).expect("key");
    let mut subject = X509Name::builder().expect("name");
    subject
        .append_entry_by_text("CN", common_name)
        .expect("name");
    let subject = subject.build();
    let mut builder = X509::builder().expect("builder");
    builder.set_version(2).expect("version");
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let serial = openssl::bn::BigNum::from_u32(serial).expect("number");
    let serial = serial.to_asn1_integer().expect("integer");
    builder.set_serial_number(&serial).expect("serial");
    builder.set_subject_name(&subject).expect("subject");
    let issuer_name = issuer.map(|issuer| issuer.certificate.subject_name());
    builder
        .set_issuer_name(issuer_name.unwrap_or(&subject))
        .expect("issuer");
    builder.set_pubkey(&key).expect("public key");
    let day = |offset: i64| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let unix = now.expect("after 1970").as_secs() as i64 + offset * 86_400;
        Asn1Time::from_unix(unix).expect("time")
    };
    builder.set_not_before(&day(days.0)).expect("time");
    builder.set_not_after(&day(days.1)).expect("time");
    match alternative {
        Some(name) => {
            let mut names = SubjectAlternativeName::new();
            match name.parse::<std::net::IpAddr>() {
                Ok(_) => names.ip(name),
                Err(_) => names.dns(name),
            };
            let names = names
                .build(&builder.x509v3_context(None, None))
                .expect("names");
            builder.append_extension(names).expect("extension");
        }
        None => {
            let constraints = BasicConstraints::new().critical().ca().build().expect("CA");
            builder.append_extension(constraints).expect("extension");
        }
    }
    let signing_key = issuer.map_or(&key, |issuer| &issuer.key);
    builder
        .sign(signing_key, MessageDigest::sha256())
        .expect("signed");
    Certified {
        certificate: builder.build(),
        key,
    }
}
