//! WebSocket sessions: handshake, delivery, output, gaps, repeats, finals, restarts.

use async_tungstenite::tungstenite::Message;
use futures_lite::StreamExt;

use super::support::{Device, Directory, Running, chunk_id, hello, ids, run};
use crate::gateway::Options;
use crate::gateway::operator_client::Counters;
use crate::ids::{FinalStatus, Ids, Stream};
use crate::wire::agent_message::{
    AgentMessage, FinalPayload, ReceivedTask, RunningTask, UnackedFinal, UnackedOutput,
};
use crate::wire::server_message::{OUTPUT_SEQUENCE_GAP, OutputReplay, ServerError, ServerMessage};

const OUT: Stream = Stream::Stdout;
const ERR: Stream = Stream::Stderr;

async fn counters(gateway: &Running) -> Counters {
    gateway.operator().agents().await.unwrap()[0].counters
}

fn expect_error(message: ServerMessage) -> ServerError {
    match message {
        ServerMessage::Error(error) => error,
        other => panic!("no error: {other:?}"),
    }
}

#[test]
fn a_task_goes_from_delivery_to_its_final() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let (mut wire, ack) = device.connect(&hello()).await;
        assert!(ack.delivery_enabled && ack.grants("cancel") && ack.has_directives());

        let task = gateway.submit("the command").await;
        let offer = wire.receive_delivery().await;
        let attempt = ids(&task);
        assert_eq!(
            (&offer.ids, offer.command.as_str()),
            (&attempt, "the command")
        );
        wire.send("r", AgentMessage::Received(&attempt)).await;
        assert_eq!(wire.receive_ack("r").await, None);
        wire.send("s", AgentMessage::Started(&attempt)).await;
        wire.receive_ack("s").await;
        let info = gateway.operator().task(&task.task_id).await.unwrap();
        assert_eq!(info.status, "running");
        wire.send("l", AgentMessage::LeaseHeartbeat(&attempt)).await;
        wire.output(&attempt, OUT, 1, b"out\n").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 1)).await, Some(1));
        wire.output(&attempt, ERR, 1, b"\xff\x00").await;
        assert_eq!(wire.receive_ack(&chunk_id(ERR, 1)).await, Some(1));
        wire.end(&attempt, FinalStatus::Failed, 7).await;
        wire.receive_ack("final-1").await;

        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let operator = gateway.operator();
        let code = operator
            .follow(&task.task_id, &mut stdout, &mut stderr)
            .await;
        assert_eq!(code, Ok(7));
        assert_eq!(
            (stdout.as_slice(), stderr.as_slice()),
            (&b"out\n"[..], &b"\xff\x00"[..])
        );
        let expected = Counters {
            sessions: 1,
            chunks: 2,
            bytes: 6,
            finals: 1,
            ..Counters::default()
        };
        assert_eq!(counters(&gateway).await, expected);
        gateway.stop().await;
        // The gateway said good-bye.
        match wire.socket.next().await {
            Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), 1001),
            other => panic!("no close frame: {other:?}"),
        }
    });
}

