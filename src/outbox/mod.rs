//! The outbox: what must not be lost between the device and the server.
//!
//! Files, in the order in which a byte meets them:
//!
//! * [`types`] and [`handle`]: what the other layers see; each call is one command.
//! * `thread`: the storage thread; it commits together what it finds together.
//! * `engine`: the state; `facts`: wishes are checked and encoded; `commit`: they are made durable
//!   and only then known.
//! * `attempts`: what is known of the attempts that are open.
//! * `record`, `unit`, `segment`: the bytes; `log`: the append side; `disk`: the files.
//! * `space`: retirement, copying forward, giving up the oldest output.
//! * `reader`: replay, texts, and what a hello tells; `fresh`: the unit that is still in memory;
//!   `ahead`: finals that come before their turn.
//! * `recovery`, `opening`: from files to an engine; `memory`: the volatile store; `frozen`: a store
//!   that can be read and not be written.
//! * `moving`: what one store holds goes over into another; `aside`: stores of newer agents.
//! * `index`: attempts that are done; the only place that names sled.
//!
//! Invariants:
//!
//! 1. A fact is answered and known only after it is durable. Acknowledgements are the exception:
//!    a lost one costs a repeat.
//! 2. The log alone tells all of every open attempt; the index remembers those that are done.
//! 3. A segment is given up only after all that it alone knew is durable elsewhere.
//! 4. Memory holds a summary for each open attempt, segment and stream, nothing for a chunk but
//!    those of the last commit.

mod ahead;
mod aside;
mod attempts;
#[cfg(test)]
mod comebacks;
mod commit;
#[cfg(test)]
mod crashes;
mod disk;
mod engine;
mod facts;
mod fresh;
mod frozen;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod handle;
#[cfg(test)]
mod histories;
mod index;
mod log;
mod memory;
#[cfg(test)]
mod model;
mod moving;
mod opening;
mod reader;
mod record;
mod recovery;
#[cfg(test)]
mod regressions;
mod segment;
#[cfg(test)]
mod sim;
#[cfg(test)]
pub mod simulated;
#[cfg(test)]
mod sizes;
mod space;
#[cfg(test)]
mod tests;
mod thread;
pub mod types;
mod unit;

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::ids::Incarnation;
use crate::limits::STORAGE_QUEUE;

pub use disk::lock_folder;
pub use handle::{Acks, AppendError, FinishError, Handle, Submitted};
pub use types::*;

/// Opens the index of the store in `dir` and walks it, with a memory limit set on this process.
/// Run in a child process after an unclean stop, since a damaged index can panic, hang or balloon.
pub fn check_index(dir: &Path) -> bool {
    opening::check_index(dir)
}

/// A look at a store that no agent has open: what the last clean stop left behind, else what the
/// log says; that may count messages that are acknowledged. Writes nothing.
///
/// # Errors
/// The folder of the log cannot be read.
pub fn inspect(dir: &Path, cap_bytes: u64) -> io::Result<Counts> {
    opening::inspect(dir, cap_bytes)
}

/// Opens the store and starts its thread. Never fails: where the disk cannot be used the store is
/// in memory, loudly, and moves to the disk when it can ([`Handle::reopened`]).
pub async fn open(settings: Settings) -> (Handle, Recovered) {
    let (commands, queue) = async_channel::bounded(STORAGE_QUEUE);
    let (news, appended) = async_channel::bounded(1);
    let (moved, reopened) = async_channel::bounded(1);
    let (ready, opened) = async_channel::bounded(1);
    let run = move || {
        let (engine, recovered, reason) = opening::open_any(&settings);
        let incarnations = Arc::new(handle::Incarnations {
            first: engine.incarnation(),
            second: OnceLock::new(),
        });
        let volatile = reason.map(|reason| thread::Volatile {
            reopening: reason.is_some().then(|| opening::Reopening {
                settings,
                reopened: moved,
                opened: None,
                incarnations: Arc::clone(&incarnations),
            }),
            reason,
        });
        engine::answer(ready, (incarnations, recovered));
        let storage = thread::Storage {
            engine,
            commands: queue,
            appended: news,
            volatile,
            moved: false,
        };
        storage.run();
    };
    let thread = std::thread::Builder::new().name("outbox".to_owned());
    let handle = |incarnations| Handle {
        commands,
        appended,
        reopened,
        incarnations,
    };
    if let Err(why) = thread.spawn(run) {
        ::log::error!("cannot start the storage thread: {why}; nothing can be stored");
    }
    match opened.recv().await {
        Ok((incarnations, recovered)) => (handle(incarnations), recovered),
        // No thread: every call will say that the store is closed.
        Err(_) => {
            let closed = Arc::new(handle::Incarnations {
                first: Incarnation::of(0),
                second: OnceLock::new(),
            });
            (handle(closed), Recovered::default())
        }
    }
}
