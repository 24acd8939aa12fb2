//! The works: each starts an agent, has it do one thing, and gives figures.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::gateway::{Attempt, Gateway};
use crate::participants::{self, Moment};
use crate::physical;
use crate::process::{Agent, Manager, Setup, Start, Usage};
use crate::table::{Row, Target, row};
use crate::tls;

use Target::{AtLeast, AtMost};

const MIB: f64 = 1024.0 * 1024.0;
const BULK_BYTES: u64 = 64 * 1024 * 1024;
const BACKLOG_BYTES: u64 = 48 * 1024 * 1024;
const CHUNK_BYTES: usize = 16 * 1024;
const BULK_RUNS: usize = 7;
/// Chunks that a full commit carries.
const COMMIT_CHUNKS: usize = 8;
const WINDOW: u64 = 64;
/// The output of one bulk work fits even if the server takes none of it before the end: on a busy
/// machine the sending falls far behind.
const LARGE_STORE: (&str, &str) = ("HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES", "134217728");
const LINE_BYTES: u64 = 100;
const IDLE_TIME: Duration = Duration::from_secs(6);
/// For what a start leaves behind: the first heartbeat, pages that are read only once.
const SETTLE_TIME: Duration = Duration::from_millis(1500);

pub type Rows = Result<Vec<Row>, String>;

/// An agent with an active session.
fn connected(
    setup: &Setup,
    dir: &Path,
    gateway: &Gateway,
    settings: &[(&str, &str)],
) -> Result<Agent, String> {
    let agent = Start::with(gateway, settings).in_dir(setup, dir)?;
    gateway
        .wait_active()
        .map_err(|why| format!("{why}; see {}", dir.join("agent.log").display()))?;
    Ok(agent)
}

fn plain() -> Result<Gateway, String> {
    Gateway::start(None).map_err(|e| format!("cannot start the gateway: {e}"))
}

/// A command that prints.
fn printing(words: &str) -> Result<String, String> {
    let own = std::env::current_exe().map_err(|e| format!("cannot find myself: {e}"))?;
    Ok(format!("exec {} --print {words}", own.display()))
}

fn seconds_of(attempt: &Attempt) -> Result<f64, String> {
    let started = attempt.started_at.ok_or("no task.started came")?;
    let ended = attempt.ended_at.ok_or("no final came")?;
    Ok(ended.saturating_duration_since(started).as_secs_f64())
}

fn check_bytes(attempt: &Attempt, expected: u64) -> Result<(), String> {
    match attempt.total_bytes() {
        bytes if bytes == expected => Ok(()),
        bytes => Err(format!("{bytes} bytes arrived, {expected} were printed")),
    }
}

struct Bulk {
    rate: f64,
    usage: Usage,
    before: Usage,
    bytes: u64,
    participants: Vec<Row>,
}

fn run_bulk(setup: &Setup, name: &str, words: &str, gateway: &Gateway) -> Result<Bulk, String> {
    let dir = setup.fresh(name)?;
    let agent = connected(setup, &dir, gateway, &[LARGE_STORE])?;
    let begin = Moment::now(&agent)?;
    gateway.deliver("bulk", &printing(words)?);
    let attempt = gateway.wait_final("bulk")?;
    let end = Moment::now(&agent)?;
    let (before, usage) = (begin.agent, end.agent);
    check_bytes(&attempt, BULK_BYTES)?;
    agent.stop()?;
    Ok(Bulk {
        rate: BULK_BYTES as f64 / MIB / seconds_of(&attempt)?,
        usage,
        before,
        bytes: attempt.total_bytes(),
        participants: participants::rows(&begin, &end),
    })
}

impl Bulk {
    fn rows(&self, work: &'static str, rate: Target, cpu: Target) -> Vec<Row> {
        let written = self.usage.disk_bytes - self.before.disk_bytes;
        vec![
            row(work, "acknowledged output", self.rate, "MiB/s", rate),
            row(
                work,
                "CPU time",
                self.usage.cpu_seconds - self.before.cpu_seconds,
                "s",
                cpu,
            ),
            row(
                work,
                "peak resident",
                self.usage.peak_kib as f64 / 1024.0,
                "MiB",
                AtMost(8.0),
            ),
            row(
                work,
                "disk bytes a byte",
                written as f64 / self.bytes as f64,
                "",
                AtMost(1.10),
            ),
        ]
    }
}

