//! The compact index: attempts that are finished and acknowledged, or discarded, by their key.
//!
//! This is the run-once memory (PROTOCOL.md 4.6) for attempts whose records have left the log.
//! All else, also the state of the streams of open attempts, stands in the log itself, so losing
//! the index costs only the memory of attempts that were done long ago.
//!
//! Nothing is written to sled on the way of a byte: entries wait in memory (at most
//! [`PENDING_MAX`]) until a segment is retired or the store is closed. sled promises little over a
//! power cut, so its files and folder are synced here after its own flush. A damaged sled can
//! fail or panic in any call; it is then set aside once and begun anew, and [`Index::take_rebuilt`]
//! asks the engine to bring it up from the log.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::disk::sync_folder;
use super::record::{Entry, status_code, status_of, u32_at, u64_at};
use crate::ids::{AttemptKey, Incarnation};
use crate::limits::FINISHED_ATTEMPTS_MAX;
use crate::panics;

/// Entries that wait in memory for the next flush.
const PENDING_MAX: usize = 512;
/// The eldest entries are removed when there are this many too many, so that looking for them
/// is seldom.
const EVICTION_SLACK: usize = 256;
/// sled's own cache and segment: measured, smaller ones save nothing, larger ones cost disk.
const CACHE_BYTES: u64 = 64 * 1024;
const INDEX_SEGMENT_BYTES: usize = 16 * 1024;
/// Free space that sled must find before it is given anything to write: an error for want of
/// space makes a sled unusable until it is opened again.
const FREE_BYTES_MIN: u64 = 256 * 1024;

const ENTRY_BYTES: usize = 16;
const ENTRY_BYTES_MAX: usize = ENTRY_BYTES + Incarnation::BYTES;

pub(super) trait Index: Send {
    fn get(&mut self, key: AttemptKey) -> io::Result<Option<Entry>>;
    /// Remembers an attempt; the eldest beyond [`FINISHED_ATTEMPTS_MAX`] may be forgotten.
    fn put(&mut self, key: AttemptKey, entry: Entry);
    /// The disk takes nothing and memory holds as much as it may: no further attempt, please.
    fn is_backed_up(&self) -> bool;
    /// The greatest order there is.
    fn last_order(&self) -> u64;
    /// Makes all that was put durable.
    fn flush(&mut self) -> io::Result<()>;
    /// All entries, eldest first.
    fn entries(&mut self) -> Vec<(AttemptKey, Entry)>;
    /// The index was lost and begun anew since this was last asked: it wants to be brought up
    /// from the log.
    fn take_rebuilt(&mut self) -> bool;
}

pub(super) struct SledIndex {
    dir: PathBuf,
    db: Option<sled::Db>,
    pending: HashMap<AttemptKey, Entry>,
    stored: usize,
    last_order: u64,
    /// Entries below this one have been evicted.
    eldest_kept: u64,
    /// Something was written and not yet synced.
    unsynced: bool,
    rebuilt: bool,
}

impl SledIndex {
    /// Opens the index in `dir`; a damaged one is set aside and begun anew.
    pub fn open(dir: &Path, trusted: bool) -> io::Result<SledIndex> {
        let mut index = SledIndex {
            dir: dir.to_owned(),
            db: None,
            pending: HashMap::new(),
            stored: 0,
            last_order: 0,
            eldest_kept: 0,
            unsynced: true,
            rebuilt: false,
        };
        let opened = if trusted {
            index.open_db()
        } else {
            Err(io::Error::other("it failed its check"))
        };
        match opened {
            Ok(()) => Ok(index),
            Err(why) if is_the_disks_fault(&why) => Err(why),
            Err(why) => index.replace(&why).map(|()| index),
        }
    }

    /// Whether the index that was there could not be used.
    pub fn was_rebuilt(&self) -> bool {
        self.rebuilt
    }

