//! Who this device is: its key, its fingerprint and the id that the server gave it
//! (PROTOCOL.md 1).
//!
//! What a damaged file means differs. The key *is* the identity: a damaged one is an error for the
//! operator and never replaced. The id comes again with a registration. The fingerprint names the
//! device at a registration: it is searched for in a damaged file, and only if it cannot be found
//! there the file is set aside and the device gets a new one, since a device that does not come up
//! cannot be repaired. Where nothing can be written, what is missing is kept in memory.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use serde_json::Value;

use super::clock::ServerClock;
use super::signature::{self, Signer};
use super::state_file::{self, Content, Fields};
use crate::limits::NAME_BYTES_MAX;

const KEY_BITS: u32 = 2048;
const PEM_BEGIN: &str = "-----BEGIN RSA PRIVATE KEY-----";
const PEM_END: &str = "-----END RSA PRIVATE KEY-----";
const PEM_LINE_DIGITS: usize = 64;
const KEY_MODE: u32 = 0o600;
const FILE_MODE: u32 = 0o644;

/// Why the agent cannot be itself. The text names the path and the remedy.
#[derive(Debug)]
pub enum IdentityError {
    /// The key is there but cannot be used: an operator must decide (exit 78).
    BadKey(String),
    /// OpenSSL could not make a key or a name: no randomness, no memory.
    Crypto(ErrorStack),
    /// The agent id could not be written; it holds until the next start.
    NotStored(String),
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IdentityError::BadKey(text) | IdentityError::NotStored(text) => f.write_str(text),
            IdentityError::Crypto(error) => {
                write!(f, "cannot make an identity for the agent: {error}")
            }
        }
    }
}

impl std::error::Error for IdentityError {}

pub struct Identity {
    key: PKey<Private>,
    public_key_der: Vec<u8>,
    fingerprint: String,
    agent_id: Option<String>,
    agent_file: PathBuf,
}

/// Without the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint)
            .field("agent_id", &self.agent_id)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the files and creates what is missing. Making a key takes seconds on a small device;
    /// all of it runs on a helper thread.
    pub async fn load_or_create(
        state_directory: &Path,
        key_path: &Path,
        fingerprint_path: &Path,
    ) -> Result<Identity, IdentityError> {
        let agent_file = state_directory.join("agent.json");
        let key_path = key_path.to_path_buf();
        let fingerprint_path = fingerprint_path.to_path_buf();
        smol::unblock(move || {
            let key = load_or_create_key(&key_path)?;
            Ok(Identity {
                public_key_der: key.public_key_to_der().map_err(IdentityError::Crypto)?,
                key,
                fingerprint: load_or_create_fingerprint(&fingerprint_path)
                    .map_err(IdentityError::Crypto)?,
                agent_id: load_agent_id(&agent_file),
                agent_file,
            })
        })
        .await
    }

    /// `None` until the device is registered.
    pub fn agent_id(&self) -> Option<&str> {
        self.agent_id.as_deref()
    }

    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Base64 of the DER SubjectPublicKeyInfo, as a registration carries it.
    pub fn public_key_base64(&self) -> String {
        BASE64.encode(&self.public_key_der)
    }

    /// Takes the id that a registration gave and writes it; other keys of the file are kept. The
    /// id holds in memory even if it cannot be written. An id that could not be a header is refused.
    pub async fn store_agent_id(&mut self, agent_id: &str) -> Result<(), IdentityError> {
        let path = self.agent_file.clone();
        let not_stored = |reason: &str| {
            IdentityError::NotStored(format!(
                "cannot store the agent id in {}: {reason}",
                self.agent_file.display()
            ))
        };
        if !is_usable_name(agent_id) {
            return Err(not_stored(
                "the server gave an id that is empty, too long or not printable ASCII",
            ));
        }
        let id = agent_id.to_string();
        let stored = smol::unblock(move || store_field(&path, "agent_id", &id)).await;
        let result = stored.map_err(|error| not_stored(&error.to_string()));
        self.agent_id = Some(agent_id.to_string());
        result
    }

    /// `None` until the device is registered.
    pub fn signer(&self, clock: ServerClock) -> Option<Signer> {
        let agent_id = self.agent_id.as_deref()?;
        Some(Signer::new(agent_id, self.key.clone(), clock))
    }
}

