//! Log records on stderr, one bounded line each. Where stderr is a journal, its priority stands in
//! front; elsewhere the time and the level.

use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::fs::fstat;

use crate::wire::Timestamp;

/// A longer line is cut: what a server says may stand in it.
const LINE_BYTES_MAX: usize = 2048;

struct Stderr {
    level: LevelFilter,
    journal: bool,
}

/// Starts logging. Later calls have no effect.
pub fn init(level: LevelFilter) {
    let logger = Stderr {
        level,
        journal: stderr_is_journal(),
    };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}

/// `JOURNAL_STREAM` names the device and inode of the stream that leads to the journal.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(std::io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with(env!("CARGO_CRATE_NAME"));
        // Others print what they carry: frames, headers, task output.
        let bound = if ours {
            self.level
        } else {
            self.level.min(LevelFilter::Warn)
        };
        metadata.level() <= bound
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = if self.journal {
            format!("{}{}", priority(record.level()), record.args())
        } else {
            let level = record.level();
            format!("{} {level:5} {}", Timestamp::now(), record.args())
        };
        // Nowhere is left to complain if stderr is gone.
        let _ = std::io::stderr().write_all(one_line(&line).as_bytes());
    }

    fn flush(&self) {}
}

/// Priorities of syslog, as journald reads them.
fn priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

/// Control characters are replaced, so that nothing from outside can forge a line.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(LINE_BYTES_MAX) + 4);
    for character in text.chars() {
        if line.len() >= LINE_BYTES_MAX {
            line.push('\u{2026}');
            break;
        }
        line.push(if character.is_control() {
            ' '
        } else {
            character
        });
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_bounded_line() {
        assert_eq!(one_line("a\nb\x1b[1m"), "a b [1m\n");
        assert!(one_line(&"x".repeat(10_000)).len() <= LINE_BYTES_MAX + 4);
    }

    #[test]
    fn other_crates_are_heard_from_warn_on() {
        let check = |level, target: &str, record, heard: bool| {
            let logger = Stderr {
                level,
                journal: false,
            };
            let metadata = Metadata::builder().level(record).target(target).build();
            assert_eq!(
                logger.enabled(&metadata),
                heard,
                "{level} {target} {record}"
            );
        };
        check(LevelFilter::Info, "hostlink_edge::part", Level::Info, true);
        check(
            LevelFilter::Info,
            "hostlink_edge::part",
            Level::Debug,
            false,
        );
        check(LevelFilter::Debug, "other_crate::part", Level::Info, false);
        check(LevelFilter::Info, "other_crate::part", Level::Warn, true);
        check(LevelFilter::Error, "other_crate::part", Level::Warn, false);
        check(LevelFilter::Trace, "other_crate::part", Level::Info, false);
    }
}
