//! Opening the store of the settings: on disk, or in memory where the disk cannot be used.
//!
//! ```text
//! DIR/clean            there after a clean stop; holds the counts of that moment
//! DIR/index/           sled
//! DIR/spool/N.seg      the log
//! DIR.format-V-N/      a store of a newer agent (`aside`)
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, WaitId, WaitIdOptions, pidfd_open, setrlimit, waitid,
};

use super::aside;
use super::disk::{Disk, RealDisk, sync_folder};
use super::engine::{Bounds, Engine};
use super::frozen;
use super::handle::Incarnations;
use super::index::{self, SledIndex};
use super::memory::{MemoryDisk, MemoryIndex};
use super::moving::Source;
use super::recovery::{self, OpenError};
use super::types::*;
use crate::clock;
use crate::ids::Incarnation;
use crate::limits::{
    EXIT_POLL_INTERVAL, FINAL_OUTPUT_BYTES_MAX, INDEX_CHECK_MEMORY_BYTES, INDEX_CHECK_TIMEOUT,
    MEMORY_STORE_BYTES, SEGMENTS_MIN, SPOOL_CAP_BYTES_MAX, SPOOL_CAP_BYTES_MIN,
    TERMINAL_RESERVE_BYTES_MIN,
};

const CLEAN_FILE: &str = "clean";
pub(super) const INDEX_DIR: &str = "index";
pub(super) const SPOOL_DIR: &str = "spool";

/// Opens the store that the settings ask for, or the volatile one. The third is `None` for a store
/// on disk, else why it is in memory, as far as it was not chosen.
pub(super) fn open_any(settings: &Settings) -> (Engine, Recovered, Option<Option<String>>) {
    if settings.memory_only {
        return (open_memory(settings), Recovered::default(), Some(None));
    }
    match open_disk(settings) {
        Ok((engine, recovered)) => (engine, recovered, None),
        Err(why) => {
            log::error!("{}", failure(settings, &why));
            (open_memory(settings), Recovered::default(), Some(Some(why)))
        }
    }
}

/// Opens the store on disk.
fn open_disk(settings: &Settings) -> Result<(Engine, Recovered), String> {
    let (mut engine, mut recovered) = open_disk_in_use(settings)?;
    aside::take_back(settings, &mut engine, &mut recovered);
    engine.news = false;
    Ok((engine, recovered))
}

fn open_disk_in_use(settings: &Settings) -> Result<(Engine, Recovered), String> {
    open_disk_once(settings).or_else(|why| match why {
        OpenError::Newer(version) => aside::set_aside(&settings.dir, version)
            .and_then(|()| match open_disk_once(settings) {
                Ok(opened) => Ok(opened),
                Err(OpenError::Io(why)) => Err(why),
                Err(OpenError::Newer(_)) => Err(io::Error::other("it is of a newer format")),
            })
            .map_err(|why| why.to_string()),
        OpenError::Io(why) => Err(why.to_string()),
    })
}

pub(super) fn open_disk_once(settings: &Settings) -> Result<(Engine, Recovered), OpenError> {
    let dir = &settings.dir;
    let mut disk = RealDisk::new(&dir.join(SPOOL_DIR))?;
    // Looks before anything is changed: a newer store stays as it is.
    let scan = recovery::scan(&mut disk, random_name())?;
    let clean = take_clean_mark(dir)?;
    let index_dir = dir.join(INDEX_DIR);
    let trusted = clean
        || !index_dir.exists()
        || settings
            .index_checker
            .as_ref()
            .is_none_or(|checker| passes_check(checker, &index_dir));
    let index = SledIndex::open(&index_dir, trusted)?;
    let rebuilt = index.was_rebuilt();
    let (mut engine, recovered) = recovery::open_scanned(
        Box::new(disk),
        scan,
        Box::new(index),
        bounds(settings),
        wall_ms,
    )?;
    engine.tally.index_rebuilt |= rebuilt;
    engine.clean_mark = Some(dir.join(CLEAN_FILE));
    Ok((engine, recovered))
}

