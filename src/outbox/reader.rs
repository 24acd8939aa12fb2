//! Reading back: replay from a cursor, single texts and commands, and what a hello tells.
//!
//! Segments are read forward through one window; a segment in which nothing waits is not opened.

use std::collections::HashSet;
use std::sync::Arc;

use super::engine::{Engine, io_error};
use super::fresh::Fresh;
use super::record::Record;
use super::segment::{HEADER_BYTES, SegmentReader};
use super::types::*;
use crate::ids::{AttemptKey, Stream};
use crate::limits::{BATCH_HEADS_BYTES, READ_BYTES_MAX};

impl Engine {
    /// Reads unacknowledged messages forward from a cursor.
    pub fn read(&mut self, request: ReadRequest) -> Batch {
        let ReadRequest {
            from,
            max_messages,
            max_bytes,
            skip,
            mut buffer,
            mut messages,
        } = request;
        buffer.clear();
        if from == Cursor::START {
            // Who reads everything needs the memory for that.
            self.fresh = Fresh::default();
        }
        // At once and no more: a buffer that grows step by step becomes too large to be used again.
        buffer.reserve_exact(max_bytes.min(READ_BYTES_MAX) + BATCH_HEADS_BYTES);
        messages.clear();
        let mut batch = Batch {
            messages,
            buffer,
            next: from,
            behind_bytes: 0,
            at_end: false,
        };
        self.read_ahead(max_messages, max_bytes, skip, &mut batch);
        let finals: HashSet<u64> = self
            .attempts
            .values()
            .filter(|attempt| attempt.sends() && attempt.final_waits())
            .filter_map(|attempt| attempt.fin.map(|fin| fin.at.generation))
            .collect();
        let mut full = false;
        while !full {
            let segments = &self.log.segments;
            let at = segments.partition_point(|it| it.generation() < batch.next.generation);
            let Some(segment) = segments.get(at) else {
                batch.at_end = true;
                break;
            };
            let (generation, end) = (segment.generation(), segment.end);
            if batch.next.generation != generation {
                batch.next = Cursor::unit(generation, HEADER_BYTES);
            }
            let something = finals.contains(&generation) || self.has_waiting_output(segment);
            while something && !full && batch.next.byte() < end {
                full = self.read_segment(at, max_messages, max_bytes, skip, &mut batch);
            }
            if !full {
                let is_last = at + 1 == self.log.segments.len();
                if is_last {
                    batch.next = Cursor::unit(generation, end.max(batch.next.byte()));
                    batch.at_end = true;
                    break;
                }
                batch.next = Cursor::unit(generation + 1, HEADER_BYTES);
                // No message is shorter: the next segment need not be opened.
                full = !batch.has_room(1, max_messages, max_bytes);
            }
        }
        batch.behind_bytes = self.log.bytes_behind(batch.next);
        batch
    }

