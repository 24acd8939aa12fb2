//! What the gateway knows in memory: agents, their sessions, and the attempts that are under way.
//!
//! Everything runs on one thread, so the state is a `RefCell` that is borrowed for the length of
//! one function and never over an await. A change to an attempt is staged (applied in memory and
//! encoded), committed by the storage thread, and only then visible to operators and acknowledged.
//! The order of staging is the order of commits, whoever stages and whoever commits first: what is
//! staged of an attempt lies with the attempt, and a commit takes all of it. So a message that was
//! found to be a repeat is acknowledged behind the commit of the message that it repeats, also if
//! that one came by another session or request.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::rc::Weak;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use openssl::pkey::{PKey, Public};
use smol::LocalExecutor;
use smol::net::TcpStream;

use super::auth::{self, NonceVerdict, Nonces, Signed};
use super::commits::Commit;
use super::delivery::{Attempt, Progress, TaskRecord};
use super::operator_types::{AgentInfo, Counters};
use super::settings::Options;
use super::store::{AgentRecord, Answer, Loaded, Opened, Store};
use crate::ids::AttemptKey;
use crate::limits::{
    GATEWAY_AGENTS_MAX, GATEWAY_ENDED_ATTEMPTS_MAX, GATEWAY_OPEN_COMMAND_BYTES_MAX,
    GATEWAY_OPEN_TASKS_MAX,
};
use crate::wire::Timestamp;

/// A session that is active, as others reach it.
pub struct SessionHandle {
    pub number: u64,
    pub since: Timestamp,
    /// To cut the connection.
    pub tcp: TcpStream,
    /// One place: a wake-up that was not taken yet counts for all later ones.
    wake: Sender<()>,
}

pub struct Agent {
    pub record: AgentRecord,
    key: PKey<Public>,
    nonces: Nonces,
    pub session: Option<SessionHandle>,
    pub last_seen: Option<Timestamp>,
    pub counters: Counters,
    /// Tasks that have not ended.
    open: BTreeSet<String>,
    /// An operator has cut the connection: no session until then.
    away_until: Option<Instant>,
}

/// An attempt in memory.
pub struct Live {
    pub attempt: Attempt,
    pub(super) key: AttemptKey,
    /// Another one each time that the attempt gets into memory: see [`super::commits`].
    pub(super) number: u64,
    /// Records that are staged and not yet handed to the storage thread.
    pub(super) staged: Vec<u8>,
    /// Length of the journal with all that is staged …
    pub(super) appended: u64,
    /// … and with all that is durable.
    pub durable: u64,
    /// Whether an agent may have got to know of it.
    pub offered: bool,
    pub(super) watchers: Vec<Sender<()>>,
}

#[derive(Default)]
pub(super) struct State {
    agents: HashMap<String, Agent>,
    by_fingerprint: HashMap<String, String>,
    pub(super) attempts: HashMap<String, Live>,
    /// Attempts in memory that have ended, oldest first.
    pub(super) ended: VecDeque<String>,
    open_command_bytes: usize,
    next_number: u64,
    /// Number of the youngest attempt in memory that an append has failed for.
    pub(super) failed_up_to: u64,
}

/// Why a request of an agent is refused: status and the `error` of the body.
pub type Refusal = (u16, String);

pub struct Hub {
    pub store: Store,
    pub options: Options,
    pub operator_token: Option<String>,
    pub token: (String, String),
    /// Closed when the gateway stops.
    pub stopping: Receiver<()>,
    executor: Weak<LocalExecutor<'static>>,
    pub(super) state: RefCell<State>,
    /// Batches that nobody has handed over yet, at most one a session and request.
    pub(super) commits: RefCell<VecDeque<Commit>>,
    /// Somebody does so. Not two at a time: they might overtake each other before a full queue.
    pub(super) hands_over: Cell<bool>,
    next_session: Cell<u64>,
    next_task: Cell<u64>,
}

