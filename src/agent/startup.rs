//! From settings to a running agent, and what each way of failing exits with.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use async_signal::{Signal, Signals};
use futures_lite::{FutureExt, StreamExt, future};
use log::{error, info, warn};
use smol::{LocalExecutor, Timer};

use super::clock::Clock;
use super::clock_floor::ClockFloor;
use super::driver::{Driver, Input, queued_tasks};
use super::lock::{self, LockError};
use super::notify::Notifier;
use super::pace::Pace;
use super::status::{self, Status};
use super::{Context, boot_time, task_host};
use crate::config::Config;
use crate::executor::host::Host;
use crate::limits::{NETWORK_RETURN_JITTER, REGISTRATION_RETRY_MAX};
use crate::net::{self, Identity, Url};
use crate::outbox;
use crate::session::{self, Session};
use crate::wire::http::{RegisterRequest, Tag};

/// Exit codes, after `sysexits.h`.
pub const EXIT_OK: u8 = 0;
pub const EXIT_BUSY: u8 = 75;
pub const EXIT_CONFIG: u8 = 78;

/// Inputs that wait for the driver; a further sender waits.
const INPUTS_WAITING: usize = 64;

/// Runs the agent until it is told to stop. Returns the exit code.
pub fn run(config: Config) -> u8 {
    let executor = Rc::new(LocalExecutor::new());
    // On the heap: the executor's own future would hold it, and the stack with it, four times over
    // (1.8 MiB resident instead of 0.2). A task like all others: whatever wakes the future that is
    // blocked on, costs a turn of the reactor, five system calls.
    let agent = executor.spawn(Box::pin(start(config, executor.clone())));
    smol::block_on(executor.run(agent))
}

async fn start(config: Config, executor: Rc<LocalExecutor<'static>>) -> u8 {
    let begun = boot_time();
    // First of all: a stop during the start is an orderly one too.
    let signals = Signals::new([Signal::Term, Signal::Int]);
    let _lock = match lock::acquire(&config.state_path) {
        Ok(lock) => Some(lock),
        Err(error @ LockError::Held { .. }) => {
            error!("{error}");
            return EXIT_BUSY;
        }
        Err(error @ LockError::Unavailable { .. }) => {
            warn!("{error}; going on without");
            None
        }
    };
    // Before the first certificate is looked at, and before records are dated.
    let clock_floor = Rc::new(ClockFloor::at_start(&config.state_path, config.set_clock));
    let settings = match network_settings(&config) {
        Ok(settings) => settings,
        Err(why) => {
            error!("{why}");
            return EXIT_CONFIG;
        }
    };
    let (inputs, to_driver) = async_channel::bounded(INPUTS_WAITING);
    let (terminate, terminated) = async_channel::bounded(1);
    let notifier = Rc::new(Notifier::from_environment());
    executor
        .spawn(watch_signals(
            signals,
            inputs.clone(),
            terminate,
            notifier.clone(),
        ))
        .detach();
    info!(
        "hostlink-edge {} for {}",
        env!("CARGO_PKG_VERSION"),
        config.control_plane_url
    );
    // At the same time: one proves the key, the other reads the log, each on its own thread.
    let identity = Identity::load_or_create(
        &config.state_path,
        &config.private_key_path,
        &config.fingerprint_path,
    );
    let opened = outbox::open(outbox_settings(&config));
    let (identity, (store, recovered)) = future::zip(identity, opened).await;
    let identity = match identity {
        Ok(identity) => identity,
        Err(error) => {
            error!("{error}");
            store.close().await;
            return EXIT_CONFIG;
        }
    };
    let host = Rc::new(task_host::new(&config, identity.fingerprint()));
    executor
        .spawn(task_host::collect_orphans(host.clone()))
        .detach();
    task_host::end_old_tasks(&host, &recovered).await;
    for ids in &recovered.interrupted {
        warn!("task {ids}: interrupted, the agent or the device stopped while it ran");
    }
    notifier.ready();
    executor
        .spawn(notifier.clone().keep_alive(store.clone(), inputs.clone()))
        .detach();
    let interfaces = Rc::new(net::Interfaces::watch());
    let parts = Parts {
        interfaces: interfaces.clone(),
        config,
        notifier,
        clock_floor,
        settings,
        identity,
        store: store.clone(),
        host: host.clone(),
        executor: executor.clone(),
        inputs,
        refusal: Rc::default(),
    };
    let stopped = async {
        let _ = terminated.recv().await;
        None
    };
    let status = Rc::new(StatusSource {
        refusal: parts.refusal.clone(),
        context: OnceCell::new(),
        store: store.clone(),
        begun,
    });
    let state_path = parts.config.state_path.clone();
    let provider = status.clone();
    let answers = executor.spawn(async move {
        status::serve(state_path, async || provider.now().await).await;
    });
    if let Some(context) = Box::pin(parts.register().or(stopped)).await {
        let context = Rc::new(context);
        let _ = status.context.set(context.clone());
        context.spawn(tell_returns(context.clone(), interfaces));
        Box::pin(serve(context, recovered, to_driver, begun)).await;
    }
    // The name of the socket is free before the lock is.
    answers.cancel().await;
    host.close();
    store.close().await;
    info!("stopped");
    EXIT_OK
}

