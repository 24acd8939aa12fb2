//! PROTOCOL.md 3, `output_sequence_gap`: the stream is sent again from h+1, once, however often the
//! server reports the gap while that is on its way.

use std::sync::atomic::{AtomicBool, Ordering};

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Frame, Reaction, ScriptedServer, Task};

#[test]
fn a_lost_chunk_is_sent_again_once_and_nothing_is_lost() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    // The sixth chunk gets lost once. The default server then answers each of those behind it,
    // which are on their way already, with the same gap.
    let lost = AtomicBool::new(false);
    server.on_frame(move |_, frame| {
        let sixth = frame.sequence() == Some(6);
        if sixth && !lost.swap(true, Ordering::SeqCst) {
            return Reaction::Handled;
        }
        Reaction::Default
    });
    let task = Task::new("gap", "seq -f %015.0f 1 40000");
    server.deliver(&task);
    server.wait_final(&task);
    let expected: String = (1..=40000)
        .map(|number| format!("{number:015}\n"))
        .collect();
    let text = server.look(|log| log.stdout(&task.ids));
    server.check(text == expected, "the output arrives byte for byte");
    let sequences: Vec<u64> = server.look(|log| {
        let chunks = log.chunks(&task.ids, Stream::Stdout);
        chunks.into_iter().filter_map(Frame::sequence).collect()
    });
    let sixth = sequences.iter().filter(|&&s| s == 6).count();
    server.check_eq(sixth, 2, "the sixth chunk: first time and resend");
    let below = sequences.iter().filter(|&&s| s <= 5).count();
    server.check_eq(below, 5, "what the server has is not sent again");
    let most = |s: &u64| sequences.iter().filter(|t| *t == s).count();
    let storm = sequences.iter().find(|s| most(s) > 2);
    server.check(storm.is_none(), &format!("chunk {storm:?} came thrice"));
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
}
