//! Any bytes as a segment of the outbox: opening, reading and telling what is there.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostlink_edge::outbox::fuzzing::recovery(bytes));
