//! A disk and an index that can crash at every call, for tests.
//!
//! Each file keeps what is written and what is durable; directory entries are durable only after
//! a directory sync. A crash keeps any choice of the unsynced writes, torn at sectors, and of the
//! unsynced directory changes. After the crash point every call fails.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, DiskFile};
use super::index::Index;
use super::memory::MemoryIndex;
use super::record::Entry;
use super::segment::HEADER_BYTES;
use crate::ids::AttemptKey;
use crate::limits::SECTOR_BYTES;

/// The first byte of a mark, and the length of one.
pub const MARK_START: u8 = b'~';
pub const MARK_BYTES: usize = 9;

/// What the page cache writes back at once.
const PAGE_BYTES: usize = 4096;

/// Small and good enough to choose with; the seed reproduces a run, and so do its choices.
#[derive(Clone)]
pub struct Random {
    state: u64,
    /// The choices so far, or those to be made again.
    choices: Vec<u64>,
    /// How many of `choices` have been made again; `None` while new ones are noted.
    replayed: Option<usize>,
}

impl Random {
    pub fn new(seed: u64) -> Random {
        Random {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            choices: Vec::new(),
            replayed: None,
        }
    }

    /// Makes these choices again, and 0 for all that follow.
    pub fn replay(choices: Vec<u64>) -> Random {
        Random {
            state: 1,
            choices,
            replayed: Some(0),
        }
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        if let Some(at) = &mut self.replayed {
            *at += 1;
            return self.choices.get(*at - 1).map_or(0, |choice| choice % bound);
        }
        let choice = self.draw() % bound;
        self.choices.push(choice);
        choice
    }

    /// Bytes to fill something with; no choices.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.draw() as u8);
    }

    pub fn into_choices(self) -> Vec<u64> {
        self.choices
    }

    fn draw(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state >> 11
    }
}

/// What a crash keeps of the unsynced writes and directory changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    Everything,
    /// Each sector and each change on its own, by this seed.
    Some(u64),
    /// Of each write only its first half.
    FirstHalf,
    /// Of each write only its last half.
    LastHalf,
    /// Each page of 4 KiB on its own, as it was last written, by this seed.
    Pages(u64),
}

/// One of each kind.
pub const KEEPS: [Keep; 6] = [
    Keep::Nothing,
    Keep::Everything,
    Keep::FirstHalf,
    Keep::LastHalf,
    Keep::Some(7),
    Keep::Pages(7),
];

/// What goes wrong at a chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Crash,
    /// This call and so many after it fail.
    Io(u64),
    NoSpace(u64),
    /// From here on syncs answer that all is well and do nothing.
    LyingSync,
    /// The file that is synced then can never be synced again: one bad block.
    BadFile,
}

#[derive(Default, Clone)]
struct FileState {
    written: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
    /// Marks of content that is durable ([`SimDisk::holds_mark`]).
    marks: BTreeSet<[u8; MARK_BYTES]>,
}

impl FileState {
    /// Looks for marks in what has become durable.
    fn find_marks(&mut self, bytes: &[u8]) {
        const LOOK_BYTES: usize = 64;
        for (number, part) in bytes.chunks(LOOK_BYTES).enumerate() {
            // Much quicker than a look at each byte.
            if !part.contains(&MARK_START) {
                continue;
            }
            for (at, byte) in part.iter().enumerate() {
                if *byte == MARK_START
                    && let Some(mark) = bytes[number * LOOK_BYTES + at..].first_chunk()
                {
                    self.marks.insert(*mark);
                }
            }
        }
    }

    /// Writes back some of the pages that were written and not synced.
    fn keep_pages(&mut self, pick: &mut impl FnMut() -> bool) {
        let mut pages = BTreeSet::new();
        for (offset, bytes) in std::mem::take(&mut self.unsynced) {
            pages.extend(
                offset / PAGE_BYTES..=(offset + bytes.len()).saturating_sub(1) / PAGE_BYTES,
            );
        }
        for page in pages {
            let from = (page * PAGE_BYTES).min(self.written.len());
            let to = (from + PAGE_BYTES).min(self.written.len());
            if pick() {
                let bytes = self.written[from..to].to_vec();
                put(&mut self.durable, from, &bytes);
            }
        }
    }
}

#[derive(Default)]
struct World {
    files: Vec<FileState>,
    dir: BTreeMap<String, usize>,
    durable_dir: BTreeMap<String, usize>,
    index: Vec<(AttemptKey, Entry)>,
    calls: u64,
    bytes_read: u64,
    fault: Option<(u64, Fault)>,
    bad_file: Option<usize>,
    early_units: u64,
    looks_for_marks: bool,
}

impl World {
    /// Counts a call that changes something.
    fn call(&mut self) -> io::Result<()> {
        let number = self.calls;
        self.calls += 1;
        match self.fault {
            Some((at, Fault::Crash)) if number >= at => Err(io::Error::other("crashed")),
            Some((at, Fault::Io(count))) if (at..at + count).contains(&number) => {
                Err(io::Error::other("simulated input/output error"))
            }
            Some((at, Fault::NoSpace(count))) if (at..at + count).contains(&number) => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }

    fn lies(&self) -> bool {
        matches!(self.fault, Some((at, Fault::LyingSync)) if self.calls > at)
    }
}

/// Clones see the same disk.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<World>>);

impl SimDisk {
    fn world(&self) -> MutexGuard<'_, World> {
        self.0
            .lock()
            .expect("no test panics while it holds the disk")
    }