/// Runs the driver and what answers beside it, until an orderly stop.
async fn serve(
    context: Rc<Context>,
    recovered: outbox::Recovered,
    to_driver: Receiver<Input>,
    begun: Duration,
) {
    let mut session = new_session(&context, begun);
    session.recovered(queued_tasks(recovered));
    let driver = Driver::new(context.clone(), session, begun);

    let (clock_floor, signer) = (context.clock_floor.clone(), context.signer.clone());
    context.spawn(async move { clock_floor.keep(signer.clock()).await });
    let reopened = async {
        let reopened = context.outbox.reopened();
        while let Ok(recovered) = reopened.recv().await {
            context.tell(Input::Reopened(recovered)).await;
        }
        future::pending().await
    };
    driver.run(to_driver).or(reopened).await;
}

/// On the heap. In a function of its own, since a session stands on the stack first: 60 KiB that the
/// caller, which waits until the end, would keep.
#[inline(never)]
fn new_session(context: &Context, begun: Duration) -> Box<Session<outbox::Cursor>> {
    let settings = session_settings(&context.config, context.agent_id.clone());
    let incarnation = context.outbox.incarnation().to_string();
    let now = boot_time().saturating_sub(begun);
    Box::new(Session::new(settings, incarnation, random_seed(), now))
}

/// What the session needs to know of the settings.
pub(super) fn session_settings(config: &Config, agent_id: String) -> session::Settings {
    session::Settings {
        agent_id,
        websocket: config.ws_enabled,
        results: config.ws_results_enabled,
        delivery: config.ws_delivery_enabled,
        reconnect_min: config.ws_reconnect_min,
        reconnect_max: config.ws_reconnect_max,
        ping_interval: config.ws_ping_interval,
        fallback_threshold: config.polling_fallback_threshold,
        poll_interval: config.task_poll_interval,
        heartbeat_interval: config.heartbeat_interval,
        concurrency: config.task_concurrency,
    }
}

/// What `status` is told, from the opened outbox to the end.
struct StatusSource {
    /// Why the device is not registered yet.
    refusal: Rc<RefCell<Option<String>>>,
    /// Set once it is registered.
    context: OnceCell<Rc<Context>>,
    store: outbox::Handle,
    begun: Duration,
}

impl StatusSource {
    async fn now(&self) -> Status {
        let mut status = match self.context.get() {
            Some(context) => {
                let (reply, answer) = async_channel::bounded(1);
                context.tell(Input::Status(reply)).await;
                answer.recv().await.unwrap_or_default()
            }
            None => Status {
                session_since_seconds: boot_time().saturating_sub(self.begun).as_secs(),
                last_error: self.refusal.borrow().clone(),
                ..Status::of_this_process("registering")
            },
        };
        status.store = self.store.counts().await;
        status
    }
}

/// A dial that waits need not wait longer.
async fn tell_returns(context: Rc<Context>, interfaces: Rc<net::Interfaces>) {
    loop {
        let was_gone = interfaces.returned().await;
        context.tell(Input::NetworkReturned(was_gone)).await;
    }
}

struct Parts {
    config: Config,
    interfaces: Rc<net::Interfaces>,
    notifier: Rc<Notifier>,
    clock_floor: Rc<ClockFloor>,
    settings: net::Settings,
    identity: Identity,
    store: outbox::Handle,
    host: Rc<Host>,
    executor: Rc<LocalExecutor<'static>>,
    inputs: Sender<Input>,
    refusal: Rc<RefCell<Option<String>>>,
}

impl Parts {
    /// Has the server give this device its id, unless it is known. Never gives up.
    async fn register(mut self) -> Option<Context> {
        let server_clock = net::ServerClock::new(&self.settings.control_plane);
        let websocket = self.settings.websocket.clone();
        let dialer = Rc::new(net::Dialer::new(self.settings.clone()));
        let api = net::Api::new(dialer.clone(), server_clock.clone());
        while self.identity.agent_id().is_none() {
            let agent_id = self.ask_for_id(&api).await;
            match self.identity.store_agent_id(&agent_id).await {
                Ok(()) => info!("registered as agent {agent_id}"),
                Err(error) => warn!("{error}; the next start registers again"),
            }
            if self.identity.agent_id().is_none() {
                Timer::after(self.config.registration_retry_initial_delay).await;
            }
        }
        let signer = Rc::new(self.identity.signer(server_clock)?);
        api.set_signer(signer.clone());
        Some(Context {
            api,
            agent_id: signer.agent_id().to_owned(),
            config: self.config,
            executor: Rc::downgrade(&self.executor),
            clock: Clock::Boot,
            outbox: self.store,
            host: self.host,
            dialer,
            websocket,
            signer,
            inputs: self.inputs,
            watched: Rc::new(Cell::new(false)),
            pace: Pace::default(),
            notifier: self.notifier,
            clock_floor: self.clock_floor,
            stopping: Cell::new(false),
            #[cfg(test)]
            simulated: None,
        })
    }

