//! The rules of the architecture, as a test: who may use whom, what may stand where, how long a
//! file may be. ARCHITECTURE.md gives the reasons.

use std::fs;
use std::path::{Path, PathBuf};

/// A layer, the folder or file that holds it, and what of the crate it may use.
const LAYERS: [(&str, &[&str]); 14] = [
    ("limits", &[]),
    ("ids", &["limits"]),
    ("wire", &["ids", "limits"]),
    ("session", &["wire", "ids", "limits"]),
    ("outbox", &["ids", "limits"]),
    ("executor", &["wire", "ids", "limits"]),
    ("net", &["wire", "ids", "limits"]),
    ("config", &["limits"]),
    ("logger", &["wire"]),
    ("threads", &[]),
    ("gateway", &["wire", "net", "ids", "limits"]),
    (
        "agent",
        &[
            "config", "net", "executor", "outbox", "session", "wire", "ids", "limits",
        ],
    ),
    (
        "cli",
        &["agent", "config", "gateway", "logger", "outbox", "threads"],
    ),
    ("main", &["cli", "threads"]),
];

/// Words that may stand only in files whose path begins with one of the given ones.
const RESERVED: [(&str, &[&str]); 12] = [
    ("sled::", &["src/outbox/", "src/gateway/"]),
    ("unsafe ", &["src/threads.rs"]),
    ("allow(unsafe_code)", &["src/threads.rs"]),
    ("unbounded(", &[]),
    ("mpsc::channel(", &[]),
    ("todo!", &[]),
    ("unimplemented!", &[]),
    ("TODO", &[]),
    ("FIXME", &[]),
    ("#[ignore", &[]),
    ("/home/", &[]),
    ("/root/", &[]),
];

/// What the state machine must not touch: clocks, sockets, disks, chance.
const IMPURE: [&str; 9] = [
    "Instant::now",
    "SystemTime",
    "std::net",
    "std::fs",
    "std::thread",
    "smol::",
    "async_io::",
    "async_channel::",
    "rand",
];

const LINES_MAX: usize = 600;

struct Source {
    path: PathBuf,
    name: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("readable folder") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let name = path
                    .strip_prefix(root)
                    .expect("inside")
                    .display()
                    .to_string();
                let text = fs::read_to_string(&path).expect("text");
                found.push(Source { path, name, text });
            }
        }
    }
    assert!(found.len() > 40, "the sources were not found");
    found.sort_by(|left, right| left.name.cmp(&right.name));
    found
}

impl Source {
    fn layer(&self) -> &str {
        let inside = self.name.strip_prefix("src/").expect("a source");
        inside
            .split('/')
            .next()
            .expect("not empty")
            .trim_end_matches(".rs")
    }

    fn is_test(&self) -> bool {
        let file = self.path.file_name().and_then(|name| name.to_str());
        matches!(file, Some("tests.rs" | "testing.rs" | "sim.rs")) || self.name.contains("/tests/")
    }

    /// Numbered lines of code before the tests of the file; comments do not count.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let is_test = self.is_test();
        self.text
            .lines()
            .take_while(move |line| !line.starts_with("#[cfg(test)]") || is_test)
            .map(|line| line.split("//").next().unwrap_or_default())
            .enumerate()
            .map(|(index, line)| (index + 1, line))
    }
}

fn report(breaches: &[String]) {
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

#[test]
fn layers_use_only_what_they_may() {
    let mut breaches = Vec::new();
    for source in sources() {
        let layer = source.layer();
        if layer == "lib" {
            continue;
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
            breaches.push(format!("{}: belongs to no layer", source.name));
            continue;
        };
        for (number, line) in source.text.lines().enumerate() {
            let line = line.split("//").next().unwrap_or_default();
            for (name, _) in LAYERS {
                let used = line.contains(&format!("crate::{name}::"))
                    || line.contains(&format!("crate::{name};"))
                    || line.contains(&format!("hostlink_edge::{name}::"));
                if used && name != layer && !allowed.contains(&name) {
                    breaches.push(format!(
                        "{}:{}: {layer} must not use {name}",
                        source.name,
                        number + 1
                    ));
                }
            }
        }
    }
    report(&breaches);
}

#[test]
fn reserved_words_stand_where_they_may() {
    let mut breaches = Vec::new();
    for source in sources() {
        for (number, line) in source.text.lines().enumerate() {
            for (word, allowed) in RESERVED {
                let permitted = allowed.iter().any(|path| source.name.starts_with(path));
                let comment = line.trim_start().starts_with("//");
                if line.contains(word) && !permitted && !(comment && word == "unsafe ") {
                    breaches.push(format!("{}:{}: `{word}`", source.name, number + 1));
                }
            }
        }
    }
    report(&breaches);
}

#[test]
fn the_session_has_no_clock_no_socket_no_disk_and_no_chance() {
    let mut breaches = Vec::new();
    for source in sources() {
        if source.layer() != "session" {
            continue;
        }
        for (number, line) in source.code() {
            for word in IMPURE {
                let whole = line.match_indices(word).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    let after = line[at + word.len()..].chars().next();
                    let inside =
                        |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
                    !inside(before) && (word.ends_with(':') || !inside(after))
                });
                if whole {
                    breaches.push(format!("{}:{number}: `{word}`", source.name));
                }
            }
        }
    }
    report(&breaches);
}

#[test]
fn files_are_short_and_say_what_they_are_for() {
    let mut breaches = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > LINES_MAX && !source.is_test() {
            breaches.push(format!(
                "{}: {lines} lines, {LINES_MAX} at most",
                source.name
            ));
        }
        if !source.is_test() && !source.text.starts_with("//!") {
            breaches.push(format!(
                "{}: does not open with what it is for",
                source.name
            ));
        }
    }
    report(&breaches);
}

#[test]
fn code_outside_tests_does_not_unwrap() {
    let mut breaches = Vec::new();
    for source in sources() {
        if source.is_test() {
            continue;
        }
        for (number, line) in source.code() {
            if line.contains(".unwrap()") {
                breaches.push(format!("{}:{number}", source.name));
            }
        }
    }
    report(&breaches);
}
