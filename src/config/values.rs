//! How single values are written: `100ms`, `30s`, `5m`, `1h`; `true`, `yes`, `1`.

use std::ops::RangeInclusive;
use std::time::Duration;

/// The range of a duration that has none.
pub const ANY_TIME: RangeInclusive<Duration> =
    Duration::ZERO..=Duration::from_secs(10 * 366 * 24 * 3600);

/// A number with its unit; a bare `0` needs none.
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let millis = match unit.trim() {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "" if number == 0 => 1,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
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

/// Whether this is a URL of one of the schemes, with a host and without blanks.
pub fn is_url(text: &str, schemes: &[&str]) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else {
        return false;
    };
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    schemes
        .iter()
        .any(|known| scheme.eq_ignore_ascii_case(known))
        && !host.is_empty()
        && !host.starts_with(':')
        && !host.contains('@')
        && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// `user:password@` of a URL, masked.
pub fn without_password(url: &str, mask: &str) -> String {
    let start = url.find("://").map_or(0, |scheme| scheme + 3);
    match url[start..].rfind('@') {
        Some(at) => format!("{}{mask}{}", &url[..start], &url[start + at..]),
        None => url.to_owned(),
    }
}