fn load_or_create_key(path: &Path) -> Result<PKey<Private>, IdentityError> {
    let bad = |reason: &str| {
        IdentityError::BadKey(format!(
            "the agent's key {} cannot be used: {reason}. It is not replaced, since the server \
             knows this device by it: restore it from a backup, or move it away and start again to \
             register with a new key",
            path.display()
        ))
    };
    match state_file::read(path) {
        Ok(Some(pem)) => {
            warn_if_readable_by_others(path);
            usable_key(&pem).map_err(|reason| bad(&reason))
        }
        Ok(None) => {
            log::info!("making a new key, {}", path.display());
            let (key, pem) = new_key().map_err(IdentityError::Crypto)?;
            if let Err(error) = state_file::replace(path, &pem, KEY_MODE) {
                not_written("key", path, &error);
            }
            Ok(key)
        }
        Err(error) => Err(bad(&error.to_string())),
    }
}

fn new_key() -> Result<(PKey<Private>, Vec<u8>), ErrorStack> {
    let rsa = Rsa::generate(KEY_BITS)?;
    let pem = pem_of(&rsa.private_key_to_der()?);
    Ok((PKey::from_rsa(rsa)?, pem))
}

/// Reads PKCS#1 or PKCS#8 and proves that private and public part belong together: a key with a
/// few wrong bytes may still be readable.
fn usable_key(pem: &[u8]) -> Result<PKey<Private>, String> {
    let rsa = match pkcs1_of(pem).and_then(|der| Rsa::private_key_from_der(&der).ok()) {
        Some(rsa) => rsa,
        // With a passphrase given, OpenSSL never asks for one on a terminal.
        None => PKey::private_key_from_pem_passphrase(pem, b"")
            .map_err(|error| format!("it is no PEM private key ({error})"))?
            .rsa()
            .map_err(|_| "it is no RSA key".to_string())?,
    };
    proven(rsa)
        .ok()
        .flatten()
        .ok_or_else(|| "what it signs does not fit its own public key".to_string())
}

/// PEM of a key in PKCS#1. OpenSSL's own writer and reader of PEM, like its writer of public keys of
/// its providers, first set up every coder that it has, of every kind of key: 220 KiB that stay.
fn pem_of(der: &[u8]) -> Vec<u8> {
    let digits = BASE64.encode(der);
    let mut pem = format!("{PEM_BEGIN}\n");
    for (at, digit) in digits.char_indices() {
        if at > 0 && at.is_multiple_of(PEM_LINE_DIGITS) {
            pem.push('\n');
        }
        pem.push(digit);
    }
    pem.push('\n');
    pem.push_str(PEM_END);
    pem.push('\n');
    pem.into_bytes()
}

/// The key in PKCS#1 that stands in a PEM, unless it is encrypted.
fn pkcs1_of(pem: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(pem).ok()?;
    let (_, behind) = text.split_once(PEM_BEGIN)?;
    let (body, _) = behind.split_once(PEM_END)?;
    let digits: String = body.split_ascii_whitespace().collect();
    BASE64.decode(digits).ok()
}

/// The key, if its public part accepts what it signs.
fn proven(rsa: Rsa<Private>) -> Result<Option<PKey<Private>>, ErrorStack> {
    const PROBE: &str = "probe";
    let public = Rsa::from_public_components(rsa.n().to_owned()?, rsa.e().to_owned()?)?;
    let (key, public) = (PKey::from_rsa(rsa)?, PKey::from_rsa(public)?);
    let signature = signature::sign(&key, PROBE)?;
    let is_whole = signature::verify(&public, PROBE, &signature)?;
    Ok(is_whole.then_some(key))
}

