//! The rules of the architecture, as a test: who may use whom, what may stand where, how long a
//! file may be. ARCHITECTURE.md gives the reasons.

use std::fs;
use std::path::Path;

/// A layer, the folder or file that holds it, and what of the crate it may use.
const LAYERS: [(&str, &[&str]); 18] = [
    ("limits", &[]),
    ("ids", &["limits"]),
    ("clock", &[]),
    ("wire", &["clock", "ids", "limits"]),
    ("session", &["wire", "ids", "limits"]),
    ("panics", &[]),
    ("outbox", &["panics", "clock", "ids", "limits"]),
    ("reaping", &[]),
    ("executor", &["reaping", "wire", "ids", "limits"]),
    ("net", &["clock", "wire", "ids", "limits"]),
    ("config", &["limits"]),
    ("logger", &["wire"]),
    ("threads", &[]),
    ("heap", &[]),
    ("gateway", &["panics", "wire", "net", "ids", "limits"]),
    (
        "agent",
        &[
            "config", "net", "executor", "outbox", "session", "wire", "ids", "limits",
        ],
    ),
    (
        "cli",
        &[
            "agent", "config", "gateway", "logger", "outbox", "panics", "threads",
        ],
    ),
    ("main", &["cli", "heap", "threads"]),
];

/// Words that may stand only in files whose path begins with one of the given ones.
const RESERVED: [(&str, &[&str]); 16] = [
    ("sled::", &["src/outbox/index.rs", "src/gateway/store.rs"]),
    ("use sled", &["src/outbox/index.rs", "src/gateway/store.rs"]),
    // The last is an allocator that counts.
    (
        "unsafe ",
        &[
            "src/threads.rs",
            "src/reaping.rs",
            "src/heap.rs",
            "tests/allocations/counting.rs",
        ],
    ),
    (
        "allow(unsafe_code)",
        &[
            "src/threads.rs",
            "src/reaping.rs",
            "src/heap.rs",
            "tests/allocations/counting.rs",
        ],
    ),
    // It panics after 2038 on some devices: `clock` does not.
    (
        "SystemTime::now",
        &["src/clock.rs", "src/net/testing.rs", "tests/"],
    ),
    // Also `unbounded::<T>()`, and a name that is imported to be called elsewhere.
    ("unbounded", &[]),
    ("mpsc::channel", &[]),
    // One exit status goes through it.
    ("= channel(", &["tests/behaviour/support/agent.rs"]),
    ("= channel::<", &[]),
    ("todo!", &[]),
    ("unimplemented!", &[]),
    ("TODO", &[]),
    ("FIXME", &[]),
    ("#[ignore", &[]),
    ("/home/", &[]),
    ("/root/", &[]),
];

/// What the state machine must not touch: clocks, sockets, disks, chance.
const IMPURE: [&str; 10] = [
    "Instant::now",
    "elapsed",
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
    /// Below the package: `src/net/tls.rs`.
    name: String,
    text: String,
    /// Compiled for tests only.
    is_test: bool,
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    collect("src", &mut found);
    assert!(found.len() > 40, "the sources were not found");
    let test_modules: Vec<_> = found.iter().flat_map(Source::test_modules).collect();
    for source in &mut found {
        source.is_test = test_modules.iter().any(|module| {
            let below = source.name.strip_prefix(module.as_str());
            below.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
        });
    }
    found
}

/// All `.rs` files below a folder of the package, in the order of their names.
fn collect(folder: &str, found: &mut Vec<Source>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let entries = fs::read_dir(root.join(folder)).expect("readable folder");
    let mut names: Vec<_> = entries
        .map(|entry| {
            let name = entry.expect("entry").file_name();
            format!("{folder}/{}", name.into_string().expect("plain name"))
        })
        .collect();
    names.sort();
    for name in names {
        if root.join(&name).is_dir() {
            collect(&name, found);
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(root.join(&name)).expect("text");
            found.push(Source {
                name,
                text,
                is_test: false,
            });
        }
    }
}

impl Source {
    fn layer(&self) -> &str {
        let inside = self.name.strip_prefix("src/").expect("a source");
        let first = inside.split('/').next().expect("not empty");
        first.trim_end_matches(".rs")
    }

    /// Whether it is the root of its layer: `src/net/mod.rs`, `src/config.rs`.
    fn is_root(&self) -> bool {
        let below = self.name.strip_prefix("src/").expect("a source");
        !below.trim_end_matches("/mod.rs").contains('/')
    }

    /// Modules in files of their own that are declared under `#[cfg(test)]`: `src/net/tests`.
    fn test_modules(&self) -> Vec<String> {
        let folder = match self.name.strip_suffix("/mod.rs") {
            Some(folder) => folder,
            None => self.name.trim_end_matches(".rs"),
        };
        let lines: Vec<_> = self.text.lines().collect();
        lines
            .windows(2)
            .filter(|pair| pair[0].trim() == "#[cfg(test)]")
            .filter_map(|pair| pair[1].trim().strip_suffix(';')?.split("mod ").nth(1))
            .map(|module| format!("{folder}/{module}"))
            .collect()
    }

