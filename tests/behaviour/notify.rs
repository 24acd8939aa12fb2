//! What a service manager is told (sd_notify): up, connected, stopping, alive.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Agent, Answer, ScriptedServer};

const WATCHDOG: Duration = Duration::from_millis(400);

struct Manager(UnixDatagram);

impl Manager {
    fn at(address: &SocketAddr) -> Manager {
        let socket = UnixDatagram::bind_addr(address).expect("a free name");
        Manager(socket)
    }

    /// The next message within this time.
    fn hears(&self, within: Duration) -> Option<String> {
        let mut buffer = [0; 1000];
        self.0.set_read_timeout(Some(within)).expect("a duration");
        let len = self.0.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..len]).into_owned())
    }

    /// Waits for a message with this part; others may come before.
    fn waits_for(&self, part: &str) -> String {
        loop {
            let message = self.hears(Duration::from_secs(20));
            let message = message.unwrap_or_else(|| panic!("nobody says {part}"));
            if message.contains(part) {
                return message;
            }
        }
    }
}

#[test]
fn up_connected_cut_and_stopping_are_told() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    let path = agent.path("notify");
    let manager = Manager::at(&SocketAddr::from_pathname(&path).expect("short"));
    agent.set("NOTIFY_SOCKET", &path.display().to_string());
    agent.start_again();
    manager.waits_for("READY=1");
    manager.waits_for("STATUS=connected");
    server.refuse_upgrades(Answer::status(503));
    server.cut();
    manager.waits_for("STATUS=not connected: ");
    agent.terminate();
    manager.waits_for("STOPPING=1");
    let more = manager.hears(Duration::from_millis(1));
    server.check_eq(more, None, "without WATCHDOG_USEC nothing is said of life");
}

/// Up means up on the device: no network is needed for it.
#[test]
fn life_is_told_before_the_server_is_reached_and_only_by_the_living() {
    let server = ScriptedServer::start();
    let mut agent = Agent::prepare(&server);
    let name = format!("hostlink-test-{}", agent.state().display());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).expect("short");
    let manager = Manager::at(&address);
    agent.set("NOTIFY_SOCKET", &format!("@{name}"));
    agent.set("WATCHDOG_USEC", &WATCHDOG.as_micros().to_string());
    agent.unset("HOSTLINK_TOKEN_KEY");
    agent.start_again();
    manager.waits_for("READY=1");
    for _ in 0..3 {
        manager.waits_for("WATCHDOG=1");
    }
    // It is not registered, so it can only be stopped.
    agent.terminate();
    agent.set("HOSTLINK_TOKEN_KEY", crate::support::server::TOKEN_KEY);
    agent.start_again();
    manager.waits_for("STATUS=connected");
    for _ in 0..3 {
        manager.waits_for("WATCHDOG=1");
    }
    let pid = Pid::from_raw(agent.pid()).expect("a process");
    kill_process(pid, Signal::STOP).expect("it runs");
    while manager.hears(2 * WATCHDOG).is_some() {}
    kill_process(pid, Signal::CONT).expect("it stands still");
    manager.waits_for("WATCHDOG=1");
    agent.terminate();
    manager.waits_for("STOPPING=1");
}
