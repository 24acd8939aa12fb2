//! What is accepted for an attempt and what is refused (PROTOCOL.md 3 and 4). Pure.
//!
//! [`Attempt::apply`] is the only way in which the state changes, and it takes journal records: the
//! same ones when a message is accepted and when the journal is read after a restart. So the two
//! cannot differ.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::journal::{self, FLAG_INEXACT, FLAG_JUMP, Header, Kind};
use super::operator_types::{StreamInfo, TaskInfo, TaskResult};
use crate::ids::{AttemptKey, Ids, Stream};
use crate::limits::GATEWAY_RECENT_CHUNKS;

/// A task as it was submitted; the first record of its journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRecord {
    pub task_id: String,
    /// Empty for a task that goes by poll and report alone (PROTOCOL.md 2, Poll).
    pub attempt_id: String,
    pub agent_id: String,
    pub command: String,
    pub priority: i64,
    #[serde(default)]
    pub timeout_seconds: Option<u64>,
    /// Order of submission.
    pub number: u64,
    /// RFC 3339.
    pub created_at: String,
}

impl TaskRecord {
    pub fn key(&self) -> AttemptKey {
        AttemptKey::of(&self.task_id, &self.attempt_id)
    }
}

/// How far the agent has said that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    Pending,
    Received,
    Started,
    Ended,
}

/// A chunk that was accepted, as far as it is needed to tell whether a repeat is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RecentChunk {
    sequence: u64,
    byte_count: u64,
    checksum: u32,
    exact: bool,
}

/// What was accepted of one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamState {
    /// Highest sequence; 0 = none yet.
    pub highest: u64,
    pub bytes: u64,
    pub jumps: u64,
    recent: VecDeque<RecentChunk>,
}

/// A chunk that came, decoded.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    pub stream: Stream,
    pub sequence: u64,
    pub bytes: &'a [u8],
    /// Bytes that it stands for at the agent.
    pub byte_count: u64,
    /// `bytes` are exactly the agent's; not a text with replacement characters.
    pub exact: bool,
    pub truncated_locally: bool,
}

/// What to do with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputVerdict {
    /// Store this record and acknowledge.
    Store(Header),
    /// Held already: acknowledge again.
    Repeat,
    /// Held already with other bytes: acknowledge again, keep the first, and say so loudly.
    ChangedRepeat,
    /// Chunks between `highest` and this one are missing.
    Gap { highest: u64 },
}

/// What to do with a final.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinalVerdict {
    Store,
    Repeat,
    /// Another final of the same attempt: acknowledge, keep the first, and say so loudly.
    Changed,
}

/// One execution of one task.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub task: TaskRecord,
    pub ids: Ids,
    pub progress: Progress,
    pub streams: [StreamState; 2],
    pub cancel_reason: Option<String>,
    pub result: Option<TaskResult>,
}

impl Attempt {
    /// `None` if the ids are empty or too long.
    pub fn new(task: TaskRecord) -> Option<Attempt> {
        let ids = Ids::new(&task.task_id, &task.attempt_id)?;
        Some(Attempt {
            task,
            ids,
            progress: Progress::Pending,
            streams: Default::default(),
            cancel_reason: None,
            result: None,
        })
    }

    /// Takes a record that was, or is about to be, written behind all earlier ones.
    pub fn apply(&mut self, header: &Header, payload: &[u8]) {
        match header.kind {
            Kind::Task => {}
            Kind::Received => self.progress = self.progress.max(Progress::Received),
            Kind::Started => self.progress = self.progress.max(Progress::Started),
            Kind::Cancel => {
                self.cancel_reason = Some(String::from_utf8_lossy(payload).into_owned());
            }
            Kind::Output(stream) => {
                self.progress = self.progress.max(Progress::Started);
                let state = &mut self.streams[stream.index()];
                state.highest = header.sequence;
                state.bytes += header.length as u64;
                state.jumps += u64::from(header.flags & FLAG_JUMP != 0);
                if state.recent.len() == GATEWAY_RECENT_CHUNKS {
                    state.recent.pop_front();
                }
                state.recent.push_back(RecentChunk {
                    sequence: header.sequence,
                    byte_count: header.byte_count,
                    checksum: header.checksum,
                    exact: header.flags & FLAG_INEXACT == 0,
                });
            }
            Kind::Final => {
                self.progress = Progress::Ended;
                self.result =
                    Some(
                        serde_json::from_slice(payload).unwrap_or_else(|error| TaskResult {
                            status: "failed".into(),
                            exit_code: -1,
                            error: Some(format!("the stored result cannot be read: {error}")),
                            ..TaskResult::default()
                        }),
                    );
            }
        }
    }

