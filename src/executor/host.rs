//! What all tasks of an agent share: how their processes are marked, which run, and what becomes
//! of those that outlive their shell.
//!
//! Every process of a task carries [`MARK`] in its environment: the agent (one state directory of
//! one device) and the attempt. So an agent that was killed finds, at its next start, what its
//! tasks have left behind, whoever has got their process ids since: the mark belongs to the
//! process itself and not to a number that was noted.
//!
//! While it runs the agent is a child subreaper: what a task leaves behind without a parent
//! becomes the agent's child. So everything that lives of a task is below the agent, also
//! daemons that have left their group and session and have thrown their environment away.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use log::{debug, warn};
use rustix::process::{Pid, WaitId, WaitIdOptions, getpid, getppid, set_child_subreaper, waitid};

use super::cgroup::{Bounds, Cgroups, Leaf, Used};
use super::emptying;
use super::ending::Hunt;
use super::procfs::{self, Process};
use super::record::{Noted, Record};
use super::setup::Setup;
use crate::ids::AttemptKey;
use crate::limits::{LEFTOVER_GRACE, OOM_SCORE_MAX, OOM_SCORE_OF_TASKS};

/// The variable by which processes of tasks are known.
pub const MARK: &str = "HOSTLINK_TASK_MARK";

/// What becomes of processes that a task leaves behind when its shell ends by itself. A task that
/// is ended from outside leaves nothing behind either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Leftovers {
    #[default]
    Kill,
    Keep,
}

#[derive(Debug, Default)]
pub struct Host {
    /// Names this agent among all of the device.
    agent: String,
    pub leftovers: Leftovers,
    pub setup: Setup,
    cgroups: Option<Cgroups>,
    record: Option<Record>,
    /// Leaders that an earlier life of the agent has noted.
    noted: Vec<Noted>,
    /// Orphans of tasks become children of this process.
    adopts: Cell<bool>,
    /// Nobody but tasks can have left children to this process.
    adopts_only_own: Cell<bool>,
    running: RefCell<Vec<(Pid, AttemptKey)>>,
}

impl Host {
    /// `agent` is the same for every start on the same state, and for no other agent.
    pub fn new(agent: &str, leftovers: Leftovers, setup: Setup) -> Host {
        Host {
            agent: agent.to_owned(),
            leftovers,
            setup,
            ..Host::default()
        }
    }

    /// Makes this process the one that orphans of its tasks go to. Tasks are then to be started by
    /// the main thread only.
    pub fn adopt_orphans(&self) {
        // Process 1 gets everybody's orphans. Others may have been left children by the program
        // that they were before.
        let has_strangers = getpid().as_raw_pid() == 1 || !procfs::children().is_empty();
        match set_child_subreaper(Some(getpid())) {
            Ok(()) => {
                self.adopts.set(true);
                self.adopts_only_own.set(!has_strangers);
            }
            Err(error) => warn!("orphans of tasks are found by their environment only: {error}"),
        }
    }

    /// Gives every task a cgroup of its own.
    pub fn with_cgroups(self, cgroups: Cgroups) -> Host {
        Host {
            cgroups: Some(cgroups),
            ..self
        }
    }

    /// Notes who leads a task in this file, for the next start.
    pub fn with_record(self, path: &Path) -> Host {
        match Record::open(path) {
            Ok((record, noted)) => Host {
                record: Some(record),
                noted,
                ..self
            },
            Err(error) => {
                debug!(
                    "leaders of tasks are not noted in {}: {error}",
                    path.display()
                );
                self
            }
        }
    }

    /// Makes the cgroup of a task, and returns the file by which it is entered. An error if there
    /// is none although it was to bound the task.
    pub(super) fn enter_cgroup(&self, key: AttemptKey) -> Result<Option<PathBuf>, String> {
        let Some(cgroups) = &self.cgroups else {
            return Ok(None);
        };
        match cgroups.make(key) {
            Ok(leaf) => Ok(Some(leaf.procs())),
            Err(why) if cgroups.bounds() == Bounds::default() => {
                warn!("a task runs without a cgroup of its own: {why}");
                Ok(None)
            }
            Err(why) => Err(format!("the task cannot be bounded: {why}")),
        }
    }

    /// The cgroup of a task, which may not be there.
    pub(super) fn leaf(&self, key: AttemptKey) -> Option<Leaf> {
        self.cgroups.as_ref().map(|cgroups| cgroups.leaf(key))
    }

