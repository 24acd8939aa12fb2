//! Who is asking: signatures of agents (PROTOCOL.md 1), the registration token, operators.
//!
//! The check is written here from the contract and not taken from the agent's signing code, so
//! that a mistake there does not verify itself. Nonces are remembered in memory only: a restart of
//! the gateway forgets them, and a request recorded less than 300 s ago would be taken once more.

use std::collections::HashMap;
use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Public};
use openssl::rsa::Padding;
use openssl::sign::{RsaPssSaltlen, Verifier};

use crate::limits::{GATEWAY_CLOCK_WINDOW, GATEWAY_NONCES_MAX, NAME_BYTES_MAX};

const NONCE_BYTES: usize = 16;
const RSA_BITS: std::ops::RangeInclusive<u32> = 2048..=8192;

/// The public key of a registration: base64 of a DER SubjectPublicKeyInfo.
pub fn parse_public_key(base64: &str) -> Result<PKey<Public>, String> {
    let der = STANDARD
        .decode(base64)
        .map_err(|error| format!("public_key is no base64: {error}"))?;
    let key = PKey::public_key_from_der(&der)
        .map_err(|error| format!("public_key is no DER SubjectPublicKeyInfo: {error}"))?;
    if key.rsa().is_err() || !RSA_BITS.contains(&key.bits()) {
        return Err("public_key is no RSA key of 2048 to 8192 bits".into());
    }
    Ok(key)
}

/// The four headers of a signed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    pub agent_id: String,
    pub timestamp: u64,
    pub nonce: [u8; NONCE_BYTES],
    signed_text: String,
    signature: Vec<u8>,
}

impl Signed {
    /// Reads the headers. The error names the first one that is missing or wrong.
    pub fn from_headers(headers: &HeaderMap) -> Result<Signed, String> {
        let get = |name: &str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .filter(|value| !value.is_empty() && value.len() <= 4 * NAME_BYTES_MAX)
                .ok_or_else(|| format!("header {name} is missing or unreadable"))
        };
        let agent_id = get("X-Agent-ID")?;
        let timestamp = get("X-Timestamp")?;
        let nonce = get("X-Nonce")?;
        let signature = STANDARD
            .decode(get("X-Signature")?)
            .map_err(|_| "header X-Signature is no base64")?;
        Ok(Signed {
            agent_id: agent_id.to_owned(),
            timestamp: timestamp
                .parse()
                .map_err(|_| "header X-Timestamp is no number of seconds")?,
            nonce: STANDARD
                .decode(nonce)
                .ok()
                .and_then(|nonce| nonce.try_into().ok())
                .ok_or("header X-Nonce is not 16 bytes in base64")?,
            signed_text: format!("{agent_id}|{timestamp}|{nonce}"),
            signature,
        })
    }

    /// Whether the timestamp is near enough to `now`, both Unix seconds.
    pub fn is_timely(&self, now: u64) -> bool {
        self.timestamp.abs_diff(now) <= GATEWAY_CLOCK_WINDOW.as_secs()
    }

    /// RSA-PSS, SHA-256, MGF1 SHA-256, salt of 32 bytes.
    pub fn verify(&self, key: &PKey<Public>) -> bool {
        let check = || -> Result<bool, openssl::error::ErrorStack> {
            let mut verifier = Verifier::new(MessageDigest::sha256(), key)?;
            verifier.set_rsa_padding(Padding::PKCS1_PSS)?;
            verifier.set_rsa_mgf1_md(MessageDigest::sha256())?;
            verifier.set_rsa_pss_saltlen(RsaPssSaltlen::custom(32))?;
            verifier.verify_oneshot(&self.signature, self.signed_text.as_bytes())
        };
        check().unwrap_or(false)
    }
}

/// What became of a nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonceVerdict {
    Fresh,
    Replayed,
    /// Too many are remembered; the agent has to wait for some to expire.
    Full,
}

/// Nonces of one agent whose timestamps are still in the window.
#[derive(Debug, Default)]
pub struct Nonces {
    expiry: HashMap<[u8; NONCE_BYTES], u64>,
}

impl Nonces {
    /// To be called after the signature was found good, so that only the agent itself can fill it.
    pub fn remember(&mut self, signed: &Signed, now: u64) -> NonceVerdict {
        if self.expiry.len() >= GATEWAY_NONCES_MAX {
            self.expiry.retain(|_, &mut expiry| expiry >= now);
        }
        if self.expiry.contains_key(&signed.nonce) {
            return NonceVerdict::Replayed;
        }
        if self.expiry.len() >= GATEWAY_NONCES_MAX {
            return NonceVerdict::Full;
        }
        let expiry = signed.timestamp + GATEWAY_CLOCK_WINDOW.as_secs();
        self.expiry.insert(signed.nonce, expiry);
        NonceVerdict::Fresh
    }
}

/// Compares secrets in a time that does not depend on where they differ.
pub fn same_secret(given: &str, expected: &str) -> bool {
    let digest = |text: &str| openssl::sha::sha256(text.as_bytes());
    openssl::memcmp::eq(&digest(given), &digest(expected))
}

