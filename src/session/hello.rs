//! Keeps `agent.hello` under its bound (PROTOCOL.md 3): finals that do not fit are left out whole.

use serde::Serialize;

use crate::limits::{HELLO_BYTES_MAX, KIB};
use crate::wire::Hello;

/// Envelope, capabilities, the running task and the space figures.
const FIXED_BYTES: usize = 8 * KIB;

/// Cuts the lists so that the encoded frame stays within [`HELLO_BYTES_MAX`].
///
/// What has been received comes first, ranges of output may take half of the rest, finals take
/// what remains: they come as `task.final` anyway.
pub fn bound(hello: &mut Hello) {
    let mut budget = HELLO_BYTES_MAX - FIXED_BYTES;
    keep_what_fits(&mut hello.received_not_started, &mut budget);
    let mut ranges_budget = budget / 2;
    budget -= ranges_budget;
    keep_what_fits(&mut hello.unacked_output, &mut ranges_budget);
    budget += ranges_budget;
    keep_what_fits(&mut hello.unacked_finals, &mut budget);
}

/// Keeps each entry that still fits, in order, and takes its encoded size from the budget.
fn keep_what_fits<T: Serialize>(entries: &mut Vec<T>, budget: &mut usize) {
    entries.retain(|entry| {
        let mut size = Counter(1);
        let fits = serde_json::to_writer(&mut size, entry).is_ok() && size.0 <= *budget;
        if fits {
            *budget -= size.0;
        }
        fits
    });
}

/// Counts what is written.
struct Counter(usize);

impl std::io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{FinalStatus, Stream};
    use crate::wire::agent_message::{
        Capabilities, FinalPayload, ReceivedTask, SpoolStatus, UnackedFinal, UnackedOutput,
    };

    fn hello(finals: usize, text: &str, ranges: usize) -> Hello {
        let id = || "i".repeat(36);
        Hello {
            client_version: "1".into(),
            capabilities: Capabilities {
                results_enabled: true,
                delivery_enabled: true,
                extensions: vec![],
            },
            running_task: None,
            received_not_started: vec![
                ReceivedTask {
                    task_id: id(),
                    execution_attempt_id: id(),
                    received_at: id(),
                };
                256
            ],
            unacked_finals: vec![
                UnackedFinal {
                    message_id: id(),
                    task_id: id(),
                    execution_attempt_id: id(),
                    result: FinalPayload {
                        status: FinalStatus::Completed,
                        exit_code: 0,
                        output: Some(text.into()),
                        error: None,
                        output_truncated: false,
                        error_truncated: false,
                        usage: None,
                    },
                };
                finals
            ],
            unacked_output: vec![
                UnackedOutput {
                    task_id: id(),
                    execution_attempt_id: id(),
                    stream: Stream::Stderr,
                    first_sequence: u64::MAX,
                    last_sequence: u64::MAX,
                    truncated_locally: true,
                };
                ranges
            ],
            spool_status: SpoolStatus {
                bytes_used: u64::MAX,
                byte_cap: u64::MAX,
                has_rotated_chunks: true,
                volatile: true,
            },
        }
    }

    #[test]
    fn a_hello_of_any_size_is_cut_to_the_bound_and_finals_stay_whole() {
        for (finals, text, ranges) in [
            (0, "", 5000),
            (1024, "short", 2048),
            (8, "\u{1}".repeat(60_000).as_str(), 10),
            (10, "x".repeat(60_000).as_str(), 0),
        ] {
            let mut bounded = hello(finals, text, ranges);
            bound(&mut bounded);
            let size = serde_json::to_vec(&bounded).expect("json").len();
            assert!(size <= HELLO_BYTES_MAX - 1024, "{size}");
            assert_eq!(bounded.received_not_started.len(), 256);
            for left in &bounded.unacked_finals {
                assert_eq!(left.result.output.as_deref(), Some(text));
            }
        }
    }

    #[test]
    fn a_small_hello_is_left_alone() {
        let mut bounded = hello(3, "text", 7);
        bound(&mut bounded);
        assert_eq!(bounded, hello(3, "text", 7));
    }
}