/// One run, and what the disk could take just before.
struct BulkRun {
    bulk: Bulk,
    disk: f64,
}

/// Several runs, since their rates differ by a third on a machine that others share; the figures are
/// those of the middle one. Physical limits are measured first, that of the disk before each run.
pub fn bulk(setup: &Setup) -> Rows {
    let total = BULK_BYTES as usize;
    let chunk_disk = physical::disk(&setup.dir, CHUNK_BYTES, total / 4)?;
    let socket = physical::websocket(CHUNK_BYTES, WINDOW, total)?;
    let (json, base64) = physical::encoding(CHUNK_BYTES, total)?;
    let words = format!("bulk {BULK_BYTES}");
    let mut runs = Vec::new();
    for _ in 0..BULK_RUNS {
        let disk = physical::disk(&setup.dir, COMMIT_CHUNKS * CHUNK_BYTES, total)?;
        let bulk = run_bulk(setup, "bulk", &words, &plain()?)?;
        runs.push(BulkRun { bulk, disk });
    }
    let share = |run: &BulkRun| run.bulk.rate / run.disk.min(socket);
    runs.sort_by(|one, other| share(one).total_cmp(&share(other)));
    let range = |of: fn(&BulkRun) -> f64| {
        let values = runs.iter().map(of);
        let least = values.clone().fold(f64::INFINITY, f64::min);
        (least, values.fold(0.0, f64::max))
    };
    let (slowest, fastest) = range(|run| run.bulk.rate);
    let (disk_least, disk_most) = range(|run| run.disk);
    let middle = runs.remove(BULK_RUNS / 2);
    let work = "64 MiB of output";
    let mut rows = middle.bulk.rows(work, AtLeast(100.0), AtMost(1.0));
    let (name, limit) = match middle.disk < socket {
        true => ("disk", middle.disk),
        false => ("WebSocket", socket),
    };
    rows[0] = rows[0].clone().of_limit(name, limit);
    let of_runs = |figure, value| row("its other runs", figure, value, "MiB/s", Target::None);
    rows.extend([of_runs("slowest", slowest), of_runs("fastest", fastest)]);
    rows.extend(middle.bulk.participants);
    let limit = |figure, value| row("limits", figure, value, "MiB/s", Target::None);
    rows.extend([
        limit("append + fdatasync of 16 KiB", chunk_disk),
        limit("append + fdatasync of 128 KiB, least", disk_least),
        limit("append + fdatasync of 128 KiB, most", disk_most),
        limit("bare WebSocket client, 16 KiB frames", socket),
        limit("JSON string of 16 KiB, one core", json),
        limit("base64 of 16 KiB, one core", base64),
    ]);
    Ok(rows)
}

pub fn both(setup: &Setup) -> Rows {
    let words = format!("both {BULK_BYTES}");
    let measured = run_bulk(setup, "both", &words, &plain()?)?;
    Ok(measured.rows("64 MiB, two streams in turn", AtLeast(100.0), AtMost(1.0)))
}

pub fn tls(setup: &Setup) -> Rows {
    let dir = setup.dir.clone();
    let ca_file = dir.join("ca.pem");
    let gateway = Gateway::start(Some(tls::acceptor(&ca_file)?))
        .map_err(|e| format!("cannot start the gateway: {e}"))?;
    let ca = ca_file.display().to_string();
    // Over TLS it can only send what it has when a session begins.
    gateway.deliver("bulk", &printing(&format!("bulk {BULK_BYTES}"))?);
    let own_dir = setup.fresh("tls")?;
    let agent = connected(
        setup,
        &own_dir,
        &gateway,
        &[("HOSTLINK_CA_FILE", &ca), LARGE_STORE],
    )?;
    let attempt = gateway.wait_final("bulk")?;
    check_bytes(&attempt, BULK_BYTES)?;
    let usage = agent.usage()?;
    agent.stop()?;
    let measured = Bulk {
        rate: BULK_BYTES as f64 / MIB / seconds_of(&attempt)?,
        usage,
        before: Usage::default(),
        bytes: BULK_BYTES,
        participants: Vec::new(),
    };
    Ok(measured.rows("64 MiB over TLS", Target::None, Target::None))
}

