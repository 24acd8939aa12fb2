//! What the behaviour tests have in common: a control plane that follows a script, the agent as a
//! real process, and a record of everything that passed between them.
//!
//! Rules of use:
//! - A test waits for events ([`ScriptedServer::wait_for`]), it does not sleep. "Nothing happens"
//!   is shown by an event that must come later.
//! - The server checks every frame against PROTOCOL.md ([`rules`]); a breach fails the test at its
//!   next wait, or at its end.
//! - Every failure prints the timeline of the server and the agent's own log.

pub mod agent;
pub mod cgroups;
pub mod front;
pub mod http;
pub mod link;
pub mod log;
pub mod processes;
pub mod rules;
pub mod seed;
pub mod server;
pub mod task;
pub mod tls;

pub use agent::{Agent, program};
pub use http::Answer;
pub use link::Reaction;
pub use log::{Event, Frame, Log};
pub use server::ScriptedServer;
pub use task::Task;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A test that failed while it held a lock has its message already; the others go on.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