    /// Reads on in one segment, in the part of it that is in memory or in what lies before or behind
    /// that. `true` if the batch is full; `next` points at what follows in either case.
    fn read_segment(
        &mut self,
        at: usize,
        max_messages: usize,
        max_bytes: usize,
        skip: Option<(AttemptKey, Stream)>,
        batch: &mut Batch,
    ) -> bool {
        let segment = &self.log.segments[at];
        let (generation, seed) = (segment.generation(), segment.header.seed());
        let (from, end) = (batch.next.byte(), segment.end);
        if let Some(full) = self.read_in_place(seed, max_messages, max_bytes, skip, batch) {
            return full;
        }
        let fresh = self.fresh.position(generation, from);
        let (reader, end) = if let Some(position) = fresh {
            let (reader, end) = self.fresh.lend(position, seed);
            (Some(reader), end)
        } else {
            let begin = self.fresh.begin_behind(generation, from);
            (self.take_reader(at), begin.unwrap_or(end))
        };
        let Some(mut reader) = reader else {
            batch.next = Cursor::unit(generation, end);
            return false;
        };
        reader.expect(
            max_messages.saturating_sub(batch.messages.len()),
            max_bytes.saturating_sub(batch.buffer.len()),
        );
        let is_full = |batch: &Batch, bytes| !batch.has_room(bytes, max_messages, max_bytes);
        let mut place = batch.next;
        let full = loop {
            // What is damaged before it is passed over once.
            let Some(next) = reader.next_place(place, end) else {
                break false;
            };
            place = next;
            // Asked first: what has no room lies behind the window, and would be read for nothing.
            let bytes = reader.body_bytes(place.byte(), end);
            if bytes.is_some_and(|bytes| is_full(batch, bytes)) {
                break true;
            }
            let Some((offset, head, after)) = reader.next_record(place, end) else {
                break false;
            };
            let here = Cursor::record(generation, offset);
            if let Some(body) = reader.body(offset, &head, end)
                && let Some(record) = Record::decode(&head, body)
                && let Some(message) = self.message(here, head.key, &record, skip)
                && !self.ahead.has_just_given(&message)
            {
                // Where something is damaged it is not the record that was asked about.
                if is_full(batch, body.len()) {
                    break true;
                }
                push_message(batch, message, &record);
            }
            place = after.cursor(generation);
        };
        if full {
            batch.next = place;
        } else {
            batch.next = Cursor::unit(generation, end);
        }
        if let Some(position) = fresh {
            self.fresh.give_back(position, reader);
        } else {
            reader.shrink();
            self.reading = Some((generation, reader));
        }
        full
    }

    /// The reader of a segment, with the window that was read last if it is the same one.
    pub(super) fn take_reader(&mut self, at: usize) -> Option<SegmentReader> {
        let generation = self.log.segments[at].generation();
        let window = match self.reading.take() {
            Some((open, mut reader)) if open == generation => {
                // The active segment has grown since.
                reader.forget();
                return Some(reader);
            }
            Some((_, reader)) => reader.into_window(),
            None => std::mem::take(&mut self.window),
        };
        match self.log.reader(at, window) {
            Ok(reader) => Some(reader),
            Err(why) => {
                log::error!(
                    "cannot read a segment of the outbox: {why}; its output is passed over"
                );
                None
            }
        }
    }

    /// The message that a record stands for, with empty ranges, if it waits.
    pub(super) fn message(
        &self,
        at: Cursor,
        key: AttemptKey,
        record: &Record<'_>,
        skip: Option<(AttemptKey, Stream)>,
    ) -> Option<Message> {
        let attempt = self.attempts.get(&key).filter(|attempt| attempt.sends())?;
        let body = match record {
            Record::Output {
                stream, sequence, ..
            } => {
                let state = attempt.stream(*stream);
                if !state.waits(*sequence) || skip == Some((key, *stream)) {
                    return None;
                }
                Body::Output {
                    stream: *stream,
                    sequence: *sequence,
                    data: 0..0,
                    after_hole: state.after_hole(*sequence),
                }
            }
            Record::Final { ending, .. } => {
                let current = attempt.fin.is_some_and(|fin| fin.at == at);
                let skipped = skip.is_some_and(|(skipped, _)| skipped == key);
                if !current || !attempt.final_waits() || skipped {
                    return None;
                }
                Body::Final {
                    status: ending.status,
                    exit_code: ending.exit_code,
                    output: 0..0,
                    error: 0..0,
                    output_truncated: ending.output_truncated,
                    error_truncated: ending.error_truncated,
                    usage: ending.usage,
                }
            }
            _ => return None,
        };
        Some(Message {
            at,
            key,
            store: attempt.born.unwrap_or(self.log.incarnation),
            ids: Arc::clone(&attempt.ids),
            body,
        })
    }