    pub fn calls(&self) -> u64 {
        self.world().calls
    }

    /// Bytes that were ever read.
    pub fn bytes_read(&self) -> u64 {
        self.world().bytes_read
    }

    /// The fault comes at the n-th call from now on.
    pub fn set_fault(&self, after: u64, fault: Fault) {
        let mut world = self.world();
        world.fault = Some((world.calls + after, fault));
    }

    pub fn has_fault(&self) -> bool {
        self.world().fault.is_some()
    }

    /// From now on it is remembered which marks have become durable: [`MARK_START`] and the bytes
    /// behind it, which content may hold.
    pub fn look_for_marks(&self) {
        self.world().looks_for_marks = true;
    }

    /// Whether content with this mark would be there after a power cut.
    pub fn holds_mark(&self, mark: &[u8; MARK_BYTES]) -> bool {
        let world = self.world();
        let mut files = world.durable_dir.values();
        files.any(|file| world.files[*file].marks.contains(mark))
    }

    /// A file that could not be synced can be again: the block was replaced.
    pub fn replace_bad_block(&self) {
        self.world().bad_file = None;
    }

    /// Whether the power has gone.
    pub fn is_crashed(&self) -> bool {
        let world = self.world();
        matches!(world.fault, Some((at, Fault::Crash)) if world.calls > at)
    }

    pub fn clear_fault(&self) {
        self.world().fault = None;
    }

    /// The power comes back: what is left is all there is.
    pub fn crash(&self, keep: Keep) {
        let mut world = self.world();
        let mut random = Random::new(match keep {
            Keep::Some(seed) | Keep::Pages(seed) => seed,
            _ => 1,
        });
        let mut pick = move || match keep {
            Keep::Nothing => false,
            Keep::Everything | Keep::FirstHalf | Keep::LastHalf => true,
            Keep::Some(_) | Keep::Pages(_) => random.below(2) == 0,
        };
        let looks_for_marks = world.looks_for_marks;
        let mut dir = world.durable_dir.clone();
        for (name, file) in &world.dir {
            if world.durable_dir.get(name) != Some(file) && pick() {
                dir.insert(name.clone(), *file);
            }
        }
        for name in world.durable_dir.keys() {
            if !world.dir.contains_key(name) && pick() {
                dir.remove(name);
            }
        }
        for file in &mut world.files {
            if matches!(keep, Keep::Pages(_)) {
                file.keep_pages(&mut pick);
            }
            for (offset, bytes) in std::mem::take(&mut file.unsynced) {
                let (from, to) = match keep {
                    Keep::FirstHalf => (0, bytes.len() / 2 / SECTOR_BYTES * SECTOR_BYTES),
                    Keep::LastHalf => (bytes.len() / 2 / SECTOR_BYTES * SECTOR_BYTES, bytes.len()),
                    _ => (0, bytes.len()),
                };
                for at in (from..to).step_by(SECTOR_BYTES) {
                    if pick() {
                        let sector = &bytes[at..(at + SECTOR_BYTES).min(to)];
                        put(&mut file.durable, offset + at, sector);
                    }
                }
            }
            file.written = file.durable.clone();
            if looks_for_marks {
                let durable = std::mem::take(&mut file.durable);
                file.marks.clear();
                file.find_marks(&durable);
                file.durable = durable;
            }
        }
        world.durable_dir = dir.clone();
        world.dir = dir;
        world.fault = None;
    }

    /// All files, for tests that damage them.
    pub fn names(&self) -> Vec<String> {
        self.world().dir.keys().cloned().collect()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        let world = self.world();
        let len = |file: &usize| world.files[*file].written.len() as u64;
        world.dir.values().map(len).sum()
    }

    /// Writes behind a segment's header before that was durable.
    pub fn early_units(&self) -> u64 {
        self.world().early_units
    }

    pub fn contents(&self, name: &str) -> Vec<u8> {
        let world = self.world();
        world.files[world.dir[name]].written.clone()
    }

    pub fn overwrite(&self, name: &str, bytes: Vec<u8>) {
        let mut world = self.world();
        let file = world.dir[name];
        world.files[file] = FileState {
            written: bytes.clone(),
            durable: bytes,
            ..FileState::default()
        };
    }

    /// A file that was removed is there again.
    pub fn put_back(&self, name: &str, bytes: Vec<u8>) {
        let mut world = self.world();
        let number = world.files.len();
        world.files.push(FileState::default());
        world.dir.insert(name.to_owned(), number);
        world.durable_dir.insert(name.to_owned(), number);
        drop(world);
        self.overwrite(name, bytes);
    }

    /// Loses the index.
    pub fn lose_index(&self) {
        self.world().index.clear();
    }

