//! Bodies of the HTTP requests and their answers (PROTOCOL.md 2).

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::server_message::TaskOffer;
use super::text::Lossy;
use crate::ids::Ids;

pub const REGISTER_PATH: &str = "/api/v1/agents/register";
pub const TASKS_PATH: &str = "/api/v1/tasks";
pub const WEBSOCKET_PATH: &str = "/api/v1/agents/ws";

/// `PUT` of a task's result. The id is escaped: it comes from outside.
pub fn report_path(task_id: &str) -> String {
    format!("{TASKS_PATH}/{}", escape_segment(task_id))
}

pub fn heartbeat_path(agent_id: &str) -> String {
    format!("/api/v1/agents/{}/heartbeat", escape_segment(agent_id))
}

/// Percent-encodes all but the unreserved characters of RFC 3986 section 2.3.
fn escape_segment(text: &str) -> String {
    use std::fmt::Write;
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                escaped.push(char::from(byte));
            }
            _ => write!(escaped, "%{byte:02X}").expect("a string takes all writes"),
        }
    }
    escaped
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    pub key: String,
    pub value: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterRequest {
    pub fingerprint: String,
    pub token_id: String,
    pub token_key: String,
    /// Base64 of the DER SubjectPublicKeyInfo.
    pub public_key: String,
    pub public_key_type: String,
    pub tags: Vec<Tag>,
}

/// Answer to a registration; only `id` is needed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterResponse {
    pub id: String,
    #[serde(default)]
    pub fingerprint: Option<String>,
    #[serde(default)]
    pub status: Option<String>,
    #[serde(default)]
    pub message: Option<String>,
    #[serde(default)]
    pub registered_at: Option<String>,
}

/// Body of most refusals.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorResponse {
    #[serde(default)]
    pub error: String,
}

/// A task as polls and heartbeats carry it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolledTask {
    pub id: String,
    #[serde(default)]
    pub execution_attempt_id: Option<String>,
    pub command: String,
    #[serde(default)]
    pub status: Option<String>,
    #[serde(default)]
    pub priority: Option<i64>,
    #[serde(default)]
    pub created_at: Option<String>,
    #[serde(default)]
    pub updated_at: Option<String>,
    #[serde(default)]
    pub output: Option<String>,
    #[serde(default)]
    pub error: Option<String>,
    #[serde(default)]
    pub exit_code: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
}

impl PolledTask {
    /// What is to be run, `None` if the task has ended at the server. Errors name the bad field.
    pub fn offer(self) -> Result<Option<TaskOffer>, String> {
        let ended = ["completed", "failed", "cancelled", "interrupted"];
        if self
            .status
            .as_deref()
            .is_some_and(|status| ended.contains(&status))
        {
            return Ok(None);
        }
        let attempt_id = self.execution_attempt_id.as_deref().unwrap_or_default();
        let ids = Ids::new(&self.id, attempt_id)
            .ok_or_else(|| format!("task id {:.40?} is empty or too long", self.id))?;
        Ok(Some(TaskOffer {
            ids,
            command: self.command,
            priority: self.priority.unwrap_or(0),
            timeout_seconds: self.timeout_seconds.filter(|&seconds| seconds > 0),
        }))
    }
}

/// Tasks of a poll or heartbeat. One that cannot be read does not spoil the others: it is an
/// `Err` that says why. The outer error means that the body is no list at all.
pub type PolledTasks = Vec<Result<TaskOffer, String>>;

/// Reads the answer to a poll: `[task]` or `null`.
pub fn decode_tasks(body: &[u8]) -> Result<PolledTasks, serde_json::Error> {
    let tasks: Option<Vec<&RawValue>> = serde_json::from_slice(body)?;
    Ok(read_tasks(tasks.unwrap_or_default()))
}

/// Reads the answer to a heartbeat: `{message, pending_tasks: [task]}`.
pub fn decode_heartbeat(body: &[u8]) -> Result<PolledTasks, serde_json::Error> {
    #[derive(Deserialize)]
    struct Response<'a> {
        #[serde(borrow, default)]
        pending_tasks: Option<Vec<&'a RawValue>>,
    }
    let response: Response<'_> = serde_json::from_slice(body)?;
    Ok(read_tasks(response.pending_tasks.unwrap_or_default()))
}

fn read_tasks(tasks: Vec<&RawValue>) -> PolledTasks {
    tasks
        .into_iter()
        .filter_map(|task| {
            serde_json::from_str::<PolledTask>(task.get())
                .map_err(|error| error.to_string())
                .and_then(PolledTask::offer)
                .transpose()
        })
        .collect()
}

/// Body of `PUT /api/v1/tasks/{id}` as written; all fields are always there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report<'a> {
    /// `completed` or `failed`; nothing else exists here (PROTOCOL.md 2, Report).
    pub status: &'static str,
    pub output: ReportText<'a>,
    pub error: ReportText<'a>,
    pub exit_code: i32,
}

/// A text of a report: an optional first line that says what was left out, then the text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReportText<'a> {
    pub notice: Option<Cow<'a, str>>,
    pub text: &'a [u8],
}

impl std::fmt::Display for ReportText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(notice) = &self.notice {
            writeln!(f, "{notice}")?;
        }
        Lossy(self.text).fmt(f)
    }
}

impl Serialize for ReportText<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Body of a report as read by a control plane.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ReceivedReport {
    pub status: String,
    #[serde(default)]
    pub output: Option<String>,
    #[serde(default)]
    pub error: Option<String>,
    pub exit_code: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_are_read_leniently_and_one_bad_task_spoils_no_other() {
        assert_eq!(decode_tasks(b"null").expect("null is a list"), vec![]);
        let body =
            br#"[{"id":"1","execution_attempt_id":null,"command":"a","status":"pending","new":1},
            {"id":2,"command":"b"}, {"id":"","command":"c"},
            {"id":"3","execution_attempt_id":"x","command":"d","priority":9,"exit_code":null},
            {"id":"4","command":"e","status":"interrupted"}]"#;
        let tasks = decode_tasks(body).expect("a list");
        assert_eq!(tasks.len(), 4);
        let first = tasks[0].as_ref().expect("good");
        assert_eq!((first.ids.attempt.as_str(), first.priority), ("", 0));
        assert!(tasks[1].is_err() && tasks[2].is_err());
        assert_eq!(tasks[3].as_ref().expect("good").priority, 9);
        assert!(decode_tasks(b"{}").is_err());
    }

    #[test]
    fn heartbeats_may_carry_tasks() {
        let body = br#"{"message":"ok","pending_tasks":[{"id":"1","command":"a"}]}"#;
        assert_eq!(decode_heartbeat(body).expect("object").len(), 1);
        assert_eq!(
            decode_heartbeat(br#"{"pending_tasks":null}"#)
                .expect("object")
                .len(),
            0
        );
    }

    #[test]
    fn a_report_writes_all_fields_and_announces_what_was_left_out() {
        let report = Report {
            status: "failed",
            output: ReportText {
                notice: Some("[10 bytes left out]".into()),
                text: b"tail\xff",
            },
            error: ReportText::default(),
            exit_code: 3,
        };
        assert_eq!(
            serde_json::to_string(&report).expect("json"),
            "{\"status\":\"failed\",\"output\":\"[10 bytes left out]\\ntail\u{fffd}\",\"error\":\"\",\"exit_code\":3}"
        );
    }

    #[test]
    fn ids_cannot_leave_their_path_segment() {
        assert_eq!(
            report_path("../x y/\u{e9}"),
            "/api/v1/tasks/..%2Fx%20y%2F%C3%A9"
        );
    }
}
