//! Any bytes as WebSocket frames, behind an upgrade that has succeeded.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostlink_edge::net::fuzzing::frames(bytes));
