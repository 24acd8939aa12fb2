//! Any bytes as a record of the outbox whose checksum is right.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostlink_edge::outbox::fuzzing::record(bytes));
