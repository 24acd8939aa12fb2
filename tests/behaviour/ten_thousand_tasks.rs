//! Ten thousand short tasks in a row: none is lost, and the agent is afterwards what it was after
//! the first few: no file more, no zombie, no more memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hostlink_edge::ids::FinalStatus;

use crate::support::processes::zombies_of;
use crate::support::{Agent, Reaction, ScriptedServer, Task};

const TASKS: usize = 10_000;
/// Delivered and not yet ended.
const AT_ONCE: usize = 64;
/// Until here what the agent keeps of finished attempts has come to its full size (4,096).
const SETTLED: usize = 5_000;
const GROWTH_KIB_MAX: u64 = 512;
const LIMIT: Duration = Duration::from_secs(300);

fn task(number: usize) -> Task {
    Task::new(&format!("short-{number}"), "true")
}

fn open_files(agent: &Agent) -> usize {
    let dir = format!("/proc/{}/fd", agent.pid());
    std::fs::read_dir(dir).expect("the agent runs").count()
}

fn resident_kib(agent: &Agent) -> u64 {
    let path = format!("/proc/{}/status", agent.pid());
    let status = std::fs::read_to_string(path).expect("the agent runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.expect("a line VmRSS in /proc/PID/status")
}

#[test]
fn nothing_is_left_of_them() {
    let server = ScriptedServer::start();
    let (ended, failed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (ended.clone(), failed.clone());
    server.on_frame(move |link, frame| {
        if let Some(result) = frame.result() {
            if result.status != FinalStatus::Completed {
                counts.1.fetch_add(1, Ordering::Relaxed);
            }
            let next = counts.0.fetch_add(1, Ordering::Relaxed) + AT_ONCE;
            if next < TASKS {
                link.deliver(&task(next));
            }
        }
        Reaction::Default
    });
    let agent = Agent::with(&server, &[("HOSTLINK_LOG", "warn")]);
    server.link();
    let begun = Instant::now();
    (0..AT_ONCE).for_each(|number| server.deliver(&task(number)));
    let reach = |count: usize| {
        let what = format!("{count} finals");
        server.wait_at_most(LIMIT, &what, |_| {
            (ended.load(Ordering::Relaxed) >= count).then_some(())
        });
        (open_files(&agent), resident_kib(&agent))
    };
    let (files_before, resident_before) = reach(SETTLED);
    let (files, resident) = reach(TASKS);
    eprintln!(
        "{:.0} tasks a second, {resident_before} KiB resident after {SETTLED}, {resident} KiB after {TASKS}",
        TASKS as f64 / begun.elapsed().as_secs_f64()
    );
    server.check_eq(failed.load(Ordering::Relaxed), 0, "tasks that failed");
    // One may be in the act of starting or ending.
    server.check(
        files <= files_before + 8 && files_before <= files + 8,
        &format!("{files_before} files open before, {files} after"),
    );
    server.check(
        resident <= resident_before + GROWTH_KIB_MAX,
        &format!("{resident_before} KiB resident before, {resident} after"),
    );
    server.check_eq(zombies_of(agent.pid()), 0, "zombies");
}
