//! What was typed: the environment over the lines of a file, and every complaint about it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use rustix::fs::{Mode, OFlags};

use super::keys::{KEYS, OF_TASKS, PREFIX, is_secret, may_hold_password};
use super::{DEFAULT_FILE, Effective, MASK, Source, Warning, values};
use crate::limits::KIB;

/// A larger file is not a settings file.
const FILE_BYTES_MAX: u64 = 256 * KIB as u64;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Longer values are cut where they are shown.
const SHOWN_CHARACTERS: usize = 200;

/// Reads values one by one and notes what each became.
pub struct Reader {
    given: BTreeMap<String, (String, Source)>,
    effective: BTreeMap<&'static str, (String, Source)>,
    warnings: Vec<Warning>,
}

impl Reader {
    pub fn new(
        environment: impl Iterator<Item = (OsString, OsString)>,
        named_file: Option<&Path>,
    ) -> Reader {
        let mut reader = Reader {
            given: BTreeMap::new(),
            effective: BTreeMap::new(),
            warnings: Vec::new(),
        };
        reader.read_file(named_file);
        for (key, value) in environment {
            let Ok(key) = key.into_string() else {
                continue;
            };
            if !KEYS.contains(&key.as_str()) && !key.starts_with(PREFIX) {
                continue;
            }
            match value.into_string() {
                Ok(value) => {
                    reader.given.insert(key, (value, Source::Environment));
                }
                Err(_) => reader.warn(format!("{key} is no UTF-8 text and was ignored")),
            }
        }
        reader
    }

