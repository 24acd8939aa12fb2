//! The gateway over real loopback sockets, against a small scripted device.

mod commits;
mod http;
mod operator;
mod session;
mod store;
mod support;
