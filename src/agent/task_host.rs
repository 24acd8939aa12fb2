//! What tasks run in, from the settings to the [`Host`] of the executor, and what an earlier life of
//! this agent has left of them.

use std::rc::Rc;

use async_signal::{Signal, Signals};
use futures_lite::StreamExt;
use log::{error, warn};

use crate::config::Config;
use crate::executor::account::Account;
use crate::executor::host::{Host, Leftovers};
use crate::executor::setup::Setup;
use crate::ids::{AttemptKey, Ids};
use crate::outbox;

/// The host of this agent's tasks, named by what is its own for good: its device, its state and,
/// where devices share a kernel, its processes.
pub fn new(config: &Config, fingerprint: &str) -> Host {
    let state = std::fs::canonicalize(&config.state_path);
    let state = state.unwrap_or_else(|_| config.state_path.clone());
    let processes = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let name = format!("{} {}", state.display(), processes.display());
    let leftovers = match config.task_leftovers_keep {
        true => Leftovers::Keep,
        false => Leftovers::Kill,
    };
    let agent = AttemptKey::of(fingerprint, &name).to_string();
    let host = Host::new(&agent, leftovers, setup(config));
    host.adopt_orphans();
    host
}

fn setup(config: &Config) -> Setup {
    if let Some(user) = &config.task_user
        && let Err(why) = Account::find(user)
    {
        // Never as somebody else instead.
        error!("every task will fail until this is corrected: {why}");
    }
    Setup {
        user: config.task_user.clone(),
        dir: config.task_dir.clone(),
        umask: config.task_umask,
        nice: config.task_nice,
        processes_max: None,
    }
}

/// Before anything is said about interrupted tasks, nothing of them is left.
pub async fn end_old_tasks(host: &Host, recovered: &outbox::Recovered) {
    let interrupted: Vec<AttemptKey> = recovered.interrupted.iter().map(Ids::key).collect();
    match host.end_old_tasks(&interrupted).await {
        0 => {}
        count => warn!("ended {count} processes that tasks of an earlier start had left running"),
    }
}

/// Collects what tasks have orphaned, as soon as it has exited.
pub async fn collect_orphans(host: Rc<Host>) {
    let mut exits = match Signals::new([Signal::Child]) {
        Ok(exits) => exits,
        Err(error) => {
            warn!("orphans of tasks are collected when a task ends: {error}");
            return;
        }
    };
    while exits.next().await.is_some() {
        host.collect_adopted();
    }
}
