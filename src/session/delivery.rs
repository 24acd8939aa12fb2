//! The way of stored messages to the server: one cursor into the outbox for live output and
//! replay alike (DESIGN.md, "The way of a byte").
//!
//! Invariants:
//! - Messages leave in log order, but for finals that the store reads before their turn. A gap error or
//!   a repeat moves the cursor back; what is in flight is then passed over: nothing live overtakes.
//! - A chunk is not sent while an earlier chunk of its stream waits to be sent again, and a final
//!   not while output of its attempt does.
//! - A chunk that tells the server to accept a jump goes only when nothing of its stream is in
//!   flight: the server might want some of that once more, and would jump over it, too.
//! - A message leaves the window only by an acknowledgement, a refusal, or to be sent again.
//!
//! `C` is the outbox's cursor: opaque, ordered as the log, its default before everything.

mod gaps;
mod timers;

use super::Now;
use super::failures::{Failures, LaneId};
use super::window::{InFlight, Room, Window, lane_of};
use crate::ids::{AttemptKey, Stream};
use crate::limits::{
    BATCHES_IN_WRITER, LANES_MAX, READ_BYTES_MAX, STREAM_STALL, WINDOW_BYTES, WINDOW_MESSAGES,
    WINDOW_STREAM_BYTES, WINDOW_STREAM_MESSAGES,
};
use crate::wire::Piece;

/// A stored message that could be sent next.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<C> {
    pub at: C,
    pub key: AttemptKey,
    /// Output or final.
    pub piece: Piece,
    /// Raw payload.
    pub bytes: usize,
    /// The chunk before it was lost on the device.
    pub after_hole: bool,
}

/// A candidate that is to be sent, by its place in the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    pub index: usize,
    /// Tell the server to accept the jump.
    pub truncated: bool,
}

pub type Admission = heapless::Vec<Admitted, WINDOW_MESSAGES>;

/// What to read from the outbox next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOrder<C> {
    pub from: C,
    pub max_messages: usize,
    /// Raw payload; at least 1.
    pub max_bytes: usize,
    pub skip: Option<(AttemptKey, Stream)>,
}

/// What must be asked of the outbox, or told to the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Where is the first held chunk from this sequence on?
    Locate {
        key: AttemptKey,
        stream: Stream,
        from: u64,
    },
    /// The server will never take this stream.
    GiveUp { key: AttemptKey, stream: Stream },
    /// Nothing was acknowledged here, although it was sent twice.
    Expired(LaneId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow<C> {
    Open,
    /// Waits to learn where to read it again.
    Rewinding,
    /// At its bound and without acknowledgements: passed over from here on.
    Parked(C),
}

/// One resend for a gap error. Reports that the first copies had already caused are told from
/// those that the resent ones cause by their order: within a round, related sequences rise.
#[derive(Debug, Clone, Copy)]
struct GapRound {
    highest_accepted: u64,
    last_related: u64,
    round_high: u64,
    resent_at: Now,
    /// The gap was reported anew, for this sequence, while the resend may still be on its way.
    again: Option<u64>,
}

#[derive(Debug, Clone)]
struct Lane<C> {
    id: LaneId,
    /// Last progress, or the first message sent since nothing was in flight.
    since: Now,
    /// Its unacknowledged part has been sent again once.
    resent: bool,
    flow: Flow<C>,
    gap: Option<GapRound>,
}

/// More than a stream may have in flight: it returns when nothing is.
const WAIT_FOR_ALL: usize = WINDOW_STREAM_BYTES + 1;

/// Why reading stopped before the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    Nothing,
    /// For room for so many bytes.
    Window(usize),
    Stream(LaneId, usize),
}