    fn read_file(&mut self, named: Option<&Path>) {
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let mut text = Vec::new();
        let read = open_at_once(path)
            .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text));
        match read {
            Ok(_) => {}
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                let path = path.display();
                self.warn(format!("cannot read the settings file {path}: {error}"));
                return;
            }
        }
        if text.len() as u64 > FILE_BYTES_MAX {
            let path = path.display();
            self.warn(format!(
                "the settings file {path} is larger than {FILE_BYTES_MAX} bytes and was ignored"
            ));
            return;
        }
        // Editors of other systems put a mark in front and write other alphabets into comments:
        // neither may cost the lines that can be read.
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            match parse_line(line) {
                Line::Nothing => {}
                Line::Pair(key, value) => {
                    self.given.insert(key, (value, Source::File));
                }
                Line::Unreadable => self.warn(format!(
                    "line {} of {} is no KEY=VALUE and was ignored",
                    index + 1,
                    path.display()
                )),
            }
        }
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(Warning(text));
    }

    /// The value as given; an empty one counts as not given.
    fn get(&self, key: &str) -> Option<(String, Source)> {
        self.given
            .get(key)
            .filter(|(value, _)| !value.trim().is_empty())
            .map(|(value, source)| (value.trim().to_owned(), *source))
    }

    fn note(&mut self, key: &'static str, value: String, source: Source) {
        debug_assert!(KEYS.contains(&key), "{key} is missing in the table");
        self.effective.insert(key, (value, source));
    }

    /// Reads a value with `parse`; one that cannot be read is replaced by the default.
    fn read<T>(
        &mut self,
        key: &'static str,
        default: T,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
        show: impl Fn(&T) -> String,
    ) -> T {
        let (value, source) = match self.get(key) {
            None => (default, Source::Default),
            Some((text, source)) => match parse(&text) {
                Some(value) => (value, source),
                None => {
                    let default_text = show(&default);
                    self.warn(format!(
                        "{key}={} is not {expected}; the default {default_text} is used",
                        shown(key, &text)
                    ));
                    (default, Source::Default)
                }
            },
        };
        self.note(key, show(&value), source);
        value
    }

    /// As [`Reader::read`], and a value out of range is clamped.
    fn read_in_range<T: PartialOrd + Copy>(
        &mut self,
        key: &'static str,
        default: T,
        range: &RangeInclusive<T>,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
        show: impl Fn(&T) -> String,
    ) -> T {
        let bounds = format!("({} to {})", show(range.start()), show(range.end()));
        let expected = format!("{expected} {bounds}");
        let value = self.read(key, default, &expected, parse, &show);
        let clamped = if value < *range.start() {
            *range.start()
        } else if value > *range.end() {
            *range.end()
        } else {
            return value;
        };
        let given = self
            .get(key)
            .map_or(show(&value), |(text, _)| shown(key, &text));
        self.warn(format!(
            "{key}={given} is out of range {bounds}; {} is used",
            show(&clamped)
        ));
        self.change(key, show(&clamped));
        clamped
    }

    fn change(&mut self, key: &'static str, value: String) {
        if let Some(entry) = self.effective.get_mut(key) {
            entry.0 = value;
        }
    }

    pub fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        let expected = "true/1/yes or false/0/no";
        self.read(key, default, expected, values::boolean, bool::to_string)
    }

    pub fn duration(
        &mut self,
        key: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        self.duration_as(key, default, &range, DURATION)
    }

    fn duration_as(
        &mut self,
        key: &'static str,
        default: Duration,
        range: &RangeInclusive<Duration>,
        expected: &str,
    ) -> Duration {
        let show = |value: &Duration| values::show_duration(*value);
        self.read_in_range(key, default, range, expected, values::duration, show)
    }

    /// As [`Reader::duration`], and 0 switches it off.
    pub fn duration_or_off(
        &mut self,
        key: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        match self.get(key) {
            Some((text, source)) if values::duration(&text) == Some(Duration::ZERO) => {
                self.note(key, "0".to_owned(), source);
                Duration::ZERO
            }
            _ => self.duration_as(key, default, &range, &format!("0 for off or {DURATION}")),
        }
    }

    pub fn bytes(&mut self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
        self.read_in_range(
            key,
            default,
            &range,
            "a number of bytes",
            values::number,
            u64::to_string,
        )
    }

    /// A number, or 0 for no bound.
    pub fn number_or_off(
        &mut self,
        key: &'static str,
        expected: &str,
        range: RangeInclusive<u64>,
    ) -> u64 {
        match self.get(key) {
            Some((text, _)) if values::number(&text) != Some(0) => {
                let expected = format!("0 for no bound or {expected}");
                let show = u64::to_string;
                // What cannot be read bounds nothing, as if it were not there.
                let parse = |text: &str| values::number(text);
                match parse(&text) {
                    Some(_) => self.read_in_range(key, 0, &range, &expected, parse, show),
                    None => self.read(key, 0, &expected, parse, show),
                }
            }
            given => {
                let source = given.map_or(Source::Default, |(_, source)| source);
                self.note(key, "0".to_owned(), source);
                0
            }
        }
    }

    /// A small number that has no default.
    pub fn small_or_unset(&mut self, key: &'static str, max: u8) -> Option<u8> {
        let parse = |text: &str| text.parse().ok().filter(|number| *number <= max);
        let expected = format!("a number (0 to {max})");
        self.optional(key, &expected, parse, u8::to_string)
    }

    /// An octal number that has no default.
    pub fn octal_or_unset(&mut self, key: &'static str, max: u32) -> Option<u32> {
        let parse = |text: &str| {
            let number = u32::from_str_radix(text, 8).ok();
            number.filter(|number| *number <= max)
        };
        let expected = format!("an octal number (0 to {max:o})");
        self.optional(key, &expected, parse, |number| format!("{number:03o}"))
    }

    fn optional<T: Copy>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
        show: impl Fn(&T) -> String,
    ) -> Option<T> {
        let Some((text, source)) = self.get(key) else {
            self.note(key, String::new(), Source::Default);
            return None;
        };
        let value = parse(&text);
        match &value {
            Some(value) => self.note(key, show(value), source),
            None => {
                self.warn(format!(
                    "{key}={} is not {expected} and was ignored",
                    shown(key, &text)
                ));
                self.note(key, String::new(), Source::Default);
            }
        }
        value
    }

    pub fn count(
        &mut self,
        key: &'static str,
        default: usize,
        range: RangeInclusive<usize>,
    ) -> usize {
        let parse = |text: &str| {
            let number = values::number(text)?;
            Some(usize::try_from(number).unwrap_or(usize::MAX))
        };
        self.read_in_range(key, default, &range, "a number", parse, usize::to_string)
    }

    /// One of a few words; the first is the default.
    pub fn choice(&mut self, key: &'static str, choices: &'static [&'static str]) -> &'static str {
        let parse = |text: &str| {
            let known = |choice: &&&str| text.eq_ignore_ascii_case(choice);
            choices.iter().find(known).copied()
        };
        let show = |choice: &&str| (*choice).to_owned();
        self.read(key, choices[0], &choices.join(" or "), parse, show)
    }

    pub fn level(&mut self, key: &'static str, default: LevelFilter) -> LevelFilter {
        let parse = |text: &str| text.parse().ok().filter(|level| *level != LevelFilter::Off);
        let show = |level: &LevelFilter| level.as_str().to_ascii_lowercase();
        self.read(
            key,
            default,
            "error, warn, info, debug or trace",
            parse,
            show,
        )
    }

    pub fn text(&mut self, key: &'static str) -> Option<String> {
        let (value, source) = match self.get(key) {
            Some((value, source)) => (Some(value), source),
            None => (None, Source::Default),
        };
        let text = value.as_deref().map(|value| shown(key, value));
        self.note(key, text.unwrap_or_default(), source);
        value
    }

    pub fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    pub fn path_or(&mut self, key: &'static str, default: PathBuf) -> PathBuf {
        match self.path(key) {
            Some(path) => path,
            None => {
                self.note(key, default.display().to_string(), Source::Default);
                default
            }
        }
    }

    pub fn url(&mut self, key: &'static str, schemes: &[&str]) -> Option<String> {
        let (value, source) = self.get(key)?;
        if values::is_url(&value, schemes) {
            self.note(key, value.clone(), source);
            return Some(value);
        }
        self.warn(format!(
            "{key}={} is no URL of the kind {}://host and was ignored",
            shown(key, &values::without_password(&value, MASK)),
            schemes.join(":// or ")
        ));
        self.note(key, String::new(), Source::Default);
        None
    }

    /// The existing agent keeps a database file at the store's path; ours is a directory beside it.
    pub fn beside_a_file(&mut self, key: &'static str, path: PathBuf) -> PathBuf {
        if !path.is_file() {
            return path;
        }
        let mut beside = path.into_os_string();
        beside.push(".d");
        let beside = PathBuf::from(beside);
        self.change(key, beside.display().to_string());
        beside
    }

    /// Two texts of a final and their overhead must fit the reserve.
    pub fn fit_finals(&mut self, final_bytes: u64, reserve: u64, overhead: u64) -> usize {
        let most = (reserve - overhead.min(reserve)) / 2;
        let key = "HOSTLINK_TASK_FINAL_OUTPUT_BYTES";
        let fits = final_bytes.min(most);
        if fits < final_bytes {
            self.warn(format!(
                "{key}={final_bytes} does not fit twice into the reserve of {reserve} bytes \
                 (HOSTLINK_LOCAL_STORE_TERMINAL_RESERVE_BYTES); {fits} is used"
            ));
            self.change(key, fits.to_string());
        }
        usize::try_from(fits).unwrap_or(usize::MAX)
    }

    pub fn at_least_min(&mut self, min: Duration, max: Duration) -> Duration {
        if max >= min {
            return max;
        }
        let (min_text, max_text) = (values::show_duration(min), values::show_duration(max));
        let key = "HOSTLINK_WS_RECONNECT_MAX";
        self.warn(format!(
            "{key}={max_text} is below HOSTLINK_WS_RECONNECT_MIN={min_text}; {min_text} is used"
        ));
        self.change(key, min_text);
        min
    }

    /// The agent presents itself with a certificate only; the key may stand in the same file.
    pub fn warn_of_key_without_certificate(&mut self) {
        let (key, certificate) = ("HOSTLINK_CLIENT_KEY", "HOSTLINK_CLIENT_CERT");
        if let (Some((path, _)), None) = (self.get(key), self.get(certificate)) {
            self.warn(format!(
                "{key}={} is not used without {certificate}; set both, or neither",
                shown(key, &path)
            ));
        }
    }

    pub fn warn_of_unknown_keys(&mut self) {
        let unknown: Vec<_> = self
            .given
            .iter()
            .filter(|(key, _)| !KEYS.contains(&key.as_str()) && !OF_TASKS.contains(&key.as_str()))
            .filter(|(key, (_, source))| key.starts_with(PREFIX) || *source == Source::File)
            .map(|(key, (_, source))| format!("{key:.80} ({source}) is no known setting"))
            .collect();
        self.warnings.extend(unknown.into_iter().map(Warning));
    }

    pub fn finish(self) -> (Vec<Warning>, Vec<Effective>) {
        let settings = KEYS
            .iter()
            .map(|key| {
                let (value, source) = match self.effective.get(key) {
                    Some((value, source)) => (value.clone(), *source),
                    None => (String::new(), Source::Default),
                };
                Effective { key, value, source }
            })
            .collect();
        (self.warnings, settings)
    }
}

const DURATION: &str = "a duration like 100ms, 30s, 5m or 1h";

/// A value as it may be shown: secrets masked, long ones cut.
fn shown(key: &str, value: &str) -> String {
    if is_secret(key) {
        return MASK.to_owned();
    }
    let value = if may_hold_password(key) {
        values::without_password(value, MASK)
    } else {
        value.to_owned()
    };
    value.chars().take(SHOWN_CHARACTERS).collect()
}

/// Opens a file for reading, without waiting: a named pipe in its place would hold up the start
/// until somebody writes to it, so it is refused.
fn open_at_once(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("it is a pipe"));
    }
    Ok(file)
}

