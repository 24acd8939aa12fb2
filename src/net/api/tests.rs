use std::rc::Rc;
use std::time::Duration;

use super::*;
use crate::limits::RESPONSE_BODY_BYTES_MAX;
use crate::net::testing::{self, Scripted, Step, answer, run};
use crate::net::verify_signature;
use crate::wire::http::ReportText;

const DATE: &str = "Date: Fri, 01 Mar 2024 00:00:00 GMT\r\n";
const DATE_UNIX: u64 = 1_709_251_200;

fn api(server: &Scripted) -> Api {
    api_with(testing::settings(&server.base()))
}

fn api_with(settings: crate::net::Settings) -> Api {
    let clock = ServerClock::new(&settings.control_plane);
    let api = Api::new(Rc::new(Dialer::new(settings)), clock.clone());
    let signer = Signer::new("agent-1", testing::key().clone(), clock);
    api.set_signer(Rc::new(signer));
    api
}

fn ok(body: &str) -> Step {
    answer("200 OK", "", body)
}

fn report() -> Report<'static> {
    Report {
        status: "completed",
        output: ReportText {
            notice: None,
            text: b"hi\n",
        },
        error: ReportText::default(),
        exit_code: 0,
    }
}

fn register_request() -> RegisterRequest {
    RegisterRequest {
        fingerprint: "f".to_string(),
        token_id: "t".to_string(),
        token_key: "secret-token".to_string(),
        public_key: "p".to_string(),
        public_key_type: "RSA".to_string(),
        tags: Vec::new(),
    }
}

#[test]
fn calls_are_signed_and_share_one_connection() {
    let server = Scripted::new([
        ok(r#"[{"id":"1","command":"a"}]"#),
        ok(r#"{"message":"ok","pending_tasks":null}"#),
        ok("{}"),
    ]);
    run(async {
        let api = api(&server);
        assert_eq!(api.poll().await.expect("polled").len(), 1);
        assert_eq!(api.heartbeat().await.expect("beaten").len(), 0);
        assert_eq!(api.report("x/1", &report()).await, ReportOutcome::Done);
    });
    let received = server.received();
    let lines: Vec<&str> = received.iter().map(|request| request.line()).collect();
    assert_eq!(
        lines,
        [
            "GET /api/v1/tasks HTTP/1.1",
            "POST /api/v1/agents/agent-1/heartbeat HTTP/1.1",
            "PUT /api/v1/tasks/x%2F1 HTTP/1.1",
        ]
    );
    let public_key = testing::key().public_key_to_der().expect("der");
    for request in &received {
        assert_eq!(request.connection, 0);
        let header = |name| request.header(name).expect("header");
        assert!(verify_signature(
            &public_key,
            header("x-agent-id"),
            header("x-timestamp"),
            header("x-nonce"),
            header("x-signature"),
        ));
    }
    assert_eq!(received[2].header("content-type"), Some("application/json"));
    assert_eq!(
        received[2].body,
        br#"{"status":"completed","output":"hi\n","error":"","exit_code":0}"#
    );
}

#[test]
fn a_kept_connection_that_the_server_closed_is_replaced_once() {
    let whole = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]".to_string();
    let server = Scripted::new([
        Step::AnswerAndClose(whole.clone()),
        Step::Answer(whole),
        // Closed with the request on it: the request goes again over a fresh connection.
        Step::Close,
        ok("[]"),
        // A fresh connection that fails is a failure.
        Step::Close,
        Step::Close,
    ]);
    run(async {
        let api = api(&server);
        for _ in 0..3 {
            api.poll().await.expect("polled");
        }
        let error = api.poll().await.expect_err("closed twice");
        assert!(error.why.contains("closed the connection"), "{error}");
    });
    let connections: Vec<_> = server.received().iter().map(|r| r.connection).collect();
    assert_eq!(connections, [0, 1, 1, 2, 2, 3]);
}

#[test]
fn an_idle_connection_is_not_used_again() {
    let server = Scripted::new([ok("[]"), ok("[]")]);
    run(async {
        let mut settings = testing::settings(&server.base());
        settings.timeouts.keep_alive = Duration::ZERO;
        let api = api_with(settings);
        api.poll().await.expect("polled");
        api.poll().await.expect("polled");
    });
    assert_eq!(server.received()[1].connection, 1);
}

#[test]
fn an_idle_connection_is_closed_when_it_is_looked_after() {
    let (closed_sender, closed) = async_channel::bounded::<usize>(1);
    let port = testing::serve(move |number, mut stream| {
        let mut reader = std::io::BufReader::new(stream.try_clone().expect("clone"));
        while testing::read_request(number, &mut reader).is_some() {
            let text = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]";
            std::io::Write::write_all(&mut stream, text).expect("answered");
        }
        closed_sender.send_blocking(number).expect("told");
    });
    let mut settings = testing::settings(&format!("http://127.0.0.1:{port}"));
    run(async {
        let api = api_with(settings.clone());
        api.poll().await.expect("polled");
        api.close_idle();
        assert!(closed.is_empty(), "not idle for long enough");
        settings.timeouts.keep_alive = Duration::ZERO;
        let api_of_short_patience = api_with(settings);
        api_of_short_patience.poll().await.expect("polled");
        api_of_short_patience.close_idle();
        assert_eq!(closed.recv().await, Ok(1));
    });
}