    /// Where the first waiting chunk of a stream from this sequence on is.
    pub fn rewind(&mut self, key: AttemptKey, stream: Stream, from: u64) -> Option<Cursor> {
        let attempt = self.attempts.get(&key).filter(|attempt| attempt.sends())?;
        let from = from.max(attempt.stream(stream).mark.done + 1);
        for at in 0..self.log.segments.len() {
            let segment = &self.log.segments[at];
            let (generation, end) = (segment.generation(), segment.end);
            let mine = |span: &&super::log::Span| span.key == key && span.stream == stream;
            let Some(span) = segment
                .spans
                .iter()
                .find(mine)
                .filter(|span| span.last >= from)
            else {
                continue;
            };
            let mut place = Cursor::unit(generation, span.unit_offset);
            let mut reader = self.take_reader(at)?;
            while let Some((offset, head, after)) = reader.next_record(place, end) {
                if head.key == key
                    && let Some(body) = reader.body(offset, &head, end)
                    && let Some(Record::Output {
                        stream: other,
                        sequence,
                        ..
                    }) = Record::decode(&head, body)
                    && other == stream
                    && sequence >= from
                    && self.attempts.get(&key)?.stream(stream).waits(sequence)
                {
                    self.reading = Some((generation, reader));
                    return Some(Cursor::record(generation, offset));
                }
                place = after.cursor(generation);
            }
            self.reading = Some((generation, reader));
        }
        None
    }

    // ---- single records -----------------------------------------------------------------------

