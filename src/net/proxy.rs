//! Proxies: which one a URL goes through, and the tunnel through it.
//!
//! `HTTPS_PROXY` is for `https` and `wss`, `HTTP_PROXY` for `http` and `ws`. All but plain `http`
//! goes through a tunnel (`CONNECT`, RFC 9110 section 9.3.6). Loopback is never proxied.

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_lite::{AsyncReadExt, AsyncWriteExt};

use super::dial::Connection;
use super::error::{NetError, quoted};
use super::url::{Url, split_authority};
use crate::limits::RESPONSE_HEAD_BYTES_MAX;

/// Where a proxy is and how it is asked.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    pub tls: bool,
    pub host: String,
    pub port: u16,
    /// Value of `Proxy-Authorization`.
    pub authorization: Option<String>,
}

/// Without user and password.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        let (open, close) = if self.host.contains(':') {
            ("[", "]")
        } else {
            ("", "")
        };
        write!(f, "{scheme}://{open}{}{close}:{}", self.host, self.port)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Proxy {
    /// Reads `[http[s]://][user:password@]host[:port]`. Errors do not repeat the password.
    pub fn parse(text: &str) -> Result<Proxy, String> {
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            other => {
                return Err(format!(
                    "a proxy of the kind {other:?} cannot be used, only http and https"
                ));
            }
        };
        let rest = rest.find(['/', '?', '#']).map_or(rest, |end| &rest[..end]);
        let (user, authority) = match rest.rsplit_once('@') {
            Some((user, authority)) => (Some(user), authority),
            None => (None, rest),
        };
        let (host, port) = split_authority(authority)?;
        let authorization = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let mut credentials = percent_decoded(name);
            credentials.push(b':');
            credentials.extend(percent_decoded(password));
            format!("Basic {}", BASE64.encode(credentials))
        });
        Ok(Proxy {
            tls,
            host,
            port: port.unwrap_or(if tls { 443 } else { 3128 }),
            authorization,
        })
    }

    /// Asks for a tunnel to `target` (`host:port`) on a connection with the proxy.
    pub async fn tunnel(
        &self,
        mut stream: Connection,
        target: &str,
    ) -> Result<Connection, NetError> {
        let failed = |reason: String| {
            NetError::new(format!(
                "the proxy {self} opened no tunnel to {target}: {reason}"
            ))
        };
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(authorization) = &self.authorization {
            request.push_str("Proxy-Authorization: ");
            request.push_str(authorization);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        let asked = async {
            stream.write_all(request.as_bytes()).await?;
            stream.flush().await
        };
        asked.await.map_err(|error| failed(error.to_string()))?;
        let head = read_head(&mut stream).await.map_err(failed)?;
        let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
        match status_of(line) {
            Some(200..=299) => Ok(stream),
            Some(407) => Err(failed(
                "it wants a user and a password: write them into the proxy URL, \
                 http://user:password@host:port"
                    .to_string(),
            )),
            _ => Err(failed(format!("it answered {:?}", quoted(line)))),
        }
    }
}

/// Reads byte by byte up to the empty line, so that nothing of the tunnel's content is taken.
async fn read_head(stream: &mut Connection) -> Result<Vec<u8>, String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= RESPONSE_HEAD_BYTES_MAX {
            return Err(format!(
                "the head of its answer is longer than {RESPONSE_HEAD_BYTES_MAX} bytes"
            ));
        }
        match stream.read(&mut byte).await {
            Ok(0) => return Err("it closed the connection".to_string()),
            Ok(_) => head.push(byte[0]),
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(head)
}