#[test]
fn bodies_and_heads_are_bounded() {
    let check = |step: Step, expected: &str| {
        let server = Scripted::new([step]);
        let error = run(async { api(&server).poll().await }).expect_err(expected);
        assert!(error.why.contains(expected), "{expected}: {error}");
    };
    let announced = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
        RESPONSE_BODY_BYTES_MAX + 1
    );
    check(Step::Answer(announced), "larger than 4194304 bytes");
    check(
        Step::Endless(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            concat!("10\r\n", "0123456789abcdef", "\r\n"),
        ),
        "larger than 4194304 bytes",
    );
    check(
        Step::Endless("HTTP/1.1 200 OK\r\nX: ", "0123456789abcdef"),
        "its head is longer than",
    );
    check(
        Step::Endless("HTTP/1.1 200 OK\r\n", "X: y\r\n"),
        "its head is longer than",
    );
    check(Step::Endless("", "SSH-2.0-x\r\n"), "not HTTP");
}

#[test]
fn a_server_that_says_nothing_is_left_after_the_timeout() {
    let server = Scripted::new([Step::Silence]);
    let mut settings = testing::settings(&server.base());
    settings.timeouts.request = Duration::from_millis(50);
    let error = run(async { api_with(settings).poll().await }).expect_err("silent");
    assert!(error.why.contains("no answer within 50ms"), "{error}");
}

#[test]
fn half_an_answer_spoils_a_poll_but_not_a_report() {
    let half = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n[]";
    let server = Scripted::new([
        Step::AnswerAndClose(half.to_string()),
        Step::AnswerAndClose(half.to_string()),
        Step::AnswerAndClose("HTTP/1.1 200 OK\r\nContent-Le".to_string()),
    ]);
    run(async {
        let api = api(&server);
        let error = api.poll().await.expect_err("half");
        assert!(error.why.contains("not whole"), "{error}");
        assert_eq!(api.report("1", &report()).await, ReportOutcome::Done);
        let outcome = api.report("1", &report()).await;
        assert!(
            matches!(outcome, ReportOutcome::Retry { .. }),
            "{outcome:?}"
        );
    });
}

#[test]
fn a_redirect_is_named_and_not_followed() {
    let server = Scripted::new([answer("302 Found", "Location: https://b.example/x\r\n", "")]);
    let error = run(async { api(&server).poll().await }).expect_err("redirect");
    assert_eq!(error.status, Some(302));
    assert!(error.why.contains("https://b.example/x"), "{error}");
}

