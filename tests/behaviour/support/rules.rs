//! Rules of PROTOCOL.md that hold for every frame of every test, checked as the frames come.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use hostlink_edge::ids::{FinalStatus, Ids, Stream};
use hostlink_edge::limits::{ACK_TIMEOUT, CHUNK_BYTES_MAX, HELLO_BYTES_MAX};
use hostlink_edge::wire::FinalPayload;
use hostlink_edge::wire::agent_message::{ReceivedMessage, ReceivedOutput};

use super::log::Frame;

/// After this an agent may repeat what was not acknowledged, whatever its order.
const REPEATS_ALLOWED_AFTER: Duration = ACK_TIMEOUT.saturating_sub(Duration::from_secs(5));

/// What the server remembers of all connections.
#[derive(Default)]
pub struct Ledger {
    /// Message id → hash of what must not change when the message is sent again.
    contents: HashMap<String, u64>,
    /// The other direction: one message, one id.
    names: HashMap<(Ids, Option<(Stream, u64)>), String>,
    finals: HashMap<String, FinalPayload<String>>,
    /// Tasks whose final was taken by report.
    reported: HashMap<String, ()>,
    /// How often each task was delivered.
    deliveries: HashMap<String, usize>,
}

/// What the server remembers of one connection.
pub struct ConnectionRules {
    opened: Instant,
    greeted: bool,
    pub hello_acked: bool,
    /// A gap error was sent or an attempt delivered again: repeats are in order.
    pub repeats_allowed: bool,
    sent: HashMap<(Ids, Stream), u64>,
    finals: HashMap<Ids, ()>,
}

impl ConnectionRules {
    pub fn new() -> ConnectionRules {
        ConnectionRules {
            opened: Instant::now(),
            greeted: false,
            hello_acked: false,
            repeats_allowed: false,
            sent: HashMap::new(),
            finals: HashMap::new(),
        }
    }

    fn repeats_allowed(&self) -> bool {
        self.repeats_allowed || self.opened.elapsed() > REPEATS_ALLOWED_AFTER
    }
}

impl Ledger {
    pub fn reported(&mut self, task_id: &str) {
        self.reported.insert(task_id.to_owned(), ());
    }

    /// A task offered again may be answered with its final (PROTOCOL.md 3, `task.deliver`), also
    /// when its report arrives between the two.
    pub fn delivered(&mut self, task_id: &str) {
        *self.deliveries.entry(task_id.to_owned()).or_default() += 1;
        self.reported.remove(task_id);
    }

    /// Which rule `frame` breaks, if any. `frame_bytes` is its size as received.
    pub fn check(
        &mut self,
        connection: &mut ConnectionRules,
        frame: &Frame,
        frame_bytes: usize,
    ) -> Result<(), String> {
        let is_hello = frame.hello().is_some();
        if is_hello == connection.greeted {
            return Err("agent.hello is the first frame of a connection, and only that".into());
        }
        connection.greeted = true;
        if !is_hello && !connection.hello_acked {
            return Err(format!("{} was sent before agent.hello_ack", frame.kind));
        }
        if is_hello && frame_bytes >= HELLO_BYTES_MAX {
            return Err(format!("the hello has {frame_bytes} bytes"));
        }
        match &frame.message {
            ReceivedMessage::Hello(hello) => {
                for held in &hello.unacked_finals {
                    self.check_final(&held.message_id, &held.result)?;
                }
                for range in &hello.unacked_output {
                    if range.first_sequence == 0 || range.first_sequence > range.last_sequence {
                        return Err(format!("impossible range in the hello: {range:?}"));
                    }
                }
                Ok(())
            }
            ReceivedMessage::Output {
                ids,
                sequence,
                output,
            } => {
                check_chunk(output)?;
                self.check_order(connection, ids, *sequence, output)?;
                self.check_output(&frame.message_id, ids, *sequence, output)
            }
            ReceivedMessage::Final { ids, result } => {
                let task = ids.task.as_str();
                let asked_again = self.deliveries.get(task).is_some_and(|&count| count > 1);
                if self.reported.contains_key(task) && !asked_again {
                    return Err(format!("final of {ids} after a successful report"));
                }
                connection.finals.insert(ids.clone(), ());
                self.check_name(&frame.message_id, ids, None)?;
                self.check_final(&frame.message_id, result)
            }
            ReceivedMessage::Unknown(kind) => Err(format!("unknown message type {kind:?}")),
            ReceivedMessage::Received(_)
            | ReceivedMessage::Started(_)
            | ReceivedMessage::LeaseHeartbeat(_) => Ok(()),
        }
    }

