//! The wire contract of PROTOCOL.md as types: envelopes, messages and HTTP bodies.
//!
//! Everything here is pure. Decoding checks sizes and meaning, so that a decoded value can be used
//! without further checks; encoding writes straight into the caller's buffer. Both directions are
//! here, because the reference gateway speaks the other one.
//!
//! - [`envelope`]: the frame around every message, and why a frame is refused.
//! - [`agent_message`]: what an agent sends.
//! - [`server_message`]: what a control plane sends.
//! - [`message_id`]: ids that say what they acknowledge.
//! - [`text`]: bytes as JSON strings; `escape` is its inner loop.
//! - [`http`]: bodies of registration, polling, report and heartbeat.
//! - [`timestamp`]: RFC 3339.

pub mod agent_message;
pub mod envelope;
mod escape;
pub mod http;
pub mod message_id;
pub mod server_message;
pub mod text;
pub mod timestamp;

pub use agent_message::{AgentMessage, FinalPayload, Hello, OutputPayload};
pub use envelope::{DecodeError, Envelope, PROTOCOL_VERSION};
pub use message_id::{MessageId, Piece};
pub use server_message::{HelloAck, ServerMessage, TaskOffer};
pub use text::Lossy;
pub use timestamp::Timestamp;
