//! Finals that answer a repeated delivery. One whose attempt has output that is yet to be acknowledged
//! waits: over the WebSocket a final never goes before all output of its attempt (PROTOCOL.md 4.4),
//! and what has no acknowledgement may be anywhere, or not be sent yet.
//!
//! The store knows whether output waits, and its word may be old when it comes. So a final is noted
//! before the store is asked: an acknowledgement that comes in between is not missed.

use std::sync::Arc;

use crate::ids::{AttemptKey, Ids};
use crate::limits::ANSWERS_WAITING_MAX;

#[derive(Debug, Default)]
pub struct Answers {
    owed: heapless::Vec<Owed, ANSWERS_WAITING_MAX>,
}

#[derive(Debug)]
struct Owed {
    ids: Arc<Ids>,
    /// The store is being asked for it.
    is_asked: bool,
    /// Less of its output may wait than when the store was asked.
    is_due: bool,
}

impl Answers {
    /// The server wants this one. True if the store is to be asked. Beyond the bound it is asked
    /// all the same; if output waits then, the final is left out, and the server will ask again.
    pub fn owe(&mut self, ids: &Arc<Ids>) -> bool {
        if let Some(known) = self.owed.iter_mut().find(|it| it.ids == *ids) {
            known.is_due = false;
            return !std::mem::replace(&mut known.is_asked, true);
        }
        let _ = self.owed.push(Owed {
            ids: ids.clone(),
            is_asked: true,
            is_due: false,
        });
        true
    }

    /// The store was asked: the final has gone out, or output of its attempt waits.
    pub fn asked(&mut self, ids: &Arc<Ids>, waits: bool) {
        match self.owed.iter().position(|it| it.ids == *ids) {
            Some(at) if waits => self.owed[at].is_asked = false,
            Some(at) => drop(self.owed.swap_remove(at)),
            None => {}
        }
    }

    /// Output of this attempt was acknowledged.
    pub fn acknowledged(&mut self, key: AttemptKey) {
        for it in self.owed.iter_mut().filter(|it| it.ids.key() == key) {
            it.is_due = true;
        }
    }

    /// Output of some attempt was dropped.
    pub fn dropped(&mut self) {
        for it in &mut self.owed {
            it.is_due = true;
        }
    }

    /// One to ask the store for again.
    pub fn next(&mut self) -> Option<Arc<Ids>> {
        let due = |it: &&mut Owed| it.is_due && !it.is_asked;
        let next = self.owed.iter_mut().find(due)?;
        (next.is_asked, next.is_due) = (true, false);
        Some(next.ids.clone())
    }

    /// The session is over, and with it what the server has asked.
    pub fn clear(&mut self) {
        self.owed.clear();
    }
}