    fn check_order(
        &self,
        connection: &mut ConnectionRules,
        ids: &Ids,
        sequence: u64,
        output: &ReceivedOutput,
    ) -> Result<(), String> {
        let repeats = connection.repeats_allowed();
        if connection.finals.contains_key(ids) && !repeats {
            return Err(format!("output of {ids} after its final"));
        }
        let stream = (ids.clone(), output.stream);
        let last = connection.sent.insert(stream, sequence);
        let flagged = output.truncated_locally == Some(true);
        match last {
            Some(last) if sequence != last + 1 && !(repeats || flagged && sequence > last) => {
                Err(format!(
                    "{} of {ids}: sequence {sequence} was sent after {last} in one connection",
                    output.stream.as_str()
                ))
            }
            _ => Ok(()),
        }
    }

    fn check_output(
        &mut self,
        message_id: &str,
        ids: &Ids,
        sequence: u64,
        output: &ReceivedOutput,
    ) -> Result<(), String> {
        self.check_name(message_id, ids, Some((output.stream, sequence)))?;
        let mut hasher = DefaultHasher::new();
        (sequence, output.byte_count, output.stream).hash(&mut hasher);
        if output.encoding.is_none() && !output.data.contains('\u{fffd}') {
            output.data.hash(&mut hasher);
        }
        let hash = hasher.finish();
        let known = *self.contents.entry(message_id.to_owned()).or_insert(hash);
        if known != hash {
            return Err(format!("{message_id} came again with other contents"));
        }
        Ok(())
    }

    fn check_name(
        &mut self,
        message_id: &str,
        ids: &Ids,
        chunk: Option<(Stream, u64)>,
    ) -> Result<(), String> {
        let name = (ids.clone(), chunk);
        let known = self.names.entry(name).or_insert_with(|| message_id.into());
        if known != message_id {
            return Err(format!(
                "the same message of {ids} ({chunk:?}) has two ids: {known} and {message_id}"
            ));
        }
        Ok(())
    }

    fn check_final(
        &mut self,
        message_id: &str,
        result: &FinalPayload<String>,
    ) -> Result<(), String> {
        let fits = match result.status {
            FinalStatus::Completed => result.exit_code == 0,
            FinalStatus::Failed => result.exit_code != 0,
            FinalStatus::Interrupted => result.exit_code == -1,
        };
        if !fits {
            return Err(format!("status and exit code disagree: {result:?}"));
        }
        let known = self
            .finals
            .entry(message_id.to_owned())
            .or_insert_with(|| result.clone());
        // Texts may be gone once the final was acknowledged.
        let same = known.status == result.status
            && known.exit_code == result.exit_code
            && (result.output.is_none() || known.output == result.output)
            && (result.error.is_none() || known.error == result.error);
        if !same {
            return Err(format!(
                "final {message_id} changed from {known:?} to {result:?}"
            ));
        }
        Ok(())
    }
}

fn check_chunk(output: &ReceivedOutput) -> Result<(), String> {
    if output.byte_count == 0 || output.byte_count > CHUNK_BYTES_MAX as u64 {
        return Err(format!("a chunk of {} bytes", output.byte_count));
    }
    let exact = output.encoding.is_none() && !output.data.contains('\u{fffd}');
    if exact && output.data.len() as u64 != output.byte_count {
        return Err(format!(
            "byte_count is {} and data has {} bytes",
            output.byte_count,
            output.data.len()
        ));
    }
    Ok(())
}
