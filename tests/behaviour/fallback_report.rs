//! PROTOCOL.md 4.7 and 2, Report: when a final goes by HTTP, and what its answers do.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{Agent, Answer, Event, Log, ScriptedServer, Task};

fn wait_report(server: &ScriptedServer, task: &Task) -> hostlink_edge::wire::http::ReceivedReport {
    server.wait_for(&format!("the report of {}", task.ids), |log| {
        log.reports(&task.ids).first().copied().cloned()
    })
}

fn refused_upgrades(log: &Log) -> usize {
    log.count(|event| matches!(event, Event::UpgradeRefused { .. }))
}

/// No session; the task is offered by poll, once.
fn without_session(server: &ScriptedServer, task: &Task) {
    server.refuse_upgrades(Answer::status(503));
    offer_once(server, task);
}

/// By poll, until the agent asks again after it got it.
fn offer_once(server: &ScriptedServer, task: &Task) {
    server.policy(|policy| policy.poll_tasks = vec![task.polled()]);
}

#[test]
fn at_once_if_results_are_disabled() {
    let server = ScriptedServer::start();
    let _agent = Agent::with(&server, &[("HOSTLINK_WS_RESULTS_ENABLED", "false")]);
    let hello = server.wait_hello(1);
    server.check(!hello.capabilities.results_enabled, "the hello says so");
    let task = Task::new("disabled", "echo out; echo err >&2; exit 3");
    server.deliver(&task);
    let report = wait_report(&server, &task);
    server.check_eq(
        (report.status.as_str(), report.exit_code),
        ("failed", 3),
        "status and exit code",
    );
    server.check_eq(
        (report.output.as_deref(), report.error.as_deref()),
        (Some("out\n"), Some("err\n")),
        "texts",
    );
    let second = Task::new("second", "true");
    server.deliver(&second);
    wait_report(&server, &second);
    let results = server.look(|log| {
        log.frames()
            .filter(|f| f.kind == "task.final" || f.kind == "task.output")
            .count()
    });
    server.check_eq(results, 0, "results over the WebSocket");
}

#[test]
fn at_once_without_a_result_channel_and_only_once() {
    let server = ScriptedServer::start();
    server.policy(|policy| policy.delivery_enabled = false);
    let agent = Agent::start(&server);
    let trace = agent.trace("old");
    let task = Task::without_attempt("old", format!("{trace}; echo from an old server"));
    // It stays offered, as by a server that has not read the report yet.
    offer_once(&server, &task);
    server.link();
    let report = wait_report(&server, &task);
    server.check_eq(report.status.as_str(), "completed", "status");
    server.check_eq(
        report.output.as_deref(),
        Some("from an old server\n"),
        "output",
    );
    let mark = server.mark();
    server.wait_until("five more polls", |log| {
        log.after(mark).filter(|e| matches!(e, Event::Poll)).count() >= 5
    });
    server.check_eq(agent.runs("old"), 1, "runs");
    server.check_eq(
        server.look(|log| log.reports(&task.ids).len()),
        1,
        "reports",
    );
    let frames = server.look(|log| log.frames().filter(|f| f.hello().is_none()).count());
    server.check_eq(frames, 0, "frames about a task without result channel");
}

#[test]
fn at_once_without_session_if_no_output_waits() {
    let server = ScriptedServer::start();
    let task = Task::new("silent", "exit 9");
    without_session(&server, &task);
    // So long a threshold that only "at once" explains a report.
    let settings = [("HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD", "5m")];
    let _agent = Agent::with(&server, &settings);
    let report = wait_report(&server, &task);
    server.check_eq(report.exit_code, 9, "exit code");

    // What was reported is done: it neither stands in the hello nor comes over the WebSocket.
    server.wait_until("the report's answer", |log| {
        log.count(|e| matches!(e, Event::ReportAnswered { .. })) > 0
    });
    server.policy(|policy| policy.poll_tasks.clear());
    server.allow_upgrades();
    let hello = server.wait_hello(1);
    server.check(hello.unacked_finals.is_empty(), &format!("{hello:?}"));
    server.run_another("afterwards");
    server.check(
        server.look(|log| log.first_final(&task.ids).is_none()),
        "no second final after a report",
    );
}