#[test]
fn gaps_repeats_and_flagged_jumps() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let task = gateway.submit("x").await;
        let attempt = ids(&task);
        let (mut wire, _) = device.connect(&hello()).await;
        wire.receive_delivery().await;
        wire.output(&attempt, OUT, 1, b"one").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 1)).await, Some(1));

        wire.output(&attempt, OUT, 3, b"three").await;
        let error = expect_error(wire.receive().await);
        assert_eq!(error.code, OUTPUT_SEQUENCE_GAP);
        assert!(error.retryable);
        assert_eq!(error.related_message_id, Some(chunk_id(OUT, 3)));
        assert_eq!(error.highest_accepted_sequence, Some(1));

        wire.output(&attempt, OUT, 1, b"one").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 1)).await, Some(1));
        wire.output(&attempt, OUT, 1, b"ONE").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 1)).await, Some(1));
        wire.chunk(&attempt, OUT, 5, b"five", true).await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 5)).await, Some(5));
        wire.output(&attempt, OUT, 6, b"six").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 6)).await, Some(6));

        wire.end(&attempt, FinalStatus::Completed, 0).await;
        wire.receive_ack("final-1").await;
        wire.end(&attempt, FinalStatus::Completed, 0).await;
        wire.receive_ack("final-1").await;
        wire.end(&attempt, FinalStatus::Failed, 1).await;
        wire.receive_ack("final-1").await;
        let expected = Counters {
            sessions: 1,
            chunks: 3,
            bytes: 10,
            replayed: 0,
            duplicates: 2,
            changed_repeats: 2,
            gaps: 1,
            truncated_jumps: 1,
            finals: 1,
        };
        assert_eq!(counters(&gateway).await, expected);

        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let operator = gateway.operator();
        let code = operator
            .follow(&task.task_id, &mut stdout, &mut stderr)
            .await;
        assert_eq!((code, stdout.as_slice()), (Ok(0), &b"onefivesix"[..]));
        assert!(
            String::from_utf8(stderr)
                .unwrap()
                .contains("lost at the agent")
        );
        gateway.stop().await;
    });
}

#[test]
fn a_burst_is_acknowledged_up_to_its_last_chunk() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let task = gateway.submit("x").await;
        let attempt = ids(&task);
        let (mut wire, _) = device.connect(&hello()).await;
        wire.receive_delivery().await;
        let chunk = vec![b'x'; 16 * 1024];
        for sequence in 1..=100 {
            wire.output(&attempt, OUT, sequence, &chunk).await;
        }
        let mut highest = 0;
        while highest < 100 {
            match wire.receive().await {
                ServerMessage::Ack(ack) => {
                    let acked = ack.highest_output_sequence.unwrap();
                    assert!(acked > highest, "{ack:?}");
                    assert_eq!(ack.acked_message_id, chunk_id(OUT, acked));
                    highest = acked;
                }
                other => panic!("no ack: {other:?}"),
            }
        }
        let info = gateway.operator().task(&task.task_id).await.unwrap();
        assert_eq!(info.stdout.bytes, 100 * 16 * 1024);
        gateway.stop().await;
    });
}

#[test]
fn what_will_never_be_taken_is_refused_and_the_session_goes_on() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let task = gateway.submit("x").await;
        let attempt = ids(&task);
        let (mut wire, _) = device.connect(&hello()).await;
        wire.receive_delivery().await;
        let unknown = Ids::new(&task.task_id, "other-attempt").unwrap();
        for bad in [unknown, Ids::new("nothing", "a").unwrap()] {
            wire.output(&bad, OUT, 1, b"x").await;
            let error = expect_error(wire.receive().await);
            assert_eq!(
                (error.code.as_str(), error.retryable),
                ("unknown_attempt", false)
            );
            assert_eq!(error.related_message_id, Some(chunk_id(OUT, 1)));
        }
        for (payload, code) in [
            (
                r#"{"stream":"stdout","data":"abc","byte_count":4}"#,
                "invalid_output",
            ),
            (
                r#"{"stream":"stdout","data":"%","byte_count":1,"encoding":"base64"}"#,
                "invalid_output",
            ),
            (
                r#"{"stream":"stdin","data":"a","byte_count":1}"#,
                "invalid_message",
            ),
        ] {
            let frame = format!(
                r#"{{"protocol_version":1,"message_id":"bad","type":"task.output","agent_id":"{}",
                "task_id":"{}","execution_attempt_id":"{}","sequence":1,"sent_at":"",
                "payload":{payload}}}"#,
                device.id, task.task_id, task.execution_attempt_id
            );
            wire.socket.send(Message::text(frame)).await.unwrap();
            let error = expect_error(wire.receive().await);
            assert_eq!(
                (error.code.as_str(), error.retryable),
                (code, false),
                "{payload}"
            );
        }
        wire.output(&attempt, OUT, 1, b"good").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 1)).await, Some(1));

        // Another agent may not write into it.
        let other = Device::register(&gateway, "g").await;
        let (mut foreign, _) = other.connect(&hello()).await;
        foreign.output(&attempt, OUT, 2, b"x").await;
        let error = expect_error(foreign.receive().await);
        assert_eq!(error.code, "unknown_attempt");

        // What is no envelope ends the session, with the reason.
        wire.socket.send(Message::text("nonsense")).await.unwrap();
        let error = expect_error(wire.receive().await);
        assert_eq!((error.retryable, error.related_message_id), (false, None));
        assert!(matches!(
            wire.socket.next().await,
            Some(Ok(Message::Close(_)))
        ));
        gateway.stop().await;
    });
}

