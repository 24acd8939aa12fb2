//! The HTTP requests of agents: register, poll, report, heartbeat (PROTOCOL.md 2).

use std::rc::Rc;

use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Method, Request};

use super::auth::{self, Signed};
use super::body::{self, Answer};
use super::commits::Batch;
use super::delivery::{FinalVerdict, Progress};
use super::hub::{Hub, Refusal};
use super::journal::{Header, Kind};
use super::operator_types::TaskResult;
use super::store::AgentRecord;
use crate::limits::{
    GATEWAY_BODY_BYTES_MAX, GATEWAY_POLL_BYTES, GATEWAY_POLL_TASKS, KIB, NAME_BYTES_MAX,
};
use crate::wire::Timestamp;
use crate::wire::http::{
    PolledTask, REGISTER_PATH, ReceivedReport, RegisterRequest, RegisterResponse, TASKS_PATH,
};

const REGISTRATION_BYTES_MAX: usize = 64 * KIB;

/// Whether the path is one of these requests.
pub fn is_path(path: &str) -> bool {
    path.starts_with("/api/v1/")
}

pub async fn handle(
    hub: &Rc<Hub>,
    request: Request<Incoming>,
    bodies: &smol::lock::Semaphore,
) -> Result<Answer, Refusal> {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    if path == REGISTER_PATH && method == Method::POST {
        let _place = bodies.acquire().await;
        return register(hub, request).await;
    }
    let agent_id = authenticate(hub, request.headers())?;
    if path == TASKS_PATH && method == Method::GET {
        return Ok(body::json(&offers(hub, &agent_id)));
    }
    if let Some(task_id) = path
        .strip_prefix(TASKS_PATH)
        .and_then(|p| p.strip_prefix('/'))
        && method == Method::PUT
    {
        let task_id = unescape_segment(task_id).ok_or((400, "the task id is no text".into()))?;
        let _place = bodies.acquire().await;
        return report(hub, &agent_id, &task_id, request).await;
    }
    if let Some(named) = path
        .strip_prefix("/api/v1/agents/")
        .and_then(|p| p.strip_suffix("/heartbeat"))
        && method == Method::POST
    {
        if unescape_segment(named).as_deref() != Some(agent_id.as_str()) {
            return Err((
                403,
                "the heartbeat is of another agent than the signature".into(),
            ));
        }
        return Ok(heartbeat(hub, &agent_id));
    }
    Err((404, format!("there is no {method} {path} here")))
}

/// The agent that signed the request.
pub fn authenticate(hub: &Hub, headers: &HeaderMap) -> Result<String, Refusal> {
    let signed = Signed::from_headers(headers).map_err(|error| (401, error))?;
    hub.authenticate(&signed).inspect_err(|(_, why)| {
        log::warn!("agent {:.40}: request refused: {why}", signed.agent_id);
    })?;
    Ok(signed.agent_id)
}

async fn register(hub: &Hub, request: Request<Incoming>) -> Result<Answer, Refusal> {
    let body = body::read(request, REGISTRATION_BYTES_MAX).await?;
    let request: RegisterRequest = body::parse(&body)?;
    let (token_id, token_key) = &hub.token;
    if !auth::same_secret(&request.token_id, token_id)
        || !auth::same_secret(&request.token_key, token_key)
    {
        log::warn!(
            "registration of {:.60} refused: wrong token",
            request.fingerprint
        );
        return Err((401, "the registration token is wrong".into()));
    }
    if request.fingerprint.is_empty() || request.fingerprint.len() > NAME_BYTES_MAX {
        return Err((400, "the fingerprint is empty or too long".into()));
    }
    if request.public_key_type != "RSA" {
        return Err((400, "public_key_type is not RSA".into()));
    }
    auth::parse_public_key(&request.public_key).map_err(|error| (400, error))?;
    let record = hub.registration(&request.fingerprint, |known| {
        Ok(AgentRecord {
            id: match known {
                Some(known) => known.id.clone(),
                None => auth::random_id()?,
            },
            fingerprint: request.fingerprint.clone(),
            public_key: request.public_key.clone(),
            tags: request.tags.clone(),
            registered_at: Timestamp::now().to_string(),
        })
    })?;
    let stored = hub.store.put_agent(record.clone()).await;
    stored.map_err(|error| (503, error))?;
    hub.put_agent(record.clone())
        .map_err(|error| (400, error))?;
    log::info!(
        "agent {} registered, fingerprint {}",
        record.id,
        record.fingerprint
    );
    Ok(body::json(&RegisterResponse {
        id: record.id,
        fingerprint: Some(record.fingerprint),
        status: Some("registered".into()),
        message: Some("welcome".into()),
        registered_at: Some(record.registered_at),
    }))
}

