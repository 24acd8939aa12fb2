use std::io::{BufReader, Write as _};
use std::net::TcpStream as StdStream;
use std::sync::{Arc, Mutex};

use futures_lite::io::Cursor;
use futures_lite::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::net::testing::{
    self, TempDir, authority, leaf, read_request, relay, run, serve, serve_tls, settings, url,
};

/// Connects, asks for `/` and reads to the end.
async fn fetch(dialer: &Dialer, base: &str) -> Result<String, NetError> {
    let mut stream = dialer.connect(&url(base)).await?;
    let broken = |error: io::Error| NetError::new(error.to_string());
    let request = b"GET / HTTP/1.1\r\n\r\n";
    stream.write_all(request).await.map_err(broken)?;
    let mut text = vec![0; 15];
    stream.read_exact(&mut text).await.map_err(broken)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

// ---- TLS --------------------------------------------------------------------------------------

#[test]
fn a_server_is_trusted_if_its_authority_name_and_dates_are_right() {
    let directory = TempDir::new();
    let ca = authority("private CA");
    let ca_file = directory.file("ca.pem", &ca.pem());
    let check = |name: &str, days, trust: bool, host: &str, expected: &str| {
        let issuer = if trust {
            ca.clone()
        } else {
            authority("other CA")
        };
        let port = serve_tls(&leaf(name, &issuer, days), None);
        let base = format!("https://{host}:{port}");
        let mut settings = settings(&base);
        settings.ca_file = Some(ca_file.clone());
        let result = run(fetch(&Dialer::new(settings), &base));
        match result {
            Ok(text) => assert_eq!((text.as_str(), expected), ("HTTP/1.1 200 OK", "")),
            Err(error) => {
                assert!(
                    !expected.is_empty() && error.why.contains(expected),
                    "{error}"
                );
                assert!(error.why.contains(&base), "{error}");
            }
        }
    };
    check("127.0.0.1", (-1, 1), true, "127.0.0.1", "");
    check("localhost", (-1, 1), true, "localhost", "");
    check("127.0.0.1", (-9, -1), true, "127.0.0.1", "must be renewed");
    check("127.0.0.1", (1, 9), true, "127.0.0.1", "set the clock");
    check(
        "a.example",
        (-1, 1),
        true,
        "localhost",
        "is for another name",
    );
    check(
        "10.0.0.1",
        (-1, 1),
        true,
        "127.0.0.1",
        "is for another name",
    );
    check("127.0.0.1", (-1, 1), false, "127.0.0.1", "HOSTLINK_CA_FILE");
}

#[test]
fn a_certificate_that_signs_itself_is_not_trusted() {
    let port = serve_tls(&authority("127.0.0.1"), None);
    let base = format!("https://127.0.0.1:{port}");
    let error = run(fetch(&testing::dialer(&base), &base)).expect_err("self-signed");
    assert!(error.why.contains("HOSTLINK_CA_FILE"), "{error}");
}

/// The system's roots are chosen by the environment, so the dials are made by a child process:
/// this test again, which finds the server's URL in [`ROOTS_TEST_URL`].
#[test]
fn a_ca_file_replaces_the_roots_of_the_system() {
    const ROOTS_TEST_URL: &str = "HOSTLINK_EDGE_ROOTS_TEST_URL";
    const ROOTS_TEST_CA_FILE: &str = "HOSTLINK_EDGE_ROOTS_TEST_CA_FILE";
    const NAME: &str = "net::dial::tests::a_ca_file_replaces_the_roots_of_the_system";
    if let Ok(base) = std::env::var(ROOTS_TEST_URL) {
        let mut settings = settings(&base);
        run(fetch(&Dialer::new(settings.clone()), &base)).expect("trusted by the system");
        settings.ca_file = std::env::var_os(ROOTS_TEST_CA_FILE).map(Into::into);
        assert!(settings.ca_file.is_some());
        let error = run(fetch(&Dialer::new(settings), &base)).expect_err("not by the CA file");
        assert!(error.why.contains("HOSTLINK_CA_FILE"), "{error}");
        return;
    }
    let directory = TempDir::new();
    let system = authority("system CA");
    let port = serve_tls(&leaf("127.0.0.1", &system, (-1, 1)), None);
    let child = std::process::Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", NAME])
        .env("SSL_CERT_FILE", directory.file("system.pem", &system.pem()))
        .env(
            ROOTS_TEST_CA_FILE,
            directory.file("ca.pem", &authority("private CA").pem()),
        )
        .env(ROOTS_TEST_URL, format!("https://127.0.0.1:{port}"))
        .output()
        .expect("started");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}");
    assert!(said.contains("1 passed"), "it must have run: {said}");
}