/// Lines of 100 bytes at one rate.
fn run_lines(setup: &Setup, work: &'static str, count: u64, interval_us: u64) -> Rows {
    let gateway = plain()?;
    gateway.state().keeps_arrivals = true;
    let dir = setup.fresh("lines")?;
    let agent = connected(setup, &dir, &gateway, &[])?;
    std::thread::sleep(SETTLE_TIME);
    let before = agent.usage()?;
    let words = format!("lines {count} {interval_us} {LINE_BYTES}");
    gateway.deliver("lines", &printing(&words)?);
    let attempt = gateway.wait_final("lines")?;
    let after = agent.usage()?;
    check_bytes(&attempt, count * LINE_BYTES)?;
    agent.stop()?;
    let seconds = seconds_of(&attempt)?;
    let (p50, p99, max) = latencies(&gateway)?;
    let bytes = (after.disk_bytes - before.disk_bytes) as f64;
    let shown = |figure, value, unit| row(work, figure, value, unit, Target::None);
    Ok(vec![
        shown("lines a second", count as f64 / seconds, "/s"),
        shown("chunks a second", attempt.chunks() as f64 / seconds, "/s"),
        shown("printed → at the server, p50", p50, "ms"),
        shown("printed → at the server, p99", p99, "ms"),
        shown("printed → at the server, max", max, "ms"),
        shown(
            "CPU",
            100.0 * (after.cpu_seconds - before.cpu_seconds) / seconds,
            "%",
        ),
        shown("disk bytes a line", bytes / count as f64, "B"),
    ])
}

/// Milliseconds: median, 99th of a hundred, greatest.
fn latencies(gateway: &Gateway) -> Result<(f64, f64, f64), String> {
    let state = gateway.state();
    let mut all: Vec<f64> = state
        .arrivals
        .iter()
        .map(|(printed, arrived)| arrived.saturating_sub(*printed) as f64 / 1e6)
        .collect();
    all.sort_by(f64::total_cmp);
    let at = |fraction: f64| {
        let index = (all.len() as f64 * fraction).ceil() as usize;
        all.get(index.max(1) - 1).copied()
    };
    match (at(0.5), at(0.99), all.last()) {
        (Some(p50), Some(p99), Some(max)) => Ok((p50, p99, *max)),
        _ => Err("no line arrived with its time".to_owned()),
    }
}

pub fn lines(setup: &Setup) -> Rows {
    let mut rows = run_lines(setup, "1 line a second", 5, 1_000_000)?;
    rows.extend(run_lines(setup, "20 lines a second", 100, 50_000)?);
    rows.extend(run_lines(setup, "10,000 lines a second", 30_000, 100)?);
    Ok(rows)
}

pub fn latency(setup: &Setup) -> Rows {
    let mut rows = run_lines(setup, "a line every 150 ms", 100, 150_000)?;
    for (figure, most) in [
        ("printed → at the server, p50", 5.0),
        ("printed → at the server, p99", 20.0),
    ] {
        for row in rows.iter_mut().filter(|row| row.figure == figure) {
            row.target = AtMost(most);
        }
    }
    Ok(rows)
}

pub fn idle(setup: &Setup) -> Rows {
    let gateway = plain()?;
    let dir = setup.fresh("idle")?;
    // The second start: the key is there, so that no traces of its making are measured.
    connected(setup, &dir, &gateway, &[])?.stop()?;
    gateway.state().active_at = None;
    let agent = connected(setup, &dir, &gateway, &[])?;
    std::thread::sleep(SETTLE_TIME);
    let before = agent.usage()?;
    let begun = Instant::now();
    std::thread::sleep(IDLE_TIME);
    let after = agent.usage()?;
    let seconds = begun.elapsed().as_secs_f64();
    agent.stop()?;
    let shown = |figure, value, unit, target| row("idle, connected", figure, value, unit, target);
    let resident = after.resident_kib as f64 / 1024.0;
    let anonymous = after.anonymous_kib as f64 / 1024.0;
    let switches = (after.switches - before.switches) as f64 / seconds;
    let cpu = 1000.0 * (after.cpu_seconds - before.cpu_seconds) / seconds;
    let written = (after.disk_bytes - before.disk_bytes) as f64;
    Ok(vec![
        shown("resident", resident, "MiB", AtMost(6.0)),
        shown(
            "of it neither code nor files",
            anonymous,
            "MiB",
            Target::None,
        ),
        shown("threads", after.threads as f64, "", Target::None),
        shown("wakeups", switches, "/s", Target::None),
        shown("CPU", cpu, "ms/s", Target::None),
        shown(
            "disk bytes a second",
            written / seconds,
            "B/s",
            Target::None,
        ),
    ])
}

