//! Finals that answer a repeated delivery and wait, since output of their attempt is yet to be
//! acknowledged: over the WebSocket a final never goes before all output of its attempt
//! (PROTOCOL.md 4.4), and what has no acknowledgement may be anywhere, or not be sent yet.

use std::sync::Arc;

use crate::ids::{AttemptKey, Ids};
use crate::limits::ANSWERS_WAITING_MAX;

#[derive(Debug, Default)]
pub struct Answers {
    waiting: heapless::Vec<Waiting, ANSWERS_WAITING_MAX>,
}

#[derive(Debug)]
struct Waiting {
    ids: Arc<Ids>,
    /// Less of its output may wait than when the store was asked.
    is_due: bool,
}

impl Answers {
    /// This one waits. Beyond the bound it is left out: the server will ask again.
    pub fn wait(&mut self, ids: Arc<Ids>) {
        if !self.waiting.iter().any(|it| it.ids == ids) {
            let _ = self.waiting.push(Waiting { ids, is_due: false });
        }
    }

    /// Output of this attempt was acknowledged.
    pub fn acknowledged(&mut self, key: AttemptKey) {
        for it in self.waiting.iter_mut().filter(|it| it.ids.key() == key) {
            it.is_due = true;
        }
    }

    /// Output of some attempt was dropped.
    pub fn dropped(&mut self) {
        for it in &mut self.waiting {
            it.is_due = true;
        }
    }

    /// One to try again. If its output still waits, it comes back by [`Answers::wait`].
    pub fn next(&mut self) -> Option<Arc<Ids>> {
        let at = self.waiting.iter().position(|it| it.is_due)?;
        Some(self.waiting.swap_remove(at).ids)
    }

    /// The session is over, and with it what the server has asked.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }
}
