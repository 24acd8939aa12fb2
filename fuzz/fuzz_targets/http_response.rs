//! Any bytes as the answer to HTTP requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostlink_edge::net::fuzzing::http_response(bytes));