/// Prints while the server is away; `then` is run by the shell at its end.
fn offline(
    setup: &Setup,
    name: &str,
    gateway: &Gateway,
    words: &str,
    settings: &[(&str, &str)],
) -> Result<(Agent, Usage, Usage), String> {
    let dir = setup.fresh(name)?;
    let (go, done) = (dir.join("go"), dir.join("done"));
    let agent = connected(setup, &dir, gateway, settings)?;
    std::thread::sleep(SETTLE_TIME);
    let printing = printing(words)?.replacen("exec ", "", 1);
    gateway.deliver(
        "backlog",
        &format!(
            "while [ ! -e {} ]; do sleep 0.02; done; {printing} && touch {}",
            go.display(),
            done.display()
        ),
    );
    gateway.wait_started("backlog")?;
    gateway.cut();
    let before = agent.usage()?;
    std::fs::write(&go, "").map_err(|e| e.to_string())?;
    gateway.wait_for_file(&done)?;
    // The last flush, and the final.
    std::thread::sleep(SETTLE_TIME);
    let after = agent.usage()?;
    Ok((agent, before, after))
}

/// Lets the server come back. Gives the seconds from the handshake to the final, and the peak.
fn replay(gateway: &Gateway, agent: &Agent) -> Result<(f64, Attempt, Usage), String> {
    agent.forget_peak()?;
    {
        let mut state = gateway.state();
        state.active_at = None;
        state.takes_sessions = true;
    }
    gateway.wait_active()?;
    let attempt = gateway.wait_final("backlog")?;
    let usage = agent.usage()?;
    let active_at = gateway.state().active_at.ok_or("no session")?;
    let ended_at = attempt.ended_at.ok_or("no final")?;
    let seconds = ended_at.saturating_duration_since(active_at).as_secs_f64();
    Ok((seconds, attempt, usage))
}

pub fn backlog(setup: &Setup) -> Rows {
    let gateway = plain()?;
    let words = format!("bulk {BACKLOG_BYTES}");
    let (agent, before, after) = offline(setup, "backlog", &gateway, &words, &[])?;
    let (seconds, attempt, replayed) = replay(&gateway, &agent)?;
    check_bytes(&attempt, BACKLOG_BYTES)?;
    agent.stop()?;
    let written = (after.disk_bytes - before.disk_bytes) as f64 / BACKLOG_BYTES as f64;
    let more = |now: u64| (now as f64 - before.resident_kib as f64) / 1024.0;
    let rate = BACKLOG_BYTES as f64 / MIB / seconds;
    let work = "48 MiB waiting while offline";
    let its = "its replay";
    Ok(vec![
        row(
            work,
            "resident above idle",
            more(after.resident_kib),
            "MiB",
            AtMost(1.0),
        ),
        row(work, "disk bytes a byte", written, "", AtMost(1.10)),
        row(its, "acknowledged output", rate, "MiB/s", AtLeast(150.0)),
        row(
            its,
            "peak above idle",
            more(replayed.peak_kib),
            "MiB",
            AtMost(1.0),
        ),
    ])
}