    async fn ask_for_id(&self, api: &net::Api) -> String {
        let config = &self.config;
        let mut delay = config.registration_retry_initial_delay;
        loop {
            let request = self.registration();
            let why = match (&config.token_id, &config.token_key) {
                (Some(_), Some(_)) => match api.register(&request).await {
                    Ok(answer) if !answer.id.is_empty() => return answer.id,
                    Ok(_) => "the server's answer names no agent id".to_owned(),
                    Err(error) => {
                        let why = error.to_string();
                        self.clock_floor.doubt(&why);
                        why
                    }
                },
                _ => "HOSTLINK_TOKEN_ID and HOSTLINK_TOKEN_KEY are not both set, and this device \
                      has no agent id yet"
                    .to_owned(),
            };
            warn!(
                "not registered, trying again in {} s: {why}",
                delay.as_secs_f32()
            );
            self.refusal.replace(Some(why));
            let over = async {
                Timer::after(delay).await;
                (delay * 2).min(REGISTRATION_RETRY_MAX)
            };
            let returned = async {
                self.interfaces.returned().await;
                // Its name servers and routes may take a moment longer.
                Timer::after(NETWORK_RETURN_JITTER).await;
                config.registration_retry_initial_delay
            };
            delay = over.or(returned).await;
        }
    }

    fn registration(&self) -> RegisterRequest {
        let tag = |key: &str, value: &str| Tag {
            key: key.to_owned(),
            value: value.to_owned(),
        };
        let uname = rustix::system::uname();
        RegisterRequest {
            fingerprint: self.identity.fingerprint().to_owned(),
            token_id: self.config.token_id.clone().unwrap_or_default(),
            token_key: self
                .config
                .token_key
                .as_ref()
                .map(|key| key.reveal().to_owned())
                .unwrap_or_default(),
            public_key: self.identity.public_key_base64(),
            public_key_type: "RSA".to_owned(),
            tags: vec![
                tag("hostname", &uname.nodename().to_string_lossy()),
                tag("os", std::env::consts::OS),
                tag("arch", std::env::consts::ARCH),
            ],
        }
    }
}

fn network_settings(config: &Config) -> Result<net::Settings, String> {
    let control_plane = Url::parse(&config.control_plane_url, net::Kind::Http)
        .map_err(|why| format!("SH_CONTROL_PLANE_URL: {why}"))?;
    let mut settings = net::Settings::new(control_plane);
    if let Some(url) = &config.ws_url {
        match Url::parse(url, net::Kind::WebSocket) {
            Ok(url) => settings.websocket = url,
            Err(why) => warn!("HOSTLINK_WS_URL is ignored: {why}"),
        }
    }
    settings.ca_file.clone_from(&config.ca_file);
    settings.client_cert.clone_from(&config.client_cert);
    settings.client_key.clone_from(&config.client_key);
    settings.https_proxy.clone_from(&config.https_proxy);
    settings.http_proxy.clone_from(&config.http_proxy);
    settings.no_proxy.clone_from(&config.no_proxy);
    Ok(settings)
}

fn outbox_settings(config: &Config) -> outbox::Settings {
    outbox::Settings {
        dir: config.local_store_path.clone(),
        memory_only: config.local_store_memory,
        cap_bytes: config.spool_cap_bytes,
        terminal_reserve_bytes: config.terminal_reserve_bytes,
        final_output_bytes: config.final_output_bytes,
        index_checker: std::env::current_exe().ok(),
    }
}

/// The first TERM or INT stops the agent in order; a further one ends running tasks at once.
async fn watch_signals(
    signals: std::io::Result<Signals>,
    inputs: Sender<Input>,
    terminate: Sender<()>,
    notifier: Rc<Notifier>,
) {
    let mut signals = match signals {
        Ok(signals) => signals,
        Err(error) => {
            warn!("signals cannot be handled, a stop will be abrupt: {error}");
            return;
        }
    };
    while let Some(signal) = signals.next().await {
        if signal.is_ok() {
            notifier.stopping();
            let _ = terminate.try_send(());
            let _ = inputs.send(Input::Terminate).await;
        }
    }
}

/// Jitter and names must differ from start to start and from device to device.
fn random_seed() -> u64 {
    let mut bytes = [0; 8];
    match openssl::rand::rand_bytes(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => boot_time().as_nanos() as u64 ^ u64::from(std::process::id()),
    }
}
