//! What tasks run in, from the settings to the [`Host`] of the executor, and what an earlier life of
//! this agent has left of them.

use std::rc::Rc;

use async_signal::{Signal, Signals};
use futures_lite::{StreamExt, future};
use log::{error, info, warn};
use smol::Timer;

use crate::config::Config;
use crate::executor::account::Account;
use crate::executor::cgroup::{Bounds, Cgroups};
use crate::executor::host::{Host, Leftovers};
use crate::executor::setup::Setup;
use crate::ids::{AttemptKey, Ids};
use crate::limits::COLLECT_DELAY;
use crate::outbox;

/// In the state directory: the processes that lead running tasks.
const RECORD_FILE: &str = "tasks.running";

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
    let (cgroups, complaints) = cgroups(config, &agent);
    let kept = cgroups.as_ref().map(Cgroups::bounds).unwrap_or_default();
    let setup = setup(config, kept);
    complain(config, kept, &setup, complaints);
    let record = config.state_path.join(RECORD_FILE);
    let mut host = Host::new(&agent, leftovers, setup).with_record(&record);
    if let Some(cgroups) = cgroups {
        host = host.with_cgroups(cgroups);
    }
    host.adopt_orphans();
    host
}

/// Says which way is used to find the processes of a task.
fn cgroups(config: &Config, agent: &str) -> (Option<Cgroups>, Vec<String>) {
    let opened = match config.task_cgroup {
        true => Cgroups::open(agent, wanted(config)),
        false => Err("switched off by HOSTLINK_TASK_CGROUP".to_owned()),
    };
    match opened {
        Ok((cgroups, complaints)) => {
            info!("each task gets a cgroup below {}", cgroups.dir().display());
            (Some(cgroups), complaints)
        }
        Err(why) => {
            info!("tasks are followed by parent and environment, without cgroups: {why}");
            (None, vec![why])
        }
    }
}

fn wanted(config: &Config) -> Bounds {
    Bounds {
        memory_bytes: config.task_memory_max,
        processes: config.task_pids_max,
        cpu_percent: config.task_cpu_max,
    }
}

/// Names the bounds that were asked for and that nothing keeps.
fn complain(config: &Config, kept: Bounds, setup: &Setup, reasons: Vec<String>) {
    let wanted = wanted(config);
    let mut unbounded = Vec::new();
    if wanted.memory_bytes != kept.memory_bytes {
        unbounded.push("HOSTLINK_TASK_MEMORY_MAX");
    }
    if wanted.processes.or(setup.processes_max) != kept.processes.or(setup.processes_max) {
        unbounded.push("HOSTLINK_TASK_PIDS_MAX");
    }
    if wanted.cpu_percent != kept.cpu_percent {
        unbounded.push("HOSTLINK_TASK_CPU_MAX");
    }
    if !unbounded.is_empty() {
        warn!(
            "tasks run without the bounds {}: {}",
            unbounded.join(", "),
            reasons.join("; ")
        );
    }
}

fn setup(config: &Config, kept: Bounds) -> Setup {
    let account = match config.task_user.as_deref().map(Account::find) {
        // Never as somebody else instead.
        Some(Err(why)) => {
            error!("every task will fail until this is corrected: {why}");
            None
        }
        found => found.and_then(Result::ok),
    };
    // Bounds the user, not the task: the same only for a user that has nothing but tasks, and the
    // kernel does not bound root.
    let own = account.is_some_and(|it| it.uid != 0 && it.uid != rustix::process::getuid().as_raw());
    let processes_max = config
        .task_pids_max
        .filter(|_| own && kept.processes.is_none());
    if let Some(count) = processes_max {
        info!("without a cgroup, {count} processes at most is a bound of the user of all tasks");
    }
    Setup {
        user: config.task_user.clone(),
        dir: config.task_dir.clone(),
        umask: config.task_umask,
        nice: config.task_nice,
        processes_max,
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

/// Collects what tasks have orphaned, soon after it has exited.
pub async fn collect_orphans(host: Rc<Host>) {
    let mut exits = match Signals::new([Signal::Child]) {
        Ok(exits) => exits,
        Err(error) => {
            warn!("orphans of tasks are collected when a task ends: {error}");
            return;
        }
    };
    while exits.next().await.is_some() {
        // Those that exit together are collected together: each look reads about all children.
        Timer::after(COLLECT_DELAY).await;
        while let Some(Some(_)) = future::poll_once(exits.next()).await {}
        host.collect_adopted();
    }
}
