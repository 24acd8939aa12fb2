//! PROTOCOL.md 3, Errors: a stream that the server will never take is given up, so that finals and
//! other tasks are not held up for ever.

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Reaction, ScriptedServer, Task};

#[test]
fn final_and_next_task_arrive_after_three_reports_of_the_same_gap() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let task = Task::new("never", "echo untaken; echo fine >&2");
    let ids = task.ids.clone();
    server.on_frame(move |link, frame| {
        let untaken = frame.ids() == Some(&ids)
            && frame
                .output()
                .is_some_and(|(stream, ..)| stream == Stream::Stdout);
        if untaken {
            link.gap(frame, 0);
            return Reaction::Handled;
        }
        Reaction::Default
    });
    server.deliver(&task);
    server.wait_final(&task);
    let next = Task::new("next", "echo next");
    server.deliver(&next);
    server.wait_final(&next);
    server.look(|log| {
        assert_eq!(log.stderr(&task.ids), "fine\n");
        assert_eq!(log.stdout(&next.ids), "next\n");
    });
    server.wait_until("three tries of the chunk", |log| {
        log.chunks(&task.ids, Stream::Stdout).len() >= 3
    });

    // One report more may be needed where the agent cannot tell which copy it is about. Then it is
    // gone, also after a reconnect.
    for round in ["first-cut", "second-cut"] {
        server.cut();
        server.run_another(round);
    }
    let hello = server.wait_hello(3);
    server.check(hello.unacked_output.is_empty(), &format!("{hello:?}"));
    let tries = server.look(|log| log.chunks(&task.ids, Stream::Stdout).len());
    server.check(tries <= 4, &format!("the chunk was sent {tries} times"));
}
