//! The operator API under `/operator/v1/`, for `submit`, `agents` and scripts. JSON.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET health` | `{"status":"ok"}` |
//! | `GET agents` | `[AgentInfo]` |
//! | `POST agents/{id}/disconnect` | `{"disconnected":bool}`; cuts the TCP connection, and refuses
//! | | another one for `?seconds=` |
//! | `POST tasks` with `Submission` | `Submitted` |
//! | `GET tasks/{id}` | `TaskInfo` |
//! | `GET tasks/{id}/stream?offset=n` | lines of `StreamEvent`, from the beginning or from `n` |
//! | `POST tasks/{id}/cancel` with `{"reason"?}` | `{"message":…}` |

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Method, Request};
use serde::Deserialize;
use serde_json::json;

use super::agents_api::unescape_segment;
use super::auth;
use super::body::{self, Answer};
use super::commits::Batch;
use super::delivery::{Attempt, Progress, TaskRecord};
use super::hello::end_cancelled;
use super::hub::{Hub, Refusal};
use super::journal::{Header, Kind};
use super::operator_stream;
use super::operator_types::{Submission, Submitted};
use crate::limits::{
    COMMAND_BYTES_MAX, GATEWAY_BODY_BYTES_MAX, INBOUND_MESSAGE_BYTES_MAX, KIB, REASON_BYTES_MAX,
};
use crate::wire::Timestamp;

pub const PREFIX: &str = "/operator/v1/";

/// What the envelope takes of a frame, at most: two ids and an agent id, escaped, and the rest.
const ENVELOPE_BYTES: usize = 4 * KIB;

pub async fn handle(
    hub: &Rc<Hub>,
    request: Request<Incoming>,
    peer: IpAddr,
    bodies: &smol::lock::Semaphore,
) -> Result<Answer, Refusal> {
    auth::check_operator(peer, request.headers(), hub.operator_token.as_deref()).map_err(
        |why| {
            log::warn!("operator API: request from {peer} refused: {why}");
            (403, why.to_owned())
        },
    )?;
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let method = request.method().clone();
    let mut segments = Vec::new();
    for segment in path.strip_prefix(PREFIX).unwrap_or_default().split('/') {
        let segment = unescape_segment(segment);
        segments.push(segment.ok_or((400, "the path is no text".to_owned()))?);
    }
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    match (method.as_str(), segments.as_slice()) {
        ("GET", ["health"]) => Ok(body::json(&json!({"status": "ok"}))),
        ("GET", ["agents"]) => Ok(body::json(&hub.agents())),
        ("POST", ["agents", id, "disconnect"]) => match hub.disconnect(id, away(&query)?) {
            Some(disconnected) => Ok(body::json(&json!({"disconnected": disconnected}))),
            None => Err((404, format!("there is no agent {id:.60?}"))),
        },
        ("POST", ["tasks"]) => {
            let _place = bodies.acquire().await;
            submit(hub, request).await
        }
        ("GET", ["tasks", id]) => {
            load(hub, id).await?;
            let info = hub.with_task(id, |live| live.attempt.info());
            Ok(body::json(&info.ok_or_else(|| no_task(id))?))
        }
        ("GET", ["tasks", id, "stream"]) => {
            load(hub, id).await?;
            let offset = offset(&query)?;
            Ok(body::live(operator_stream::start(hub, id, offset)))
        }
        ("POST", ["tasks", id, "cancel"]) => {
            let _place = bodies.acquire().await;
            cancel(hub, id, request).await
        }
        _ if method == Method::GET || method == Method::POST => {
            Err((404, format!("there is no {method} {path} here")))
        }
        _ => Err((405, format!("{method} is not known here"))),
    }
}

fn no_task(task_id: &str) -> Refusal {
    (404, format!("there is no task {task_id:.60?}"))
}

async fn load(hub: &Hub, task_id: &str) -> Result<(), Refusal> {
    match hub.load(task_id).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(no_task(task_id)),
        Err(error) => Err((503, error)),
    }
}

