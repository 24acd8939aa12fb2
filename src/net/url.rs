//! URLs of the settings: `http`, `https`, `ws` and `wss`, nothing else.
//!
//! A [`Url`] can be used without further checks: host and path hold visible ASCII only, so that
//! they cannot break out of a request line.

use std::fmt;
use std::net::Ipv6Addr;

use crate::wire::http::WEBSOCKET_PATH;

const URL_BYTES_MAX: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `http` and `https`: the base of all requests, without query.
    Http,
    /// `ws` and `wss`.
    WebSocket,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    pub kind: Kind,
    pub tls: bool,
    /// A name or an address, IPv6 without brackets.
    pub host: String,
    pub port: u16,
    /// Of the control plane: a prefix of all paths, empty or `/…` without a slash at the end.
    /// Of a WebSocket: path and query as requested.
    pub path: String,
}

impl Url {
    /// Errors say what is wrong and show an example; they do not repeat a password.
    pub fn parse(text: &str, kind: Kind) -> Result<Url, String> {
        let text = text.trim();
        let (plain, secure) = match kind {
            Kind::Http => ("http", "https"),
            Kind::WebSocket => ("ws", "wss"),
        };
        let example = format!("it should look like {secure}://control.example.com");
        if text.len() > URL_BYTES_MAX {
            return Err(format!("the URL is longer than {URL_BYTES_MAX} bytes"));
        }
        if let Some(bad) = text.chars().find(|c| !c.is_ascii_graphic()) {
            return Err(format!("the URL holds the character {bad:?}; {example}"));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(format!("the URL has no scheme; {example}"));
        };
        let tls = match scheme.to_ascii_lowercase() {
            scheme if scheme == plain => false,
            scheme if scheme == secure => true,
            other => return Err(format!("the scheme {other:?} cannot be used; {example}")),
        };
        let (authority, path) = match rest.find(['/', '?', '#']) {
            Some(end) => rest.split_at(end),
            None => (rest, ""),
        };
        if authority.contains('@') {
            return Err(format!("a user or password has no place here; {example}"));
        }
        if path.contains('#') {
            return Err(format!("a fragment (#) has no place here; {example}"));
        }
        let path = match kind {
            Kind::Http if path.contains('?') => {
                return Err(format!("a query (?) has no place here; {example}"));
            }
            Kind::Http => path.trim_end_matches('/').to_string(),
            Kind::WebSocket if path.starts_with('/') => path.to_string(),
            Kind::WebSocket => format!("/{path}"),
        };
        let (host, port) = split_authority(authority)
            .map_err(|reason| format!("{reason} in {authority:?}; {example}"))?;
        Ok(Url {
            kind,
            tls,
            host,
            port: port.unwrap_or(default_port(tls)),
            path,
        })
    }

    /// Where the WebSocket of this control plane is (PROTOCOL.md 3).
    pub fn websocket(&self) -> Url {
        Url {
            kind: Kind::WebSocket,
            path: format!("{}{WEBSOCKET_PATH}", self.path),
            ..self.clone()
        }
    }

    /// Value of `Host`: the port only if it is not the usual one.
    pub fn authority(&self) -> String {
        if self.port == default_port(self.tls) {
            bracketed(&self.host)
        } else {
            self.host_and_port()
        }
    }

    /// As `CONNECT` wants it: always with port.
    pub fn host_and_port(&self) -> String {
        format!("{}:{}", bracketed(&self.host), self.port)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match (self.kind, self.tls) {
            (Kind::Http, false) => "http",
            (Kind::Http, true) => "https",
            (Kind::WebSocket, false) => "ws",
            (Kind::WebSocket, true) => "wss",
        };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn default_port(tls: bool) -> u16 {
    if tls { 443 } else { 80 }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_string()
    }
}

/// Host (IPv6 without brackets) and port of `host`, `host:port`, `[v6]` or `[v6]:port`.
pub(super) fn split_authority(authority: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or("a bracket is not closed")?;
            if address.parse::<Ipv6Addr>().is_err() {
                return Err("no IPv6 address is between the brackets");
            }
            let port = match after {
                "" => None,
                after => Some(
                    after
                        .strip_prefix(':')
                        .ok_or("no port follows the bracket")?,
                ),
            };
            (address, port)
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':');
    if host.is_empty() || host.len() > 255 || !host.chars().all(is_name) {
        return Err("there is no usable host name");
    }
    let port = match port {
        None | Some("") => None,
        Some(digits) => match digits.parse::<u16>() {
            Ok(port) if port > 0 && !digits.starts_with('+') => Some(port),
            _ => return Err("the port is no number from 1 to 65535"),
        },
    };
    Ok((host.to_ascii_lowercase(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, kind: Kind, expected: &str) {
        match Url::parse(text, kind) {
            Ok(url) => assert_eq!(
                format!("{} {} {} {}", url.tls, url.host, url.port, url.path),
                expected,
                "{text}"
            ),
            Err(why) => assert!(
                expected == "error" && why.contains("://"),
                "{text}: expected {expected}, got {why}"
            ),
        }
    }

    #[test]
    fn urls_are_read_or_refused() {
        use Kind::{Http, WebSocket};
        check("https://a.example", Http, "true a.example 443 ");
        check(" HTTP://A.example:8080/ ", Http, "false a.example 8080 ");
        check("https://a/base/", Http, "true a 443 /base");
        check("http://[::1]:9", Http, "false ::1 9 ");
        check("http://[fe80::1]", Http, "false fe80::1 80 ");
        check("wss://a/x?y=1", WebSocket, "true a 443 /x?y=1");
        check("ws://a:1", WebSocket, "false a 1 /");
        for bad in [
            "",
            "a.example",
            "ftp://a",
            "https://",
            "https://:80",
            "https://a:0",
            "https://a:65536",
            "https://a:+1",
            "https://user:secret@a",
            "https://a/?q",
            "https://a/#f",
            "https://::1",
            "https://[::1",
            "https://[::g]",
            "https://[::1]80",
            "https://a\r\nX: y",
            "https://\u{fc}.example",
            "ws://a",
        ] {
            check(bad, Http, "error");
        }
        check("https://a", WebSocket, "error");
    }

    #[test]
    fn a_refusal_does_not_repeat_a_password() {
        let why = Url::parse("https://user:secret@a", Kind::Http).expect_err("refused");
        assert!(!why.contains("secret"), "{why}");
    }

    #[test]
    fn the_websocket_is_below_the_control_plane() {
        let url = Url::parse("https://[::1]:8443/base/", Kind::Http).expect("good");
        assert_eq!(
            url.websocket().to_string(),
            "wss://[::1]:8443/base/api/v1/agents/ws"
        );
        let url = Url::parse("http://a:80", Kind::Http).expect("good");
        assert_eq!(url.authority(), "a");
        assert_eq!(url.host_and_port(), "a:80");
    }
}