pub fn chunks(setup: &Setup) -> Rows {
    const COUNT: u64 = 500_000;
    let gateway = plain()?;
    let words = format!("bulk {}", COUNT * LINE_BYTES);
    let settings = [
        ("HOSTLINK_TASK_OUTPUT_FLUSH_THRESHOLD", "100"),
        ("HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES", "268435456"),
    ];
    let (agent, before, after) = offline(setup, "chunks", &gateway, &words, &settings)?;
    let (seconds, attempt, replayed) = replay(&gateway, &agent)?;
    check_bytes(&attempt, COUNT * LINE_BYTES)?;
    agent.stop()?;
    let work = "500,000 chunks of a line, replayed";
    let written = (after.disk_bytes - before.disk_bytes) as f64 / (COUNT * LINE_BYTES) as f64;
    let above = (replayed.peak_kib as f64 - before.resident_kib as f64) / 1024.0;
    let cpu = replayed.cpu_seconds - after.cpu_seconds;
    let shown = |figure, value, unit| row(work, figure, value, unit, Target::None);
    Ok(vec![
        shown("chunks a second", attempt.chunks() as f64 / seconds, "/s"),
        shown("CPU time of the replay", cpu, "s"),
        shown("peak above idle", above, "MiB"),
        shown("disk bytes a byte", written, ""),
    ])
}

