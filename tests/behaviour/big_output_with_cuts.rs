//! 64 MiB of output with the socket cut every 40 chunks arrives byte for byte, and the agent's
//! memory does not grow with it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Reaction, ScriptedServer, Task};

const LINE_BYTES: usize = 16;
const LINES: usize = 64 * 1024 * 1024 / LINE_BYTES;
const CHUNKS_PER_CONNECTION: usize = 40;
const TIME_LIMIT: Duration = Duration::from_secs(240);
/// Of a release build. A debug build carries far more code.
const RESIDENT_KIB_MAX: u64 = 12 * 1024;
const RESIDENT_KIB_MAX_DEBUG: u64 = 24 * 1024;

#[test]
fn it_arrives_byte_for_byte_in_bounded_memory() {
    let server = ScriptedServer::start();
    let agent = Agent::with(
        &server,
        &[("HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES", "134217728")],
    );
    let (connection, chunks) = (AtomicUsize::new(0), AtomicUsize::new(0));
    server.on_frame(move |link, frame| {
        if frame.hello().is_some() {
            link.hello_ack_from_taken(frame);
            return Reaction::Handled;
        }
        if frame.output().is_none() {
            return Reaction::Default;
        }
        if connection.swap(link.conn, Ordering::SeqCst) != link.conn {
            chunks.store(0, Ordering::SeqCst);
        }
        link.react(frame);
        if chunks.fetch_add(1, Ordering::SeqCst) + 1 == CHUNKS_PER_CONNECTION {
            link.cut();
        }
        Reaction::Handled
    });
    let task = Task::new("big", format!("seq -f %015.0f 1 {LINES}"));
    server.deliver(&task);
    let result = server.wait_at_most(TIME_LIMIT, "the final", |log| {
        log.first_final(&task.ids).cloned()
    });
    let peak = agent.peak_resident_kib();
    server.check_eq(result.result().map(|r| r.exit_code), Some(0), "exit code");
    let text = server.look(|log| log.text(&task.ids, Stream::Stdout));
    server.check_eq(text.len(), LINES * LINE_BYTES, "bytes that arrived");
    for (number, line) in text.as_bytes().chunks(LINE_BYTES).enumerate() {
        let expected = format!("{:015}\n", number + 1);
        if line != expected.as_bytes() {
            server.fail(&format!(
                "line {} is {:?}",
                number + 1,
                String::from_utf8_lossy(line)
            ));
        }
    }
    let connections = server.look(|log| log.connections());
    server.check(connections > 50, &format!("only {connections} connections"));
    let chunks = server.look(|log| log.chunks(&task.ids, Stream::Stdout).len());
    eprintln!("{connections} connections, {chunks} chunks sent, peak resident {peak} KiB");
    let built_here = std::env::var_os("HOSTLINK_TEST_BINARY").is_none();
    let allowed = if built_here && cfg!(debug_assertions) {
        RESIDENT_KIB_MAX_DEBUG
    } else {
        RESIDENT_KIB_MAX
    };
    server.check(
        peak < allowed,
        &format!("resident memory reached {peak} KiB, allowed are {allowed}"),
    );
}
