//! Settings as an operator meets them: `hostlink-edge config`, and the start of an agent.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hostlink_edge::config;
use hostlink_edge::net::{Kind, Url};
use rustix::fs::{CWD, FileType, Mode, mknodat};

const URL: (&str, &str) = ("SH_CONTROL_PLANE_URL", "https://control.example");

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let name = format!("hostlink-settings-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("directory");
        Directory(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("file");
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The program with nothing in its environment but this.
fn program(file: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hostlink-edge"))
        .arg("--config")
        .arg(file)
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .expect("the program starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("no signal")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

/// What `config` shows of a key: value and source.
fn setting(output: &Output, key: &str) -> (String, String) {
    let text = out(output);
    let line = text
        .lines()
        .find(|line| line.split(' ').next() == Some(key))
        .unwrap_or_else(|| panic!("{key} is not shown:\n{text}"));
    let (_, shown) = line.split_once(" = ").expect("KEY = VALUE");
    let (value, source) = shown.rsplit_once(" (").expect("a source");
    (value.to_owned(), source.trim_end_matches(')').to_owned())
}

#[test]
fn every_key_is_shown_with_its_default() {
    let dir = Directory::new("defaults");
    let file = dir.file("empty", "");
    let output = program(&file, &["config", "--check"], &[URL]);
    assert_eq!((code(&output), err(&output).as_str()), (0, ""));
    // The table of the documentation.
    for (key, default) in [
        ("HOSTLINK_WS_URL", ""),
        ("HOSTLINK_WS_ENABLED", "true"),
        ("HOSTLINK_WS_RESULTS_ENABLED", "true"),
        ("HOSTLINK_WS_DELIVERY_ENABLED", "true"),
        ("HOSTLINK_STATE_PATH", "/var/lib/hostlink"),
        ("HOSTLINK_PRIVATE_KEY_PATH", "/var/lib/hostlink/agent.key"),
        (
            "HOSTLINK_FINGERPRINT_PATH",
            "/var/lib/hostlink/fingerprint.json",
        ),
        ("HOSTLINK_LOCAL_STORE", "disk"),
        ("HOSTLINK_LOCAL_STORE_PATH", "/var/lib/hostlink/outbox"),
        ("HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES", "67108864"),
        ("HOSTLINK_LOCAL_STORE_TERMINAL_RESERVE_BYTES", "1048576"),
        ("HOSTLINK_TOKEN_ID", ""),
        ("HOSTLINK_TOKEN_KEY", ""),
        ("HOSTLINK_WS_RECONNECT_MIN", "1s"),
        ("HOSTLINK_WS_RECONNECT_MAX", "1m"),
        ("HOSTLINK_WS_PING_INTERVAL", "30s"),
        ("HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD", "30s"),
        ("HOSTLINK_TASK_POLL_INTERVAL", "10s"),
        ("HOSTLINK_HEARTBEAT_INTERVAL", "5s"),
        ("HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL", "100ms"),
        ("HOSTLINK_TASK_OUTPUT_FLUSH_THRESHOLD", "16384"),
        ("HOSTLINK_TASK_FINAL_OUTPUT_BYTES", "65536"),
        ("HOSTLINK_TASK_CONCURRENCY", "1"),
        ("HOSTLINK_TASK_TIMEOUT", "0"),
        ("HOSTLINK_TASK_KILL_GRACE", "10s"),
        ("HOSTLINK_TASK_LEFTOVERS", "kill"),
        ("HOSTLINK_TASK_OUTPUT_MAX", "0"),
        ("HOSTLINK_TASK_USER", ""),
        ("HOSTLINK_TASK_DIR", ""),
        ("HOSTLINK_TASK_UMASK", ""),
        ("HOSTLINK_TASK_NICE", ""),
        ("HOSTLINK_TASK_CGROUP", "auto"),
        ("HOSTLINK_TASK_MEMORY_MAX", "0"),
        ("HOSTLINK_TASK_PIDS_MAX", "0"),
        ("HOSTLINK_TASK_CPU_MAX", "0"),
        ("HOSTLINK_REGISTRATION_RETRY_INITIAL_DELAY", "10s"),
        ("HOSTLINK_CA_FILE", ""),
        ("HOSTLINK_CLIENT_CERT", ""),
        ("HOSTLINK_CLIENT_KEY", ""),
        ("HOSTLINK_SET_CLOCK", "true"),
        ("HTTPS_PROXY", ""),
        ("HTTP_PROXY", ""),
        ("NO_PROXY", ""),
        ("HOSTLINK_LOG", "info"),
    ] {
        let expected = (default.to_owned(), "default".to_owned());
        assert_eq!(setting(&output, key), expected, "{key}");
    }
    assert_eq!(out(&output).lines().count(), 45);
}

#[test]
fn values_out_of_range_are_clamped_at_both_ends() {
    let dir = Directory::new("ranges");
    let file = dir.file("empty", "");
    let check = |key: &str, low: (&str, &str), high: (&str, &str)| {
        for (given, used) in [low, high] {
            let output = program(&file, &["config", "--check"], &[URL, (key, given)]);
            assert_eq!(code(&output), 78, "{key}={given}");
            let expected = (used.to_owned(), "environment".to_owned());
            assert_eq!(setting(&output, key), expected, "{key}={given}");
            let warning = format!("warning: {key}={given} is out of range ");
            assert!(err(&output).starts_with(&warning), "{}", err(&output));
            assert!(err(&output).contains(&format!("; {used} is used")));
            // Without --check the device comes up all the same.
            assert_eq!(code(&program(&file, &["config"], &[URL, (key, given)])), 0);
        }
    };
    check(
        "HOSTLINK_LOCAL_STORE_TERMINAL_RESERVE_BYTES",
        ("1", "262144"),
        ("67108864", "33554432"),
    );
    check("HOSTLINK_WS_RECONNECT_MIN", ("99ms", "100ms"), ("6m", "5m"));
    check("HOSTLINK_WS_RECONNECT_MAX", ("900ms", "1s"), ("2h", "1h"));
    check("HOSTLINK_TASK_POLL_INTERVAL", ("9ms", "10ms"), ("6m", "5m"));
    check("HOSTLINK_HEARTBEAT_INTERVAL", ("9ms", "10ms"), ("6m", "5m"));
    check(
        "HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL",
        ("0", "1ms"),
        ("6s", "5s"),
    );
    check(
        "HOSTLINK_TASK_OUTPUT_FLUSH_THRESHOLD",
        ("0", "1"),
        ("16385", "16384"),
    );
    check("HOSTLINK_TASK_CONCURRENCY", ("0", "1"), ("5", "4"));
    check(
        "HOSTLINK_REGISTRATION_RETRY_INITIAL_DELAY",
        ("9ms", "10ms"),
        ("6m", "5m"),
    );
}

#[test]
fn only_the_control_plane_ends_the_start() {
    let dir = Directory::new("fatal");
    let state = dir.0.join("state");
    let state = state.to_str().expect("text");
    let file = dir.file("settings", "HOSTLINK_LOG=loud\n");
    for url in ["", "control.example", "ftp://control.example"] {
        let environment = [
            ("SH_CONTROL_PLANE_URL", url),
            ("HOSTLINK_STATE_PATH", state),
        ];
        for arguments in [&["run"][..], &[], &["config"], &["config", "--check"]] {
            let output = program(&file, arguments, &environment);
            assert_eq!(code(&output), 78, "{url:?} {arguments:?}");
            for part in ["SH_CONTROL_PLANE_URL", "HOSTLINK_LOG=loud"] {
                assert!(err(&output).contains(part), "{}", err(&output));
            }
        }
    }
    assert!(!Path::new(state).exists(), "nothing was begun");
}

#[test]
fn secrets_stay_in_the_process() {
    let dir = Directory::new("secrets");
    let settings = "HOSTLINK_TOKEN_ID=visible-id\nHOSTLINK_TOKEN_KEY=hunter2\n\
                    HTTPS_PROXY=http://user:hunter2@proxy:3128\n\
                    SH_CONTROL_PLANE_URL=https://user:hunter2@control.example\n\
                    hunter2\nHOSTLINK_TOKN_KEY=hunter2\n";
    let file = dir.file("settings", settings);
    for arguments in [&["config"][..], &["config", "--check"], &["run"]] {
        let output = program(&file, arguments, &[]);
        let shown = out(&output) + &err(&output);
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("SH_CONTROL_PLANE_URL"), "{shown}");
        assert!(shown.contains("HOSTLINK_TOKN_KEY"), "{shown}");
    }
    let output = program(&file, &["config"], &[]);
    let key = setting(&output, "HOSTLINK_TOKEN_KEY");
    assert_eq!(key, ("********".to_owned(), "file".to_owned()));
    let id = setting(&output, "HOSTLINK_TOKEN_ID");
    assert_eq!(id.0, "visible-id");
    let proxy = setting(&output, "HTTPS_PROXY");
    assert_eq!(proxy.0, "http://********@proxy:3128");
}

#[test]
fn the_environment_wins_and_a_missing_file_is_no_end() {
    let dir = Directory::new("sources");
    let file = dir.file(
        "settings",
        "HOSTLINK_LOG=debug\nHOSTLINK_TASK_TIMEOUT=90s\n",
    );
    let output = program(&file, &["config"], &[URL, ("HOSTLINK_LOG", "warn")]);
    let shown = |key| setting(&output, key);
    assert_eq!(shown(URL.0), (URL.1.to_owned(), "environment".to_owned()));
    assert_eq!(shown("HOSTLINK_LOG").0, "warn");
    assert_eq!(
        shown("HOSTLINK_TASK_TIMEOUT"),
        ("90s".to_owned(), "file".to_owned())
    );
    let missing = dir.0.join("missing");
    let output = program(&missing, &["config"], &[URL]);
    assert_eq!(code(&output), 0);
    assert!(err(&output).contains(missing.to_str().expect("text")));
    assert_eq!(code(&program(&missing, &["config", "--check"], &[URL])), 78);
}

/// Nobody ever writes to it.
#[test]
fn a_pipe_in_place_of_the_file_holds_up_nothing() {
    let dir = Directory::new("pipe");
    let pipe = dir.0.join("pipe");
    let mode = Mode::from_raw_mode(0o600);
    mknodat(CWD, &pipe, FileType::Fifo, mode, 0).expect("a named pipe");
    let output = program(&pipe, &["config"], &[URL]);
    assert_eq!(code(&output), 0);
    let expected = format!("cannot read the settings file {}", pipe.display());
    assert!(err(&output).contains(&expected), "{}", err(&output));
}

#[test]
fn a_url_that_passes_the_check_can_be_dialled() {
    let load = |key: &str, url: &str| {
        let pairs = [URL, (key, url)].map(|(key, value)| (key.into(), value.into()));
        config::load(pairs.into_iter(), Some(Path::new("/dev/null")))
    };
    for rest in [
        "a",
        "a.example",
        "A.EXAMPLE:8443/base/",
        "a:",
        "a:1",
        "a:0",
        "a:65535",
        "a:65536",
        "a:+1",
        "a:b",
        "a:1:2",
        "a/?q=1",
        "a?q=1",
        "a/#f",
        "a#f",
        "[::1]",
        "[::1]:9",
        "[::1]9",
        "[::1",
        "[::g]:9",
        "::1",
        ":9",
        "",
        "/",
        "user@a",
        "user:word@a",
        "a b",
        "a\tb",
        "\u{fc}.example",
        "a_b-c.d",
        "a%20b",
        "a,b",
        &"a".repeat(255),
        &"a".repeat(256),
        &format!("a/{}", "b".repeat(3000)),
    ] {
        let http = format!("https://{rest}");
        let loaded = load("SH_CONTROL_PLANE_URL", &http).config;
        let dialled = Url::parse(&http, Kind::Http);
        assert_eq!(loaded.is_ok(), dialled.is_ok(), "{http}: {dialled:?}");
        let websocket = format!("wss://{rest}");
        let loaded = load("HOSTLINK_WS_URL", &websocket).config.expect("a URL");
        let dialled = Url::parse(&websocket, Kind::WebSocket);
        let is_used = loaded.ws_url.as_deref() == Some(&websocket);
        assert_eq!(is_used, dialled.is_ok(), "{websocket}: {dialled:?}");
    }
}

/// Whatever stands in a file, it is read without a panic and without much memory.
#[test]
fn files_of_any_bytes_are_survived() {
    let dir = Directory::new("noise");
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..200 {
        let mut bytes = Vec::new();
        for _ in 0..round * 7 {
            seed = seed
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(round + 1);
            let pieces: [&[u8]; 12] = [
                b"HOSTLINK_LOG",
                b"=",
                b"\n",
                b"\"",
                b"'",
                b"\\",
                b"#",
                b" ",
                b"export ",
                b"\0",
                b"\xff",
                b"99999999999999999999s",
            ];
            bytes.extend_from_slice(pieces[(seed >> 33) as usize % pieces.len()]);
        }
        let file = dir.0.join("noise");
        fs::write(&file, &bytes).expect("file");
        let environment = [(OsString::from(URL.0), OsString::from(URL.1))];
        let loaded = config::load(environment.into_iter(), Some(&file));
        assert!(loaded.config.is_ok(), "round {round}");
    }
}
