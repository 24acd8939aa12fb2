//! The append side of the log: which segments there are, and the one durable commit.
//!
//! A commit is one write and one sync in the active segment. After a failed one the segment is
//! left alone for good (its pages may be marked clean without being on the medium) and the log
//! goes on in a fresh segment, whose header says where the confirmed part of the old one ends.

use std::io;

use super::disk::{Disk, DiskFile};
use super::segment::{HEADER_BYTES, Header, SegmentReader};
use super::types::Cursor;
use super::unit::{PAGE_BYTES, UnitBuffer, UnitPlace, unit_bytes};
use crate::ids::{AttemptKey, Incarnation, Stream};

/// Emptied segment files that are kept for reuse; the first of them is the spare.
pub(super) const FREE_FILES_MAX: usize = 16;
/// While there are so many files that cannot be removed, no new one is made.
const LEFTOVERS_MAX: usize = 2;

/// The chunks of one stream in one segment.
#[derive(Debug, Clone)]
pub(super) struct Span {
    pub key: AttemptKey,
    pub stream: Stream,
    pub first: u64,
    pub last: u64,
    pub chunks: u32,
    pub bytes: u64,
    /// The first unit that holds one of them.
    pub unit_offset: u64,
}

#[derive(Debug)]
pub(super) struct Segment {
    pub header: Header,
    pub name: u64,
    /// Confirmed: nothing behind it is read.
    pub end: u64,
    /// Wall clock of its first unit.
    pub first_ms: u64,
    pub spans: Vec<Span>,
    /// The oldest segment that holds a record of an attempt whose later state stands here: while
    /// that one stays, this one must.
    pub depends_on: u64,
}

impl Segment {
    pub fn generation(&self) -> u64 {
        self.header.generation
    }

    pub fn note_chunk(
        &mut self,
        key: AttemptKey,
        stream: Stream,
        sequence: u64,
        bytes: u64,
        unit_offset: u64,
    ) {
        let mine = |span: &&mut Span| span.key == key && span.stream == stream;
        match self.spans.iter_mut().rev().find(mine) {
            Some(span) => {
                span.last = sequence;
                span.chunks += 1;
                span.bytes += bytes;
            }
            None => self.spans.push(Span {
                key,
                stream,
                first: sequence,
                last: sequence,
                chunks: 1,
                bytes,
                unit_offset,
            }),
        }
    }
}

/// What the next segment must say of its predecessor.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tail {
    pub generation: u64,
    pub end: u64,
    pub guards: bool,
}

pub(super) enum CommitError {
    /// The limit is reached: something must be retired first.
    NoRoom,
    /// The file system is full.
    DiskFull,
    Io(io::Error),
}

impl From<io::Error> for CommitError {
    fn from(why: io::Error) -> CommitError {
        match why.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CommitError::DiskFull,
            _ => CommitError::Io(why),
        }
    }
}

pub(super) struct Log {
    pub disk: Box<dyn Disk>,
    pub incarnation: Incarnation,
    pub segment_bytes: u64,
    /// In order of their generation.
    pub segments: Vec<Segment>,
    /// The file of the last segment, while the log may go on in it.
    active: Option<Box<dyn DiskFile>>,
    /// Files without content, of standard length.
    pub free: Vec<u64>,
    /// Files without content that could not be removed, with their lengths: they take up room
    /// until they can be.
    leftovers: Vec<(u64, u64)>,
    next_generation: u64,
    next_name: u64,
    next_unit: u64,
    tail: Tail,
    /// A commit failed, and a restart may find what it wrote: no header says yet that it is void.
    remains: bool,
    /// A removed file may still be there after a power cut, and must not before the next header.
    dir_unsynced: bool,
    /// Files that the file system had room for.
    pub files_made: u64,
}

/// Where recovery found the end of the log.
pub(super) struct LogEnd {
    pub next_generation: u64,
    pub next_name: u64,
    pub next_unit: u64,
    pub tail: Tail,
}

