//! What is done in the new process before it becomes the task: user, limits, place.
//!
//! Between fork and exec only `unsafe` code could do it. So the new process is first this program
//! again, as a helper: it does what its arguments say, then becomes the task's own program. Its
//! process id, and so everything that is known by it, stays the same. Without anything to do the
//! helper is left out.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{MemfdFlags, Mode, fchown, memfd_create};
use rustix::process::{
    Gid, Resource, Rlimit, Uid, geteuid, getuid, setpriority_process, setrlimit, umask,
};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::account::Account;
use crate::limits::REASON_BYTES_MAX;

/// The hidden command of this program that is the helper.
pub const COMMAND: &str = "__exec-task";
/// Exit status of a helper that could not do what it was told.
const FAILED: u8 = 127;

/// Enters the cgroup whose file is `$0`, then becomes the rest.
const ENTER_CGROUP: &str = "echo 0 >\"$0\" && exec \"$@\"";

/// What every task of an agent gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Setup {
    /// As [`Account::find`] reads it; asked anew for each task.
    pub user: Option<String>,
    pub dir: Option<PathBuf>,
    pub umask: Option<u32>,
    /// 0 to 19.
    pub nice: Option<u8>,
    /// `RLIMIT_NPROC`: of the user that tasks run as.
    pub processes_max: Option<u64>,
}

/// Everything for one task.
pub struct Steps {
    pub setup: Setup,
    pub account: Option<Account>,
    /// The file by which the task joins its cgroup.
    pub cgroup: Option<PathBuf>,
}

impl Steps {
    pub fn is_empty(&self) -> bool {
        self.cgroup.is_none() && self.setup == Setup::default()
    }

    /// The command of a program that exists, if a shell can do all there is to do. It starts several
    /// times faster than this program does where that is linked at run time.
    pub fn shell_command(&self, shell: &str) -> Option<Command> {
        let procs = self.cgroup.as_ref()?;
        if self.setup != Setup::default() {
            return None;
        }
        let mut command = Command::new(shell);
        command.args([OsStr::new("-c"), OsStr::new(ENTER_CGROUP)]);
        command.args([procs.as_os_str(), OsStr::new(shell)]);
        Some(command)
    }

    /// The helper's command line, up to the program that it becomes.
    pub fn command(&self, report: Option<&File>) -> Command {
        // Also where the file of this program has been replaced by a newer one.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("hostlink-edge").arg(COMMAND);
        let mut step = |name: &str, value: &dyn std::fmt::Display| {
            command.arg(format!("{name}={value}"));
        };
        if let Some(report) = report {
            // Opened by this name, so that no process inherits it.
            let agent = std::process::id();
            step(
                "report",
                &format!("/proc/{agent}/fd/{}", report.as_raw_fd()),
            );
        }
        if let Some(nice) = self.setup.nice {
            step("nice", &nice);
        }
        if let Some(processes) = self.setup.processes_max {
            step("processes", &processes);
        }
        if let Some(mask) = self.setup.umask {
            step("umask", &mask);
        }
        if let Some(account) = &self.account {
            let groups: Vec<String> = account.groups.iter().map(u32::to_string).collect();
            let user = format!("{}:{}:{}", account.uid, account.gid, groups.join(","));
            step("user", &user);
        }
        for (name, path) in [("cgroup=", &self.cgroup), ("dir=", &self.setup.dir)] {
            if let Some(path) = path {
                let mut argument = OsString::from(name);
                argument.push(path);
                command.arg(argument);
            }
        }
        command.arg("--");
        command
    }
}

/// Where a helper says why it failed; empty if it did not. `None` where the kernel has no files in
/// memory.
pub fn report_file() -> Option<File> {
    let file = memfd_create("hostlink-report", MemfdFlags::CLOEXEC).ok()?;
    Some(File::from(file))
}

/// What a helper has written.
pub fn read_report(file: &File) -> Option<String> {
    let mut text = [0; REASON_BYTES_MAX];
    let count = file.read_at(&mut text, 0).ok()?;
    (count > 0).then(|| String::from_utf8_lossy(&text[..count]).into_owned())
}

/// The helper. Returns only if it cannot become the program, with its exit status.
pub fn run(arguments: &[OsString]) -> u8 {
    let mut report = None;
    let why = match become_task(arguments, &mut report) {
        Ok(()) => return 0,
        Err(why) => why,
    };
    let told = report.and_then(|mut file| file.write_all(why.as_bytes()).ok());
    if told.is_none() {
        let _ = std::io::stderr().write_all(format!("{why}\n").as_bytes());
    }
    FAILED
}

