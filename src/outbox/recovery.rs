//! Opening the log: what the files say, in the order of their generations.
//!
//! Unit n+1 proves that unit n was synced. So an unreadable unit before a later valid one, or
//! before the end that the successor's header confirms, is damage: its good records count and the
//! rest is lost. After the last valid unit it is the tail that was never confirmed, dropped whole.
//! Before anything of what was read is relied on, the last unit is written once more and synced,
//! since the page cache may hold what the medium does not.

use std::collections::HashMap;
use std::io;

use super::attempts::Attempt;
use super::disk::Disk;
use super::engine::{Bounds, Engine};
use super::index::Index;
use super::log::{FREE_FILES_MAX, Log, LogEnd, Segment, Tail, file_name, parse_name};
use super::record::{Entry, Record};
use super::segment::{
    FORMAT_VERSION, HEADER_BYTES, Header, HeaderError, SEGMENT_BYTES_LIMIT, SegmentReader,
};
use super::space::FORGOTTEN;
use super::types::*;
use super::unit::{UNIT_HEAD_BYTES, UnitHead};
use crate::ids::{AttemptKey, Incarnation, Stream};
use crate::limits::{
    FINISHED_ATTEMPTS_MAX, SECTOR_BYTES, SEGMENT_BYTES, SEGMENTS_MAX, SEGMENTS_MIN,
};

#[derive(Debug)]
pub(super) enum OpenError {
    /// The store was written by a newer agent: in this format version, or with records that ours
    /// does not have.
    Newer(u32),
    Io(io::Error),
}

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OpenError::Newer(version) => write!(f, "a newer agent wrote it, in format {version}"),
            OpenError::Io(why) => why.fmt(f),
        }
    }
}

impl From<io::Error> for OpenError {
    fn from(why: io::Error) -> OpenError {
        OpenError::Io(why)
    }
}

/// What the log says, before the index was asked.
pub(super) struct Scan {
    pub attempts: HashMap<AttemptKey, Attempt>,
    /// Attempts that the log says are done.
    pub closed: Vec<(AttemptKey, Entry)>,
    pub segments: Vec<Segment>,
    pub incarnation: Incarnation,
    pub records_damaged: u64,
    /// Some of its records are of a newer format.
    newer: bool,
    /// Offset and length of the last unit of the last segment; `None` if it has none, and then its
    /// header is what may be unsynced.
    last_unit: Option<(u64, u64)>,
    /// Files that are no segments; the first are of standard length and may be used again.
    void: Vec<u64>,
    end: LogEnd,
}

/// A segment's length for this cap.
pub(super) fn segment_bytes(cap_bytes: u64) -> u64 {
    let longer = (cap_bytes / SEGMENTS_MAX).next_multiple_of(4096);
    let wanted = (SEGMENT_BYTES as u64)
        .max(longer)
        .min(cap_bytes / SEGMENTS_MIN);
    wanted - wanted % SECTOR_BYTES as u64
}

/// Opens the log and the index and brings both to one state. Writes the finals of the attempts
/// that were starting or running.
pub(super) fn open(
    mut disk: Box<dyn Disk>,
    index: Box<dyn Index>,
    bounds: Bounds,
    new_incarnation: Incarnation,
    clock_ms: fn() -> u64,
) -> Result<(Engine, Recovered), OpenError> {
    let scan = scan(disk.as_mut(), new_incarnation)?;
    open_scanned(disk, scan, index, bounds, clock_ms)
}

