//! What was typed.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::prelude::*;

use crate::agent;

pub struct Arguments {
    pub command: Command,
    /// `--config FILE`
    pub config_file: Option<PathBuf>,
}

pub enum Command {
    Help(&'static str),
    Version,
    Run,
    Config {
        check: bool,
    },
    Status {
        json: bool,
    },
    /// Used by the agent itself, in a child process.
    CheckIndex(PathBuf),
    /// The new process of a task sets itself up.
    ExecTask(Vec<OsString>),
    Operator(Operator),
}

/// Commands of the cargo feature `gateway`.
#[cfg_attr(not(feature = "gateway"), allow(dead_code))]
pub enum Operator {
    Demo { command: Option<String> },
    Gateway(GatewayOptions),
    Submit(SubmitOptions),
    Agents(ClientOptions),
}

#[cfg_attr(not(feature = "gateway"), allow(dead_code))]
#[derive(Default)]
pub struct GatewayOptions {
    pub listen: String,
    pub state: PathBuf,
    /// `ID:KEY`
    pub token: Option<String>,
    pub operator_token: Option<String>,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub lease_seconds: Option<u64>,
    pub no_delivery: bool,
    pub no_directives: bool,
    pub no_sync: bool,
    pub poll_only: bool,
    pub legacy_attempts: bool,
}

#[cfg_attr(not(feature = "gateway"), allow(dead_code))]
#[derive(Default)]
pub struct ClientOptions {
    pub gateway: String,
    pub operator_token: Option<String>,
    pub ca_file: Option<PathBuf>,
    pub json: bool,
}

#[cfg_attr(not(feature = "gateway"), allow(dead_code))]
#[derive(Default)]
pub struct SubmitOptions {
    pub client: ClientOptions,
    pub agent: Option<String>,
    pub priority: i64,
    pub timeout_seconds: Option<u64>,
    pub command: String,
}

const HELP: &str = "\
hostlink-edge: runs shell tasks for a control plane and loses none of their output.

Usage: hostlink-edge [--config FILE] [COMMAND]

Commands:
  run       run the agent (the default)
  status    show what the agent on this device does; works without network
  config    show the effective settings and where each comes from
  help      print this, or the help of a command

Commands of builds with the cargo feature `gateway`:
  demo      run a gateway and an agent here, cut their connection, lose nothing
  gateway   run the reference control plane
  submit    run a command on an agent of a gateway and print its live output
  agents    list the agents of a gateway

Options:
  --config FILE  settings, KEY=VALUE lines; the environment wins
                 (default: /etc/hostlink/hostlink.env, if it exists)
  --version      print the version
  --help         print this, or the help of a command
";

const HELP_RUN: &str = "\
Usage: hostlink-edge [--config FILE] [run]

Runs the agent until TERM or INT. Needs SH_CONTROL_PLANE_URL.

Exit codes: 0 stopped, 75 another agent uses the state directory, 78 unusable settings or key.
";

const HELP_STATUS: &str = "\
Usage: hostlink-edge [--config FILE] status [--json]

Shows the session, what waits, and the space used. Works without network, and while the agent
is down.

Exit codes: 0 connected, 1 not connected, 2 not running, 3 outbox in memory only.
";

const HELP_CONFIG: &str = "\
Usage: hostlink-edge [--config FILE] config [--check]

Shows the effective settings, secrets masked, and warnings on stderr.

  --check  exit with 78 if there is any warning
";

const HELP_DEMO: &str = "\
Usage: hostlink-edge demo [COMMAND]

Runs a gateway and an agent on this machine, in a temporary directory, has the agent run COMMAND
(default: some seconds of lines on both streams), cuts the connection in the middle and compares
what arrived with what was printed. Exits with 1 if a byte was lost or changed.
";

const HELP_GATEWAY: &str = "\
Usage: hostlink-edge gateway --listen ADDRESS --state DIR [OPTIONS]

Runs the reference control plane: a small, real one for trying and testing.

