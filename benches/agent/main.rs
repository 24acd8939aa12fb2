//! The whole agent, measured from outside: `cargo bench --bench agent`.
//!
//! ```text
//! cargo bench --bench agent -- [WORK …] [--binary PATH] [--dir PATH] [--json PATH] [--budgets]
//! ```
//!
//! Runs the release binary (by default the static musl one of `targets/build.sh` if it is there,
//! else that of this build) against a fast model gateway in this process, and prints one table:
//! work, figure, target, verdict, and the share of what this machine could do at most. It builds
//! nothing. With `--budgets` only the figures that hardly differ between runs are judged, and one
//! that is out of its bound is an error.
//!
//! Disk bytes are `write_bytes` of /proc/PID/io: what the agent hands to the file system. The
//! journal of the file system adds its own: some 4 KiB for a sync that changes metadata, which an
//! append to an allocated file does once, when its blocks are first written.

mod budgets;
mod frames;
mod gateway;
mod participants;
mod physical;
mod print;
mod process;
mod table;
mod tls;
mod works;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use process::Setup;
use table::Row;
use works::Rows;

/// A work, by its name on the command line.
type Work = (&'static str, fn(&Setup) -> Rows);

const WORKS: [Work; 12] = [
    ("bulk", works::bulk),
    ("both", works::both),
    ("tls", works::tls),
    ("lines", works::lines),
    ("latency", works::latency),
    ("idle", works::idle),
    ("backlog", works::backlog),
    ("chunks", works::chunks),
    ("tasks", works::tasks),
    ("start", works::start),
    ("syncs", works::syncs),
    ("size", works::size),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match words.first().map(String::as_str) {
        Some("--print") => print::run(&words[1..]).map(|()| true),
        _ => Arguments::read(&words).and_then(|arguments| measure(&arguments)),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("bench: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Called by each thread of the gateway. Who counts allocations tells them apart by it.
fn begin_gateway_thread() {}

struct Arguments {
    works: Vec<Work>,
    binary: PathBuf,
    dir: PathBuf,
    json: Option<PathBuf>,
    budgets: bool,
}

impl Arguments {
    fn read(words: &[String]) -> Result<Arguments, String> {
        let target = target_dir();
        let mut arguments = Arguments {
            works: Vec::new(),
            binary: default_binary(&target),
            dir: target.join("bench-agent"),
            json: None,
            budgets: false,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || {
                let value = words.next().ok_or(format!("{word} needs a value"))?;
                Ok::<_, String>(PathBuf::from(value))
            };
            match word.as_str() {
                // Given by cargo.
                "--bench" => {}
                "--binary" => arguments.binary = value()?,
                "--dir" => arguments.dir = value()?,
                "--json" => arguments.json = Some(value()?),
                "--budgets" => arguments.budgets = true,
                name => {
                    let found = WORKS.iter().find(|(known, _)| *known == name);
                    let names: Vec<&str> = WORKS.iter().map(|(name, _)| *name).collect();
                    let known = names.join(", ");
                    arguments
                        .works
                        .push(*found.ok_or(format!("no work {name:?}; there are {known}"))?);
                }
            }
        }
        if arguments.works.is_empty() {
            arguments.works = WORKS
                .into_iter()
                .filter(|(name, _)| !arguments.budgets || budgets::WORKS.contains(name))
                .collect();
        }
        // The agent is started in its own folder.
        arguments.binary = arguments
            .binary
            .canonicalize()
            .map_err(|e| format!("the binary {}: {e}", arguments.binary.display()))?;
        std::fs::create_dir_all(&arguments.dir)
            .and_then(|()| arguments.dir.canonicalize())
            .map(|dir| arguments.dir = dir)
            .map_err(|e| format!("the folder {}: {e}", arguments.dir.display()))?;
        Ok(arguments)
    }
}

/// Where this build is made.
fn target_dir() -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_hostlink-edge"));
    let target = built.parent().and_then(Path::parent);
    target.map_or_else(std::env::temp_dir, Path::to_owned)
}

fn default_binary(target: &Path) -> PathBuf {
    let of_device = target.join("cross/x86_64-unknown-linux-musl/release/hostlink-edge");
    match of_device.exists() {
        true => of_device,
        false => env!("CARGO_BIN_EXE_hostlink-edge").into(),
    }
}

/// Runs the works and prints the table. False if a budget is exceeded.
fn measure(arguments: &Arguments) -> Result<bool, String> {
    let setup = Setup {
        binary: arguments.binary.clone(),
        dir: arguments.dir.clone(),
    };
    println!("agent: {}", setup.binary.display());
    println!("writes below {}\n", setup.dir.display());
    let mut rows: Vec<Row> = Vec::new();
    for (name, run) in &arguments.works {
        eprintln!("bench: {name}");
        physical::settle();
        rows.extend(run(&setup).map_err(|why| format!("{name}: {why}"))?);
    }
    // Kept when something went wrong: the agent's logs are there.
    let _ = std::fs::remove_dir_all(&setup.dir);
    table::print(&rows);
    if let Some(path) = &arguments.json {
        let all: Vec<_> = rows.iter().map(Row::to_json).collect();
        let text = serde_json::to_string_pretty(&all).map_err(|e| e.to_string())?;
        std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if arguments.budgets {
        return Ok(budgets::judge(&rows));
    }
    let missed = rows.iter().filter(|row| row.is_missed()).count();
    println!("\n{missed} figures miss their target");
    Ok(true)
}
