//! How a command becomes a process: as a script file run by `/bin/sh`, or by its own `#!` line,
//! as the kernel would, but without a writable or executable `/tmp`.
//!
//! The script is a sealed file in memory that the child inherits and opens by its name under
//! `/proc/self/fd`. It stays open in the task: no shell can be told to close it, and it holds what
//! the task knows anyway. Where there is no memfd or no `/proc`, the command is given to the shell
//! as an argument.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStderr, ChildStdout, Command, Stdio};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};

use super::Spec;
use super::account::{Account, Entry};
use super::host::MARK;
use super::process::Group;
use super::setup::{self, Steps};
use crate::limits::ARGUMENT_BYTES_MAX;

const SHELL: &str = "/bin/sh";

/// Names that a task's environment may take from the agent's; nothing else goes over.
const INHERITED: [(&str, &str); 6] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/"),
    ("LANG", "C.UTF-8"),
    ("USER", "root"),
    ("SHELL", SHELL),
    ("TERM", "dumb"),
];

/// The line that names an interpreter: at most one argument, as Linux reads it.
#[derive(Debug, PartialEq, Eq)]
struct Interpreter<'a> {
    path: &'a [u8],
    argument: Option<&'a [u8]>,
}

/// A task that has just been started.
pub struct Started {
    pub group: Group,
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
    /// Where the helper says why no program runs, if there is a helper.
    pub report: Option<File>,
}

/// Starts the task. Errors say why no process runs.
pub fn spawn(spec: &Spec) -> Result<Started, String> {
    start(spec, script_file(&spec.command))
}

/// `script` holds the command, and is inherited from here until it is dropped.
fn start(spec: &Spec, script: Option<File>) -> Result<Started, String> {
    let interpreter = interpreter(&spec.command);
    let program = interpreter
        .as_ref()
        .map_or(SHELL.as_bytes(), |line| line.path);
    let setup = &spec.host.setup;
    let account = setup.user.as_deref().map(Account::find).transpose()?;
    let steps = Steps {
        setup: setup.clone(),
        account,
        cgroup: spec.host.enter_cgroup(spec.ids.key())?,
    };
    let is_plain_shell = interpreter.is_none();
    let by_shell = is_plain_shell.then(|| steps.shell_command(SHELL)).flatten();
    let mut report = None;
    let mut command = match by_shell {
        Some(command) => command,
        None if steps.is_empty() => Command::new(OsStr::from_bytes(program)),
        None => {
            report = setup::report_file();
            let mut helper = steps.command(report.as_ref());
            helper.arg(OsStr::from_bytes(program));
            helper
        }
    };
    if let Some(argument) = interpreter.as_ref().and_then(|line| line.argument) {
        command.arg(OsStr::from_bytes(argument));
    }
    match &script {
        Some(script) => {
            fcntl_setfd(script, FdFlags::empty())
                .map_err(|error| format!("cannot pass the script on: {error}"))?;
            command.arg(format!("/proc/self/fd/{}", script.as_raw_fd()));
        }
        None => {
            as_argument(&mut command, program, &spec.command)?;
        }
    }
    command.env_clear();
    for (name, default) in INHERITED {
        command.env(name, std::env::var_os(name).unwrap_or(default.into()));
    }
    if let Some(account) = &steps.account {
        let entry = account.entry.clone().unwrap_or_else(|| Entry {
            name: account.uid.to_string(),
            home: "/".to_owned(),
            shell: SHELL.to_owned(),
        });
        command
            .env("HOME", entry.home)
            .env("USER", entry.name)
            .env("SHELL", entry.shell);
    }
    command
        .env(MARK, spec.host.mark(spec.ids.key()))
        .env("HOSTLINK_TASK_ID", spec.ids.task.as_str())
        .env("HOSTLINK_ATTEMPT_ID", spec.ids.attempt.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let spawned = spec.host.as_first_victim(|| command.spawn());
    drop(script);
    let mut child =
        spawned.map_err(|error| setup::cannot_run(command.get_program().as_bytes(), &error))?;
    let pipes = child.stdout.take().zip(child.stderr.take());
    let group = Group::new(spec.host.clone(), spec.ids.key(), child);
    let (stdout, stderr) = pipes.ok_or("the task has no output pipes")?;
    Ok(Started {
        group,
        stdout,
        stderr,
        report,
    })
}

/// The `#!` line of a script, if it has one that names a program. As Linux reads it, except that
/// the line may be longer than 255 bytes and may end in a carriage return.
fn interpreter(command: &[u8]) -> Option<Interpreter<'_>> {
    let line = command.strip_prefix(b"#!")?;
    let line = line.split(|&byte| byte == b'\n').next()?;
    let line = trim(line);
    let path_end = line.iter().position(|byte| matches!(byte, b' ' | b'\t'));
    let (path, rest) = line.split_at(path_end.unwrap_or(line.len()));
    let argument = trim(rest);
    (!path.is_empty()).then_some(Interpreter {
        path,
        argument: (!argument.is_empty()).then_some(argument),
    })
}