  --listen ADDRESS        for example 127.0.0.1:8080; port 0 takes a free one
  --state DIR             tasks, agents and output
  --token ID:KEY          registration token (default: made at the first start and printed)
  --operator-token TOKEN  opens the operator API to other machines
  --tls-cert FILE --tls-key FILE   serve TLS, PEM
  --lease SECONDS         ask agents for lease heartbeats
  --no-delivery           offer tasks by poll only
  --no-directives         answer hellos without directives
  --poll-only             refuse WebSockets
  --legacy-attempts       offer tasks without attempt ids, as old control planes do
  --no-sync               do not wait for the disk; for measurements
";

const HELP_SUBMIT: &str = "\
Usage: hostlink-edge submit --gateway URL [OPTIONS] COMMAND

Runs COMMAND on an agent, prints its live output to stdout and stderr, and exits with its exit
code (1 if it has none).

  --agent ID              needed if the gateway knows several agents
  --priority N            a larger number is more urgent
  --timeout SECONDS       end it after this time
  --operator-token TOKEN  for a gateway on another machine
  --ca-file FILE          trust this certificate authority, PEM
";

const HELP_AGENTS: &str = "\
Usage: hostlink-edge agents --gateway URL [--json] [--operator-token TOKEN] [--ca-file FILE]

Lists the agents of a gateway.
";

/// Reads a command line. Errors are for the user.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Arguments, lexopt::Error> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut config_file = None;
    let name = loop {
        match parser.next()? {
            Some(Long("config")) => config_file = Some(parser.value()?.into()),
            Some(Long("help") | Short('h')) => return done(Command::Help(HELP)),
            Some(Long("version") | Short('V')) => return done(Command::Version),
            Some(Value(name)) => break name.string()?,
            Some(other) => return Err(other.unexpected()),
            None => break "run".to_owned(),
        }
    };
    let command = match name.as_str() {
        "run" => plain(&mut parser, &mut config_file, HELP_RUN, None)?.map(|_| Command::Run),
        "status" => plain(&mut parser, &mut config_file, HELP_STATUS, Some("json"))?
            .map(|json| Command::Status { json }),
        "config" => plain(&mut parser, &mut config_file, HELP_CONFIG, Some("check"))?
            .map(|check| Command::Config { check }),
        "demo" => demo(&mut parser)?,
        "gateway" => gateway(&mut parser)?,
        "submit" => submit(&mut parser)?,
        "agents" => agents(&mut parser)?,
        "help" => Parsed::Help(help(&mut parser)?),
        agent::TASK_HELPER => {
            let arguments = parser.raw_args()?.collect();
            Parsed::Command(Command::ExecTask(arguments))
        }
        "__check-index" => Parsed::Command(Command::CheckIndex(parser.value()?.into())),
        other => return Err(format!("unknown command `{other}`").into()),
    };
    let command = match command {
        Parsed::Command(command) => command,
        Parsed::Help(text) => Command::Help(text),
    };
    Ok(Arguments {
        command,
        config_file,
    })
}

/// The help of the command that is named, if one is.
fn help(parser: &mut lexopt::Parser) -> Result<&'static str, lexopt::Error> {
    let name = match parser.next()? {
        None => return Ok(HELP),
        Some(Value(name)) => name.string()?,
        Some(other) => return Err(other.unexpected()),
    };
    match name.as_str() {
        "run" => Ok(HELP_RUN),
        "status" => Ok(HELP_STATUS),
        "config" => Ok(HELP_CONFIG),
        "demo" => Ok(HELP_DEMO),
        "gateway" => Ok(HELP_GATEWAY),
        "submit" => Ok(HELP_SUBMIT),
        "agents" => Ok(HELP_AGENTS),
        other => Err(format!("unknown command `{other}`").into()),
    }
}

fn done(command: Command) -> Result<Arguments, lexopt::Error> {
    Ok(Arguments {
        command,
        config_file: None,
    })
}

enum Parsed<T> {
    Command(T),
    Help(&'static str),
}

impl<T> Parsed<T> {
    fn map<U>(self, make: impl FnOnce(T) -> U) -> Parsed<U> {
        match self {
            Parsed::Command(value) => Parsed::Command(make(value)),
            Parsed::Help(text) => Parsed::Help(text),
        }
    }
}

/// A command with at most one flag.
fn plain(
    parser: &mut lexopt::Parser,
    config_file: &mut Option<PathBuf>,
    help: &'static str,
    flag: Option<&str>,
) -> Result<Parsed<bool>, lexopt::Error> {
    let mut given = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Long("help") | Short('h') => return Ok(Parsed::Help(help)),
            Long("config") => *config_file = Some(parser.value()?.into()),
            Long(name) if Some(name) == flag => given = true,
            other => return Err(other.unexpected()),
        }
    }
    Ok(Parsed::Command(given))
}

