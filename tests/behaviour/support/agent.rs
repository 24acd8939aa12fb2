//! The agent as a real process, driven only from outside: environment, signals, files, stderr.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use openssl::rsa::Rsa;
use rustix::process::{Pid, Signal, kill_process};

use super::lock;
use super::server::{ScriptedServer, TOKEN_ID, TOKEN_KEY, deadline, slowdown};

const LINES_SHOWN: usize = 200;

/// What an agent wrote to stderr, over all its lives.
#[derive(Default)]
pub struct AgentLog {
    lines: Mutex<Vec<String>>,
    changed: Condvar,
}

impl AgentLog {
    fn push(&self, line: String) {
        lock(&self.lines).push(line);
        self.changed.notify_all();
    }

    pub fn text(&self) -> String {
        let lines = lock(&self.lines);
        let shown = &lines[lines.len().saturating_sub(LINES_SHOWN)..];
        format!("--- stderr of the agent\n{}\n", shown.join("\n"))
    }

    pub fn contains(&self, part: &str) -> bool {
        lock(&self.lines).iter().any(|line| line.contains(part))
    }
}

impl AgentLog {
    /// What stands behind `part` in the first line that has it.
    pub fn part_after(&self, part: &str) -> Option<String> {
        let lines = lock(&self.lines);
        let found = lines.iter().find_map(|line| line.split_once(part));
        found.map(|(_, rest)| rest.to_owned())
    }
}

struct Process {
    pid: Pid,
    ended: Receiver<ExitStatus>,
}

pub struct Agent {
    /// Temporary directory of this test; the state directory is in it.
    pub dir: PathBuf,
    env: BTreeMap<String, String>,
    process: Option<Process>,
    log: Arc<AgentLog>,
    /// Faults that strace injects into the next process.
    faults: Option<String>,
    /// User and group that it runs as.
    user: Option<u32>,
    /// Shell words that are run first, in a mount namespace of its own.
    mounts: Option<String>,
    /// Shell words that are run first, without one.
    before: Option<String>,
}

impl Agent {
    /// Registered, connected and idle soon after.
    pub fn start(server: &ScriptedServer) -> Agent {
        Agent::with(server, &[])
    }

    /// As [`Agent::start`], with these settings over the defaults of the tests.
    pub fn with(server: &ScriptedServer, settings: &[(&str, &str)]) -> Agent {
        let mut agent = Agent::prepare(server);
        for (key, value) in settings {
            agent.set(key, value);
        }
        agent.start_again();
        agent
    }

    /// Directory and settings, nothing started yet.
    pub fn prepare(server: &ScriptedServer) -> Agent {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hostlink-behaviour-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(dir.join("state")).expect("a temporary directory");
        let mut agent = Agent {
            dir,
            env: BTreeMap::new(),
            process: None,
            log: Arc::default(),
            faults: None,
            user: None,
            mounts: None,
            before: None,
        };
        server.show_on_failure(Arc::clone(&agent.log));
        if slowdown() > 1 {
            agent.give_key();
        }
        let state = agent.state().display().to_string();
        for (key, value) in [
            ("SH_CONTROL_PLANE_URL", server.url().as_str()),
            ("HOSTLINK_STATE_PATH", &state),
            ("HOSTLINK_TOKEN_ID", TOKEN_ID),
            ("HOSTLINK_TOKEN_KEY", TOKEN_KEY),
            ("HOSTLINK_WS_RECONNECT_MIN", "100ms"),
            ("HOSTLINK_WS_RECONNECT_MAX", "1s"),
            ("HOSTLINK_TASK_POLL_INTERVAL", "100ms"),
            ("HOSTLINK_HEARTBEAT_INTERVAL", "0"),
            ("HOSTLINK_REGISTRATION_RETRY_INITIAL_DELAY", "50ms"),
            ("HOSTLINK_LOG", "debug"),
            // An agent that is killed leaves its cgroup behind; those who test them clean up.
            ("HOSTLINK_TASK_CGROUP", "off"),
            // The clock of the machine that runs the tests is not ours.
            ("HOSTLINK_SET_CLOCK", "false"),
            ("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"),
            ("HOME", "/"),
            ("LANG", "C.UTF-8"),
        ] {
            agent.set(key, value);
        }
        agent
    }