/// Whether a request to the operator API is let in. The error is for the answer.
///
/// Without a token the peer must be on this machine, and must be no browser (a page from anywhere
/// can make one send requests) and no proxy (behind which everybody looks local).
pub fn check_operator(
    peer: IpAddr,
    headers: &HeaderMap,
    operator_token: Option<&str>,
) -> Result<(), &'static str> {
    if let Some(token) = operator_token {
        let given = headers
            .get(hyper::header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "));
        return match given {
            Some(given) if same_secret(given, token) => Ok(()),
            _ => Err("the operator token is missing or wrong"),
        };
    }
    if !peer.to_canonical().is_loopback() {
        return Err(
            "the operator API is for this machine only; start the gateway with an operator token",
        );
    }
    let foreign = ["origin", "sec-fetch-site", "forwarded", "x-forwarded-for"];
    if foreign.iter().any(|&name| headers.contains_key(name)) {
        return Err("browsers and proxies need an operator token");
    }
    Ok(())
}

/// `count` random bytes as lower-case hexadecimal digits.
pub fn random_hex(count: usize) -> Result<String, String> {
    let mut bytes = vec![0; count];
    openssl::rand::rand_bytes(&mut bytes)
        .map_err(|error| format!("the system has no random numbers: {error}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A random id in the form of a UUID.
pub fn random_id() -> Result<String, String> {
    let hex = random_hex(16)?;
    Ok(format!(
        "{}-{}-4{}-a{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[13..16],
        &hex[17..20],
        &hex[20..]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|&(name, value)| {
                let name = hyper::header::HeaderName::from_bytes(name.as_bytes()).unwrap();
                (name, HeaderValue::from_str(value).unwrap())
            })
            .collect()
    }

    #[test]
    fn operators_are_let_in_from_this_machine_or_with_the_token() {
        let check = |peer: &str, pairs: &[(&'static str, &str)], token: Option<&str>| {
            check_operator(peer.parse().unwrap(), &headers(pairs), token).is_ok()
        };
        assert!(check("127.0.0.1", &[], None));
        assert!(check("::1", &[], None));
        assert!(check("::ffff:127.0.0.9", &[], None));
        assert!(!check("192.168.0.4", &[], None));
        assert!(!check("::ffff:192.168.0.4", &[], None));
        assert!(!check("127.0.0.1", &[("origin", "http://x")], None));
        assert!(!check("127.0.0.1", &[("x-forwarded-for", "1.2.3.4")], None));
        let good = [("authorization", "Bearer secret")];
        assert!(check("192.168.0.4", &good, Some("secret")));
        assert!(!check("192.168.0.4", &good, Some("secret2")));
        assert!(!check(
            "192.168.0.4",
            &[("authorization", "secret")],
            Some("secret")
        ));
        assert!(!check("127.0.0.1", &[], Some("secret")));
    }

    #[test]
    fn a_nonce_counts_once_and_room_returns_when_nonces_expire() {
        let signed = |number: u64, timestamp| {
            let mut nonce = [0; NONCE_BYTES];
            nonce[..8].copy_from_slice(&number.to_le_bytes());
            Signed {
                agent_id: "a".into(),
                timestamp,
                nonce,
                signed_text: String::new(),
                signature: vec![],
            }
        };
        let mut nonces = Nonces::default();
        for number in 0..GATEWAY_NONCES_MAX as u64 {
            assert_eq!(
                nonces.remember(&signed(number, 1000), 1000),
                NonceVerdict::Fresh
            );
        }
        let replay = signed(7, 1000);
        assert_eq!(nonces.remember(&replay, 1000), NonceVerdict::Replayed);
        let next = signed(u64::MAX, 1300);
        assert_eq!(nonces.remember(&next, 1300), NonceVerdict::Full);
        assert_eq!(nonces.remember(&next, 1301), NonceVerdict::Fresh);
    }

    #[test]
    fn unreadable_headers_are_named() {
        let check = |pairs: &[(&'static str, &str)], expected: &str| {
            let error = Signed::from_headers(&headers(pairs)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check(&[], "X-Agent-ID");
        let id = ("x-agent-id", "a");
        check(&[id], "X-Timestamp");
        let time = ("x-timestamp", "-5");
        let nonce = ("x-nonce", "AAAAAAAAAAAAAAAAAAAAAA==");
        check(&[id, time, nonce, ("x-signature", "AA==")], "X-Timestamp");
        let time = ("x-timestamp", "5");
        check(
            &[id, time, ("x-nonce", "AA=="), ("x-signature", "AA==")],
            "X-Nonce",
        );
        check(&[id, time, nonce, ("x-signature", "%")], "X-Signature");
    }

    #[test]
    fn random_ids_are_uuids() {
        let id = random_id().unwrap();
        assert_eq!(id.len(), 36, "{id}");
        assert_ne!(id, random_id().unwrap());
    }
}