    pub fn judge_output(&self, chunk: &Chunk<'_>) -> OutputVerdict {
        let state = &self.streams[chunk.stream.index()];
        let checksum = crc32c::crc32c(chunk.bytes);
        if chunk.sequence <= state.highest {
            let first = state
                .recent
                .iter()
                .rev()
                .find(|recent| recent.sequence == chunk.sequence);
            // The encoding of a repeat may differ (PROTOCOL.md 4.3): bytes are compared only
            // where both are exact. The byte count is the agent's own and never differs.
            let changed = first.is_some_and(|first| {
                first.byte_count != chunk.byte_count
                    || (first.exact && chunk.exact && first.checksum != checksum)
            });
            return match changed {
                true => OutputVerdict::ChangedRepeat,
                false => OutputVerdict::Repeat,
            };
        }
        let jump = chunk.sequence > state.highest + 1;
        if jump && !chunk.truncated_locally {
            return OutputVerdict::Gap {
                highest: state.highest,
            };
        }
        let mut flags = 0;
        if jump {
            flags |= FLAG_JUMP;
        }
        if !chunk.exact {
            flags |= FLAG_INEXACT;
        }
        OutputVerdict::Store(Header {
            kind: Kind::Output(chunk.stream),
            flags,
            length: chunk.bytes.len(),
            sequence: chunk.sequence,
            byte_count: chunk.byte_count,
            checksum,
        })
    }

    pub fn judge_final(&self, result: &TaskResult) -> FinalVerdict {
        match &self.result {
            None => FinalVerdict::Store,
            // A report carries the texts in another form, so only like is compared with like; and
            // a final that is repeated long after its end may come without its texts.
            Some(first) if first.via != result.via => FinalVerdict::Repeat,
            Some(first)
                if first.status == result.status
                    && first.exit_code == result.exit_code
                    && same_text(&first.output, &result.output)
                    && same_text(&first.error, &result.error) =>
            {
                FinalVerdict::Repeat
            }
            Some(_) => FinalVerdict::Changed,
        }
    }

    pub fn info(&self) -> TaskInfo {
        let stream = |stream: Stream| {
            let state = &self.streams[stream.index()];
            StreamInfo {
                highest_sequence: state.highest,
                bytes: state.bytes,
                truncated_jumps: state.jumps,
            }
        };
        TaskInfo {
            task_id: self.task.task_id.clone(),
            execution_attempt_id: self.task.attempt_id.clone(),
            agent_id: self.task.agent_id.clone(),
            command: self.task.command.clone(),
            status: match (self.progress, &self.result) {
                (_, Some(result)) => result.status.clone(),
                (Progress::Pending, None) => "pending".into(),
                (Progress::Received, None) => "received".into(),
                (Progress::Started | Progress::Ended, None) => "running".into(),
            },
            priority: self.task.priority,
            created_at: self.task.created_at.clone(),
            cancel_requested: self.cancel_reason.is_some(),
            stdout: stream(Stream::Stdout),
            stderr: stream(Stream::Stderr),
            result: self.result.clone(),
        }
    }
}

fn same_text(first: &Option<String>, repeat: &Option<String>) -> bool {
    repeat.is_none() || first == repeat
}

