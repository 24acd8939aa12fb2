//! The one task that writes to a WebSocket.
//!
//! Order: answers to the server's pings and closes, then the control lane, then the data lane. What
//! is ready is masked into one buffer of [`WRITE_BUFFER_BYTES`], which is written when it is full or
//! when nothing more is ready, so that small frames share a write and a lone one leaves at once. A
//! large message passes through the same buffer piece by piece: the size of a message costs no
//! memory here. The buffer is never added to while a write of it is under way.

use std::io;
use std::time::Duration;

use async_channel::{Receiver, Sender, TryRecvError};
use futures_lite::{AsyncWriteExt as _, future};
use smol::Timer;

use super::websocket::{Reply, WsWriter};
use crate::limits::{SPENT_FRAME_BYTES_MAX, WRITE_BUFFER_BYTES};

/// What goes before all data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// An encoded envelope, UTF-8.
    Text(Vec<u8>),
    Ping,
    /// Ends the connection once it is written.
    Close,
}

/// Writes until the connection ends, and says why it ended: a `Close` that was sent, an error, a
/// write without progress, or both lanes closed and empty. `data` are encoded envelopes, UTF-8;
/// their buffers go back through `spent`, if it has room.
pub async fn write_loop(
    writer: WsWriter,
    control: Receiver<Control>,
    data: Receiver<Vec<u8>>,
    spent: Sender<Vec<u8>>,
) -> String {
    let lanes = Lanes {
        replies: writer.replies.clone(),
        control,
        data,
    };
    let mut sink = Sink {
        writer,
        buffer: vec![0; WRITE_BUFFER_BYTES].into_boxed_slice(),
        filled: 0,
        masks: Masks::new(),
    };
    match run(&lanes, &mut sink, &spent).await {
        Ok(reason) => reason.to_string(),
        Err(reason) => reason,
    }
}

async fn run(
    lanes: &Lanes,
    sink: &mut Sink,
    spent: &Sender<Vec<u8>>,
) -> Result<&'static str, String> {
    loop {
        let next = lanes.next(sink).await?;
        let (opcode, payload) = match next {
            Next::Reply(Reply::Pong(payload)) => (Opcode::Pong, Vec::from(payload)),
            Next::Control(Control::Text(payload)) => (Opcode::Text, payload),
            Next::Data(payload) => {
                sink.frame(Opcode::Text, &payload).await?;
                if payload.capacity() <= SPENT_FRAME_BYTES_MAX {
                    // With no room the sender has buffers enough.
                    let _ = spent.try_send(payload);
                }
                continue;
            }
            Next::Control(Control::Ping) => (Opcode::Ping, Vec::new()),
            Next::Reply(Reply::Close(code)) => {
                let payload = code.map_or(Vec::new(), |code| code.to_be_bytes().to_vec());
                sink.frame(Opcode::Close, &payload).await?;
                sink.write_out().await?;
                return Ok("the server's close was answered");
            }
            Next::Control(Control::Close) => {
                sink.frame(Opcode::Close, &CLOSE_NORMAL.to_be_bytes())
                    .await?;
                sink.write_out().await?;
                return Ok("a close was sent");
            }
            Next::AllClosed => {
                sink.write_out().await?;
                return Ok("nothing more is to be sent");
            }
        };
        sink.frame(opcode, &payload).await?;
    }
}

/// RFC 6455 section 7.4.1.
const CLOSE_NORMAL: u16 = 1000;

struct Lanes {
    replies: Receiver<Reply>,
    control: Receiver<Control>,
    data: Receiver<Vec<u8>>,
}

enum Next {
    Reply(Reply),
    Control(Control),
    Data(Vec<u8>),
    AllClosed,
}

impl Lanes {
    /// What is to be written next. Before this waits, the buffer is written.
    async fn next(&self, sink: &mut Sink) -> Result<Next, String> {
        if let Some(next) = self.ready() {
            return Ok(next);
        }
        if sink.filled > 0 {
            // Whoever encodes may have more by then: a write costs as much as several frames.
            future::yield_now().await;
            if let Some(next) = self.ready() {
                return Ok(next);
            }
            sink.write_out().await?;
        }
        Ok(self.wait().await)
    }

    /// What can be written at once, most urgent first.
    fn ready(&self) -> Option<Next> {
        if let Ok(reply) = self.replies.try_recv() {
            return Some(Next::Reply(reply));
        }
        let control = self.control.try_recv();
        if let Ok(frame) = control {
            return Some(Next::Control(frame));
        }
        match (control, self.data.try_recv()) {
            (_, Ok(frame)) => Some(Next::Data(frame)),
            (Err(TryRecvError::Closed), Err(TryRecvError::Closed)) => Some(Next::AllClosed),
            _ => None,
        }
    }

    /// A closed lane leaves the waiting to the other one.
    async fn wait(&self) -> Next {
        let control_frame = async || self.control.recv().await.map(Next::Control);
        let data_frame = async || self.data.recv().await.map(Next::Data);
        let reply = async {
            match self.replies.recv().await {
                Ok(reply) => Next::Reply(reply),
                Err(_) => future::pending().await,
            }
        };
        let control = async {
            match control_frame().await {
                Ok(next) => next,
                Err(_) => data_frame().await.unwrap_or(Next::AllClosed),
            }
        };
        let data = async {
            match data_frame().await {
                Ok(next) => next,
                Err(_) => control_frame().await.unwrap_or(Next::AllClosed),
            }
        };
        future::or(future::or(reply, control), data).await
    }
}

