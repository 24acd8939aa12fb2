//! Any bytes as what happens to a session: its server, its store, its tasks, its connections.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostlink_edge::session::fuzzing::session(bytes));
