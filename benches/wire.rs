//! Envelopes: `cargo bench --bench wire`. A chunk into its frame as text and as base64, and an
//! acknowledgement out of its frame.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hostlink_edge::ids::{AttemptKey, Ids, Stream};
use hostlink_edge::limits::CHUNK_BYTES_MAX;
use hostlink_edge::wire::message_id::Piece;
use hostlink_edge::wire::{AgentMessage, MessageId, OutputPayload, ServerMessage, Timestamp};

const AGENT_ID: &str = "3c8d7315-281e-4bbc-a463-b66dfcb8c3db";
const LINE: &[u8] = b"2026-01-31T12:00:00.000Z sensor/07 temperature=20.75 humidity=41 \"ok\"\n";

fn encode(criterion: &mut Criterion) {
    let ids = Ids::new(AGENT_ID, AGENT_ID).expect("both are short");
    let text: Vec<u8> = LINE.iter().copied().cycle().take(CHUNK_BYTES_MAX).collect();
    let binary: Vec<u8> = (0..CHUNK_BYTES_MAX).map(|at| (at * 7) as u8).collect();
    let mut group = criterion.benchmark_group("encode");
    for (name, bytes) in [
        ("text, 16 KiB", &text[..]),
        ("text, 100 bytes", &text[..100]),
        ("base64, 16 KiB", &binary[..]),
    ] {
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        let mut frame = Vec::with_capacity(2 * CHUNK_BYTES_MAX);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                frame.clear();
                let id = MessageId {
                    incarnation: "0123456789abcdef",
                    key: AttemptKey([7; 16]),
                    piece: Piece::Output(Stream::Stdout, 4711),
                };
                let payload = OutputPayload {
                    stream: Stream::Stdout,
                    bytes: black_box(bytes),
                    truncated_locally: false,
                    binary_granted: true,
                };
                let message = AgentMessage::Output {
                    ids: &ids,
                    sequence: 4711,
                    payload,
                };
                message.encode(id, AGENT_ID, Timestamp::now(), &mut frame);
                black_box(&frame);
            });
        });
    }
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    let frame = format!(
        r#"{{"protocol_version":1,"message_id":"g-1","type":"ack","agent_id":"{AGENT_ID}","task_id":"t","execution_attempt_id":"a","sent_at":"2026-01-01T00:00:00Z","payload":{{"acked_message_id":"0123456789abcdef-07070707070707070707070707070707-o-4711","acked_type":"task.output","task_id":"t","execution_attempt_id":"a","highest_output_sequence":4711}}}}"#
    );
    criterion.bench_function("decode/acknowledgement", |bencher| {
        bencher.iter(|| {
            let message = ServerMessage::decode(black_box(&frame), AGENT_ID);
            black_box(message.is_ok())
        });
    });
}

criterion_group!(benches, encode, decode);
criterion_main!(benches);
