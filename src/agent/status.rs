//! What an operator asks on the device: served over a Unix socket in the abstract namespace, which
//! needs no writable file system and goes away with the process.

use std::fmt;
use std::io::{self, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_io::Async;
use futures_lite::AsyncWriteExt;
use log::warn;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use smol::Timer;

use crate::ids::AttemptKey;
use crate::outbox::Counts;
use crate::wire::Timestamp;

/// An answer is far smaller; a stranger on the socket sends no more than this.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
const NOT_RUNNING: &str = "not running";
const STARTING: &str = "starting";
const NO_ANSWER: &str = "no answer";

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// 0 while the agent is not running, or its process is not known.
    pub pid: u32,
    pub version: String,
    pub agent_id: Option<String>,
    /// `registering`, `off`, `down`, `connecting`, `handshake` or `active` as the agent says it. Seen
    /// from outside also `not running`, `starting` (it runs but has not opened its outbox yet) or
    /// `no answer`.
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
    /// What a running agent says of itself before there is a session.
    pub fn of_this_process(session: &str) -> Status {
        Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            session: session.to_owned(),
            ..Status::default()
        }
    }

    /// What can be told while no agent runs.
    pub fn not_running(store: Counts) -> Status {
        Status {
            session: NOT_RUNNING.to_owned(),
            store,
            ..Status::default()
        }
    }

    /// What can be told of an agent that holds its state directory and has no socket yet.
    pub fn starting(pid: u32, store: Counts) -> Status {
        Status {
            pid,
            session: STARTING.to_owned(),
            store,
            ..Status::default()
        }
    }

    /// What can be told of an agent that has a socket and does not answer.
    pub fn silent(pid: Option<u32>, store: Counts) -> Status {
        Status {
            pid: pid.unwrap_or(0),
            session: NO_ANSWER.to_owned(),
            store,
            ..Status::default()
        }
    }

    /// Whether the agent itself said this.
    fn is_its_own(&self) -> bool {
        ![NOT_RUNNING, STARTING, NO_ANSWER].contains(&self.session.as_str())
    }

    /// 0 connected, 1 not connected, 2 not running, 3 volatile store.
    pub fn exit_code(&self) -> u8 {
        if self.session == NOT_RUNNING {
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
        if !self.is_its_own() {
            write!(f, "agent     {}", self.session)?;
            if self.pid != 0 {
                write!(f, ", process {}", self.pid)?;
            }
            writeln!(f)?;
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
        if self.is_its_own() {
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

/// The name of the socket of the agent of a state directory.
fn socket_name(state_path: &Path) -> String {
    let path = state_path
        .canonicalize()
        .unwrap_or_else(|_| state_path.to_owned());
    let name = AttemptKey::of("status", &path.to_string_lossy());
    format!("hostlink-edge-{name}")
}

/// Answers each connection with the status and closes it. Only for the agent's own user and root.
/// Never returns: without a socket, there is no status and the agent goes on.
pub async fn serve(state_path: PathBuf, provider: impl AsyncFn() -> Status) {
    let listener = SocketAddr::from_abstract_name(socket_name(&state_path))
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

/// Asks the running agent of a state directory. `None` if it has no socket. Takes no longer than
/// two seconds for the connection and two for the answer.
pub fn ask(state_path: &Path) -> io::Result<Option<Status>> {
    let connection = match connect(&socket_name(state_path)) {
        Ok(connection) => connection,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Err(error) => return Err(error),
    };
    believe(&connection, state_path)?;
    let text = read_answer(connection)?;
    if text.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it answers its own user and root only",
        ));
    }
    Ok(Some(serde_json::from_slice(&text)?))
}

/// Connecting waits where the queue of a stopped process is full, so that it needs a timeout, too.
fn connect(name: &str) -> io::Result<UnixStream> {
    let family = AddressFamily::UNIX;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIMEOUT))?;
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

/// Every user may take a name of the abstract namespace. Only root, the owner of the state
/// directory and the caller himself are believed.
fn believe(connection: &UnixStream, state_path: &Path) -> io::Result<()> {
    let uid = socket_peercred(connection)?.uid;
    let owner = std::fs::metadata(state_path).map(|it| it.uid());
    let known = uid.is_root()
        || uid == rustix::process::geteuid()
        || owner.is_ok_and(|owner| owner == uid.as_raw());
    if known {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("its socket is held by user {}", uid.as_raw()),
    ))
}

fn read_answer(mut connection: UnixStream) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let mut text = Vec::new();
    let mut part = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || text.len() > ANSWER_BYTES_MAX {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.set_read_timeout(Some(left))?;
        match connection.read(&mut part) {
            Ok(0) => return Ok(text),
            Ok(count) => text.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
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
        assert_eq!(Status::not_running(Counts::default()).exit_code(), 2);
        assert_eq!(Status::starting(1, Counts::default()).exit_code(), 1);
        assert_eq!(Status::silent(None, Counts::default()).exit_code(), 1);
        let mut status = Status {
            pid: 1,
            session: "down".into(),
            ..Status::default()
        };
        assert_eq!(status.exit_code(), 1);
        status.session = "active".into();
        assert_eq!(status.exit_code(), 0);
        status.store.volatile = true;
        assert_eq!(status.exit_code(), 3);
    }

    /// A listener under the name of an agent's socket, that is not the agent.
    fn pretender(path: &Path) -> UnixListener {
        let address = SocketAddr::from_abstract_name(socket_name(path)).expect("short");
        UnixListener::bind_addr(&address).expect("free")
    }

    #[test]
    fn an_agent_that_stands_still_is_not_waited_for() {
        let path = std::env::temp_dir().join(format!("hostlink-still-{}", std::process::id()));
        let listener = pretender(&path);
        let begun = Instant::now();
        let error = ask(&path).expect_err("no answer");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < 2 * ANSWER_TIMEOUT);
        drop(listener);
        assert_eq!(ask(&path).expect("nobody there"), None);
    }

    #[test]
    fn an_answer_without_end_is_cut() {
        use std::io::Write;
        let path = std::env::temp_dir().join(format!("hostlink-endless-{}", std::process::id()));
        let listener = pretender(&path);
        let talker = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().expect("a client");
            let mut sent = 0;
            while let Ok(count) = connection.write(&[b' '; 4096]) {
                sent += count;
            }
            sent
        });
        ask(&path).expect_err("too long");
        let sent = talker.join().expect("talker");
        assert!(sent < 2 * ANSWER_BYTES_MAX, "{sent} bytes were taken");
    }

    #[test]
    fn what_is_shown_fits_what_is_known() {
        let shown = Status::not_running(Counts::default()).to_string();
        assert!(
            shown.starts_with("agent     not running\nwaiting"),
            "{shown}"
        );
        let shown = Status::starting(7, Counts::default()).to_string();
        assert!(
            shown.starts_with("agent     starting, process 7\nwaiting"),
            "{shown}"
        );
        let status = Status {
            pid: 7,
            session: "down".into(),
            last_error: Some("connection refused".into()),
            ..Status::default()
        };
        let shown = status.to_string();
        for line in [
            "session   down for 0 s",
            "last      connection refused",
            "queued    0 tasks",
        ] {
            assert!(shown.contains(line), "{shown}");
        }
    }
}
