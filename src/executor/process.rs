//! A process group: signals, exit, reaping. The shell is its leader and stays a zombie until
//! [`Group::reap`], so that nobody else can get its id while signals may be sent to it.

use std::os::unix::process::ExitStatusExt;
use std::process::Child;

use async_io::Async;
use log::warn;
use rustix::fd::OwnedFd;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use smol::Timer;

use super::Cause;
use crate::limits::EXIT_POLL_INTERVAL;

pub struct Group {
    child: Child,
    leader: Pid,
    /// `None` where the kernel has no pidfd (before 5.3) or forbids it.
    exit: Option<Async<OwnedFd>>,
    reaped: bool,
}

impl Group {
    /// The child must lead its own process group.
    pub fn new(child: Child) -> Group {
        let leader = Pid::from_child(&child);
        let exit = pidfd_open(leader, PidfdFlags::NONBLOCK)
            .or_else(|_| pidfd_open(leader, PidfdFlags::empty()))
            .ok()
            .and_then(|fd| Async::new_nonblocking(fd).ok());
        Group {
            child,
            leader,
            exit,
            reaped: false,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the leader has exited, without reaping it.
    pub async fn exited(&self) {
        while !self.has_exited() {
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

    fn has_exited(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        // An error means that there is no such child: it cannot be waited for.
        !matches!(waitid(WaitId::Pid(self.leader), options), Ok(None))
    }

    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        if !self.reaped {
            // ESRCH only says that the group is empty.
            let _ = kill_process_group(self.leader, signal);
        }
    }

    /// Collects the exit status of the leader, which must have exited.
    pub fn reap(&mut self) -> Cause {
        let status = self.child.wait();
        self.reaped = true;
        match status {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Cause::Exited(code),
                (None, Some(signal)) => Cause::Signalled(signal),
                (None, None) => Cause::Signalled(0),
            },
            Err(error) => {
                warn!("the exit status of process {} is lost: {error}", self.id());
                Cause::Signalled(0)
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.kill();
        if self.has_exited() {
            let _ = self.child.wait();
        }
    }
}
