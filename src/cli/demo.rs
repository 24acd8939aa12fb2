//! The main job on one machine: a gateway, an agent, a task, a cut, and a comparison byte for byte.
//!
//! The task's command runs between two `tee`s that keep an exact copy of both streams, so that
//! what arrived can be compared with what was printed whatever the command is.
//!
//! - [`stage`]: the directory, the gateway and the agent.
//! - [`copies`]: what was printed and what arrived.

mod copies;
mod stage;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use async_signal::{Signal, Signals};
use futures_lite::{FutureExt, StreamExt, future};
use log::LevelFilter;
use smol::{Timer, Unblock};

use self::copies::{Copying, compare};
use self::stage::{Agent, GatewayThread, Scratch};
use super::tell;
use crate::gateway::operator_client::{AgentInfo, OperatorClient, Submission};

/// From one sign of life to the next: connected, task started, and once the command has ended from
/// byte to byte. How long the command itself runs is its own affair.
const PATIENCE: Duration = Duration::from_secs(30);
/// When the connection is cut, after the task has been submitted.
const CUT_AFTER: Duration = Duration::from_millis(2500);
/// How long the gateway then refuses another session.
const CUT_SECONDS: u64 = 1;
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Lost or changed bytes, and everything that kept the demonstration from its end.
const EXIT_FAILURE: u8 = 1;
/// As a shell reports a process that INT has ended.
const EXIT_INTERRUPTED: u8 = 130;

/// Takes about six seconds.
const DEFAULT_COMMAND: &str = "\
i=0
while [ $i -lt 60 ]; do
    i=$((i + 1))
    echo \"line $i of 60: temperature $((200 + i % 7))/10 \u{b0}C\"
    if [ $((i % 10)) -eq 0 ]; then echo \"warning $((i / 10)) of 6\" >&2; fi
    sleep 0.1
done
";

/// What runs as the task: the command between its two copies. The files `started` and `ended` show
/// how far it is.
const WRAPPER: &str = "\
: >\"$dir/started\"
mkfifo \"$dir/out\" \"$dir/err\" || exit 125
tee \"$dir/printed.stdout\" <\"$dir/out\" &
out=$!
tee \"$dir/printed.stderr\" <\"$dir/err\" >&2 &
err=$!
/bin/sh \"$dir/command\" >\"$dir/out\" 2>\"$dir/err\"
code=$?
: >\"$dir/ended\"
wait $out $err
exit $code
";

/// Runs the demonstration. 0: nothing was lost or changed.
pub fn run(command: Option<String>) -> u8 {
    crate::logger::init(LevelFilter::Warn);
    let command = command.unwrap_or_else(|| DEFAULT_COMMAND.to_owned());
    // Before anything exists that would have to be cleaned up.
    let signals = Signals::new([Signal::Int, Signal::Term, Signal::Hup]);
    let stage = match Stage::set_up(&command) {
        Ok(stage) => stage,
        Err(why) => {
            tell(format_args!("demo: {why}"));
            return EXIT_FAILURE;
        }
    };
    let interrupted = async {
        signals.map_err(|error| error.to_string())?.next().await;
        Ok(None)
    };
    let played = async { stage.play().await.map(Some) };
    let guarded = async { Err(stage.stands_still().await) };
    match smol::block_on(played.or(interrupted).or(guarded)) {
        Ok(Some(summary)) => {
            tell(summary.text.trim_end());
            if summary.faults == 0 { 0 } else { EXIT_FAILURE }
        }
        Ok(None) => {
            tell("demo: interrupted");
            EXIT_INTERRUPTED
        }
        Err(why) => {
            tell(format_args!("demo: {why}"));
            stage.agent.show_log();
            EXIT_FAILURE
        }
    }
}

struct Summary {
    text: String,
    /// Bytes lost or changed, and repeats that differed.
    faults: u64,
}

/// Dropped in this order: the agent first, the directory last.
struct Stage {
    agent: Agent,
    client: OperatorClient,
    _gateway: GatewayThread,
    dir: Scratch,
}

impl Stage {
    fn set_up(command: &str) -> Result<Stage, String> {
        let dir = Scratch::new()?;
        fs::write(dir.join("command"), command)
            .map_err(|error| format!("cannot write in {}: {error}", dir.path().display()))?;
        let gateway = GatewayThread::start(dir.join("gateway"))?;
        Ok(Stage {
            agent: Agent::start(&gateway, &dir)?,
            client: OperatorClient::new(&gateway.url, None)?,
            _gateway: gateway,
            dir,
        })
    }

    async fn play(&self) -> Result<Summary, String> {
        let dir = self.dir.path();
        tell(format_args!(
            "-- gateway and agent start in {} --",
            dir.display()
        ));
        let agent = self.connected(0).await?;
        tell(format_args!("-- agent {} is connected --", agent.id));
        let submission = Submission {
            agent_id: Some(agent.id.clone()),
            command: format!("dir={}\n{WRAPPER}", quoted(dir)?),
            ..Submission::default()
        };
        let task = self.client.submit_detached(&submission).await?;
        let mut stdout = Copying::new(Unblock::new(io::stdout()), dir, "arrived.stdout")?;
        let mut stderr = Copying::new(Unblock::new(io::stderr()), dir, "arrived.stderr")?;
        let watch = async {
            self.client
                .follow(&task.task_id, &mut stdout, &mut stderr)
                .await
        };
        // The end of the task counts, and a cut that fails; a cut that succeeds is not the end.
        let cut = async {
            match self.cut(&agent).await {
                Ok(()) => future::pending().await,
                Err(why) => Err(why),
            }
        };
        let exit_code = watch.or(cut).await?;
        let agent = self.connected(0).await?;
        self.summarize(exit_code, &agent)
    }

