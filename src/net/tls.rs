//! TLS on a connection: system roots or only the given ones, optionally a client certificate.
//!
//! Reading the files, parsing the roots and the public-key operations take tens of milliseconds
//! on a small device, so all of it runs on a helper thread of the `blocking` pool. The handshake
//! has its own deadline there: nobody can take a helper thread away for good.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_native_tls::{Certificate, Identity, TlsConnector};
use futures_lite::future;
use openssl::pkey::PKey;
use smol::Timer;

use super::dial::Connection;
use crate::wire::Timestamp;

const PEM_BYTES_MAX: u64 = 1024 * 1024;

/// PEM files; all are read at each handshake.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    pub ca: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
}

impl TlsFiles {
    /// Reads all files, as a handshake would. Blocks.
    pub fn check(&self) -> Result<(), String> {
        self.connector().map(drop)
    }

    fn connector(&self) -> Result<TlsConnector, String> {
        let mut builder = native_tls::TlsConnector::builder();
        if let Some(path) = &self.ca {
            let roots = Certificate::stack_from_pem(&read(path, "HOSTLINK_CA_FILE")?)
                .map_err(|error| unreadable(path, "HOSTLINK_CA_FILE", &error.to_string()))?;
            if roots.is_empty() {
                return Err(unreadable(
                    path,
                    "HOSTLINK_CA_FILE",
                    "it holds no PEM certificate",
                ));
            }
            builder.disable_built_in_roots(true);
            for root in roots {
                builder.add_root_certificate(root);
            }
        }
        if let Some(path) = &self.client_cert {
            let key_path = self.client_key.as_ref().unwrap_or(path);
            let identity = identity(
                &read(path, "HOSTLINK_CLIENT_CERT")?,
                &read(key_path, "HOSTLINK_CLIENT_KEY")?,
            )
            .map_err(|reason| {
                format!(
                    "the client certificate {} with the key {} cannot be used: {reason} \
                     (HOSTLINK_CLIENT_CERT, HOSTLINK_CLIENT_KEY: PEM, the key not encrypted)",
                    path.display(),
                    key_path.display()
                )
            })?;
            builder.identity(identity);
        }
        Ok(TlsConnector::from(builder))
    }
}

/// Makes `stream` a TLS connection with the server `host`, whose certificate must be valid for it.
pub async fn handshake(
    files: &TlsFiles,
    host: &str,
    stream: Connection,
    timeout: Duration,
) -> Result<Connection, String> {
    let files = files.clone();
    let host = host.to_string();
    smol::unblock(move || {
        let connector = files.connector()?;
        smol::block_on(future::or(
            async {
                let connected = connector.connect(host.as_str(), stream).await;
                connected
                    .map(Connection::new)
                    .map_err(|error| explained(&super::error::with_causes(&error)))
            },
            async {
                Timer::after(timeout).await;
                Err(format!("the TLS handshake stood still for {timeout:?}"))
            },
        ))
    })
    .await
}

fn identity(certificates: &[u8], key: &[u8]) -> Result<Identity, String> {
    // With a passphrase given, OpenSSL never asks for one on a terminal.
    let key = PKey::private_key_from_pem_passphrase(key, b"")
        .and_then(|key| key.private_key_to_pem_pkcs8())
        .map_err(|error| format!("the key: {error}"))?;
    Identity::from_pkcs8(certificates, &key).map_err(|error| format!("the certificate: {error}"))
}

fn read(path: &Path, setting: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| unreadable(path, setting, &error.to_string()))?;
    if bytes.len() as u64 > PEM_BYTES_MAX {
        return Err(unreadable(path, setting, "it is larger than 1 MiB"));
    }
    Ok(bytes)
}

fn unreadable(path: &Path, setting: &str, reason: &str) -> String {
    format!("cannot use {} ({setting}): {reason}", path.display())
}

/// Adds what an operator can do about it. The reasons are the words of OpenSSL's verification.
fn explained(error: &str) -> String {
    let advice = if error.contains("not yet valid") {
        format!(
            "the device's clock says {}: set the clock",
            Timestamp::now()
        )
    } else if error.contains("has expired") {
        format!(
            "the device's clock says {}: if that is right, the server's certificate must be renewed",
            Timestamp::now()
        )
    } else if error.contains("unable to get local issuer")
        || error.contains("self-signed")
        || error.contains("self signed")
        || error.contains("unable to get issuer")
    {
        "the server's certificate is from an authority unknown here: name its CA certificate in \
         HOSTLINK_CA_FILE"
            .to_string()
    } else if error.contains("ostname mismatch") || error.contains("address mismatch") {
        "the server's certificate is for another name: the URL must use a name that is in it"
            .to_string()
    } else if error.contains("certificate required") || error.contains("alert bad certificate") {
        "the server wants a certificate of the device: HOSTLINK_CLIENT_CERT, HOSTLINK_CLIENT_KEY"
            .to_string()
    } else if error.contains("wrong version number") || error.contains("packet length too long") {
        "the server does not speak TLS on this port: check the URL's scheme and port".to_string()
    } else {
        return error.to_string();
    };
    format!("{advice} ({error})")
}
