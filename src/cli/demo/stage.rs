//! What the demonstration plays on: a directory, a gateway on a thread of its own, and an agent as
//! a child process. Each ends when it is dropped, so that nothing stays behind however far it came.

use std::cell::RefCell;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::cli::tell;
use crate::gateway::{Gateway, Settings};

/// The agent ends its task and itself in about a second; one that does not is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Directories that may be left of processes that had our id before.
const NAMES_TRIED: u32 = 100;

/// A new directory that only we can enter, removed with all that is in it.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Below the directory for temporary files.
    pub fn new() -> Result<Scratch, String> {
        let parent = std::env::temp_dir();
        let mut error = io::Error::from(io::ErrorKind::AlreadyExists);
        for attempt in 0..NAMES_TRIED {
            let path = parent.join(format!("hostlink-demo-{}-{attempt}", std::process::id()));
            // Anyone may write into the parent: what is there already is not ours.
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Scratch(path)),
                Err(why) if why.kind() == io::ErrorKind::AlreadyExists => {}
                Err(why) => {
                    error = why;
                    break;
                }
            }
        }
        Err(format!(
            "cannot make a directory in {}: {error}; set TMPDIR to one that can be written",
            parent.display()
        ))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The reference control plane on a free port of the loopback interface.
pub struct GatewayThread {
    pub url: String,
    pub token_id: String,
    pub token_key: String,
    stop: async_channel::Sender<()>,
    thread: Option<thread::JoinHandle<()>>,
}

type Started = Result<(String, String, String), String>;

impl GatewayThread {
    pub fn start(state: PathBuf) -> Result<GatewayThread, String> {
        let (stop, stopped) = async_channel::bounded(1);
        let (started, is_started) = sync_channel(1);
        let thread = thread::spawn(move || run_gateway(state, stopped, &started));
        let (url, token_id, token_key) = is_started
            .recv()
            .map_err(|_| "the gateway has not started".to_owned())??;
        Ok(GatewayThread {
            url,
            token_id,
            token_key,
            stop,
            thread: Some(thread),
        })
    }
}

fn run_gateway(state: PathBuf, stop: async_channel::Receiver<()>, started: &SyncSender<Started>) {
    smol::block_on(async {
        let listen = ([127, 0, 0, 1], 0).into();
        let gateway = match Gateway::bind(Settings::new(listen, state)).await {
            Ok(gateway) => gateway,
            Err(error) => {
                let _ = started.send(Err(error.to_string()));
                return;
            }
        };
        let (id, key) = gateway.registration_token();
        let url = format!("http://{}", gateway.address());
        let _ = started.send(Ok((url, id, key)));
        if let Err(error) = gateway.run(stop).await {
            tell(format_args!("demo: the gateway has failed: {error}"));
        }
    });
}

impl Drop for GatewayThread {
    fn drop(&mut self) {
        self.stop.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// This program as an agent.
pub struct Agent {
    child: RefCell<Child>,
    log: PathBuf,
}

impl Agent {
    /// Starts an agent of `gateway` whose state and log are in `dir`.
    pub fn start(gateway: &GatewayThread, dir: &Scratch) -> Result<Agent, String> {
        let cannot = |error: io::Error| format!("cannot start the agent: {error}");
        let log = dir.join("agent.log");
        let log_file = File::create(&log).map_err(cannot)?;
        let mut command = Command::new(std::env::current_exe().map_err(cannot)?);
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy();
            if name.starts_with("HOSTLINK_") || name.to_ascii_uppercase().ends_with("_PROXY") {
                command.env_remove(&key);
            }
        }
        let child = command
            .args(["--config", "/dev/null", "run"])
            .env("SH_CONTROL_PLANE_URL", &gateway.url)
            .env("HOSTLINK_STATE_PATH", dir.join("agent"))
            .env("HOSTLINK_TOKEN_ID", &gateway.token_id)
            .env("HOSTLINK_TOKEN_KEY", &gateway.token_key)
            .env("HOSTLINK_WS_RECONNECT_MIN", "1s")
            .env("HOSTLINK_WS_RECONNECT_MAX", "2s")
            .env("HOSTLINK_TASK_KILL_GRACE", "1s")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .map_err(cannot)?;
        Ok(Agent {
            child: RefCell::new(child),
            log,
        })
    }

    /// How the agent has ended, if it has.
    pub fn has_ended(&self) -> Option<String> {
        match self.child.borrow_mut().try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(status.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// The last lines of the agent's log, to see why something failed.
    pub fn show_log(&self) {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(20)) {
            tell(format_args!("agent: {line}"));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.has_ended().is_some() {
            return;
        }
        let child = self.child.get_mut();
        let pid = rustix::process::Pid::from_child(child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let deadline = Instant::now() + STOP_PATIENCE;
        while Instant::now() < deadline {
            match child.try_wait() {
                Ok(None) => thread::sleep(LOOK_AGAIN),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}
