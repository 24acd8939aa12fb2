//! How single values are written: `100ms`, `30s`, `5m`, `1h`; `true`, `yes`, `1`.

use std::net::Ipv6Addr;
use std::num::IntErrorKind;
use std::ops::RangeInclusive;
use std::time::Duration;

const URL_BYTES_MAX: usize = 2048;
const HOST_BYTES_MAX: usize = 255;

/// The range of a duration that has none.
pub const ANY_TIME: RangeInclusive<Duration> =
    Duration::ZERO..=Duration::from_secs(10 * 366 * 24 * 3600);

/// A decimal number. One that no integer holds is the largest: too large, but not unreadable.
pub fn number(text: &str) -> Option<u64> {
    match text.parse() {
        Ok(number) => Some(number),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Some(u64::MAX),
        Err(_) => None,
    }
}

/// A number with its unit; a bare `0` needs none. As with [`number`], the largest if it overflows.
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, unit) = text.split_at(digits);
    let number = number(digits)?;
    let millis = match unit.trim() {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "" if number == 0 => 1,
        _ => return None,
    };
    Some(Duration::from_millis(number.saturating_mul(millis)))
}

/// The inverse of [`duration`], in the largest unit that is exact.
pub fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    for (unit, name) in [(3_600_000, "h"), (60_000, "m"), (1000, "s")] {
        if millis >= unit && millis.is_multiple_of(unit) {
            return format!("{}{name}", millis / unit);
        }
    }
    match millis {
        0 => "0".to_owned(),
        _ => format!("{millis}ms"),
    }
}

pub fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Some(true),
        "false" | "0" | "no" => Some(false),
        _ => None,
    }
}

/// Whether this is a URL that the agent can use: one of the schemes, a host, perhaps a port, no user
/// and no fragment. As strict as the network layer, so that `config --check` promises a start.
pub fn is_url(text: &str, schemes: &[&str]) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else {
        return false;
    };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    // Paths are appended to the control plane's URL, so that it cannot end in a query.
    let forbidden: &[char] = if schemes.contains(&"http") {
        &['#', '?']
    } else {
        &['#']
    };
    text.len() <= URL_BYTES_MAX
        && text.bytes().all(|byte| byte.is_ascii_graphic())
        && schemes
            .iter()
            .any(|known| scheme.eq_ignore_ascii_case(known))
        && is_authority(authority)
        && !path.contains(forbidden)
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn is_authority(text: &str) -> bool {
    let (is_host, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, "")) => (address.parse::<Ipv6Addr>().is_ok(), ""),
            Some((address, after)) => match after.strip_prefix(':') {
                Some(port) => (address.parse::<Ipv6Addr>().is_ok(), port),
                None => return false,
            },
            None => return false,
        },
        None => {
            let (host, port) = text.split_once(':').unwrap_or((text, ""));
            let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            let fits = (1..=HOST_BYTES_MAX).contains(&host.len());
            (fits && host.bytes().all(is_name), port)
        }
    };
    let is_port = port.is_empty()
        || port.bytes().all(|byte| byte.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port > 0);
    is_host && is_port
}

/// `user:password@` of a URL, masked.
pub fn without_password(url: &str, mask: &str) -> String {
    let start = url.find("://").map_or(0, |scheme| scheme + 3);
    match url[start..].rfind('@') {
        Some(at) => format!("{}{mask}{}", &url[..start], &url[start + at..]),
        None => url.to_owned(),
    }
}
