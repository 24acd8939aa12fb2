//! Settings: from the environment and a file to values that are ready to use.
//!
//! What was typed ([`raw`]) and what is used ([`Config`]) are two types. A value out of range is
//! clamped and an unreadable one replaced by its default, each with a warning: a typing error must
//! not take a remote device away. Only a missing or unusable control-plane URL ends the start.
//!
//! - [`keys`]: the table of all keys with their defaults and ranges.
//! - [`raw`]: where values come from: the environment wins over the file.
//! - [`values`]: how single values are read.

mod keys;
mod raw;
#[cfg(test)]
mod tests;
mod values;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;

use self::raw::Reader;
use crate::limits::{
    CHUNK_BYTES_MAX, CONCURRENCY_MAX, FINAL_OUTPUT_BYTES_DEFAULT, FINAL_OUTPUT_BYTES_MAX, KIB,
    NICE_MAX, SPOOL_CAP_BYTES_DEFAULT, SPOOL_CAP_BYTES_MAX, SPOOL_CAP_BYTES_MIN, TASK_CPU_MAX,
    TASK_MEMORY_MIN, TASK_PIDS_MAX, TERMINAL_RESERVE_BYTES_DEFAULT, TERMINAL_RESERVE_BYTES_MIN,
};

/// Read if it exists and no other file is named.
pub const DEFAULT_FILE: &str = "/etc/hostlink/hostlink.env";

/// What a final needs in the store beside its two texts.
const FINAL_OVERHEAD_BYTES: u64 = 8 * KIB as u64;

/// All settings, validated. Paths and URLs are as they were given; the rest is within its range.
#[derive(Debug, Clone)]
pub struct Config {
    pub control_plane_url: String,
    /// `None`: derived from the control-plane URL.
    pub ws_url: Option<String>,
    pub ws_enabled: bool,
    pub ws_results_enabled: bool,
    pub ws_delivery_enabled: bool,
    /// Set the system clock forward at the start if it is behind what is known.
    pub set_clock: bool,
    pub state_path: PathBuf,
    pub private_key_path: PathBuf,
    pub fingerprint_path: PathBuf,
    pub local_store_path: PathBuf,
    /// Keep the outbox in memory by choice.
    pub local_store_memory: bool,
    pub spool_cap_bytes: u64,
    pub terminal_reserve_bytes: u64,
    pub token_id: Option<String>,
    pub token_key: Option<Secret>,
    pub ws_reconnect_min: Duration,
    pub ws_reconnect_max: Duration,
    pub ws_ping_interval: Duration,
    pub polling_fallback_threshold: Duration,
    pub task_poll_interval: Duration,
    /// Zero: no heartbeats.
    pub heartbeat_interval: Duration,
    pub flush_interval: Duration,
    pub flush_threshold: usize,
    pub final_output_bytes: usize,
    pub task_concurrency: usize,
    pub task_timeout: Option<Duration>,
    pub task_kill_grace: Duration,
    /// What a task leaves running when it ends by itself is left alone.
    pub task_leftovers_keep: bool,
    /// Bytes of both streams of a task that are stored.
    pub task_output_max: Option<u64>,
    /// `name`, `uid` or `uid:gid`.
    pub task_user: Option<String>,
    pub task_dir: Option<PathBuf>,
    pub task_umask: Option<u32>,
    /// 0 to 19.
    pub task_nice: Option<u8>,
    /// Tasks may get cgroups of their own.
    pub task_cgroup: bool,
    /// Bytes.
    pub task_memory_max: Option<u64>,
    pub task_pids_max: Option<u64>,
    /// Percent of one CPU.
    pub task_cpu_max: Option<u64>,
    pub registration_retry_initial_delay: Duration,
    pub ca_file: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
    pub https_proxy: Option<String>,
    pub http_proxy: Option<String>,
    pub no_proxy: Option<String>,
    pub log: LevelFilter,
}

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

/// Shown instead of a secret.
pub const MASK: &str = "********";

/// A setting that was not taken as it was given. Names key, value and range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning(pub String);

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why the agent cannot start with these settings (exit 78).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// Where an effective value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Default,
    File,
    Environment,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Default => "default",
            Source::File => "file",
            Source::Environment => "environment",
        })
    }
}

/// One line of `hostlink-edge config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    pub key: &'static str,
    /// Masked if it is a secret; empty if not set.
    pub value: String,
    pub source: Source,
}

/// Where the agent of this device keeps its things: known even if it could not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    pub state_path: PathBuf,
    pub local_store_path: PathBuf,
    pub spool_cap_bytes: u64,
}