#[test]
fn after_the_threshold_if_output_waits_and_the_output_comes_later() {
    let server = ScriptedServer::start();
    let task = Task::new("loud", "echo waiting; exit 2");
    without_session(&server, &task);
    let settings = [("HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD", "1s")];
    let _agent = Agent::with(&server, &settings);
    let report = wait_report(&server, &task);
    server.check_eq(
        report.output.as_deref(),
        Some("waiting\n"),
        "output of the report",
    );
    server.wait_until("the report's answer", |log| {
        log.count(|e| matches!(e, Event::ReportAnswered { .. })) > 0
    });
    server.policy(|policy| policy.poll_tasks.clear());
    server.allow_upgrades();
    server.wait_frame("task.output", &task);
    server.run_another("afterwards");
    server.check_eq(
        server.look(|log| log.stdout(&task.ids)),
        "waiting\n".into(),
        "replay",
    );
    server.check(
        server.look(|log| log.first_final(&task.ids).is_none()),
        "no second final after a report",
    );
}

#[test]
fn not_before_the_threshold_if_output_waits() {
    let server = ScriptedServer::start();
    let task = Task::new("loud", "echo waiting; exit 2");
    without_session(&server, &task);
    let settings = [("HOSTLINK_WS_POLLING_FALLBACK_THRESHOLD", "5m")];
    let agent = Agent::with(&server, &settings);
    // A task without output is reported at once: by then the first one has ended.
    let second = Task::new("second", agent.trace("second"));
    server.wait_until("a first dial", |log| refused_upgrades(log) > 0);
    server.policy(|policy| policy.poll_tasks = vec![task.polled(), second.polled()]);
    wait_report(&server, &second);
    server.check(
        server.look(|log| log.reports(&task.ids).is_empty()),
        "the final waits with its output",
    );
    server.policy(|policy| policy.poll_tasks.clear());
    server.allow_upgrades();
    let result = server.wait_final(&task);
    server.check_eq(result.result().map(|r| r.exit_code), Some(2), "exit code");
    server.check(
        server.look(|log| log.reports(&task.ids).is_empty()),
        "no report",
    );
}

#[test]
fn a_server_error_is_tried_again_until_it_succeeds() {
    let server = ScriptedServer::start();
    let task = Task::new("tried", "exit 1");
    without_session(&server, &task);
    let answers = AtomicUsize::new(0);
    server.on_http(move |request| {
        request.reported_task()?;
        let statuses = [500, 503, 408, 200];
        let nth = answers.fetch_add(1, Ordering::SeqCst);
        Some(Answer::status(statuses[nth.min(3)]))
    });
    let _agent = Agent::start(&server);
    server.wait_until("four reports, the last one taken", |log| {
        log.count(|e| matches!(e, Event::ReportAnswered { status: 200, .. })) > 0
    });
    server.check_eq(
        server.look(|log| log.reports(&task.ids).len()),
        4,
        "reports",
    );
}

#[test]
fn retry_after_is_obeyed() {
    let server = ScriptedServer::start();
    let task = Task::new("later", "exit 1");
    without_session(&server, &task);
    let answers = AtomicUsize::new(0);
    server.on_http(move |request| {
        request.reported_task()?;
        let first = answers.fetch_add(1, Ordering::SeqCst) == 0;
        first.then(|| Answer::status(429).header("Retry-After", "3"))
    });
    let _agent = Agent::start(&server);
    server.wait_until("two reports", |log| log.reports(&task.ids).len() == 2);
    let times = server.look(|log| log.times(|e| matches!(e, Event::Report { .. })));
    let waited = times[1] - times[0];
    server.check(waited.as_millis() >= 2900, &format!("waited {waited:?}"));
}

