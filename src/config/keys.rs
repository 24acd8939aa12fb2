//! All keys that the agent reads, in the order in which `hostlink-edge config` shows them.

/// Keys with this prefix are ours: an unknown one is a typing error.
pub const PREFIX: &str = "HOSTLINK_";

/// Set by the agent for its tasks; met when an agent is started by a task.
pub const OF_TASKS: [&str; 3] = [
    "HOSTLINK_TASK_ID",
    "HOSTLINK_ATTEMPT_ID",
    "HOSTLINK_TASK_MARK",
];

pub const KEYS: [&str; 45] = [
    "SH_CONTROL_PLANE_URL",
    "HOSTLINK_WS_URL",
    "HOSTLINK_WS_ENABLED",
    "HOSTLINK_WS_RESULTS_ENABLED",
    "HOSTLINK_WS_DELIVERY_ENABLED",
    "HOSTLINK_STATE_PATH",
    "HOSTLINK_PRIVATE_KEY_PATH",
    "HOSTLINK_FINGERPRINT_PATH",
    "HOSTLINK_LOCAL_STORE",
    "HOSTLINK_LOCAL_STORE_PATH",
    "HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES",
    "HOSTLINK_LOCAL_STORE_TERMINAL_RESERVE_BYTES",
    "HOSTLINK_TOKEN_ID",
    "HOSTLINK_TOKEN_KEY",
    "HOSTLINK_WS_RECONNECT_MIN",
    "HOSTLINK_WS_RECONNECT_MAX",
    "HOSTLINK_WS_PING_INTERVAL",
    "HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD",
    "HOSTLINK_TASK_POLL_INTERVAL",
    "HOSTLINK_HEARTBEAT_INTERVAL",
    "HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL",
    "HOSTLINK_TASK_OUTPUT_FLUSH_THRESHOLD",
    "HOSTLINK_TASK_FINAL_OUTPUT_BYTES",
    "HOSTLINK_TASK_CONCURRENCY",
    "HOSTLINK_TASK_TIMEOUT",
    "HOSTLINK_TASK_KILL_GRACE",
    "HOSTLINK_TASK_LEFTOVERS",
    "HOSTLINK_TASK_OUTPUT_MAX",
    "HOSTLINK_TASK_USER",
    "HOSTLINK_TASK_DIR",
    "HOSTLINK_TASK_UMASK",
    "HOSTLINK_TASK_NICE",
    "HOSTLINK_TASK_CGROUP",
    "HOSTLINK_TASK_MEMORY_MAX",
    "HOSTLINK_TASK_PIDS_MAX",
    "HOSTLINK_TASK_CPU_MAX",
    "HOSTLINK_REGISTRATION_RETRY_INITIAL_DELAY",
    "HOSTLINK_CA_FILE",
    "HOSTLINK_CLIENT_CERT",
    "HOSTLINK_CLIENT_KEY",
    "HOSTLINK_SET_CLOCK",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "HOSTLINK_LOG",
];

/// Values that are never printed.
pub fn is_secret(key: &str) -> bool {
    key == "HOSTLINK_TOKEN_KEY"
}

/// Values that may carry a password between `//` and `@`.
pub fn may_hold_password(key: &str) -> bool {
    matches!(key, "HTTPS_PROXY" | "HTTP_PROXY")
}
