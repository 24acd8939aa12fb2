//! The gateway's half of the handshake: what `agent.hello` changes here, and the answer to it
//! (PROTOCOL.md 3 and 4.5).

use std::collections::HashSet;

use super::commits::Batch;
use super::delivery::Progress;
use super::hub::Hub;
use super::journal::{Header, Kind};
use super::operator_types::TaskResult;
use super::store;
use crate::ids::Stream;
use crate::limits::GATEWAY_OPEN_TASKS_MAX;
use crate::wire::Hello;
use crate::wire::server_message::{DiscardedAttempt, HelloAck, OutputReplay};

/// The outcome of a handshake.
pub struct Handshake {
    pub ack: HelloAck,
    /// To be durable before the answer is sent.
    pub batch: Batch,
    /// Tasks that are not to be delivered in this session: the device has them.
    pub known: HashSet<String>,
    pub cancel_granted: bool,
}

/// One attempt that the device speaks of in its hello.
struct Mention<'a> {
    task_id: &'a str,
    attempt_id: &'a str,
    progress: Progress,
    /// It is listed as not started, and can still be taken back.
    not_started: bool,
}

pub async fn answer(
    hub: &Hub,
    agent_id: &str,
    message_id: &str,
    hello: &Hello,
) -> store::Answer<Handshake> {
    let extensions: Vec<String> = hello
        .capabilities
        .extensions
        .iter()
        .filter(|offered| hub.options.grant.contains(offered))
        .cloned()
        .collect();
    let granted = |name: &str| extensions.iter().any(|extension| extension == name);
    let cancel_granted = granted("cancel");
    let lease_interval_seconds = hub
        .options
        .lease_interval_seconds
        .filter(|_| granted("lease"));

    let mut batch = Batch::default();
    let mut known = HashSet::new();
    let mut discarded = Vec::new();
    for mention in mentions(hello) {
        let discard = |reason: &str| DiscardedAttempt {
            task_id: mention.task_id.to_owned(),
            execution_attempt_id: mention.attempt_id.to_owned(),
            reason: Some(reason.to_owned()),
        };
        let is_ours = hub.load(mention.task_id).await?;
        let state = hub.with_task(mention.task_id, |live| {
            let task = &live.attempt.task;
            let same = task.agent_id == agent_id && task.attempt_id == mention.attempt_id;
            live.offered = true;
            same.then(|| (live.attempt.progress, live.attempt.cancel_reason.clone()))
        });
        let Some((progress, cancel_reason)) = state.flatten().filter(|_| is_ours) else {
            discarded.push(discard("unknown attempt"));
            continue;
        };
        known.insert(mention.task_id.to_owned());
        // The answer says what is held here of it.
        hub.touch(&mut batch, mention.task_id);
        if progress < mention.progress {
            let kind = match mention.progress {
                Progress::Received | Progress::Pending => Kind::Received,
                Progress::Started | Progress::Ended => Kind::Started,
            };
            let header = Header::plain(kind, b"");
            hub.stage(&mut batch, mention.task_id, header, b"");
        }
        // With the extension the device ends the attempt itself and says so.
        if let Some(reason) = cancel_reason
            && mention.not_started
            && hub.options.directives
            && !cancel_granted
            && progress < Progress::Started
        {
            end_cancelled(hub, &mut batch, mention.task_id, &reason);
            discarded.push(discard("cancelled"));
        }
    }
    if hello.capabilities.delivery_enabled {
        settle_the_unmentioned(hub, agent_id, cancel_granted, &mut batch, &mut known);
    }

    let waiting = waiting_messages(hello);
    hub.count(agent_id, |counters| counters.replayed += waiting);
    let directives = hub.options.directives;
    let ack = HelloAck {
        acked_message_id: message_id.to_owned(),
        acked_type: "agent.hello".into(),
        delivery_enabled: hub.options.delivery_enabled,
        acknowledged_final_message_ids: directives.then(|| held_finals(hub, hello)),
        output_replay: directives.then(|| replays(hub, hello, &discarded)),
        discarded_attempts: directives.then_some(discarded),
        extensions: (!extensions.is_empty()).then_some(extensions),
        lease_interval_seconds,
    };
    Ok(Handshake {
        ack,
        batch,
        known,
        cancel_granted,
    })
}

/// How many stored messages the device is going to send again, or for the first time.
fn waiting_messages(hello: &Hello) -> u64 {
    let chunks = hello.unacked_output.iter().map(|range| {
        let count = range.last_sequence.saturating_sub(range.first_sequence);
        count.saturating_add(1)
    });
    chunks.fold(hello.unacked_finals.len() as u64, u64::saturating_add)
}