impl Log {
    pub fn new(
        disk: Box<dyn Disk>,
        incarnation: Incarnation,
        segment_bytes: u64,
        segments: Vec<Segment>,
        free: Vec<u64>,
        end: LogEnd,
    ) -> Log {
        Log {
            disk,
            incarnation,
            segment_bytes,
            segments,
            active: None,
            free,
            leftovers: Vec::new(),
            next_generation: end.next_generation,
            next_name: end.next_name,
            next_unit: end.next_unit,
            tail: end.tail,
            remains: false,
            dir_unsynced: true,
            files_made: 0,
        }
    }

    /// Bytes of all segments that hold something, and of files that cannot be removed.
    pub fn used_bytes(&self) -> u64 {
        let segments = self.segments.iter().map(|segment| segment.header.capacity);
        let leftovers = self.leftovers.iter().map(|(_, bytes)| bytes);
        segments.sum::<u64>() + leftovers.sum::<u64>()
    }

    /// Bytes behind a place, up to the confirmed end.
    pub fn bytes_behind(&self, place: Cursor) -> u64 {
        let newest = self.segments.iter().rev();
        let behind = newest.take_while(|it| it.generation() >= place.generation);
        let bytes = behind.map(|it| match it.generation() == place.generation {
            true => it.end.saturating_sub(place.byte()),
            false => it.end,
        });
        bytes.sum()
    }

    /// Bytes of records that the next unit may have if it is to go into a segment of standard
    /// length without leaving the active one needlessly.
    pub fn unit_room(&self) -> usize {
        let full = (self.segment_bytes - HEADER_BYTES) as usize;
        let room = match (&self.active, self.segments.last()) {
            (Some(_), Some(active)) => active.header.capacity.saturating_sub(active.end) as usize,
            _ => full,
        };
        room.saturating_sub(unit_bytes(0) as usize)
    }

    /// Whether a unit of these records goes on in the active segment.
    pub fn fits_active(&self, records_bytes: usize) -> bool {
        self.active.is_some()
            && self.segments.last().is_some_and(|active| {
                active.end + unit_bytes(records_bytes) <= active.header.capacity
            })
    }

    /// Generation of the segment that an active one has, if the log may go on in it.
    pub fn active_generation(&self) -> Option<u64> {
        self.active.as_ref()?;
        self.segments.last().map(Segment::generation)
    }

    /// Leaves the active segment: the next commit begins a fresh one.
    pub fn seal_active(&mut self) {
        self.active = None;
    }

    /// Makes a unit durable. Segments may take `limit` bytes together; `may_use_spare` lets a new
    /// segment take the last free file. Gives generation and offset of the unit.
    pub fn commit(
        &mut self,
        unit: &mut UnitBuffer,
        limit: u64,
        may_use_spare: bool,
        wall_ms: u64,
    ) -> Result<(u64, u64), CommitError> {
        let bytes = unit_bytes(unit.records_bytes());
        if !self.fits_active(unit.records_bytes()) {
            self.begin_segment(bytes, limit, may_use_spare, wall_ms)?;
        }
        let number = self.next_unit;
        let (Some(file), Some(segment)) = (&mut self.active, self.segments.last_mut()) else {
            return Err(CommitError::NoRoom);
        };
        let offset = segment.end;
        let sealed = unit.seal(UnitPlace {
            seed: segment.header.seed(),
            offset,
            capacity: segment.header.capacity,
            number,
            wall_ms,
        });
        let written = file
            .write_at(sealed, offset)
            .and_then(|()| file.sync_data());
        if let Err(why) = written {
            self.abandon_active();
            return Err(why.into());
        }
        segment.end = offset + bytes;
        self.next_unit += 1;
        let generation = segment.generation();
        self.tail = Tail {
            generation,
            end: segment.end,
            guards: false,
        };
        Ok((generation, offset))
    }

