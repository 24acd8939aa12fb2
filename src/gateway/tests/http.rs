//! Registration, signatures, poll, report and heartbeat.

use super::support::{Device, Directory, Running, registration, request, run};
use crate::gateway::Options;
use crate::wire::http::{
    REGISTER_PATH, RegisterResponse, TASKS_PATH, decode_heartbeat, decode_tasks, heartbeat_path,
    report_path,
};

#[test]
fn a_device_registers_with_the_token_and_keeps_its_id() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let register = async |request_body| {
            let body = serde_json::to_vec(&request_body).unwrap();
            request(gateway.address, "POST", REGISTER_PATH, &[], &body).await
        };
        let wrong = ("x".to_owned(), gateway.token.1.clone());
        for body in [
            registration("f-1", &wrong),
            registration("f-1", &(gateway.token.0.clone(), String::new())),
        ] {
            let answer = register(body).await;
            assert_eq!(answer.status, 401);
            assert!(answer.body.starts_with(b"{\"error\":"));
            assert!(answer.head.contains("\ndate: "), "{}", answer.head);
        }
        let mut no_key = registration("f-1", &gateway.token);
        no_key.public_key = "AAAA".into();
        assert_eq!(register(no_key).await.status, 400);

        let mut id_of = Vec::new();
        for fingerprint in ["f-1", "f-2", "f-1"] {
            let answer = register(registration(fingerprint, &gateway.token)).await;
            assert_eq!(answer.status, 200);
            let response: RegisterResponse = serde_json::from_slice(&answer.body).unwrap();
            assert_eq!(response.fingerprint.as_deref(), Some(fingerprint));
            id_of.push(response.id);
        }
        assert_eq!(id_of[0], id_of[2]);
        assert_ne!(id_of[0], id_of[1]);
        gateway.stop().await;
    });
}

#[test]
fn only_fresh_and_timely_signatures_of_the_agent_are_taken() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let poll = async |headers: &[(String, String)]| {
            request(gateway.address, "GET", TASKS_PATH, headers, b"").await
        };
        let good = device.signature(0);
        let answer = poll(&good).await;
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"[]"[..]));
        let replayed = poll(&good).await;
        assert_eq!(replayed.status, 401);
        assert!(String::from_utf8_lossy(&replayed.body).contains("nonce"));

        assert_eq!(poll(&device.signature(-290)).await.status, 200);
        for offset in [7200, -7200, 310, -310] {
            let answer = poll(&device.signature(offset)).await;
            assert_eq!(answer.status, 401, "{offset}");
            assert!(answer.head.contains("\ndate: "), "{}", answer.head);
        }
        assert_eq!(poll(&[]).await.status, 401);
        // What is signed is all three fields.
        for changed in 1..3 {
            let mut headers = device.signature(0);
            headers[changed].1 = device.signature(-1)[changed].1.clone();
            assert_eq!(poll(&headers).await.status, 401, "{changed}");
        }
        // The upgrade is signed like every other request.
        assert_eq!(device.upgrade(good).await.err(), Some(401));
        assert_eq!(device.upgrade(device.signature(400)).await.err(), Some(401));
        assert_eq!(device.upgrade(vec![]).await.err(), Some(401));
        assert!(device.upgrade(device.signature(0)).await.is_ok());
        let mut headers = device.signature(0);
        headers[0].1 = "nobody".into();
        assert_eq!(poll(&headers).await.status, 401);
        gateway.stop().await;
    });
}

#[test]
fn tasks_are_offered_until_they_are_reported() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let other = Device::register(&gateway, "g").await;
        let submission = crate::gateway::operator_client::Submission {
            agent_id: Some(device.id.clone()),
            command: "echo \"\u{e9}\"".into(),
            priority: 3,
            timeout_seconds: Some(9),
        };
        let task = gateway
            .operator()
            .submit_detached(&submission)
            .await
            .unwrap();
        for _ in 0..2 {
            let polled = decode_tasks(&device.request("GET", TASKS_PATH, b"").await.body).unwrap();
            let offer = polled[0].as_ref().unwrap();
            assert_eq!(offer.ids, super::support::ids(&task));
            assert_eq!(offer.command, submission.command);
            assert_eq!((offer.priority, offer.timeout_seconds), (3, Some(9)));
        }
        let path = heartbeat_path(&device.id);
        let beat = decode_heartbeat(&device.request("POST", &path, b"").await.body).unwrap();
        assert_eq!(beat.len(), 1);
        assert_eq!(other.request("POST", &path, b"").await.status, 403);
        let polled = decode_tasks(&other.request("GET", TASKS_PATH, b"").await.body).unwrap();
        assert!(polled.is_empty());

        let path = report_path(&task.task_id);
        let report = br#"{"status":"failed","output":"out","error":"err","exit_code":3}"#;
        assert_eq!(other.request("PUT", &path, report).await.status, 404);
        let interrupted = br#"{"status":"interrupted","exit_code":-1}"#;
        assert_eq!(device.request("PUT", &path, interrupted).await.status, 400);
        // The answer to a report may be lost: it may come again.
        for _ in 0..2 {
            assert_eq!(device.request("PUT", &path, report).await.status, 200);
        }
        let polled = device.request("GET", TASKS_PATH, b"").await;
        assert_eq!(polled.body, b"[]");
        let info = gateway.operator().task(&task.task_id).await.unwrap();
        assert_eq!(info.status, "failed");
        let result = info.result.unwrap();
        assert_eq!((result.exit_code, result.via.as_str()), (3, "report"));
        let nothing = report_path("nothing");
        assert_eq!(device.request("PUT", &nothing, report).await.status, 404);

        // What was never streamed is printed from the report.
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = gateway
            .operator()
            .follow(&task.task_id, &mut stdout, &mut stderr)
            .await;
        assert_eq!(
            (code, stdout, stderr),
            (Ok(3), b"out".to_vec(), b"err".to_vec())
        );
        gateway.stop().await;
    });
}

#[test]
fn an_old_control_plane_has_empty_attempt_ids_and_no_websocket() {
    run(async |executor| {
        let directory = Directory::new();
        let options = Options {
            legacy_attempts: true,
            poll_only: true,
            ..Options::default()
        };
        let gateway = Running::with(&executor, &directory, options).await;
        let device = Device::register(&gateway, "f").await;
        let upgrade = device
            .request("GET", crate::wire::http::WEBSOCKET_PATH, b"")
            .await;
        assert_eq!(upgrade.status, 404);
        let task = gateway.submit("true").await;
        assert_eq!(task.execution_attempt_id, "");
        let polled = decode_tasks(&device.request("GET", TASKS_PATH, b"").await.body).unwrap();
        assert!(!polled[0].as_ref().unwrap().ids.has_result_channel());
        let report = br#"{"status":"completed","output":"","error":"","exit_code":0}"#;
        let path = report_path(&task.task_id);
        assert_eq!(device.request("PUT", &path, report).await.status, 200);
        let info = gateway.operator().task(&task.task_id).await.unwrap();
        assert_eq!(info.status, "completed");
        gateway.stop().await;
    });
}
