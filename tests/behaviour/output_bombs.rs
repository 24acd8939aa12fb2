//! Tasks that print as fast as they can: the agent's memory stays flat, and other tasks, heartbeats
//! and the session keep their pace. The store waits for the server, and the child for the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hostlink_edge::ids::{FinalStatus, Stream};
use serde_json::json;

use crate::support::{Agent, Event, Reaction, ScriptedServer, Task};

/// What a bomb may add to what is resident before it: buffers of capture, store and session, and
/// the allocator's slack (`limits.rs` has the sum).
const GROWTH_KIB_MAX: u64 = 12 * 1024;
const HEARTBEAT: Duration = Duration::from_millis(200);

fn start(server: &ScriptedServer) -> Agent {
    let agent = Agent::with(
        server,
        &[
            ("HOSTLINK_TASK_CONCURRENCY", "2"),
            ("HOSTLINK_TASK_KILL_GRACE", "300ms"),
            ("HOSTLINK_HEARTBEAT_INTERVAL", "200ms"),
            ("HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES", "8388608"),
            ("HOSTLINK_LOG", "info"),
        ],
    );
    server.run_another("before");
    agent
}

/// Counts bytes of output, and lets the server cancel.
fn count_output(server: &ScriptedServer) -> Arc<AtomicU64> {
    let bytes = Arc::new(AtomicU64::new(0));
    let counted = bytes.clone();
    server.on_frame(move |link, frame| {
        if frame.hello().is_some() {
            link.hello_ack(frame, json!({"extensions": ["cancel"]}));
            return Reaction::Handled;
        }
        if let Some((_, _, text)) = frame.output() {
            counted.fetch_add(text.len() as u64, Ordering::Relaxed);
        }
        Reaction::Default
    });
    bytes
}

/// Other tasks and heartbeats beside the bomb, and the agent's memory.
fn others_keep_their_pace(server: &ScriptedServer, agent: &Agent, bomb: &Task) {
    let before = agent.peak_resident_kib();
    let mark = server.mark();
    let begun = Instant::now();
    server.deliver(bomb);
    server.wait_frame("task.output", bomb);
    let mut slowest = Duration::ZERO;
    for number in 0..10 {
        let name = format!("{}-beside-{number}", bomb.ids.task.as_str());
        let delivered = Instant::now();
        server.run_another(&name);
        slowest = slowest.max(delivered.elapsed());
    }
    let is_running = server.look(|log| log.end(&bomb.ids).is_none());
    server.check(is_running, "the bomb has not ended by itself");
    server
        .link()
        .send("task.cancel", Some(&bomb.ids), json!({}));
    server.wait_end(bomb);
    let lasted = begun.elapsed();
    let beats = server.look(|log| {
        let beats = log.after(mark).filter(|it| matches!(it, Event::Heartbeat));
        beats.count()
    });
    let grown = agent.peak_resident_kib().saturating_sub(before);
    eprintln!(
        "{}: {grown} KiB more than {before}, slowest task {slowest:?}, {beats} heartbeats in {lasted:?}",
        bomb.ids
    );
    server.check(
        grown < GROWTH_KIB_MAX,
        &format!("{grown} KiB more resident than {before}"),
    );
    server.check(
        slowest < Duration::from_secs(4),
        &format!("a task beside the bomb took {slowest:?}"),
    );
    let expected = lasted.as_millis() / HEARTBEAT.as_millis();
    server.check(
        beats as u128 >= expected / 3,
        &format!("{beats} heartbeats in {lasted:?}"),
    );
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
}

#[test]
fn yes_on_both_streams() {
    let server = ScriptedServer::start();
    let bytes = count_output(&server);
    let agent = start(&server);
    others_keep_their_pace(&server, &agent, &Task::new("yes", "yes & yes >&2 & wait"));
    let got = bytes.load(Ordering::Relaxed);
    server.check(got > 1 << 20, &format!("{got} bytes arrived"));
}

/// Bytes that are no text cost the most on the way: each zero is six characters of JSON.
#[test]
fn zeros_without_a_line_end() {
    let server = ScriptedServer::start();
    let bytes = count_output(&server);
    let agent = start(&server);
    others_keep_their_pace(&server, &agent, &Task::new("zeros", "cat /dev/zero"));
    let got = bytes.load(Ordering::Relaxed);
    server.check(got > 1 << 20, &format!("{got} bytes arrived"));
}

