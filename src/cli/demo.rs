//! The main job on one machine: a gateway, an agent, a task, a cut, and a comparison byte for byte.
//!
//! The task's command runs between two `tee`s that keep an exact copy of both streams, so that
//! what arrived can be compared with what was printed whatever the command is.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use async_signal::{Signal, Signals};
use futures_lite::{AsyncWrite, FutureExt, StreamExt, future};
use log::LevelFilter;
use smol::{Timer, Unblock};

use crate::gateway::operator_client::{AgentInfo, OperatorClient, Submission};
use crate::gateway::{Gateway, Settings};

const CONNECT_DEADLINE: Duration = Duration::from_secs(30);
/// The default command takes about six seconds.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(120);
/// When the connection is cut, after the task has been submitted.
const CUT_AFTER: Duration = Duration::from_millis(2500);
/// How long the gateway then refuses another session.
const CUT_SECONDS: u64 = 1;
const LOOK_AGAIN: Duration = Duration::from_millis(20);

const DEFAULT_COMMAND: &str = "\
i=0
while [ $i -lt 60 ]; do
    i=$((i + 1))
    echo \"line $i of 60: temperature $((200 + i % 7))/10 \u{b0}C\"
    if [ $((i % 10)) -eq 0 ]; then echo \"warning $((i / 10)) of 6\" >&2; fi
    sleep 0.1
done
";

/// What runs as the task: the command between its two copies.
const WRAPPER: &str = "\
mkfifo \"$dir/out\" \"$dir/err\" || exit 125
tee \"$dir/printed.stdout\" <\"$dir/out\" &
out=$!
tee \"$dir/printed.stderr\" <\"$dir/err\" >&2 &
err=$!
/bin/sh \"$dir/command\" >\"$dir/out\" 2>\"$dir/err\"
code=$?
wait $out $err
exit $code
";

/// Runs the demonstration. 0: nothing was lost or changed.
pub fn run(command: Option<String>) -> u8 {
    crate::logger::init(LevelFilter::Warn);
    let deadline = command.is_none().then_some(DEFAULT_DEADLINE);
    let command = command.unwrap_or_else(|| DEFAULT_COMMAND.to_owned());
    let stage = match Stage::set_up(&command) {
        Ok(stage) => stage,
        Err(why) => {
            eprintln!("demo: {why}");
            return 1;
        }
    };
    let interrupted = async {
        let mut signals = Signals::new([Signal::Int, Signal::Term]).map_err(|it| it.to_string())?;
        signals.next().await;
        Err("interrupted".to_owned())
    };
    let too_late = async {
        match deadline {
            Some(after) => Timer::after(after).await,
            None => future::pending().await,
        };
        Err("gave up: the task has not ended in time".to_owned())
    };
    let played = smol::block_on(stage.play().or(interrupted).or(too_late));
    match played {
        Ok(summary) => {
            eprint!("{}", summary.text);
            u8::from(summary.lost > 0)
        }
        Err(why) => {
            eprintln!("demo: {why}");
            stage.show_agent_log();
            1
        }
    }
}

struct Summary {
    text: String,
    lost: u64,
}

/// A gateway on a thread of its own, an agent as a child process, and their directory. Cleans up
/// when it is dropped.
struct Stage {
    dir: PathBuf,
    agent: Child,
    client: OperatorClient,
    stop_gateway: async_channel::Sender<()>,
    gateway: Option<thread::JoinHandle<()>>,
}