    /// After the end of a task.
    pub(super) fn leave_cgroup(&self, key: AttemptKey) -> Option<Used> {
        let leaf = self.leaf(key)?;
        let used = leaf.used();
        leaf.remove();
        Some(used)
    }

    /// Starts a process that the kernel, short of memory, ends before this one: it inherits our
    /// place in that order, so ours is changed meanwhile.
    pub(super) fn as_first_victim<T>(&self, spawn: impl FnOnce() -> T) -> T {
        const FILE: &str = "/proc/self/oom_score_adj";
        let own = std::fs::read_to_string(FILE).ok();
        let own: Option<i32> = own.and_then(|text| text.trim().parse().ok());
        // Where it cannot be read, or set, tasks are as likely to be ended as the agent.
        let Some(own) = own else { return spawn() };
        let of_tasks = (own + OOM_SCORE_OF_TASKS).min(OOM_SCORE_MAX);
        let _ = std::fs::write(FILE, of_tasks.to_string());
        let spawned = spawn();
        let _ = std::fs::write(FILE, own.to_string());
        spawned
    }

    /// Removes the cgroups that nobody lives in any more.
    pub fn close(&self) {
        if let Some(cgroups) = &self.cgroups {
            cgroups.close();
        }
    }

    /// The value of [`MARK`] for a task.
    pub fn mark(&self, key: AttemptKey) -> String {
        format!("{}-{key}", self.agent)
    }

    pub(super) fn has_started(&self, leader: Pid, key: AttemptKey) {
        self.running.borrow_mut().push((leader, key));
        if let Some(record) = &self.record {
            record.has_started(leader, key);
        }
    }

    pub(super) fn has_ended(&self, leader: Pid) {
        self.running.borrow_mut().retain(|(id, _)| *id != leader);
        if let Some(record) = &self.record {
            record.has_ended(leader);
        }
    }

    /// Collects orphans of tasks that have exited.
    pub fn collect_adopted(&self) {
        if !self.adopts.get() {
            return;
        }
        for child in procfs::children() {
            if child.is_dead && !self.is_leader(child.id) && !super::process::is_dropped(child.id) {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                let _ = waitid(WaitId::Pid(child.id), options);
            }
        }
    }

    fn is_leader(&self, id: Pid) -> bool {
        self.running
            .borrow()
            .iter()
            .any(|(leader, _)| *leader == id)
    }

    /// The processes of a task that runs, or whose leader has not been collected yet.
    pub(super) fn hunt(
        &self,
        leader: Pid,
        key: AttemptKey,
    ) -> Hunt<impl Fn(&[Process]) -> Vec<Process>> {
        Hunt::new(move |known| self.living(leader, key, known))
    }

    /// Who is alive of a task, and of those who were before.
    pub(super) fn living(&self, leader: Pid, key: AttemptKey, known: &[Process]) -> Vec<Process> {
        let mut tops = self.leaf(key).map_or_else(Vec::new, |leaf| leaf.living());
        if self.adopts.get() {
            let mut children = procfs::children();
            children.retain(|child| !child.is_dead && self.is_of(child, leader, key));
            tops.extend(children);
            if tops.is_empty() && known.is_empty() {
                return tops;
            }
        }
        let all = procfs::all();
        if !self.adopts.get() {
            let group = leader.as_raw_pid();
            let is_own = |it: &&Process| {
                !it.is_dead && (it.group == group || self.marked(it.id) == Some(key))
            };
            tops.extend(all.iter().filter(is_own));
        }
        family(tops, known, &all, &[])
    }

    /// Whether a child of the agent belongs to the task.
    fn is_of(&self, child: &Process, leader: Pid, key: AttemptKey) -> bool {
        if child.id == leader || child.group == leader.as_raw_pid() {
            return true;
        }
        let running = self.running.borrow();
        let is_of_another = |(id, _): &(Pid, AttemptKey)| {
            *id != leader && (*id == child.id || id.as_raw_pid() == child.group)
        };
        if running.iter().any(is_of_another) {
            return false;
        }
        match self.marked(child.id) {
            Some(marked) => marked == key,
            // Nothing tells whose it is. The last task that runs answers for it, unless it may be
            // a stranger's or one that was to be kept.
            None => {
                running.len() <= 1
                    && self.adopts_only_own.get()
                    && self.leftovers == Leftovers::Kill
            }
        }
    }