/// Appends a record to `out` and applies it.
pub fn record(attempt: &mut Attempt, out: &mut Vec<u8>, header: Header, payload: &[u8]) {
    journal::append(out, header, payload);
    attempt.apply(&header, payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt() -> Attempt {
        Attempt::new(TaskRecord {
            task_id: "t".into(),
            attempt_id: "a".into(),
            agent_id: "agent".into(),
            command: "true".into(),
            priority: 0,
            timeout_seconds: None,
            number: 1,
            created_at: String::new(),
        })
        .expect("short ids")
    }

    fn chunk(sequence: u64, bytes: &[u8]) -> Chunk<'_> {
        Chunk {
            stream: Stream::Stdout,
            sequence,
            bytes,
            byte_count: bytes.len() as u64,
            exact: true,
            truncated_locally: false,
        }
    }

    fn store(attempt: &mut Attempt, chunk: Chunk<'_>) {
        match attempt.judge_output(&chunk) {
            OutputVerdict::Store(header) => attempt.apply(&header, chunk.bytes),
            other => panic!("{chunk:?} is not stored: {other:?}"),
        }
    }

    #[test]
    fn chunks_are_taken_in_order_and_only_once() {
        let mut attempt = attempt();
        store(&mut attempt, chunk(1, b"one"));
        store(&mut attempt, chunk(2, b"two"));
        let check = |chunk, verdict| assert_eq!(attempt.judge_output(&chunk), verdict);
        check(chunk(1, b"one"), OutputVerdict::Repeat);
        check(chunk(2, b"tWo"), OutputVerdict::ChangedRepeat);
        check(chunk(2, b"twoo"), OutputVerdict::ChangedRepeat);
        check(chunk(4, b"four"), OutputVerdict::Gap { highest: 2 });
        assert_eq!(attempt.streams[0].bytes, 6);
        assert_eq!(attempt.streams[1], StreamState::default());
    }

    #[test]
    fn a_flagged_jump_is_taken_and_recorded() {
        let mut attempt = attempt();
        let jump = Chunk {
            truncated_locally: true,
            ..chunk(5, b"five")
        };
        store(&mut attempt, jump);
        assert_eq!(attempt.streams[0].highest, 5);
        assert_eq!(attempt.streams[0].jumps, 1);
        // The flag without a jump is no jump.
        store(
            &mut attempt,
            Chunk {
                sequence: 6,
                ..jump
            },
        );
        assert_eq!(attempt.streams[0].jumps, 1);
    }

    #[test]
    fn a_repeat_in_another_encoding_is_the_same_message() {
        let mut attempt = attempt();
        let lossy = Chunk {
            byte_count: 1,
            exact: false,
            ..chunk(1, "\u{fffd}".as_bytes())
        };
        store(&mut attempt, lossy);
        let exact = chunk(1, b"\xff");
        assert_eq!(attempt.judge_output(&exact), OutputVerdict::Repeat);
        let other = chunk(1, b"\xff\xff");
        assert_eq!(attempt.judge_output(&other), OutputVerdict::ChangedRepeat);
    }

    #[test]
    fn the_first_final_stays() {
        let mut attempt = attempt();
        let first = TaskResult {
            status: "completed".into(),
            output: Some("text".into()),
            via: "websocket".into(),
            ..TaskResult::default()
        };
        assert_eq!(attempt.judge_final(&first), FinalVerdict::Store);
        let payload = serde_json::to_vec(&first).expect("json");
        attempt.apply(&Header::plain(Kind::Final, &payload), &payload);
        assert_eq!(attempt.progress, Progress::Ended);
        let check = |result: TaskResult, verdict| {
            assert_eq!(attempt.judge_final(&result), verdict, "{result:?}");
        };
        check(first.clone(), FinalVerdict::Repeat);
        let mut without_texts = first.clone();
        without_texts.output = None;
        check(without_texts, FinalVerdict::Repeat);
        let mut other = first.clone();
        other.exit_code = 1;
        check(other.clone(), FinalVerdict::Changed);
        other.via = "report".into();
        check(other, FinalVerdict::Repeat);
        let mut other = first;
        other.output = Some("other".into());
        check(other, FinalVerdict::Changed);
    }

    #[test]
    fn progress_never_goes_back() {
        let mut attempt = attempt();
        attempt.apply(&Header::plain(Kind::Started, b""), b"");
        attempt.apply(&Header::plain(Kind::Received, b""), b"");
        assert_eq!(attempt.progress, Progress::Started);
    }
}