    /// Cuts the connection in the middle of the task and waits for the next one.
    async fn cut(&self, agent: &AgentInfo) -> Result<(), String> {
        Timer::after(CUT_AFTER).await;
        if self.client.disconnect(&agent.id, CUT_SECONDS).await? {
            tell("-- connection cut --");
            self.connected(agent.counters.sessions).await?;
            tell("-- connected again --");
        }
        Ok(())
    }

    /// Waits until the one agent has a session, and more than `sessions` in all.
    async fn connected(&self, sessions: u64) -> Result<AgentInfo, String> {
        let wait = async {
            loop {
                let agents = self.client.agents().await?;
                let found = agents.into_iter().find(|agent| {
                    agent.connected_since.is_some() && agent.counters.sessions > sessions
                });
                match found {
                    Some(agent) => return Ok(agent),
                    None => Timer::after(LOOK_AGAIN).await,
                };
            }
        };
        let late = async {
            Timer::after(PATIENCE).await;
            let seconds = PATIENCE.as_secs();
            Err(format!("the agent has not connected in {seconds} s"))
        };
        future::or(wait, late).await
    }

    /// Returns, with the reason, only when the demonstration would wait for ever.
    async fn stands_still(&self) -> String {
        let seconds = PATIENCE.as_secs();
        let agent_ends = async {
            loop {
                if let Some(how) = self.agent.has_ended() {
                    return format!("the agent has ended by itself: {how}");
                }
                Timer::after(LOOK_AGAIN).await;
            }
        };
        let task_stands_still = async {
            // The agent connects first, which has its own deadline.
            if !appears_within(&self.dir.join("started"), 2 * PATIENCE).await {
                let seconds = 2 * seconds;
                return format!("gave up: the agent has not started the task in {seconds} s");
            }
            appears_within(&self.dir.join("ended"), Duration::MAX).await;
            self.nothing_arrives_for(PATIENCE).await;
            format!(
                "gave up: the command has ended, its last output has not, and nothing arrived in \
                 {seconds} s; a process that it left behind may hold its output open"
            )
        };
        future::or(agent_ends, task_stands_still).await
    }

    /// Returns when what has arrived did not grow for so long.
    async fn nothing_arrives_for(&self, patience: Duration) {
        let arrived = || -> u64 {
            let length = |name| fs::metadata(self.dir.join(name)).map_or(0, |it| it.len());
            length("arrived.stdout") + length("arrived.stderr")
        };
        let mut before = arrived();
        let mut waited = Duration::ZERO;
        while waited < patience {
            Timer::after(LOOK_AGAIN).await;
            waited += LOOK_AGAIN;
            let now = arrived();
            if now != before {
                (before, waited) = (now, Duration::ZERO);
            }
        }
    }

    fn summarize(&self, exit_code: i32, agent: &AgentInfo) -> Result<Summary, String> {
        let mut printed = 0;
        let mut lost = 0;
        for stream in ["stdout", "stderr"] {
            let (bytes, differing) = compare(
                &self.dir.join(&format!("printed.{stream}")),
                &self.dir.join(&format!("arrived.{stream}")),
            )
            .map_err(|error| format!("cannot compare {stream}: {error}"))?;
            printed += bytes;
            lost += differing;
        }
        let counted = agent.counters;
        let mut text = format!(
            "-- the task has ended with exit code {exit_code} --\n\
             sent          {printed} bytes in {} chunks, {} sessions\n\
             acknowledged  {} bytes\n\
             replayed      {} messages that waited on the device during the cut\n\
             lost          {lost}\n",
            counted.chunks, counted.sessions, counted.bytes, counted.replayed
        );
        if counted.sessions < 2 {
            text.push_str("(the task ended before its connection could be cut)\n");
        }
        if counted.changed_repeats > 0 {
            let repeats = counted.changed_repeats;
            text.push_str(&format!(
                "changed       {repeats} messages came again changed\n"
            ));
        }
        Ok(Summary {
            text,
            // A changed repeat would be a fault even if the bytes are right in the end.
            faults: lost + counted.changed_repeats,
        })
    }
}

async fn appears_within(path: &Path, patience: Duration) -> bool {
    let mut waited = Duration::ZERO;
    while !path.exists() {
        if waited >= patience {
            return false;
        }
        Timer::after(LOOK_AGAIN).await;
        waited += LOOK_AGAIN;
    }
    true
}

/// A path as one word of a shell.
fn quoted(path: &Path) -> Result<String, String> {
    match path.to_str() {
        Some(text) => Ok(format!("'{}'", text.replace('\'', "'\\''"))),
        None => Err(format!(
            "the name of {} is no UTF-8 text; set TMPDIR to another directory",
            path.display()
        )),
    }
}