fn status_of(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line).ok()?;
    let (version, rest) = line.split_once(' ')?;
    if !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return None;
    }
    let status = rest.split(' ').next()?;
    status.parse().ok().filter(|_| status.len() == 3)
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .filter(|hex| bytes[at] == b'%' && hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match hex {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    decoded
}

/// The proxy settings as they were given; a broken one is an error of the dials it is for.
#[derive(Debug, Clone)]
pub struct ProxyRules {
    https: Option<Result<Proxy, String>>,
    http: Option<Result<Proxy, String>>,
    exempt: Vec<Exempt>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Exempt {
    All,
    /// A host and what is below it. `only_below`: written with a leading dot or `*.`.
    Domain {
        name: String,
        only_below: bool,
        port: Option<u16>,
    },
    Network {
        address: IpAddr,
        prefix_bits: u32,
    },
}

impl ProxyRules {
    pub fn new(https: Option<&str>, http: Option<&str>, no_proxy: Option<&str>) -> ProxyRules {
        let parse = |text: Option<&str>| {
            text.filter(|text| !text.trim().is_empty())
                .map(Proxy::parse)
        };
        ProxyRules {
            https: parse(https),
            http: parse(http),
            exempt: no_proxy
                .unwrap_or_default()
                .split([',', ' '])
                .filter_map(Exempt::parse)
                .collect(),
        }
    }

    /// The first setting that cannot be used, named.
    pub fn check(&self) -> Result<(), String> {
        for (setting, proxy) in [("HTTPS_PROXY", &self.https), ("HTTP_PROXY", &self.http)] {
            if let Some(Err(reason)) = proxy {
                return Err(format!("{setting} cannot be used: {reason}"));
            }
        }
        Ok(())
    }

    /// The proxy for this URL, if any.
    pub fn proxy_for(&self, url: &Url) -> Result<Option<&Proxy>, String> {
        let (setting, proxy) = match url.tls {
            true => ("HTTPS_PROXY", &self.https),
            false => ("HTTP_PROXY", &self.http),
        };
        match proxy {
            None => Ok(None),
            Some(_) if self.is_exempt(&url.host, url.port) => Ok(None),
            Some(Ok(proxy)) => Ok(Some(proxy)),
            Some(Err(reason)) => Err(format!("{setting} cannot be used: {reason}")),
        }
    }

    fn is_exempt(&self, host: &str, port: u16) -> bool {
        let address = host.parse::<IpAddr>().ok();
        let is_loopback = address.map_or(host == "localhost", |address| address.is_loopback());
        is_loopback
            || self
                .exempt
                .iter()
                .any(|rule| rule.matches(host, address, port))
    }
}

impl Exempt {
    fn parse(rule: &str) -> Option<Exempt> {
        let rule = rule.trim().to_ascii_lowercase();
        if rule.is_empty() {
            return None;
        }
        if rule == "*" {
            return Some(Exempt::All);
        }
        let unbracketed = rule.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = unbracketed.parse::<IpAddr>() {
            let prefix_bits = if address.is_ipv4() { 32 } else { 128 };
            return Some(Exempt::Network {
                address,
                prefix_bits,
            });
        }
        if let Some((address, bits)) = rule.split_once('/') {
            let address = address.parse::<IpAddr>().ok()?;
            let bits = bits.parse().ok()?;
            let bits_max = if address.is_ipv4() { 32 } else { 128 };
            return (bits <= bits_max).then_some(Exempt::Network {
                address,
                prefix_bits: bits,
            });
        }
        let (name, port) = match rule.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok()?)),
            None => (rule.as_str(), None),
        };
        let below = name.strip_prefix("*.").or_else(|| name.strip_prefix('.'));
        Some(Exempt::Domain {
            name: below.unwrap_or(name).to_string(),
            only_below: below.is_some(),
            port,
        })
    }

    fn matches(&self, host: &str, host_address: Option<IpAddr>, host_port: u16) -> bool {
        match self {
            Exempt::All => true,
            Exempt::Domain {
                name,
                only_below,
                port,
            } => {
                let is_below = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|prefix| prefix.ends_with('.'));
                (is_below || (!only_below && host == name))
                    && port.is_none_or(|port| port == host_port)
            }
            Exempt::Network {
                address,
                prefix_bits,
            } => host_address.is_some_and(|host| in_network(host, *address, *prefix_bits)),
        }
    }
}

