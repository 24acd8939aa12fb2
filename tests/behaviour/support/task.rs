//! A task as a test offers it.

use hostlink_edge::ids::Ids;
use serde_json::{Value, json};

#[derive(Debug, Clone)]
pub struct Task {
    pub ids: Ids,
    pub command: String,
    pub priority: i64,
    pub timeout_seconds: Option<u64>,
}

impl Task {
    /// `name` becomes both ids: `task-name` and `attempt-name`.
    pub fn new(name: &str, command: impl Into<String>) -> Task {
        let ids = Ids::new(&format!("task-{name}"), &format!("attempt-{name}"));
        Task {
            ids: ids.expect("names of tests are short"),
            command: command.into(),
            priority: 0,
            timeout_seconds: None,
        }
    }

    /// As an old control plane offers it: without attempt id, so without result channel.
    pub fn without_attempt(name: &str, command: impl Into<String>) -> Task {
        let ids = Ids::new(&format!("task-{name}"), "").expect("names of tests are short");
        Task {
            ids,
            ..Task::new(name, command)
        }
    }

    /// Payload of `task.deliver`.
    pub fn delivery(&self) -> Value {
        let mut payload = json!({"command": self.command, "priority": self.priority});
        if let Some(seconds) = self.timeout_seconds {
            payload["timeout_seconds"] = seconds.into();
        }
        payload
    }

    /// The task in the answer to a poll or heartbeat (PROTOCOL.md 2, Poll).
    pub fn polled(&self) -> Value {
        json!({
            "id": self.ids.task.as_str(),
            "execution_attempt_id": self.ids.attempt.as_str(),
            "command": self.command,
            "status": "pending",
            "priority": self.priority,
            "created_at": "2026-01-01T00:00:00Z",
            "updated_at": "2026-01-01T00:00:00Z",
            "output": null,
            "error": null,
            "exit_code": null,
        })
    }
}
