//! A control plane in the test process: sane by default, steered by the test, recording all.
//!
//! By default it registers the agent, answers polls with what is offered, acknowledges the hello
//! without directives and every message at once, and answers a hole in a stream with a gap error.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hostlink_edge::ids::{Ids, Stream};
use openssl::pkey::{PKey, Public};
use serde_json::Value;

use super::agent::AgentLog;
use super::http::{self, Answer, Request};
use super::link::{Link, Reaction};
use super::log::{End, Event, Frame, Log};
use super::rules::Ledger;
use super::{Task, lock};

/// The most that a test waits for one event: generous, since it is spent only on failure.
/// `HOSTLINK_TEST_PATIENCE` multiplies it, for a machine that is slow as a whole.
pub fn deadline() -> Duration {
    Duration::from_secs(30) * slowdown() * number("HOSTLINK_TEST_PATIENCE")
}

/// By how much the agent under test may be slower than one for this machine's processor
/// (`HOSTLINK_TEST_SLOWDOWN`).
pub fn slowdown() -> u32 {
    number("HOSTLINK_TEST_SLOWDOWN")
}

/// 1 if it is not set.
fn number(variable: &str) -> u32 {
    std::env::var(variable).map_or(1, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text:?}"))
    })
}

pub const AGENT_ID: &str = "agent-under-test";
pub const TOKEN_ID: &str = "token-id-of-the-tests";
pub const TOKEN_KEY: &str = "token-key-of-the-tests";

pub type FrameScript = Arc<dyn Fn(&Link, &Frame) -> Reaction + Send + Sync>;
pub type HttpScript = Arc<dyn Fn(&Request) -> Option<Answer> + Send + Sync>;

/// What a test may change at any time.
pub struct Policy {
    pub delivery_enabled: bool,
    /// Upgrades get this answer instead of a WebSocket.
    pub refuse_upgrades: Option<Answer>,
    /// Added to the server's clock.
    pub clock_shift_seconds: i64,
    pub poll_tasks: Vec<Value>,
    pub heartbeat_tasks: Vec<Value>,
    /// Delivered on every connection as soon as it is active.
    pub deliver_on_hello: Vec<Task>,
    pub on_frame: FrameScript,
    pub on_http: HttpScript,
}

pub struct Inner {
    pub port: u16,
    pub policy: Mutex<Policy>,
    pub ledger: Mutex<Ledger>,
    pub public_key: Mutex<Option<PKey<Public>>>,
    pub nonces: Mutex<HashMap<String, ()>>,
    /// Highest sequence acknowledged by the default reaction, and so kept by this server.
    pub taken: Mutex<HashMap<(Ids, Stream), u64>>,
    pub active: Mutex<Option<Arc<Link>>>,
    log: Mutex<Log>,
    changed: Condvar,
    sockets: Mutex<Vec<TcpStream>>,
    stopping: AtomicBool,
    agents: Mutex<Vec<Arc<AgentLog>>>,
}

impl Inner {
    pub fn record(&self, event: Event) {
        lock(&self.log).push(event);
        self.changed.notify_all();
    }

    /// The number of the connection that just opened.
    pub fn record_opened(&self) -> usize {
        let mut log = lock(&self.log);
        let conn = log.connections() + 1;
        log.push(Event::Opened { conn });
        self.changed.notify_all();
        conn
    }

    pub fn unix_seconds(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let shift = lock(&self.policy).clock_shift_seconds;
        now.expect("the clock is past 1970").as_secs() as i64 + shift
    }
}

pub struct ScriptedServer {
    inner: Arc<Inner>,
}

