//! A disk that is really full: a small tmpfs holds the store, and a task prints more than fits. The
//! oldest output is dropped and marked, the final arrives, and memory stays flat.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use hostlink_edge::ids::{FinalStatus, Stream};
use hostlink_edge::wire::agent_message::ReceivedMessage;

use crate::support::{Agent, ScriptedServer, Task};

const DISK_MIB: usize = 4;
const LINE_BYTES: usize = 16;
const LINES: usize = 24 * 1024 * 1024 / LINE_BYTES;
/// The agent waits ten seconds for a full disk before it drops anything.
const TIME_LIMIT: Duration = Duration::from_secs(60);
const GROWTH_KIB_MAX: u64 = 2048;

/// A mounted tmpfs. Unmounted at the end also of a test that fails.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, loudly, where mounting is not allowed.
    fn mount(path: PathBuf) -> Option<SmallDisk> {
        std::fs::create_dir_all(&path).expect("the test's directory is writable");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={DISK_MIB}m"), "tmpfs"])
            .arg(&path)
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(SmallDisk(path));
        }
        eprintln!("SKIPPED: run as root, with CAP_SYS_ADMIN, to test a full disk on a small tmpfs");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn the_oldest_output_is_dropped_and_marked_and_the_final_arrives() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    let Some(disk) = SmallDisk::mount(agent.path("disk")) else {
        return;
    };
    let store = disk.0.join("outbox").display().to_string();
    agent.set("HOSTLINK_LOCAL_STORE_PATH", &store);
    agent.start_again();
    server.link();
    server.acknowledge_nothing();
    let command = format!("seq -f %015.0f 1 {LINES}; {}", agent.trace("end"));
    let task = Task::new("full", command);
    server.deliver(&task);
    agent.wait_line("is cut up to chunk");
    let before = agent.peak_resident_kib();
    let end = std::time::Instant::now() + TIME_LIMIT;
    while agent.runs("end") == 0 {
        server.check(std::time::Instant::now() < end, "the task goes on");
        std::thread::sleep(Duration::from_millis(50));
    }
    server.acknowledge_everything();
    server.cut();
    let result = server.wait_final(&task);
    let peak = agent.peak_resident_kib();
    let result = result.result().expect("a final");
    server.check_eq(result.status, FinalStatus::Completed, "status");
    server.check(
        peak < before + GROWTH_KIB_MAX,
        &format!("resident memory grew from {before} to {peak} KiB"),
    );
    eprintln!("peak resident {before} KiB when full, {peak} KiB at the end");

    let mut chunks: BTreeMap<u64, (String, bool)> = BTreeMap::new();
    server.look(|log| {
        for frame in log.chunks(&task.ids, Stream::Stdout) {
            let ReceivedMessage::Output {
                sequence, output, ..
            } = &frame.message
            else {
                continue;
            };
            let seen = chunks
                .entry(*sequence)
                .or_insert((output.data.clone(), false));
            seen.1 |= output.truncated_locally == Some(true);
        }
    });
    let expected: String = (1..=LINES).map(|line| format!("{line:015}\n")).collect();
    let (mut before, mut from, mut jumps) = (0, 0, 0);
    for (sequence, (data, flagged)) in &chunks {
        if *sequence != before + 1 {
            jumps += 1;
            let what = format!("chunk {sequence} after {before} is flagged");
            server.check(*flagged, &what);
            from += expected[from..].find(data).expect("unchanged bytes");
        }
        let same = expected[from..].starts_with(data.as_str());
        server.check(same, &format!("chunk {sequence} is unchanged"));
        from += data.len();
        before = *sequence;
    }
    server.check_eq(from, expected.len(), "the newest output is there");
    server.check_eq(jumps, 1, "one cut");
}