#[test]
fn a_401_corrects_the_clock_and_is_signed_again_once() {
    let server = Scripted::new([
        answer("401 Unauthorized", DATE, r#"{"error":"stale"}"#),
        ok("[]"),
        ok("[]"),
        answer("401 Unauthorized", DATE, ""),
        answer("401 Unauthorized", DATE, r#"{"error":"unknown agent"}"#),
        // Without a date there is nothing to correct.
        answer("401 Unauthorized", "", ""),
    ]);
    run(async {
        let api = api(&server);
        api.poll().await.expect("polled");
        api.poll().await.expect("polled with the corrected clock");
        let error = api.poll().await.expect_err("refused twice");
        assert_eq!(error.status, Some(401));
        assert!(error.why.contains("unknown agent"), "{error}");
        let outcome = api.report("1", &report()).await;
        assert!(
            matches!(outcome, ReportOutcome::Retry { .. }),
            "{outcome:?}"
        );
    });
    let received = server.received();
    assert_eq!(received.len(), 6);
    let timestamp = |at: usize| -> u64 {
        let text = received[at].header("x-timestamp").expect("header");
        text.parse().expect("a number")
    };
    assert!(timestamp(0) > DATE_UNIX + 300, "the test runs after 2024");
    assert!((DATE_UNIX..DATE_UNIX + 60).contains(&timestamp(1)));
    assert!((DATE_UNIX..DATE_UNIX + 60).contains(&timestamp(2)));
    assert_ne!(received[0].header("x-nonce"), received[1].header("x-nonce"));
}

#[test]
fn each_answer_to_a_report_has_its_outcome() {
    let check = |status: &str, headers: &str, expected: &str| {
        let server = Scripted::new([answer(status, headers, r#"{"error":"because"}"#)]);
        let outcome = run(async { api(&server).report("1", &report()).await });
        let described = match outcome {
            ReportOutcome::Done => "done".to_string(),
            ReportOutcome::TooLarge => "too large".to_string(),
            ReportOutcome::Refused { status, why } => {
                assert!(why.contains("because"), "{why}");
                format!("refused {status}")
            }
            ReportOutcome::Retry { after, why } => {
                assert!(why.contains("because") || why.contains("redirect"), "{why}");
                format!("retry {:?}", after.map(|after| after.as_secs()))
            }
        };
        assert_eq!(described, expected, "{status}");
    };
    check("200 OK", "", "done");
    check("204 No Content", "", "done");
    check("413 Content Too Large", "", "too large");
    check("400 Bad Request", "", "refused 400");
    check("404 Not Found", "", "refused 404");
    check("409 Conflict", "Retry-After: 3\r\n", "refused 409");
    check("408 Request Timeout", "", "retry None");
    check(
        "429 Too Many Requests",
        "Retry-After: 17\r\n",
        "retry Some(17)",
    );
    check(
        "503 Service Unavailable",
        "Retry-After: 99999\r\n",
        "retry Some(3600)",
    );
    check("500 Internal Server Error", "", "retry None");
    check("307 Temporary Redirect", "Location: /x\r\n", "retry None");
}

#[test]
fn registration_tells_a_refusal_from_a_failure() {
    let check = |step: Step, expected: Result<&str, &str>| {
        let server = Scripted::new([step]);
        let result = run(async { api(&server).register(&register_request()).await });
        match (&result, expected) {
            (Ok(response), Ok(id)) => assert_eq!(response.id, id),
            (Err(RegisterError::Refused(error)), Err("refused")) => {
                assert!(error.why.contains("HOSTLINK_TOKEN_ID"), "{error}");
            }
            (Err(RegisterError::Failed(_)), Err("failed")) => {}
            _ => panic!("expected {expected:?}, got {result:?}"),
        }
        let received = server.received();
        assert!(received[0].header("x-signature").is_none());
        assert!(!format!("{result:?}").contains("secret-token"));
    };
    check(ok(r#"{"id":"agent-9","new":1}"#), Ok("agent-9"));
    check(ok(r#"{"id":""}"#), Err("failed"));
    check(ok("<html>"), Err("failed"));
    check(
        answer("401 Unauthorized", DATE, r#"{"error":"bad token"}"#),
        Err("refused"),
    );
    check(answer("429 Too Many Requests", "", ""), Err("failed"));
    check(answer("502 Bad Gateway", "", ""), Err("failed"));
}

#[test]
fn an_empty_answer_to_a_heartbeat_is_no_failure() {
    let server = Scripted::new([answer("204 No Content", "", ""), ok("")]);
    run(async {
        let api = api(&server);
        assert_eq!(api.heartbeat().await, Ok(Vec::new()));
        assert_eq!(api.heartbeat().await, Ok(Vec::new()));
    });
}

#[test]
fn calls_before_the_registration_fail_without_a_request() {
    let server = Scripted::new([]);
    let settings = testing::settings(&server.base());
    let clock = ServerClock::new(&settings.control_plane);
    let api = Api::new(Rc::new(Dialer::new(settings)), clock);
    let error = run(async { api.poll().await }).expect_err("no signer");
    assert!(error.why.contains("not registered"), "{error}");
}
