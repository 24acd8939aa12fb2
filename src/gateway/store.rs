//! What survives a restart: journals of attempts, and a small sled index of agents and tasks.
//!
//! One thread owns both and takes bounded commands. It drains its queue, carries out what it
//! found, makes all of it durable together and only then answers: so an answer always means
//! "durable". The index holds names only (the journals hold commands, output and results, see
//! [`super::journal`]): `agents` by id, `tasks` by id, and `open`, the tasks without a result.
//! `open` may lag behind the journals and is corrected from them at start.
//!
//! An append that fails (no space) is cut off again and reported to its sender; the next one may
//! succeed. After a failed `fdatasync` nobody knows what the medium holds: the gateway stops.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use async_channel::{Receiver, Sender};
use serde::{Deserialize, Serialize};

use super::delivery::{Attempt, TaskRecord};
use super::journal::{self, Header, Kind};
use crate::ids::AttemptKey;
use crate::limits::{
    GATEWAY_OPEN_JOURNALS_MAX, GATEWAY_STORAGE_QUEUE, LOCK_PATIENCE, LOCK_RETRY_DELAY,
};
use crate::panics;
use crate::wire::http::Tag;

const INDEX_CACHE_BYTES: u64 = 8 << 20;

/// An agent as the index holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRecord {
    pub id: String,
    pub fingerprint: String,
    /// Base64 of the DER SubjectPublicKeyInfo.
    pub public_key: String,
    pub tags: Vec<Tag>,
    /// RFC 3339.
    pub registered_at: String,
}

/// An attempt and the length of its journal, all of it durable.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub attempt: Attempt,
    pub length: u64,
}

/// What is said to those who ask after the end of the storage thread.
pub const STOPPED: &str = "the storage thread has stopped";

/// Records to be appended to one journal, which must be `offset` bytes long by then: so nothing
/// is ever appended behind a hole that a failed append left.
#[derive(Debug)]
pub struct Append {
    pub key: AttemptKey,
    pub offset: u64,
    pub records: Vec<u8>,
}

/// What the storage thread answers; the error says what failed and on what.
pub type Answer<T> = Result<T, String>;

enum Command {
    PutAgent(Box<AgentRecord>, Sender<Answer<()>>),
    CreateTask(Box<TaskRecord>, Sender<Answer<u64>>),
    Append(Vec<Append>, Sender<Answer<()>>),
    Load(String, Sender<Answer<Option<Loaded>>>),
    EndTask(String),
}

/// Everything that is known at start.
pub struct Opened {
    pub store: Store,
    pub agents: Vec<AgentRecord>,
    pub open: Vec<Loaded>,
    /// Registration token, id and key.
    pub token: (String, String),
    /// Receives one message if the thread had to give up, and is closed when it has ended.
    pub failure: Receiver<String>,
}

/// Handle of the storage thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct Store {
    commands: Sender<Command>,
    output: PathBuf,
}

impl Store {
    /// Opens or creates the state in `state`. Blocks; to be called off the async thread.
    pub fn open(
        state: &Path,
        token: Option<(String, String)>,
        sync: bool,
    ) -> Result<Opened, String> {
        let output = state.join("output");
        fs::create_dir_all(&output)
            .map_err(|error| format!("cannot create {}: {error}", output.display()))?;
        let index = Index::open(&state.join("index"))?;
        let token = index.token(token)?;
        let agents = index.agents()?;
        let mut disk = Disk {
            index,
            journals: HashMap::new(),
            output: output.clone(),
            sync,
            clock: 0,
        };
        let open = disk.load_open()?;
        let (commands, inbox) = async_channel::bounded(GATEWAY_STORAGE_QUEUE);
        let (failed, failure) = async_channel::bounded(1);
        std::thread::Builder::new()
            .name("gateway-storage".into())
            .spawn(move || {
                if let Err(error) = disk.serve(&inbox) {
                    log::error!("gateway storage: {error}; stopping");
                    // Nobody listens any more if the gateway is stopping already.
                    let _ = failed.try_send(error);
                }
                // The index is locked until here; the end of `failed` says that it is free.
                drop(disk);
                drop(failed);
            })
            .map_err(|error| format!("cannot start the storage thread: {error}"))?;
        Ok(Opened {
            store: Store { commands, output },
            agents,
            open,
            token,
            failure,
        })
    }

    pub async fn put_agent(&self, record: AgentRecord) -> Answer<()> {
        self.ask(|answer| Command::PutAgent(Box::new(record), answer))
            .await
    }

    /// Returns the length of the new journal.
    pub async fn create_task(&self, record: TaskRecord) -> Answer<u64> {
        self.ask(|answer| Command::CreateTask(Box::new(record), answer))
            .await
    }

