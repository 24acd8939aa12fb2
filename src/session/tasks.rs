//! Which attempts wait and which run: in order of priority, then of arrival.

use std::sync::Arc;

use super::Now;
use crate::ids::{AttemptKey, Ids};
use crate::limits::{CONCURRENCY_MAX, RECORDING_BYTES_MAX, TASK_QUEUE_MAX};

/// A recorded attempt that waits for its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuedTask {
    pub ids: Arc<Ids>,
    /// A larger number is more urgent.
    pub priority: i64,
    pub timeout_seconds: Option<u64>,
}

#[derive(Debug, Clone)]
pub struct RunningTask {
    pub ids: Arc<Ids>,
    pub key: AttemptKey,
    /// `None` until its process runs.
    pub started_at: Option<Now>,
}

/// A receipt under way.
#[derive(Debug)]
struct Recording {
    key: AttemptKey,
    arrival: u64,
    /// Why it is not to be started.
    cancelled: Option<String>,
}

#[derive(Debug)]
pub struct Tasks {
    /// With their arrival, in order of it.
    queue: Vec<(u64, QueuedTask)>,
    next_arrival: u64,
    /// Receipts under way: they will need a place.
    recording: Vec<Recording>,
    /// Their commands.
    recording_bytes: usize,
    running: heapless::Vec<RunningTask, CONCURRENCY_MAX>,
    concurrency: usize,
    stopping: bool,
}

impl Tasks {
    pub fn new(concurrency: usize) -> Tasks {
        Tasks {
            queue: Vec::new(),
            next_arrival: 0,
            recording: Vec::new(),
            recording_bytes: 0,
            running: heapless::Vec::new(),
            concurrency: concurrency.clamp(1, CONCURRENCY_MAX),
            stopping: false,
        }
    }

    /// Whether a further attempt may be recorded.
    pub fn has_room(&self) -> bool {
        !self.stopping && self.waiting() < TASK_QUEUE_MAX
    }

    /// Whether a command of this size may be held until it is recorded.
    pub fn has_room_for(&self, command_bytes: usize) -> bool {
        let fits = self.recording_bytes + command_bytes <= RECORDING_BYTES_MAX;
        self.has_room() && (fits || self.recording.is_empty())
    }

    pub fn begin_recording(&mut self, key: AttemptKey, command_bytes: usize) {
        self.next_arrival += 1;
        self.recording.push(Recording {
            key,
            arrival: self.next_arrival,
            cancelled: None,
        });
        self.recording_bytes += command_bytes;
    }

    /// Its arrival, and the reason if it was cancelled meanwhile.
    pub fn end_recording(
        &mut self,
        key: AttemptKey,
        command_bytes: usize,
    ) -> (u64, Option<String>) {
        self.recording_bytes = self.recording_bytes.saturating_sub(command_bytes);
        match self.recording.iter().position(|it| it.key == key) {
            Some(index) => {
                let recording = self.recording.remove(index);
                (recording.arrival, recording.cancelled)
            }
            None => (self.next_arrival, None),
        }
    }

    /// Cancels an attempt whose receipt is under way. False if there is none.
    pub fn cancel_recording(&mut self, key: AttemptKey, reason: &str) -> bool {
        let mut found = false;
        for recording in self.recording.iter_mut().filter(|it| it.key == key) {
            recording.cancelled = Some(reason.to_owned());
            found = true;
        }
        found
    }

    /// Queues a recovered attempt behind all others. They may be more than [`TASK_QUEUE_MAX`]:
    /// they have been promised already, and the store bounds them.
    pub fn push(&mut self, task: QueuedTask) {
        self.next_arrival += 1;
        self.insert(self.next_arrival, task);
    }

    /// Queues a recorded attempt by its arrival: receipts may be confirmed in another order.
    pub fn insert(&mut self, arrival: u64, task: QueuedTask) {
        let behind = |(other, _): &(u64, QueuedTask)| *other <= arrival;
        let index = self.queue.partition_point(behind);
        self.queue.insert(index, (arrival, task));
    }

    /// Takes an attempt that has not started out of the queue.
    pub fn remove(&mut self, key: AttemptKey) -> Option<QueuedTask> {
        let mine = |(_, task): &(u64, QueuedTask)| task.ids.key() == key;
        let index = self.queue.iter().position(mine)?;
        Some(self.queue.remove(index).1)
    }