#[test]
fn a_restart_keeps_everything_and_the_hello_is_answered_from_it() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let running = gateway.submit("running").await;
        let ended = gateway.submit("ended").await;
        let pending = gateway.submit("pending").await;
        let (mut wire, _) = device.connect(&hello()).await;
        for _ in 0..3 {
            wire.receive_delivery().await;
        }
        let attempt = ids(&running);
        for sequence in 1..=3 {
            wire.output(&attempt, OUT, sequence, b"chunk").await;
            wire.receive_ack(&chunk_id(OUT, sequence)).await;
        }
        wire.output(&ids(&ended), ERR, 1, b"chunk").await;
        wire.receive_ack(&chunk_id(ERR, 1)).await;
        wire.end(&ids(&ended), FinalStatus::Completed, 0).await;
        wire.receive_ack("final-1").await;
        let token = gateway.token.clone();
        gateway.stop().await;

        let gateway = Running::plain(&executor, &directory).await;
        assert_eq!(gateway.token, token);
        let device = Device {
            address: gateway.address,
            ..device
        };
        let operator = gateway.operator();
        let info = operator.task(&running.task_id).await.unwrap();
        assert_eq!(
            (info.status.as_str(), info.stdout.highest_sequence),
            ("running", 3)
        );
        let info = operator.task(&ended.task_id).await.unwrap();
        assert_eq!((info.status.as_str(), info.stderr.bytes), ("completed", 5));
        assert_eq!(info.command, "ended");

        let stream = |task: &crate::gateway::operator_client::Submitted, stream, first, last| {
            UnackedOutput {
                task_id: task.task_id.clone(),
                execution_attempt_id: task.execution_attempt_id.clone(),
                stream,
                first_sequence: first,
                last_sequence: last,
                truncated_locally: false,
            }
        };
        let mut lost = ended.clone();
        lost.task_id = "never-known".into();
        let mut snapshot = hello();
        snapshot.running_task = Some(RunningTask {
            task_id: running.task_id.clone(),
            execution_attempt_id: running.execution_attempt_id.clone(),
            started_at: String::new(),
            last_output_sequence: crate::wire::agent_message::LastSequences {
                stdout: 5,
                stderr: 2,
            },
        });
        snapshot.unacked_output = vec![
            stream(&running, OUT, 2, 5),
            stream(&running, ERR, 1, 2),
            stream(&lost, OUT, 1, 1),
        ];
        snapshot.unacked_finals = [("held", &ended), ("new", &running)]
            .map(|(message_id, task)| UnackedFinal {
                message_id: message_id.into(),
                task_id: task.task_id.clone(),
                execution_attempt_id: task.execution_attempt_id.clone(),
                result: FinalPayload {
                    status: FinalStatus::Completed,
                    exit_code: 0,
                    output: None,
                    error: None,
                    output_truncated: false,
                    error_truncated: false,
                    usage: None,
                },
            })
            .to_vec();
        let (mut wire, ack) = device.connect(&snapshot).await;
        assert_eq!(
            ack.acknowledged_final_message_ids,
            Some(vec!["held".into()])
        );
        let replay = |stream, next_sequence| OutputReplay {
            task_id: running.task_id.clone(),
            execution_attempt_id: running.execution_attempt_id.clone(),
            stream,
            next_sequence,
        };
        assert_eq!(
            ack.output_replay,
            Some(vec![replay(OUT, 4), replay(ERR, 1)])
        );
        let discarded = ack.discarded_attempts.unwrap();
        assert_eq!(discarded.len(), 1);
        assert_eq!(discarded[0].task_id, "never-known");
        // The one that never reached the device is delivered again, and it alone.
        assert_eq!(wire.receive_delivery().await.ids, ids(&pending));
        wire.output(&attempt, OUT, 4, b"chunk").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 4)).await, Some(4));
        wire.output(&attempt, OUT, 2, b"other").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 2)).await, Some(4));
        let counters = counters(&gateway).await;
        assert_eq!((counters.changed_repeats, counters.sessions), (1, 1));
        gateway.stop().await;
    });
}

