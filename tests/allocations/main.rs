//! What the agent allocates for a chunk that it reads back, encodes, sends and gets acknowledged.
//!
//! The whole agent runs in this process against the model gateway of the benchmark, whose threads
//! are not counted. The output is stored while the server is away, so that the counted part, its
//! replay, goes the same way each time: half a stream's share of the window is sent, acknowledged
//! with one frame, and the next half read. So what is left are the allocations of one read and of
//! one acknowledgement. Sixteen small chunks share them, so that one more for each chunk is much
//! more than what varies: each wait of a task for another allocates, and how often they wait
//! depends on what else the machine does.

mod counting;
#[path = "../../benches/agent/frames.rs"]
#[allow(dead_code)] // The benchmark uses all of them.
mod frames;
#[path = "../../benches/agent/gateway.rs"]
#[allow(dead_code)]
mod gateway;
#[path = "../../benches/agent/print.rs"]
#[allow(dead_code)]
mod print;

use std::ffi::OsString;

use gateway::Gateway;

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// Called by each thread of the gateway.
fn begin_gateway_thread() {
    counting::exempt_this_thread();
}

const CHUNKS: u64 = 2048;
const CHUNK_BYTES: u64 = 1024;
/// Half of what a stream may have in flight.
const CHUNKS_AN_ACKNOWLEDGEMENT: u64 = 16;
/// Which they are stands in ARCHITECTURE.md.
const ALLOCATIONS_MAX: f64 = 2.4;

#[test]
fn a_chunk_allocates_only_its_share_of_a_read_and_an_acknowledgement() {
    counting::exempt_this_thread();
    let dir = std::env::temp_dir().join(format!("hostlink-allocations-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    let gateway = Gateway::start(None).expect("a free port");
    let settings = [
        ("SH_CONTROL_PLANE_URL", gateway.url()),
        ("HOSTLINK_STATE_PATH", dir.display().to_string()),
        ("HOSTLINK_TOKEN_ID", "id".to_owned()),
        ("HOSTLINK_TOKEN_KEY", "key".to_owned()),
        ("HOSTLINK_WS_RECONNECT_MIN", "100ms".to_owned()),
        ("HOSTLINK_HEARTBEAT_INTERVAL", "0".to_owned()),
        (
            "HOSTLINK_TASK_OUTPUT_FLUSH_THRESHOLD",
            CHUNK_BYTES.to_string(),
        ),
        ("HOSTLINK_TASK_CGROUP", "off".to_owned()),
        ("HOSTLINK_SET_CLOCK", "false".to_owned()),
    ];
    let environment = settings.map(|(key, value)| (OsString::from(key), OsString::from(value)));
    let loaded = hostlink_edge::config::load(environment.into_iter(), None);
    let config = loaded.config.expect("the settings are complete");
    // It ends with this process.
    std::thread::spawn(move || hostlink_edge::agent::run(config));
    gateway.wait_active().expect("a session");

    let (go, done) = (dir.join("go"), dir.join("done"));
    let bytes = CHUNKS * CHUNK_BYTES;
    let command = format!(
        "while [ ! -e {} ]; do sleep 0.02; done; yes 'a \"line\"' | head -c {bytes}; touch {}",
        go.display(),
        done.display()
    );
    gateway.deliver("bulk", &command);
    gateway.wait_started("bulk").expect("the task starts");
    gateway.cut();
    std::fs::write(&go, "").expect("the folder is writable");
    gateway.wait_for_file(&done).expect("the output is stored");
    {
        let mut state = gateway.state();
        state.acknowledges_every = CHUNKS_AN_ACKNOWLEDGEMENT;
        state.tells_output = true;
        state.active_at = None;
        state.takes_sessions = true;
    }
    // What an outage and a new connection allocate is over with the first chunks.
    let has_come = |chunks: u64| {
        let come = |state: &mut gateway::State| {
            let attempt = state.attempts.get("bulk")?;
            (attempt.chunks() >= chunks).then_some(attempt.chunks())
        };
        let chunks = gateway.wait("chunks", come).expect("chunks arrive");
        (chunks, counting::allocations())
    };
    let (first, before) = has_come(CHUNKS / 8);
    let (last, after) = has_come(CHUNKS - CHUNKS / 8);
    let attempt = gateway.wait_final("bulk").expect("the task ends");
    assert_eq!(attempt.total_bytes(), bytes, "bytes that arrived");
    let each = (after - before) as f64 / (last - first) as f64;
    // The folder is only rubbish from here on.
    let _ = std::fs::remove_dir_all(&dir);
    eprintln!("{each:.3} allocations a chunk");
    assert!(
        each <= ALLOCATIONS_MAX,
        "{each:.3} allocations a chunk, allowed are {ALLOCATIONS_MAX}"
    );
}
