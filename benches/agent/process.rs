//! The agent as a process: started, measured through /proc, ended.

use std::fs;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::gateway::Gateway;

/// An orderly stop takes no longer.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// Ticks of /proc/PID/stat a second (`USER_HZ`).
const TICKS: f64 = 100.0;

/// Which agent runs where.
#[derive(Debug, Clone)]
pub struct Setup {
    pub binary: PathBuf,
    /// Everything is written below it.
    pub dir: PathBuf,
}

impl Setup {
    /// A fresh folder for one work.
    pub fn fresh(&self, name: &str) -> Result<PathBuf, String> {
        let dir = self.dir.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(|e| format!("cannot clear {}: {e}", dir.display()))?;
        }
        fs::create_dir_all(dir.join("state"))
            .map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        Ok(dir)
    }
}

pub struct Agent {
    child: Option<Child>,
    pub dir: PathBuf,
    pub spawned_at: Instant,
}

/// How an agent is started, apart from its binary.
pub struct Start<'a> {
    pub gateway: &'a Gateway,
    pub settings: &'a [(&'a str, &'a str)],
    /// Written when it ends: counts of its calls that make something durable.
    pub count_syncs: Option<&'a Path>,
    pub notify: Option<&'a Path>,
}

impl<'a> Start<'a> {
    pub fn with(gateway: &'a Gateway, settings: &'a [(&'a str, &'a str)]) -> Start<'a> {
        Start {
            gateway,
            settings,
            count_syncs: None,
            notify: None,
        }
    }

    /// Starts the agent on the state that is in `dir`.
    pub fn in_dir(self, setup: &Setup, dir: &Path) -> Result<Agent, String> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(dir.join("agent.log"))
            .map_err(|e| format!("cannot make the agent's log: {e}"))?;
        let mut command = match self.count_syncs {
            None => Command::new(&setup.binary),
            Some(counts) => {
                // The tracer is a grandchild, so that the child is the agent itself.
                let mut strace = Command::new("strace");
                strace
                    .args(["-D", "-f", "-qq", "-c", "-e"])
                    .arg("trace=fdatasync,fsync,sync_file_range")
                    .arg("-o")
                    .arg(counts)
                    .arg(&setup.binary);
                strace
            }
        };
        command
            .arg("run")
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("SH_CONTROL_PLANE_URL", self.gateway.url())
            .env("HOSTLINK_STATE_PATH", dir.join("state"))
            .env("HOSTLINK_TOKEN_ID", "id")
            .env("HOSTLINK_TOKEN_KEY", "key")
            .env("HOSTLINK_WS_RECONNECT_MIN", "100ms")
            .env("HOSTLINK_WS_RECONNECT_MAX", "1s")
            .env("HOSTLINK_TASK_CGROUP", "off")
            .env("HOSTLINK_SET_CLOCK", "false")
            .envs(self.settings.iter().copied());
        if let Some(path) = self.notify {
            command.env("NOTIFY_SOCKET", path);
        }
        let spawned_at = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("cannot start {:?}: {e}", command.get_program()))?;
        Ok(Agent {
            child: Some(child),
            dir: dir.to_owned(),
            spawned_at,
        })
    }
}

impl Agent {
    fn pid(&self) -> Result<u32, String> {
        let child = self.child.as_ref().ok_or("the agent has ended")?;
        Ok(child.id())
    }

    /// Figures of this moment.
    pub fn usage(&self) -> Result<Usage, String> {
        let pid = self.pid()?;
        Usage::read(pid).map_err(|e| format!("cannot read /proc/{pid}: {e}"))
    }

    /// Peaks are counted from now on.
    pub fn forget_peak(&self) -> Result<(), String> {
        let path = format!("/proc/{}/clear_refs", self.pid()?);
        fs::write(&path, "5").map_err(|e| format!("cannot write {path}: {e}"))
    }

    pub fn kill(mut self) -> Result<(), String> {
        let mut child = self.child.take().ok_or("the agent has ended")?;
        child
            .kill()
            .and_then(|()| child.wait())
            .map(drop)
            .map_err(|e| format!("cannot kill the agent: {e}"))
    }