/// The outcome of reading all settings.
#[derive(Debug)]
pub struct Loaded {
    pub config: Result<Config, ConfigError>,
    pub local: Local,
    pub warnings: Vec<Warning>,
    pub settings: Vec<Effective>,
}

/// Reads settings from an environment and a file. `named_file` is that of `--config`; without it
/// [`DEFAULT_FILE`] is read if it exists. A file that cannot be read is a warning, also a named
/// one: the environment alone may be enough to keep the device reachable.
pub fn load(
    environment: impl Iterator<Item = (OsString, OsString)>,
    named_file: Option<&Path>,
) -> Loaded {
    let mut reader = Reader::new(environment, named_file);
    let (local, config) = read_all(&mut reader);
    reader.warn_of_key_without_certificate();
    reader.warn_of_unknown_keys();
    let (warnings, settings) = reader.finish();
    Loaded {
        config,
        local,
        warnings,
        settings,
    }
}

/// Bounds of a task; 0 is none.
struct TaskLimits {
    output: Option<u64>,
    memory: Option<u64>,
    pids: Option<u64>,
    cpu: Option<u64>,
}

impl TaskLimits {
    fn read(reader: &mut Reader) -> TaskLimits {
        let mut or_none = |key, expected: &'static str, range| {
            let value = reader.number_or_off(key, expected, range);
            Some(value).filter(|value| *value > 0)
        };
        let bytes = "a number of bytes";
        TaskLimits {
            output: or_none("HOSTLINK_TASK_OUTPUT_MAX", bytes, 1..=u64::MAX),
            memory: or_none(
                "HOSTLINK_TASK_MEMORY_MAX",
                bytes,
                TASK_MEMORY_MIN..=u64::MAX,
            ),
            pids: or_none("HOSTLINK_TASK_PIDS_MAX", "a number", 1..=TASK_PIDS_MAX),
            cpu: or_none(
                "HOSTLINK_TASK_CPU_MAX",
                "percent of one CPU",
                1..=TASK_CPU_MAX,
            ),
        }
    }
}