impl Stage {
    fn set_up(command: &str) -> Result<Stage, String> {
        let dir = std::env::temp_dir().join(format!("hostlink-demo-{}", std::process::id()));
        let cannot =
            |what: &str, error: io::Error| format!("cannot {what} in {}: {error}", dir.display());
        fs::create_dir_all(&dir).map_err(|error| cannot("work", error))?;
        fs::write(dir.join("command"), command).map_err(|error| cannot("write", error))?;

        let (stop_gateway, stopped) = async_channel::bounded(1);
        let (started, is_started) = std::sync::mpsc::sync_channel(1);
        let state = dir.join("gateway");
        let gateway = thread::spawn(move || run_gateway(state, stopped, &started));
        let (url, token_id, token_key) = is_started
            .recv()
            .map_err(|_| "the gateway has not started".to_owned())??;

        let log = File::create(dir.join("agent.log")).map_err(|error| cannot("write", error))?;
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut agent = Command::new(program);
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy();
            if name.starts_with("HOSTLINK_") || name.to_ascii_uppercase().ends_with("_PROXY") {
                agent.env_remove(&key);
            }
        }
        let agent = agent
            .args(["--config", "/dev/null", "run"])
            .env("SH_CONTROL_PLANE_URL", &url)
            .env("HOSTLINK_STATE_PATH", dir.join("agent"))
            .env("HOSTLINK_TOKEN_ID", token_id)
            .env("HOSTLINK_TOKEN_KEY", token_key)
            .env("HOSTLINK_WS_RECONNECT_MIN", "1s")
            .env("HOSTLINK_WS_RECONNECT_MAX", "2s")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| format!("cannot start the agent: {error}"))?;
        Ok(Stage {
            client: OperatorClient::new(&url, None)?,
            dir,
            agent,
            stop_gateway,
            gateway: Some(gateway),
        })
    }

    async fn play(&self) -> Result<Summary, String> {
        eprintln!("-- gateway and agent start in {} --", self.dir.display());
        let agent = self.connected(0).await?;
        eprintln!("-- agent {} is connected --", agent.id);
        let submission = Submission {
            agent_id: Some(agent.id.clone()),
            command: format!("dir='{}'\n{WRAPPER}", self.dir.display()),
            ..Submission::default()
        };
        let task = self.client.submit_detached(&submission).await?;
        let mut stdout = Copying::new(Unblock::new(io::stdout()), &self.dir, "arrived.stdout")?;
        let mut stderr = Copying::new(Unblock::new(io::stderr()), &self.dir, "arrived.stderr")?;
        let watch = async {
            let followed = self
                .client
                .follow(&task.task_id, &mut stdout, &mut stderr)
                .await;
            followed.map(Some)
        };
        let cut = async {
            Timer::after(CUT_AFTER).await;
            if self.client.disconnect(&agent.id, CUT_SECONDS).await? {
                eprintln!("-- connection cut --");
                self.connected(agent.counters.sessions).await?;
                eprintln!("-- connected again --");
            }
            Ok(None)
        };
        let exit_code = match watch_with(watch, cut).await? {
            Some(code) => code,
            None => return Err("the task has no end".to_owned()),
        };
        let agent = self.connected(0).await?;
        self.summarize(exit_code, &agent)
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
            Timer::after(CONNECT_DEADLINE).await;
            Err("the agent has not connected in time".to_owned())
        };
        future::or(wait, late).await
    }

    fn summarize(&self, exit_code: i32, agent: &AgentInfo) -> Result<Summary, String> {
        let mut printed = 0;
        let mut lost = 0;
        for stream in ["stdout", "stderr"] {
            let (bytes, differing) = compare(
                &self.dir.join(format!("printed.{stream}")),
                &self.dir.join(format!("arrived.{stream}")),
            )
            .map_err(|error| format!("cannot compare {stream}: {error}"))?;
            printed += bytes;
            lost += differing;
        }
        let counted = agent.counters;
        let text = format!(
            "-- the task has ended with exit code {exit_code} --\n\
             sent          {printed} bytes in {} chunks, {} sessions\n\
             acknowledged  {} bytes\n\
             replayed      {} messages that waited on the device during the cut\n\
             lost          {lost}\n",
            counted.chunks, counted.sessions, counted.bytes, counted.replayed
        );
        // A changed repeat would be a fault even if the bytes are right in the end.
        let lost = lost + counted.changed_repeats;
        Ok(Summary { text, lost })
    }

    /// The last lines of the agent's log, to see why something failed.
    fn show_agent_log(&self) {
        let log = fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(20)) {
            eprintln!("agent: {line}");
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let agent = rustix::process::Pid::from_child(&self.agent);
        let _ = rustix::process::kill_process(agent, rustix::process::Signal::TERM);
        let _ = self.agent.wait();
        self.stop_gateway.close();
        if let Some(gateway) = self.gateway.take() {
            let _ = gateway.join();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The end of the task counts; a cut that fails ends the demonstration.
async fn watch_with(
    watch: impl Future<Output = Result<Option<i32>, String>>,
    cut: impl Future<Output = Result<Option<i32>, String>>,
) -> Result<Option<i32>, String> {
    let cut = async {
        match cut.await {
            Ok(_) => future::pending().await,
            failed => failed,
        }
    };
    future::or(watch, cut).await
}

type Started = Result<(String, String, String), String>;

fn run_gateway(
    state: PathBuf,
    stop: async_channel::Receiver<()>,
    started: &std::sync::mpsc::SyncSender<Started>,
) {
    smol::block_on(async {
        let listen = ([127, 0, 0, 1], 0).into();
        let gateway = match Gateway::bind(Settings::new(listen, state)).await {
            Ok(gateway) => gateway,
            Err(error) => {
                let _ = started.send(Err(error.to_string()));
                return;
            }
        };
        let (id, key) = gateway.registration_token();
        let url = format!("http://{}", gateway.address());
        let _ = started.send(Ok((url, id, key)));
        if let Err(error) = gateway.run(stop).await {
            eprintln!("demo: {error}");
        }
    });
}

/// Prints, and keeps a copy of what was printed.
struct Copying<W> {
    inner: W,
    copy: File,
}

impl<W> Copying<W> {
    fn new(inner: W, dir: &Path, name: &str) -> Result<Copying<W>, String> {
        let copy = File::create(dir.join(name)).map_err(|error| error.to_string())?;
        Ok(Copying { inner, copy })
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Copying<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.copy.write_all(&bytes[..count])?;
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(context)
    }
}

/// Length of the first file, and how many bytes are missing, surplus or different in the second.
fn compare(printed: &Path, arrived: &Path) -> io::Result<(u64, u64)> {
    let mut printed = BufReader::new(File::open(printed)?).bytes();
    let mut arrived = BufReader::new(File::open(arrived)?).bytes();
    let (mut length, mut differing) = (0, 0);
    loop {
        match (printed.next().transpose()?, arrived.next().transpose()?) {
            (None, None) => return Ok((length, differing)),
            (left, right) => {
                length += u64::from(left.is_some());
                differing += u64::from(left != right);
            }
        }
    }
}
