//! The command line as a script meets it: exit codes, help, and `status` without an agent, beside
//! one that starts, and where nobody reads what is said.

use std::fs;
use std::io::pipe;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hostlink-edge"));
    command.args(["--config", "/dev/null"]).args(arguments);
    command.env_clear().stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> (i32, String, String) {
    read(&program(arguments).output().expect("the program starts"))
}

fn read(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let code = output.status.code().expect("no signal");
    (code, text(&output.stdout), text(&output.stderr))
}

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let name = format!("hostlink-commands-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("directory");
        Directory(path)
    }

    fn text(&self) -> &str {
        self.0.to_str().expect("plain name")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn wrong_arguments_exit_with_64_and_say_which() {
    for (arguments, why) in [
        (&["nonsense"][..], "`nonsense`"),
        (&["help", "nonsense"], "`nonsense`"),
        (&["--nonsense"], "--nonsense"),
        (&["run", "--json"], "--json"),
        (&["run", "twice"], "twice"),
        (&["status", "--check"], "--check"),
        (&["config", "--config"], "--config"),
        (&["submit", "true"], "--gateway"),
        (&["submit", "--gateway", "http://a"], "COMMAND"),
        (
            &["submit", "--gateway", "http://a", "--priority", "high", "x"],
            "high",
        ),
        (&["agents"], "--gateway"),
        (&["gateway", "--listen", "127.0.0.1:0"], "--state"),
        (&["demo", "one", "two"], "two"),
    ] {
        let (code, out, err) = run(arguments);
        assert_eq!((code, out.as_str()), (64, ""), "{arguments:?}: {err}");
        assert!(err.starts_with("hostlink-edge: "), "{err}");
        assert!(err.contains(why), "{arguments:?}: {err}");
    }
}

#[cfg(not(feature = "gateway"))]
#[test]
fn a_firmware_build_says_that_it_has_no_gateway() {
    for arguments in [
        &["demo"][..],
        &[
            "gateway",
            "--listen",
            "127.0.0.1:0",
            "--state",
            "/nonexistent",
        ],
        &["submit", "--gateway", "http://a", "true"],
        &["agents", "--gateway", "http://a"],
    ] {
        let (code, _, err) = run(arguments);
        assert_eq!(code, 64, "{arguments:?}");
        assert!(err.contains("cargo feature `gateway`"), "{err}");
    }
}

#[test]
fn version_and_help_go_to_stdout() {
    let version = format!("hostlink-edge {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(run(&["--version"]), (0, version, String::new()));
    let (code, general, err) = run(&["--help"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(run(&["help"]).1, general);
    for name in [
        "run", "status", "config", "demo", "gateway", "submit", "agents",
    ] {
        assert!(general.contains(&format!("\n  {name} ")), "{name}");
        let (code, help, err) = run(&[name, "--help"]);
        assert_eq!((code, err.as_str()), (0, ""), "{name}");
        assert!(help.starts_with("Usage: hostlink-edge "), "{help}");
        assert!(help.lines().next().expect("a line").contains(name));
        assert_eq!(run(&["help", name]).1, help);
    }
}

#[test]
fn messages_that_nobody_reads_change_no_exit_code() {
    let check = |arguments: &[&str], expected: i32| {
        let (reader, writer) = pipe().expect("pipe");
        drop(reader);
        let mut command = program(arguments);
        command.stdout(writer.try_clone().expect("a copy"));
        command.stderr(writer);
        let status = command.status().expect("the program starts");
        assert_eq!(status.code(), Some(expected), "{arguments:?}");
    };
    check(&["nonsense"], 64);
    check(&["config"], 78);
    check(&["run"], 78);
    check(&["--help"], 0);
}

#[test]
fn priorities_stand_in_front_where_stderr_is_a_journal() {
    let dir = Directory::new("journal");
    let check = |is_journal: bool| {
        let path = dir.0.join("stderr");
        let file = fs::File::create(&path).expect("file");
        let place = file.metadata().expect("an open file");
        let inode = place.ino() + u64::from(!is_journal);
        let mut command = program(&["run"]);
        command.env("JOURNAL_STREAM", format!("{}:{inode}", place.dev()));
        command.env("HOSTLINK_LOG", "loud").stderr(file);
        assert_eq!(command.status().expect("it starts").code(), Some(78));
        fs::read_to_string(&path).expect("text")
    };
    let journal = check(true);
    let lines: Vec<_> = journal.lines().collect();
    assert!(lines[0].starts_with("<4>HOSTLINK_LOG=loud"), "{journal}");
    assert!(lines[1].starts_with("<3>SH_CONTROL_PLANE_URL"), "{journal}");
    let elsewhere = check(false);
    assert!(
        elsewhere.contains("Z WARN  HOSTLINK_LOG=loud"),
        "{elsewhere}"
    );
    assert!(
        elsewhere.contains("Z ERROR SH_CONTROL_PLANE_URL"),
        "{elsewhere}"
    );
}

#[test]
fn status_needs_no_control_plane_and_no_agent() {
    let dir = Directory::new("stopped");
    let mut command = program(&["status"]);
    command.env("HOSTLINK_STATE_PATH", dir.text());
    let (code, out, err) = read(&command.output().expect("the program starts"));
    assert_eq!((code, err.as_str()), (2, ""));
    assert!(out.starts_with("agent     not running\n"), "{out}");
    assert!(out.contains("space     0 of 67108864 bytes"), "{out}");

    let mut command = program(&["status", "--json"]);
    command.env("HOSTLINK_STATE_PATH", dir.text());
    let (code, out, _) = read(&command.output().expect("the program starts"));
    let status: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(code, 2);
    assert_eq!(status["pid"], 0);
    assert_eq!(status["session"], "not running");
    let left: Vec<_> = fs::read_dir(&dir.0).expect("readable").collect();
    assert!(left.is_empty(), "a look has written: {left:?}");
}

/// Ends its process when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_agent_that_cannot_register_is_running_and_not_connected() {
    let dir = Directory::new("starting");
    // Port 9 of the loopback interface: nobody is there, and no token is set.
    let mut agent = program(&["run"]);
    agent
        .env("SH_CONTROL_PLANE_URL", "http://127.0.0.1:9")
        .env("HOSTLINK_STATE_PATH", dir.text())
        .stderr(Stdio::null());
    let agent = Running(agent.spawn().expect("the program starts"));
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let mut command = program(&["status", "--json"]);
        command.env("HOSTLINK_STATE_PATH", dir.text());
        let (code, out, err) = read(&command.output().expect("the program starts"));
        if code == 1 {
            let status: serde_json::Value = serde_json::from_str(&out).expect("JSON");
            assert_eq!(status["pid"], agent.0.id());
            break;
        }
        // It has not taken its lock yet.
        assert_eq!(code, 2, "{out}{err}");
        assert!(Instant::now() < deadline, "the agent was never seen");
    }
}
