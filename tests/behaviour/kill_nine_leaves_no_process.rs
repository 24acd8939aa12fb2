//! `kill -9` of the agent at any moment of tasks with grandchildren, two hundred times: once the
//! agent is up again and says how a task ended, no process of it is left.

use std::time::Duration;

use hostlink_edge::ids::FinalStatus;

use crate::support::processes::Sleeper;
use crate::support::seed::Random;
use crate::support::{Agent, ScriptedServer, Task};

const ROUNDS: usize = 200;
const LATEST_KILL: Duration = Duration::from_millis(60);

#[test]
fn nothing_is_left_once_the_agent_is_up_again() {
    let mut random = Random::from_environment();
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    let mut sleepers = Vec::new();
    let (mut interrupted, mut met) = (0, 0);
    for round in 1..=ROUNDS {
        let sleeper = Sleeper::new();
        let sleep = sleeper.command();
        let name = format!("round-{round}");
        let killed = agent.path(&format!("killed-{round}"));
        // One that starts only after the restart ends at once.
        let command = format!(
            "[ ! -e {} ] || exit 0; {sleep} & (setsid sh -c '{sleep} & {sleep} & exit') & \
             sh -c '{sleep} & env -i {sleep} & wait' & wait",
            killed.display()
        );
        let task = Task::new(&name, command);
        // A server delivers again what the agent's hello does not know.
        server.policy(|policy| policy.deliver_on_hello = vec![task.clone()]);
        server.deliver(&task);
        let moment = random.below(LATEST_KILL.as_micros() as u64);
        std::thread::sleep(Duration::from_micros(moment));
        agent.kill();
        std::fs::write(&killed, b"").expect("the test's directory is writable");
        met += sleeper.running().len();
        agent.start_again();
        let end = server.wait_end(&task);
        let left = sleeper.running().len();
        server.policy(|policy| policy.deliver_on_hello.clear());
        let seed = random.seed;
        let context = format!("round {round}, killed after {moment} µs (seed {seed})");
        server.check_eq(left, 0, &context);
        interrupted += usize::from(end.status == FinalStatus::Interrupted);
        sleepers.push(sleeper);
        if server.look(|log| !log.reports(&task.ids).is_empty()) {
            // That it was reported is recorded before this ends; else the next kill may have it
            // sent once more, which is allowed (PROTOCOL.md 4.7) and not looked at here.
            server.run_another(&format!("after-{round}"));
        }
    }
    for (index, sleeper) in sleepers.iter().enumerate() {
        let context = format!("started late, after round {}", index + 1);
        server.check_eq(sleeper.running().len(), 0, &context);
    }
    server.check(
        interrupted >= ROUNDS / 2 && met >= ROUNDS,
        &format!("{interrupted} attempts were hit while running, {met} processes were met"),
    );
}