    /// The active segment has failed: nothing is written to it or synced any more.
    fn abandon_active(&mut self) {
        self.active = None;
        let Some(failed) = self.segments.last() else {
            return;
        };
        self.remains = true;
        if failed.end == HEADER_BYTES && self.disk.remove(&file_name(failed.name)).is_ok() {
            // It holds nothing. Its own guard passes on to the next one.
            self.tail = Tail {
                generation: failed.header.predecessor,
                end: failed.header.predecessor_end,
                guards: failed.header.guards_predecessor,
            };
            self.segments.pop();
            self.dir_unsynced = true;
        } else {
            self.tail = Tail {
                generation: failed.generation(),
                end: failed.end,
                guards: true,
            };
        }
    }

    /// After a commit that failed: makes it durable that nothing of it was confirmed, if that is
    /// not so already, so that it does not count after a restart either.
    pub fn void_remains(&mut self, wall_ms: u64) -> Result<(), CommitError> {
        match self.remains {
            true => self.begin_segment(unit_bytes(0), u64::MAX, true, wall_ms),
            false => Ok(()),
        }
    }

    /// Whether a restart may take what a failed commit wrote for confirmed.
    #[cfg(test)]
    pub fn has_remains(&self) -> bool {
        self.remains
    }

    /// Makes a fresh segment, durable with its header, for a unit of this length.
    fn begin_segment(
        &mut self,
        unit: u64,
        limit: u64,
        may_use_spare: bool,
        wall_ms: u64,
    ) -> Result<(), CommitError> {
        let capacity = self.segment_bytes.max(HEADER_BYTES + unit);
        self.remove_leftovers();
        if self.used_bytes() + capacity > limit {
            return Err(CommitError::NoRoom);
        }
        let header = Header {
            incarnation: self.incarnation,
            generation: self.next_generation,
            predecessor: self.tail.generation,
            predecessor_end: self.tail.end,
            guards_predecessor: self.tail.guards,
            capacity,
        };
        // Even if this fails below: the header may have reached the medium.
        self.next_generation += 1;
        let (name, mut file) = self.obtain_file(capacity, may_use_spare)?;
        // The whole page, so that the kernel need not read the rest of it.
        let mut page = [0; PAGE_BYTES as usize];
        page[..HEADER_BYTES as usize].copy_from_slice(&header.encode());
        let made = file
            .write_at(&page, 0)
            .and_then(|()| file.sync_data())
            .and_then(|()| match self.dir_unsynced {
                true => self.disk.sync_dir(),
                false => Ok(()),
            });
        if let Err(why) = made {
            // A leftover says where the log ended before it, so nothing may be added there. It is
            // void: no later header names it, and it holds no unit.
            self.active = None;
            self.remove_file(name, capacity);
            return Err(why.into());
        }
        self.dir_unsynced = false;
        self.remains = false;
        self.segments.push(Segment {
            header,
            name,
            end: HEADER_BYTES,
            first_ms: wall_ms,
            spans: Vec::new(),
            depends_on: u64::MAX,
        });
        self.active = Some(file);
        Ok(())
    }

    fn obtain_file(
        &mut self,
        capacity: u64,
        may_use_spare: bool,
    ) -> Result<(u64, Box<dyn DiskFile>), CommitError> {
        let kept = if may_use_spare { 0 } else { 1 };
        if capacity == self.segment_bytes
            && self.free.len() > kept
            && let Some(name) = self.free.pop()
        {
            match self.disk.reuse(&file_name(name)) {
                Ok(file) => return Ok((name, file)),
                Err(_) => self.remove_file(name, capacity),
            }
        }
        if self.leftovers.len() >= LEFTOVERS_MAX {
            let why = "old files of the outbox cannot be removed, so no new one is made";
            return Err(io::Error::other(why).into());
        }
        let name = self.next_name;
        self.next_name += 1;
        let file = self.disk.create(&file_name(name), capacity)?;
        self.files_made += 1;
        self.dir_unsynced = true;
        Ok((name, file))
    }