pub fn tasks(setup: &Setup) -> Rows {
    const COUNT: u64 = 600;
    /// Fewer than the agent queues.
    const AHEAD: u64 = 100;
    let gateway = plain()?;
    let dir = setup.fresh("tasks")?;
    let agent = connected(setup, &dir, &gateway, &[])?;
    let before = agent.usage()?;
    let begun = Instant::now();
    for number in 0..COUNT {
        if number >= AHEAD {
            gateway.wait("room for a task", |state| {
                (state.finals + AHEAD > number).then_some(())
            })?;
        }
        gateway.deliver(&format!("t{number}"), "echo done");
    }
    gateway.wait("the last task", |state| {
        (state.finals >= COUNT).then_some(())
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    let after = agent.usage()?;
    agent.stop()?;
    let whole = {
        let state = gateway.state();
        let whole = |attempt: &&Attempt| attempt.bytes[0] == 5 && attempt.exit_code == Some(0);
        state.attempts.values().filter(whole).count() as u64
    };
    let work = "small tasks";
    let written = (after.disk_bytes - before.disk_bytes) as f64 / COUNT as f64;
    let cpu = 1000.0 * (after.cpu_seconds - before.cpu_seconds) / COUNT as f64;
    Ok(vec![
        row(
            work,
            "results, durable",
            COUNT as f64 / seconds,
            "/s",
            AtLeast(150.0),
        ),
        row(work, "lost or cut", (COUNT - whole) as f64, "", AtMost(0.0)),
        row(work, "CPU a task", cpu, "ms", Target::None),
        row(work, "disk bytes a task", written, "B", Target::None),
    ])
}

const STARTS: usize = 100;

/// How an agent ends before it is started again.
#[derive(Clone, Copy)]
enum Ending {
    Kill,
    Stop,
}

/// Milliseconds of one start: until the store is open, then until the dial, then until connected.
fn one_start(
    setup: &Setup,
    dir: &Path,
    gateway: &Gateway,
    ending: Ending,
) -> Result<[f64; 3], String> {
    let manager = Manager::new(dir)?;
    {
        let mut state = gateway.state();
        state.active_at = None;
        state.accepted_at = None;
    }
    let start = Start {
        notify: Some(&manager.path),
        ..Start::with(gateway, &[("HOSTLINK_HEARTBEAT_INTERVAL", "0")])
    };
    let agent = start.in_dir(setup, dir)?;
    let ready_at = manager.wait("READY=1")?;
    let connected_at = manager.wait("STATUS=connected")?;
    // The agent may be quicker to say so than the gateway's thread.
    gateway.wait_active()?;
    let accepted_at = gateway.state().accepted_at.ok_or("no session")?;
    let ms = |from: Instant, to: Instant| 1000.0 * to.saturating_duration_since(from).as_secs_f64();
    let steps = [
        ms(agent.spawned_at, ready_at),
        ms(ready_at, accepted_at),
        ms(accepted_at, connected_at),
    ];
    match ending {
        Ending::Kill => agent.kill()?,
        Ending::Stop => agent.stop()?,
    }
    Ok(steps)
}

/// The first dial waits for a random time below 100 ms, so that a thousand devices do not come back
/// at once. What the agent does between opening its store and that wait is the least of all waits:
/// of `count` starts 100 ms / `count` too much on average.
fn starts(
    setup: &Setup,
    dir: &Path,
    gateway: &Gateway,
    ending: Ending,
    count: usize,
) -> Result<f64, String> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(one_start(setup, dir, gateway, ending)?);
    }
    let median = |step: usize| {
        let mut sorted: Vec<f64> = all.iter().map(|steps| steps[step]).collect();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let least = all.iter().map(|steps| steps[1]).fold(f64::MAX, f64::min);
    Ok(median(0) + least + median(2))
}

pub fn start(setup: &Setup) -> Rows {
    let gateway = plain()?;
    let dir = setup.fresh("start")?;
    connected(setup, &dir, &gateway, &[])?.stop()?;
    let killed = starts(setup, &dir, &gateway, Ending::Kill, STARTS)?;
    // The first of them follows a kill.
    let stopped = starts(setup, &dir, &gateway, Ending::Stop, STARTS)?;
    let gateway = plain()?;
    // Slightly more than fits, so that the store is full.
    let words = format!("bulk {BULK_BYTES}");
    let (agent, ..) = offline(setup, "start-full", &gateway, &words, &[])?;
    let full_dir: PathBuf = agent.dir.clone();
    agent.kill()?;
    {
        let mut state = gateway.state();
        state.takes_sessions = true;
        state.acknowledges = false;
        // The oldest output was given up.
        state.allows_holes = true;
    }
    let full = starts(setup, &full_dir, &gateway, Ending::Kill, STARTS / 4)?;
    let work = "start → connected, wait before the dial left out";
    Ok(vec![
        row(work, "after kill -9", killed, "ms", AtMost(20.0)),
        row(work, "after a stop", stopped, "ms", AtMost(20.0)),
        row(
            work,
            "after kill -9, full store of 64 MiB",
            full,
            "ms",
            Target::None,
        ),
    ])
}

/// Calls that make something durable, counted by strace in runs of their own.
pub fn syncs(setup: &Setup) -> Rows {
    let bulk_words = format!("bulk {}", BULK_BYTES / 4);
    let mut rows = Vec::new();
    for (work, words) in [
        ("16 MiB of output, traced", bulk_words.as_str()),
        ("20 lines a second, traced", "lines 60 50000 100"),
    ] {
        let gateway = plain()?;
        let dir = setup.fresh("syncs")?;
        // Without a task: what a start and a stop cost.
        let around = counted(setup, &dir, &gateway, None)?.0;
        let (count, attempt) = counted(setup, &dir, &gateway, Some(words))?;
        let chunks = attempt.chunks().max(1) as f64;
        let per_chunk = (count - around).max(0.0) / chunks;
        rows.push(row(work, "syncs a chunk", per_chunk, "", Target::None));
        rows.push(row(work, "chunks", chunks, "", Target::None));
    }
    Ok(rows)
}

fn counted(
    setup: &Setup,
    dir: &Path,
    gateway: &Gateway,
    words: Option<&str>,
) -> Result<(f64, Attempt), String> {
    let counts = dir.join("syncs.txt");
    // The tracer of an earlier run may still have it open.
    let _ = std::fs::remove_file(&counts);
    gateway.state().active_at = None;
    let start = Start {
        count_syncs: Some(&counts),
        ..Start::with(gateway, &[])
    };
    let agent = start.in_dir(setup, dir)?;
    gateway.wait_active()?;
    let attempt = match words {
        None => Attempt::default(),
        Some(words) => {
            gateway.deliver("traced", &printing(words)?);
            gateway.wait_final("traced")?
        }
    };
    agent.stop()?;
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        // The tracer writes it after the agent has ended.
        let text = std::fs::read_to_string(&counts).unwrap_or_default();
        if let Some(total) = text.lines().rfind(|line| line.ends_with("total")) {
            let calls = total.split_whitespace().nth(3);
            let calls = calls.and_then(|calls| calls.parse().ok());
            return Ok((calls.ok_or("strace counts nothing")?, attempt));
        }
        if Instant::now() > until {
            return Err("strace has written no counts".to_owned());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn size(setup: &Setup) -> Rows {
    let bytes = std::fs::metadata(&setup.binary)
        .map_err(|e| format!("{}: {e}", setup.binary.display()))?
        .len();
    Ok(vec![row(
        "binary",
        "size",
        bytes as f64 / MIB,
        "MiB",
        Target::None,
    )])
}