impl ScriptedServer {
    pub fn start() -> ScriptedServer {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port on loopback");
        let port = listener.local_addr().expect("a bound socket").port();
        let inner = Arc::new(Inner {
            port,
            policy: Mutex::new(Policy {
                delivery_enabled: true,
                refuse_upgrades: None,
                clock_shift_seconds: 0,
                poll_tasks: Vec::new(),
                heartbeat_tasks: Vec::new(),
                deliver_on_hello: Vec::new(),
                on_frame: Arc::new(|_, _| Reaction::Default),
                on_http: Arc::new(|_| None),
            }),
            ledger: Mutex::default(),
            public_key: Mutex::new(None),
            nonces: Mutex::default(),
            taken: Mutex::default(),
            active: Mutex::new(None),
            log: Mutex::new(Log::new()),
            changed: Condvar::new(),
            sockets: Mutex::default(),
            stopping: AtomicBool::new(false),
            agents: Mutex::default(),
        });
        let accepting = Arc::clone(&inner);
        std::thread::spawn(move || accept(&listener, &accepting));
        ScriptedServer { inner }
    }

    pub fn port(&self) -> u16 {
        self.inner.port
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.inner.port)
    }

    /// The log of an agent is shown beside the server's when a test fails.
    pub fn show_on_failure(&self, log: Arc<AgentLog>) {
        lock(&self.inner.agents).push(log);
    }

    // ---- steering ------------------------------------------------------------------------------

    pub fn policy(&self, change: impl FnOnce(&mut Policy)) {
        change(&mut lock(&self.inner.policy));
    }

    /// `script` sees every frame before the default reaction and may replace it.
    pub fn on_frame(&self, script: impl Fn(&Link, &Frame) -> Reaction + Send + Sync + 'static) {
        self.policy(|policy| policy.on_frame = Arc::new(script));
    }

    /// Back to the default: everything is acknowledged at once.
    pub fn acknowledge_everything(&self) {
        self.on_frame(|_, _| Reaction::Default);
    }

    /// Answers hellos with these fields beside the usual ones, and everything else by default.
    pub fn acknowledge_hellos_with(&self, directives: Value) {
        self.on_frame(move |link, frame| match frame.hello() {
            Some(_) => {
                link.hello_ack(frame, directives.clone());
                Reaction::Handled
            }
            None => Reaction::Default,
        });
    }

    /// Acknowledges nothing but hellos.
    pub fn acknowledge_nothing(&self) {
        self.on_frame(|_, frame| match frame.hello() {
            Some(_) => Reaction::Default,
            None => Reaction::Handled,
        });
    }

    /// `script` may answer any authenticated request in place of the default.
    pub fn on_http(&self, script: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) {
        self.policy(|policy| policy.on_http = Arc::new(script));
    }

    pub fn refuse_upgrades(&self, answer: Answer) {
        self.policy(|policy| policy.refuse_upgrades = Some(answer));
    }

    pub fn allow_upgrades(&self) {
        self.policy(|policy| policy.refuse_upgrades = None);
    }

    pub fn note(&self, text: impl Into<String>) {
        self.inner.record(Event::Note(text.into()));
    }

    /// Waits for a session that is active now, and delivers on it.
    pub fn deliver(&self, task: &Task) {
        self.link().deliver(task);
    }

    /// Ends the active connection without a close handshake.
    pub fn cut(&self) {
        self.link().cut();
    }

    /// The active session; waits until there is one.
    pub fn link(&self) -> Arc<Link> {
        self.wait_for("an active session", |_| lock(&self.inner.active).clone())
    }

    // ---- waiting and looking -------------------------------------------------------------------

    /// Waits until `question` has an answer. Fails, with the timeline, after [`deadline`] and on
    /// any breach of the protocol.
    pub fn wait_for<T>(&self, what: &str, question: impl FnMut(&Log) -> Option<T>) -> T {
        self.wait_at_most(deadline(), what, question)
    }

    pub fn wait_until(&self, what: &str, mut question: impl FnMut(&Log) -> bool) {
        self.wait_for(what, |log| question(log).then_some(()));
    }

    pub fn wait_at_most<T>(
        &self,
        limit: Duration,
        what: &str,
        mut question: impl FnMut(&Log) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + limit;
        let mut log = lock(&self.inner.log);
        loop {
            if let Some(rule) = log.broken() {
                let failure = format!("while waiting for {what}: the agent broke a rule: {rule}");
                drop(log);
                self.fail(&failure);
            }
            if let Some(answer) = question(&log) {
                return answer;
            }
            let now = Instant::now();
            if now >= deadline {
                drop(log);
                self.fail(&format!("waited {limit:?} for {what}, in vain"));
            }
            log = match self.inner.changed.wait_timeout(log, deadline - now) {
                Ok((log, _)) => log,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Waits for the `task.final` of an attempt.
    pub fn wait_final(&self, task: &Task) -> Frame {
        self.wait_for(&format!("the final of {}", task.ids), |log| {
            log.first_final(&task.ids).cloned()
        })
    }

    /// Waits until the server knows how the attempt ended. A final without output may go by report
    /// whenever no session is active (PROTOCOL.md 4.7).
    pub fn wait_end(&self, task: &Task) -> End {
        self.wait_for(&format!("the end of {}", task.ids), |log| {
            log.end(&task.ids)
        })
    }

    /// Waits for a frame of this type about this attempt.
    pub fn wait_frame(&self, kind: &str, task: &Task) -> Frame {
        self.wait_for(&format!("{kind} of {}", task.ids), |log| {
            log.frames_of(kind, &task.ids).first().copied().cloned()
        })
    }

    /// Waits until connection `conn` has sent its hello.
    pub fn wait_hello(&self, conn: usize) -> hostlink_edge::wire::Hello {
        self.wait_for(&format!("the hello of connection {conn}"), |log| {
            log.hello(conn).cloned()
        })
    }

    /// Runs a task that shows that the session works: what had to be sent before it, was. A session
    /// whose agent was killed may still look active, so the task is delivered once more if its
    /// connection closes before the agent says that it has it.
    pub fn run_another(&self, name: &str) -> Frame {
        let task = Task::new(name, "true");
        loop {
            let link = self.link();
            link.deliver(&task);
            let end = self.wait_for(&format!("the final of {}", task.ids), |log| {
                let is_lost = || {
                    log.is_closed(link.conn) && log.frames_of("task.received", &task.ids).is_empty()
                };
                match log.first_final(&task.ids) {
                    Some(end) => Some(Some(end.clone())),
                    None => is_lost().then_some(None),
                }
            });
            if let Some(end) = end {
                return end;
            }
        }
    }

    pub fn look<T>(&self, question: impl FnOnce(&Log) -> T) -> T {
        question(&lock(&self.inner.log))
    }

    pub fn mark(&self) -> usize {
        self.look(Log::mark)
    }

    /// Fails with the timeline unless `holds`.
    #[track_caller]
    pub fn check(&self, holds: bool, what: &str) {
        if !holds {
            self.fail(what);
        }
    }

    #[track_caller]
    pub fn check_eq<T: PartialEq + std::fmt::Debug>(&self, got: T, expected: T, what: &str) {
        if got != expected {
            self.fail(&format!(
                "{what}\n     got: {got:.2000?}\nexpected: {expected:.2000?}"
            ));
        }
    }

    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        let timeline = self.look(Log::timeline);
        let agents: String = lock(&self.inner.agents).iter().map(|a| a.text()).collect();
        panic!("{what}\n{timeline}{agents}");
    }
}

impl Drop for ScriptedServer {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees that it is to stop.
        let _ = TcpStream::connect(("127.0.0.1", self.inner.port));
        for socket in lock(&self.inner.sockets).drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        lock(&self.inner.active).take();
        if !std::thread::panicking() {
            let broken = self.look(|log| log.broken().map(str::to_owned));
            if let Some(rule) = broken {
                self.fail(&format!("the agent broke a rule: {rule}"));
            }
        }
    }
}

fn accept(listener: &TcpListener, inner: &Arc<Inner>) {
    for socket in listener.incoming() {
        if inner.stopping.load(Ordering::SeqCst) {
            return;
        }
        let Ok(socket) = socket else { continue };
        let _ = socket.set_nodelay(true);
        if let Ok(clone) = socket.try_clone() {
            lock(&inner.sockets).push(clone);
        }
        let inner = Arc::clone(inner);
        std::thread::spawn(move || http::serve(&socket, &inner));
    }
}
