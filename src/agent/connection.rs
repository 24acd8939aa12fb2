//! One WebSocket connection: its dial, its reader, its frames in order.

use std::cell::Cell;
use std::rc::Rc;

use async_channel::{Receiver, Sender};
use futures_lite::future;

use super::clock::Clock;
use super::driver::{self, Input};
use super::outside::FrameReader;
use super::{Context, frames};
use crate::limits::{
    ANSWERS_IN_WRITER, BATCHES_IN_WRITER, CONTROL_LANE_FRAMES, DATA_LANE_FRAMES, GOODBYE_PATIENCE,
    LARGE_FRAME_BYTES,
};
use crate::net::{self, Control, Incoming};
use crate::outbox;
use crate::session::Granted;
use crate::session::delivery::Admission;

/// Messages of one read that are to be sent.
pub struct OutBatch {
    pub batch: Rc<outbox::Batch>,
    /// The message that an admission calls 0.
    pub first: usize,
    pub admission: Admission,
    pub granted: Granted,
}

/// What goes out in this order.
#[expect(clippy::large_enum_variant, reason = "nearly all are batches")]
pub enum ToSend {
    Batch(OutBatch),
    /// A final that answers a repeated delivery and may not pass output of its attempt.
    Answer(Vec<u8>),
}

/// The driver's end of a connection. Dropping it ends the connection.
pub struct Connection {
    /// Tells this connection's inputs from those of earlier ones.
    pub id: u64,
    pub control: Sender<Control>,
    /// The other end of it, to take back what is not written yet.
    lane: Receiver<Control>,
    pub to_send: Sender<ToSend>,
    task: smol::Task<()>,
}

impl Connection {
    /// In a function of its own: the future stands on the stack before it is on the heap.
    #[inline(never)]
    pub fn dial(context: &Rc<Context>, id: u64) -> Connection {
        let (control, control_lane) = async_channel::bounded(CONTROL_LANE_FRAMES);
        let (to_send, queue) = async_channel::bounded(BATCHES_IN_WRITER + ANSWERS_IN_WRITER);
        let lane = control_lane.clone();
        let task = context.start(run(context.clone(), id, control_lane, queue));
        Connection {
            id,
            control,
            lane,
            to_send,
            task,
        }
    }

    /// Says goodbye, if the socket takes it soon, and ends.
    pub async fn close(self, clock: &Clock) {
        if self.control.is_full() {
            // The server does not read.
            return;
        }
        // A final that the server asked for may wait here, and be reported by now. The data lane is
        // behind the goodbye and not written any more.
        while self.lane.try_recv().is_ok() {}
        let _ = self.control.try_send(Control::Close);
        let patience = async {
            clock.sleep(GOODBYE_PATIENCE).await;
        };
        future::or(self.task, patience).await;
    }
}

async fn run(context: Rc<Context>, id: u64, control: Receiver<Control>, to_send: Receiver<ToSend>) {
    #[cfg(test)]
    if let Some(outside) = context.simulated.clone() {
        match outside.connect().await {
            Ok(line) => {
                let write = line.writer();
                let write = |data, _spent| write.run(control, data);
                converse(&context, id, line, to_send, write).await;
            }
            Err(error) => context.tell(Input::DialFailed(id, error)).await,
        }
        return;
    }
    let dialled = net::connect_websocket(&context.dialer, &context.websocket, &context.signer);
    match dialled.await {
        Ok((writer, reader)) => {
            let write = |data, spent| net::write_loop(writer, control, data, spent);
            converse(&context, id, reader, to_send, write).await;
        }
        Err(error) => context.tell(Input::DialFailed(id, error)).await,
    }
}

/// Reads and writes until one of them ends. `write` gets the lane of encoded frames, and where to
/// put those that are written.
async fn converse<W: Future<Output = String>>(
    context: &Rc<Context>,
    id: u64,
    reader: impl FrameReader + 'static,
    to_send: Receiver<ToSend>,
    write: impl FnOnce(Receiver<Vec<u8>>, Sender<Vec<u8>>) -> W,
) {
    context.tell(Input::Connected(id)).await;
    let (data, data_lane) = async_channel::bounded(DATA_LANE_FRAMES);
    // Those in the lane, one being written and one being filled.
    let (spent, spare) = async_channel::bounded(DATA_LANE_FRAMES + 2);
    let goodbye = Rc::new(Cell::new(None));
    // A task of its own: each frame that is sent would have the socket asked for news.
    let reading = context.start(read_loop(context.clone(), id, reader, goodbye.clone()));
    let sending = send_all(context, id, to_send, data, spare);
    let why = future::or(write(data_lane, spent), future::or(reading, sending)).await;
    let why = goodbye.take().unwrap_or(why);
    context.tell(Input::Disconnected(id, why)).await;
}

