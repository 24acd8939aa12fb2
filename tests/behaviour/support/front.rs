//! Stands before the scripted server and misbehaves on the connections that a test chooses, byte by
//! byte; all others it passes through.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_tungstenite::tungstenite::handshake::derive_accept_key;
use openssl::ssl::SslAcceptor;

use super::lock;

/// First byte of a close frame.
pub const CLOSE: u8 = 0x88;

/// What is done with one connection.
pub type Script = Box<dyn FnOnce(&mut Victim) + Send>;

/// A script that has gone on for so long ends its connection.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Plan {
    scripts: Mutex<VecDeque<Script>>,
    accepted: AtomicUsize,
}

pub struct Front {
    port: u16,
    plan: Arc<Plan>,
}

impl Front {
    /// Lives as long as the process of the tests.
    pub fn before(good_port: u16) -> Front {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("a bound socket").port();
        let plan = Arc::<Plan>::default();
        let plans = Arc::clone(&plan);
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                plans.accepted.fetch_add(1, Ordering::SeqCst);
                let script = lock(&plans.scripts).pop_front();
                std::thread::spawn(move || match script {
                    Some(script) => {
                        let _ = socket.set_read_timeout(Some(SCRIPT_TIMEOUT));
                        let _ = socket.set_write_timeout(Some(SCRIPT_TIMEOUT));
                        script(&mut Victim { socket });
                    }
                    None => pass(&socket, good_port),
                });
            }
        });
        Front { port, plan }
    }

    pub fn websocket_url(&self) -> String {
        format!("ws://127.0.0.1:{}/api/v1/agents/ws", self.port)
    }

    pub fn secure_websocket_url(&self) -> String {
        format!("wss://127.0.0.1:{}/api/v1/agents/ws", self.port)
    }

    /// The next connection that has no script yet gets this one.
    pub fn next(&self, script: Script) {
        lock(&self.plan.scripts).push_back(script);
    }

    pub fn accepted(&self) -> usize {
        self.plan.accepted.load(Ordering::SeqCst)
    }
}

/// A connection of the agent.
pub struct Victim {
    socket: TcpStream,
}

impl Victim {
    /// Reads the request; gives the answer's `Sec-WebSocket-Accept`.
    pub fn read_request(&mut self) -> String {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && matches!(self.socket.read(&mut byte), Ok(1)) {
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let key = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("sec-websocket-key")
                .then(|| value.trim().to_owned())
        });
        derive_accept_key(key.unwrap_or_default().as_bytes())
    }

    /// Completes the upgrade as it should be.
    pub fn upgrade(&mut self) {
        let accept = self.read_request();
        self.send(
            format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
                 Connection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
            )
            .as_bytes(),
        );
    }

    /// Begins TLS, and ends the connection.
    pub fn handshake(&mut self, acceptor: &SslAcceptor) {
        if let Ok(socket) = self.socket.try_clone() {
            let _ = acceptor.accept(socket);
        }
    }

    /// `false` when the agent has gone.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).is_ok()
    }

    /// Reads until the agent goes.
    pub fn drain(&mut self) {
        let mut buffer = [0; 4096];
        while matches!(self.socket.read(&mut buffer), Ok(1..)) {}
    }

    /// Reads until the agent goes; gives the status of its close frame, if that comes last.
    pub fn close_status(&mut self) -> Option<u16> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = self.socket.read(&mut buffer) {
            bytes.extend(&buffer[..len]);
        }
        let [CLOSE, 0x82, mask @ .., high, low] = bytes.last_chunk::<8>()? else {
            return None;
        };
        Some(u16::from_be_bytes([high ^ mask[0], low ^ mask[1]]))
    }

    /// Sends the end of the stream, without a word, and reads until the agent goes.
    pub fn hang_up(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        self.drain();
    }
}

/// One frame of a server. `first` is its first byte: FIN, reserved bits and opcode.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        len @ ..126 => bytes.push(len as u8),
        len @ ..0x1_0000 => {
            bytes.push(126);
            bytes.extend((len as u16).to_be_bytes());
        }
        len => {
            bytes.push(127);
            bytes.extend((len as u64).to_be_bytes());
        }
    }
    bytes.extend(payload);
    bytes
}

fn pass(socket: &TcpStream, port: u16) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else {
        return;
    };
    let copy = |mut from: &TcpStream, mut to: &TcpStream| {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| copy(socket, &server));
        copy(&server, socket);
    });
}