    /// Returns once the storage thread is going to do it, after all that it was asked before.
    pub async fn append(&self, appends: Vec<Append>) -> Result<Receiver<Answer<()>>, String> {
        self.start(|answer| Command::Append(appends, answer)).await
    }

    /// Reads an attempt from its journal; `None` if there is no such task.
    pub async fn load(&self, task_id: &str) -> Answer<Option<Loaded>> {
        let task_id = task_id.to_owned();
        self.ask(|answer| Command::Load(task_id, answer)).await
    }

    /// The final is in the journal: the task need not be read at start any more.
    pub async fn end_task(&self, task_id: &str) {
        // If the thread has ended, the next start finds the final in the journal.
        let _ = self
            .commands
            .send(Command::EndTask(task_id.to_owned()))
            .await;
    }

    /// Where the journal of an attempt is.
    pub fn journal_path(&self, key: AttemptKey) -> PathBuf {
        journal_path(&self.output, key)
    }

    /// Lets the thread end after what was sent to it so far.
    pub fn close(&self) {
        self.commands.close();
    }

    async fn ask<T>(&self, command: impl FnOnce(Sender<Answer<T>>) -> Command) -> Answer<T> {
        let answer = self.start(command).await?;
        answer.recv().await.map_err(|_| STOPPED.to_owned())?
    }

    async fn start<T>(
        &self,
        command: impl FnOnce(Sender<Answer<T>>) -> Command,
    ) -> Result<Receiver<Answer<T>>, String> {
        let (answer, receive) = async_channel::bounded(1);
        self.commands
            .send(command(answer))
            .await
            .map_err(|_| STOPPED.to_owned())?;
        Ok(receive)
    }
}

fn journal_path(output: &Path, key: AttemptKey) -> PathBuf {
    output.join(format!("{key}.journal"))
}

fn sync_directory(path: &Path) -> Result<(), String> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| format!("cannot sync directory {}: {error}", path.display()))
}

// ---- index ------------------------------------------------------------------------------------

/// sled tells this by its words alone.
fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().contains("could not acquire lock"))
}

struct Index {
    database: sled::Db,
    agents: sled::Tree,
    tasks: sled::Tree,
    open: sled::Tree,
    path: PathBuf,
}

impl Index {
    fn open(path: &Path) -> Result<Index, String> {
        let failed = |error: &dyn std::fmt::Display| {
            format!(
                "cannot open the index {}: {error}; another gateway may use the same --state",
                path.display()
            )
        };
        // A damaged index can make sled panic.
        let open = || -> sled::Result<Index> {
            let database = sled::Config::new()
                .path(path)
                .cache_capacity(INDEX_CACHE_BYTES)
                .flush_every_ms(None)
                .open()?;
            Ok(Index {
                agents: database.open_tree("agents")?,
                tasks: database.open_tree("tasks")?,
                open: database.open_tree("open")?,
                path: path.to_owned(),
                database,
            })
        };
        let patience = Instant::now() + LOCK_PATIENCE;
        loop {
            match panics::guarded(open) {
                Ok(Ok(index)) => return Ok(index),
                // Whoever had it before may have left a child that still shares the lock, and that
                // has not replaced its image yet.
                Ok(Err(error)) if is_locked(&error) && Instant::now() < patience => {
                    std::thread::sleep(LOCK_RETRY_DELAY);
                }
                Ok(Err(error)) => return Err(failed(&error)),
                Err(panics::Panicked) => return Err(failed(&"it is damaged")),
            }
        }
    }

    fn token(&self, given: Option<(String, String)>) -> Result<(String, String), String> {
        const KEY: &str = "registration_token";
        let failed = |error: sled::Error| format!("registration token: {error}");
        if let Some(token) = given {
            return Ok(token);
        }
        if let Some(stored) = self.database.get(KEY).map_err(failed)? {
            return serde_json::from_slice(&stored)
                .map_err(|error| format!("registration token: {error}"));
        }
        let token = (super::auth::random_hex(8)?, super::auth::random_hex(32)?);
        let json = serde_json::to_vec(&token).expect("two strings are JSON");
        self.database.insert(KEY, json).map_err(failed)?;
        self.flush()?;
        Ok(token)
    }

    fn agents(&self) -> Result<Vec<AgentRecord>, String> {
        let mut agents = Vec::new();
        for entry in self.agents.iter() {
            let (id, json) = entry.map_err(|error| format!("index of agents: {error}"))?;
            match serde_json::from_slice(&json) {
                Ok(record) => agents.push(record),
                Err(error) => {
                    let id = String::from_utf8_lossy(&id);
                    log::error!("index of agents: entry {id} cannot be read, left out: {error}");
                }
            }
        }
        Ok(agents)
    }