    /// Numbered lines without comments. With `tests` also those of test modules and test items.
    fn lines(&self, tests: bool) -> Vec<(usize, &str)> {
        let mut lines = Vec::new();
        if self.is_test && !tests {
            return lines;
        }
        let mut numbered = self.text.lines().enumerate();
        while let Some((index, line)) = numbered.next() {
            if line == "#[cfg(test)]" && !tests {
                // The item ends with its first line, or with a brace in the first column.
                let one_line = |line: &str| line.ends_with(';') || line.ends_with("{}");
                let declared = numbered.next().is_some_and(|(_, line)| one_line(line));
                while !declared && numbered.next().is_some_and(|(_, line)| line != "}") {}
                continue;
            }
            lines.push((index + 1, line.split("//").next().unwrap_or_default()));
        }
        lines
    }

    /// Modules of the crate that are named here, each with its line: `crate::net::…`,
    /// `crate::{net, wire::http}`, `hostlink_edge::net`, and `super::net` in the root of a layer.
    fn uses(&self) -> Vec<(usize, String)> {
        let mut text = String::new();
        for (_, line) in self.lines(true) {
            text.push_str(line);
            text.push('\n');
        }
        let mut prefixes = vec!["crate::", "hostlink_edge::"];
        if self.is_root() {
            prefixes.push("super::");
        }
        let mut found = Vec::new();
        for prefix in prefixes {
            for (at, _) in text.match_indices(prefix) {
                let line = text[..at].matches('\n').count() + 1;
                let names = named(&text[at + prefix.len()..]);
                found.extend(names.into_iter().map(|name| (line, name)));
            }
        }
        found
    }
}

/// The first names of a path, or of each path of a group in braces.
fn named(rest: &str) -> Vec<String> {
    let name = |path: &str| -> String {
        let is_name = |c: &char| c.is_alphanumeric() || *c == '_';
        path.trim_start().chars().take_while(is_name).collect()
    };
    let Some(group) = rest.strip_prefix('{') else {
        return vec![name(rest)];
    };
    let mut names = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, character) in group.char_indices() {
        match character {
            ',' if depth == 0 => {
                names.push(name(&group[start..at]));
                start = at + 1;
            }
            '{' => depth += 1,
            '}' if depth == 0 => {
                names.push(name(&group[start..at]));
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names
}

fn report(breaches: &[String]) {
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

fn made_up(name: &str, text: &str) -> Source {
    Source {
        name: name.to_owned(),
        text: text.to_owned(),
        is_test: false,
    }
}

#[test]
fn every_way_to_name_a_module_is_seen() {
    let check = |name: &str, text: &str, expected: &[(usize, &str)]| {
        let found = made_up(name, text).uses();
        let found: Vec<_> = found
            .iter()
            .map(|(at, name)| (*at, name.as_str()))
            .collect();
        assert_eq!(found, expected, "{text}");
    };
    let part = "src/session/part.rs";
    check(part, "use crate::net::Url;", &[(1, "net")]);
    check(part, "\nlet x = crate::net::f();", &[(2, "net")]);
    check(
        part,
        "use crate::{net, wire::{http, text}};",
        &[(1, "net"), (1, "wire")],
    );
    check(
        part,
        "use crate::{\n    net,\n    outbox::Handle,\n};",
        &[(1, "net"), (1, "outbox"), (1, "")],
    );
    check(part, "// use crate::net;", &[]);
    check(part, "use super::net;", &[]);
    check("src/session/mod.rs", "use super::net;", &[(1, "net")]);
    check("src/config.rs", "use super::net;", &[(1, "net")]);
}

#[test]
fn only_what_is_compiled_for_tests_is_passed_over() {
    let text = "#[cfg(test)]\nmod tests;\na\n#[cfg(test)]\nfn b() {\n    c\n}\nd // e\n";
    let source = made_up("src/session/mod.rs", text);
    assert_eq!(source.lines(false), [(3, "a"), (8, "d ")]);
    assert_eq!(source.test_modules(), ["src/session/tests"]);
    assert_eq!(source.lines(true).len(), 8);
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
        for (number, name) in source.uses() {
            let is_layer = LAYERS.iter().any(|(layer, _)| *layer == name);
            if is_layer && name != layer && !allowed.contains(&name.as_str()) {
                breaches.push(format!(
                    "{}:{number}: {layer} must not use {name}",
                    source.name
                ));
            }
        }
    }
    report(&breaches);
}

#[test]
fn reserved_words_stand_where_they_may() {
    let mut breaches = Vec::new();
    let mut all = sources();
    collect("tests", &mut all);
    // This file names them all.
    for source in all.iter().filter(|it| it.name != "tests/layers.rs") {
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
        for (number, line) in source.lines(false) {
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
        if lines > LINES_MAX && !source.is_test {
            breaches.push(format!(
                "{}: {lines} lines, {LINES_MAX} at most",
                source.name
            ));
        }
        if !source.is_test && !source.text.starts_with("//!") {
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
        for (number, line) in source.lines(false) {
            if line.contains(".unwrap()") {
                breaches.push(format!("{}:{number}", source.name));
            }
        }
    }
    report(&breaches);
}
