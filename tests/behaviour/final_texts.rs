//! PROTOCOL.md 3, `task.final`, and 4.9: status, exit code and texts.

use hostlink_edge::ids::{FinalStatus, Ids};
use hostlink_edge::wire::FinalPayload;

use crate::support::{Agent, Answer, Frame, Reaction, ScriptedServer, Task};

fn result(server: &ScriptedServer, task: &Task) -> FinalPayload<String> {
    server.deliver(task);
    let frame = server.wait_final(task);
    frame.result().cloned().expect("a final has a result")
}

fn failed(exit_code: i32, error: &str) -> FinalPayload<String> {
    FinalPayload {
        status: FinalStatus::Failed,
        exit_code,
        output: None,
        error: Some(error.to_owned()),
        output_truncated: false,
        error_truncated: false,
        usage: None,
    }
}

#[test]
fn status_exit_code_and_reason() {
    let server = ScriptedServer::start();
    let _agent = Agent::start(&server);
    let completed = FinalPayload {
        status: FinalStatus::Completed,
        exit_code: 0,
        output: Some("fine\n".to_owned()),
        error: None,
        output_truncated: false,
        error_truncated: false,
        usage: None,
    };
    for (name, command, expected) in [
        ("fine", "echo fine", completed),
        ("exit", "exit 3", failed(3, "exit status 3")),
        ("signal", "kill -9 $$", failed(-1, "killed by signal 9")),
        ("stderr", "echo sorry >&2; exit 1", failed(1, "sorry\n")),
        (
            "missing",
            "exec /nonexistent/program 2>/dev/null",
            failed(127, "exit status 127"),
        ),
    ] {
        let got = result(&server, &Task::new(name, command));
        server.check_eq(got, expected, command);
    }
}

#[test]
fn a_task_over_its_time_is_ended_with_all_its_children() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_KILL_GRACE", "1s")]);
    let task = Task {
        timeout_seconds: Some(1),
        ..Task::new(
            "slow",
            format!("({}; {})", agent.hold("never"), agent.trace("slow")),
        )
    };
    let got = result(&server, &task);
    server.check_eq(got, failed(-1, "timed out after 1 s"), "end of the task");
    server.run_another("afterwards");
    server.check_eq(agent.runs("slow"), 0, "the child went on");
}

#[test]
fn texts_are_the_last_bytes_up_to_the_bound_and_flagged() {
    let server = ScriptedServer::start();
    let _agent = Agent::with(&server, &[("HOSTLINK_TASK_FINAL_OUTPUT_BYTES", "100")]);
    let got = result(&server, &Task::new("long", "seq 1 1000; echo short >&2"));
    let all: String = (1..=1000).map(|number| format!("{number}\n")).collect();
    server.check_eq(
        got,
        FinalPayload {
            status: FinalStatus::Completed,
            exit_code: 0,
            output: Some(all[all.len() - 100..].to_owned()),
            error: Some("short\n".to_owned()),
            output_truncated: true,
            error_truncated: false,
            usage: None,
        },
        "the tails",
    );
    let exactly = result(
        &server,
        &Task::new("exact", "head -c 100 /dev/zero | tr '\\0' x"),
    );
    server.check_eq(
        (exactly.output, exactly.output_truncated),
        (Some("x".repeat(100)), false),
        "a text that just fits",
    );
}

#[test]
fn without_room_for_texts_there_are_none() {
    let server = ScriptedServer::start();
    let _agent = Agent::with(&server, &[("HOSTLINK_TASK_FINAL_OUTPUT_BYTES", "0")]);
    let got = result(&server, &Task::new("none", "echo text"));
    server.check_eq((got.output, got.output_truncated), (None, true), "output");
}

/// Extension `usage`: also in a final that waited for the next agent.
#[test]
fn a_server_that_wants_it_learns_what_a_task_has_used() {
    let server = ScriptedServer::start();
    server.on_frame(|link, frame| {
        if frame.hello().is_some() {
            link.hello_ack(frame, serde_json::json!({"extensions": ["usage"]}));
            return Reaction::Handled;
        }
        let waits = |ids: &Ids| ids.task.as_str() == "task-waits";
        match frame.result().is_some() && frame.ids().is_some_and(waits) {
            true => Reaction::Handled,
            false => Reaction::Default,
        }
    });
    server.on_http(|request| {
        let reported = request.reported_task().is_some();
        reported.then(|| Answer::status(503))
    });
    let mut agent = Agent::start(&server);
    let busy = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 0.3";
    let task = Task::new("busy", busy);
    server.deliver(&task);
    let used = result_of(&server.wait_final(&task)).usage;
    let used = used.expect("it was granted");
    server.check(used.wall_ms >= 300, &format!("wall time: {used:?}"));
    server.check(used.user_ms > 0, &format!("user time: {used:?}"));
    server.check(
        used.wall_ms >= used.user_ms,
        &format!("one process: {used:?}"),
    );
    server.check(
        used.memory_peak_bytes > 64 * 1024,
        &format!("memory: {used:?}"),
    );

    let task = Task::new("waits", busy);
    server.deliver(&task);
    let first = result_of(&server.wait_final(&task)).usage;
    agent.kill();
    agent.start_again();
    server.wait_until("the final again", |log| {
        log.frames_of("task.final", &task.ids).len() == 2
    });
    let again = server.look(|log| {
        let finals = log.frames_of("task.final", &task.ids);
        finals
            .iter()
            .map(|frame| result_of(frame).usage)
            .collect::<Vec<_>>()
    });
    server.check_eq(again, vec![first, first], "usage");
    server.check(first.is_some(), "it is stored");
}

fn result_of(frame: &Frame) -> FinalPayload<String> {
    frame.result().expect("a final").clone()
}