#[test]
fn a_torn_journal_is_cut_and_goes_on() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let task = gateway.submit("x").await;
        let attempt = ids(&task);
        let (mut wire, _) = device.connect(&hello()).await;
        wire.receive_delivery().await;
        wire.output(&attempt, OUT, 1, b"one").await;
        wire.receive_ack(&chunk_id(OUT, 1)).await;
        gateway.stop().await;
        let journal = directory
            .0
            .join(format!("output/{}.journal", attempt.key()));
        let mut bytes = std::fs::read(&journal).unwrap();
        bytes.extend_from_slice(&[5; 40]);
        std::fs::write(&journal, &bytes).unwrap();

        let gateway = Running::plain(&executor, &directory).await;
        assert_eq!(std::fs::read(&journal).unwrap().len(), bytes.len() - 40);
        let device = Device {
            address: gateway.address,
            ..device
        };
        let (mut wire, _) = device.connect(&hello()).await;
        wire.output(&attempt, OUT, 2, b"two").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 2)).await, Some(2));
        gateway.stop().await;
        let gateway = Running::plain(&executor, &directory).await;
        let info = gateway.operator().task(&task.task_id).await.unwrap();
        assert_eq!((info.stdout.highest_sequence, info.stdout.bytes), (2, 6));
        gateway.stop().await;
    });
}

#[test]
fn options_decide_what_the_hello_ack_holds() {
    run(async |executor| {
        let directory = Directory::new();
        let options = Options {
            delivery_enabled: false,
            directives: false,
            grant: vec!["lease".into()],
            lease_interval_seconds: Some(4),
            ..Options::default()
        };
        let gateway = Running::with(&executor, &directory, options).await;
        let device = Device::register(&gateway, "f").await;
        let (_wire, ack) = device.connect(&hello()).await;
        assert!(!ack.delivery_enabled && !ack.has_directives());
        assert_eq!(ack.extensions, Some(vec!["lease".into()]));
        assert_eq!(ack.lease_interval_seconds, Some(4));
        let mut old = hello();
        old.capabilities.extensions.clear();
        let (_wire, ack) = device.connect(&old).await;
        assert_eq!((ack.extensions, ack.lease_interval_seconds), (None, None));
        gateway.stop().await;
    });
}

