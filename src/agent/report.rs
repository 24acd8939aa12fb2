//! A final over HTTP (PROTOCOL.md 2, Report).

use std::borrow::Cow;
use std::rc::Rc;

use log::{info, warn};

use super::Context;
use crate::ids::{AttemptKey, FinalStatus, Ids};
use crate::limits::STORE_RETRY_DELAY;
use crate::net::ReportOutcome;
use crate::outbox::{Final, StoreError};
use crate::session::reports::ReportResult;
use crate::wire::http::{Report, ReportText};

/// Reports a stored final and records the success. Returns once that is durable, so that the same
/// final is never reported twice by one life of the agent.
pub async fn report_stored(context: &Rc<Context>, ids: &Ids) -> ReportResult {
    let key = ids.key();
    let Some(stored) = context
        .outbox
        .final_of(key)
        .await
        .filter(|it| it.texts_held)
    else {
        return ReportResult::Gone;
    };
    let result = send(context, ids, &stored.fin).await;
    if result == ReportResult::Done {
        record_reported(context, key).await;
    }
    result
}

/// Records a successful report, again and again until the disk takes it.
pub async fn record_reported(context: &Rc<Context>, key: AttemptKey) {
    until_stored(context, "a successful report", || {
        context.outbox.reported(key)
    })
    .await;
}

/// Asks the store again and again.
pub async fn until_stored<F>(context: &Rc<Context>, what: &str, store: impl Fn() -> F)
where
    F: Future<Output = Result<(), StoreError>>,
{
    loop {
        match store().await {
            Ok(()) | Err(StoreError::Closed | StoreError::Unknown) => return,
            Err(error) => {
                warn!("{what} is not recorded yet: {error}");
                context.clock.sleep(STORE_RETRY_DELAY * 10).await;
            }
        }
    }
}

/// Sends one report. If the server finds it too large, again with half the output.
pub async fn send(context: &Rc<Context>, ids: &Ids, fin: &Final) -> ReportResult {
    let (mut output_bytes, mut error_bytes) = (fin.output.len(), fin.error.len());
    loop {
        let report = Report {
            status: match fin.status {
                FinalStatus::Completed => "completed",
                FinalStatus::Failed | FinalStatus::Interrupted => "failed",
            },
            output: text(&fin.output, output_bytes, fin.output_truncated, None),
            error: text(
                &fin.error,
                error_bytes,
                fin.error_truncated,
                (fin.status == FinalStatus::Interrupted).then_some("interrupted"),
            ),
            exit_code: fin.exit_code,
        };
        match context.send_report(&ids.task, &report).await {
            ReportOutcome::Done => return ReportResult::Done,
            ReportOutcome::Refused { why, .. } => return ReportResult::Refused { why },
            ReportOutcome::Retry { after, why } => return ReportResult::Retry { after, why },
            ReportOutcome::TooLarge if output_bytes + error_bytes == 0 => {
                let why = "too large even without any output".to_owned();
                return ReportResult::Refused { why };
            }
            ReportOutcome::TooLarge => {
                output_bytes /= 2;
                error_bytes /= 2;
                info!(
                    "task {ids}: its report is too large for the server, sending half the output"
                );
            }
        }
    }
}

/// The last `keep` bytes of a text, what was left out announced by a first line.
fn text<'a>(
    bytes: &'a [u8],
    keep: usize,
    truncated: bool,
    word: Option<&'static str>,
) -> ReportText<'a> {
    let mut start = bytes.len() - keep.min(bytes.len());
    while start > 0 && start < bytes.len() && matches!(bytes[start], 0x80..=0xbf) {
        start += 1;
    }
    let left_out = truncated || start > 0;
    let says_so = word.is_some_and(|word| bytes.starts_with(word.as_bytes()));
    let notice = match (left_out, word.filter(|_| !says_so)) {
        (false, None) => None,
        (false, Some(word)) => Some(Cow::Borrowed(word)),
        (true, None) => Some(Cow::Borrowed("[the beginning was left out]")),
        (true, Some(word)) => Some(Cow::Owned(format!("{word} [the beginning was left out]"))),
    };
    ReportText {
        notice,
        text: &bytes[start..],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_announced_and_no_character_is_split() {
        let check = |text: ReportText<'_>, expected: &str| assert_eq!(text.to_string(), expected);
        check(text(b"all", 3, false, None), "all");
        check(
            text(b"tail", 4, true, None),
            "[the beginning was left out]\ntail",
        );
        check(
            text("x\u{20ac}y".as_bytes(), 3, false, None),
            "[the beginning was left out]\ny",
        );
        check(text(b"", 0, false, Some("interrupted")), "interrupted\n");
        check(
            text(b"interrupted: why", 16, false, Some("interrupted")),
            "interrupted: why",
        );
    }
}