/// Every attempt that the hello names, once each; at most a few more than an agent can have.
fn mentions(hello: &Hello) -> Vec<Mention<'_>> {
    let running = hello.running_task.iter().map(|task| Mention {
        task_id: &task.task_id,
        attempt_id: &task.execution_attempt_id,
        progress: Progress::Started,
        not_started: false,
    });
    let received = hello.received_not_started.iter().map(|task| Mention {
        task_id: &task.task_id,
        attempt_id: &task.execution_attempt_id,
        progress: Progress::Received,
        not_started: true,
    });
    let finals = hello.unacked_finals.iter().map(|task| Mention {
        task_id: &task.task_id,
        attempt_id: &task.execution_attempt_id,
        progress: Progress::Received,
        not_started: false,
    });
    let output = hello.unacked_output.iter().map(|stream| Mention {
        task_id: &stream.task_id,
        attempt_id: &stream.execution_attempt_id,
        progress: Progress::Started,
        not_started: false,
    });
    let mut seen = HashSet::new();
    running
        .chain(received)
        .chain(finals)
        .chain(output)
        .filter(|mention| seen.insert((mention.task_id, mention.attempt_id)))
        .take(2 * GATEWAY_OPEN_TASKS_MAX)
        .collect()
}

/// The hello is a true snapshot, so what it does not name never reached the device, or has come
/// to its end there. What was cancelled before it was received is over; what was received is
/// offered again, and the device answers from its memory; what was started is not: if that memory
/// was lost, it would run a second time.
fn settle_the_unmentioned(
    hub: &Hub,
    agent_id: &str,
    cancel_granted: bool,
    batch: &mut Batch,
    known: &mut HashSet<String>,
) {
    for task_id in hub.open_tasks(agent_id) {
        if known.contains(&task_id) {
            continue;
        }
        let state = hub.with_task(&task_id, |live| {
            (live.attempt.progress, live.attempt.cancel_reason.clone())
        });
        match state {
            Some((Progress::Pending, Some(reason))) if !cancel_granted => {
                end_cancelled(hub, batch, &task_id, &reason);
            }
            Some((Progress::Started | Progress::Ended, _)) => {
                known.insert(task_id);
            }
            _ => {}
        }
    }
}

/// Ends an attempt that no device will end.
pub fn end_cancelled(hub: &Hub, batch: &mut Batch, task_id: &str, reason: &str) {
    let result = TaskResult {
        status: "interrupted".into(),
        exit_code: -1,
        error: Some(format!("cancelled before it was started: {reason}")),
        via: "gateway".into(),
        ..TaskResult::default()
    };
    let payload = serde_json::to_vec(&result).expect("a result is JSON");
    hub.stage(
        batch,
        task_id,
        Header::plain(Kind::Final, &payload),
        &payload,
    );
}

/// Message ids of finals that are held here already.
fn held_finals(hub: &Hub, hello: &Hello) -> Vec<String> {
    let is_held = |task_id: &str, attempt_id: &str| {
        hub.with_task(task_id, |live| {
            live.attempt.task.attempt_id == attempt_id
                && live
                    .attempt
                    .result
                    .as_ref()
                    .is_some_and(|result| result.via != "gateway")
        })
        .unwrap_or(false)
    };
    hello
        .unacked_finals
        .iter()
        .filter(|held| is_held(&held.task_id, &held.execution_attempt_id))
        .map(|held| held.message_id.clone())
        .collect()
}

/// Where each stream that the device holds output of goes on.
fn replays(hub: &Hub, hello: &Hello, discarded: &[DiscardedAttempt]) -> Vec<OutputReplay> {
    let is_discarded = |task_id: &str, attempt_id: &str| {
        discarded
            .iter()
            .any(|d| d.task_id == task_id && d.execution_attempt_id == attempt_id)
    };
    let highest = |task_id: &str, stream: Stream| {
        hub.with_task(task_id, |live| live.attempt.streams[stream.index()].highest)
    };
    hello
        .unacked_output
        .iter()
        .filter(|held| !is_discarded(&held.task_id, &held.execution_attempt_id))
        .filter_map(|held| {
            Some(OutputReplay {
                task_id: held.task_id.clone(),
                execution_attempt_id: held.execution_attempt_id.clone(),
                stream: held.stream,
                next_sequence: highest(&held.task_id, held.stream)? + 1,
            })
        })
        .collect()
}