    /// A copy of the disk as it is, on which something else may happen.
    pub fn fork(&self) -> SimDisk {
        let world = self.world();
        SimDisk(Arc::new(Mutex::new(World {
            files: world.files.clone(),
            dir: world.dir.clone(),
            durable_dir: world.durable_dir.clone(),
            index: world.index.clone(),
            calls: world.calls,
            bytes_read: world.bytes_read,
            fault: None,
            bad_file: world.bad_file,
            early_units: world.early_units,
            looks_for_marks: world.looks_for_marks,
        })))
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if bytes.len() < end {
        // Unlike `resize` it is quick in a debug build.
        bytes.extend_from_slice(&vec![0; end - bytes.len()]);
    }
    bytes[offset..end].copy_from_slice(data);
}

impl Disk for SimDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn create(&mut self, name: &str, len: u64) -> io::Result<Box<dyn DiskFile>> {
        let mut world = self.world();
        world.call()?;
        if world.dir.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = world.files.len();
        let zeros = vec![0; len as usize];
        world.files.push(FileState {
            written: zeros.clone(),
            unsynced: vec![(0, zeros)],
            ..FileState::default()
        });
        world.dir.insert(name.to_owned(), number);
        Ok(Box::new(SimFile(self.clone(), number)))
    }

    fn open(&mut self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let number = *self.world().dir.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(SimFile(self.clone(), number)))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut world = self.world();
        world.call()?;
        world.dir.remove(name);
        Ok(())
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        let mut world = self.world();
        world.call()?;
        if world.lies() {
            return Ok(());
        }
        world.durable_dir = world.dir.clone();
        Ok(())
    }

    fn recycles(&self) -> bool {
        true
    }
}

struct SimFile(SimDisk, usize);

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.world().files[self.1].written.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut world = self.0.world();
        let bytes = &world.files[self.1].written;
        let from = (offset as usize).min(bytes.len());
        let n = buffer.len().min(bytes.len() - from);
        buffer[..n].copy_from_slice(&bytes[from..from + n]);
        world.bytes_read += n as u64;
        Ok(n)
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut world = self.0.world();
        let verdict = world.call();
        let crashed = matches!(world.fault, Some((_, Fault::Crash)));
        let first = world.fault.is_some_and(|(at, _)| world.calls == at + 1);
        if verdict.is_err() && crashed && !first {
            return verdict;
        }
        // A call that fails may have done its work all the same, or the first half of it, or none.
        let done = match verdict {
            Ok(()) => bytes,
            Err(_) if world.calls.is_multiple_of(3) => &[],
            Err(_) if world.calls % 3 == 1 => &bytes[..bytes.len() / 2],
            Err(_) => bytes,
        };
        let file = &mut world.files[self.1];
        let head = HEADER_BYTES as usize;
        let is_early =
            offset >= HEADER_BYTES && file.durable.get(..head) != file.written.get(..head);
        put(&mut file.written, offset as usize, done);
        file.unsynced.push((offset as usize, done.to_vec()));
        world.early_units += u64::from(is_early);
        verdict
    }

    fn sync_data(&mut self) -> io::Result<()> {
        let mut world = self.0.world();
        if let Err(why) = world.call() {
            if !matches!(world.fault, Some((_, Fault::Crash))) {
                // The pages are marked clean without being on the medium.
                world.files[self.1].unsynced.clear();
            }
            return Err(why);
        }
        if world.lies() {
            return Ok(());
        }
        if matches!(world.fault, Some((at, Fault::BadFile)) if world.calls > at) {
            world.bad_file.get_or_insert(self.1);
        }
        if world.bad_file == Some(self.1) {
            return Err(io::Error::other("simulated bad block"));
        }
        let looks_for_marks = world.looks_for_marks;
        let file = &mut world.files[self.1];
        for (offset, bytes) in std::mem::take(&mut file.unsynced) {
            put(&mut file.durable, offset, &bytes);
            if looks_for_marks {
                file.find_marks(&bytes);
            }
        }
        Ok(())
    }
}

/// An index that keeps what was flushed.
pub struct SimIndex {
    disk: SimDisk,
    memory: MemoryIndex,
}

impl SimIndex {
    pub fn open(disk: &SimDisk) -> SimIndex {
        let mut memory = MemoryIndex::default();
        for (key, entry) in disk.world().index.iter() {
            memory.put(*key, *entry);
        }
        SimIndex {
            disk: disk.clone(),
            memory,
        }
    }
}

impl Index for SimIndex {
    fn get(&mut self, key: AttemptKey) -> io::Result<Option<Entry>> {
        self.memory.get(key)
    }

    fn put(&mut self, key: AttemptKey, entry: Entry) {
        self.memory.put(key, entry);
    }

    fn is_backed_up(&self) -> bool {
        false
    }

    fn last_order(&self) -> u64 {
        self.memory.last_order()
    }

    fn flush(&mut self) -> io::Result<()> {
        let entries = self.memory.entries();
        let mut world = self.disk.world();
        world.call()?;
        world.index = entries;
        Ok(())
    }

    fn entries(&mut self) -> Vec<(AttemptKey, Entry)> {
        self.memory.entries()
    }

    fn take_rebuilt(&mut self) -> bool {
        false
    }
}
