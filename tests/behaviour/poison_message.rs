//! PROTOCOL.md 3, Errors: a message that the server will never take is removed; the session goes on.

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Reaction, ScriptedServer, Task};

#[test]
fn a_refused_chunk_is_removed_and_the_session_goes_on() {
    let server = ScriptedServer::start();
    let agent = Agent::start(&server);
    let task = Task::new(
        "poison",
        format!("echo poison; {}; echo wholesome", agent.hold("second")),
    );
    server.on_frame(|link, frame| match frame.output() {
        Some((_, 1, _)) => {
            link.error("invalid_message", false, Some(&frame.message_id));
            Reaction::Handled
        }
        Some(_) => {
            link.ack(frame);
            Reaction::Handled
        }
        None => Reaction::Default,
    });
    server.deliver(&task);
    server.wait_frame("task.output", &task);
    agent.release("second");
    server.wait_final(&task);
    server.check_eq(server.look(|log| log.connections()), 1, "connections");

    server.cut();
    server.run_another("afterwards");
    let times = server.look(|log| {
        let chunks = log.chunks(&task.ids, Stream::Stdout);
        chunks
            .iter()
            .filter(|chunk| chunk.sequence() == Some(1))
            .count()
    });
    server.check_eq(times, 1, "the refused chunk was sent");
}

#[test]
fn a_refused_final_is_removed() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let task = Task::new("poison", "true");
    let ids = task.ids.clone();
    server.on_frame(move |link, frame| {
        if frame.is_about("task.final", &ids) {
            link.error("unknown_attempt", false, Some(&frame.message_id));
            return Reaction::Handled;
        }
        Reaction::Default
    });
    server.deliver(&task);
    server.wait_final(&task);
    server.run_another("in-between");
    server.check_eq(server.look(|log| log.connections()), 1, "connections");
    server.cut();
    server.run_another("afterwards");
    let hello = server.wait_hello(2);
    server.check(hello.unacked_finals.is_empty(), &format!("{hello:?}"));
    let times = server.look(|log| log.frames_of("task.final", &task.ids).len());
    server.check_eq(times, 1, "the refused final was sent");
}

#[test]
fn an_error_that_names_no_message_ends_the_session_and_is_dialled_again() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    server.link().error("go_away", false, None);
    server.wait_until("a second session", |log| log.hello(2).is_some());
    server.run_another("afterwards");
}

#[test]
fn an_error_about_the_hello_ends_the_session_and_is_dialled_again() {
    let server = ScriptedServer::start();
    server.on_frame(|link, frame| {
        if frame.hello().is_some() && link.conn <= 2 {
            link.error("invalid_hello", false, Some(&frame.message_id));
            return Reaction::Handled;
        }
        Reaction::Default
    });
    let _agent = Agent::start(&server);
    server.wait_until("a third session", |log| log.hello(3).is_some());
    server.run_another("afterwards");
}