/// Opens a store in memory, beside what can be read of the one on disk.
pub(super) fn open_memory(settings: &Settings) -> Engine {
    let disk: Box<dyn Disk> = Box::new(MemoryDisk::default());
    let cap_bytes = MEMORY_STORE_BYTES as u64;
    let bounds = Bounds {
        cap_bytes,
        terminal_reserve_bytes: settings.terminal_reserve_bytes.min(cap_bytes / 4),
        final_output_bytes: settings.final_output_bytes.min(MEMORY_STORE_BYTES / 16),
    };
    let index = Box::new(MemoryIndex::default());
    match recovery::open(disk, index, bounds, random_name(), wall_ms) {
        Ok((mut engine, _)) => {
            engine.frozen = frozen::open(settings).map(Box::new);
            engine
        }
        Err(_) => unreachable!("opening an empty store in memory meets no disk"),
    }
}

/// A look at a store that no agent has open.
pub(super) fn inspect(dir: &Path, cap_bytes: u64) -> io::Result<Counts> {
    let stopped_with = std::fs::read(dir.join(CLEAN_FILE))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Counts>(&bytes).ok());
    if let Some(counts) = stopped_with {
        return Ok(counts);
    }
    let mut disk = RealDisk::existing(&dir.join(SPOOL_DIR));
    match recovery::scan(&mut disk, Incarnation::of(0)) {
        Ok(scan) => Ok(scan.counts(cap_bytes)),
        Err(OpenError::Io(why)) => Err(why),
        Err(OpenError::Newer(version)) => Err(io::Error::other(format!(
            "the store was written by a newer agent, in format {version}"
        ))),
    }
}

/// Leaving memory for the disk.
pub(super) struct Reopening {
    pub settings: Settings,
    pub reopened: Sender<Recovered>,
    pub incarnations: Arc<Incarnations>,
    /// The store on disk, if it could be opened but did not take what memory holds. It is not
    /// opened anew: what it wrote in vain is known to be void as long as it stays open.
    pub opened: Option<Box<(Engine, Recovered)>>,
}

impl Reopening {
    /// Opens the disk and moves there what memory holds. After an error memory holds it still.
    pub fn try_disk(&mut self, memory: &mut Engine) -> Result<Engine, String> {
        let opened = match self.opened.take() {
            Some(opened) => Ok(*opened),
            None => open_disk(&self.settings),
        };
        let moved = opened.and_then(|(mut engine, recovered)| {
            match engine.absorb(memory, Source::Younger) {
                Ok(()) => Ok((engine, recovered)),
                Err(why) => {
                    self.opened = Some(Box::new((engine, recovered)));
                    Err(why.to_string())
                }
            }
        });
        let (mut engine, mut recovered) = moved.inspect_err(|why| {
            log::warn!(
                "the outbox is still in memory: {}",
                failure(&self.settings, why)
            );
        })?;
        engine.tally.add(&memory.tally);
        recovered.queued.retain(|task| {
            let key = task.ids.key();
            let attempt = engine.attempts.get(&key);
            // What memory has received is queued already.
            attempt.is_some_and(|attempt| attempt.phase() == Phase::Received)
                && !memory.attempts.contains_key(&key)
        });
        log::info!(
            "the outbox is on disk again, in {}; {} attempts came from memory, {} tasks waited \
             there",
            self.settings.dir.display(),
            memory.attempts.len(),
            recovered.queued.len(),
        );
        // Set once: a store leaves memory at most once, and the channel holds one.
        let _ = self.incarnations.second.set(engine.incarnation());
        let _ = self.reopened.try_send(recovered);
        Ok(engine)
    }
}

