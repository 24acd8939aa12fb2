//! JSON bodies of the operator API, shared by the gateway and its client.

use serde::{Deserialize, Serialize};

use crate::ids::Stream;

/// A task to be submitted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submission {
    /// May be left out where exactly one agent is registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<String>,
    pub command: String,
    /// A larger number is more urgent.
    #[serde(default)]
    pub priority: i64,
    /// Bound of the run time; `None` or 0 means none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
}

/// Names of a task that was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitted {
    pub task_id: String,
    pub execution_attempt_id: String,
}

/// What the gateway has counted for one agent since the gateway started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// WebSocket sessions whose handshake was completed.
    pub sessions: u64,
    /// Chunks accepted and made durable, and the bytes in them.
    pub chunks: u64,
    pub bytes: u64,
    /// Chunks and finals that waited on the device when a session began, as its hellos told.
    pub replayed: u64,
    /// Chunks and finals that came again and were acknowledged again.
    pub duplicates: u64,
    /// Repeats that differed from what was accepted first: a broken agent.
    pub changed_repeats: u64,
    pub gaps: u64,
    /// Jumps accepted because they were flagged `truncated_locally`.
    pub truncated_jumps: u64,
    pub finals: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentInfo {
    pub id: String,
    pub fingerprint: String,
    pub hostname: String,
    /// RFC 3339; `None` while no session is active.
    pub connected_since: Option<String>,
    /// RFC 3339; `None` if it never came.
    pub last_seen: Option<String>,
    pub running_tasks: u64,
    pub pending_tasks: u64,
    pub counters: Counters,
}

/// A task and what is known of its end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskInfo {
    pub task_id: String,
    pub execution_attempt_id: String,
    pub agent_id: String,
    pub command: String,
    /// `pending`, `received`, `running`, or one of the final `completed`, `failed`, `interrupted`.
    pub status: String,
    pub priority: i64,
    pub created_at: String,
    pub cancel_requested: bool,
    pub stdout: StreamInfo,
    pub stderr: StreamInfo,
    pub result: Option<TaskResult>,
}

/// What has been accepted of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamInfo {
    pub highest_sequence: u64,
    pub bytes: u64,
    /// Jumps that were accepted: output is missing there.
    pub truncated_jumps: u64,
}

/// The final of an attempt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskResult {
    /// `completed`, `failed` or `interrupted`.
    pub status: String,
    pub exit_code: i32,
    pub output: Option<String>,
    pub error: Option<String>,
    pub output_truncated: bool,
    pub error_truncated: bool,
    /// `websocket` or `report`.
    pub via: String,
}

/// One line of a task's stream. Exactly one of `stream`, `status`, `final` and `error` is there,
/// or none on a line that only shows that the connection lives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamEvent {
    /// Where the stream goes on behind this line, for `?offset=`; 0 on lines that do not count.
    pub offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<Stream>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_base64: Option<String>,
    /// Output before this chunk was lost at the agent, which said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncated_before: Option<bool>,
    /// `received`, `running` or `cancel_requested`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    pub result: Option<TaskResult>,
    /// The journal cannot be read; the stream ends here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