/// Opcodes of RFC 6455 section 5.2 that are sent.
#[derive(Debug, Clone, Copy)]
enum Opcode {
    Text = 0x1,
    Close = 0x8,
    Ping = 0x9,
    Pong = 0xa,
}

struct Sink {
    writer: WsWriter,
    /// The first `filled` bytes count.
    buffer: Box<[u8]>,
    filled: usize,
    masks: Masks,
}

/// First byte, length in its longest form and mask.
const HEADER_BYTES_MAX: usize = 14;

impl Sink {
    /// Adds one masked frame to the buffer, which is written whenever it is full.
    async fn frame(&mut self, opcode: Opcode, payload: &[u8]) -> Result<(), String> {
        if self.filled + HEADER_BYTES_MAX > self.buffer.len() {
            self.write_out().await?;
        }
        let mask = self.masks.next()?;
        let header = header(opcode, payload.len(), mask);
        self.buffer[self.filled..self.filled + header.len()].copy_from_slice(&header);
        self.filled += header.len();
        let mut written = 0;
        while written < payload.len() {
            if self.filled == self.buffer.len() {
                self.write_out().await?;
            }
            let room = &mut self.buffer[self.filled..];
            let piece = &payload[written..payload.len().min(written + room.len())];
            mask_into(&mut room[..piece.len()], piece, mask, written);
            self.filled += piece.len();
            written += piece.len();
        }
        Ok(())
    }

    /// Writes and flushes the buffer. Each step that makes progress has the whole timeout again.
    async fn write_out(&mut self) -> Result<(), String> {
        let timeout = self.writer.timeout;
        let half = &mut self.writer.half;
        let mut rest = &self.buffer[..self.filled];
        if rest.is_empty() {
            return Ok(());
        }
        while !rest.is_empty() {
            let count = within(timeout, half.write(rest)).await?;
            if count == 0 {
                return Err("writing to the connection failed: it is closed".to_string());
            }
            rest = &rest[count..];
        }
        self.filled = 0;
        within(timeout, half.flush()).await
    }
}

async fn within<T>(
    timeout: Duration,
    step: impl Future<Output = io::Result<T>>,
) -> Result<T, String> {
    let step = async {
        step.await
            .map_err(|error| format!("writing to the connection failed: {error}"))
    };
    future::or(step, async {
        Timer::after(timeout).await;
        Err(format!("the server took no data for {timeout:?}"))
    })
    .await
}

/// The head of a final, masked frame of RFC 6455 section 5.2.
fn header(opcode: Opcode, length: usize, mask: [u8; 4]) -> heapless::Vec<u8, HEADER_BYTES_MAX> {
    const FIN: u8 = 0x80;
    const MASKED: u8 = 0x80;
    let mut header = heapless::Vec::new();
    let mut put = |bytes: &[u8]| {
        let put = header.extend_from_slice(bytes);
        debug_assert!(put.is_ok(), "the longest form fits");
    };
    put(&[FIN | opcode as u8]);
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(length @ ..126), _) => put(&[MASKED | length]),
        (_, Ok(length)) => {
            put(&[MASKED | 126]);
            put(&length.to_be_bytes());
        }
        _ => {
            put(&[MASKED | 127]);
            put(&(length as u64).to_be_bytes());
        }
    }
    put(&mask);
    header
}

/// Writes `piece`, which begins `offset` bytes into its payload, masked to `out` of the same length.
fn mask_into(out: &mut [u8], piece: &[u8], mask: [u8; 4], offset: usize) {
    const WORD_BYTES: usize = 16;
    let mut key = [0; WORD_BYTES];
    for (at, byte) in key.iter_mut().enumerate() {
        *byte = mask[(offset + at) % 4];
    }
    let word_key = u128::from_ne_bytes(key);
    let (words, rest) = piece.as_chunks::<WORD_BYTES>();
    let (out_words, out_rest) = out.as_chunks_mut::<WORD_BYTES>();
    for (out, word) in out_words.iter_mut().zip(words) {
        *out = (u128::from_ne_bytes(*word) ^ word_key).to_ne_bytes();
    }
    for ((out, byte), key) in out_rest.iter_mut().zip(rest).zip(key) {
        *out = byte ^ key;
    }
}

/// Unpredictable masks (RFC 6455 section 5.3), fetched from OpenSSL 64 at a time.
struct Masks {
    random: [u8; 256],
    used: usize,
}

impl Masks {
    fn new() -> Masks {
        Masks {
            random: [0; 256],
            used: 256,
        }
    }

    fn next(&mut self) -> Result<[u8; 4], String> {
        if self.used == self.random.len() {
            openssl::rand::rand_bytes(&mut self.random)
                .map_err(|error| format!("no random numbers for the frame masks: {error}"))?;
            self.used = 0;
        }
        let mut mask = [0; 4];
        mask.copy_from_slice(&self.random[self.used..self.used + 4]);
        self.used += 4;
        Ok(mask)
    }
}

#[cfg(test)]
mod tests;
