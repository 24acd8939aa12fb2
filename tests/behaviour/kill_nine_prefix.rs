//! `kill -9` at any moment of a printing task, a hundred times in a row: at the server the stream is
//! an exact prefix with no hole, the attempt ends `interrupted`, the command never runs twice.

use std::time::Duration;

use hostlink_edge::ids::{FinalStatus, Stream};

use crate::support::seed::Random;
use crate::support::{Agent, ScriptedServer, Task};

const ROUNDS: usize = 100;
/// Of one task: 250 × 8 ms and more, so far longer than any moment of the kill.
const LINES: usize = 250;
const LATEST_KILL: Duration = Duration::from_millis(400);

fn expected_text() -> String {
    (1..=LINES)
        .map(|number| format!("line {number} of the stream\n"))
        .collect()
}

#[test]
fn the_stream_is_a_prefix_and_the_command_never_runs_twice() {
    let mut random = Random::from_environment();
    let expected = expected_text();
    let server = ScriptedServer::start();
    let mut agent = Agent::start(&server);
    server.link();
    let mut interrupted = 0;
    for round in 1..=ROUNDS {
        let name = format!("round-{round}");
        let command = format!(
            "{}; for i in $(seq {LINES}); do echo line $i of the stream; \
             echo line $i of the stream >&2; sleep 0.008; done",
            agent.trace(&name)
        );
        let task = Task::new(&name, command);
        // A server delivers again what the agent's hello does not know.
        server.policy(|policy| policy.deliver_on_hello = vec![task.clone()]);
        server.deliver(&task);
        let moment = random.below(LATEST_KILL.as_micros() as u64);
        server.note(format!("round {round}: kill after {moment} µs"));
        std::thread::sleep(Duration::from_micros(moment));
        agent.kill();
        agent.start_again();
        let end = server.wait_end(&task);
        // The final is delivered once more to those who ask; the next round must not see it.
        server.policy(|policy| policy.deliver_on_hello.clear());

        let runs = agent.runs(&name);
        let status = (end.status, end.exit_code);
        let context = format!(
            "round {round} (seed {}), {runs} runs, {status:?}",
            random.seed
        );
        for stream in Stream::ALL {
            let text = server.look(|log| log.text(&task.ids, stream));
            let whole = status == (FinalStatus::Completed, 0);
            server.check(
                expected.starts_with(&text) && (!whole || text == expected),
                &format!("{context}: {} is no prefix: {text:.300?}", stream.as_str()),
            );
        }
        match status {
            (FinalStatus::Interrupted, -1) => {
                interrupted += 1;
                server.check(runs <= 1, &context);
            }
            // Killed before the start was recorded: it ran after the restart, once.
            (FinalStatus::Completed, 0) => server.check(runs == 1, &context),
            _ => server.fail(&context),
        }
    }
    server.check(
        interrupted >= ROUNDS / 2,
        &format!("only {interrupted} of {ROUNDS} attempts were hit while running"),
    );
    // Nothing ran late, after its round.
    for round in 1..=ROUNDS {
        let runs = agent.runs(&format!("round-{round}"));
        server.check(runs <= 1, &format!("round {round} ran {runs} times"));
    }
}
