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
        buffer: Vec::with_capacity(WRITE_BUFFER_BYTES),
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
        let next = match lanes.ready() {
            Some(next) => next,
            None => {
                sink.write_out().await?;
                lanes.wait().await
            }
        };
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
    buffer: Vec<u8>,
    masks: Masks,
}

/// First byte, length in its longest form and mask.
const HEADER_BYTES_MAX: usize = 14;

impl Sink {
    /// Adds one masked frame to the buffer, which is written whenever it is full.
    async fn frame(&mut self, opcode: Opcode, payload: &[u8]) -> Result<(), String> {
        if self.buffer.len() + HEADER_BYTES_MAX > WRITE_BUFFER_BYTES {
            self.write_out().await?;
        }
        let mask = self.masks.next()?;
        put_header(&mut self.buffer, opcode, payload.len(), mask);
        let mut written = 0;
        while written < payload.len() {
            if self.buffer.len() == WRITE_BUFFER_BYTES {
                self.write_out().await?;
            }
            let room = WRITE_BUFFER_BYTES - self.buffer.len();
            let end = payload.len().min(written + room);
            put_masked(&mut self.buffer, &payload[written..end], mask, written);
            written = end;
        }
        Ok(())
    }

    /// Writes and flushes the buffer. Each step that makes progress has the whole timeout again.
    async fn write_out(&mut self) -> Result<(), String> {
        let timeout = self.writer.timeout;
        let half = &mut self.writer.half;
        let mut rest = self.buffer.as_slice();
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
        self.buffer.clear();
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

/// A final, masked frame of RFC 6455 section 5.2.
fn put_header(buffer: &mut Vec<u8>, opcode: Opcode, length: usize, mask: [u8; 4]) {
    const FIN: u8 = 0x80;
    const MASKED: u8 = 0x80;
    buffer.push(FIN | opcode as u8);
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(length @ ..126), _) => buffer.push(MASKED | length),
        (_, Ok(length)) => {
            buffer.push(MASKED | 126);
            buffer.extend_from_slice(&length.to_be_bytes());
        }
        _ => {
            buffer.push(MASKED | 127);
            buffer.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    buffer.extend_from_slice(&mask);
}

/// Appends `piece`, which begins `offset` bytes into its payload, masked.
fn put_masked(buffer: &mut Vec<u8>, piece: &[u8], mask: [u8; 4], offset: usize) {
    let start = buffer.len();
    buffer.extend_from_slice(piece);
    let mut key = [0; 8];
    for (at, byte) in key.iter_mut().enumerate() {
        *byte = mask[(offset + at) % 4];
    }
    let word_key = u64::from_ne_bytes(key);
    let mut words = buffer[start..].chunks_exact_mut(8);
    for word in &mut words {
        let mut value = [0; 8];
        value.copy_from_slice(word);
        word.copy_from_slice(&(u64::from_ne_bytes(value) ^ word_key).to_ne_bytes());
    }
    for (byte, key) in words.into_remainder().iter_mut().zip(key) {
        *byte ^= key;
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