    fn open_db(&mut self) -> io::Result<()> {
        let (db, stored, last) = guarded(|| {
            let db = open_sled(&self.dir)?;
            let mut stored = 0;
            let mut last = 0;
            for pair in db.iter() {
                let (_, value) = pair?;
                if let Some(entry) = decode(&value) {
                    stored += 1;
                    last = last.max(entry.order);
                }
            }
            Ok((db, stored, last))
        })?;
        self.db = Some(db);
        self.stored = stored;
        self.last_order = self.last_order.max(last);
        Ok(())
    }

    /// Puts the damaged index beside and begins a new one. What is pending stays pending.
    fn replace(&mut self, why: &io::Error) -> io::Result<()> {
        // A sled that has failed may also panic while it is closed.
        let broken = self.db.take();
        let _ = panics::guarded(move || drop(broken));
        let aside = self.dir.with_extension("damaged");
        log::error!(
            "the index of the outbox in {} cannot be used ({why}): it is set aside as {} and \
             rebuilt from the log; attempts that ended long ago are forgotten",
            self.dir.display(),
            aside.display(),
        );
        if aside.exists() {
            std::fs::remove_dir_all(&aside)?;
        }
        if self.dir.exists() {
            std::fs::rename(&self.dir, &aside)?;
        }
        self.rebuilt = true;
        self.stored = 0;
        self.open_db()
    }

    fn write(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let space = rustix::fs::statvfs(&self.dir)?;
        if space.f_bavail.saturating_mul(space.f_frsize) < FREE_BYTES_MIN {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let db = self.db.clone().ok_or(io::ErrorKind::NotConnected)?;
        guarded(|| {
            let mut batch = sled::Batch::default();
            for (key, entry) in &self.pending {
                batch.insert(&key.0[..], &encode(entry)[..]);
            }
            db.apply_batch(batch)?;
            Ok(())
        })?;
        self.unsynced = true;
        self.stored += self.pending.len();
        self.pending.clear();
        if self.stored > FINISHED_ATTEMPTS_MAX + EVICTION_SLACK {
            (self.stored, self.eldest_kept) = guarded(|| evict(&db))?;
        }
        Ok(())
    }

    /// Runs something on the index and begins a new index if it fails and the disk does not.
    fn mended<T>(&mut self, run: impl Fn(&mut Self) -> io::Result<T>) -> io::Result<T> {
        match run(self) {
            Err(why) if is_the_disks_fault(&why) => Err(why),
            Err(why) => {
                self.replace(&why)?;
                run(self)
            }
            done => done,
        }
    }
}

impl Index for SledIndex {
    fn get(&mut self, key: AttemptKey) -> io::Result<Option<Entry>> {
        if let Some(entry) = self.pending.get(&key) {
            return Ok(Some(*entry));
        }
        self.mended(|index| {
            let db = index.db.clone().ok_or(io::ErrorKind::NotConnected)?;
            let value = guarded(|| db.get(key.0))?;
            Ok(value.and_then(|value| decode(&value)))
        })
    }

    fn put(&mut self, key: AttemptKey, entry: Entry) {
        if entry.order < self.eldest_kept {
            return;
        }
        self.last_order = self.last_order.max(entry.order);
        self.pending.insert(key, entry);
        if self.pending.len() >= PENDING_MAX
            && let Err(why) = self.mended(SledIndex::write)
        {
            log::debug!("the index of the outbox cannot be written: {why}");
        }
    }

    fn is_backed_up(&self) -> bool {
        self.pending.len() > 2 * PENDING_MAX
    }

    fn last_order(&self) -> u64 {
        self.last_order
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() && !self.unsynced {
            return Ok(());
        }
        self.mended(|index| {
            index.write()?;
            let db = index.db.clone().ok_or(io::ErrorKind::NotConnected)?;
            guarded(|| db.flush().map(drop))?;
            sync_tree(&index.dir)?;
            index.unsynced = false;
            Ok(())
        })
    }

    fn entries(&mut self) -> Vec<(AttemptKey, Entry)> {
        let Some(db) = self.db.clone() else {
            return Vec::new();
        };
        let mut all = guarded(|| {
            let mut all = Vec::new();
            for pair in db.iter() {
                let (key, value) = pair?;
                if let (Ok(key), Some(entry)) = (key[..].try_into(), decode(&value)) {
                    all.push((AttemptKey(key), entry));
                }
            }
            Ok(all)
        })
        .unwrap_or_default();
        all.extend(self.pending.iter().map(|(key, entry)| (*key, *entry)));
        all.sort_unstable_by_key(|(_, entry)| entry.order);
        all
    }

