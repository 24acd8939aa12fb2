//! A store on disk that can be read and not be written: a file system that was remounted read-only,
//! no permission, no space.
//!
//! It is opened as always, by the same recovery, on a disk that keeps what recovery writes in
//! memory. So the volatile store knows which attempts must not run again, and tells the result of
//! one that has ended as the disk will tell it when it can be written. Nothing of what waits there
//! is sent meanwhile, since no acknowledgement of it could be recorded.

use std::collections::HashSet;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::disk::{Disk, DiskFile, RealDisk};
use super::engine::Engine;
use super::index::{Index, SledIndex};
use super::memory::{MemoryDisk, MemoryIndex};
use super::opening::{self, INDEX_DIR, SPOOL_DIR};
use super::record::Entry;
use super::recovery;
use super::types::*;
use crate::ids::AttemptKey;
use crate::limits::INDEX_COPY_BYTES_MAX;

/// What can be read of the store of these settings. `None`: nothing.
pub(super) fn open(settings: &Settings) -> Option<Engine> {
    let spool = settings.dir.join(SPOOL_DIR);
    if !spool.is_dir() {
        return None;
    }
    let mut index = MemoryIndex::default();
    for (key, entry) in remembered(settings) {
        index.put(key, entry);
    }
    let disk = Box::new(FrozenDisk {
        base: RealDisk::existing(&spool),
        new: MemoryDisk::default(),
        gone: HashSet::new(),
    });
    let bounds = opening::bounds(settings);
    let incarnation = opening::random_name();
    match recovery::open(disk, Box::new(index), bounds, incarnation, opening::wall_ms) {
        Ok((engine, _)) => Some(engine),
        Err(why) => {
            log::warn!(
                "the outbox in {} cannot be read either ({why}): attempts that are recorded there \
                 run again if they are delivered again",
                settings.dir.display(),
            );
            None
        }
    }
}

/// Attempts that are done, from a copy of the index: sled opens nothing that it cannot write.
fn remembered(settings: &Settings) -> Vec<(AttemptKey, Entry)> {
    let index = settings.dir.join(INDEX_DIR);
    if !index.is_dir() {
        return Vec::new();
    }
    let name = format!("hostlink-index-{}", opening::random_name());
    let place = std::env::temp_dir().join(name);
    let copy = place.join(INDEX_DIR);
    let copied = DirBuilder::new()
        .mode(0o700)
        .create(&place)
        .and_then(|()| copy_folder(&index, &copy, &mut { INDEX_COPY_BYTES_MAX }));
    let read = copied.and_then(|()| {
        let checker = settings.index_checker.as_ref();
        if checker.is_none_or(|checker| opening::passes_check(checker, &copy)) {
            Ok(SledIndex::open(&copy, true)?.entries())
        } else {
            Err(io::Error::other("it failed its check"))
        }
    });
    // It may not even be there.
    let _ = std::fs::remove_dir_all(&place);
    read.unwrap_or_else(|why| {
        log::warn!(
            "the index of the outbox in {} cannot be read from a copy in {} ({why}): attempts that \
             ended long ago are forgotten until the disk can be used",
            settings.dir.display(),
            place.display(),
        );
        Vec::new()
    })
}

fn copy_folder(from: &Path, to: &Path, bytes_left: &mut u64) -> io::Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            copy_folder(&entry.path(), &target, bytes_left)?;
            continue;
        }
        *bytes_left = bytes_left
            .checked_sub(metadata.len())
            .ok_or(io::ErrorKind::FileTooLarge)?;
        std::fs::copy(entry.path(), &target)?;
    }
    Ok(())
}

/// Reads the files of a folder and writes to memory.
struct FrozenDisk {
    base: RealDisk,
    new: MemoryDisk,
    gone: HashSet<String>,
}

impl Disk for FrozenDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        let mut names = self.base.list()?;
        names.retain(|name| !self.gone.contains(name));
        names.extend(self.new.list()?);
        Ok(names)
    }

    fn create(&mut self, name: &str, len: u64) -> io::Result<Box<dyn DiskFile>> {
        self.new.create(name, len)
    }

    fn open(&mut self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        match self.new.open(name) {
            Ok(file) => Ok(file),
            Err(_) => Ok(Box::new(FrozenFile(self.base.open(name)?))),
        }
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.gone.insert(name.to_owned());
        self.new.remove(name)
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn recycles(&self) -> bool {
        false
    }
}

struct FrozenFile(Box<dyn DiskFile>);

impl DiskFile for FrozenFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    /// Recovery writes the last unit as it is, and takes the header off a file that it then
    /// removes: neither is read again.
    fn write_at(&mut self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        Ok(())
    }
}
