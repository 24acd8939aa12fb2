//! Client of the operator API, for `submit`, `agents` and `demo`.

use futures_lite::AsyncWrite;
use serde::{Deserialize, Serialize};

/// Where the operator API is, and what opens it.
#[derive(Clone)]
pub struct OperatorClient {
    gateway_url: String,
    operator_token: Option<String>,
}

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

impl OperatorClient {
    /// `gateway_url` is `http://…` or `https://…`. The error says what is wrong with it.
    pub fn new(
        gateway_url: &str,
        operator_token: Option<String>,
    ) -> Result<OperatorClient, String> {
        Ok(OperatorClient {
            gateway_url: gateway_url.to_owned(),
            operator_token,
        })
    }

    /// Submits a task, copies its live output to `stdout` and `stderr` byte for byte, and returns
    /// the exit code for this process: the task's own, or 1 where it has none (failed by a signal
    /// or timeout, interrupted), with the reason on `stderr`. A gateway that goes away after the
    /// task was accepted is dialled again and the output goes on from where it was.
    pub async fn submit(
        &self,
        submission: &Submission,
        stdout: &mut (impl AsyncWrite + Unpin),
        stderr: &mut (impl AsyncWrite + Unpin),
    ) -> Result<i32, String> {
        let task = self.submit_detached(submission).await?;
        self.follow(&task.task_id, stdout, stderr).await
    }

    /// Submits a task and returns at once.
    pub async fn submit_detached(&self, _submission: &Submission) -> Result<Submitted, String> {
        Err(self.gateway_url.clone())
    }

    /// The second half of [`OperatorClient::submit`], for a task submitted before.
    pub async fn follow(
        &self,
        _task_id: &str,
        _stdout: &mut (impl AsyncWrite + Unpin),
        _stderr: &mut (impl AsyncWrite + Unpin),
    ) -> Result<i32, String> {
        Err(self.gateway_url.clone())
    }

    pub async fn task(&self, _task_id: &str) -> Result<TaskInfo, String> {
        Err(self.operator_token.clone().unwrap_or_default())
    }

    /// Asks for the task to be ended (extension `cancel`).
    pub async fn cancel(&self, _task_id: &str, _reason: Option<&str>) -> Result<(), String> {
        Err(self.gateway_url.clone())
    }

    pub async fn agents(&self) -> Result<Vec<AgentInfo>, String> {
        Err(self.gateway_url.clone())
    }

    /// Cuts the TCP connection of the agent's session. `true` if there was one.
    pub async fn disconnect(&self, _agent_id: &str) -> Result<bool, String> {
        Err(self.gateway_url.clone())
    }
}