impl Hub {
    /// Takes over what the store found.
    pub fn new(
        opened: Opened,
        options: Options,
        operator_token: Option<String>,
        stopping: Receiver<()>,
        executor: Weak<LocalExecutor<'static>>,
    ) -> Hub {
        let mut state = State::default();
        for record in opened.agents {
            let id = record.id.clone();
            if let Err(error) = state.put_agent(record) {
                log::error!("agent {id} is left out: {error}; let it register again");
            }
        }
        let mut next_task = 1;
        for loaded in opened.open {
            next_task = next_task.max(loaded.attempt.task.number + 1);
            state.insert(loaded, true);
        }
        Hub {
            store: opened.store,
            options,
            operator_token,
            token: opened.token,
            stopping,
            executor,
            state: RefCell::new(state),
            commits: RefCell::default(),
            hands_over: Cell::new(false),
            next_session: Cell::new(1),
            next_task: Cell::new(next_task),
        }
    }

    /// Runs `future` until it ends or the gateway does.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        if let Some(executor) = self.executor.upgrade() {
            executor.spawn(future).detach();
        }
    }

    // ---- agents ---------------------------------------------------------------------------

    /// Checks the signature of a request (PROTOCOL.md 1) and notes that the agent was seen.
    pub fn authenticate(&self, signed: &Signed) -> Result<(), Refusal> {
        let refuse = |why: &str| Err((401, why.to_owned()));
        let now_ms = Timestamp::now();
        let now = now_ms.0 / 1000;
        let mut state = self.state.borrow_mut();
        let Some(agent) = state.agents.get_mut(&signed.agent_id) else {
            return refuse("agent is not registered here");
        };
        if !signed.verify(&agent.key) {
            return refuse("signature is wrong");
        }
        if !signed.is_timely(now) {
            return refuse("timestamp is more than 300 s from this clock, see header Date");
        }
        match agent.nonces.remember(signed, now) {
            NonceVerdict::Fresh => {
                agent.last_seen = Some(now_ms);
                Ok(())
            }
            NonceVerdict::Replayed => refuse("nonce was used before"),
            NonceVerdict::Full => Err((429, "too many requests within 300 s".into())),
        }
    }

    /// The record under which a device registers: its earlier id, or a new one.
    pub fn registration(
        &self,
        fingerprint: &str,
        new_record: impl FnOnce(Option<&AgentRecord>) -> Result<AgentRecord, String>,
    ) -> Result<AgentRecord, Refusal> {
        let state = self.state.borrow();
        let known = state
            .by_fingerprint
            .get(fingerprint)
            .and_then(|id| state.agents.get(id));
        if known.is_none() && state.agents.len() >= GATEWAY_AGENTS_MAX {
            return Err((
                503,
                format!("{GATEWAY_AGENTS_MAX} agents are registered already"),
            ));
        }
        new_record(known.map(|agent| &agent.record)).map_err(|error| (400, error))
    }

    /// The registration is durable and takes effect.
    pub fn put_agent(&self, record: AgentRecord) -> Result<(), String> {
        self.state.borrow_mut().put_agent(record)
    }

    /// `None` if there is no such agent.
    pub fn with_agent<T>(&self, agent_id: &str, f: impl FnOnce(&mut Agent) -> T) -> Option<T> {
        self.state.borrow_mut().agents.get_mut(agent_id).map(f)
    }

    /// Changes the counters of an agent.
    pub fn count(&self, agent_id: &str, f: impl FnOnce(&mut Counters)) {
        self.with_agent(agent_id, |agent| f(&mut agent.counters));
    }

    /// The only agent that is registered.
    pub fn only_agent(&self) -> Option<String> {
        let state = self.state.borrow();
        let mut ids = state.agents.keys();
        ids.next().filter(|_| state.agents.len() == 1).cloned()
    }

    pub fn agents(&self) -> Vec<AgentInfo> {
        let state = self.state.borrow();
        let mut agents: Vec<AgentInfo> = state
            .agents
            .values()
            .map(|agent| {
                let in_progress = |wanted: fn(Progress) -> bool| {
                    let tasks = agent.open.iter();
                    let count = tasks
                        .filter_map(|task_id| state.attempts.get(task_id))
                        .filter(|live| wanted(live.attempt.progress))
                        .count();
                    count as u64
                };
                let hostname = agent.record.tags.iter().find(|tag| tag.key == "hostname");
                AgentInfo {
                    id: agent.record.id.clone(),
                    fingerprint: agent.record.fingerprint.clone(),
                    hostname: hostname.map(|tag| tag.value.clone()).unwrap_or_default(),
                    connected_since: agent.session.as_ref().map(|s| s.since.to_string()),
                    last_seen: agent.last_seen.map(|time| time.to_string()),
                    running_tasks: in_progress(|progress| progress == Progress::Started),
                    pending_tasks: in_progress(|progress| progress < Progress::Started),
                    counters: agent.counters,
                }
            })
            .collect();
        agents.sort_by(|a, b| a.id.cmp(&b.id));
        agents
    }

    // ---- sessions -------------------------------------------------------------------------

    /// A session has finished its handshake. An earlier one of the agent is cut: the device has
    /// left it, or there are two of one identity. Returns its number and its wake-ups.
    pub fn open_session(&self, agent_id: &str, tcp: TcpStream) -> (u64, Receiver<()>) {
        let number = self.next_session.get();
        self.next_session.set(number + 1);
        let (wake, woken) = async_channel::bounded(1);
        let handle = SessionHandle {
            number,
            since: Timestamp::now(),
            tcp,
            wake,
        };
        let earlier = self.with_agent(agent_id, |agent| {
            agent.counters.sessions += 1;
            agent.session.replace(handle)
        });
        if let Some(Some(earlier)) = earlier {
            log::info!("agent {agent_id}: a new session replaces one that was still open");
            cut(&earlier.tcp);
        }
        (number, woken)
    }

    pub fn close_session(&self, agent_id: &str, number: u64) {
        self.with_agent(agent_id, |agent| {
            if agent.session.as_ref().is_some_and(|s| s.number == number) {
                agent.session = None;
            }
        });
    }

    /// Tells the agent's session that there is something to deliver or to cancel.
    pub fn wake(&self, agent_id: &str) {
        self.with_agent(agent_id, |agent| {
            if let Some(session) = &agent.session {
                // Full: it is going to look anyway.
                let _ = session.wake.try_send(());
            }
        });
    }

    /// Cuts the TCP connection of the agent's session and refuses another one for a while. `None`
    /// if there is no such agent.
    pub fn disconnect(&self, agent_id: &str, away: Duration) -> Option<bool> {
        self.with_agent(agent_id, |agent| {
            agent.away_until = Instant::now().checked_add(away);
            match agent.session.take() {
                Some(session) => {
                    cut(&session.tcp);
                    true
                }
                None => false,
            }
        })
    }

    /// Whether an operator keeps this agent from having a session.
    pub fn is_kept_away(&self, agent_id: &str) -> bool {
        self.with_agent(agent_id, |agent| {
            agent.away_until.is_some_and(|until| Instant::now() < until)
        })
        .unwrap_or(false)
    }

    // ---- attempts -------------------------------------------------------------------------

    /// Reserves room for a task and says for what it lacks.
    pub fn check_room(&self, agent_id: &str, command_bytes: usize) -> Result<(), Refusal> {
        let state = self.state.borrow();
        let Some(agent) = state.agents.get(agent_id) else {
            return Err((404, format!("there is no agent {agent_id:?}")));
        };
        if agent.open.len() >= GATEWAY_OPEN_TASKS_MAX {
            let why = format!("{GATEWAY_OPEN_TASKS_MAX} tasks of the agent have not ended");
            return Err((429, why));
        }
        if state.open_command_bytes + command_bytes > GATEWAY_OPEN_COMMAND_BYTES_MAX {
            return Err((
                429,
                "the tasks that have not ended hold too many bytes".into(),
            ));
        }
        Ok(())
    }

    /// Place of a new task among those that have not ended.
    pub fn task_number(&self) -> u64 {
        self.next_task.replace(self.next_task.get() + 1)
    }

    /// A new task is durable.
    pub fn insert_task(&self, attempt: Attempt, length: u64) {
        let agent_id = attempt.task.agent_id.clone();
        self.state
            .borrow_mut()
            .insert(Loaded { attempt, length }, false);
        self.wake(&agent_id);
    }

    /// Runs `f` on a task that is in memory.
    pub fn with_task<T>(&self, task_id: &str, f: impl FnOnce(&mut Live) -> T) -> Option<T> {
        self.state.borrow_mut().attempts.get_mut(task_id).map(f)
    }

    /// Gets the task into memory. `false` if there is none of that id.
    pub async fn load(&self, task_id: &str) -> Answer<bool> {
        if self.state.borrow().attempts.contains_key(task_id) {
            return Ok(true);
        }
        let Some(loaded) = self.store.load(task_id).await? else {
            return Ok(false);
        };
        let mut state = self.state.borrow_mut();
        // Somebody else may have been faster, and may have staged since.
        if !state.attempts.contains_key(task_id) {
            state.insert(loaded, true);
        }
        Ok(true)
    }

    /// Open tasks of an agent, the most urgent and then the oldest first.
    pub fn open_tasks(&self, agent_id: &str) -> Vec<String> {
        let state = self.state.borrow();
        let Some(agent) = state.agents.get(agent_id) else {
            return Vec::new();
        };
        let mut tasks: Vec<&TaskRecord> = agent
            .open
            .iter()
            .filter_map(|task_id| Some(&state.attempts.get(task_id)?.attempt.task))
            .collect();
        tasks.sort_by(|a, b| b.priority.cmp(&a.priority).then(a.number.cmp(&b.number)));
        tasks.iter().map(|task| task.task_id.clone()).collect()
    }

    /// Wake-ups for everything that becomes durable of a task in memory.
    pub fn watch(&self, task_id: &str) -> Option<Receiver<()>> {
        self.with_task(task_id, |live| {
            live.watchers.retain(|watcher| !watcher.is_closed());
            let (wake, woken) = async_channel::bounded(1);
            live.watchers.push(wake);
            woken
        })
    }
}