fn heartbeat(hub: &Hub, agent_id: &str) -> Answer {
    #[derive(serde::Serialize)]
    struct Heartbeat {
        message: &'static str,
        pending_tasks: Vec<PolledTask>,
    }
    body::json(&Heartbeat {
        message: "ok",
        pending_tasks: offers(hub, agent_id),
    })
}

/// Tasks that the agent has not said to have: an offer may be lost with its answer, so it is
/// repeated until then, and the agent starts an attempt only once (PROTOCOL.md 4.6).
fn offers(hub: &Hub, agent_id: &str) -> Vec<PolledTask> {
    let mut bytes = 0;
    let mut offers = Vec::new();
    for task_id in hub.open_tasks(agent_id) {
        let offer = hub.with_task(&task_id, |live| {
            let attempt = &live.attempt;
            if attempt.progress != Progress::Pending || attempt.cancel_reason.is_some() {
                return None;
            }
            bytes += attempt.task.command.len();
            if bytes > GATEWAY_POLL_BYTES && !offers.is_empty() {
                return None;
            }
            live.offered = true;
            Some(PolledTask {
                id: attempt.task.task_id.clone(),
                execution_attempt_id: Some(attempt.task.attempt_id.clone()),
                command: attempt.task.command.clone(),
                status: Some("pending".into()),
                priority: Some(attempt.task.priority),
                created_at: Some(attempt.task.created_at.clone()),
                updated_at: Some(attempt.task.created_at.clone()),
                output: Some(String::new()),
                error: Some(String::new()),
                exit_code: None,
                timeout_seconds: attempt.task.timeout_seconds,
            })
        });
        offers.extend(offer.flatten());
        if offers.len() == GATEWAY_POLL_TASKS || bytes > GATEWAY_POLL_BYTES {
            break;
        }
    }
    offers
}

async fn report(
    hub: &Rc<Hub>,
    agent_id: &str,
    task_id: &str,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let body = body::read(request, GATEWAY_BODY_BYTES_MAX).await?;
    let report: ReceivedReport = body::parse(&body)?;
    if !matches!(report.status.as_str(), "completed" | "failed") {
        return Err((400, "status is neither completed nor failed".into()));
    }
    let no_task = || {
        (
            404,
            format!("there is no task {task_id:.60?} of this agent"),
        )
    };
    let known = hub.load(task_id).await.map_err(|error| (503, error))?;
    if !known {
        return Err(no_task());
    }
    let result = TaskResult {
        status: report.status,
        exit_code: report.exit_code,
        output: report.output.filter(|text| !text.is_empty()),
        error: report.error.filter(|text| !text.is_empty()),
        output_truncated: false,
        error_truncated: false,
        via: "report".into(),
    };
    let verdict = hub
        .with_task(task_id, |live| {
            (live.attempt.task.agent_id == agent_id).then(|| live.attempt.judge_final(&result))
        })
        .flatten()
        .ok_or_else(no_task)?;
    let mut batch = Batch::default();
    // Also a repeat waits: the first one may be on its way to the disk.
    hub.touch(&mut batch, task_id);
    match verdict {
        FinalVerdict::Store => {
            let payload = serde_json::to_vec(&result).expect("a result is JSON");
            let header = Header::plain(Kind::Final, &payload);
            hub.stage(&mut batch, task_id, header, &payload);
            hub.count(agent_id, |counters| counters.finals += 1);
            log::info!("task {task_id}: {} by report", result.status);
        }
        FinalVerdict::Repeat => hub.count(agent_id, |counters| counters.duplicates += 1),
        FinalVerdict::Changed => {
            hub.count(agent_id, |counters| counters.changed_repeats += 1);
            log::error!("task {task_id}: agent {agent_id} reports another result than before");
        }
    }
    let committed = hub.commit_and_wait(batch).await;
    committed.map_err(|error| (503, error))?;
    Ok(body::json(&serde_json::json!({"message": "ok"})))
}

/// Undoes percent-encoding. `None` if the result is no text.
pub fn unescape_segment(segment: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_segments_are_unescaped() {
        let check = |segment: &str, expected: Option<&str>| {
            assert_eq!(unescape_segment(segment).as_deref(), expected, "{segment}");
        };
        check("..%2Fx%20%C3%A9", Some("../x \u{e9}"));
        check("%", None);
        check("%+1", None);
        check("%FF", None);
    }
}