#[test]
fn certificate_files_are_read_at_each_connection() {
    let directory = TempDir::new();
    let (old, new) = (authority("old CA"), authority("new CA"));
    let port = serve_tls(&leaf("127.0.0.1", &new, (-1, 1)), None);
    let base = format!("https://127.0.0.1:{port}");
    let mut settings = settings(&base);
    settings.ca_file = Some(directory.path().join("ca.pem"));
    let dialer = Dialer::new(settings);
    let missing = run(fetch(&dialer, &base)).expect_err("missing");
    assert!(
        missing.why.contains("ca.pem (HOSTLINK_CA_FILE)"),
        "{missing}"
    );
    directory.file("ca.pem", b"no certificate");
    assert!(
        dialer
            .check()
            .expect_err("empty")
            .contains("no PEM certificate")
    );
    directory.file("ca.pem", &old.pem());
    run(fetch(&dialer, &base)).expect_err("unknown CA");
    directory.file("ca.pem", &new.pem());
    dialer.check().expect("usable files");
    run(fetch(&dialer, &base)).expect("trusted without a restart");
}

#[test]
fn the_device_shows_its_certificate_to_a_server_that_asks() {
    let directory = TempDir::new();
    let ca = authority("CA");
    let device = leaf("device", &ca, (-1, 1));
    let port = serve_tls(&leaf("127.0.0.1", &ca, (-1, 1)), Some(&ca.certificate));
    let base = format!("https://127.0.0.1:{port}");
    let mut with = settings(&base);
    with.ca_file = Some(directory.file("ca.pem", &ca.pem()));
    let without = with.clone();
    with.client_cert = Some(directory.file("device.pem", &device.pem()));
    with.client_key = Some(directory.file("device.key", &device.key_pem()));
    run(fetch(&Dialer::new(with.clone()), &base)).expect("accepted");
    run(fetch(&Dialer::new(without), &base)).expect_err("no certificate");

    with.client_key = Some(directory.file("bad.key", b"-----BEGIN RSA PRIVATE KEY-----\n"));
    let why = Dialer::new(with).check().expect_err("bad key");
    assert!(why.contains("HOSTLINK_CLIENT_KEY"), "{why}");
}

#[test]
fn a_server_without_tls_and_one_that_stops_in_the_handshake_are_named() {
    let check = |answer: &'static [u8], milliseconds: u64, expected: &str| {
        let port = serve(move |_, mut stream| {
            let _ = stream.write_all(answer);
            testing::drain(&mut stream);
        });
        let base = format!("https://127.0.0.1:{port}");
        let mut settings = settings(&base);
        settings.timeouts.connect = Duration::from_millis(milliseconds);
        let error = run(fetch(&Dialer::new(settings), &base)).expect_err(expected);
        assert!(error.why.contains(expected), "{error}");
    };
    check(
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        20_000,
        "does not speak TLS",
    );
    check(b"", 100, "TLS with 127.0.0.1");
    check(b"\x16\x03\x03\x01\x00\x02\x00", 100, "100ms");
}

// ---- TCP --------------------------------------------------------------------------------------

#[test]
fn a_refused_connection_and_an_unknown_name_are_named() {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        listener.local_addr().expect("address").port()
    };
    let check = |base: String, expected: &str| {
        let error = run(fetch(&testing::dialer(&base), &base)).expect_err(expected);
        assert!(error.why.contains(expected), "{error}");
    };
    check(
        format!("http://127.0.0.1:{port}"),
        &format!("127.0.0.1:{port}: "),
    );
    check(
        "http://no-such-host.invalid".to_string(),
        "cannot be resolved",
    );
}

#[test]
fn the_socket_has_its_options() {
    let port = serve(|_, mut stream| {
        testing::drain(&mut stream);
    });
    run(async {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let stream = Async::<TcpStream>::connect(address)
            .await
            .expect("connected");
        set_options(&stream).expect("options");
        assert!(sockopt::tcp_nodelay(&stream).expect("option"));
        assert!(sockopt::socket_keepalive(&stream).expect("option"));
        assert_eq!(sockopt::tcp_user_timeout(&stream).expect("option"), 60_000);
    });
}

#[test]
fn the_next_address_is_tried_beside_a_silent_one_and_at_once_after_a_failure() {
    let hour = Duration::from_secs(3600);
    let success =
        || -> Attempt { Box::pin(async { Ok(Connection::new(Cursor::new(Vec::new()))) }) };
    let failure = || -> Attempt { Box::pin(async { Err("refused".to_string()) }) };
    let silence = || -> Attempt { Box::pin(future::pending()) };
    run(async {
        let attempts = vec![silence(), silence(), success()];
        assert!(
            first_success(attempts, Duration::from_millis(1))
                .await
                .is_ok()
        );
        assert!(
            first_success(vec![failure(), success()], hour)
                .await
                .is_ok()
        );
        let why = first_success(vec![failure(), failure()], hour).await;
        assert_eq!(why.err().as_deref(), Some("refused; refused"));
        let first = first_success(vec![silence(), success()], hour);
        assert!(
            future::poll_once(first).await.is_none(),
            "has its head start"
        );
    });
}