    /// Reads the record at `at` and hands it over, if it is still as it was written.
    fn with_record<T>(
        &mut self,
        at: Cursor,
        take: impl FnOnce(&Record<'_>) -> Option<T>,
    ) -> Option<T> {
        let position = self.log.position(at.generation)?;
        let end = self.log.segments[position].end;
        let mut reader = self.take_reader(position)?;
        let (head, body) = reader.record_at(at.byte(), end)?;
        let taken = Record::decode(&head, body).and_then(|record| take(&record));
        reader.shrink();
        self.reading = Some((at.generation, reader));
        taken
    }

    /// The command of an attempt that has not started.
    pub fn stored_command(&mut self, key: AttemptKey) -> Option<Vec<u8>> {
        let attempt = self.attempts.get(&key)?;
        let at = attempt.identity_at;
        self.with_record(at, |record| match record {
            Record::Received { command, .. } => Some(command.to_vec()),
            _ => None,
        })
    }

    /// The texts of an attempt's final.
    pub fn stored_texts(&mut self, key: AttemptKey) -> Option<(Vec<u8>, Vec<u8>)> {
        let at = self.attempts.get(&key)?.fin?.at;
        self.with_record(at, |record| match record {
            Record::Final { output, error, .. } => Some((output.to_vec(), error.to_vec())),
            _ => None,
        })
    }

    pub fn load_task(&mut self, key: AttemptKey) -> Result<Option<Receipt>, StoreError> {
        let waiting = self
            .attempts
            .get(&key)
            .filter(|attempt| attempt.phase() == Phase::Received);
        let Some(attempt) = waiting else {
            return Ok(None);
        };
        let (ids, priority) = ((*attempt.ids).clone(), attempt.priority);
        let (timeout_seconds, received_at_ms) = (attempt.timeout_seconds, attempt.received_at_ms);
        match self.stored_command(key) {
            Some(command) => Ok(Some(Receipt {
                ids,
                command,
                priority,
                timeout_seconds,
                received_at_ms,
            })),
            None => Err(io_error(&std::io::Error::other(
                "the stored command cannot be read back",
            ))),
        }
    }

    pub fn final_of(&mut self, key: AttemptKey) -> Option<StoredFinal> {
        if let Some(attempt) = self.attempts.get(&key) {
            if attempt.discarded {
                return None;
            }
            let ending = attempt.fin?.ending;
            let store = attempt.born.unwrap_or(self.log.incarnation);
            let (held, output_waits) = (!attempt.final_done, attempt.output_waits());
            let texts = if held { self.stored_texts(key) } else { None };
            let texts_held = texts.is_some();
            let (output, error) = texts.unwrap_or_default();
            return Some(StoredFinal {
                key,
                store,
                fin: Final {
                    status: ending.status,
                    exit_code: ending.exit_code,
                    output,
                    error,
                    output_truncated: ending.output_truncated || !texts_held,
                    error_truncated: ending.error_truncated || !texts_held,
                    usage: ending.usage,
                },
                texts_held,
                output_waits,
            });
        }
        let Some(entry) = self.index_entry(key).ok()? else {
            return self.frozen.as_mut()?.final_of(key);
        };
        (!entry.discarded).then_some(StoredFinal {
            key,
            store: entry.born.unwrap_or(self.log.incarnation),
            fin: Final {
                status: entry.status,
                exit_code: entry.exit_code,
                output: Vec::new(),
                error: Vec::new(),
                output_truncated: true,
                error_truncated: true,
                usage: None,
            },
            texts_held: false,
            output_waits: false,
        })
    }

    /// The last bytes of a stream that are held, for a final that nobody was there to write;
    /// and whether more had been printed or lost.
    pub fn held_tail(&mut self, key: AttemptKey, stream: Stream, max: usize) -> (Vec<u8>, bool) {
        let Some(attempt) = self.attempts.get(&key) else {
            return (Vec::new(), true);
        };
        let last = attempt.stream(stream).mark.last;
        let mut truncated = !attempt.ids.has_result_channel();
        let mine = |span: &&super::log::Span| span.key == key && span.stream == stream;
        let mut held = 0;
        let mut first_segment = self.log.segments.len();
        for (at, segment) in self.log.segments.iter().enumerate().rev() {
            if held >= max as u64 {
                break;
            }
            if let Some(span) = segment.spans.iter().find(mine) {
                held += span.bytes;
                first_segment = at;
            }
        }
        let mut text = Vec::new();
        let mut expected = 1;
        for at in first_segment..self.log.segments.len() {
            self.walk(at, |_, other, record| {
                if let Record::Output {
                    stream: its,
                    sequence,
                    data,
                } = record
                    && other == key
                    && *its == stream
                {
                    truncated |= *sequence != expected;
                    expected = sequence + 1;
                    text.extend_from_slice(data);
                    // Not for each chunk: they may be small and many.
                    if text.len() > 2 * max + data.len() {
                        truncated = true;
                        text.drain(..text.len() - max);
                    }
                }
            });
        }
        if text.len() > max {
            truncated = true;
            text.drain(..text.len() - max);
        }
        truncated |= expected != last + 1;
        let split = text
            .iter()
            .take(3)
            .take_while(|byte| *byte & 0xc0 == 0x80)
            .count();
        if truncated {
            text.drain(..split);
        }
        (text, truncated)
    }

    // ---- summaries ----------------------------------------------------------------------------

    /// Unacknowledged finals, oldest first.
    fn waiting_finals(&self) -> Vec<AttemptKey> {
        let waits = self
            .attempts
            .iter()
            .filter(|(_, attempt)| attempt.final_waits());
        let mut finals: Vec<(u64, u64, AttemptKey)> = waits
            .map(|(key, attempt)| {
                let wall_ms = attempt.fin.map_or(0, |fin| fin.wall_ms);
                (wall_ms, attempt.arrival, *key)
            })
            .collect();
        finals.sort_unstable();
        finals.into_iter().map(|(.., key)| key).collect()
    }

    pub fn finals_waiting(&self, max: usize) -> Vec<FinalWaiting> {
        let keys = self.waiting_finals().into_iter().take(max);
        keys.filter_map(|key| {
            let attempt = self.attempts.get(&key)?;
            Some(FinalWaiting {
                ids: Arc::clone(&attempt.ids),
                key,
                output_waits: attempt.output_waits(),
            })
        })
        .collect()
    }

    pub fn snapshot(&mut self, text_budget_bytes: usize) -> Snapshot {
        let mut snapshot = Snapshot {
            counts: self.counts(),
            ..Snapshot::default()
        };
        let mut by_arrival: Vec<_> = self.attempts.iter().collect();
        by_arrival.sort_unstable_by_key(|(_, attempt)| attempt.arrival);
        for (&key, attempt) in by_arrival {
            if let Some(born) = attempt.born.filter(|b| !snapshot.inherited.contains(b)) {
                snapshot.inherited.push(born);
            }
            let ids = || Arc::clone(&attempt.ids);
            match attempt.phase() {
                Phase::Received => snapshot.received.push((ids(), attempt.received_at_ms)),
                Phase::Started => {
                    let last = attempt.streams.each_ref().map(|stream| stream.mark.last);
                    snapshot.started.push((ids(), attempt.started_at_ms, last));
                }
                Phase::Finished { .. } | Phase::Discarded => {}
            }
            for stream in Stream::ALL {
                let state = attempt.stream(stream);
                if let Some((first_sequence, last_sequence)) =
                    state.range().filter(|_| attempt.sends())
                {
                    snapshot.streams.push(StreamRange {
                        ids: ids(),
                        key,
                        stream,
                        first_sequence,
                        last_sequence,
                        truncated: state.mark.truncated,
                    });
                }
            }
        }
        snapshot
            .started
            .sort_by_key(|(_, started_at_ms, _)| *started_at_ms);
        let mut budget = text_budget_bytes as u64;
        for key in self.waiting_finals() {
            let Some((ids, text_bytes)) = self.attempts.get(&key).and_then(|attempt| {
                let fin = attempt.fin.filter(|_| attempt.sends())?;
                Some((Arc::clone(&attempt.ids), fin.text_bytes))
            }) else {
                continue;
            };
            if text_bytes > budget {
                break;
            }
            if let Some(stored) = self.final_of(key).filter(|stored| stored.texts_held) {
                budget -= text_bytes;
                snapshot.finals.push((ids, stored));
            }
        }
        snapshot
    }

    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            bytes_used: self.log.used_bytes(),
            byte_cap: self.bounds.cap_bytes,
            attempts_open: self.attempts.len() as u64,
            chunks_dropped: self.tally.chunks_dropped,
            bytes_dropped: self.tally.bytes_dropped,
            streams_truncated: self.tally.streams_truncated,
            finals_dropped: self.tally.finals_dropped,
            attempts_discarded: self.tally.attempts_discarded,
            records_damaged: self.tally.records_damaged,
            index_rebuilt: self.tally.index_rebuilt,
            ..Counts::default()
        };
        let mut oldest: Option<u64> = None;
        for attempt in self.attempts.values() {
            if let Some(fin) = attempt.fin.filter(|_| attempt.final_waits()) {
                counts.messages_waiting += 1;
                counts.bytes_waiting += fin.text_bytes;
                oldest = Some(oldest.map_or(fin.wall_ms, |ms| ms.min(fin.wall_ms)));
            }
            if attempt.sends() {
                counts.messages_waiting += attempt
                    .streams
                    .iter()
                    .map(|stream| stream.waiting())
                    .sum::<u64>();
                counts.has_rotated_chunks |=
                    attempt.streams.iter().any(|stream| stream.mark.truncated);
            }
        }
        for segment in &self.log.segments {
            for span in &segment.spans {
                let Some(attempt) = self.attempts.get(&span.key).filter(|a| a.sends()) else {
                    continue;
                };
                let done = attempt.stream(span.stream).mark.done.max(span.first - 1);
                if done < span.last {
                    let all = span.last - span.first + 1;
                    counts.bytes_waiting += span.bytes * (span.last - done) / all;
                    oldest = Some(oldest.map_or(segment.first_ms, |ms| ms.min(segment.first_ms)));
                }
            }
        }
        counts.oldest_waiting_ms = oldest;
        counts
    }
}

pub(super) fn push_message(batch: &mut Batch, mut message: Message, record: &Record<'_>) {
    let mut take = |bytes: &[u8]| {
        let from = batch.buffer.len();
        batch.buffer.extend_from_slice(bytes);
        from..from + bytes.len()
    };
    match (&mut message.body, record) {
        (Body::Output { data, .. }, Record::Output { data: bytes, .. }) => *data = take(bytes),
        (
            Body::Final { output, error, .. },
            Record::Final {
                output: output_bytes,
                error: error_bytes,
                ..
            },
        ) => {
            *output = take(output_bytes);
            *error = take(error_bytes);
        }
        _ => {}
    }
    batch.messages.push(message);
}
