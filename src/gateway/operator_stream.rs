//! The live stream of one task to one operator: its journal, read at the operator's own pace.
//!
//! Only what is durable is shown. The reader is woken when more is; between it and the agent there
//! is nothing but the file, so a slow operator holds up nobody and no output waits in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use async_channel::{Receiver, Sender};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_lite::FutureExt;
use hyper::body::Bytes;
use smol::Timer;

use super::hub::Hub;
use super::journal::{self, FLAG_JUMP, Header, Kind};
use super::operator_types::StreamEvent;
use crate::limits::{GATEWAY_STREAM_KEEPALIVE, GATEWAY_STREAM_READ_BYTES};

/// Parts of the answer that wait for the operator's connection.
const PARTS_WAITING: usize = 2;

/// Starts a stream of the task, which is in memory, from `offset`.
pub fn start(hub: &Rc<Hub>, task_id: &str, offset: u64) -> Receiver<Bytes> {
    let (parts, body) = async_channel::bounded(PARTS_WAITING);
    let mut reader = Reader {
        hub: hub.clone(),
        task_id: task_id.to_owned(),
        position: offset,
        file: None,
        unread: Vec::new(),
        parts,
    };
    hub.spawn(async move {
        // The operator has gone away, or the stream is at its end.
        if let Err(error) = reader.run().await {
            log::warn!("stream of task {}: {error}", reader.task_id);
            let event = StreamEvent {
                error: Some(error),
                ..StreamEvent::default()
            };
            reader.send(&[event]).await;
        }
    });
    body
}

struct Reader {
    hub: Rc<Hub>,
    task_id: String,
    /// Where `unread` begins in the journal.
    position: u64,
    file: Option<File>,
    /// Bytes that were read and do not make a whole record yet.
    unread: Vec<u8>,
    parts: Sender<Bytes>,
}

enum Wait {
    More,
    Alive,
    Stopping,
}

impl Reader {
    async fn run(&mut self) -> Result<(), String> {
        loop {
            if !self.hub.load(&self.task_id).await? {
                return Err("the task is gone".into());
            }
            let Some(woken) = self.hub.watch(&self.task_id) else {
                continue;
            };
            loop {
                if !self.send_what_is_durable().await? {
                    return Ok(());
                }
                match self.wait(&woken).await {
                    Some(Wait::More) => {}
                    Some(Wait::Alive) if self.send(&[StreamEvent::default()]).await => {}
                    Some(Wait::Alive | Wait::Stopping) => return Ok(()),
                    // The attempt was read anew after a failed commit.
                    None => break,
                }
            }
        }
    }

    /// `None` if nobody will wake this reader any more.
    async fn wait(&self, woken: &Receiver<()>) -> Option<Wait> {
        let more = async { woken.recv().await.ok().map(|()| Wait::More) };
        let stopping = async {
            // Nothing is ever sent: the end of the channel is the signal.
            let _ = self.hub.stopping.recv().await;
            Some(Wait::Stopping)
        };
        let alive = async {
            Timer::after(GATEWAY_STREAM_KEEPALIVE).await;
            Some(Wait::Alive)
        };
        more.or(stopping).or(alive).await
    }

    /// `false` when the stream has come to its end, or nobody reads it.
    async fn send_what_is_durable(&mut self) -> Result<bool, String> {
        loop {
            let durable = self.hub.with_task(&self.task_id, |live| live.durable);
            let Some(durable) = durable else {
                return Ok(true);
            };
            if self.position > durable {
                return Err(format!("offset {} is beyond the end", self.position));
            }
            let read_to = self.position + self.unread.len() as u64;
            if read_to >= durable {
                return Ok(!self.parts.is_closed());
            }
            self.read(read_to, durable).await?;
            let (events, ended) = self.take_records()?;
            if !events.is_empty() && !self.send(&events).await || ended {
                return Ok(false);
            }
        }
    }

    async fn read(&mut self, at: u64, end: u64) -> Result<(), String> {
        let path = self
            .hub
            .with_task(&self.task_id, |live| live.attempt.task.key())
            .map(|key| self.hub.store.journal_path(key));
        let Some(path) = path else {
            return Ok(());
        };
        let length = usize::try_from(end - at).unwrap_or(usize::MAX);
        let length = length.min(GATEWAY_STREAM_READ_BYTES);
        let file = self.file.take();
        let read = smol::unblock(move || -> io::Result<(File, Vec<u8>)> {
            let file = match file {
                Some(file) => file,
                None => File::open(path)?,
            };
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at)?;
            Ok((file, bytes))
        });
        let (file, bytes) = read
            .await
            .map_err(|error| format!("the journal cannot be read: {error}"))?;
        self.file = Some(file);
        self.unread.extend_from_slice(&bytes);
        Ok(())
    }

    /// Takes the whole records off what was read.
    fn take_records(&mut self) -> Result<(Vec<StreamEvent>, bool), String> {
        let mut events = Vec::new();
        let mut ended = false;
        let mut taken = 0;
        while let Some((header, payload, rest)) = journal::split_first(&self.unread[taken..])
            .map_err(|error| format!("at offset {}: {error}", self.position + taken as u64))?
        {
            taken = self.unread.len() - rest.len();
            let offset = self.position + taken as u64;
            ended |= header.kind == Kind::Final;
            events.extend(event(offset, &header, payload));
            if ended {
                break;
            }
        }
        self.unread.drain(..taken);
        self.position += taken as u64;
        Ok((events, ended))
    }

    /// `false` if nobody reads any more.
    async fn send(&self, events: &[StreamEvent]) -> bool {
        let mut lines = Vec::new();
        for event in events {
            serde_json::to_writer(&mut lines, event).expect("an event is JSON, written to memory");
            lines.push(b'\n');
        }
        self.parts.send(lines.into()).await.is_ok()
    }
}

fn event(offset: u64, header: &Header, payload: &[u8]) -> Option<StreamEvent> {
    let mut event = StreamEvent {
        offset,
        ..StreamEvent::default()
    };
    match header.kind {
        Kind::Task => return None,
        Kind::Received => event.status = Some("received".into()),
        Kind::Started => event.status = Some("running".into()),
        Kind::Cancel => event.status = Some("cancel_requested".into()),
        Kind::Output(stream) => {
            event.stream = Some(stream);
            event.sequence = Some(header.sequence);
            event.data_base64 = Some(STANDARD.encode(payload));
            event.truncated_before = (header.flags & FLAG_JUMP != 0).then_some(true);
        }
        Kind::Final => match serde_json::from_slice(payload) {
            Ok(result) => event.result = Some(result),
            Err(error) => event.error = Some(format!("the result cannot be read: {error}")),
        },
    }
    Some(event)
}
