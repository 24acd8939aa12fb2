//! How a command becomes a process: as a script file run by `/bin/sh`, or by its own `#!` line,
//! as the kernel would, but without a writable or executable `/tmp`.
//!
//! The script is a sealed file in memory that the child inherits and opens by its name under
//! `/proc/self/fd`. It stays open in the task (read-only, under a megabyte). Where there is no
//! memfd or no `/proc`, the command is given to the shell as an argument.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStderr, ChildStdout, Command, Stdio};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::Spec;
use super::process::Group;
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

/// Starts the task. Errors say why no process runs.
pub fn spawn(spec: &Spec) -> Result<(Group, ChildStdout, ChildStderr), String> {
    let interpreter = interpreter(&spec.command);
    let program = interpreter
        .as_ref()
        .map_or(SHELL.as_bytes(), |line| line.path);
    let mut command = Command::new(std::ffi::OsStr::from_bytes(program));
    if let Some(argument) = interpreter.as_ref().and_then(|line| line.argument) {
        command.arg(std::ffi::OsStr::from_bytes(argument));
    }
    // Kept open until the child has been started: it inherits this descriptor.
    let script = script_file(&spec.command);
    match &script {
        Some(script) => {
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
    command
        .env("HOSTLINK_TASK_ID", spec.ids.task.as_str())
        .env("HOSTLINK_ATTEMPT_ID", spec.ids.attempt.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command.spawn().map_err(|error| {
        let program = String::from_utf8_lossy(program);
        format!("cannot run {program:.200}: {error}")
    })?;
    let pipes = child.stdout.take().zip(child.stderr.take());
    let group = Group::new(child);
    match pipes {
        Some((stdout, stderr)) => Ok((group, stdout, stderr)),
        None => Err("the task has no output pipes".to_owned()),
    }
}

/// The `#!` line of a script, if it has one that names a program.
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
/// It is inheritable from the start. Processes are started from one thread only, so no other
/// child can get it.
fn script_file(command: &[u8]) -> Option<File> {
    if !Path::new("/proc/self/fd").is_dir() {
        return None;
    }
    let memory = memfd_create("hostlink-task", MemfdFlags::ALLOW_SEALING).ok()?;
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
            "cannot run {}: without /proc and memfd only shells get their script as an argument",
            String::from_utf8_lossy(program)
        ));
    }
    if text.len() >= ARGUMENT_BYTES_MAX {
        return Err(format!(
            "the command is longer than {ARGUMENT_BYTES_MAX} bytes, and without /proc and memfd it must be one argument"
        ));
    }
    command.arg("-c").arg(std::ffi::OsStr::from_bytes(text));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
