//! Any text as a frame from the server.
#![no_main]

use hostlink_edge::wire::{Envelope, ServerMessage};

libfuzzer_sys::fuzz_target!(|frame: &str| {
    let _ = Envelope::decode(frame, "agent");
    let _ = ServerMessage::decode(frame, "agent");
});
