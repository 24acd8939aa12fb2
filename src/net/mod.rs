//! Everything between the agent and the network: dialling, TLS, HTTP, WebSocket, signatures.
//!
//! - [`url`]: the URLs that the settings name.
//! - [`dial`]: from a URL to a connected byte stream; [`proxy`] and [`tls`] are its steps.
//! - [`clock`]: the server's time.
//! - [`identity`]: the agent's files: key, fingerprint and id; [`state_file`] writes them.
//! - [`signature`]: the headers that authenticate a request.
//! - [`http`] and [`api`]: the HTTP client and the calls of PROTOCOL.md 2.
//! - [`interfaces`]: the return of the network.
//! - [`websocket`] and [`write_loop`]: the two sides of a WebSocket connection.
//!
//! Invariants: every wait has a limit ([`Timeouts`]) and every buffer a bound. What a peer sends
//! never panics and never grows memory beyond `limits`. Keys, tokens and proxy passwords appear
//! neither in errors nor in `Debug`.

pub mod api;
pub mod clock;
pub mod dial;
pub mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod http;
pub mod identity;
pub mod interfaces;
pub mod proxy;
pub mod signature;
pub mod state_file;
pub mod tls;
pub mod url;
pub mod websocket;
pub mod write_loop;

#[cfg(test)]
pub(crate) mod testing;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::limits;

pub use api::{Api, RegisterError, ReportOutcome};
pub use clock::{ServerClock, system_unix};
pub use dial::{Connection, Dialer};
pub use error::NetError;
pub use identity::{Identity, IdentityError};
pub use interfaces::Interfaces;
pub use signature::{Signer, verify_signature};
pub use url::{Kind, Url};
pub use websocket::{Incoming, Utf8Bytes, WsReader, WsWriter, connect_websocket};
pub use write_loop::{Control, write_loop};

/// What the layer needs to know. The PEM files are read again for each connection, since
/// certificates are renewed on disk while the agent runs.
#[derive(Clone)]
pub struct Settings {
    pub control_plane: Url,
    pub websocket: Url,
    /// The only roots that are trusted; the system's if `None`.
    pub ca_file: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    /// The certificate file also holds the key if `None`.
    pub client_key: Option<PathBuf>,
    pub https_proxy: Option<String>,
    pub http_proxy: Option<String>,
    pub no_proxy: Option<String>,
    pub timeouts: Timeouts,
}

impl Settings {
    /// Direct connections with the system's roots; the WebSocket is at its usual path.
    pub fn new(control_plane: Url) -> Settings {
        Settings {
            websocket: control_plane.websocket(),
            control_plane,
            ca_file: None,
            client_cert: None,
            client_key: None,
            https_proxy: None,
            http_proxy: None,
            no_proxy: None,
            timeouts: Timeouts::default(),
        }
    }
}

/// Without the proxies, which may hold passwords.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("control_plane", &self.control_plane)
            .field("websocket", &self.websocket)
            .field("ca_file", &self.ca_file)
            .field("client_cert", &self.client_cert)
            .field("client_key", &self.client_key)
            .finish_non_exhaustive()
    }
}

/// The limits of all waits; the defaults are those of [`limits`].
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// Name resolution, TCP connect, proxy and TLS handshake together.
    pub connect: Duration,
    /// From the request for the WebSocket upgrade to its answer.
    pub upgrade: Duration,
    /// One HTTP request, the connection included.
    pub request: Duration,
    /// An HTTP connection unused for this long is closed.
    pub keep_alive: Duration,
    /// A write to a WebSocket that makes no progress.
    pub write: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: limits::CONNECT_TIMEOUT,
            upgrade: limits::HANDSHAKE_TIMEOUT,
            request: limits::REQUEST_TIMEOUT,
            keep_alive: limits::KEEP_ALIVE_TIMEOUT,
            write: limits::WRITE_TIMEOUT,
        }
    }
}