enum Line {
    Nothing,
    Pair(String, String),
    Unreadable,
}

/// `KEY=VALUE`, as a shell or a service manager reads simple lines: comments, `export `, quotes.
fn parse_line(line: &[u8]) -> Line {
    let line = line.trim_ascii();
    if line.is_empty() || line.starts_with(b"#") || line.starts_with(b";") {
        return Line::Nothing;
    }
    let Ok(line) = std::str::from_utf8(line) else {
        return Line::Unreadable;
    };
    let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
    let Some((key, value)) = line.split_once('=') else {
        return Line::Unreadable;
    };
    let key = key.trim_end();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if key.is_empty() || !key.bytes().all(is_name) {
        return Line::Unreadable;
    }
    match unquoted(value) {
        Some(value) => Line::Pair(key.to_owned(), value),
        None => Line::Unreadable,
    }
}

/// The value that a shell would assign, save that blanks inside need no quotes. `None` if it goes
/// on in the next line: a quote is not closed, or a backslash stands at the end.
fn unquoted(text: &str) -> Option<String> {
    let mut value = String::new();
    // Blanks after this are no part of the value, unless more of it follows.
    let mut end = 0;
    let mut after_blank = false;
    let mut characters = text.trim_start().chars();
    if text.starts_with(char::is_whitespace) && characters.as_str().starts_with('#') {
        return Some(value);
    }
    while let Some(character) = characters.next() {
        match character {
            '#' if after_blank => break,
            '\'' => {
                let (inner, rest) = characters.as_str().split_once('\'')?;
                value.push_str(inner);
                characters = rest.chars();
            }
            '"' => loop {
                match characters.next()? {
                    '"' => break,
                    '\\' => match characters.next()? {
                        escaped @ ('"' | '\\' | '$' | '`') => value.push(escaped),
                        other => value.extend(['\\', other]),
                    },
                    inner => value.push(inner),
                }
            },
            '\\' => value.push(characters.next()?),
            other => value.push(other),
        }
        after_blank = character.is_whitespace();
        if !after_blank {
            end = value.len();
        }
    }
    value.truncate(end);
    Some(value)
}
