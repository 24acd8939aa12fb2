//! The processes of a task: signals, exit, reaping. The shell leads their group and stays a zombie
//! until [`Group::reap`], so that nobody else can get its id while signals may be sent to the group.
//! Those that have left the group are found by [`Host`].
//!
//! The exit is told by a pidfd. Where the kernel has none (before 5.3) or forbids it, the leader is
//! looked at every [`EXIT_POLL_INTERVAL`]: SIGCHLD would need a handler for the whole process, and
//! reaches one reader only, for a few milliseconds gained on old kernels.

use std::cell::RefCell;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::rc::Rc;

use async_io::Async;
use log::warn;
use rustix::fd::OwnedFd;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use smol::Timer;

use super::cgroup::Leaf;
use super::emptying;
use super::ending::Hunt;
use super::host::Host;
use super::procfs::Process;
use super::{Cause, Usage};
use crate::ids::AttemptKey;
use crate::limits::{
    DROPPED_TASK_LOOKS, EXIT_POLL_INTERVAL, GROUP_POLL_INTERVAL_MIN, LEFTOVER_GRACE,
};
use crate::reaping;

pub struct Group {
    host: Rc<Host>,
    key: AttemptKey,
    child: Child,
    leader: Pid,
    /// `None` where the kernel has no pidfd.
    exit: Option<Async<OwnedFd>>,
    reaped: bool,
}

impl Group {
    /// The child must lead its own process group.
    pub fn new(host: Rc<Host>, key: AttemptKey, child: Child) -> Group {
        let leader = Pid::from_child(&child);
        let exit = pidfd_open(leader, PidfdFlags::NONBLOCK)
            .or_else(|_| pidfd_open(leader, PidfdFlags::empty()))
            .ok()
            .and_then(|fd| Async::new_nonblocking(fd).ok());
        Group::with(host, key, child, exit)
    }

    /// Without a pidfd the exit is polled.
    pub(super) fn with(
        host: Rc<Host>,
        key: AttemptKey,
        child: Child,
        exit: Option<Async<OwnedFd>>,
    ) -> Group {
        let leader = Pid::from_child(&child);
        host.has_started(leader, key);
        Group {
            host,
            key,
            leader,
            child,
            exit,
            reaped: false,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the leader has exited, without reaping it.
    pub async fn exited(&self) {
        while !has_exited(self.leader) {
            match &self.exit {
                Some(exit) => {
                    if exit.readable().await.is_err() {
                        Timer::after(EXIT_POLL_INTERVAL).await;
                    }
                }
                None => {
                    Timer::after(EXIT_POLL_INTERVAL).await;
                }
            }
        }
    }

    /// Waits until the leader has exited and nobody else of the task is alive.
    pub async fn ended(&self) {
        self.exited().await;
        emptying::emptied(self.leaf().as_slice()).await;
        self.hunt().gone().await;
    }

    pub fn terminate(&self) {
        // While they are found they start no others.
        let frozen = self.leaf().filter(Leaf::freeze);
        self.signal_group(Signal::TERM);
        // Once for each: a trap that tidies up runs as often as the signal comes.
        let group = self.leader.as_raw_pid();
        let mut hunt = self.hunt();
        hunt.look();
        hunt.terminate(|member| member.group != group);
        if let Some(leaf) = frozen {
            leaf.thaw();
        }
    }

    /// Kills everybody, and waits until they are gone and the leader has exited.
    pub async fn kill(&self) {
        self.signal_group(Signal::KILL);
        emptying::kill(self.leaf().as_slice()).await;
        self.hunt().kill().await;
        self.exited().await;
    }

    /// Ends what is left after the leader's exit.
    pub async fn end_leftovers(&self) {
        emptying::end(self.leaf().as_slice(), LEFTOVER_GRACE).await;
        self.hunt().end(LEFTOVER_GRACE).await;
    }

    fn leaf(&self) -> Option<Leaf> {
        self.host.leaf(self.key)
    }

    fn hunt(&self) -> Hunt<impl Fn(&[Process]) -> Vec<Process>> {
        self.host.hunt(self.leader, self.key)
    }

    fn signal_group(&self, signal: Signal) {
        if !self.reaped {
            // ESRCH only says that the group is empty.
            let _ = kill_process_group(self.leader, signal);
        }
    }

    /// Collects the exit status of the leader, which must have exited.
    pub fn reap(&mut self) -> (Cause, Usage) {
        let ended = reaping::collect(self.id());
        self.reaped = true;
        self.host.has_ended(self.leader);
        self.host.collect_adopted();
        match ended {
            Ok((status, used)) => {
                let cause = match (status.code(), status.signal()) {
                    (Some(code), _) => Cause::Exited(code),
                    (None, signal) => Cause::Signalled(signal.unwrap_or(0)),
                };
                let usage = Usage {
                    user: used.user,
                    system: used.system,
                    memory_peak_bytes: used.memory_peak_bytes,
                };
                (cause, usage)
            }
            Err(error) => {
                warn!("the exit status of process {} is lost: {error}", self.id());
                (Cause::Signalled(0), Usage::default())
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.signal_group(Signal::KILL);
        if let Some(leaf) = self.leaf() {
            leaf.kill();
        }
        for member in self.host.living(self.leader, self.key, &[]) {
            member.signal(Signal::KILL);
        }
        self.host.has_ended(self.leader);
        // Nobody can be awaited here. A killed process is gone within a millisecond or so, unless
        // it sleeps where no signal reaches it: then its zombie is collected later.
        for _ in 0..DROPPED_TASK_LOOKS {
            if collected(self.leader) {
                return;
            }
            std::thread::sleep(GROUP_POLL_INTERVAL_MIN);
        }
        DROPPED.with_borrow_mut(|dropped| dropped.push(self.leader));
    }
}

thread_local! {
    /// Leaders that were killed and had not exited when their task was dropped. They are children
    /// still to be waited for, so their ids are not used again.
    static DROPPED: RefCell<Vec<Pid>> = const { RefCell::new(Vec::new()) };
}

/// Collects what tasks that were dropped have left behind.
pub fn collect_dropped() {
    DROPPED.with_borrow_mut(|dropped| dropped.retain(|&leader| !collected(leader)));
}

/// Whether [`collect_dropped`] will collect this child.
pub fn is_dropped(id: Pid) -> bool {
    DROPPED.with_borrow(|dropped| dropped.contains(&id))
}

fn has_exited(leader: Pid) -> bool {
    is_over(leader, WaitIdOptions::NOWAIT)
}

/// Takes the exit status from the kernel, if there is one.
fn collected(leader: Pid) -> bool {
    is_over(leader, WaitIdOptions::empty())
}

fn is_over(leader: Pid, option: WaitIdOptions) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | option;
    // An error means that there is no such child: it cannot be waited for.
    !matches!(waitid(WaitId::Pid(leader), options), Ok(None))
}