/// `seconds=` of a disconnect, an hour at most; 0 if it is not there.
fn away(query: &str) -> Result<Duration, Refusal> {
    match query.strip_prefix("seconds=") {
        None => Ok(Duration::ZERO),
        Some(seconds) => match seconds.parse::<u64>() {
            Ok(seconds) => Ok(Duration::from_secs(seconds.min(3600))),
            Err(_) => Err((400, "seconds is no number".to_owned())),
        },
    }
}

fn offset(query: &str) -> Result<u64, Refusal> {
    let given = query
        .split('&')
        .find_map(|parameter| parameter.strip_prefix("offset="));
    match given {
        None => Ok(0),
        Some(number) => number
            .parse()
            .map_err(|_| (400, "offset is no number".to_owned())),
    }
}

async fn submit(hub: &Rc<Hub>, request: Request<Incoming>) -> Result<Answer, Refusal> {
    let body = body::read(request, GATEWAY_BODY_BYTES_MAX).await?;
    let submission: Submission = body::parse(&body)?;
    let agent_id = match submission.agent_id {
        Some(agent_id) => agent_id,
        None => hub.only_agent().ok_or_else(|| {
            let why = "no agent or more than one is registered: name one by agent_id";
            (409, why.to_owned())
        })?,
    };
    let command = submission.command;
    if command.is_empty() {
        return Err((400, "the command is empty".into()));
    }
    // A delivery that no agent can read would end its session again and again.
    let escaped = serde_json::to_string(&command).map_or(usize::MAX, |text| text.len());
    if command.len() > COMMAND_BYTES_MAX || escaped + ENVELOPE_BYTES > INBOUND_MESSAGE_BYTES_MAX {
        let why = format!("the command does not fit a frame of {INBOUND_MESSAGE_BYTES_MAX} bytes");
        return Err((413, why));
    }
    hub.check_room(&agent_id, command.len())?;
    let new_id = || auth::random_id().map_err(|error| (503, error));
    let record = TaskRecord {
        task_id: new_id()?,
        attempt_id: match hub.options.legacy_attempts {
            true => String::new(),
            false => new_id()?,
        },
        agent_id,
        command,
        priority: submission.priority,
        timeout_seconds: submission.timeout_seconds.filter(|&seconds| seconds > 0),
        number: hub.task_number(),
        created_at: Timestamp::now().to_string(),
    };
    let attempt = Attempt::new(record.clone()).ok_or((500, "the ids are too long".to_owned()))?;
    let submitted = Submitted {
        task_id: record.task_id.clone(),
        execution_attempt_id: record.attempt_id.clone(),
    };
    let stored = hub.store.create_task(record).await;
    let length = stored.map_err(|error| (503, error))?;
    log::info!(
        "task {} accepted for agent {}",
        submitted.task_id,
        attempt.task.agent_id
    );
    hub.insert_task(attempt, length);
    Ok(body::json(&submitted))
}

async fn cancel(
    hub: &Rc<Hub>,
    task_id: &str,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Cancel {
        reason: Option<String>,
    }
    let body = body::read(request, 4 * REASON_BYTES_MAX).await?;
    let cancel: Cancel = match body.is_empty() {
        true => Cancel::default(),
        false => body::parse(&body)?,
    };
    let reason: String = cancel
        .reason
        .unwrap_or_else(|| "asked for by the operator".into())
        .chars()
        .take(REASON_BYTES_MAX / 4)
        .collect();
    load(hub, task_id).await?;
    let state = hub.with_task(task_id, |live| {
        let attempt = &live.attempt;
        let unseen = attempt.progress == Progress::Pending && !live.offered;
        (attempt.task.agent_id.clone(), attempt.progress, unseen)
    });
    let (agent_id, progress, unseen) = state.ok_or_else(|| no_task(task_id))?;
    if progress == Progress::Ended {
        return Ok(body::json(
            &json!({"message": "the task has ended already"}),
        ));
    }
    let mut batch = Batch::default();
    let header = Header::plain(Kind::Cancel, reason.as_bytes());
    hub.stage(&mut batch, task_id, header, reason.as_bytes());
    if unseen {
        end_cancelled(hub, &mut batch, task_id, &reason);
    }
    let committed = hub.commit_and_wait(batch).await;
    committed.map_err(|error| (503, error))?;
    hub.wake(&agent_id);
    Ok(body::json(
        &json!({"message": "the end of the task is asked for"}),
    ))
}
