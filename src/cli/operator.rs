//! `gateway`, `submit` and `agents`.

use std::net::{SocketAddr, ToSocketAddrs};

use async_signal::{Signal, Signals};
use futures_lite::StreamExt;
use log::LevelFilter;
use smol::Unblock;

use super::args::{ClientOptions, GatewayOptions, SubmitOptions};
use super::{EXIT_USAGE, complain, print};
use crate::gateway::operator_client::{AgentInfo, OperatorClient, Submission};
use crate::gateway::{Gateway, Options, Settings};

/// Something failed that is neither usage nor settings.
const EXIT_FAILURE: u8 = 1;

fn fail(why: &str) -> u8 {
    complain(why);
    EXIT_FAILURE
}

pub fn gateway(options: GatewayOptions) -> u8 {
    let settings = match gateway_settings(options) {
        Ok(settings) => settings,
        Err(why) => {
            complain(why);
            return EXIT_USAGE;
        }
    };
    crate::logger::init(level_from_environment());
    smol::block_on(async {
        let gateway = match Gateway::bind(settings).await {
            Ok(gateway) => gateway,
            Err(error) => return fail(&error.to_string()),
        };
        let (id, key) = gateway.registration_token();
        print(&format!(
            "listening on {}\nregistration token: HOSTLINK_TOKEN_ID={id} HOSTLINK_TOKEN_KEY={key}\n",
            gateway.address()
        ));
        let (stop, stopped) = async_channel::bounded(1);
        let signals = async {
            if let Ok(mut signals) = Signals::new([Signal::Term, Signal::Int]) {
                signals.next().await;
                drop(stop);
            }
            futures_lite::future::pending().await
        };
        match futures_lite::future::or(gateway.run(stopped), signals).await {
            Ok(()) => 0,
            Err(error) => fail(&error.to_string()),
        }
    })
}

fn gateway_settings(options: GatewayOptions) -> Result<Settings, String> {
    let listen = resolve(&options.listen)?;
    let token = match options.token {
        None => None,
        Some(token) => match token.split_once(':') {
            Some((id, key)) if !id.is_empty() && !key.is_empty() => {
                Some((id.to_owned(), key.to_owned()))
            }
            _ => return Err("--token wants ID:KEY".to_owned()),
        },
    };
    let tls = match (options.tls_cert, options.tls_key) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate, key)),
        _ => return Err("--tls-cert and --tls-key go together".to_owned()),
    };
    Ok(Settings {
        token,
        operator_token: options.operator_token,
        tls,
        options: Options {
            delivery_enabled: !options.no_delivery,
            directives: !options.no_directives,
            lease_interval_seconds: options.lease_seconds,
            poll_only: options.poll_only,
            legacy_attempts: options.legacy_attempts,
            sync: !options.no_sync,
            ..Options::default()
        },
        ..Settings::new(listen, options.state)
    })
}

fn resolve(listen: &str) -> Result<SocketAddr, String> {
    let mut addresses = listen
        .to_socket_addrs()
        .map_err(|error| format!("--listen {listen}: {error}; it wants ADDRESS:PORT"))?;
    addresses
        .next()
        .ok_or_else(|| format!("--listen {listen}: no such address"))
}

/// The gateway has no settings of its own; it logs as an agent would.
fn level_from_environment() -> LevelFilter {
    std::env::var("HOSTLINK_LOG")
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::Info)
}

fn client(options: ClientOptions) -> Result<OperatorClient, String> {
    let client = OperatorClient::new(&options.gateway, options.operator_token)?;
    match options.ca_file {
        None => Ok(client),
        Some(path) => {
            let pem = std::fs::read(&path)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            client.trust(&pem)
        }
    }
}

pub fn submit(options: SubmitOptions) -> u8 {
    let submission = Submission {
        agent_id: options.agent,
        command: options.command,
        priority: options.priority,
        timeout_seconds: options.timeout_seconds,
    };
    let client = match client(options.client) {
        Ok(client) => client,
        Err(why) => return fail(&why),
    };
    let mut stdout = Unblock::new(std::io::stdout());
    let mut stderr = Unblock::new(std::io::stderr());
    match smol::block_on(client.submit(&submission, &mut stdout, &mut stderr)) {
        Ok(code) => u8::try_from(code & 0xff).unwrap_or(EXIT_FAILURE),
        Err(why) => fail(&why),
    }
}

pub fn agents(options: ClientOptions) -> u8 {
    let json = options.json;
    let agents = client(options).and_then(|client| smol::block_on(client.agents()));
    match agents {
        Err(why) => fail(&why),
        Ok(agents) if json => {
            let text = serde_json::to_string_pretty(&agents).unwrap_or_default();
            print(&format!("{text}\n"))
        }
        Ok(agents) => print(&agents.iter().map(line).collect::<String>()),
    }
}

fn line(agent: &AgentInfo) -> String {
    let session = match &agent.connected_since {
        Some(since) => format!("connected since {since}"),
        None => match &agent.last_seen {
            Some(seen) => format!("last seen {seen}"),
            None => "never seen".to_owned(),
        },
    };
    format!(
        "{}  {}  {session}  {} running, {} pending\n",
        agent.id, agent.hostname, agent.running_tasks, agent.pending_tasks
    )
}