fn read_all(reader: &mut Reader) -> (Local, Result<Config, ConfigError>) {
    let seconds = Duration::from_secs;
    let millis = Duration::from_millis;
    let minutes = |count: u64| Duration::from_secs(60 * count);

    let control_plane_url = reader
        .url("SH_CONTROL_PLANE_URL", &["http", "https"])
        .map(|url| url.trim_end_matches('/').to_owned());
    let ws_url = reader.url("HOSTLINK_WS_URL", &["ws", "wss"]);
    let state_path = reader.path_or("HOSTLINK_STATE_PATH", "/var/lib/hostlink".into());
    let local_store_path = reader.path_or("HOSTLINK_LOCAL_STORE_PATH", state_path.join("outbox"));
    let local_store_path = reader.beside_a_file("HOSTLINK_LOCAL_STORE_PATH", local_store_path);
    let spool_cap_bytes = reader.bytes(
        "HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES",
        SPOOL_CAP_BYTES_DEFAULT,
        SPOOL_CAP_BYTES_MIN..=SPOOL_CAP_BYTES_MAX,
    );
    let terminal_reserve_bytes = reader.bytes(
        "HOSTLINK_LOCAL_STORE_TERMINAL_RESERVE_BYTES",
        TERMINAL_RESERVE_BYTES_DEFAULT.min(spool_cap_bytes / 2),
        TERMINAL_RESERVE_BYTES_MIN..=spool_cap_bytes / 2,
    );
    let final_output_bytes = reader.bytes(
        "HOSTLINK_TASK_FINAL_OUTPUT_BYTES",
        FINAL_OUTPUT_BYTES_DEFAULT as u64,
        0..=FINAL_OUTPUT_BYTES_MAX as u64,
    );
    let final_output_bytes = reader.fit_finals(
        final_output_bytes,
        terminal_reserve_bytes,
        FINAL_OVERHEAD_BYTES,
    );
    let ws_reconnect_min = reader.duration(
        "HOSTLINK_WS_RECONNECT_MIN",
        seconds(1),
        millis(100)..=minutes(5),
    );
    let ws_reconnect_max = reader.duration(
        "HOSTLINK_WS_RECONNECT_MAX",
        seconds(60),
        seconds(1)..=minutes(60),
    );
    let ws_reconnect_max = reader.at_least_min(ws_reconnect_min, ws_reconnect_max);
    let task_timeout = reader.duration("HOSTLINK_TASK_TIMEOUT", Duration::ZERO, values::ANY_TIME);

    let limits = TaskLimits::read(reader);

    let config = Config {
        control_plane_url: String::new(),
        ws_url,
        ws_enabled: reader.boolean("HOSTLINK_WS_ENABLED", true),
        ws_results_enabled: reader.boolean("HOSTLINK_WS_RESULTS_ENABLED", true),
        ws_delivery_enabled: reader.boolean("HOSTLINK_WS_DELIVERY_ENABLED", true),
        set_clock: reader.boolean("HOSTLINK_SET_CLOCK", true),
        private_key_path: reader.path_or("HOSTLINK_PRIVATE_KEY_PATH", state_path.join("agent.key")),
        fingerprint_path: reader.path_or(
            "HOSTLINK_FINGERPRINT_PATH",
            state_path.join("fingerprint.json"),
        ),
        state_path,
        local_store_path,
        local_store_memory: reader.choice("HOSTLINK_LOCAL_STORE", &["disk", "memory"]) == "memory",
        spool_cap_bytes,
        terminal_reserve_bytes,
        token_id: reader.text("HOSTLINK_TOKEN_ID"),
        token_key: reader.text("HOSTLINK_TOKEN_KEY").map(Secret),
        ws_reconnect_min,
        ws_reconnect_max,
        ws_ping_interval: reader.duration(
            "HOSTLINK_WS_PING_INTERVAL",
            seconds(30),
            seconds(5)..=minutes(5),
        ),
        polling_fallback_threshold: reader.duration(
            "HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD",
            seconds(30),
            Duration::ZERO..=minutes(5),
        ),
        task_poll_interval: reader.duration(
            "HOSTLINK_TASK_POLL_INTERVAL",
            seconds(10),
            millis(10)..=minutes(5),
        ),
        heartbeat_interval: reader.duration_or_off(
            "HOSTLINK_HEARTBEAT_INTERVAL",
            seconds(5),
            millis(10)..=minutes(5),
        ),
        flush_interval: reader.duration(
            "HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL",
            millis(100),
            millis(1)..=seconds(5),
        ),
        flush_threshold: reader.count(
            "HOSTLINK_TASK_OUTPUT_FLUSH_THRESHOLD",
            CHUNK_BYTES_MAX,
            1..=CHUNK_BYTES_MAX,
        ),
        final_output_bytes,
        task_concurrency: reader.count("HOSTLINK_TASK_CONCURRENCY", 1, 1..=CONCURRENCY_MAX),
        task_timeout: Some(task_timeout).filter(|timeout| !timeout.is_zero()),
        task_kill_grace: reader.duration(
            "HOSTLINK_TASK_KILL_GRACE",
            seconds(10),
            Duration::ZERO..=minutes(5),
        ),
        task_leftovers_keep: reader.choice("HOSTLINK_TASK_LEFTOVERS", &["kill", "keep"]) == "keep",
        task_output_max: limits.output,
        task_user: reader.text("HOSTLINK_TASK_USER"),
        task_dir: reader.path("HOSTLINK_TASK_DIR"),
        task_umask: reader.octal_or_unset("HOSTLINK_TASK_UMASK", 0o777),
        task_nice: reader.small_or_unset("HOSTLINK_TASK_NICE", NICE_MAX),
        task_cgroup: reader.choice("HOSTLINK_TASK_CGROUP", &["auto", "off"]) == "auto",
        task_memory_max: limits.memory,
        task_pids_max: limits.pids,
        task_cpu_max: limits.cpu,
        registration_retry_initial_delay: reader.duration(
            "HOSTLINK_REGISTRATION_RETRY_INITIAL_DELAY",
            seconds(10),
            millis(10)..=minutes(5),
        ),
        ca_file: reader.path("HOSTLINK_CA_FILE"),
        client_cert: reader.path("HOSTLINK_CLIENT_CERT"),
        client_key: reader.path("HOSTLINK_CLIENT_KEY"),
        https_proxy: reader.text("HTTPS_PROXY"),
        http_proxy: reader.text("HTTP_PROXY"),
        no_proxy: reader.text("NO_PROXY"),
        log: reader.level("HOSTLINK_LOG", LevelFilter::Info),
    };
    let local = Local {
        state_path: config.state_path.clone(),
        local_store_path: config.local_store_path.clone(),
        spool_cap_bytes: config.spool_cap_bytes,
    };
    let config = match control_plane_url {
        Some(control_plane_url) => Ok(Config {
            control_plane_url,
            ..config
        }),
        None => Err(ConfigError(
            "SH_CONTROL_PLANE_URL is missing or unusable: set it to the control plane's http(s) URL"
                .to_owned(),
        )),
    };
    (local, config)
}
