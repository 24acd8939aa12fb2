//! TLS with a private certificate authority (`HOSTLINK_CA_FILE`).

use crate::support::tls::{TestCa, terminate};
use crate::support::{Agent, Event, ScriptedServer, Task};

#[test]
fn a_named_authority_is_trusted_for_http_and_websocket() {
    let server = ScriptedServer::start();
    let ca = TestCa::new("test authority");
    let port = terminate(&ca, server.port());
    for host in ["127.0.0.1", "localhost"] {
        let mut agent = Agent::prepare(&server);
        let file = ca.write_pem(agent.path("ca.pem"));
        agent.set("HOSTLINK_CA_FILE", &file);
        agent.set("SH_CONTROL_PLANE_URL", &format!("https://{host}:{port}"));
        agent.start_again();
        let task = Task::new(host, "seq 1 20000");
        server.deliver(&task);
        server.wait_final(&task);
        let expected: String = (1..=20000).map(|number| format!("{number}\n")).collect();
        server.check(
            server.look(|log| log.stdout(&task.ids)) == expected,
            "the output arrives",
        );
        // The next agent is another device under the same name: this one must be gone.
        agent.terminate();
        server.wait_until("the end of the session", |log| {
            log.is_closed(log.connections())
        });
    }
}

#[test]
fn another_authority_is_not_trusted() {
    let server = ScriptedServer::start();
    let (ours, theirs) = (TestCa::new("our authority"), TestCa::new("their authority"));
    let port = terminate(&theirs, server.port());
    let mut agent = Agent::prepare(&server);
    let file = ours.write_pem(agent.path("ca.pem"));
    agent.set("HOSTLINK_CA_FILE", &file);
    agent.set("SH_CONTROL_PLANE_URL", &format!("https://127.0.0.1:{port}"));
    agent.start_again();
    agent.wait_line("certificate");
    let requests = server.look(|log| {
        log.count(|e| {
            matches!(
                e,
                Event::Registration { .. } | Event::Poll | Event::Opened { .. }
            )
        })
    });
    server.check_eq(
        requests,
        0,
        "requests over a connection that is not trusted",
    );
}