/// `goodbye` takes the reason that the server gives for its close.
async fn read_loop(
    context: Rc<Context>,
    id: u64,
    mut reader: impl FrameReader,
    goodbye: Rc<Cell<Option<String>>>,
) -> String {
    loop {
        let mut is_large = false;
        let input = match reader.next().await {
            Ok(Incoming::Text(frame)) => {
                is_large = frame.len() > LARGE_FRAME_BYTES;
                Input::Frame(id, frame)
            }
            Ok(Incoming::Ping | Incoming::Pong) => Input::Heard(id),
            // The write loop answers the close and ends.
            Ok(Incoming::Closed(why)) => {
                goodbye.set(Some(why));
                return future::pending().await;
            }
            Err(why) if reader.says_goodbye() => {
                // The server is told why. One that does not read is not waited for.
                goodbye.set(Some(why));
                context.clock.sleep(GOODBYE_PATIENCE).await;
                return String::new();
            }
            Err(why) => return why,
        };
        context.tell(input).await;
        if is_large {
            // Inputs that wait are counted, not weighed: of large ones there is one.
            let _ = driver::has_caught_up(&context.inputs).await;
        }
    }
}

/// Encodes batch after batch into the data lane, which holds few frames; `spare` gives their buffers
/// back.
async fn send_all(
    context: &Rc<Context>,
    id: u64,
    to_send: Receiver<ToSend>,
    data: Sender<Vec<u8>>,
    spare: Receiver<Vec<u8>>,
) -> String {
    while let Ok(next) = to_send.recv().await {
        let out = match next {
            ToSend::Batch(out) => out,
            ToSend::Answer(frame) => {
                // The lane is closed when the connection ends.
                let _ = data.send(frame).await;
                continue;
            }
        };
        for admitted in &out.admission {
            let mut frame = spare.try_recv().unwrap_or_default();
            frame.clear();
            frames::encode(
                &mut frame,
                &out.batch.messages[out.first + admitted.index],
                &out.batch.buffer,
                admitted.truncated,
                out.granted,
                &context.agent_id,
            );
            if data.send(frame).await.is_err() {
                break;
            }
        }
        context.tell(Input::Transmitted(id, out.batch)).await;
    }
    future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection whose control lane holds `waiting` frames and has room for so many, and that lane.
    fn connection(
        executor: &smol::LocalExecutor<'_>,
        room: usize,
        waiting: usize,
    ) -> (Connection, Receiver<Control>) {
        let (control, lane) = async_channel::bounded(room);
        for _ in 0..waiting {
            control.try_send(Control::Ping).expect("there is room");
        }
        let connection = Connection {
            id: 1,
            control,
            lane: lane.clone(),
            to_send: async_channel::bounded(1).0,
            task: executor.spawn(future::pending()),
        };
        (connection, lane)
    }

    #[test]
    fn nothing_is_written_after_an_end_without_a_goodbye() {
        let executor = smol::LocalExecutor::new();
        let (full, _lane) = connection(&executor, 1, 1);
        let closed = future::block_on(future::poll_once(full.close(&Clock::Boot)));
        assert!(closed.is_some(), "it goes on");

        let (with_room, lane) = connection(&executor, 1, 0);
        let closed = future::block_on(future::poll_once(with_room.close(&Clock::Boot)));
        assert!(closed.is_none(), "its goodbye is not waited for");
        assert!(matches!(lane.try_recv(), Ok(Control::Close)));
    }

    /// A final that answers a repeated delivery waits for the socket when the session ends, and is
    /// reported then.
    #[test]
    fn an_answer_that_waits_is_not_written_in_front_of_the_goodbye() {
        let executor = smol::LocalExecutor::new();
        let (waits, lane) = connection(&executor, 2, 1);
        let closed = future::block_on(future::poll_once(waits.close(&Clock::Boot)));
        assert!(closed.is_none(), "its goodbye is not waited for");
        assert!(matches!(lane.try_recv(), Ok(Control::Close)));
        assert!(lane.is_empty());
    }
}
