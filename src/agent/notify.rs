//! What the service manager is told, when the environment asks for it (sd_notify(3)): up, connected
//! or not, stopping, and at half the watchdog's interval that the agent is alive.
//!
//! Alive means that the driver's loop takes inputs and that the storage thread exists. A disk that
//! does not answer is no reason to be killed: the agent waits for it, and a new process would have
//! to wait as well.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::rc::Rc;
use std::time::Duration;

use async_channel::Sender;
use log::{debug, warn};
use smol::Timer;

use super::driver::{Input, has_caught_up};
use crate::outbox;

#[derive(Debug, Default)]
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    /// The manager restarts an agent that is silent for so long.
    watchdog: Option<Duration>,
    /// The driver runs, so that it can be asked.
    serving: Cell<bool>,
}

impl Notifier {
    /// Does nothing where `NOTIFY_SOCKET` is not set.
    pub fn from_environment() -> Notifier {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Notifier::default();
        };
        match open(&path) {
            Ok(manager) => Notifier {
                manager: Some(manager),
                watchdog: watchdog_interval(
                    std::env::var("WATCHDOG_USEC").ok().as_deref(),
                    std::env::var("WATCHDOG_PID").ok().as_deref(),
                ),
                serving: Cell::new(false),
            },
            Err(why) => {
                warn!(
                    "cannot reach the service manager at {} (NOTIFY_SOCKET): {why}; going on \
                     without",
                    path.display()
                );
                Notifier::default()
            }
        }
    }

    /// The store is open: tasks would be safe from now on.
    pub fn ready(&self) {
        self.tell("READY=1\nSTATUS=not connected yet");
    }

    pub fn connected(&self) {
        self.tell("STATUS=connected");
    }

    pub fn disconnected(&self, why: &str) {
        let line = why.lines().next().unwrap_or_default();
        self.tell(&format!("STATUS=not connected: {line:.200}"));
    }

    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    pub fn serving(&self) {
        self.serving.set(true);
    }

    /// Keeps the watchdog content as long as the agent is alive.
    pub async fn keep_alive(self: Rc<Notifier>, store: outbox::Handle, driver: Sender<Input>) {
        let Some(interval) = self.watchdog else {
            return;
        };
        while !store.is_closed() {
            self.tell("WATCHDOG=1");
            Timer::after(interval / 2).await;
            if self.serving.get() && !has_caught_up(&driver).await {
                return;
            }
        }
    }

    fn tell(&self, text: &str) {
        if let Some((socket, address)) = &self.manager
            && let Err(why) = socket.send_to_addr(text.as_bytes(), address)
        {
            debug!("the service manager is not told {text:?}: {why}");
        }
    }
}

/// `@` stands for the zero byte of an abstract name.
fn open(path: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A manager that does not read must not hold up the agent.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

/// Microseconds, if they are meant for this process.
fn watchdog_interval(micros: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    let ours = pid.is_none_or(|pid| pid == std::process::id().to_string());
    let micros = micros?.parse().ok().filter(|&micros| micros > 0)?;
    ours.then(|| Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_of_another_process_is_not_ours() {
        let own = std::process::id().to_string();
        let check = |micros, pid, expected: Option<u64>| {
            let interval = watchdog_interval(micros, pid);
            assert_eq!(interval, expected.map(Duration::from_micros));
        };
        check(Some("30000000"), None, Some(30_000_000));
        check(Some("30000000"), Some(&own), Some(30_000_000));
        check(Some("30000000"), Some("1"), None);
        check(Some("0"), None, None);
        check(Some("soon"), None, None);
        check(None, None, None);
    }
}
