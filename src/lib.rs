//! hostlink-edge: runs shell tasks for a control plane on small Linux devices and loses nothing.
//!
//! The modules are layers; a later one may use earlier ones only as listed in ARCHITECTURE.md
//! (kept by `tests/layers.rs`):
//!
//! 1. [`limits`]: every bound, with its reason.
//! 2. [`ids`]: names that several layers speak of.
//! 3. [`wire`]: envelopes, messages and HTTP bodies. Pure.
//! 4. [`session`]: the protocol as a state machine without I/O.
//! 5. [`outbox`]: the durable log and its index.
//! 6. [`executor`]: runs tasks and captures their output.
//! 7. [`net`]: TLS, proxy, WebSocket, HTTP, signatures, identity.
//! 8. [`config`]: raw settings and validated settings.
//! 9. [`agent`]: wires it all together: events in, effects out.
//! 10. [`gateway`]: the reference control plane (cargo feature `gateway`).
//! 11. [`cli`]: the commands.

pub mod agent;
pub mod cli;
pub mod clock;
pub mod config;
pub mod executor;
#[cfg(feature = "gateway")]
pub mod gateway;
pub mod heap;
pub mod ids;
pub mod limits;
pub mod logger;
pub mod net;
pub mod outbox;
pub mod panics;
pub mod reaping;
pub mod session;
pub mod threads;
pub mod wire;