    /// The next attempt to start, which then holds a place until [`Tasks::ended`].
    pub fn start_next(&mut self) -> Option<QueuedTask> {
        if self.stopping || self.running.len() >= self.concurrency {
            return None;
        }
        let priorities = self.queue.iter().map(|(_, task)| task.priority);
        let most_urgent = priorities.clone().max()?;
        let index = priorities.clone().position(|it| it == most_urgent)?;
        let (_, task) = self.queue.remove(index);
        let place = self.running.push(RunningTask {
            ids: task.ids.clone(),
            key: task.ids.key(),
            started_at: None,
        });
        debug_assert!(place.is_ok(), "concurrency is within its bound");
        Some(task)
    }

    /// Its process runs.
    pub fn started(&mut self, key: AttemptKey, now: Now) -> Option<&RunningTask> {
        let task = self.running.iter_mut().find(|task| task.key == key)?;
        task.started_at = Some(now);
        Some(task)
    }

    pub fn ended(&mut self, key: AttemptKey) {
        self.running.retain(|task| task.key != key);
    }

    /// From now on nothing is accepted or started.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Oldest start first.
    pub fn running(&self) -> &[RunningTask] {
        &self.running
    }

    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Those that wait for their receipt or their start.
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.recording.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(name: &str, priority: i64) -> QueuedTask {
        QueuedTask {
            ids: Arc::new(Ids::new(name, "a").expect("short")),
            priority,
            timeout_seconds: None,
        }
    }

    fn started(tasks: &mut Tasks) -> Option<String> {
        tasks.start_next().map(|task| task.ids.task.to_string())
    }

    #[test]
    fn priority_goes_first_then_arrival_and_places_are_bounded() {
        let mut tasks = Tasks::new(2);
        for (name, priority) in [("a", 0), ("b", 5), ("c", 5), ("d", -1)] {
            tasks.push(task(name, priority));
        }
        assert_eq!(started(&mut tasks).as_deref(), Some("b"));
        assert_eq!(started(&mut tasks).as_deref(), Some("c"));
        assert_eq!(started(&mut tasks), None, "both places are taken");
        tasks.ended(AttemptKey::of("b", "a"));
        assert_eq!(started(&mut tasks).as_deref(), Some("a"));
        assert!(tasks.remove(AttemptKey::of("d", "a")).is_some());
        tasks.ended(AttemptKey::of("c", "a"));
        assert_eq!(started(&mut tasks), None, "the queue is empty");
    }

    #[test]
    fn what_is_confirmed_later_keeps_its_place() {
        let mut tasks = Tasks::new(1);
        for name in ["a", "b", "c"] {
            tasks.begin_recording(AttemptKey::of(name, "a"), 0);
        }
        for name in ["c", "a", "b"] {
            let (arrival, _) = tasks.end_recording(AttemptKey::of(name, "a"), 0);
            tasks.insert(arrival, task(name, 0));
        }
        for name in ["a", "b", "c"] {
            assert_eq!(started(&mut tasks).as_deref(), Some(name));
            tasks.ended(AttemptKey::of(name, "a"));
        }
    }

    #[test]
    fn commands_that_are_being_recorded_are_bounded_in_bytes() {
        let mut tasks = Tasks::new(1);
        assert!(tasks.has_room_for(RECORDING_BYTES_MAX + 1), "alone");
        let key = AttemptKey::of("t", "a");
        tasks.begin_recording(key, RECORDING_BYTES_MAX - 1);
        assert!(tasks.has_room_for(1));
        assert!(!tasks.has_room_for(2));
        tasks.end_recording(key, RECORDING_BYTES_MAX - 1);
        assert!(tasks.has_room_for(2));
    }

    #[test]
    fn receipts_under_way_count_as_queued() {
        let mut tasks = Tasks::new(1);
        let key = AttemptKey::of("t", "a");
        for _ in 0..TASK_QUEUE_MAX {
            assert!(tasks.has_room());
            tasks.begin_recording(key, 0);
        }
        assert!(!tasks.has_room());
        tasks.end_recording(key, 0);
        assert!(tasks.has_room());
        tasks.stop();
        assert!(!tasks.has_room());
    }
}