/// As [`open`], for a log that has been read.
pub(super) fn open_scanned(
    mut disk: Box<dyn Disk>,
    mut scan: Scan,
    mut index: Box<dyn Index>,
    bounds: Bounds,
    clock_ms: fn() -> u64,
) -> Result<(Engine, Recovered), OpenError> {
    // Only the last unit may be unsynced: all before it are proven by it, or by the header of the
    // segment that it stands in. If its sync has failed, its pages may be marked clean without
    // being on the medium, and only writing them again makes a sync mean something.
    if let Some(segment) = scan.segments.last() {
        let (offset, bytes) = scan.last_unit.unwrap_or((0, HEADER_BYTES));
        let mut file = disk.open(&file_name(segment.name))?;
        let mut unit = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        let read = file.read_at(&mut unit, offset)?;
        file.write_at(&unit[..read], offset)?;
        file.sync_data()?;
    }
    disk.sync_dir()?;
    index.take_rebuilt();
    for (key, entry) in &scan.closed {
        if index.get(*key)?.is_none() {
            index.put(*key, *entry);
        }
    }
    let mut forgotten = Vec::new();
    let mut failed = None;
    scan.attempts.retain(|key, attempt| match index.get(*key) {
        Ok(Some(_)) => false,
        Ok(None) => {
            let keep = attempt.is_identified();
            if !keep && (attempt.started || attempt.discarded || attempt.fin.is_some()) {
                forgotten.push(*key);
            }
            keep
        }
        Err(why) => {
            failed = Some(why);
            true
        }
    });
    if let Some(why) = failed {
        return Err(why.into());
    }
    let standard = segment_bytes(bounds.cap_bytes);
    let mut free = Vec::new();
    for name in std::mem::take(&mut scan.void) {
        let reusable = free.len() < FREE_FILES_MAX
            && disk.recycles()
            && disk.open(&file_name(name)).and_then(|file| file.len()).ok() == Some(standard);
        if reusable {
            free.push(name);
        } else {
            disk.remove(&file_name(name))?;
        }
    }
    let log = Log::new(
        disk,
        scan.incarnation,
        standard,
        scan.segments,
        free,
        scan.end,
    );
    let mut engine = Engine::new(log, index, scan.attempts, bounds, clock_ms);
    engine.tally.records_damaged = scan.records_damaged;
    for key in forgotten {
        engine.remember(key, FORGOTTEN);
    }
    engine.log.trim_free(bounds.cap_bytes);
    engine.log.ensure_spare();
    lose_what_is_nowhere(&mut engine);
    let recovered = settle(&mut engine)?;
    if let Err(why) = engine.shrink() {
        log::warn!("the outbox is larger than its cap: {why}");
    }
    engine.news = false;
    Ok((engine, recovered))
}

/// What the log says was stored and no segment holds was lost with damage: nobody may wait for it.
fn lose_what_is_nowhere(engine: &mut Engine) {
    let mut held: HashMap<(AttemptKey, Stream), Vec<(u64, u64)>> = HashMap::new();
    for span in engine.log.segments.iter().flat_map(|each| &each.spans) {
        let ranges = held.entry((span.key, span.stream)).or_default();
        ranges.push((span.first, span.last));
    }
    for (key, attempt) in &mut engine.attempts {
        for stream in Stream::ALL {
            let mut ranges = held.remove(&(*key, stream)).unwrap_or_default();
            ranges.sort_unstable();
            attempt.stream_mut(stream).keep_only(&ranges);
        }
    }
}

/// Ends what was starting or running and closes what is done.
fn settle(engine: &mut Engine) -> Result<Recovered, OpenError> {
    let keys: Vec<AttemptKey> = engine.attempts.keys().copied().collect();
    let mut open: Vec<(u64, AttemptKey, Phase)> = Vec::new();
    for key in keys {
        if let Some(attempt) = engine.attempts.get_mut(&key) {
            if attempt.discarded {
                // Nothing runs after a restart.
                attempt.started = false;
            }
            if let Some(fin) = attempt.fin {
                for stream in Stream::ALL {
                    // A lost tail: the final knows how far the stream went.
                    let state = attempt.stream_mut(stream);
                    let (held, last) = (state.mark.last, fin.ending.last[stream.index()]);
                    if held < last {
                        state.mark.last = last;
                        state.lose(held + 1, last);
                    }
                }
            }
            open.push((attempt.arrival, key, attempt.phase()));
        }
        engine.close_if_done(key);
    }
    open.sort_unstable_by_key(|(arrival, ..)| *arrival);
    let mut recovered = Recovered::default();
    for (_, key, phase) in open {
        match phase {
            Phase::Received => {
                if let Some(attempt) = engine.attempts.get(&key) {
                    recovered.queued.push(QueuedTask {
                        ids: (*attempt.ids).clone(),
                        priority: attempt.priority,
                        timeout_seconds: attempt.timeout_seconds,
                        received_at_ms: attempt.received_at_ms,
                    });
                }
            }
            Phase::Started => {
                interrupt(engine, key);
                if let Some(ids) = engine.ids_of(key) {
                    recovered.interrupted.push(ids.clone());
                }
            }
            Phase::Finished { .. } | Phase::Discarded => {}
        }
    }
    engine.commit();
    let unfinished = engine
        .attempts
        .values()
        .any(|attempt| attempt.phase() == Phase::Started);
    match unfinished {
        true => Err(OpenError::Io(io::Error::other(
            "the finals of the interrupted attempts cannot be stored",
        ))),
        false => Ok(recovered),
    }
}

