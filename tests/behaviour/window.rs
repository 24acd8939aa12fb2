//! DESIGN "The way of a byte": at most 64 messages and 256 KiB are in flight, at most half of each
//! for one stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use hostlink_edge::ids::{Ids, Stream};
use hostlink_edge::limits::{
    WINDOW_BYTES, WINDOW_MESSAGES, WINDOW_STREAM_BYTES, WINDOW_STREAM_MESSAGES,
};

use crate::support::{Agent, Frame, Reaction, ScriptedServer, Task, lock};

#[derive(Default)]
struct InFlight {
    withhold: bool,
    frames: Vec<Frame>,
    /// The first excess seen.
    excess: Option<String>,
}

impl InFlight {
    fn add(&mut self, frame: &Frame) {
        self.frames.push(frame.clone());
        let mut streams: HashMap<(&Ids, Stream), (usize, usize)> = HashMap::new();
        let mut bytes = 0;
        for frame in &self.frames {
            if let (Some(ids), Some((stream, _, data))) = (frame.ids(), frame.output()) {
                let (messages, sum) = streams.entry((ids, stream)).or_default();
                *messages += 1;
                *sum += data.len();
                bytes += data.len();
            }
        }
        let mut excess = None;
        if self.frames.len() > WINDOW_MESSAGES || bytes > WINDOW_BYTES {
            excess = Some(format!("{} messages, {bytes} bytes", self.frames.len()));
        }
        for ((ids, stream), (messages, bytes)) in streams {
            if messages > WINDOW_STREAM_MESSAGES || bytes > WINDOW_STREAM_BYTES {
                let stream = stream.as_str();
                excess = Some(format!(
                    "{stream} of {ids}: {messages} messages, {bytes} bytes"
                ));
            }
        }
        self.excess = self.excess.take().or(excess);
    }
}

/// Runs `command` without acknowledgements until it has ended, then acknowledges one by one.
fn check(name: &str, command: &str, settings: &[(&str, &str)], stdout: &str, stderr: &str) {
    let server = ScriptedServer::start();
    let in_flight = Arc::new(Mutex::new(InFlight {
        withhold: true,
        ..InFlight::default()
    }));
    let shared = Arc::clone(&in_flight);
    server.on_frame(move |link, frame| {
        if frame.output().is_none() && frame.result().is_none() {
            return Reaction::Default;
        }
        let mut in_flight = lock(&shared);
        in_flight.add(frame);
        if !in_flight.withhold {
            for frame in in_flight.frames.drain(..) {
                link.react(&frame);
            }
        }
        Reaction::Handled
    });
    let _agent = Agent::with(&server, settings);
    let task = Task::new(name, command);
    server.deliver(&task);
    server.wait_frame("task.started", &task);
    // It starts only when the first one has ended and all its output is stored.
    let next = Task::new("next", "echo next");
    server.deliver(&next);
    server.wait_frame("task.started", &next);
    let link = server.link();
    {
        let mut in_flight = lock(&in_flight);
        in_flight.withhold = false;
        for frame in in_flight.frames.drain(..) {
            link.react(&frame);
        }
    }
    server.wait_final(&task);
    server.wait_final(&next);
    let excess = lock(&in_flight).excess.take();
    server.check(excess.is_none(), &format!("too much in flight: {excess:?}"));
    server.look(|log| {
        assert!(
            log.stdout(&task.ids) == stdout,
            "stdout arrives byte for byte"
        );
        assert!(
            log.stderr(&task.ids) == stderr,
            "stderr arrives byte for byte"
        );
    });
}

#[test]
fn large_chunks_are_bounded_by_bytes() {
    let lines: String = (1..=60_000)
        .map(|number| format!("{number:015}\n"))
        .collect();
    check(
        "bytes",
        "seq -f %015.0f 1 60000 & seq -f %015.0f 1 60000 >&2; wait",
        &[],
        &lines,
        &lines,
    );
}

#[test]
fn small_chunks_are_bounded_by_number() {
    let lines: String = (1..=150).map(|number| format!("{number}\n")).collect();
    check(
        "messages",
        "for i in $(seq 150); do echo $i; echo $i >&2; sleep 0.01; done",
        &[("HOSTLINK_TASK_OUTPUT_FLUSH_INTERVAL", "1ms")],
        &lines,
        &lines,
    );
}
