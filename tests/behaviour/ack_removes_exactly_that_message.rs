//! PROTOCOL.md 3, `ack`: it removes that message and no other; with `highest_output_sequence` also
//! all lower chunks of that stream.

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Frame, Reaction, ScriptedServer, Task};

/// Starts a task of six chunks on stdout, one line each, and waits for them without acknowledging.
fn six_chunks(server: &ScriptedServer, agent: &Agent) -> (Task, Vec<Frame>) {
    server.acknowledge_nothing();
    let lines: Vec<String> = (1..=6)
        .map(|number| {
            format!(
                "echo line {number}; {}",
                agent.hold(&format!("after{number}"))
            )
        })
        .collect();
    let task = Task::new("six", lines.join("\n"));
    server.deliver(&task);
    for number in 1..=6 {
        server.wait_until(&format!("chunk {number}"), |log| {
            log.chunks(&task.ids, Stream::Stdout).len() == number
        });
        agent.release(&format!("after{number}"));
    }
    server.wait_final(&task);
    let chunks = server.look(|log| {
        let chunks = log.chunks(&task.ids, Stream::Stdout);
        chunks.into_iter().cloned().collect()
    });
    (task, chunks)
}

/// Cuts, and returns the sequences that come again, up to the final.
fn sequences_after_a_cut(server: &ScriptedServer, task: &Task) -> Vec<u64> {
    let mark = server.mark();
    server.acknowledge_everything();
    // The holes are meant: the default server would call them gaps.
    server.on_frame(|link, frame| {
        if frame.output().is_some() {
            link.ack(frame);
            return Reaction::Handled;
        }
        Reaction::Default
    });
    server.cut();
    server.wait_until("the final again", |log| {
        log.frames_after(mark)
            .any(|frame| frame.is_about("task.final", &task.ids))
    });
    server.look(|log| log.frames_after(mark).filter_map(Frame::sequence).collect())
}

#[test]
fn an_ack_of_the_first_chunks_leaves_the_others() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let (task, chunks) = six_chunks(&server, &agent);
    let link = server.link();
    link.ack(&chunks[0]);
    link.ack(&chunks[1]);
    // The answer to a delivery comes after the acknowledgements before it were read.
    let second = Task::new("second", "true");
    server.deliver(&second);
    server.wait_frame("task.received", &second);
    let again = sequences_after_a_cut(&server, &task);
    server.check_eq(
        again,
        vec![3, 4, 5, 6],
        "what was not acknowledged comes again",
    );
}

#[test]
fn highest_output_sequence_acknowledges_all_below_it() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let (task, chunks) = six_chunks(&server, &agent);
    server.link().ack_through(&chunks[3], 4);
    let second = Task::new("second", "true");
    server.deliver(&second);
    server.wait_frame("task.received", &second);
    let again = sequences_after_a_cut(&server, &task);
    server.check_eq(again, vec![5, 6], "what was not acknowledged comes again");
}

#[test]
fn an_ack_of_the_final_leaves_the_output() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let (task, _) = six_chunks(&server, &agent);
    let result = server.wait_final(&task);
    server.link().ack(&result);
    // The answer to a delivery comes after the acknowledgement before it was read.
    let second = Task::new("second", "echo second");
    server.deliver(&second);
    server.wait_final(&second);
    let mark = server.mark();
    server.acknowledge_everything();
    server.cut();
    server.wait_final(&second);
    server.wait_until("all six chunks again", |log| {
        let again = log.frames_after(mark);
        again
            .filter(|f| f.is_about("task.output", &task.ids))
            .count()
            == 6
    });
    server.run_another("later");
    let finals = server.look(|log| {
        let again = log.frames_after(mark);
        again
            .filter(|f| f.is_about("task.final", &task.ids))
            .count()
    });
    server.check_eq(finals, 0, "an acknowledged final does not come again");
}

#[test]
fn an_ack_of_something_unknown_changes_nothing() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let (task, chunks) = six_chunks(&server, &agent);
    let link = server.link();
    for id in ["", "unknown", "a-b-c-d", &"x".repeat(5000)] {
        let mut foreign = chunks[0].clone();
        foreign.message_id = id.to_owned();
        link.ack(&foreign);
    }
    let mut other_store = chunks[0].clone();
    other_store.message_id = format!("0123456789abcdef{}", &other_store.message_id[16..]);
    link.ack(&other_store);
    let second = Task::new("second", "true");
    server.deliver(&second);
    server.wait_frame("task.received", &second);
    let again = sequences_after_a_cut(&server, &task);
    server.check_eq(again, vec![1, 2, 3, 4, 5, 6], "nothing was removed");
}