#[test]
fn cancelling_reaches_the_device_or_ends_the_attempt_here() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let operator = gateway.operator();
        // Never offered: nobody can run it.
        let unseen = gateway.submit("unseen").await;
        operator.cancel(&unseen.task_id, Some("why")).await.unwrap();
        let info = operator.task(&unseen.task_id).await.unwrap();
        assert_eq!(info.status, "interrupted");

        let (mut wire, _) = device.connect(&hello()).await;
        let task = gateway.submit("seen").await;
        assert_eq!(wire.receive_delivery().await.command, "seen");
        operator.cancel(&task.task_id, Some("why")).await.unwrap();
        let expected = ServerMessage::Cancel {
            ids: ids(&task),
            reason: Some("why".into()),
        };
        assert_eq!(wire.receive().await, expected);
        wire.end(&ids(&task), FinalStatus::Interrupted, -1).await;
        wire.receive_ack("final-1").await;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = operator
            .follow(&task.task_id, &mut stdout, &mut stderr)
            .await;
        assert_eq!(code, Ok(1));
        assert!(!stderr.is_empty());

        // A device without the extension that has not started it gets it discarded.
        let task = gateway.submit("received").await;
        assert_eq!(wire.receive_delivery().await.command, "received");
        wire.send("r", AgentMessage::Received(&ids(&task))).await;
        wire.receive_ack("r").await;
        let mut old = hello();
        old.capabilities.extensions.clear();
        old.received_not_started = vec![ReceivedTask {
            task_id: task.task_id.clone(),
            execution_attempt_id: task.execution_attempt_id.clone(),
            received_at: String::new(),
        }];
        operator.cancel(&task.task_id, None).await.unwrap();
        let (mut wire, ack) = device.connect(&old).await;
        assert_eq!(ack.discarded_attempts.unwrap().len(), 1);
        let info = operator.task(&task.task_id).await.unwrap();
        assert_eq!(info.status, "interrupted");

        // The delivery was lost on its way: the next hello shows it, and the attempt is over.
        let task = gateway.submit("lost").await;
        assert_eq!(wire.receive_delivery().await.command, "lost");
        operator.cancel(&task.task_id, None).await.unwrap();
        let info = operator.task(&task.task_id).await.unwrap();
        assert_eq!(
            (info.status.as_str(), info.cancel_requested),
            ("pending", true)
        );
        old.received_not_started.clear();
        let _session = device.connect(&old).await;
        let info = operator.task(&task.task_id).await.unwrap();
        assert_eq!(info.status, "interrupted");
        gateway.stop().await;
    });
}

#[test]
fn what_could_not_be_stored_is_not_acknowledged_and_is_taken_later() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let task = gateway.submit("x").await;
        let attempt = ids(&task);
        gateway.stop().await;

        let gateway = Running::plain(&executor, &directory).await;
        let device = Device {
            address: gateway.address,
            ..device
        };
        let journal = directory
            .0
            .join(format!("output/{}.journal", attempt.key()));
        let away = directory.0.join("away");
        std::fs::rename(&journal, &away).unwrap();
        let (mut wire, _) = device.connect(&hello()).await;
        wire.receive_delivery().await;
        wire.output(&attempt, OUT, 1, b"one").await;
        match wire.socket.next().await {
            Some(Ok(Message::Close(Some(frame)))) => assert_eq!(u16::from(frame.code), 1013),
            other => panic!("no close frame: {other:?}"),
        }

        std::fs::rename(&away, &journal).unwrap();
        let (mut wire, _) = device.connect(&hello()).await;
        wire.output(&attempt, OUT, 1, b"one").await;
        assert_eq!(wire.receive_ack(&chunk_id(OUT, 1)).await, Some(1));
        gateway.stop().await;
        let gateway = Running::plain(&executor, &directory).await;
        let info = gateway.operator().task(&task.task_id).await.unwrap();
        assert_eq!((info.stdout.highest_sequence, info.stdout.bytes), (1, 3));
        gateway.stop().await;
    });
}

#[test]
fn the_most_urgent_and_then_the_oldest_task_comes_first() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        for (command, priority) in [("a", 0), ("b", 0), ("c", 0), ("d", 5), ("e", 0)] {
            let submission = crate::gateway::operator_client::Submission {
                command: command.into(),
                priority,
                ..Default::default()
            };
            let operator = gateway.operator();
            operator.submit_detached(&submission).await.unwrap();
        }
        let (mut wire, _) = device.connect(&hello()).await;
        for expected in ["d", "a", "b", "c", "e"] {
            assert_eq!(wire.receive_delivery().await.command, expected);
        }
        gateway.stop().await;
    });
}
