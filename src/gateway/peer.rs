//! The connection under HTTP and WebSocket: plain TCP or TLS.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_native_tls::{TlsAcceptor, TlsStream};
use futures_lite::{AsyncRead, AsyncWrite};
use openssl::pkcs12::Pkcs12;
use openssl::pkey::PKey;
use openssl::stack::Stack;
use openssl::x509::X509;
use smol::net::TcpStream;

pub enum Peer {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Peer {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Peer::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Peer::Tls(stream) => Pin::new(stream.as_mut()).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Peer {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Peer::Plain(stream) => Pin::new(stream).poll_write(context, buffer),
            Peer::Tls(stream) => Pin::new(stream.as_mut()).poll_write(context, buffer),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Peer::Plain(stream) => Pin::new(stream).poll_flush(context),
            Peer::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(context),
        }
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Peer::Plain(stream) => Pin::new(stream).poll_close(context),
            Peer::Tls(stream) => Pin::new(stream.as_mut()).poll_close(context),
        }
    }
}

/// Reads certificate chain and key. The TLS library takes them as one PKCS#12 bag only.
pub async fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, String> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let chain = X509::stack_from_pem(&read(certificate)?)
        .map_err(|error| format!("{} is no PEM certificate: {error}", certificate.display()))?;
    let key_file = key;
    let key = PKey::private_key_from_pem(&read(key_file)?)
        .map_err(|error| format!("{} is no PEM private key: {error}", key_file.display()))?;
    let mut chain = chain.into_iter();
    let leaf = chain
        .next()
        .ok_or_else(|| format!("{} holds no certificate", certificate.display()))?;
    // The bag never leaves this function.
    let password = "gateway";
    let bag = || -> Result<Vec<u8>, openssl::error::ErrorStack> {
        let mut others = Stack::new()?;
        for certificate in chain {
            others.push(certificate)?;
        }
        let mut builder = Pkcs12::builder();
        builder.name("gateway").pkey(&key).cert(&leaf).ca(others);
        builder.build2(password)?.to_der()
    };
    let bag = bag().map_err(|error| {
        format!(
            "{} and {} do not fit together: {error}",
            certificate.display(),
            key_file.display()
        )
    })?;
    TlsAcceptor::new(bag.as_slice(), password)
        .await
        .map_err(|error| error.to_string())
}