/// `Ok` only if no program was named.
fn become_task(arguments: &[OsString], report: &mut Option<File>) -> Result<(), String> {
    let mut arguments = arguments.iter();
    let mut user = None;
    let mut dir = None;
    for argument in arguments.by_ref() {
        let bytes = argument.as_bytes();
        if bytes == b"--" {
            break;
        }
        let split = bytes.iter().position(|byte| *byte == b'=').unwrap_or(0);
        let path = || PathBuf::from(OsString::from_vec(bytes[split + 1..].to_vec()));
        let text = String::from_utf8_lossy(&bytes[split.min(bytes.len() - 1) + 1..]);
        match &bytes[..split] {
            b"report" => *report = File::options().write(true).open(path()).ok(),
            b"nice" => set_nice(number(&text)?)?,
            b"processes" => limit_processes(number(&text)?)?,
            b"umask" => {
                umask(Mode::from_bits_truncate(number(&text)?));
            }
            b"cgroup" => join(&path())?,
            b"user" => user = Some(text.into_owned()),
            b"dir" => dir = Some(path()),
            _ => return Err(format!("{COMMAND} does not know `{text:.80}`")),
        }
    }
    // Last, since it takes away the right to do the rest; the directory must be open to the user.
    if let Some(user) = user {
        become_user(&user)?;
    }
    if let Some(dir) = dir {
        std::env::set_current_dir(&dir)
            .map_err(|error| format!("cannot use HOSTLINK_TASK_DIR {}: {error}", dir.display()))?;
    }
    let Some(program) = arguments.next() else {
        return Ok(());
    };
    let error = Command::new(program)
        .args(arguments)
        // Set for this program by `main`.
        .env_remove("BLOCKING_MAX_THREADS")
        .exec();
    Err(cannot_run(program.as_bytes(), &error))
}

pub fn cannot_run(program: &[u8], error: &std::io::Error) -> String {
    format!(
        "cannot run {:.200}: {error}",
        String::from_utf8_lossy(program)
    )
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{COMMAND}: `{text:.80}` is no number"))
}

fn set_nice(nice: u8) -> Result<(), String> {
    setpriority_process(None, i32::from(nice))
        .map_err(|error| format!("cannot set the niceness {nice} (HOSTLINK_TASK_NICE): {error}"))
}

fn limit_processes(count: u64) -> Result<(), String> {
    let limit = Rlimit {
        current: Some(count),
        maximum: Some(count),
    };
    setrlimit(Resource::Nproc, limit).map_err(|error| {
        format!("cannot limit processes to {count} (HOSTLINK_TASK_PIDS_MAX): {error}")
    })
}

fn join(procs: &Path) -> Result<(), String> {
    // 0 is whoever writes it.
    std::fs::write(procs, "0")
        .map_err(|error| format!("cannot enter the cgroup {}: {error}", procs.display()))
}

/// `uid:gid:group,group`.
fn become_user(text: &str) -> Result<(), String> {
    let mut parts = text.split(':');
    let mut part = || parts.next().unwrap_or_default();
    let (uid, gid) = (number::<u32>(part())?, number::<u32>(part())?);
    let groups = part().split(',').map(|it| Ok(Gid::from_raw(number(it)?)));
    let groups = groups.collect::<Result<Vec<Gid>, String>>()?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    if getuid() == uid && geteuid() == uid && !uid.is_root() {
        return Ok(());
    }
    let cannot = |what: &str, error: rustix::io::Errno| {
        format!(
            "cannot {what} (HOSTLINK_TASK_USER): {error}; the agent must run as root to run tasks \
             as another user"
        )
    };
    // The task's own streams are pipes of ours: without this it could not open `/dev/stderr`.
    for stream in [1, 2] {
        own(stream, uid, gid);
    }
    set_thread_groups(&groups).map_err(|error| cannot("set the groups", error))?;
    set_thread_res_gid(gid, gid, gid).map_err(|error| cannot("set the group", error))?;
    set_thread_res_uid(uid, uid, uid).map_err(|error| cannot("become the user", error))?;
    Ok(())
}

fn own(stream: i32, uid: Uid, gid: Gid) {
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    let stream: BorrowedFd<'_> = match stream {
        1 => stdout.as_fd(),
        _ => stderr.as_fd(),
    };
    let _ = fchown(stream, Some(uid), Some(gid));
}
