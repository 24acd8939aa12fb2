//! How staged records become durable, in the order of their staging.

use std::rc::Rc;

use async_channel::{Receiver, Sender};

use super::delivery;
use super::hub::{Hub, State};
use super::journal::Header;
use super::store::{self, Answer, Append};

/// The attempts that an answer speaks of: it goes out when all that was staged of them is durable.
#[derive(Default)]
pub struct Batch {
    /// Task, and the number of its attempt in memory.
    tasks: Vec<(String, u64)>,
    /// Staged through this batch.
    pub bytes: usize,
}

/// A batch and who waits for it.
pub(super) type Commit = (Batch, Sender<Answer<()>>);

/// Task, number of its attempt in memory, and the end of its journal.
type Handed = (String, u64, u64);

impl Batch {
    fn add(&mut self, task_id: &str, number: u64) {
        if !self
            .tasks
            .iter()
            .any(|(id, of)| id == task_id && *of == number)
        {
            self.tasks.push((task_id.to_owned(), number));
        }
    }
}

impl Hub {
    /// The answer that belongs to `batch` speaks of this task.
    pub fn touch(&self, batch: &mut Batch, task_id: &str) {
        if let Some(live) = self.state.borrow().attempts.get(task_id) {
            batch.add(task_id, live.number);
        }
    }

    /// Applies a record to a task in memory, to be committed with `batch`.
    pub fn stage(&self, batch: &mut Batch, task_id: &str, header: Header, payload: &[u8]) {
        let mut state = self.state.borrow_mut();
        let Some(live) = state.attempts.get_mut(task_id) else {
            return;
        };
        batch.add(task_id, live.number);
        let was_open = live.attempt.result.is_none();
        delivery::record(&mut live.attempt, &mut live.staged, header, payload);
        live.appended += header.record_bytes();
        batch.bytes += usize::try_from(header.record_bytes()).unwrap_or(usize::MAX);
        if was_open && live.attempt.result.is_some() {
            state.end(task_id);
        }
    }

    /// Makes durable what is staged of the tasks of a batch. It goes on even if the receiver is
    /// dropped.
    pub fn commit(self: &Rc<Hub>, batch: Batch) -> Receiver<Answer<()>> {
        let (answer, receive) = async_channel::bounded(1);
        self.commits.borrow_mut().push_back((batch, answer));
        if !self.hands_over.replace(true) {
            self.spawn(self.clone().hand_over());
        }
        receive
    }

    async fn hand_over(self: Rc<Hub>) {
        loop {
            let next = self.commits.borrow_mut().pop_front();
            let Some((batch, answer)) = next else {
                break;
            };
            let taken = self.state.borrow_mut().take_staged(batch);
            let handed = match taken {
                Ok((tasks, appends)) => self.store.append(appends).await.map(|done| (tasks, done)),
                Err(error) => Err(error),
            };
            match handed {
                Ok((tasks, done)) => self.spawn(self.clone().settle(tasks, done, answer)),
                // Its session may have ended meanwhile.
                Err(error) => drop(answer.try_send(Err(error))),
            }
        }
        self.hands_over.set(false);
    }

    async fn settle(
        self: Rc<Hub>,
        tasks: Vec<Handed>,
        done: Receiver<Answer<()>>,
        answer: Sender<Answer<()>>,
    ) {
        let result = done
            .recv()
            .await
            .unwrap_or_else(|_| Err(store::STOPPED.into()));
        let ended = self.state.borrow_mut().settle(&tasks, &result);
        for task_id in ended {
            self.store.end_task(&task_id).await;
        }
        if result.is_err() {
            self.reload(&tasks).await;
        }
        // Its session may have ended meanwhile.
        let _ = answer.try_send(result);
    }

    /// Memory was ahead of the journals of these tasks and let go of them.
    async fn reload(&self, tasks: &[Handed]) {
        for (task_id, ..) in tasks {
            if let Err(error) = self.load(task_id).await {
                log::error!("task {task_id} is not offered before a restart: {error}");
            }
        }
    }

    /// [`Hub::commit`] for those who wait at once.
    pub async fn commit_and_wait(self: &Rc<Hub>, batch: Batch) -> Answer<()> {
        self.commit(batch)
            .recv()
            .await
            .map_err(|_| "the gateway is stopping".to_owned())?
    }
}

impl State {
    /// What is to be appended before the answer of `batch` may go out: also what others have staged
    /// of its tasks, and nothing new behind an append that is under way, to learn how that ends.
    fn take_staged(&mut self, batch: Batch) -> Answer<(Vec<Handed>, Vec<Append>)> {
        let mut tasks = Vec::new();
        let mut appends = Vec::new();
        for (task_id, number) in &batch.tasks {
            let live = self.attempts.get(task_id);
            // Without a failure it went from memory because all of it was durable.
            if live.is_none_or(|live| live.number != *number) && *number <= self.failed_up_to {
                return Err(format!("task {task_id}: an earlier append has failed"));
            }
        }
        for (task_id, number) in batch.tasks {
            let Some(live) = self.attempts.get_mut(&task_id) else {
                continue;
            };
            if live.number != number || live.durable == live.appended {
                continue;
            }
            let records = std::mem::take(&mut live.staged);
            appends.push(Append {
                key: live.key,
                offset: live.appended - records.len() as u64,
                records,
            });
            tasks.push((task_id, number, live.appended));
        }
        Ok((tasks, appends))
    }

    /// What became of a commit. Returns the tasks that have ended.
    fn settle(&mut self, tasks: &[Handed], result: &Answer<()>) -> Vec<String> {
        let mut ended = Vec::new();
        for (task_id, number, end) in tasks {
            let Some(live) = self.attempts.get_mut(task_id) else {
                continue;
            };
            if live.number != *number {
                continue;
            }
            if result.is_err() {
                // Memory is ahead of the journal: see `Hub::reload`.
                self.failed_up_to = self.failed_up_to.max(*number);
                self.close_open(task_id);
                self.ended.retain(|id| id != task_id);
                self.attempts.remove(task_id);
                continue;
            }
            let newly = live.durable < *end;
            live.durable = live.durable.max(*end);
            for watcher in &live.watchers {
                // Full: it is going to look anyway.
                let _ = watcher.try_send(());
            }
            if newly && live.durable == live.appended && live.attempt.result.is_some() {
                ended.push(task_id.clone());
            }
        }
        ended
    }
}
