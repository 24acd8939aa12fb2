//! The operator API and its client.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_lite::{AsyncWrite, StreamExt, future};

use super::support::{Device, Directory, Running, chunk_id, hello, ids, request, run};
use crate::gateway::operator_client::{OperatorClient, Submission};
use crate::ids::{FinalStatus, Stream};

const OUT: Stream = Stream::Stdout;

/// Passes what is written on to the test.
struct Tap(async_channel::Sender<Vec<u8>>);

impl AsyncWrite for Tap {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.0.try_send(bytes.to_vec()).expect("the test reads");
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn submit_prints_live_and_survives_a_restart_of_the_gateway() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let (mut wire, _) = device.connect(&hello()).await;
        let (tap, printed) = async_channel::bounded(16);
        let operator = gateway.operator();
        let submit = executor.spawn(async move {
            let submission = Submission {
                command: "x".into(),
                ..Submission::default()
            };
            let mut stderr = Vec::new();
            let code = operator
                .submit(&submission, &mut Tap(tap), &mut stderr)
                .await;
            (code, stderr)
        });
        let attempt = wire.receive_delivery().await.ids;
        for (sequence, line) in [(1, "one\n"), (2, "two\n")] {
            wire.output(&attempt, OUT, sequence, line.as_bytes()).await;
            // Printed while the task runs.
            assert_eq!(printed.recv().await.unwrap(), line.as_bytes());
        }
        let address = gateway.address;
        gateway.stop().await;
        drop(wire);

        let gateway = Running::start(&executor, &directory, |s| s.listen = address).await;
        let (mut wire, _) = device.connect(&hello()).await;
        wire.output(&attempt, OUT, 3, b"three\n").await;
        // Behind the last line, not from the beginning.
        assert_eq!(printed.recv().await.unwrap(), b"three\n");
        wire.end(&attempt, FinalStatus::Failed, 42).await;
        let (code, stderr) = submit.await;
        assert_eq!((code, stderr), (Ok(42), vec![]));
        gateway.stop().await;
    });
}

#[test]
fn a_slow_reader_does_not_hold_up_the_agent() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let task = gateway.submit("x").await;
        let (mut wire, _) = device.connect(&hello()).await;
        wire.receive_delivery().await;
        // Asks for the stream and never reads it.
        let mut reader = smol::net::TcpStream::connect(gateway.address)
            .await
            .unwrap();
        let head = format!(
            "GET /operator/v1/tasks/{}/stream HTTP/1.1\r\nHost: x\r\n\r\n",
            task.task_id
        );
        futures_lite::AsyncWriteExt::write_all(&mut reader, head.as_bytes())
            .await
            .unwrap();
        let chunk = vec![b'x'; 16 * 1024];
        for sequence in 1..=1024 {
            wire.output(&ids(&task), OUT, sequence, &chunk).await;
            if sequence % 8 == 0 {
                while wire
                    .receive_any_ack()
                    .await
                    .is_none_or(|highest| highest < sequence)
                {}
            }
        }
        let info = gateway.operator().task(&task.task_id).await.unwrap();
        assert_eq!(info.stdout.bytes, 16 << 20);
        drop(reader);
        gateway.stop().await;
    });
}

#[test]
fn disconnect_cuts_the_connection_without_a_close_frame() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let operator = gateway.operator();
        assert_eq!(operator.disconnect(&device.id, 0).await, Ok(false));
        assert!(operator.disconnect("nobody", 0).await.is_err());
        let (mut wire, _) = device.connect(&hello()).await;
        let agents = operator.agents().await.unwrap();
        assert!(agents[0].connected_since.is_some());
        assert_eq!(agents[0].hostname, "test-host");
        assert_eq!(operator.disconnect(&device.id, 0).await, Ok(true));
        assert!(!matches!(wire.socket.next().await, Some(Ok(_))));
        let agents = operator.agents().await.unwrap();
        assert_eq!(agents[0].connected_since, None);

        // And a second session replaces the first.
        let (mut first, _) = device.connect(&hello()).await;
        let (mut second, _) = device.connect(&hello()).await;
        assert!(!matches!(first.socket.next().await, Some(Ok(_))));
        assert!(
            future::poll_once(second.socket.next()).await.is_none(),
            "the second session goes on"
        );
        let agents = operator.agents().await.unwrap();
        assert!(agents[0].connected_since.is_some());
        assert_eq!(agents[0].counters.sessions, 3);
        gateway.stop().await;
    });
}

