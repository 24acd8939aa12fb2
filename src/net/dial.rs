//! From a URL to a connected byte stream: resolve, connect, proxy, TLS.
//!
//! One deadline covers all steps; an error names the step that failed or stood still.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_io::Async;
use futures_lite::{AsyncRead, AsyncWrite, future};
use rustix::net::sockopt;
use smol::Timer;

use super::error::NetError;
use super::proxy::{Proxy, ProxyRules};
use super::tls::{self, TlsFiles};
use super::url::Url;
use super::{Settings, Timeouts};
use crate::limits::{
    CONNECT_ADDRESSES_MAX, CONNECT_STAGGER, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES,
    TCP_USER_TIMEOUT,
};

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connected byte stream: TCP or TLS, direct or through a proxy.
pub struct Connection(Box<dyn Stream>);

impl Connection {
    pub fn new(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Connection {
        Connection(Box::new(stream))
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connection")
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

/// A connection for HTTP requests. With a proxy and without TLS the proxy reads the requests: they
/// name the whole URL.
#[derive(Debug)]
pub struct HttpConnection {
    pub stream: Connection,
    pub forwarded_by: Option<Proxy>,
}

/// Opens connections as the settings say.
#[derive(Debug)]
pub struct Dialer {
    settings: Settings,
    files: TlsFiles,
    proxies: ProxyRules,
}

impl Dialer {
    /// Reads no file: what is wrong with one is an error of the dials that need it, since it may
    /// be there at the next one. [`Dialer::check`] tells at once.
    pub fn new(settings: Settings) -> Dialer {
        Dialer {
            files: TlsFiles {
                ca: settings.ca_file.clone(),
                client_cert: settings.client_cert.clone(),
                client_key: settings.client_key.clone(),
            },
            proxies: ProxyRules::new(
                settings.https_proxy.as_deref(),
                settings.http_proxy.as_deref(),
                settings.no_proxy.as_deref(),
            ),
            settings,
        }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn timeouts(&self) -> &Timeouts {
        &self.settings.timeouts
    }

    /// Whether certificate files and proxies can be used. Reads the files and blocks.
    pub fn check(&self) -> Result<(), String> {
        self.proxies.check()?;
        self.files.check()
    }

    /// A stream to the server itself, through a tunnel if there is a proxy.
    pub async fn connect(&self, url: &Url) -> Result<Connection, NetError> {
        let connection = self.dial(url, true).await?;
        Ok(connection.stream)
    }

    /// As [`Dialer::connect`], but plain `http` uses a proxy as HTTP does: without a tunnel.
    pub async fn connect_http(&self, url: &Url) -> Result<HttpConnection, NetError> {
        self.dial(url, url.tls).await
    }

    async fn dial(&self, url: &Url, tunnel: bool) -> Result<HttpConnection, NetError> {
        let timeout = self.settings.timeouts.connect;
        let step = RefCell::new(String::new());
        let failed = |reason: &str| {
            NetError::new(format!(
                "cannot connect to {url}: {}: {reason}",
                step.borrow()
            ))
        };
        let steps = async {
            let Some(proxy) = self
                .proxies
                .proxy_for(url)
                .map_err(|reason| NetError::new(format!("cannot connect to {url}: {reason}")))?
            else {
                *step.borrow_mut() = format!("connecting to {}", url.host_and_port());
                let stream = tcp(&url.host, url.port).await.map_err(|e| failed(&e))?;
                return self.secured(url, stream, &step).await.map(direct);
            };
            *step.borrow_mut() = format!("connecting to the proxy {proxy}");
            let mut stream = tcp(&proxy.host, proxy.port).await.map_err(|e| failed(&e))?;
            if proxy.tls {
                *step.borrow_mut() = format!("TLS with the proxy {proxy}");
                stream = tls::handshake(&self.files, &proxy.host, stream, timeout)
                    .await
                    .map_err(|e| failed(&e))?;
            }
            if !tunnel {
                return Ok(HttpConnection {
                    stream,
                    forwarded_by: Some(proxy.clone()),
                });
            }
            *step.borrow_mut() = format!("asking the proxy {proxy} for a tunnel");
            let stream = proxy.tunnel(stream, &url.host_and_port()).await?;
            self.secured(url, stream, &step).await.map(direct)
        };
        future::or(steps, async {
            Timer::after(timeout).await;
            Err(failed(&format!("no result within {timeout:?}")))
        })
        .await
    }

    async fn secured(
        &self,
        url: &Url,
        stream: Connection,
        step: &RefCell<String>,
    ) -> Result<Connection, NetError> {
        if !url.tls {
            return Ok(stream);
        }
        *step.borrow_mut() = format!("TLS with {}", url.host_and_port());
        tls::handshake(
            &self.files,
            &url.host,
            stream,
            self.settings.timeouts.connect,
        )
        .await
        .map_err(|reason| NetError::new(format!("cannot connect to {url}: TLS: {reason}")))
    }
}

fn direct(stream: Connection) -> HttpConnection {
    HttpConnection {
        stream,
        forwarded_by: None,
    }
}

/// Resolves and connects; the first address that answers wins.
async fn tcp(host: &str, port: u16) -> Result<Connection, String> {
    let addresses = match host.parse::<IpAddr>() {
        Ok(address) => vec![SocketAddr::new(address, port)],
        Err(_) => smol::net::resolve((host, port))
            .await
            .map_err(|error| format!("the name {host} cannot be resolved: {error}"))?,
    };
    if addresses.is_empty() {
        return Err(format!("the name {host} has no address"));
    }
    let mut attempts: Vec<Attempt> = Vec::new();
    for address in alternating(addresses) {
        attempts.push(Box::pin(async move {
            let stream = Async::<TcpStream>::connect(address)
                .await
                .map_err(|error| format!("{address}: {error}"))?;
            set_options(&stream).map_err(|error| format!("{address}: {error}"))?;
            Ok(Connection::new(stream))
        }));
    }
    first_success(attempts, CONNECT_STAGGER).await
}

type Attempt = Pin<Box<dyn Future<Output = Result<Connection, String>>>>;

/// Address families in turn, beginning with the resolver's first choice (RFC 8305 section 4).
fn alternating(addresses: Vec<SocketAddr>) -> impl Iterator<Item = SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (preferred, others): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|address| address.is_ipv6() == first_is_v6);
    let length = preferred.len().max(others.len());
    (0..length)
        .flat_map(move |at| [preferred.get(at).copied(), others.get(at).copied()])
        .flatten()
        .take(CONNECT_ADDRESSES_MAX)
}

/// Starts one attempt after the other, the next one when the last has failed or has been tried
/// for `stagger`, and drops all others when one succeeds (RFC 8305 section 5).
async fn first_success(attempts: Vec<Attempt>, stagger: Duration) -> Result<Connection, String> {
    let mut waiting = attempts.into_iter();
    let mut running: Vec<Attempt> = Vec::new();
    let mut failures: Vec<String> = Vec::new();
    let mut next_start = Timer::after(Duration::ZERO);
    future::poll_fn(move |cx| {
        loop {
            let mut at = 0;
            while at < running.len() {
                match running[at].as_mut().poll(cx) {
                    Poll::Ready(Ok(connection)) => return Poll::Ready(Ok(connection)),
                    Poll::Ready(Err(failure)) => {
                        failures.push(failure);
                        drop(running.remove(at));
                    }
                    Poll::Pending => at += 1,
                }
            }
            let is_time = running.is_empty() || Pin::new(&mut next_start).poll(cx).is_ready();
            match is_time.then(|| waiting.next()).flatten() {
                Some(attempt) => {
                    running.push(attempt);
                    next_start = Timer::after(stagger);
                }
                None if running.is_empty() => return Poll::Ready(Err(failures.join("; "))),
                None => return Poll::Pending,
            }
        }
    })
    .await
}

/// Small frames leave at once; a peer that has vanished is noticed even by a connection on which
/// nothing is sent, and within a minute by one that has unacknowledged data.
fn set_options(stream: &Async<TcpStream>) -> io::Result<()> {
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(stream, TCP_USER_TIMEOUT.as_millis() as u32)?;
    Ok(())
}

#[cfg(test)]
mod tests;