#[derive(Debug)]
pub struct Delivery<C> {
    active: bool,
    window: Window<C>,
    lanes: heapless::Vec<Lane<C>, LANES_MAX>,
    cursor: C,
    at_end: bool,
    /// Something was stored since the last read began.
    dirty: bool,
    reading: bool,
    /// The cursor went back while a read was under way: its answer does not count.
    stale: bool,
    batches_out: usize,
    /// Drops under way in the store: what is read before they are done does not count.
    holds: usize,
    wait: Wait,
    /// Where the last batch was left, if not all of it could be admitted.
    stopped_at: Option<C>,
    /// Sequences that the server expects next; a chunk beyond is flagged.
    expected: heapless::Vec<(AttemptKey, Stream, u64), WINDOW_MESSAGES>,
    /// This final is being reported over HTTP and must not go over the WebSocket meanwhile.
    withheld: Option<AttemptKey>,
    /// The first message that was passed over and has to be met again.
    passed_over: Option<C>,
    actions: heapless::Vec<Action, LANES_MAX>,
}

impl<C: Copy + Ord + Default> Default for Delivery<C> {
    fn default() -> Delivery<C> {
        Delivery {
            active: false,
            window: Window::default(),
            lanes: heapless::Vec::new(),
            cursor: C::default(),
            at_end: false,
            dirty: false,
            reading: false,
            stale: false,
            batches_out: 0,
            holds: 0,
            wait: Wait::Nothing,
            stopped_at: None,
            expected: heapless::Vec::new(),
            withheld: None,
            passed_over: None,
            actions: heapless::Vec::new(),
        }
    }
}

impl<C: Copy + Ord + Default> Delivery<C> {
    /// A session has become active: everything unacknowledged is sent from the beginning.
    pub fn begin(&mut self) {
        // In place: a fresh one would first stand on the stack, 20 KiB. Three fields outlive a session.
        self.active = true;
        self.window.clear();
        self.lanes.clear();
        self.cursor = C::default();
        (self.at_end, self.dirty, self.stale) = (false, false, self.reading);
        (self.batches_out, self.wait) = (0, Wait::Nothing);
        (self.stopped_at, self.passed_over) = (None, None);
        self.expected.clear();
        self.actions.clear();
    }

    /// The session is over; nothing is in flight any more.
    pub fn end(&mut self) {
        self.begin();
        self.active = false;
    }

    pub fn in_flight(&self) -> (usize, usize) {
        (self.window.len(), self.window.bytes())
    }