/// The sentence for the log when the disk cannot be used.
pub(super) fn failure(settings: &Settings, why: &str) -> String {
    format!(
        "cannot open the outbox in {}: {why}; what is received and printed now does not survive a \
         restart; make the folder writable and give it room, it is tried again by itself",
        settings.dir.display(),
    )
}

pub(super) fn check_index(dir: &Path) -> bool {
    let limit = Rlimit {
        current: Some(INDEX_CHECK_MEMORY_BYTES),
        maximum: Some(INDEX_CHECK_MEMORY_BYTES),
    };
    // Without the limit the check is still worth having: the parent's time limit holds.
    let _ = setrlimit(Resource::Data, limit);
    index::check(&dir.join(INDEX_DIR))
}

/// Opens the index in a child process first, since a damaged one can panic, hang or balloon.
pub(super) fn passes_check(checker: &Path, index_dir: &Path) -> bool {
    let Some(store) = index_dir.parent() else {
        return false;
    };
    let child = Command::new(checker)
        .arg("__check-index")
        .arg(store)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(why) => {
            log::warn!("cannot check the index with {}: {why}", checker.display());
            return false;
        }
    };
    wait_for_exit(&child, INDEX_CHECK_TIMEOUT);
    match child.try_wait() {
        Ok(Some(status)) => status.success(),
        Ok(None) | Err(_) => {
            // Killed and reaped; if even that fails it is gone already.
            let _ = child.kill();
            let _ = child.wait();
            false
        }
    }
}

/// Waits for the exit of a child, at most so long. The start of the agent waits with it, so it is
/// noticed at once where the kernel has pidfds.
fn wait_for_exit(child: &Child, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    let pid = Pid::from_child(child);
    let Ok(exit) = pidfd_open(pid, PidfdFlags::empty()) else {
        let has_exited = || {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            !matches!(waitid(WaitId::Pid(pid), options), Ok(None))
        };
        while !has_exited() && Instant::now() < deadline {
            std::thread::sleep(EXIT_POLL_INTERVAL);
        }
        return;
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&exit, PollFlags::IN)], left.as_ref()) {
            Err(Errno::INTR) => {}
            _ => return,
        }
    }
}

/// Whether the last stop was clean; from now on it is not.
fn take_clean_mark(dir: &Path) -> io::Result<bool> {
    match std::fs::remove_file(dir.join(CLEAN_FILE)) {
        Ok(()) => sync_folder(dir).map(|()| true),
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(why) => Err(why),
    }
}

pub(super) fn put_clean_mark(path: &Path, counts: &Counts) -> io::Result<()> {
    let text = serde_json::to_vec(counts)?;
    let written = path.with_extension("new");
    let mut file = File::create(&written)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&written, path)?;
    path.parent().map_or(Ok(()), sync_folder)
}

pub(super) fn bounds(settings: &Settings) -> Bounds {
    let cap_bytes = settings
        .cap_bytes
        .clamp(SPOOL_CAP_BYTES_MIN, SPOOL_CAP_BYTES_MAX);
    let reserve = settings.terminal_reserve_bytes;
    Bounds {
        cap_bytes,
        terminal_reserve_bytes: reserve.clamp(TERMINAL_RESERVE_BYTES_MIN, cap_bytes / 2),
        final_output_bytes: settings
            .final_output_bytes
            .min(FINAL_OUTPUT_BYTES_MAX)
            .min((cap_bytes / SEGMENTS_MIN) as usize),
    }
}

/// Without randomness two stores cannot be told apart; the time is next best.
pub(super) fn random_name() -> Incarnation {
    let mut bytes = [0; 8];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        match rustix::rand::getrandom(&mut bytes[filled..], flags) {
            Ok(more) => filled += more,
            Err(_) => return Incarnation::of(wall_ms()),
        }
    }
    Incarnation::of(u64::from_le_bytes(bytes))
}

pub(super) fn wall_ms() -> u64 {
    clock::since_epoch().as_millis() as u64
}