#[test]
fn address_families_alternate_and_are_bounded() {
    let list = |texts: &[&str]| -> Vec<SocketAddr> {
        texts
            .iter()
            .map(|text| text.parse().expect("address"))
            .collect()
    };
    let order: Vec<_> =
        alternating(list(&["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1"])).collect();
    assert_eq!(order, list(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "[::3]:1"]));
    let many: Vec<SocketAddr> = (0..99)
        .map(|n| SocketAddr::from(([1, 1, 1, n], 1)))
        .collect();
    assert_eq!(alternating(many).count(), CONNECT_ADDRESSES_MAX);
}

// ---- proxy ------------------------------------------------------------------------------------

/// A proxy that tunnels to `target`, whatever is asked for, and the heads it got.
fn tunnelling_proxy(target: u16) -> (u16, Arc<Mutex<Vec<String>>>) {
    let heads = Arc::new(Mutex::new(Vec::new()));
    let log = heads.clone();
    let port = serve(move |number, mut stream| {
        let mut reader = BufReader::with_capacity(1, stream.try_clone().expect("clone"));
        let request = read_request(number, &mut reader).expect("request");
        log.lock().expect("lock").push(request.head);
        stream
            .write_all(b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n")
            .expect("answered");
        relay(
            stream,
            StdStream::connect(("127.0.0.1", target)).expect("connected"),
        );
    });
    (port, heads)
}

#[test]
fn tls_goes_through_a_tunnel_of_the_proxy_with_its_password() {
    let directory = TempDir::new();
    let ca = authority("CA");
    let target = serve_tls(&leaf("server.example", &ca, (-1, 1)), None);
    let (proxy, heads) = tunnelling_proxy(target);
    let base = "https://server.example:8443";
    let mut settings = settings(base);
    settings.ca_file = Some(directory.file("ca.pem", &ca.pem()));
    settings.https_proxy = Some(format!("http://user:p%40ss@127.0.0.1:{proxy}"));
    assert!(!format!("{settings:?}").contains("p%40ss"));
    let dialer = Dialer::new(settings);
    assert!(!format!("{dialer:?}").contains("p%40ss"));
    run(fetch(&dialer, base)).expect("through the proxy");
    let heads = heads.lock().expect("lock");
    assert_eq!(
        heads.as_slice(),
        [
            "CONNECT server.example:8443 HTTP/1.1\r\nHost: server.example:8443\r\n\
          Proxy-Authorization: Basic dXNlcjpwQHNz\r\n\r\n"
        ]
    );
}

#[test]
fn a_proxy_that_opens_no_tunnel_is_named_with_the_reason() {
    let check = |answer: &'static str, endless: bool, expected: &str| {
        let proxy = serve(move |number, mut stream| {
            let mut reader = BufReader::new(stream.try_clone().expect("clone"));
            let _ = read_request(number, &mut reader);
            while stream.write_all(answer.as_bytes()).is_ok() && endless {}
        });
        let base = "https://server.example";
        let mut settings = settings(base);
        settings.https_proxy = Some(format!("http://user:secret@127.0.0.1:{proxy}"));
        let error = run(fetch(&Dialer::new(settings), base)).expect_err(expected);
        assert!(error.why.contains(expected), "{error}");
        assert!(!error.why.contains("secret"), "{error}");
    };
    check(
        "HTTP/1.1 407 Who\r\n\r\n",
        false,
        "wants a user and a password",
    );
    check("HTTP/1.1 403 Forbidden\r\n\r\n", false, "403 Forbidden");
    check("HTTP/2 200\r\n\r\n", false, "it answered");
    check("HTTP/1.1 200", false, "closed the connection");
    check("X", true, "longer than 16384 bytes");
}

#[test]
fn plain_http_names_the_whole_url_to_the_proxy() {
    let server = testing::Scripted::new([testing::answer("200 OK", "", "[]")]);
    let mut settings = settings("http://server.example/base");
    settings.http_proxy = Some(format!("user@127.0.0.1:{}", server.port));
    run(async {
        let clock = crate::net::ServerClock::new(&settings.control_plane);
        let api = crate::net::Api::new(std::rc::Rc::new(Dialer::new(settings)), clock);
        api.set_signer(std::rc::Rc::new(testing::signer(
            "a",
            "http://server.example",
        )));
        api.poll().await.expect("polled");
    });
    let request = server.received().remove(0);
    assert_eq!(
        request.line(),
        "GET http://server.example/base/api/v1/tasks HTTP/1.1"
    );
    assert_eq!(request.header("host"), Some("server.example"));
    assert_eq!(
        request.header("proxy-authorization"),
        Some("Basic dXNlcjo=")
    );
}
