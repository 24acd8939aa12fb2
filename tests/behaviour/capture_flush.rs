//! DESIGN "Capture and flush", seen from the server: the borders of the chunks.

use std::time::Duration;

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Event, ScriptedServer, Task};

const KIB: usize = 1024;

#[test]
fn full_chunks_are_flushed_while_the_interval_is_far() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL", "5s")]);
    let command = format!(
        "head -c 102400 /dev/zero | tr '\\0' x; {}",
        agent.hold("end")
    );
    let task = Task::new("threshold", command);
    server.deliver(&task);
    // Six full chunks and a rest: the full ones must not wait for the interval or the end.
    server.wait_until("the full chunks, while the task runs", |log| {
        log.stdout(&task.ids).len() >= 96 * KIB - 16 * KIB
    });
    server.check(
        server.look(|log| log.first_final(&task.ids).is_none()),
        "the task still runs",
    );
    agent.release("end");
    server.wait_final(&task);
    let sizes: Vec<usize> = server.look(|log| {
        let chunks = log.chunks(&task.ids, Stream::Stdout);
        chunks
            .iter()
            .filter_map(|c| c.output())
            .map(|(.., data)| data.len())
            .collect()
    });
    server.check_eq(sizes.iter().sum::<usize>(), 100 * KIB, "bytes in all");
    // 100 KiB in chunks of 16 KiB, and one border each for the leading edge and an interval.
    server.check(sizes.len() <= 7 + 2, &format!("few chunks, not {sizes:?}"));
}

#[test]
fn the_first_bytes_after_silence_do_not_wait_for_the_interval() {
    let server = ScriptedServer::start();
    let interval = Duration::from_secs(5);
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL", "5s")]);
    let task = Task::new("leading", format!("echo first; {}", agent.hold("end")));
    server.deliver(&task);
    server.wait_until("the first line", |log| log.stdout(&task.ids) == "first\n");
    let chunk = |event: &Event| matches!(event, Event::Frame(f) if f.kind == "task.output");
    let started = |event: &Event| matches!(event, Event::Frame(f) if f.kind == "task.started");
    let waited = server.look(|log| log.times(chunk)[0].saturating_sub(log.times(started)[0]));
    server.check(
        waited < interval / 2,
        &format!("the line waited {waited:?}"),
    );
    agent.release("end");
    server.wait_final(&task);
}

#[test]
fn lines_within_an_interval_share_a_chunk_and_arrive_while_the_task_runs() {
    let server = ScriptedServer::start();
    let interval = Duration::from_secs(1);
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL", "1s")]);
    let command = format!(
        "for i in $(seq 40); do echo line $i; sleep 0.02; done; {}",
        agent.hold("end")
    );
    let task = Task::new("interval", command);
    server.deliver(&task);
    server.wait_until("all lines, while the task runs", |log| {
        log.stdout(&task.ids).ends_with("line 40\n")
    });
    server.check(
        server.look(|log| log.first_final(&task.ids).is_none()),
        "the task still runs",
    );
    let chunk = |event: &Event| matches!(event, Event::Frame(f) if f.kind == "task.output");
    let times = server.look(|log| log.times(chunk));
    let spread = times[times.len() - 1] - times[0];
    let most = spread.div_duration_f64(interval).ceil() as usize + 2;
    server.check(
        times.len() <= most,
        &format!(
            "at most one chunk an interval: {} chunks at {times:?}",
            times.len()
        ),
    );
    agent.release("end");
    server.wait_final(&task);
}

#[test]
fn no_character_is_split_between_chunks() {
    let server = ScriptedServer::start();
    let settings = [("HOSTLINK_TASK_OUTPUT_FLUSH_THRESHOLD", "1001")];
    let _agent = Agent::with(&server, &settings);
    // Characters of two, three and four bytes, so that 1001 falls inside one of them.
    let task = Task::new("text", "for i in $(seq 3000); do printf 'é€😀'; done");
    server.deliver(&task);
    server.wait_final(&task);
    let text = server.look(|log| log.stdout(&task.ids));
    server.check(
        text == "é€😀".repeat(3000),
        "the text arrives as it was printed",
    );
}

#[test]
fn bytes_that_are_no_text_arrive_as_replacement_characters_and_are_counted() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let task = Task::new("binary", r"printf 'a\377\000b'");
    server.deliver(&task);
    server.wait_final(&task);
    let (data, raw) = server.look(|log| {
        let chunks = log.chunks(&task.ids, Stream::Stdout);
        (log.stdout(&task.ids), chunks[0].raw.clone())
    });
    server.check_eq(data, "a\u{fffd}\0b".to_owned(), "text of the chunk");
    server.check(raw.contains(r#""byte_count":4"#), &raw);
    server.check(!raw.contains("encoding"), "binary_output was not granted");
}

#[test]
fn with_binary_output_granted_bytes_travel_exactly() {
    let server = ScriptedServer::start();
    server.on_frame(|link, frame| {
        if frame.hello().is_some() {
            link.hello_ack(frame, serde_json::json!({"extensions": ["binary_output"]}));
            return crate::support::Reaction::Handled;
        }
        crate::support::Reaction::Default
    });
    let _agent = Agent::start(&server);
    let task = Task::new("exact", r"printf 'a\377\000b'");
    server.deliver(&task);
    server.wait_final(&task);
    let raw = server.look(|log| log.chunks(&task.ids, Stream::Stdout)[0].raw.clone());
    for part in [
        r#""encoding":"base64""#,
        r#""data":"Yf8AYg==""#,
        r#""byte_count":4"#,
    ] {
        server.check(raw.contains(part), &format!("{part} in {raw}"));
    }
}
