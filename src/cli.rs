//! The commands. Each returns the exit code; only `main` uses it.
//!
//! - [`args`]: what was typed, as a [`args::Command`].
//! - [`operator`]: `gateway`, `submit` and `agents` (cargo feature `gateway`).
//! - [`demo`]: the main job on one machine (cargo feature `gateway`).

mod args;
#[cfg(feature = "gateway")]
mod demo;
#[cfg(feature = "gateway")]
mod operator;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use log::{LevelFilter, warn};

use self::args::{Arguments, Command};
use crate::agent::{self, status};
use crate::config::{self, Loaded};
use crate::outbox;

/// Wrong arguments (`EX_USAGE`).
pub const EXIT_USAGE: u8 = 64;
/// Settings that cannot be used, or that `config --check` complains of.
pub const EXIT_CONFIG: u8 = 78;

/// Carries out a command line, without the program's name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments = match args::parse(arguments) {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("hostlink-edge: {why}\nTry `hostlink-edge --help`.");
            return EXIT_USAGE;
        }
    };
    let Arguments {
        command,
        config_file,
    } = arguments;
    let load = || config::load(std::env::vars_os(), config_file.as_deref());
    match command {
        Command::Help(text) => print(text),
        Command::Version => print(concat!("hostlink-edge ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::Run => run_agent(load()),
        Command::Config { check } => show_config(&load(), check),
        Command::Status { json } => show_status(&load(), json),
        Command::CheckIndex(dir) => u8::from(!outbox::check_index(&dir)),
        Command::Operator(command) => run_operator(command),
    }
}

#[cfg(feature = "gateway")]
fn run_operator(command: args::Operator) -> u8 {
    match command {
        args::Operator::Demo { command } => demo::run(command),
        args::Operator::Gateway(options) => operator::gateway(options),
        args::Operator::Submit(options) => operator::submit(options),
        args::Operator::Agents(options) => operator::agents(options),
    }
}

#[cfg(not(feature = "gateway"))]
fn run_operator(_: args::Operator) -> u8 {
    eprintln!("hostlink-edge: this build has no gateway (cargo feature `gateway`)");
    EXIT_USAGE
}

/// Writes to stdout; a reader that has gone away is no error.
fn print(text: &str) -> u8 {
    let _ = std::io::stdout().write_all(text.as_bytes());
    0
}

fn run_agent(loaded: Loaded) -> u8 {
    let level = loaded
        .config
        .as_ref()
        .map_or(LevelFilter::Info, |it| it.log);
    crate::logger::init(level);
    for warning in &loaded.warnings {
        warn!("{warning}");
    }
    match loaded.config {
        Ok(config) => agent::run(config),
        Err(error) => {
            log::error!("{error}");
            EXIT_CONFIG
        }
    }
}

/// Effective settings and where each comes from. With `check` every complaint counts.
fn show_config(loaded: &Loaded, check: bool) -> u8 {
    let mut text = String::new();
    let width = loaded.settings.iter().map(|it| it.key.len()).max();
    for setting in &loaded.settings {
        let width = width.unwrap_or(0);
        let line = format!(
            "{:width$} = {} ({})\n",
            setting.key, setting.value, setting.source
        );
        text.push_str(&line);
    }
    print(&text);
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    if let Err(error) = &loaded.config {
        eprintln!("error: {error}");
        return EXIT_CONFIG;
    }
    if check && !loaded.warnings.is_empty() {
        EXIT_CONFIG
    } else {
        0
    }
}

/// Asks the running agent, or looks at its store while it is down.
fn show_status(loaded: &Loaded, json: bool) -> u8 {
    let config = match &loaded.config {
        Ok(config) => config,
        Err(error) => {
            eprintln!("hostlink-edge: {error}");
            return EXIT_CONFIG;
        }
    };
    let status = match status::ask(&config.state_path) {
        Ok(Some(status)) => status,
        Ok(None) => status::Status::not_running(stored(config)),
        Err(error) => {
            eprintln!("hostlink-edge: the running agent does not answer: {error}");
            status::Status::not_running(stored(config))
        }
    };
    if json {
        let text = serde_json::to_string_pretty(&status).unwrap_or_default();
        print(&format!("{text}\n"));
    } else {
        print(&status.to_string());
    }
    status.exit_code()
}

fn stored(config: &config::Config) -> outbox::Counts {
    let dir: &Path = &config.local_store_path;
    outbox::inspect(dir, config.spool_cap_bytes).unwrap_or_else(|error| {
        if error.kind() != std::io::ErrorKind::NotFound {
            eprintln!(
                "hostlink-edge: cannot read the outbox {}: {error}",
                dir.display()
            );
        }
        outbox::Counts {
            byte_cap: config.spool_cap_bytes,
            ..outbox::Counts::default()
        }
    })
}