#[test]
fn a_refused_timestamp_corrects_the_clock_and_is_signed_again() {
    let server = ScriptedServer::start();
    let task = Task::new("clock", "exit 1");
    without_session(&server, &task);
    let agent = Agent::start(&server);
    let hold = Task::new("hold", agent.hold("report"));
    server.policy(|policy| policy.poll_tasks = vec![hold.polled()]);
    server.wait_until("a poll", |log| log.count(|e| matches!(e, Event::Poll)) > 0);
    // From now on the server's clock is an hour ahead.
    server.policy(|policy| policy.clock_shift_seconds = 3600);
    agent.release("report");
    wait_report(&server, &hold);
    server.wait_until("the report is taken", |log| {
        log.count(|e| matches!(e, Event::ReportAnswered { status: 200, .. })) > 0
    });
}

#[test]
fn a_report_that_is_too_large_is_sent_again_with_half_the_output() {
    let server = ScriptedServer::start();
    const LIMIT: usize = 20_000;
    server.on_http(|request| {
        request.reported_task()?;
        (request.body.len() > LIMIT).then(|| Answer::status(413))
    });
    let _agent = Agent::with(&server, &[("HOSTLINK_WS_RESULTS_ENABLED", "false")]);
    let task = Task::new("large", "seq -f %015.0f 1 4000");
    server.deliver(&task);
    server.wait_until("a report that is taken", |log| {
        log.count(|e| matches!(e, Event::ReportAnswered { status: 200, .. })) > 0
    });
    let sizes: Vec<usize> = server.look(|log| {
        let reports = log.reports(&task.ids);
        reports
            .iter()
            .map(|r| r.output.as_deref().unwrap_or_default().len())
            .collect()
    });
    server.check(
        sizes.len() >= 3 && sizes.windows(2).all(|pair| pair[1] < pair[0]),
        &format!("each report is shorter: {sizes:?}"),
    );
    let last = server.look(|log| log.reports(&task.ids).last().copied().cloned());
    let output = last.and_then(|report| report.output).unwrap_or_default();
    server.check(
        output.ends_with("000000000004000\n"),
        "the end of the output is kept",
    );
    let first_line = output.lines().next().unwrap_or_default();
    server.check(
        first_line.parse::<u64>().is_err(),
        &format!("a first line announces what was left out, not {first_line:?}"),
    );
}

#[test]
fn another_client_error_leaves_the_final_to_the_websocket() {
    let server = ScriptedServer::start();
    let task = Task::new("unknown", "exit 6");
    without_session(&server, &task);
    server.on_http(|request| request.reported_task().map(|_| Answer::status(404)));
    let _agent = Agent::start(&server);
    wait_report(&server, &task);
    server.policy(|policy| policy.poll_tasks.clear());
    server.allow_upgrades();
    let result = server.wait_final(&task);
    server.check_eq(result.result().map(|r| r.exit_code), Some(6), "exit code");
    server.check_eq(
        server.look(|log| log.reports(&task.ids).len()),
        1,
        "reports",
    );
}

#[test]
fn another_client_error_drops_a_final_without_result_channel() {
    let server = ScriptedServer::start();
    server.policy(|policy| policy.delivery_enabled = false);
    server.on_http(|request| request.reported_task().map(|_| Answer::status(404)));
    let task = Task::without_attempt("dropped", "exit 6");
    let _agent = Agent::start(&server);
    server.policy(|policy| policy.poll_tasks = vec![task.polled()]);
    wait_report(&server, &task);
    let second = Task::without_attempt("second", "exit 7");
    server.policy(|policy| policy.poll_tasks = vec![second.polled()]);
    wait_report(&server, &second);
    server.check_eq(
        server.look(|log| log.reports(&task.ids).len()),
        1,
        "reports",
    );
}
