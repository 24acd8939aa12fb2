//! Headers that authenticate a request (PROTOCOL.md 1).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{Id, PKey, Private, Public};
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Signer as OpensslSigner, Verifier};

use super::clock::ServerClock;
use super::error::NetError;

pub const AGENT_ID_HEADER: &str = "X-Agent-ID";
pub const TIMESTAMP_HEADER: &str = "X-Timestamp";
pub const NONCE_HEADER: &str = "X-Nonce";
pub const SIGNATURE_HEADER: &str = "X-Signature";

const SALT_BYTES: i32 = 32;
const NONCE_BYTES: usize = 16;

/// Signs requests as one agent, with the server's time.
#[derive(Clone)]
pub struct Signer {
    agent_id: String,
    key: PKey<Private>,
    clock: ServerClock,
}

impl Signer {
    pub fn new(agent_id: impl Into<String>, key: PKey<Private>, clock: ServerClock) -> Signer {
        Signer {
            agent_id: agent_id.into(),
            key,
            clock,
        }
    }

    pub fn agent_id(&self) -> &str {
        &self.agent_id
    }

    pub fn clock(&self) -> &ServerClock {
        &self.clock
    }

    /// Fresh headers for one request. Fails only if OpenSSL does: no entropy, no memory.
    pub fn headers(&self) -> Result<[(&'static str, String); 4], NetError> {
        let mut nonce = [0; NONCE_BYTES];
        let timestamp = self.clock.now_unix().to_string();
        let signed = openssl::rand::rand_bytes(&mut nonce).and_then(|()| {
            let nonce = BASE64.encode(nonce);
            let signature = sign(&self.key, &signed_text(&self.agent_id, &timestamp, &nonce))?;
            Ok((nonce, BASE64.encode(signature)))
        });
        let (nonce, signature) = signed.map_err(|error| {
            NetError::new(format!(
                "cannot sign a request with the agent's key: {error}"
            ))
        })?;
        Ok([
            (AGENT_ID_HEADER, self.agent_id.clone()),
            (TIMESTAMP_HEADER, timestamp),
            (NONCE_HEADER, nonce),
            (SIGNATURE_HEADER, signature),
        ])
    }
}

/// Without the key.
impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("agent_id", &self.agent_id)
            .finish_non_exhaustive()
    }
}

/// Checks the headers of a request. `public_key_der` is the SubjectPublicKeyInfo that the agent
/// registered; a nonce that was used before is the caller's to refuse. Malformed input is `false`.
pub fn verify_signature(
    public_key_der: &[u8],
    agent_id: &str,
    timestamp: &str,
    nonce: &str,
    signature: &str,
) -> bool {
    let check = || -> Option<bool> {
        let key = PKey::public_key_from_der(public_key_der).ok()?;
        let signature = BASE64.decode(signature).ok()?;
        if key.id() != Id::RSA {
            return None;
        }
        let text = signed_text(agent_id, timestamp, nonce);
        verify(&key, &text, &signature).ok()
    };
    check().unwrap_or(false)
}

/// RSA-PSS with SHA-256, MGF1 SHA-256 and a salt of 32 bytes.
pub(super) fn sign(key: &PKey<Private>, text: &str) -> Result<Vec<u8>, ErrorStack> {
    let mut signer = OpensslSigner::new(MessageDigest::sha256(), key)?;
    signer.set_rsa_padding(Padding::PKCS1_PSS)?;
    signer.set_rsa_mgf1_md(MessageDigest::sha256())?;
    signer.set_rsa_pss_saltlen(RsaPssSaltlen::custom(SALT_BYTES))?;
    signer.sign_oneshot_to_vec(text.as_bytes())
}

/// Whether [`sign`] made this signature, with the private part of this key.
pub(super) fn verify(key: &PKey<Public>, text: &str, signature: &[u8]) -> Result<bool, ErrorStack> {
    let mut verifier = Verifier::new(MessageDigest::sha256(), key)?;
    verifier.set_rsa_padding(Padding::PKCS1_PSS)?;
    verifier.set_rsa_mgf1_md(MessageDigest::sha256())?;
    verifier.set_rsa_pss_saltlen(RsaPssSaltlen::custom(SALT_BYTES))?;
    verifier.verify_oneshot(signature, text.as_bytes())
}

fn signed_text(agent_id: &str, timestamp: &str, nonce: &str) -> String {
    format!("{agent_id}|{timestamp}|{nonce}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing;

    #[test]
    fn headers_verify_and_any_change_breaks_them() {
        let signer = testing::signer("agent-1", "http://a");
        let [(_, id), (_, timestamp), (_, nonce), (_, signature)] =
            signer.headers().expect("signed");
        let key = testing::key().public_key_to_der().expect("der");
        let check = |key: &[u8], id: &str, timestamp: &str, nonce: &str, signature: &str| {
            verify_signature(key, id, timestamp, nonce, signature)
        };
        assert!(check(&key, &id, &timestamp, &nonce, &signature));
        assert_eq!(BASE64.decode(&nonce).expect("base64").len(), NONCE_BYTES);
        assert!(!check(&key, "agent-2", &timestamp, &nonce, &signature));
        assert!(!check(&key, &id, "0", &nonce, &signature));
        assert!(!check(&key, &id, &timestamp, "", &signature));
        assert!(!check(&key, &id, &timestamp, &nonce, ""));
        assert!(!check(&key, &id, &timestamp, &nonce, "no base64!"));
        assert!(!check(b"no key", &id, &timestamp, &nonce, &signature));
        let other = openssl::rsa::Rsa::generate(2048).expect("key");
        let other = other.public_key_to_der().expect("der");
        assert!(!check(&other, &id, &timestamp, &nonce, &signature));
    }

    #[test]
    fn every_request_has_its_own_nonce() {
        let signer = testing::signer("agent-1", "http://a");
        let nonce = || signer.headers().expect("signed")[2].1.clone();
        assert_ne!(nonce(), nonce());
    }

    #[test]
    fn debug_shows_no_key() {
        let text = format!("{:?}", testing::signer("agent-1", "http://a"));
        assert_eq!(text, "Signer { agent_id: \"agent-1\", .. }");
    }
}
