//! Wires the layers together: events in, effects out. The only place that knows all of them.
//!
//! - [`startup`]: from settings to a running agent, and its exit codes.
//! - [`driver`]: the one loop that owns the session.
//! - [`effects`]: what the session wants done, as tasks on the executor.
//! - [`connection`]: one WebSocket connection and its frames.
//! - [`in_hand`]: what was read and found no room yet.
//! - [`pace`]: output that is stored far ahead of what is sent waits a moment.
//! - [`task_host`]: what tasks run in, and what is left of old ones.
//! - [`task`]: one attempt from "about to start" to its stored final.
//! - [`report`]: finals over HTTP.
//! - [`frames`]: what is stored, as the wire wants it.
//! - [`status`], [`lock`]: what an operator asks, and one agent per state directory.
//! - [`notify`]: what the service manager is told.
//! - [`clock_floor`]: a clock that starts in 1970.
//! - [`clock`], [`outside`]: time and the world, which a simulation replaces.
//!
//! One thread runs everything asynchronous. Tasks talk to the driver through one bounded channel
//! of [`driver::Input`]s; nothing else is shared but the store's handle and a few cells.

mod clock;
mod clock_floor;
mod connection;
mod driver;
mod effects;
mod frames;
mod in_hand;
pub mod lock;
mod notify;
mod outside;
mod pace;
mod report;
#[cfg(test)]
mod simulation;
mod startup;
pub mod status;
mod task;
mod task_host;

use std::cell::Cell;
use std::rc::{Rc, Weak};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use smol::LocalExecutor;

use self::driver::Input;
use crate::config::Config;
use crate::executor::host::Host;
use crate::{net, outbox};

pub use self::startup::run;
pub use crate::executor::setup::{COMMAND as TASK_HELPER, run as exec_task};

/// What tasks on the executor need.
struct Context {
    config: Config,
    agent_id: String,
    /// Weak, since the tasks that it holds have this.
    executor: Weak<LocalExecutor<'static>>,
    clock: clock::Clock,
    outbox: outbox::Handle,
    /// Whose processes run.
    host: Rc<Host>,
    dialer: Rc<net::Dialer>,
    websocket: net::Url,
    api: net::Api,
    signer: Rc<net::Signer>,
    inputs: async_channel::Sender<Input>,
    /// A session is active: somebody watches.
    watched: Rc<Cell<bool>>,
    /// Between what tasks print and what the session reads.
    pace: pace::Pace,
    notifier: Rc<notify::Notifier>,
    clock_floor: Rc<clock_floor::ClockFloor>,
    /// The agent has been told to stop.
    stopping: Cell<bool>,
    /// What stands in the place of the world in a simulation.
    #[cfg(test)]
    simulated: Option<Rc<simulation::Outside>>,
}

impl Context {
    /// Runs a task that answers with inputs.
    fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.start(future).detach();
    }

    /// As [`Context::spawn`]; the task ends when what comes back is dropped.
    fn start<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> smol::Task<T> {
        let executor = self.executor.upgrade();
        executor
            .expect("whoever calls this runs on the executor")
            .spawn(future)
    }

    /// Hands an input to the driver; waits while it has many to do.
    async fn tell(&self, input: Input) {
        // The driver ends last, with the process.
        let _ = self.inputs.send(input).await;
    }

    /// Whether output can travel at all.
    fn results_over_websocket(&self) -> bool {
        self.config.ws_enabled && self.config.ws_results_enabled
    }
}

/// Time since boot, suspend included: timers must not stand still while the device sleeps.
fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanos)
}