fn warn_if_readable_by_others(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).map_or(KEY_MODE, |data| data.permissions().mode() & 0o777);
    if mode & 0o077 != 0 {
        log::warn!(
            "the agent's key {} has mode {mode:o} and should have 600: others may read it",
            path.display()
        );
    }
}

fn load_or_create_fingerprint(path: &Path) -> Result<String, ErrorStack> {
    let mut fields = Fields::new();
    match state_file::read_fields(path) {
        Ok(Content::Missing) => {}
        Ok(Content::Fields(found)) => {
            match found.get("fingerprint").and_then(Value::as_str) {
                Some(name) if is_usable_name(name) => return Ok(name.to_string()),
                _ => log::warn!(
                    "{} holds no usable fingerprint: the device gets a new one, and other keys of \
                     the file are kept",
                    path.display()
                ),
            }
            fields = found;
        }
        Ok(Content::Damaged(bytes, reason)) => {
            if let Some(name) = find_uuid(&bytes) {
                log::warn!(
                    "{} is damaged ({reason}); the fingerprint found in it is used",
                    path.display()
                );
                return Ok(name);
            }
            set_aside(path, &reason);
        }
        Err(error) => {
            log::error!(
                "cannot read the fingerprint {}: {error}. The device has a passing one until it \
                 can be read, and would register as a new device",
                path.display()
            );
            return new_uuid();
        }
    }
    let name = new_uuid()?;
    fields.insert("fingerprint".to_string(), Value::from(name.as_str()));
    if let Err(error) = write_fields(path, fields) {
        not_written("fingerprint", path, &error);
    }
    Ok(name)
}

fn load_agent_id(path: &Path) -> Option<String> {
    match state_file::read_fields(path) {
        Ok(Content::Missing) => None,
        Ok(Content::Fields(fields)) => {
            let id = fields.get("agent_id").and_then(Value::as_str)?;
            is_usable_name(id).then(|| id.to_string())
        }
        Ok(Content::Damaged(_, reason)) => {
            set_aside(path, &reason);
            None
        }
        Err(error) => {
            log::error!(
                "cannot read {}: {error}; the device registers again",
                path.display()
            );
            None
        }
    }
}

fn store_field(path: &Path, name: &str, value: &str) -> io::Result<()> {
    let mut fields = match state_file::read_fields(path) {
        Ok(Content::Fields(fields)) => fields,
        Ok(Content::Missing | Content::Damaged(..)) | Err(_) => Fields::new(),
    };
    fields.insert(name.to_string(), Value::from(value));
    write_fields(path, fields)
}

fn write_fields(path: &Path, fields: Fields) -> io::Result<()> {
    let mut text = Value::Object(fields).to_string();
    text.push('\n');
    state_file::replace(path, text.as_bytes(), FILE_MODE)
}

fn set_aside(path: &Path, reason: &str) {
    match state_file::set_aside(path) {
        Ok(kept) => log::warn!(
            "{} is damaged ({reason}): it is kept as {}, and the device registers again",
            path.display(),
            kept.display()
        ),
        Err(error) => log::warn!(
            "{} is damaged ({reason}) and cannot be moved away ({error})",
            path.display()
        ),
    }
}

fn not_written(what: &str, path: &Path, error: &io::Error) {
    log::error!(
        "cannot write the new {what} {}: {error}. It is kept in memory only: after a restart the \
         device has another one and registers as a new device. Make the directory writable",
        path.display()
    );
}

/// Fits into a header and into the text that is signed.
fn is_usable_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'|')
}

/// The first UUID in a file that cannot be read otherwise.
fn find_uuid(bytes: &[u8]) -> Option<String> {
    let is_uuid = |window: &&[u8]| {
        window.iter().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
    };
    let found = bytes.windows(36).find(is_uuid)?;
    std::str::from_utf8(found).ok().map(str::to_string)
}

/// A random UUID (RFC 9562 section 5.4).
fn new_uuid() -> Result<String, ErrorStack> {
    let mut bytes = [0u8; 16];
    openssl::rand::rand_bytes(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    Ok(parts.join("-"))
}

#[cfg(test)]
mod tests;