fn trim(text: &[u8]) -> &[u8] {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r');
    let start = text.iter().position(|byte| !blank(byte));
    let end = text.iter().rposition(|byte| !blank(byte));
    match (start, end) {
        (Some(start), Some(end)) => &text[start..=end],
        _ => &[],
    }
}

/// The command as a sealed file in memory, `None` where that cannot be had.
///
/// No process can inherit it yet: other threads start processes, too.
fn script_file(command: &[u8]) -> Option<File> {
    if !Path::new("/proc/self/fd").is_dir() {
        return None;
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // It is read, never executed itself: a system may demand that this is said
    // (`vm.memfd_noexec`), and kernels before 6.3 do not know the word.
    let memory = memfd_create("hostlink-task", flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| memfd_create("hostlink-task", flags))
        .ok()?;
    let mut file = File::from(memory);
    file.write_all(command).ok()?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    // A kernel that cannot seal runs the script all the same.
    let _ = fcntl_add_seals(&file, seals);
    Some(file)
}

/// The way without a file: `shell -c command`.
fn as_argument(command: &mut Command, program: &[u8], text: &[u8]) -> Result<(), String> {
    if !program.ends_with(b"sh") {
        return Err(format!(
            "cannot run {:.200}: without /proc and memfd only shells get their script as an argument; mount /proc",
            String::from_utf8_lossy(program)
        ));
    }
    if text.len() >= ARGUMENT_BYTES_MAX {
        return Err(format!(
            "the command is not shorter than {ARGUMENT_BYTES_MAX} bytes, and without /proc and memfd it must be one argument; mount /proc"
        ));
    }
    command.arg("-c").arg(OsStr::from_bytes(text));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// Starts the command as where no file in memory can be had.
    fn start_as_argument(command: &str) -> Result<Started, String> {
        start(&crate::executor::tests::spec(command), None)
    }

    #[test]
    fn without_a_file_the_command_is_an_argument_of_the_shell() {
        let check = |command: &str, expected: &str| {
            let mut task = start_as_argument(command).expect("starts");
            let mut text = String::new();
            task.stdout.read_to_string(&mut text).expect("text");
            assert_eq!(text, expected, "{command:?}");
            assert_eq!(task.group.reap().0, crate::executor::Cause::Exited(0));
        };
        check("echo $0", "/bin/sh\n");
        check("#!/bin/sh -e\ncase $- in *e*) echo stops;; esac", "stops\n");
        let longest = format!(": '{}'\necho all", "x".repeat(ARGUMENT_BYTES_MAX - 14));
        check(&longest, "all\n");
    }

    #[test]
    fn what_cannot_be_an_argument_is_refused_with_the_reason() {
        let check = |command: &str, expected: &str| {
            let why = start_as_argument(command).map(|_| ()).expect_err("refused");
            assert!(why.contains(expected) && why.len() < 400, "{why}");
        };
        check(&"x".repeat(ARGUMENT_BYTES_MAX), "131072 bytes");
        check("#!/bin/cat\nx", "/bin/cat");
        check(&format!("#!/{}", "p".repeat(100_000)), "only shells");
        check("echo a\0b", "nul byte");
    }

    #[test]
    fn the_script_file_is_sealed_and_not_inherited_by_itself() {
        let mut file = script_file(b"echo").expect("memfd and /proc");
        assert!(file.write_all(b"more").is_err());
        let flags = rustix::io::fcntl_getfd(&file).expect("flags");
        assert_eq!(flags, FdFlags::CLOEXEC);
    }

    #[test]
    fn interpreter_lines_are_read_as_linux_reads_them() {
        let check = |command: &str, expected: Option<(&str, Option<&str>)>| {
            let expected = expected.map(|(path, argument)| Interpreter {
                path: path.as_bytes(),
                argument: argument.map(str::as_bytes),
            });
            assert_eq!(interpreter(command.as_bytes()), expected, "{command:?}");
        };
        check("echo hello", None);
        check("", None);
        check("#!", None);
        check("#! \t\necho", None);
        check("#!/bin/bash\necho", Some(("/bin/bash", None)));
        check(
            "#! /usr/bin/env  python3 -u \nx",
            Some(("/usr/bin/env", Some("python3 -u"))),
        );
        check("#!/bin/sh\r\nx", Some(("/bin/sh", None)));
        check(" #!/bin/sh", None);
    }
}
