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
use std::fmt::Display;
use std::io::Write;

use log::{LevelFilter, warn};

use self::args::{Arguments, Command};
use crate::agent::{self, lock, status};
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
            complain(format_args!("{why}\nTry `hostlink-edge --help`."));
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
        Command::ExecTask(arguments) => agent::exec_task(&arguments),
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
    complain("this build has no gateway (cargo feature `gateway`)");
    EXIT_USAGE
}

/// Writes to stdout; a reader that has gone away is no error.
fn print(text: &str) -> u8 {
    let _ = std::io::stdout().write_all(text.as_bytes());
    0
}

/// Writes a line to stderr. Unlike `eprintln!` it does not panic where stderr is full or gone.
fn tell(text: impl Display) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Why a command failed, in the program's name.
fn complain(why: impl Display) {
    tell(format_args!("hostlink-edge: {why}"));
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
        Ok(config) => {
            crate::panics::end_the_process();
            agent::run(config)
        }
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
        tell(format_args!("warning: {warning}"));
    }
    if let Err(error) = &loaded.config {
        tell(format_args!("error: {error}"));
        return EXIT_CONFIG;
    }
    if check && !loaded.warnings.is_empty() {
        EXIT_CONFIG
    } else {
        0
    }
}

/// Asks the running agent, or looks at its store while it is down. Needs no control plane.
fn show_status(loaded: &Loaded, json: bool) -> u8 {
    let local = &loaded.local;
    let status = match status::ask(&local.state_path) {
        Ok(Some(status)) => status,
        Ok(None) => match lock::holder_of(&local.state_path) {
            Some(pid) => status::Status::starting(pid, stored(local)),
            None => status::Status::not_running(stored(local)),
        },
        Err(error) => {
            complain(format_args!("the running agent does not answer: {error}"));
            let pid = lock::holder_of(&local.state_path);
            status::Status::silent(pid, stored(local))
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

fn stored(local: &config::Local) -> outbox::Counts {
    let dir = &local.local_store_path;
    outbox::inspect(dir, local.spool_cap_bytes).unwrap_or_else(|error| {
        if error.kind() != std::io::ErrorKind::NotFound {
            let dir = dir.display();
            complain(format_args!("cannot read the outbox {dir}: {error}"));
        }
        outbox::Counts {
            byte_cap: local.spool_cap_bytes,
            ..outbox::Counts::default()
        }
    })
}