#[test]
fn submissions_are_checked() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let operator = gateway.operator();
        let submit = async |agent_id: Option<&str>, command: String| {
            let submission = Submission {
                agent_id: agent_id.map(Into::into),
                command,
                ..Submission::default()
            };
            operator.submit_detached(&submission).await
        };
        let check = async |agent_id, command: String, expected: &str| {
            let error = submit(agent_id, command).await.unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check(None, "true".into(), "409").await;
        let device = Device::register(&gateway, "f").await;
        check(None, String::new(), "400").await;
        check(Some("nobody"), "true".into(), "404").await;
        check(None, "x".repeat(1 << 20), "413").await;
        check(None, "\u{1}".repeat(200 * 1024), "413").await;
        submit(None, "true".into()).await.unwrap();
        Device::register(&gateway, "g").await;
        check(None, "true".into(), "409").await;
        submit(Some(&device.id), "true".into()).await.unwrap();
        assert!(operator.task("nothing").await.is_err());
        gateway.stop().await;
    });
}

#[test]
fn an_operator_token_is_asked_for_and_browsers_are_refused() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let path = "/operator/v1/agents";
        let browser = [("Origin".to_owned(), "http://x".to_owned())];
        let answer = request(gateway.address, "GET", path, &browser, b"").await;
        assert_eq!(answer.status, 403);
        gateway.stop().await;

        let token = Some("secret".to_owned());
        let gateway = Running::start(&executor, &directory, |settings| {
            settings.operator_token = token.clone();
        })
        .await;
        assert!(gateway.operator().agents().await.is_err());
        let url = format!("http://{}", gateway.address);
        let operator = OperatorClient::new(&url, token).unwrap();
        assert_eq!(operator.agents().await, Ok(vec![]));
        gateway.stop().await;
    });
}

#[test]
fn tls_serves_both_sides() {
    run(async |executor| {
        let directory = Directory::new();
        let (certificate, key) = self_signed(&directory);
        let gateway = Running::start(&executor, &directory, |settings| {
            settings.tls = Some((certificate.clone(), key));
        })
        .await;
        let url = format!("https://localhost:{}", gateway.address.port());
        let operator = OperatorClient::new(&url, None).unwrap();
        assert!(
            operator.agents().await.is_err(),
            "the certificate is unknown"
        );
        let pem = std::fs::read(&certificate).unwrap();
        let operator = operator.trust(&pem).unwrap();
        assert_eq!(operator.agents().await, Ok(vec![]));
        gateway.stop().await;
    });
}

/// A certificate for `localhost` and its PKCS#8 key.
fn self_signed(directory: &Directory) -> (std::path::PathBuf, std::path::PathBuf) {
    use openssl::asn1::Asn1Time;
    use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
    use openssl::x509::{X509, X509NameBuilder};
    let key = super::support::device_key();
    let mut name = X509NameBuilder::new().unwrap();
    name.append_entry_by_text("CN", "localhost").unwrap();
    let name = name.build();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder.set_subject_name(&name).unwrap();
    builder.set_issuer_name(&name).unwrap();
    builder.set_pubkey(key).unwrap();
    let (from, to) = (Asn1Time::days_from_now(0), Asn1Time::days_from_now(2));
    builder.set_not_before(&from.unwrap()).unwrap();
    builder.set_not_after(&to.unwrap()).unwrap();
    let ca = BasicConstraints::new().critical().ca().build().unwrap();
    builder.append_extension(ca).unwrap();
    let names = SubjectAlternativeName::new()
        .dns("localhost")
        .build(&builder.x509v3_context(None, None))
        .unwrap();
    builder.append_extension(names).unwrap();
    let digest = openssl::hash::MessageDigest::sha256();
    builder.sign(key, digest).unwrap();
    let paths = (directory.0.join("cert.pem"), directory.0.join("key.pem"));
    std::fs::write(&paths.0, builder.build().to_pem().unwrap()).unwrap();
    std::fs::write(&paths.1, key.private_key_to_pem_pkcs8().unwrap()).unwrap();
    paths
}

#[test]
fn two_readers_see_the_same_stream() {
    run(async |executor| {
        let directory = Directory::new();
        let gateway = Running::plain(&executor, &directory).await;
        let device = Device::register(&gateway, "f").await;
        let task = gateway.submit("x").await;
        let attempt = ids(&task);
        let (mut wire, _) = device.connect(&hello()).await;
        wire.receive_delivery().await;
        let follow = || {
            let (operator, task_id) = (gateway.operator(), task.task_id.clone());
            executor.spawn(async move {
                let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
                let code = operator.follow(&task_id, &mut stdout, &mut stderr).await;
                (code, stdout)
            })
        };
        let early = follow();
        let mut expected = Vec::new();
        for sequence in 1..=20u8 {
            let chunk = vec![sequence; 10_000];
            wire.output(&attempt, OUT, sequence.into(), &chunk).await;
            wire.receive_ack(&chunk_id(OUT, sequence.into())).await;
            expected.extend_from_slice(&chunk);
        }
        let late = follow();
        wire.end(&attempt, FinalStatus::Completed, 0).await;
        assert_eq!(early.await, (Ok(0), expected.clone()));
        assert_eq!(late.await, (Ok(0), expected));
        gateway.stop().await;
    });
}
