//! What the agent reaches of the world: the control plane and the processes of its tasks. In a
//! simulation a model stands in their place, and all else of the agent stays as it is.

use std::rc::Rc;

use super::Context;
use crate::executor::{self, Controls, Ended, OutputStore, Spec};
use crate::net::{self, NetError, ReportOutcome};
use crate::wire::http::{PolledTasks, Report};

/// The reading side of a WebSocket connection.
pub trait FrameReader {
    /// The next message.
    ///
    /// # Errors
    /// Why the connection has ended.
    fn next(&mut self) -> impl Future<Output = Result<net::Incoming, String>>;
    /// After an error: a last word to the server is on its way.
    fn says_goodbye(&self) -> bool;
}

impl FrameReader for net::WsReader {
    async fn next(&mut self) -> Result<net::Incoming, String> {
        net::WsReader::next(self).await
    }

    fn says_goodbye(&self) -> bool {
        net::WsReader::says_goodbye(self)
    }
}

impl Context {
    pub(super) async fn poll(&self) -> Result<PolledTasks, NetError> {
        #[cfg(test)]
        if let Some(outside) = &self.simulated {
            return outside.poll().await;
        }
        self.api.poll().await
    }

    pub(super) async fn heartbeat(&self) -> Result<PolledTasks, NetError> {
        #[cfg(test)]
        if let Some(outside) = &self.simulated {
            return outside.heartbeat().await;
        }
        self.api.heartbeat().await
    }

    pub(super) async fn send_report(&self, task: &str, report: &Report<'_>) -> ReportOutcome {
        #[cfg(test)]
        if let Some(outside) = &self.simulated {
            return outside.report(task, report).await;
        }
        self.api.report(task, report).await
    }

    /// Runs a task to its end, as [`executor::run`].
    pub(super) async fn run_process(
        self: &Rc<Self>,
        spec: Spec,
        store: &impl OutputStore,
        controls: Controls,
        on_started: impl FnOnce(u32),
    ) -> Ended {
        #[cfg(test)]
        if let Some(outside) = &self.simulated {
            return outside
                .run_process(&spec, store, controls, on_started)
                .await;
        }
        executor::run(spec, store, controls, on_started).await
    }
}