    /// Takes a segment out of the log. The caller has made sure that nothing of it is needed.
    ///
    /// # Errors
    /// It stays, and so must what depends on it: it could be neither made unreadable nor removed, for
    /// good if it is guarded.
    pub fn retire(&mut self, generation: u64) -> io::Result<()> {
        let Some(at) = self.position(generation) else {
            return Ok(());
        };
        let guarded = self
            .segments
            .iter()
            .any(|guard| guard.header.guards_predecessor && guard.header.predecessor == generation);
        let name = self.segments[at].name;
        let capacity = self.segments[at].header.capacity;
        let recycled = capacity == self.segment_bytes
            && self.free.len() < FREE_FILES_MAX
            && self.disk.recycles();
        match self.blank(name, guarded) {
            Ok(()) if recycled => self.free.push(name),
            Ok(()) => self.remove_file(name, capacity),
            Err(_) => {
                // A restart would read it, perhaps long after what says that it is done has gone.
                remove(self.disk.as_mut(), name)?;
                self.dir_unsynced = true;
                if guarded {
                    // A block of it may be bad for good. Its guard goes after it, so it must not
                    // come back.
                    self.disk.sync_dir()?;
                }
            }
        }
        if at + 1 == self.segments.len() {
            self.active = None;
        }
        self.segments.remove(at);
        Ok(())
    }

    /// Takes the header off a file, so that a restart does not read it. If it is not synced it may
    /// come back after a power cut; what it holds is then known to be done, except behind the
    /// confirmed end of a segment that is guarded.
    fn blank(&mut self, name: u64, durably: bool) -> io::Result<()> {
        let mut file = self.disk.open(&file_name(name))?;
        file.write_at(&[0; HEADER_BYTES as usize], 0)?;
        match durably {
            true => file.sync_data(),
            false => Ok(()),
        }
    }

    /// Removes a file without content, now or as soon as that can be done.
    fn remove_file(&mut self, name: u64, bytes: u64) {
        if let Err(why) = remove(self.disk.as_mut(), name) {
            log::warn!("cannot remove the outbox file {}: {why}", file_name(name));
            self.leftovers.push((name, bytes));
        }
        self.dir_unsynced = true;
    }

    fn remove_leftovers(&mut self) {
        let before = self.leftovers.len();
        let disk = self.disk.as_mut();
        self.leftovers
            .retain(|(name, _)| remove(disk, *name).is_err());
        self.dir_unsynced |= self.leftovers.len() < before;
    }

    /// Removes the free files that the cap leaves no room for, but keeps the spare.
    pub fn trim_free(&mut self, cap_bytes: u64) {
        self.remove_leftovers();
        while self.free.len() > 1
            && self.used_bytes() + self.free.len() as u64 * self.segment_bytes > cap_bytes
        {
            if let Some(name) = self.free.pop() {
                self.remove_file(name, self.segment_bytes);
            }
        }
    }

    /// Makes the spare file if it is missing. It is only a help, so a failure is no error.
    pub fn ensure_spare(&mut self) {
        if self.free.is_empty() && self.leftovers.is_empty() && self.disk.recycles() {
            let name = self.next_name;
            self.next_name += 1;
            if self
                .disk
                .create(&file_name(name), self.segment_bytes)
                .is_ok()
            {
                self.dir_unsynced = true;
                self.free.push(name);
            }
        }
    }

    pub fn position(&self, generation: u64) -> Option<usize> {
        self.segments
            .binary_search_by_key(&generation, Segment::generation)
            .ok()
    }

    pub fn segment_mut(&mut self, generation: u64) -> Option<&mut Segment> {
        self.position(generation).map(|at| &mut self.segments[at])
    }

    /// Opens a segment for reading.
    pub fn reader(&mut self, at: usize, window: Vec<u8>) -> io::Result<SegmentReader> {
        let segment = &self.segments[at];
        let file = self.disk.open(&file_name(segment.name))?;
        Ok(SegmentReader::new(file, segment.header.seed(), window))
    }
}

/// Removes a file that may have gone already.
fn remove(disk: &mut dyn Disk, name: u64) -> io::Result<()> {
    match disk.remove(&file_name(name)) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

pub(super) fn file_name(name: u64) -> String {
    format!("{name:010}.seg")
}

/// The number in a segment file's name.
pub(super) fn parse_name(name: &str) -> Option<u64> {
    name.strip_suffix(".seg")?.parse().ok()
}