    /// sled's own flush is `sync_file_range`, which promises nothing over a power cut.
    fn flush(&self) -> Result<(), String> {
        let failed = |error: &dyn std::fmt::Display| {
            format!("cannot flush the index {}: {error}", self.path.display())
        };
        self.database.flush().map_err(|error| failed(&error))?;
        File::open(self.path.join("db"))
            .and_then(|file| file.sync_data())
            .map_err(|error| failed(&error))?;
        sync_directory(&self.path)
    }
}

// ---- thread -----------------------------------------------------------------------------------

struct Journal {
    file: File,
    length: u64,
    last_used: u64,
}

struct Disk {
    index: Index,
    journals: HashMap<AttemptKey, Journal>,
    output: PathBuf,
    sync: bool,
    /// Counts uses of journals, to close the one that was used longest ago.
    clock: u64,
}

/// What has to be made durable before the answers of a group go out.
#[derive(Default)]
struct Dirty {
    journals: HashSet<AttemptKey>,
    output: bool,
    index: bool,
}

impl Disk {
    fn serve(&mut self, inbox: &Receiver<Command>) -> Result<(), String> {
        while let Ok(first) = inbox.recv_blocking() {
            let mut dirty = Dirty::default();
            let mut answers: Vec<Box<dyn FnOnce()>> = Vec::new();
            let mut next = Some(first);
            while let Some(command) = next {
                self.carry_out(command, &mut dirty, &mut answers);
                next = match answers.len() < GATEWAY_STORAGE_QUEUE {
                    true => inbox.try_recv().ok(),
                    false => None,
                };
            }
            self.make_durable(&dirty)?;
            answers.into_iter().for_each(|answer| answer());
        }
        self.index.flush()
    }

    fn carry_out(
        &mut self,
        command: Command,
        dirty: &mut Dirty,
        answers: &mut Vec<Box<dyn FnOnce()>>,
    ) {
        match command {
            Command::PutAgent(record, answer) => {
                let result = self.put_agent(&record, dirty);
                answers.push(answer_with(answer, result));
            }
            Command::CreateTask(record, answer) => {
                let result = self.create_task(&record, dirty);
                answers.push(answer_with(answer, result));
            }
            Command::Append(appends, answer) => {
                let result = appends
                    .iter()
                    .try_for_each(|append| self.append(append, dirty));
                answers.push(answer_with(answer, result));
            }
            Command::Load(task_id, answer) => {
                let result = self.load(&task_id);
                answers.push(answer_with(answer, result));
            }
            Command::EndTask(task_id) => {
                if let Err(error) = self.index.open.remove(task_id.as_bytes()) {
                    log::warn!("index of open tasks: cannot remove {task_id}: {error}");
                }
            }
        }
    }

    fn make_durable(&mut self, dirty: &Dirty) -> Result<(), String> {
        if self.sync {
            for key in &dirty.journals {
                if let Some(journal) = self.journals.get(key) {
                    journal
                        .file
                        .sync_data()
                        .map_err(|error| format!("cannot sync the journal {key}: {error}"))?;
                }
            }
            if dirty.output {
                sync_directory(&self.output)?;
            }
        }
        if dirty.index {
            self.index.flush()?;
        }
        Ok(())
    }

    fn put_agent(&mut self, record: &AgentRecord, dirty: &mut Dirty) -> Answer<()> {
        let json = serde_json::to_vec(record).expect("an agent record is JSON");
        self.index
            .agents
            .insert(record.id.as_bytes(), json)
            .map_err(|error| format!("cannot store agent {}: {error}", record.id))?;
        dirty.index = true;
        Ok(())
    }

