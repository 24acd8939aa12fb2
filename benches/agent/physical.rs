//! What this machine can do at all, measured with the means of the agent and nothing around them.

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use async_tungstenite::tungstenite::{Message, client};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::FallocateFlags;

use crate::frames;
use crate::gateway::{AGENT_ID, Gateway};
use crate::print::sample;

const MIB: f64 = 1024.0 * 1024.0;

/// Appends of `commit_bytes`, each made durable, to a file that is allocated before: MiB/s.
pub fn disk(dir: &Path, commit_bytes: usize, total_bytes: usize) -> Result<f64, String> {
    let path = dir.join("limit.bin");
    let measure = || -> std::io::Result<f64> {
        let file = File::create(&path)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, total_bytes as u64)?;
        file.sync_all()?;
        let commit = sample(commit_bytes);
        let count = total_bytes / commit_bytes;
        let begun = Instant::now();
        for number in 0..count {
            file.write_all_at(&commit, (number * commit_bytes) as u64)?;
            file.sync_data()?;
        }
        Ok((count * commit_bytes) as f64 / MIB / begun.elapsed().as_secs_f64())
    };
    let rate = measure().map_err(|e| format!("{}: {e}", path.display()));
    // It may not be there.
    let _ = std::fs::remove_file(&path);
    rate
}

/// A bare client that sends the same frames to the same gateway with a window of so many: MiB/s of
/// output. It writes one frame at a time and reads an acknowledgement whenever the window is full.
pub fn websocket(chunk_bytes: usize, window: u64, total_bytes: usize) -> Result<f64, String> {
    let gateway = Gateway::start(None).map_err(|e| e.to_string())?;
    let measure = || -> Result<f64, String> {
        let stream = TcpStream::connect(gateway.address()).map_err(|e| e.to_string())?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let url = format!("ws://{}/api/v1/agents/ws", gateway.address());
        let (mut socket, _) = client(url, stream).map_err(|e| e.to_string())?;
        let count = (total_bytes / chunk_bytes) as u64;
        let data = serde_json::to_string(&String::from_utf8_lossy(&sample(chunk_bytes)))
            .map_err(|e| e.to_string())?;
        let mut acknowledged = 0;
        let begun = Instant::now();
        for sequence in 1..=count {
            let frame = format!(
                r#"{{"protocol_version":1,"message_id":"m-{sequence}","type":"task.output","agent_id":"{AGENT_ID}","task_id":"t","execution_attempt_id":"t","sequence":{sequence},"sent_at":"2026-01-01T00:00:00.000Z","payload":{{"stream":"stdout","data":{data},"byte_count":{chunk_bytes}}}}}"#
            );
            socket
                .send(Message::text(frame))
                .map_err(|e| e.to_string())?;
            while sequence - acknowledged >= window || (sequence == count && acknowledged < count) {
                let ack = socket.read().map_err(|e| e.to_string())?.into_text();
                let ack = ack.map_err(|e| e.to_string())?;
                acknowledged = frames::highest(&ack).ok_or("an acknowledgement says nothing")?;
            }
        }
        Ok((count as usize * chunk_bytes) as f64 / MIB / begun.elapsed().as_secs_f64())
    };
    measure().map_err(|why| format!("the bare WebSocket client: {why}"))
}

/// One core that only encodes chunks as JSON strings, or as base64: MiB/s each.
pub fn encoding(chunk_bytes: usize, total_bytes: usize) -> Result<(f64, f64), String> {
    let chunk = sample(chunk_bytes);
    let text = String::from_utf8_lossy(&chunk);
    let count = total_bytes / chunk_bytes;
    let rate = |seconds: f64| (count * chunk_bytes) as f64 / MIB / seconds;
    let mut out = Vec::with_capacity(2 * chunk_bytes);
    let begun = Instant::now();
    for _ in 0..count {
        out.clear();
        serde_json::to_writer(&mut out, &text).map_err(|e| e.to_string())?;
        std::hint::black_box(&out);
    }
    let json = rate(begun.elapsed().as_secs_f64());
    let mut out = String::with_capacity(2 * chunk_bytes);
    let begun = Instant::now();
    for _ in 0..count {
        out.clear();
        STANDARD.encode_string(&chunk, &mut out);
        std::hint::black_box(&out);
    }
    Ok((json, rate(begun.elapsed().as_secs_f64())))
}

/// Syncs everything, so that the writes of one work do not weigh on the next.
pub fn settle() {
    rustix::fs::sync();
    let _ = std::io::stderr().flush();
}