/// A million short lines on each stream, counted: none is lost, none is doubled.
#[test]
fn a_million_lines_on_both_streams_arrive_whole() {
    const LINES: usize = 1_000_000;
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_LOG", "info")]);
    server.run_another("before");
    let before = agent.peak_resident_kib();
    let task = Task::new("lines", format!("seq {LINES} & seq {LINES} >&2 & wait"));
    server.deliver(&task);
    let end = server.wait_at_most(Duration::from_secs(120), "the end", |log| {
        log.end(&task.ids)
    });
    server.check_eq(end.status, FinalStatus::Completed, &end.error);
    let expected: usize = (1..=LINES).map(|number| number.to_string().len() + 1).sum();
    for stream in Stream::ALL {
        let text = server.look(|log| log.text(&task.ids, stream));
        server.check_eq(text.len(), expected, "bytes");
        let numbers = text.lines().enumerate();
        let wrong = numbers
            .filter(|(index, line)| line.parse() != Ok(index + 1))
            .count();
        server.check_eq(wrong, 0, "lines in a wrong place");
    }
    let grown = agent.peak_resident_kib().saturating_sub(before);
    server.check(
        grown < GROWTH_KIB_MAX,
        &format!("{grown} KiB more resident than {before}"),
    );
}

/// The bound counts both streams together, byte by byte, and ends the capture, not the task.
#[test]
fn the_bound_of_output_ends_the_capture_and_not_the_task() {
    let server = ScriptedServer::start();
    let settings = [("HOSTLINK_TASK_OUTPUT_MAX", "1000")];
    let agent = Agent::with(&server, &settings);
    let run = |name: &str, command: &str| {
        let task = Task::new(name, command);
        server.deliver(&task);
        let result = server.wait_final(&task).result().cloned();
        let sizes = server.look(|log| Stream::ALL.map(|stream| log.text(&task.ids, stream).len()));
        (result.expect("a final"), sizes)
    };
    let (result, sizes) = run(
        "exact",
        "head -c 400 /dev/zero | tr '\\0' o; head -c 600 /dev/zero | tr '\\0' e >&2",
    );
    server.check_eq(sizes, [400, 600], "all that the bound allows");
    server.check_eq(
        (result.output_truncated, result.error_truncated),
        (false, false),
        "flags",
    );
    let (result, sizes) = run("over", "head -c 1001 /dev/zero | tr '\\0' o; exit 4");
    server.check_eq(sizes, [1000, 0], "one byte more");
    server.check_eq(
        (result.output_truncated, result.exit_code),
        (true, 4),
        "the task went on to its own end",
    );
    agent.wait_line("printed more than HOSTLINK_TASK_OUTPUT_MAX");
    let (result, sizes) = run(
        "together",
        "head -c 900 /dev/zero | tr '\\0' e >&2; sleep 0.3; head -c 900 /dev/zero | tr '\\0' o; echo end",
    );
    server.check_eq(sizes[0] + sizes[1], 1000, "both streams together");
    server.check_eq(result.status, FinalStatus::Completed, "end");
    let tail = result.output.unwrap_or_default();
    server.check(
        tail.ends_with("oend\n"),
        "the final has the last bytes all the same",
    );
}

/// The disk stands still: the child waits with a full pipe, and goes on when the disk does.
#[test]
fn a_task_waits_with_a_full_pipe_while_the_store_stalls() {
    const BYTES: usize = 2_000_000;
    if !Agent::can_inject() {
        return;
    }
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    // Each sync of the log from the tenth on takes 1.5 s, eight of them.
    agent.inject("fdatasync:delay_enter=1500000:when=10..17");
    agent.set("HOSTLINK_HEARTBEAT_INTERVAL", "200ms");
    agent.start_again();
    server.run_another("before");
    let before = agent.peak_resident_kib();
    let mark = server.mark();
    let command = format!(
        "head -c {BYTES} /dev/zero | tr '\\0' x; echo printed >{}",
        agent.path("printed").display()
    );
    let task = Task::new("waits", command);
    let begun = Instant::now();
    server.deliver(&task);
    server.wait_frame("task.output", &task);
    server.check(
        !agent.path("printed").exists(),
        "the child waits for the store",
    );
    let end = server.wait_end(&task);
    let took = begun.elapsed();
    server.check_eq(end.status, FinalStatus::Completed, "end");
    let text = server.look(|log| log.stdout(&task.ids));
    server.check(
        text.len() == BYTES && text.bytes().all(|byte| byte == b'x'),
        &format!("{} bytes arrived", text.len()),
    );
    server.check(
        took > Duration::from_secs(3),
        &format!("the disk stood still, and it took {took:?}"),
    );
    let beats = server.look(|log| {
        let beats = log.after(mark).filter(|it| matches!(it, Event::Heartbeat));
        beats.count()
    });
    server.check(beats >= 5, &format!("{beats} heartbeats meanwhile"));
    let grown = agent.peak_resident_kib().saturating_sub(before);
    server.check(
        grown < GROWTH_KIB_MAX,
        &format!("{grown} KiB more resident than {before}"),
    );
}