    /// Whether it leads a task of an earlier life, or is in the group of one that still lives.
    fn is_noted(&self, process: &Process) -> bool {
        let mut noted = self.noted.iter().map(|it| &it.leader);
        noted.any(|leader| {
            let is_leader = leader.id == process.id && leader.started == process.started;
            // While the leader lives its id is no other group's.
            is_leader || process.group == leader.id.as_raw_pid() && leader.is_same()
        })
    }

    /// The attempt that a process belongs to, by its mark.
    fn marked(&self, id: Pid) -> Option<AttemptKey> {
        let prefix = format!("{MARK}={}-", self.agent);
        let found = Cell::new(None);
        procfs::environment_has(id, |entry| {
            let key = entry
                .strip_prefix(prefix.as_bytes())
                .and_then(|key| AttemptKey::parse(std::str::from_utf8(key).ok()?));
            if key.is_some() {
                found.set(key);
            }
            key.is_some()
        });
        found.get()
    }

    /// Ends what tasks of an earlier life of this agent have left running: all of it, or with
    /// [`Leftovers::Keep`] what belongs to `interrupted` attempts. To be called before any task is
    /// started. Returns how many processes there were.
    pub async fn end_old_tasks(&self, interrupted: &[AttemptKey]) -> usize {
        // A task may have started this agent.
        let spared = ancestors();
        let is_meant = |key: &AttemptKey| {
            self.leftovers == Leftovers::Kill
                || interrupted.contains(key)
                || self.noted.iter().any(|it| it.key == *key)
        };
        let look = |known: &[Process]| {
            let all = procfs::all();
            let is_old = |it: &Process| {
                let is_spared = spared.contains(&it.id);
                let is_marked = || self.marked(it.id).is_some_and(|key| is_meant(&key));
                !it.is_dead && !is_spared && (self.is_noted(it) || is_marked())
            };
            let mut old: Vec<Process> = all.iter().filter(|it| is_old(it)).copied().collect();
            if let Some(cgroups) = &self.cgroups {
                for key in cgroups.leaves().into_iter().filter(is_meant) {
                    old.extend(cgroups.leaf(key).living());
                }
            }
            family(old, known, &all, &spared)
        };
        let mut leaves = Vec::new();
        if let Some(cgroups) = &self.cgroups {
            let meant = cgroups.leaves().into_iter().filter(is_meant);
            leaves.extend(meant.map(|key| cgroups.leaf(key)));
            leaves.retain(|leaf| !leaf.holds(&spared));
        }
        let count = emptying::end(&leaves, LEFTOVER_GRACE).await;
        let count = count + Hunt::new(look).end(LEFTOVER_GRACE).await;
        if let Some(record) = &self.record {
            record.clear();
        }
        if let Some(cgroups) = &self.cgroups {
            cgroups.remove_leaves();
        }
        count
    }
}

/// This process, its parent, and so on.
fn ancestors() -> Vec<Pid> {
    let mut found = vec![getpid()];
    let mut next = getppid();
    while let Some(id) = next
        && !found.contains(&id)
    {
        found.push(id);
        next = procfs::find(id).and_then(|it| Pid::from_raw(it.parent));
    }
    found
}

/// Those found now and those known before, as far as they are alive, with all their descendants;
/// but none of `spared`, nor what descends from them alone.
fn family(found: Vec<Process>, known: &[Process], all: &[Process], spared: &[Pid]) -> Vec<Process> {
    let known: HashSet<(Pid, u64)> = known.iter().map(|it| (it.id, it.started)).collect();
    let is_known = |it: &&Process| known.contains(&(it.id, it.started));
    let mut living: Vec<&Process> = all.iter().filter(|it| !it.is_dead).collect();
    let mut met: HashSet<Pid> = spared.iter().copied().collect();
    let mut members = found;
    members.extend(living.iter().copied().filter(is_known));
    members.retain(|it| met.insert(it.id));
    living.sort_unstable_by_key(|it| it.parent);
    let mut next = 0;
    while next < members.len() {
        let parent = members[next].id.as_raw_pid();
        let first = living.partition_point(|it| it.parent < parent);
        let children = living[first..].iter().take_while(|it| it.parent == parent);
        for child in children {
            if met.insert(child.id) {
                members.push(**child);
            }
        }
        next += 1;
    }
    members
}
