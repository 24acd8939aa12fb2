//! Client of the operator API, for `submit`, `agents` and `demo`.

use futures_lite::AsyncWrite;
pub use super::operator_types::*;

/// Where the operator API is, and what opens it.
#[derive(Clone)]
pub struct OperatorClient {
    gateway_url: String,
    operator_token: Option<String>,
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