    pub fn has_in_flight(&self, key: AttemptKey, piece: Piece) -> bool {
        self.window.contains(key, piece)
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub fn check_counters(&self) {
        self.window.check_counters();
    }

    /// Something new to send has been stored.
    pub fn appended(&mut self) {
        self.dirty = true;
    }

    /// A batch has gone to the socket.
    pub fn transmitted(&mut self) {
        self.batches_out = self.batches_out.saturating_sub(1);
    }

    pub fn next_action(&mut self) -> Option<Action> {
        if self.actions.is_empty() {
            None
        } else {
            Some(self.actions.remove(0))
        }
    }

    /// The server expects `next` on this stream: if the first chunk sent is a later one, it is
    /// flagged. More expectations than fit are dropped; the server's gap error then does the same.
    pub fn expect(&mut self, key: AttemptKey, stream: Stream, next: u64) {
        self.expected
            .retain(|&(of, on, _)| (of, on) != (key, stream));
        let _ = self.expected.push((key, stream, next));
    }

    /// Keeps one final from the WebSocket while it is reported, or lets it go again.
    pub fn withhold(&mut self, key: Option<AttemptKey>) {
        self.withheld = key;
        self.stale |= self.reading && key.is_none(); // It may have been reported since.
        if key.is_none()
            && let Some(at) = self.passed_over.take()
        {
            self.rewind_to(at);
        }
    }

    /// Something is about to be dropped from the store: nothing is read until it is done.
    pub fn hold(&mut self) {
        self.holds += 1;
        self.stale = self.reading;
    }

    /// It has been dropped; or not, and then it is met again.
    pub fn release(&mut self, is_dropped: bool) {
        self.holds = self.holds.saturating_sub(1);
        if !is_dropped {
            self.rewind_to(C::default());
        }
    }

    /// [`super::Session::stopped_at`].
    pub fn stopped_at(&self) -> Option<C> {
        self.stopped_at
    }

    /// What to read next, if there is room and something to read; answered by [`Delivery::admit`].
    pub fn next_read(&mut self, now: Now) -> Option<ReadOrder<C>> {
        if !self.wants_to_read() || !self.room_returned(now) {
            return None;
        }
        let skip = self.lanes.iter().find_map(|lane| match lane.flow {
            Flow::Parked(_) => lane.id.stream.map(|stream| (lane.id.key, stream)),
            Flow::Open | Flow::Rewinding => None,
        });
        self.reading = true;
        self.stale = false;
        self.dirty = false;
        self.wait = Wait::Nothing;
        Some(ReadOrder {
            from: self.cursor,
            max_messages: WINDOW_MESSAGES,
            max_bytes: READ_BYTES_MAX,
            skip,
        })
    }

    /// Whether only a full window may keep the next read back.
    fn wants_to_read(&self) -> bool {
        self.active
            && !self.reading
            && self.holds == 0
            && self.batches_out < BATCHES_IN_WRITER
            && (!self.at_end || self.dirty)
    }

    /// Room returns in portions, so that a read is worth its while.
    fn room_returned(&self, now: Now) -> bool {
        if self.window.is_empty() {
            return true;
        }
        match self.wait {
            Wait::Nothing => self.window.len() < WINDOW_MESSAGES,
            Wait::Window(bytes) => {
                self.window.len() <= WINDOW_MESSAGES * 3 / 4
                    && self.window.bytes() <= WINDOW_BYTES * 3 / 4
                    && self.window.bytes() + bytes <= WINDOW_BYTES
            }
            Wait::Stream(lane, bytes) => {
                let (used_messages, used_bytes) = self.window.used_by(lane);
                let drained = used_messages <= WINDOW_STREAM_MESSAGES / 2
                    && used_bytes <= WINDOW_STREAM_BYTES / 2
                    && used_bytes + bytes <= WINDOW_STREAM_BYTES;
                used_messages == 0 || drained || self.may_park(lane, now)
            }
        }
    }

    /// Chooses what of a batch is sent. `next` and `at_end` are those of the read.
    pub fn admit(
        &mut self,
        candidates: impl Iterator<Item = Candidate<C>>,
        next: C,
        at_end: bool,
        now: Now,
    ) -> Admission {
        let mut admission = Admission::new();
        self.reading = false;
        self.stopped_at = None;
        if std::mem::take(&mut self.stale) || !self.active {
            // The news that this read was to bring has not been met.
            self.dirty = true;
            return admission;
        }
        let mut candidates = candidates.enumerate();
        while let Some((index, candidate)) = candidates.next() {
            match self.consider(&candidate, now) {
                Verdict::Send { truncated } => {
                    let room = admission.push(Admitted { index, truncated });
                    debug_assert!(room.is_ok(), "the window is not larger than an admission");
                }
                Verdict::PassOver => {}
                Verdict::Stop => {
                    // What is left is read again; this one may have been read before its turn.
                    let left = candidates.map(|(_, it)| it.at);
                    self.cursor = left.chain([candidate.at]).fold(next, C::min);
                    self.stopped_at = Some(self.cursor);
                    self.at_end = false;
                    self.batches_out += usize::from(!admission.is_empty());
                    return admission;
                }
            }
        }
        self.cursor = next;
        self.at_end = at_end;
        if at_end {
            self.forget_idle_lanes();
        }
        self.batches_out += usize::from(!admission.is_empty());
        admission
    }

    fn consider(&mut self, candidate: &Candidate<C>, now: Now) -> Verdict {
        let Candidate { key, piece, .. } = *candidate;
        if self.window.contains(key, piece) {
            return Verdict::PassOver;
        }
        if self.must_wait(key, piece) {
            self.pass_over(candidate.at);
            return Verdict::PassOver;
        }
        let id = lane_of(key, piece);
        match self.window.room_for(key, piece, candidate.bytes) {
            Room::Yes => {}
            Room::WindowFull => {
                self.wait = Wait::Window(candidate.bytes);
                return Verdict::Stop;
            }
            Room::StreamFull => {
                return self.wait_for_stream(id, candidate.at, candidate.bytes, now);
            }
        }
        let truncated = candidate.after_hole || self.jumps(key, piece);
        let waits_for_all = truncated || self.window.is_too_far_ahead(key, piece);
        if waits_for_all && self.window.used_by(id).0 > 0 {
            return self.wait_for_stream(id, candidate.at, WAIT_FOR_ALL, now);
        }
        if !self.follow(id, now) {
            self.wait = Wait::Window(candidate.bytes);
            return Verdict::Stop;
        }
        self.met(key, piece);
        self.window.push(InFlight {
            key,
            piece,
            bytes: candidate.bytes,
            at: candidate.at,
            sent_at: now,
            overtaken: false,
        });
        Verdict::Send { truncated }
    }

    /// Stops until the stream can take so many bytes; one that stands still is passed over.
    fn wait_for_stream(&mut self, id: LaneId, at: C, bytes: usize, now: Now) -> Verdict {
        if self.may_park(id, now)
            && let Some(lane) = self.lane_mut(id)
        {
            lane.flow = Flow::Parked(at);
            return Verdict::PassOver;
        }
        self.wait = Wait::Stream(id, bytes);
        Verdict::Stop
    }

    /// Whether something before this message has to be sent first.
    fn must_wait(&self, key: AttemptKey, piece: Piece) -> bool {
        match piece {
            Piece::Output(stream, _) => self.held_up(key, stream),
            _ => {
                self.withheld == Some(key)
                    || Stream::ALL.iter().any(|&stream| self.held_up(key, stream))
            }
        }
    }

    fn held_up(&self, key: AttemptKey, stream: Stream) -> bool {
        let id = LaneId {
            key,
            stream: Some(stream),
        };
        self.lane(id).is_some_and(|lane| lane.flow != Flow::Open)
    }

    /// Whether the first chunk since an [`Delivery::expect`] is not the one expected.
    fn jumps(&self, key: AttemptKey, piece: Piece) -> bool {
        let Piece::Output(stream, sequence) = piece else {
            return false;
        };
        let mut expected = self.expected.iter();
        expected.any(|&(of, on, next)| (of, on) == (key, stream) && sequence > next)
    }

    /// The first chunk since an [`Delivery::expect`] is on its way.
    fn met(&mut self, key: AttemptKey, piece: Piece) {
        if let Piece::Output(stream, _) = piece {
            self.expected
                .retain(|&(of, on, _)| (of, on) != (key, stream));
        }
    }

    /// An acknowledgement: of this message, and of all output of its stream up to `through`.
    /// Acknowledgements of what is not in flight change nothing here.
    pub fn acknowledged(
        &mut self,
        key: AttemptKey,
        piece: Piece,
        through: Option<u64>,
        failures: &mut Failures,
        now: Now,
    ) {
        self.window.remove(|entry| {
            entry.key == key
                && match (entry.piece, piece) {
                    (Piece::Output(of, sequence), Piece::Output(stream, acked)) => {
                        of == stream
                            && (sequence == acked || through.is_some_and(|high| sequence <= high))
                    }
                    (sent, acked) => sent == acked,
                }
        });
        let mut highest = 0;
        if let Piece::Output(stream, acked) = piece {
            highest = acked.max(through.unwrap_or(0));
            self.window.overtake(key, stream, highest);
        }
        let id = lane_of(key, piece);
        let idle = self.window.used_by(id).0 == 0;
        let back_to = self.unpark(id);
        let mut still_behind = false;
        if let Some(lane) = self.lane_mut(id) {
            lane.since = now;
            lane.resent = false;
            still_behind = lane.gap.is_some_and(|gap| highest <= gap.highest_accepted);
            if !still_behind {
                lane.gap = None;
            }
            if idle && lane.flow == Flow::Open && lane.gap.is_none() {
                self.forget(id);
            }
        }
        if !still_behind {
            failures.clear(id);
        }
        if let Some(at) = back_to {
            self.rewind_to(at);
        }
    }

    /// The server will never take this message.
    pub fn refused(&mut self, key: AttemptKey, piece: Piece) {
        self.window
            .remove(|entry| entry.key == key && entry.piece == piece);
        if let Some(at) = self.unpark(lane_of(key, piece)) {
            self.rewind_to(at);
        }
    }

    /// A retryable error about this message: it is sent again after the acknowledgement timeout.
    pub fn postponed(&mut self, key: AttemptKey, piece: Piece, now: Now) {
        if self.window.postpone(key, piece, now)
            && let Some(lane) = self.lane_mut(lane_of(key, piece))
        {
            // The server answers: this is no lane without progress.
            lane.since = now;
            lane.resent = false;
        }
    }

    fn may_park(&self, id: LaneId, now: Now) -> bool {
        self.parked().is_none()
            && self
                .lane(id)
                .is_some_and(|lane| lane.since + STREAM_STALL <= now)
    }

    fn parked(&self) -> Option<&Lane<C>> {
        self.lanes
            .iter()
            .find(|lane| matches!(lane.flow, Flow::Parked(_)))
    }

    /// Room has returned to a lane: where to go on with it, if it was passed over.
    fn unpark(&mut self, id: LaneId) -> Option<C> {
        let lane = self.lane_mut(id)?;
        let Flow::Parked(at) = lane.flow else {
            return None;
        };
        lane.flow = Flow::Open;
        Some(at)
    }

    fn pass_over(&mut self, at: C) {
        self.passed_over = Some(self.passed_over.map_or(at, |first| first.min(at)));
    }

    fn rewind_to(&mut self, at: C) {
        self.cursor = self.cursor.min(at);
        self.at_end = false;
        self.stale = self.reading;
        self.wait = Wait::Nothing;
    }

    fn lane(&self, id: LaneId) -> Option<&Lane<C>> {
        self.lanes.iter().find(|lane| lane.id == id)
    }

    fn lane_mut(&mut self, id: LaneId) -> Option<&mut Lane<C>> {
        self.lanes.iter_mut().find(|lane| lane.id == id)
    }

    /// Makes sure that a lane is followed, its time counted from now if nothing is in flight.
    fn follow(&mut self, id: LaneId, now: Now) -> bool {
        let idle = self.window.used_by(id).0 == 0;
        if let Some(lane) = self.lane_mut(id) {
            if idle {
                lane.since = now;
            }
            return true;
        }
        if self.lanes.is_full() {
            // Gap errors about what is not held leave lanes behind that nothing will pass.
            self.forget_idle_lanes();
        }
        let lane = Lane {
            id,
            since: now,
            resent: false,
            flow: Flow::Open,
            gap: None,
        };
        self.lanes.push(lane).is_ok()
    }

    fn forget(&mut self, id: LaneId) {
        self.lanes.retain(|lane| lane.id != id);
    }

    /// Everything held has been met: a lane with nothing in flight has nothing left to send.
    fn forget_idle_lanes(&mut self) {
        let window = &self.window;
        self.lanes
            .retain(|lane| lane.flow != Flow::Open || window.used_by(lane.id).0 > 0);
    }

    fn act(&mut self, action: Action) {
        // One lane has one action under way, so they fit; a lost one would be repeated in time.
        let fits = self.actions.push(action);
        debug_assert!(fits.is_ok(), "more actions than lanes");
    }
}

enum Verdict {
    Send { truncated: bool },
    PassOver,
    Stop,
}
