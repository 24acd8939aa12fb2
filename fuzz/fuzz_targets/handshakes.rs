//! Any bytes as the answer to a WebSocket upgrade, and to a proxy's CONNECT.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostlink_edge::net::fuzzing::handshakes(bytes));