    /// Making a key takes an emulated processor half a minute: all agents of a run share one.
    fn give_key(&self) {
        static KEY: OnceLock<Vec<u8>> = OnceLock::new();
        let key = KEY.get_or_init(|| {
            let key = Rsa::generate(2048).expect("a key");
            key.private_key_to_pem().expect("a key")
        });
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(self.state().join("agent.key"));
        file.and_then(|mut file| file.write_all(key)).expect("room");
    }

    /// Takes effect at the next start.
    pub fn set(&mut self, key: &str, value: &str) {
        self.env.insert(key.to_owned(), value.to_owned());
    }

    pub fn unset(&mut self, key: &str) {
        self.env.remove(key);
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn pid(&self) -> i32 {
        self.running().pid.as_raw_nonzero().get()
    }

    fn running(&self) -> &Process {
        self.process.as_ref().expect("the agent was started")
    }

    /// Starts the process, on the state that is there.
    pub fn start_again(&mut self) {
        assert!(self.process.is_none(), "the agent runs already");
        let mut command = match (self.faults.take(), &self.mounts) {
            (None, None) => match &self.before {
                Some(before) => {
                    let mut shell = Command::new("/bin/sh");
                    shell.args(["-c", &format!("{before} && exec \"$0\" \"$@\"")]);
                    shell.arg(program());
                    shell
                }
                None => Command::new(program()),
            },
            (None, Some(mounts)) => {
                // Each becomes the next, so that the child is the agent itself.
                let mut unshare = Command::new("/usr/bin/unshare");
                let then = format!("{mounts} && exec \"$0\" \"$@\"");
                unshare.args(["--mount", "--", "/bin/sh", "-c", &then]);
                unshare.arg(program());
                unshare
            }
            (Some(faults), _) => {
                // The tracer is a grandchild, so that the child is the agent itself.
                let mut strace = Command::new("/usr/bin/strace");
                strace.args(["-D", "-f", "-qq", "-o", "/dev/null", "-e", &faults]);
                strace.arg(program());
                strace
            }
        };
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        let mut child = command
            .arg("run")
            .env_clear()
            .envs(&self.env)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the agent's binary can be started");
        let pid = Pid::from_child(&child);
        let stderr = child.stderr.take().expect("stderr is piped");
        let log = Arc::clone(&self.log);
        log.push(format!("=== process {}", child.id()));
        let (tell, ended) = channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stderr).split(b'\n');
            while let Some(Ok(line)) = lines.next() {
                log.push(String::from_utf8_lossy(&line).into_owned());
            }
        });
        std::thread::spawn(move || {
            let status = child.wait().expect("a child can be waited for");
            let _ = tell.send(status);
        });
        self.process = Some(Process { pid, ended });
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.running().pid, signal).expect("the agent runs");
    }

    /// `kill -9`, and waits until the process is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait_exit();
    }

    /// SIGTERM, and waits for the end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_exit()
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        let process = self.process.take().expect("the agent was started");
        match process.ended.recv_timeout(deadline()) {
            Ok(status) => status,
            Err(error) => {
                let _ = kill_process(process.pid, Signal::KILL);
                panic!("the agent did not end ({error})\n{}", self.log.text());
            }
        }
    }

    /// How the process has ended by itself, if it does within this time.
    pub fn wait_exit_within(&mut self, time: Duration) -> Option<ExitStatus> {
        let status = self.running().ended.recv_timeout(time).ok()?;
        self.process = None;
        Some(status)
    }

    /// Injects faults into the next process that is started, in the words of `strace -e inject=`.
    pub fn inject(&mut self, faults: &str) {
        self.faults = Some(format!("inject={faults}"));
    }

    /// Makes all starts those of an ordinary user, as [`Agent::give_to`].
    pub fn run_as(&mut self, user: u32) -> bool {
        let given = self.give_to(user);
        if given {
            self.user = Some(user);
        }
        given
    }

    /// Gives the test's directory to an ordinary user. Only root can do that: false, said loudly,
    /// for others.
    pub fn give_to(&self, user: u32) -> bool {
        let dirs = [self.dir.clone(), self.state()];
        let given = dirs
            .iter()
            .all(|dir| std::os::unix::fs::chown(dir, Some(user), Some(user)).is_ok());
        if !given {
            eprintln!("SKIPPED: only root can start the agent as another user");
        }
        given
    }

    /// Runs these shell words, which may mount, before each start, seen by the agent alone. False,
    /// said loudly, where that cannot be done.
    pub fn mount(&mut self, words: &str) -> bool {
        let tried = Command::new("/usr/bin/unshare")
            .args(["--mount", "--", "/bin/sh", "-c", words])
            .status();
        let can = tried.is_ok_and(|status| status.success());
        if can {
            self.mounts = Some(words.to_owned());
        } else {
            eprintln!("SKIPPED: only root with mount namespaces can test other file systems");
        }
        can
    }

    /// Runs these shell words before each start, in the process that becomes the agent.
    pub fn before(&mut self, words: &str) {
        self.before = Some(words.to_owned());
    }

    /// Whether faults can be injected on this machine. Says loudly if not.
    pub fn can_inject() -> bool {
        let tried = Command::new("/usr/bin/strace")
            .args(["-D", "-f", "-qq", "-o", "/dev/null", "true"])
            .status();
        let can = tried.is_ok_and(|status| status.success());
        if !can {
            eprintln!("SKIPPED: install strace (and allow ptrace) to test faults of the disk");
        }
        can
    }

    /// `Some` if the process has ended by itself.
    pub fn has_ended(&self) -> bool {
        // A disconnected channel also means that it has ended.
        !matches!(
            self.running().ended.recv_timeout(Duration::ZERO),
            Err(RecvTimeoutError::Timeout)
        )
    }

    pub fn log(&self) -> &AgentLog {
        &self.log
    }

    /// Waits until a line of stderr contains `part`, whatever its case.
    pub fn wait_line(&self, part: &str) {
        let part = part.to_lowercase();
        let deadline = Instant::now() + deadline();
        let mut lines = lock(&self.log.lines);
        while !lines.iter().any(|line| line.to_lowercase().contains(&part)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(lines);
                panic!("no line says {part:?}\n{}", self.log.text());
            }
            lines = match self.log.changed.wait_timeout(lines, left) {
                Ok((lines, _)) => lines,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Highest resident memory of the running process so far, KiB.
    pub fn peak_resident_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).expect("the agent runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number
            .and_then(|number| number.parse().ok())
            .expect("a line VmHWM in /proc/PID/status")
    }

    // ---- what commands of tasks do -------------------------------------------------------------

    /// Shell words that wait until the test calls [`Agent::release`] with the same name. They end
    /// too when the test is over.
    pub fn hold(&self, name: &str) -> String {
        let dir = self.dir.display();
        format!("while [ -d {dir}/state ] && [ ! -e {dir}/{name} ]; do sleep 0.02; done")
    }

    pub fn release(&self, name: &str) {
        std::fs::write(self.dir.join(name), b"").expect("the test's directory is writable");
    }

    /// Shell words that leave a trace of one run.
    pub fn trace(&self, name: &str) -> String {
        format!("echo run >> {}/{name}.runs", self.dir.display())
    }

    /// How often the command with this trace ran.
    pub fn runs(&self, name: &str) -> usize {
        let path = self.dir.join(format!("{name}.runs"));
        std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        Path::join(&self.dir, name)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            let _ = kill_process(process.pid, Signal::KILL);
            let _ = process.ended.recv_timeout(deadline());
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The agent under test: `HOSTLINK_TEST_BINARY`, so that a release or a cross-built binary passes
/// the same tests, or the one that was built with them.
pub fn program() -> PathBuf {
    match std::env::var_os("HOSTLINK_TEST_BINARY") {
        Some(path) => std::fs::canonicalize(path).expect("HOSTLINK_TEST_BINARY exists"),
        None => env!("CARGO_BIN_EXE_hostlink-edge").into(),
    }
}