fn in_network(host: IpAddr, network: IpAddr, prefix_bits: u32) -> bool {
    match (host, network) {
        (IpAddr::V4(host), IpAddr::V4(network)) => {
            let mask = u32::MAX.checked_shl(32 - prefix_bits).unwrap_or(0);
            (host.to_bits() ^ network.to_bits()) & mask == 0
        }
        (IpAddr::V6(host), IpAddr::V6(network)) => {
            let mask = u128::MAX.checked_shl(128 - prefix_bits).unwrap_or(0);
            (host.to_bits() ^ network.to_bits()) & mask == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::url::Kind;

    #[test]
    fn proxy_urls_are_read_or_refused_and_never_shown_with_a_password() {
        let check = |text: &str, expected: &str, authorization: Option<&str>| {
            let proxy = Proxy::parse(text).expect(text);
            assert_eq!(proxy.to_string(), expected, "{text}");
            assert_eq!(format!("{proxy:?}"), expected, "{text}");
            let encoded = authorization.map(|text| format!("Basic {}", BASE64.encode(text)));
            assert_eq!(proxy.authorization, encoded, "{text}");
        };
        check("proxy:8080", "http://proxy:8080", None);
        check("http://proxy/", "http://proxy:3128", None);
        check("https://[::1]:9", "https://[::1]:9", None);
        check(
            "http://u%40d:p%3aw%zz@p:1",
            "http://p:1",
            Some("u@d:p:w%zz"),
        );
        check("http://u@p:1", "http://p:1", Some("u:"));
        for bad in [
            "socks5://u:secret@p",
            "http://u:secret@",
            "http://u:secret@p:x",
        ] {
            let why = Proxy::parse(bad).expect_err(bad);
            assert!(!why.contains("secret"), "{why}");
        }
    }

    #[test]
    fn exempt_hosts_go_directly() {
        let check = |no_proxy: &str, url: &str, direct: bool| {
            let rules = ProxyRules::new(Some("p:1"), Some("p:2"), Some(no_proxy));
            let kind = if url.starts_with("ws") {
                Kind::WebSocket
            } else {
                Kind::Http
            };
            let url = Url::parse(url, kind).expect(url);
            let proxy = rules.proxy_for(&url).expect("good proxies");
            assert_eq!(proxy.is_none(), direct, "{no_proxy} {url}");
        };
        check("", "https://a.example", false);
        check("", "http://localhost", true);
        check("", "http://127.8.8.8", true);
        check("", "ws://[::1]", true);
        check("*", "https://a.example", true);
        check("x, a.example", "wss://a.example", true);
        check("a.example", "https://b.a.example", true);
        check("a.example", "https://ba.example", false);
        check(".a.example", "https://a.example", false);
        check(".a.example", "https://b.a.example", true);
        check("*.a.example", "https://b.a.example", true);
        check("A.Example:444", "https://a.example:444", true);
        check("a.example:444", "https://a.example", false);
        check("10.0.0.0/8", "https://10.9.8.7", true);
        check("10.0.0.0/8", "https://11.9.8.7", false);
        check("0.0.0.0/0", "https://11.9.8.7", true);
        check("10.0.0.0/33", "https://10.0.0.0", false);
        check("fd00::/8", "https://[fd12::1]", true);
        check("[fd12::1]", "https://[fd12::1]", true);
        check("10.1.1.1", "https://10.1.1.1", true);
    }

    #[test]
    fn each_scheme_has_its_own_proxy_and_a_broken_one_is_named() {
        let rules = ProxyRules::new(Some("s:1"), Some("socks5://x"), None);
        let url = |text| Url::parse(text, Kind::Http).expect("good");
        let proxy = rules.proxy_for(&url("https://a")).expect("good").cloned();
        assert_eq!(proxy.map(|proxy| proxy.host), Some("s".to_string()));
        let why = rules.proxy_for(&url("http://a")).expect_err("broken");
        assert!(why.contains("HTTP_PROXY"), "{why}");
        assert!(rules.check().is_err());
    }
}
