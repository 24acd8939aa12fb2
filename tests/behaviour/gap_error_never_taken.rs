//! PROTOCOL.md 3, Errors: a stream that the server will never take is given up, so that finals and
//! other tasks are not held up for ever.

use hostlink_edge::ids::Stream;

use crate::support::{Agent, Frame, Reaction, ScriptedServer, Task};

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
    let tries = server.look(|log| log.chunks(&task.ids, Stream::Stdout).len());
    server.check(
        (3..=4).contains(&tries),
        &format!("the chunk was sent {tries} times"),
    );

    // What was given up is gone after a reconnect too.
    let mark = server.mark();
    server.cut();
    server.run_another("afterwards");
    let again = server.look(|log| {
        log.frames_after(mark)
            .any(|f: &Frame| f.is_about("task.output", &task.ids))
    });
    server.check(!again, "a stream given up does not come again");
}