/// Ends both directions at once, without a close frame, as a broken network does.
fn cut(tcp: &TcpStream) {
    // It may be closed already.
    let _ = tcp.shutdown(std::net::Shutdown::Both);
}

impl State {
    fn put_agent(&mut self, record: AgentRecord) -> Result<(), String> {
        let key = auth::parse_public_key(&record.public_key)?;
        self.by_fingerprint
            .insert(record.fingerprint.clone(), record.id.clone());
        match self.agents.get_mut(&record.id) {
            Some(agent) => {
                agent.key = key;
                agent.record = record;
            }
            None => {
                let agent = Agent {
                    key,
                    nonces: Nonces::default(),
                    session: None,
                    last_seen: None,
                    counters: Counters::default(),
                    open: BTreeSet::new(),
                    away_until: None,
                    record,
                };
                self.agents.insert(agent.record.id.clone(), agent);
            }
        }
        Ok(())
    }

    fn insert(&mut self, loaded: Loaded, offered: bool) {
        let task = &loaded.attempt.task;
        let task_id = task.task_id.clone();
        if loaded.attempt.result.is_none() {
            let agent = self.agents.get_mut(&task.agent_id);
            if agent.is_some_and(|agent| agent.open.insert(task_id.clone())) {
                self.open_command_bytes += task.command.len();
            }
        } else {
            self.ended.push_back(task_id.clone());
        }
        self.next_number += 1;
        let live = Live {
            key: task.key(),
            number: self.next_number,
            staged: Vec::new(),
            attempt: loaded.attempt,
            appended: loaded.length,
            durable: loaded.length,
            offered,
            watchers: Vec::new(),
        };
        self.attempts.insert(task_id.clone(), live);
        self.forget_ended(&task_id);
    }

