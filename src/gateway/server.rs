//! Accepts connections and hands each request to the API that it is for.

use std::cell::Cell;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use async_native_tls::TlsAcceptor;
use async_tungstenite::WebSocketStream;
use async_tungstenite::tungstenite::handshake::derive_accept_key;
use async_tungstenite::tungstenite::protocol::Role;
use futures_lite::FutureExt;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use smol::Timer;
use smol::lock::Semaphore;
use smol::net::{TcpListener, TcpStream};
use smol_hyper::rt::{FuturesIo, SmolTimer};

use super::body::{self, Answer, AnswerBody};
use super::hub::{Hub, Refusal};
use super::peer::Peer;
use super::{agents_api, operator_api, websocket};
use crate::limits::{
    CONNECT_TIMEOUT, GATEWAY_BODIES_AT_ONCE, GATEWAY_CONNECTIONS_MAX, GATEWAY_HEAD_BYTES_MAX,
    GATEWAY_REQUEST_TIMEOUT, GATEWAY_STOP_WAIT,
};
use crate::wire::http::WEBSOCKET_PATH;

/// After an accept that failed: too many open files do not go away at once.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// What all connections share.
struct Server {
    hub: Rc<Hub>,
    tls: Option<TlsAcceptor>,
    connections: Cell<usize>,
    bodies: Semaphore,
}

/// Counts one connection for as long as it lives.
struct Place(Rc<Server>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
    }
}

/// Serves until the gateway stops, then waits for sessions to be closed, but not for long.
pub async fn serve(hub: Rc<Hub>, listener: TcpListener, tls: Option<TlsAcceptor>) {
    let server = Rc::new(Server {
        hub: hub.clone(),
        tls,
        connections: Cell::new(0),
        bodies: Semaphore::new(GATEWAY_BODIES_AT_ONCE),
    });
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((tcp, peer)) => take_connection(&server, tcp, peer),
                Err(error) => {
                    log::error!("cannot accept a connection: {error}");
                    Timer::after(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    };
    let stopping = async {
        // Nothing is ever sent: the end of the channel is the signal.
        let _ = hub.stopping.recv().await;
    };
    accept.or(stopping).await;
    drop(listener);
    let closed = async {
        while server.connections.get() > 0 {
            Timer::after(Duration::from_millis(10)).await;
        }
    };
    let timeout = async {
        Timer::after(GATEWAY_STOP_WAIT).await;
    };
    closed.or(timeout).await;
}

fn take_connection(server: &Rc<Server>, tcp: TcpStream, peer: SocketAddr) {
    if server.connections.get() >= GATEWAY_CONNECTIONS_MAX {
        log::warn!("{peer}: connection refused: {GATEWAY_CONNECTIONS_MAX} are open");
        return;
    }
    server.connections.set(server.connections.get() + 1);
    let place = Place(server.clone());
    server.hub.spawn(async move {
        if let Err(error) = serve_connection(Rc::new(place), tcp, peer).await {
            log::debug!("{peer}: {error}");
        }
    });
}

async fn serve_connection(
    place: Rc<Place>,
    tcp: TcpStream,
    peer: SocketAddr,
) -> Result<(), Box<dyn std::error::Error>> {
    // Acknowledgements are small and must not wait for each other.
    tcp.set_nodelay(true)?;
    let server = place.0.clone();
    let stream = match &server.tls {
        None => Peer::Plain(tcp.clone()),
        Some(acceptor) => {
            let accept = async { Some(acceptor.accept(tcp.clone()).await) };
            let timeout = async {
                Timer::after(CONNECT_TIMEOUT).await;
                None
            };
            let stream = accept
                .or(timeout)
                .await
                .ok_or("TLS handshake timed out")??;
            Peer::Tls(Box::new(stream))
        }
    };
    let service = service_fn(|request| {
        let (place, tcp) = (place.clone(), tcp.clone());
        async move { Ok::<_, Infallible>(route(place, tcp, peer, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(SmolTimer::new())
        .header_read_timeout(GATEWAY_REQUEST_TIMEOUT)
        .max_buf_size(GATEWAY_HEAD_BYTES_MAX)
        .serve_connection(FuturesIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let stopping = async {
        let _ = server.hub.stopping.recv().await;
        true
    };
    let served = async {
        if let Err(error) = connection.as_mut().await {
            log::debug!("{peer}: {error}");
        }
        false
    };
    if served.or(stopping).await {
        // The answer that is under way is finished, an idle connection is closed.
        connection.as_mut().graceful_shutdown();
        connection.await?;
    }
    Ok(())
}

async fn route(
    place: Rc<Place>,
    tcp: TcpStream,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Answer {
    let server = place.0.clone();
    let (hub, bodies) = (&server.hub, &server.bodies);
    let path = request.uri().path();
    let answer = if path == WEBSOCKET_PATH {
        upgrade(place, tcp, request)
    } else if path.starts_with(operator_api::PREFIX) {
        operator_api::handle(hub, request, peer.ip(), bodies).await
    } else if agents_api::is_path(path) {
        agents_api::handle(hub, request, bodies).await
    } else {
        Err((404, format!("there is no {path:.80} here")))
    };
    answer.unwrap_or_else(body::refusal)
}

/// Whether a comma-separated header holds `token`.
fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|value| value.trim().eq_ignore_ascii_case(token))
}

/// Checks an upgrade (RFC 6455, 4.2.1, and PROTOCOL.md 1) and lets the session begin behind it.
fn upgrade(
    place: Rc<Place>,
    tcp: TcpStream,
    mut request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let hub = place.0.hub.clone();
    if hub.options.poll_only {
        return Err((404, "this control plane has no WebSocket".into()));
    }
    let agent_id = agents_api::authenticate(&hub, request.headers())?;
    if hub.is_kept_away(&agent_id) {
        return Err((503, "an operator has cut the connection for a while".into()));
    }
    let headers = request.headers();
    if request.method() != Method::GET
        || !has_token(headers, CONNECTION, "upgrade")
        || !has_token(headers, UPGRADE, "websocket")
        || !has_token(headers, SEC_WEBSOCKET_VERSION, "13")
    {
        return Err((426, "this is the address of a WebSocket, version 13".into()));
    }
    let accept = headers
        .get(SEC_WEBSOCKET_KEY)
        .map(|key| derive_accept_key(key.as_bytes()))
        .and_then(|accept| HeaderValue::from_str(&accept).ok())
        .ok_or((400, "header Sec-WebSocket-Key is missing".to_owned()))?;
    let upgraded = hyper::upgrade::on(&mut request);
    let spawn_on = hub.clone();
    spawn_on.spawn(async move {
        // The connection counts until its session has ended.
        let _place = place;
        let parts = match upgraded.await.map(|u| u.downcast::<FuturesIo<Peer>>()) {
            Ok(Ok(parts)) => parts,
            Ok(Err(_)) => return log::error!("the connection under an upgrade is of another type"),
            Err(error) => return log::debug!("agent {agent_id}: upgrade failed: {error}"),
        };
        let socket = WebSocketStream::from_partially_read(
            parts.io.into_inner(),
            parts.read_buf.to_vec(),
            Role::Server,
            Some(websocket::config()),
        )
        .await;
        websocket::serve(hub, agent_id, tcp, socket).await;
    });
    let mut answer = Response::new(AnswerBody::Whole(None));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    Ok(answer)
}
