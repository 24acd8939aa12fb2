//! What an operator asks on the device: served over a Unix socket in the abstract namespace, which
//! needs no writable file system and goes away with the process.

use std::fmt;
use std::io::{self, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_io::Async;
use futures_lite::AsyncWriteExt;
use log::warn;
use rustix::net::sockopt::socket_peercred;
use serde::{Deserialize, Serialize};
use smol::Timer;

use crate::ids::AttemptKey;
use crate::outbox::Counts;
use crate::wire::Timestamp;

/// An answer is far smaller; a stranger on the socket sends no more than this.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// 0 while the agent is not running.
    pub pid: u32,
    pub version: String,
    pub agent_id: Option<String>,
    /// `off`, `down`, `connecting`, `handshake`, `active`, or `not running`.
    pub session: String,
    pub session_since_seconds: u64,
    pub last_error: Option<String>,
    /// Task and attempt ids.
    pub running: Vec<String>,
    pub queued: usize,
    pub polling: bool,
    pub store: Counts,
}

impl Status {
    /// What can be told while no agent runs.
    pub fn not_running(store: Counts) -> Status {
        Status {
            session: "not running".to_owned(),
            store,
            ..Status::default()
        }
    }

    /// 0 connected, 1 not connected, 2 not running, 3 volatile store.
    pub fn exit_code(&self) -> u8 {
        if self.pid == 0 {
            2
        } else if self.store.volatile {
            3
        } else if self.session == "active" {
            0
        } else {
            1
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == 0 {
            writeln!(f, "agent     not running")?;
        } else {
            let id = self.agent_id.as_deref().unwrap_or("not registered");
            writeln!(
                f,
                "agent     {id}, version {}, process {}",
                self.version, self.pid
            )?;
            let since = show_seconds(self.session_since_seconds);
            writeln!(f, "session   {} for {since}", self.session)?;
            writeln!(f, "polling   {}", if self.polling { "yes" } else { "no" })?;
        }
        if let Some(error) = &self.last_error {
            writeln!(f, "last      {error}")?;
        }
        for task in &self.running {
            writeln!(f, "running   {task}")?;
        }
        if self.pid != 0 {
            writeln!(f, "queued    {} tasks", self.queued)?;
        }
        let store = &self.store;
        write!(
            f,
            "waiting   {} messages, {} bytes",
            store.messages_waiting, store.bytes_waiting
        )?;
        if let Some(oldest) = store.oldest_waiting_ms {
            write!(f, ", the oldest since {}", Timestamp(oldest))?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "space     {} of {} bytes",
            store.bytes_used, store.byte_cap
        )?;
        if store.volatile {
            let why = store.volatile_reason.as_deref().unwrap_or("by choice");
            writeln!(f, "store     IN MEMORY ONLY, lost at a restart: {why}")?;
        }
        if store.chunks_dropped > 0 || store.streams_truncated > 0 || store.finals_dropped > 0 {
            writeln!(
                f,
                "dropped   {} chunks, {} bytes; {} streams truncated; {} finals",
                store.chunks_dropped,
                store.bytes_dropped,
                store.streams_truncated,
                store.finals_dropped
            )?;
        }
        if store.records_damaged > 0 {
            writeln!(
                f,
                "damaged   {} records were unreadable",
                store.records_damaged
            )?;
        }
        Ok(())
    }
}

fn show_seconds(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// The socket of the agent of a state directory.
fn address(state_path: &Path) -> io::Result<SocketAddr> {
    let path = state_path
        .canonicalize()
        .unwrap_or_else(|_| state_path.to_owned());
    let name = AttemptKey::of("status", &path.to_string_lossy());
    SocketAddr::from_abstract_name(format!("hostlink-edge-{name}"))
}

/// Answers each connection with the status and closes it. Only for the agent's own user and root.
/// Never returns: without a socket, there is no status and the agent goes on.
pub async fn serve(state_path: PathBuf, provider: impl AsyncFn() -> Status) {
    let listener = address(&state_path)
        .and_then(|address| UnixListener::bind_addr(&address))
        .and_then(Async::new);
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => {
            warn!("`status` will not work, its socket cannot be opened: {error}");
            return futures_lite::future::pending().await;
        }
    };
    loop {
        let Ok((connection, _)) = listener.accept().await else {
            // Out of descriptors, most likely: it passes.
            Timer::after(ANSWER_TIMEOUT).await;
            continue;
        };
        let owner = rustix::process::geteuid();
        let allowed =
            socket_peercred(&connection).is_ok_and(|peer| peer.uid == owner || peer.uid.is_root());
        if allowed {
            answer(connection, provider().await).await;
        }
    }
}

async fn answer(mut connection: Async<UnixStream>, status: Status) {
    let Ok(text) = serde_json::to_vec(&status) else {
        return;
    };
    let write = async {
        // Whoever asked may be gone.
        let _ = connection.write_all(&text).await;
    };
    let patience = async {
        Timer::after(ANSWER_TIMEOUT).await;
    };
    futures_lite::future::or(write, patience).await;
}

/// Asks the running agent of a state directory. `None` if there is none.
pub fn ask(state_path: &Path) -> io::Result<Option<Status>> {
    let connection = match UnixStream::connect_addr(&address(state_path)?) {
        Ok(connection) => connection,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Err(error) => return Err(error),
    };
    connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let mut text = Vec::new();
    connection.take(ANSWER_BYTES_MAX).read_to_end(&mut text)?;
    if text.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the agent answers its own user and root only",
        ));
    }
    Ok(Some(serde_json::from_slice(&text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_agent_is_asked_over_its_socket() {
        let path = std::env::temp_dir().join(format!("hostlink-status-{}", std::process::id()));
        assert_eq!(ask(&path).expect("nobody there"), None);
        let status = Status {
            pid: 7,
            session: "active".into(),
            ..Status::default()
        };
        let expected = status.clone();
        let asked = async {
            let path = path.clone();
            loop {
                let path = path.clone();
                if let Some(status) = smol::unblock(move || ask(&path)).await.expect("answer") {
                    return status;
                }
            }
        };
        let served = async {
            serve(path.clone(), async || status.clone()).await;
            unreachable!("it never returns")
        };
        let answer = smol::block_on(futures_lite::future::or(asked, served));
        assert_eq!(answer, expected);
        assert_eq!(answer.exit_code(), 0);
    }

    #[test]
    fn exit_codes_say_what_matters_most() {
        let mut status = Status::not_running(Counts::default());
        assert_eq!(status.exit_code(), 2);
        status.pid = 1;
        assert_eq!(status.exit_code(), 1);
        status.store.volatile = true;
        assert_eq!(status.exit_code(), 3);
    }
}
