//! Tasks as they are offered, recorded, started and ended (PROTOCOL.md 3 and 4.6).

use std::sync::Arc;

use log::warn;

use super::tasks::{QueuedTask, Tasks};
use super::{Effect, Now, Origin, Recorded, Session};
use crate::ids::{AttemptKey, Ids};
use crate::wire::{Piece, TaskOffer};

impl<C: Copy + Ord + Default> Session<C> {
    /// Attempts that recovery found received and not started, in order of arrival.
    pub fn recovered(&mut self, queued: impl Iterator<Item = QueuedTask>) {
        for task in queued {
            self.tasks.push(task);
        }
        self.reports.look_again();
    }

    /// A task is offered: `delivered` over the WebSocket, or by poll or heartbeat.
    pub fn offered(&mut self, offer: TaskOffer, delivered: bool, now: Now) {
        let command_bytes = offer.command.len();
        if !self.tasks.has_room_for(command_bytes) {
            if self.room_wanted.is_none() {
                warn!(
                    "task {}: refused, {} tasks are waiting already",
                    offer.ids,
                    self.tasks.waiting()
                );
            }
            self.room_wanted = Some(now);
            self.poll.at_once();
            return;
        }
        self.tasks.begin_recording(offer.ids.key(), command_bytes);
        self.effects.push_back(Effect::Record {
            offer: Box::new(offer),
            origin: Origin {
                delivered,
                command_bytes,
            },
        });
    }

    /// Answer to [`Effect::Record`]. Polls know what they offer: only a delivery of a known attempt
    /// is answered, and a new one is always told.
    pub fn recorded(&mut self, task: QueuedTask, outcome: Recorded, origin: Origin, now: Now) {
        let ids = task.ids.clone();
        let key = ids.key();
        let (arrival, cancelled) = self.tasks.end_recording(key, origin.command_bytes);
        let answers = self.link.is_active() && ids.has_result_channel();
        match outcome {
            Recorded::New => {
                if answers {
                    self.effects.push_back(Effect::SendReceived(ids.clone()));
                }
                match cancelled {
                    None => self.tasks.insert(arrival, task),
                    Some(reason) => self.effects.push_back(Effect::Interrupt { ids, reason }),
                }
            }
            Recorded::NoRoom => {
                self.room_wanted = Some(now + self.settings.poll_interval);
            }
            _ if !answers || !origin.delivered => {}
            Recorded::Received | Recorded::Discarded => {
                self.effects.push_back(Effect::SendReceived(ids));
            }
            Recorded::Started => self.effects.push_back(Effect::SendStarted(ids)),
            // The report on its way is the answer: a final goes one way.
            Recorded::Finished { .. } if self.reports.busy() == Some(key) => {}
            Recorded::Finished { held } => {
                // A final that the cursor has not reached yet comes in its order.
                let is_next = !held || self.delivery.has_in_flight(key, Piece::Final);
                if is_next && self.answers.owe(&ids) {
                    self.effects.push_back(Effect::SendFinalAgain(ids));
                }
            }
        }
    }

    /// Answer to [`Effect::SendFinalAgain`]. It `waits` if the final is done and output of the
    /// attempt is not.
    pub fn answered(&mut self, ids: &Arc<Ids>, waits: bool) {
        self.answers.asked(ids, waits);
    }

    /// A process runs.
    pub fn task_started(&mut self, key: AttemptKey, now: Now) {
        let Some(task) = self.tasks.started(key, now) else {
            return;
        };
        let ids = task.ids.clone();
        if self.link.is_active() && ids.has_result_channel() {
            self.effects.push_back(Effect::SendStarted(ids));
        }
    }

    /// A task no longer runs, or could not be started; its final is stored or reported.
    pub fn task_ended(&mut self, key: AttemptKey) {
        self.tasks.ended(key);
        self.final_stored();
    }

    /// From now on nothing is accepted or started.
    pub fn stop_taking_tasks(&mut self) {
        self.tasks.stop();
    }

    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }
}