fn demo(parser: &mut lexopt::Parser) -> Result<Parsed<Command>, lexopt::Error> {
    let mut command = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Long("help") | Short('h') => return Ok(Parsed::Help(HELP_DEMO)),
            Value(text) if command.is_none() => command = Some(text.string()?),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Parsed::Command(Command::Operator(Operator::Demo {
        command,
    })))
}

fn gateway(parser: &mut lexopt::Parser) -> Result<Parsed<Command>, lexopt::Error> {
    let mut options = GatewayOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("help") | Short('h') => return Ok(Parsed::Help(HELP_GATEWAY)),
            Long("listen") => options.listen = parser.value()?.string()?,
            Long("state") => options.state = parser.value()?.into(),
            Long("token") => options.token = Some(parser.value()?.string()?),
            Long("operator-token") => options.operator_token = Some(parser.value()?.string()?),
            Long("tls-cert") => options.tls_cert = Some(parser.value()?.into()),
            Long("tls-key") => options.tls_key = Some(parser.value()?.into()),
            Long("lease") => options.lease_seconds = Some(parser.value()?.parse()?),
            Long("no-delivery") => options.no_delivery = true,
            Long("no-directives") => options.no_directives = true,
            Long("no-sync") => options.no_sync = true,
            Long("poll-only") => options.poll_only = true,
            Long("legacy-attempts") => options.legacy_attempts = true,
            other => return Err(other.unexpected()),
        }
    }
    if options.listen.is_empty() || options.state.as_os_str().is_empty() {
        return Err("gateway needs --listen ADDRESS and --state DIR".into());
    }
    Ok(Parsed::Command(Command::Operator(Operator::Gateway(
        options,
    ))))
}

fn submit(parser: &mut lexopt::Parser) -> Result<Parsed<Command>, lexopt::Error> {
    let mut options = SubmitOptions::default();
    let mut command = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Long("help") | Short('h') => return Ok(Parsed::Help(HELP_SUBMIT)),
            Long("agent") => options.agent = Some(parser.value()?.string()?),
            Long("priority") => options.priority = parser.value()?.parse()?,
            Long("timeout") => options.timeout_seconds = Some(parser.value()?.parse()?),
            Value(text) if command.is_none() => command = Some(text.string()?),
            other => {
                let name = own(other)?;
                client(parser, &mut options.client, &name)?;
            }
        }
    }
    options.command = command.ok_or("submit needs a COMMAND")?;
    need_gateway(&options.client)?;
    Ok(Parsed::Command(Command::Operator(Operator::Submit(
        options,
    ))))
}

fn agents(parser: &mut lexopt::Parser) -> Result<Parsed<Command>, lexopt::Error> {
    let mut options = ClientOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("help") | Short('h') => return Ok(Parsed::Help(HELP_AGENTS)),
            Long("json") => options.json = true,
            other => {
                let name = own(other)?;
                client(parser, &mut options, &name)?;
            }
        }
    }
    need_gateway(&options)?;
    Ok(Parsed::Command(Command::Operator(Operator::Agents(
        options,
    ))))
}

/// A long option's name, or why the argument is none.
fn own(argument: lexopt::Arg<'_>) -> Result<String, lexopt::Error> {
    match argument {
        Long(name) => Ok(name.to_owned()),
        other => Err(other.unexpected()),
    }
}

fn client(
    parser: &mut lexopt::Parser,
    options: &mut ClientOptions,
    name: &str,
) -> Result<(), lexopt::Error> {
    match name {
        "gateway" => options.gateway = parser.value()?.string()?,
        "operator-token" => options.operator_token = Some(parser.value()?.string()?),
        "ca-file" => options.ca_file = Some(parser.value()?.into()),
        other => return Err(format!("unknown option `--{other}`").into()),
    }
    Ok(())
}

fn need_gateway(options: &ClientOptions) -> Result<(), lexopt::Error> {
    if options.gateway.is_empty() {
        return Err("--gateway URL is needed".into());
    }
    Ok(())
}
