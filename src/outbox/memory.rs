//! Store parts that live in memory: the disk and the index of the volatile store.
//!
//! The volatile store is the same engine on top of these, so that it cannot differ in behaviour.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{Disk, DiskFile};
use super::index::Index;
use super::record::Entry;
use crate::ids::AttemptKey;
use crate::limits::FINISHED_ATTEMPTS_MAX;

type Bytes = Arc<Mutex<Vec<u8>>>;

fn lock(bytes: &Bytes) -> MutexGuard<'_, Vec<u8>> {
    // A vector is whole after every call, also after one that panicked.
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Files in memory, gone with the process.
#[derive(Default)]
pub(super) struct MemoryDisk {
    files: HashMap<String, Bytes>,
}

impl Disk for MemoryDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        Ok(self.files.keys().cloned().collect())
    }

    fn create(&mut self, name: &str, _len: u64) -> io::Result<Box<dyn DiskFile>> {
        if self.files.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let bytes = Bytes::default();
        self.files.insert(name.to_owned(), bytes.clone());
        Ok(Box::new(MemoryFile(bytes)))
    }

    fn open(&mut self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let bytes = self.files.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(MemoryFile(bytes.clone())))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.files.remove(name);
        Ok(())
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn recycles(&self) -> bool {
        // Memory that is not needed goes back.
        false
    }
}

struct MemoryFile(Bytes);

impl DiskFile for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0).len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = lock(&self.0);
        let from = (offset as usize).min(bytes.len());
        let n = buffer.len().min(bytes.len() - from);
        buffer[..n].copy_from_slice(&bytes[from..from + n]);
        Ok(n)
    }

    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = lock(&self.0);
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(data);
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The run-once memory of the volatile store.
#[derive(Default)]
pub(super) struct MemoryIndex {
    entries: HashMap<AttemptKey, Entry>,
    order: VecDeque<AttemptKey>,
    last_order: u64,
}

impl Index for MemoryIndex {
    fn get(&mut self, key: AttemptKey) -> io::Result<Option<Entry>> {
        Ok(self.entries.get(&key).copied())
    }

    fn put(&mut self, key: AttemptKey, entry: Entry) {
        self.last_order = self.last_order.max(entry.order);
        if self.entries.insert(key, entry).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > FINISHED_ATTEMPTS_MAX {
            if let Some(eldest) = self.order.pop_front() {
                self.entries.remove(&eldest);
            }
        }
    }

    fn is_backed_up(&self) -> bool {
        false
    }

    fn last_order(&self) -> u64 {
        self.last_order
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn entries(&mut self) -> Vec<(AttemptKey, Entry)> {
        let entries = &self.entries;
        let known = |key: &AttemptKey| entries.get(key).map(|entry| (*key, *entry));
        self.order.iter().filter_map(known).collect()
    }

    fn take_rebuilt(&mut self) -> bool {
        false
    }
}