    fn create_task(&mut self, record: &TaskRecord, dirty: &mut Dirty) -> Answer<u64> {
        let key = record.key();
        let path = journal_path(&self.output, key);
        let failed = |error: &dyn std::fmt::Display| {
            format!(
                "cannot store task {} in {}: {error}",
                record.task_id,
                path.display()
            )
        };
        let payload = serde_json::to_vec(record).expect("a task record is JSON");
        let mut bytes = Vec::with_capacity(payload.len() + journal::HEADER_BYTES);
        journal::append(&mut bytes, Header::plain(Kind::Task, &payload), &payload);
        self.make_room(dirty);
        let mut file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| failed(&error))?;
        if let Err(error) = file.write_all(&bytes) {
            let _ = fs::remove_file(&path);
            return Err(failed(&error));
        }
        let length = bytes.len() as u64;
        self.clock += 1;
        let journal = Journal {
            file,
            length,
            last_used: self.clock,
        };
        self.journals.insert(key, journal);
        dirty.journals.insert(key);
        dirty.output = true;
        let names = (&self.index.tasks, &self.index.open);
        names
            .0
            .insert(record.task_id.as_bytes(), key.to_string().as_bytes())
            .and_then(|_| names.1.insert(record.task_id.as_bytes(), &[]))
            .map_err(|error| failed(&error))?;
        dirty.index = true;
        Ok(length)
    }

    fn append(&mut self, append: &Append, dirty: &mut Dirty) -> Answer<()> {
        let key = append.key;
        let failed =
            |error: &dyn std::fmt::Display| format!("cannot append to journal {key}: {error}");
        if !self.journals.contains_key(&key) {
            self.make_room(dirty);
            let file = OpenOptions::new()
                .append(true)
                .open(journal_path(&self.output, key))
                .map_err(|error| failed(&error))?;
            let length = file.metadata().map_err(|error| failed(&error))?.len();
            let last_used = self.clock;
            self.journals.insert(
                key,
                Journal {
                    file,
                    length,
                    last_used,
                },
            );
        }
        self.clock += 1;
        let clock = self.clock;
        let journal = self.journals.get_mut(&key).ok_or("journal is not open")?;
        journal.last_used = clock;
        if journal.length != append.offset {
            return Err(failed(&"an earlier append has failed"));
        }
        if let Err(error) = journal.file.write_all(&append.records) {
            let message = failed(&error);
            // What could be written must not stay: the next records go to the same place.
            if let Err(error) = journal.file.set_len(journal.length) {
                log::error!("cannot cut off a failed append to journal {key}: {error}");
                self.journals.remove(&key);
            }
            return Err(message);
        }
        journal.length += append.records.len() as u64;
        dirty.journals.insert(key);
        Ok(())
    }

    /// Closes the journal that was used longest ago, if too many are open. Never one that still
    /// has to be synced in this group.
    fn make_room(&mut self, dirty: &Dirty) {
        if self.journals.len() < GATEWAY_OPEN_JOURNALS_MAX {
            return;
        }
        let oldest = self
            .journals
            .iter()
            .filter(|(key, _)| !dirty.journals.contains(key))
            .min_by_key(|(_, journal)| journal.last_used)
            .map(|(&key, _)| key);
        if let Some(key) = oldest {
            self.journals.remove(&key);
        }
    }

    fn load_open(&mut self) -> Result<Vec<Loaded>, String> {
        let mut open = Vec::new();
        for entry in self.index.open.iter() {
            let (task_id, _) = entry.map_err(|error| format!("index of open tasks: {error}"))?;
            let task_id = String::from_utf8_lossy(&task_id).into_owned();
            match self.load(&task_id) {
                Ok(Some(loaded)) if loaded.attempt.result.is_none() => open.push(loaded),
                Ok(_) => {
                    let removed = self.index.open.remove(task_id.as_bytes());
                    removed.map_err(|error| format!("index of open tasks: {error}"))?;
                }
                Err(error) => log::error!("task {task_id} cannot be read and is left out: {error}"),
            }
        }
        Ok(open)
    }

    fn load(&mut self, task_id: &str) -> Answer<Option<Loaded>> {
        let key = self
            .index
            .tasks
            .get(task_id.as_bytes())
            .map_err(|error| format!("cannot look up task {task_id}: {error}"))?
            .and_then(|hex| AttemptKey::parse(std::str::from_utf8(&hex).ok()?));
        let Some(key) = key else {
            return Ok(None);
        };
        let path = journal_path(&self.output, key);
        let failed =
            |error: &dyn std::fmt::Display| format!("cannot read {}: {error}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .open(&path)
            .map_err(|error| failed(&error))?;
        let mut attempt = None;
        let good = journal::scan(
            BufReader::with_capacity(1 << 18, &file),
            |header, payload| match &mut attempt {
                None => {
                    attempt = serde_json::from_slice::<TaskRecord>(payload)
                        .ok()
                        .and_then(Attempt::new);
                }
                Some(attempt) => attempt.apply(header, payload),
            },
        )
        .map_err(|error| failed(&error))?;
        let attempt = attempt.ok_or_else(|| failed(&"its first record is no task"))?;
        let length = file.metadata().map_err(|error| failed(&error))?.len();
        if good < length {
            log::warn!(
                "{}: {} bytes at the end were never acknowledged and are cut off",
                path.display(),
                length - good
            );
            file.set_len(good).map_err(|error| failed(&error))?;
        }
        // The page cache may hold what the medium does not: nothing is relied on before this.
        if self.sync {
            file.sync_data().map_err(|error| failed(&error))?;
        }
        if let Some(journal) = self.journals.get_mut(&key) {
            journal.length = good;
        }
        Ok(Some(Loaded {
            attempt,
            length: good,
        }))
    }
}

/// Holds an answer back until what it says is durable.
fn answer_with<T: 'static>(answer: Sender<Answer<T>>, result: Answer<T>) -> Box<dyn FnOnce()> {
    // The sender may have gone away; then nobody waits for the answer.
    Box::new(move || drop(answer.try_send(result)))
}