fn interrupt(engine: &mut Engine, key: AttemptKey) {
    let max = engine.bounds.final_output_bytes;
    let [(output, output_truncated), (mut error, error_truncated)] =
        Stream::ALL.map(|stream| engine.held_tail(key, stream, max));
    if error.is_empty() {
        error = b"interrupted: the agent stopped while the task ran".to_vec();
    }
    let fin = Final {
        status: FORGOTTEN.status,
        exit_code: FORGOTTEN.exit_code,
        output,
        error,
        output_truncated,
        error_truncated,
        usage: None,
    };
    engine.finish(key, fin, false, None);
}

// ---- scanning ---------------------------------------------------------------------------------

/// Reads all segments. Writes nothing.
pub(super) fn scan(disk: &mut dyn Disk, new_incarnation: Incarnation) -> Result<Scan, OpenError> {
    let mut headers: Vec<(Header, u64)> = Vec::new();
    let mut void = Vec::new();
    let mut next_name = 1;
    for file in disk.list()? {
        let Some(name) = parse_name(&file) else {
            continue;
        };
        next_name = next_name.max(name.saturating_add(1));
        match Header::read(disk.open(&file)?.as_ref()) {
            Ok(header) => headers.push((header, name)),
            Err(HeaderError::Invalid) => void.push(name),
            Err(HeaderError::Newer(version)) => return Err(OpenError::Newer(version)),
        }
    }
    headers.sort_unstable_by_key(|(header, _)| header.generation);
    let newest = headers.last().map(|(header, _)| header);
    let incarnation = newest.map_or(new_incarnation, |header| header.incarnation);
    let greatest = newest.map_or(0, |header| header.generation);
    // One that a later header passes over had failed before it held anything.
    let mut kept: Vec<(Header, u64)> = Vec::new();
    for (header, name) in headers.into_iter().rev() {
        let foreign = header.incarnation != incarnation || header.capacity > SEGMENT_BYTES_LIMIT;
        let passed_over = kept.last().is_some_and(|(later, _)| {
            later.predecessor < header.generation || later.generation == header.generation
        });
        match foreign || passed_over {
            true => void.push(name),
            false => kept.push((header, name)),
        }
    }
    kept.reverse();
    let mut scan = Scan {
        attempts: HashMap::new(),
        closed: Vec::new(),
        segments: Vec::new(),
        incarnation,
        records_damaged: 0,
        newer: false,
        last_unit: None,
        void,
        end: LogEnd {
            next_generation: greatest + 1,
            next_name,
            next_unit: 1,
            tail: Tail::default(),
        },
    };
    let mut window = Vec::new();
    for (at, (header, name)) in kept.iter().enumerate() {
        let generation = header.generation;
        let later = &kept[at + 1..];
        let confirmed = later
            .iter()
            .find(|(later, _)| later.predecessor == generation);
        let file = disk.open(&file_name(*name))?;
        let file_bytes = file.len()?.min(header.capacity);
        let place = Place {
            limit: confirmed.map_or(file_bytes, |(later, _)| {
                later.predecessor_end.min(file_bytes)
            }),
            confirmed_end: confirmed.map(|(later, _)| later.predecessor_end),
            sealed: !later.is_empty(),
        };
        scan.segments.push(Segment {
            header: header.clone(),
            name: *name,
            end: HEADER_BYTES,
            first_ms: 0,
            spans: Vec::new(),
            depends_on: u64::MAX,
        });
        let reader = SegmentReader::new(file, header.seed(), window);
        window = scan.read_segment(reader, place);
    }
    match scan.newer {
        true => Err(OpenError::Newer(FORMAT_VERSION)),
        false => Ok(scan),
    }
}

/// What is known of a segment from outside.
struct Place {
    limit: u64,
    confirmed_end: Option<u64>,
    /// A later segment exists: all confirmed units of this one were synced.
    sealed: bool,
}