    /// The final of a task was staged.
    pub(super) fn end(&mut self, task_id: &str) {
        self.close_open(task_id);
        self.ended.push_back(task_id.to_owned());
        self.forget_ended(task_id);
    }

    pub(super) fn close_open(&mut self, task_id: &str) {
        if let Some(live) = self.attempts.get(task_id) {
            let task = &live.attempt.task;
            let agent = self.agents.get_mut(&task.agent_id);
            if agent.is_some_and(|agent| agent.open.remove(task_id)) {
                self.open_command_bytes -= task.command.len();
            }
        }
    }

    /// Lets go of attempts that ended longest ago and that nobody is busy with; never of `newest`,
    /// which its caller is about to use.
    fn forget_ended(&mut self, newest: &str) {
        let mut busy = 0;
        while self.ended.len() > GATEWAY_ENDED_ATTEMPTS_MAX + busy {
            let Some(task_id) = self.ended.pop_front() else {
                return;
            };
            let idle = self.attempts.get_mut(&task_id).is_none_or(|live| {
                live.watchers.retain(|watcher| !watcher.is_closed());
                live.watchers.is_empty() && live.appended == live.durable
            });
            if idle && task_id != newest {
                self.attempts.remove(&task_id);
            } else {
                self.ended.push_back(task_id);
                busy += 1;
            }
        }
    }
}
