//! What a gateway is started with, and why it could not start or go on.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Everything a [`super::Gateway`] needs to know.
#[derive(Clone)]
pub struct Settings {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Directory of tasks, agents and output; created if it does not exist.
    pub state: PathBuf,
    /// Registration token, id and key. `None`: made at the first start and kept in the state.
    pub token: Option<(String, String)>,
    /// Opens the operator API to peers other than loopback that carry it as `Authorization: Bearer`.
    /// With one set, loopback peers must carry it as well.
    pub operator_token: Option<String>,
    /// Certificate chain and private key, PEM files. `None`: plain HTTP and WebSocket.
    pub tls: Option<(PathBuf, PathBuf)>,
    pub options: Options,
}

impl Settings {
    pub fn new(listen: SocketAddr, state: impl Into<PathBuf>) -> Settings {
        Settings {
            listen,
            state: state.into(),
            token: None,
            operator_token: None,
            tls: None,
            options: Options::default(),
        }
    }
}

/// How this control plane behaves within PROTOCOL.md. The defaults are those of a full one; the
/// others stand for older and smaller ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `hello_ack.delivery_enabled`, and whether tasks are delivered over the WebSocket at all.
    pub delivery_enabled: bool,
    /// Sends the directive lists of `hello_ack` from what is held here.
    pub directives: bool,
    /// Extensions that are granted if the agent offers them (PROTOCOL.md 5).
    pub grant: Vec<String>,
    /// `hello_ack.lease_interval_seconds`, sent only where `lease` is granted.
    pub lease_interval_seconds: Option<u64>,
    /// Refuses every WebSocket upgrade with 404, as a control plane without one.
    pub poll_only: bool,
    /// Offers tasks by poll with an empty `execution_attempt_id`, as old control planes do
    /// (PROTOCOL.md 2, Poll). Such tasks are never delivered over the WebSocket.
    pub legacy_attempts: bool,
    /// `fdatasync` before every acknowledgement. Off only for measurements: an acknowledgement
    /// then no longer survives a power cut of the gateway's machine.
    pub sync: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            delivery_enabled: true,
            directives: true,
            grant: ["binary_output", "cancel", "lease"]
                .map(String::from)
                .to_vec(),
            lease_interval_seconds: None,
            poll_only: false,
            legacy_attempts: false,
            sync: true,
        }
    }
}

/// Why the gateway cannot start, or had to stop. All of them are for the operator: nothing here
/// can be retried without a change.
#[derive(Debug)]
pub enum GatewayError {
    /// The listening address cannot be used.
    Listen(SocketAddr, std::io::Error),
    /// Certificate or key cannot be read or do not fit together.
    Tls(String),
    /// The state directory cannot be used, or writing to it failed.
    Storage(String),
}

impl fmt::Display for GatewayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GatewayError::Listen(address, error) => {
                write!(
                    f,
                    "cannot listen on {address}: {error}; choose another --listen address"
                )
            }
            GatewayError::Tls(why) => write!(f, "cannot set up TLS: {why}"),
            GatewayError::Storage(why) => write!(f, "gateway state: {why}"),
        }
    }
}

impl std::error::Error for GatewayError {}