    /// An orderly stop.
    pub fn stop(mut self) -> Result<(), String> {
        let mut child = self.child.take().ok_or("the agent has ended")?;
        kill_process(Pid::from_child(&child), Signal::TERM)
            .map_err(|e| format!("cannot stop the agent: {e}"))?;
        let until = Instant::now() + STOP_PATIENCE;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(format!("the agent ended with {status}")),
                Ok(None) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(None) => return Err("the agent does not stop".to_owned()),
                Err(error) => return Err(format!("cannot wait for the agent: {error}")),
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What /proc says of a process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    pub resident_kib: u64,
    /// Neither code nor other pages of files.
    pub anonymous_kib: u64,
    pub peak_kib: u64,
    pub threads: u64,
    /// Of all threads that live: how often they went to sleep, and how often they were put off.
    pub switches: u64,
    pub cpu_seconds: f64,
    /// Of it in the kernel.
    pub system_seconds: f64,
    /// Of its children that it has waited for: the tasks.
    pub tasks_seconds: f64,
    /// Sent to the block layer, or to be.
    pub disk_bytes: u64,
}

/// Seconds since the boot that the cores of the machine have worked, and that they have had; of the
/// first, what this process has used: the gateway.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub busy_seconds: f64,
    pub all_seconds: f64,
    pub own_seconds: f64,
}

impl Machine {
    pub fn read() -> Result<Machine, String> {
        let text = fs::read_to_string("/proc/stat").map_err(|e| format!("/proc/stat: {e}"))?;
        let own = Usage::read(std::process::id()).map_err(|e| format!("/proc/self: {e}"))?;
        let words = text.lines().next().unwrap_or_default().split_whitespace();
        // User, nice, system, idle, waiting for a disk, interrupts, soft ones, stolen (proc(5)).
        let ticks: Vec<f64> = words.skip(1).take(8).flat_map(str::parse).collect();
        let all: f64 = ticks.iter().sum();
        let idle: f64 = ticks.iter().skip(3).take(2).sum();
        Ok(Machine {
            busy_seconds: (all - idle) / TICKS,
            all_seconds: all / TICKS,
            own_seconds: own.cpu_seconds,
        })
    }
}

impl Usage {
    fn read(pid: u32) -> io::Result<Usage> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
        // The name of the program, which may hold anything, ends at the last bracket.
        let behind = stat.rsplit(')').next().unwrap_or_default();
        let ticks = |at: usize| -> f64 {
            let word = behind.split_whitespace().nth(at);
            word.and_then(|word| word.parse().ok()).unwrap_or(0.0)
        };
        let mut switches = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            if let Ok(status) = fs::read_to_string(task?.path().join("status")) {
                switches += field(&status, "voluntary_ctxt_switches");
                switches += field(&status, "nonvoluntary_ctxt_switches");
            }
        }
        Ok(Usage {
            resident_kib: field(&status, "VmRSS"),
            anonymous_kib: field(&status, "RssAnon"),
            peak_kib: field(&status, "VmHWM"),
            threads: field(&status, "Threads"),
            switches,
            cpu_seconds: (ticks(11) + ticks(12)) / TICKS,
            system_seconds: ticks(12) / TICKS,
            tasks_seconds: (ticks(13) + ticks(14)) / TICKS,
            disk_bytes: field(&io, "write_bytes"),
        })
    }
}

fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key == name).then_some(value)
    });
    let number = value.and_then(|value| value.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Stands for the service manager (sd_notify(3)).
pub struct Manager {
    socket: UnixDatagram,
    pub path: PathBuf,
}

impl Manager {
    pub fn new(dir: &Path) -> Result<Manager, String> {
        let path = dir.join("notify");
        let _ = fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path)
            .and_then(|socket| {
                socket.set_read_timeout(Some(STOP_PATIENCE))?;
                Ok(socket)
            })
            .map_err(|e| format!("cannot listen at {}: {e}", path.display()))?;
        Ok(Manager { socket, path })
    }

    /// Waits for a message with this word in it.
    pub fn wait(&self, word: &str) -> Result<Instant, String> {
        let mut block = [0; 4096];
        loop {
            let count = self
                .socket
                .recv(&mut block)
                .map_err(|e| format!("the agent does not say {word}: {e}"))?;
            if String::from_utf8_lossy(&block[..count]).contains(word) {
                return Ok(Instant::now());
            }
        }
    }
}
