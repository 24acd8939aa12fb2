//! The reference control plane: small, real, and written against PROTOCOL.md alone.
//!
//! It shares [`crate::wire`] with the agent and nothing else of it, neither the session nor the
//! outbox, so that the two cannot share a misunderstanding.
//!
//! - `server`: connections and routing; `peer`: TCP or TLS; `body`: bodies of requests and answers.
//! - `auth`: signatures, tokens, operators.
//! - `agents_api`: register, poll, report, heartbeat.
//! - `websocket`: a session; `hello`: its handshake; `inbound`: its messages.
//! - `delivery`: what is accepted for an attempt. Pure.
//! - `hub`: what is known in memory; `store`: the storage thread; `journal`: the file of an attempt.
//! - `operator_api`, `operator_stream`: the other side; [`operator_client`]: its client.

mod agents_api;
mod auth;
mod body;
mod commits;
mod delivery;
mod hello;
mod hub;
mod inbound;
mod journal;
mod operator_api;
pub mod operator_client;
mod operator_stream;
mod operator_types;
mod peer;
mod server;
mod settings;
mod store;
#[cfg(test)]
mod tests;
mod websocket;

use std::net::SocketAddr;
use std::rc::Rc;

use async_native_tls::TlsAcceptor;
use futures_lite::FutureExt;
use smol::LocalExecutor;
use smol::net::TcpListener;

pub use settings::{GatewayError, Options, Settings};

/// A control plane that is bound to its address and has its state open.
pub struct Gateway {
    listener: TcpListener,
    address: SocketAddr,
    opened: store::Opened,
    tls: Option<TlsAcceptor>,
    options: Options,
    operator_token: Option<String>,
}

impl Gateway {
    /// Opens the state, makes what is missing in it, and listens.
    pub async fn bind(settings: Settings) -> Result<Gateway, GatewayError> {
        let tls = match &settings.tls {
            None => None,
            Some((certificate, key)) => Some(
                peer::acceptor(certificate, key)
                    .await
                    .map_err(GatewayError::Tls)?,
            ),
        };
        // Bound first: a second gateway with the same arguments fails before it touches the state.
        let listen_failed = |error| GatewayError::Listen(settings.listen, error);
        let listener = TcpListener::bind(settings.listen)
            .await
            .map_err(listen_failed)?;
        let address = listener.local_addr().map_err(listen_failed)?;
        let (state, token, sync) = (settings.state, settings.token, settings.options.sync);
        let opened = smol::unblock(move || store::Store::open(&state, token, sync))
            .await
            .map_err(GatewayError::Storage)?;
        Ok(Gateway {
            listener,
            address,
            opened,
            tls,
            options: settings.options,
            operator_token: settings.operator_token,
        })
    }

    /// The address that is listened on, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Id and key of the registration token.
    pub fn registration_token(&self) -> (String, String) {
        self.opened.token.clone()
    }

    /// Serves until `stop` receives something or is closed, then closes all sessions with a close
    /// frame. One thread: everything runs inside this future, on an executor of its own.
    ///
    /// An error means that storage failed in a way after which nothing can be promised any more.
    pub async fn run(self, stop: async_channel::Receiver<()>) -> Result<(), GatewayError> {
        let executor = Rc::new(LocalExecutor::new());
        let failure = self.opened.failure.clone();
        let store = self.opened.store.clone();
        let (stopping_sender, stopping) = async_channel::bounded(1);
        let hub = Rc::new(hub::Hub::new(
            self.opened,
            self.options,
            self.operator_token,
            stopping,
            Rc::downgrade(&executor),
        ));
        log::info!("gateway listens on {}", self.address);
        let main = async {
            let stopped = async {
                // Closed or not: both mean that it is time.
                let _ = stop.recv().await;
                None
            };
            let failed = async { failure.recv().await.ok() };
            let until = async {
                let failed = stopped.or(failed).await;
                stopping_sender.close();
                failed
            };
            let serve = server::serve(hub, self.listener, self.tls);
            let (failed, ()) = futures_lite::future::zip(until, serve).await;
            // What is staged is written; the state is free again when the thread has ended.
            store.close();
            let failed = failed.or(failure.recv().await.ok());
            match failed {
                None => Ok(()),
                Some(error) => Err(GatewayError::Storage(error)),
            }
        };
        executor.run(main).await
    }
}