impl Scan {
    /// Figures from the log alone.
    pub fn counts(self, cap_bytes: u64) -> Counts {
        let log = Log::new(
            Box::new(super::memory::MemoryDisk::default()),
            self.incarnation,
            segment_bytes(cap_bytes),
            self.segments,
            Vec::new(),
            self.end,
        );
        let bounds = Bounds {
            cap_bytes,
            terminal_reserve_bytes: 0,
            final_output_bytes: 0,
        };
        let index = Box::new(super::memory::MemoryIndex::default());
        let mut engine = Engine::new(log, index, self.attempts, bounds, || 0);
        engine.tally.records_damaged = self.records_damaged;
        engine.counts()
    }

    /// Reads the units of the last segment in `segments`; gives the reader's window back.
    fn read_segment(&mut self, mut reader: SegmentReader, place: Place) -> Vec<u8> {
        let limit = place.limit;
        self.last_unit = None;
        let mut at = HEADER_BYTES;
        let mut torn = false;
        loop {
            let next = at;
            let Some(unit) = reader.unit_at(at, limit) else {
                match reader.find_unit(at + 1, limit) {
                    Some((found, _)) => {
                        self.records_damaged += 1;
                        at = found;
                        continue;
                    }
                    None => break,
                }
            };
            let behind = next + unit.bytes();
            if !place.sealed
                && !reader.is_whole(next, &unit)
                && reader.find_unit(behind, limit).is_none()
            {
                // Never confirmed. The next segment says where the confirmed part ends.
                torn = true;
                break;
            }
            self.read_unit(&mut reader, next, &unit);
            self.end.next_unit = self.end.next_unit.max(unit.number + 1);
            self.last_unit = Some((next, behind - next));
            at = behind;
            if let Some(segment) = self.segments.last_mut() {
                segment.end = behind.min(limit.max(segment.end));
            }
        }
        if let Some(segment) = self.segments.last_mut() {
            if let Some(confirmed) = place.confirmed_end
                && confirmed > segment.end
            {
                self.records_damaged += 1;
            }
            self.end.tail = Tail {
                generation: segment.generation(),
                end: segment.end,
                guards: torn,
            };
        }
        reader.into_window()
    }

    fn read_unit(&mut self, reader: &mut SegmentReader, unit_at: u64, unit: &UnitHead) {
        if let Some(segment) = self.segments.last_mut()
            && segment.first_ms == 0
        {
            segment.first_ms = unit.wall_ms;
        }
        let mut at = unit_at + UNIT_HEAD_BYTES as u64;
        let end = at + u64::from(unit.records_bytes);
        loop {
            // Checked once: of small records there may be a million.
            if let Some((head, body)) = reader.record_at(at, end) {
                match Record::decode(&head, body) {
                    Some(record) => self.apply(head.key, &record, at, unit_at, unit.wall_ms),
                    None if head.is_newer() => self.newer = true,
                    None => self.records_damaged += 1,
                }
                at += head.bytes();
                continue;
            }
            match reader.next_good(at, end, &mut self.records_damaged) {
                Some(good) => at = good,
                None => break,
            }
        }
    }

    fn apply(&mut self, key: AttemptKey, record: &Record<'_>, at: u64, unit_at: u64, wall_ms: u64) {
        let Some(segment) = self.segments.last_mut() else {
            return;
        };
        let generation = segment.generation();
        if let Record::Closed(entry) = record {
            let first_in = self
                .attempts
                .remove(&key)
                .map_or(0, |attempt| attempt.first_in);
            if first_in < generation {
                segment.depends_on = segment.depends_on.min(first_in);
            }
            if self.closed.len() >= 2 * FINISHED_ATTEMPTS_MAX {
                self.closed.drain(..FINISHED_ATTEMPTS_MAX);
            }
            self.closed.push((key, *entry));
            return;
        }
        let attempt = self
            .attempts
            .entry(key)
            .or_insert_with(|| Attempt::unidentified(generation));
        if let Record::Output {
            stream,
            sequence,
            data,
        } = record
        {
            if *sequence <= attempt.stream(*stream).mark.last {
                return;
            }
            segment.note_chunk(key, *stream, *sequence, data.len() as u64, unit_at);
        }
        let lives = attempt.apply(record, Cursor::record(generation, at), wall_ms);
        if lives && attempt.first_in < generation {
            segment.depends_on = segment.depends_on.min(attempt.first_in);
        }
    }
}
