//! PROTOCOL.md 4.3 and 4.4: what was not acknowledged comes again after a reconnect, with the same
//! ids, sequences and bytes, in order, and nothing live overtakes it.

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Frame, ScriptedServer, Task};

type Chunk = (String, u64, String);

fn chunks(frames: &[&Frame]) -> Vec<Chunk> {
    let chunk = |frame: &&Frame| {
        let (_, sequence, data) = frame.output().expect("a chunk");
        (frame.message_id.clone(), sequence, data.to_owned())
    };
    frames.iter().map(chunk).collect()
}

#[test]
fn the_same_messages_come_again_and_nothing_live_overtakes_them() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    server.acknowledge_nothing();
    let command = format!(
        "echo one; echo one-err >&2; {}; echo two; {}; echo three; exit 4",
        agent.hold("two"),
        agent.hold("three")
    );
    let task = Task::new("replayed", command);
    server.deliver(&task);
    server.wait_until("the first chunks of both streams", |log| {
        log.has("task.output", &task.ids)
            && !log.chunks(&task.ids, Stream::Stdout).is_empty()
            && !log.chunks(&task.ids, Stream::Stderr).is_empty()
    });
    agent.release("two");
    server.wait_until("the second chunk", |log| {
        log.stdout(&task.ids) == "one\ntwo\n"
    });
    let before = server.look(|log| chunks(&log.chunks(&task.ids, Stream::Stdout)));

    // The third line is printed while nobody is connected.
    server.refuse_upgrades(crate::support::Answer::status(503));
    server.cut();
    server.wait_until("a refused reconnect", |log| {
        log.count(|e| matches!(e, crate::support::Event::UpgradeRefused { .. })) > 0
    });
    agent.release("three");
    let mark = server.mark();
    server.acknowledge_everything();
    server.allow_upgrades();
    let result = server.wait_final(&task);
    server.check_eq(
        result.result().map(|r| r.exit_code),
        Some(4),
        "exit status of the final",
    );
    let after = server.look(|log| {
        let frames: Vec<&Frame> = log
            .frames_after(mark)
            .filter(|f| {
                f.output()
                    .is_some_and(|(stream, ..)| stream == Stream::Stdout)
            })
            .collect();
        chunks(&frames)
    });
    server.check_eq(
        after[..before.len()].to_vec(),
        before,
        "the replay begins with the same messages",
    );
    let sequences: Vec<u64> = after.iter().map(|(_, sequence, _)| *sequence).collect();
    let expected: Vec<u64> = (1..=after.len() as u64).collect();
    server.check_eq(sequences, expected, "sequences after the reconnect");
    server.look(|log| {
        assert_eq!(log.stdout(&task.ids), "one\ntwo\nthree\n");
        assert_eq!(log.stderr(&task.ids), "one-err\n");
    });
}

#[test]
fn a_final_comes_again_under_its_id_until_it_is_acknowledged() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    server.acknowledge_nothing();
    let task = Task::new("final", "echo out; echo err >&2; exit 7");
    server.deliver(&task);
    let first = server.wait_final(&task);
    for round in 2..=4 {
        server.cut();
        if round == 4 {
            server.acknowledge_everything();
        }
        server.wait_until(&format!("the final in round {round}"), |log| {
            log.frames_of("task.final", &task.ids).len() == round
        });
        let held = server.wait_hello(round).unacked_finals;
        server.check_eq(held.len(), 1, "finals in the hello");
        server.check_eq(
            held[0].message_id.clone(),
            first.message_id.clone(),
            "the id in the hello is that of the message",
        );
    }
    server.run_another("in-between");
    server.cut();
    server.run_another("afterwards");
    let finals = server.look(|log| log.frames_of("task.final", &task.ids).len());
    server.check_eq(finals, 4, "once acknowledged it does not come again");
    let ids = server.look(|log| {
        let finals = log.frames_of("task.final", &task.ids);
        finals
            .iter()
            .filter(|f| f.message_id == first.message_id)
            .count()
    });
    server.check_eq(ids, 4, "finals under the first id");
}