    fn take_rebuilt(&mut self) -> bool {
        std::mem::take(&mut self.rebuilt)
    }
}

/// A new index would not do better.
fn is_the_disks_fault(why: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(
        why.kind(),
        PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull
    )
}

/// What the checking child runs: opens the index and walks it.
pub(super) fn check(dir: &Path) -> bool {
    let walked = guarded(|| {
        let db = open_sled(dir)?;
        for pair in db.iter() {
            pair?;
        }
        // Closed it would be written and synced once more, and somebody waits for this.
        std::mem::forget(db);
        Ok(())
    });
    walked.is_ok()
}

fn open_sled(dir: &Path) -> sled::Result<sled::Db> {
    sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE_BYTES)
        .segment_size(INDEX_SEGMENT_BYTES)
        .flush_every_ms(None)
        .use_compression(false)
        .open()
}

/// Removes the eldest entries beyond [`FINISHED_ATTEMPTS_MAX`]; gives how many are left and the
/// order of the eldest.
fn evict(db: &sled::Db) -> sled::Result<(usize, u64)> {
    let mut orders = Vec::with_capacity(FINISHED_ATTEMPTS_MAX + 2 * EVICTION_SLACK);
    for pair in db.iter() {
        orders.push(decode(&pair?.1).map_or(0, |entry| entry.order));
    }
    if orders.len() <= FINISHED_ATTEMPTS_MAX {
        return Ok((orders.len(), 0));
    }
    orders.sort_unstable();
    let eldest_kept = orders[orders.len() - FINISHED_ATTEMPTS_MAX];
    let mut batch = sled::Batch::default();
    for pair in db.iter() {
        let (key, value) = pair?;
        if decode(&value).is_none_or(|entry| entry.order < eldest_kept) {
            batch.remove(key);
        }
    }
    db.apply_batch(batch)?;
    Ok((FINISHED_ATTEMPTS_MAX, eldest_kept))
}

/// A damaged sled panics in many places: that is an error like any other.
fn guarded<T>(run: impl FnOnce() -> sled::Result<T>) -> io::Result<T> {
    match panics::guarded(run) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(why))) => Err(why),
        Ok(Err(why)) => Err(io::Error::other(why.to_string())),
        Err(panics::Panicked) => Err(io::Error::other("it panicked")),
    }
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
            continue;
        }
        match File::open(entry.path()) {
            Ok(file) => file.sync_all()?,
            // sled removes old snapshots whenever it likes.
            Err(why) if why.kind() == io::ErrorKind::NotFound => {}
            Err(why) => return Err(why),
        }
    }
    sync_folder(dir)
}

/// Order (8), discarded (1), status (1), 0 (2), exit code (4), and where the messages were born (16)
/// if that is another store.
fn encode(entry: &Entry) -> heapless::Vec<u8, ENTRY_BYTES_MAX> {
    let mut bytes = [0; ENTRY_BYTES];
    bytes[..8].copy_from_slice(&entry.order.to_le_bytes());
    bytes[8] = entry.discarded.into();
    bytes[9] = status_code(entry.status);
    bytes[12..].copy_from_slice(&entry.exit_code.to_le_bytes());
    let born = entry.born.as_ref().map(Incarnation::digits);
    bytes
        .iter()
        .chain(born.into_iter().flatten())
        .copied()
        .collect()
}

fn decode(bytes: &[u8]) -> Option<Entry> {
    let (bytes, born) = bytes.split_first_chunk::<ENTRY_BYTES>()?;
    let born = match born.is_empty() {
        true => None,
        false => Some(Incarnation::from_digits(born)?),
    };
    Some(Entry {
        order: u64_at(bytes, 0)?,
        discarded: bytes[8] != 0,
        status: status_of(bytes[9])?,
        exit_code: u32_at(bytes, 12)? as i32,
        born,
    })
}
