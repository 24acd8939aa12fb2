//! Every bound of the agent, with its unit in the name and its reason beside it.
//!
//! A buffer, queue or wait that is not bounded by a constant of this file, or by a setting whose
//! range stands here, is a bug. The relations that other code rests on are asserted at the end,
//! at compile time.

use std::time::Duration;

pub const KIB: usize = 1024;
pub const MIB: usize = 1024 * KIB;

// ---- names ------------------------------------------------------------------------------------

/// A task or attempt id of the control plane. UUIDs take 36; old servers use longer names.
pub const ID_BYTES_MAX: usize = 128;

/// An agent id, a message id of the server, an error code: longer ones are refused.
pub const NAME_BYTES_MAX: usize = 256;

// ---- capture ----------------------------------------------------------------------------------

/// One chunk of output: the capture buffer, and the largest flush threshold.
pub const CHUNK_BYTES_MAX: usize = 16 * KIB;

/// Full chunks of one stream that wait for their commit. Several, so that one commit carries
/// several; when all wait, the pipe is not read and the child waits.
pub const CHUNKS_WAITING_MAX: usize = 8;

/// Buffers of one stream: those of a commit that is under way, as many that wait for the next one, so
/// that it is as large, and the one that is being filled. They are made when they are needed.
pub const CHUNK_BUFFERS_MAX: usize = 2 * CHUNKS_WAITING_MAX + 1;

/// A buffer of one chunk of output, reused for the life of its stream.
pub type ChunkBuffer = heapless::Vec<u8, CHUNK_BYTES_MAX>;
pub type Chunk = Box<ChunkBuffer>;
/// Consecutive chunks of one stream that are committed together.
pub type ChunkBatch = heapless::Vec<Chunk, CHUNKS_WAITING_MAX>;

/// Output that is stored so far ahead of what the session has read waits for its next read: of bulk
/// output, what is nearer is still in memory …
pub const PACE_BYTES: u64 = (UNITS_IN_MEMORY * READ_BYTES_MAX) as u64;
/// … but only if the last read is not longer ago, and no longer, …
pub const PACE_PATIENCE: Duration = Duration::from_millis(2);
/// … and once for so many bytes: no task is held below 32 MB/s by it.
pub const PACE_STEP_BYTES: usize = READ_BYTES_MAX / 2;

/// While no session is active nobody watches, and flash wears: flush this seldom.
pub const FLUSH_INTERVAL_OFFLINE: Duration = Duration::from_secs(1);
/// When so many looks in this time find something in a pipe, 1,000 a second, there are rests between
/// them, …
pub const HASTY_LOOKS: u32 = 8;
pub const HASTY_TIME: Duration = Duration::from_millis(8);
/// … as long as a look finds no more than this, so that no task is held below 4 MB/s by it, …
pub const HASTY_BYTES: usize = CHUNK_BYTES_MAX / 2;
/// … and if the pipe holds as much: less, where the user's quota is used up, may be full by then.
pub const HASTY_PIPE_BYTES: usize = 4 * CHUNK_BYTES_MAX;
/// Such a rest.
pub const LOOK_REST: Duration = Duration::from_millis(2);

/// Between attempts to store chunks that the store refused.
pub const STORE_RETRY_DELAY: Duration = Duration::from_millis(200);

/// A task has ended and its last chunks still cannot be stored: they are given up after this, and
/// the final goes by report.
pub const STORE_GIVE_UP: Duration = Duration::from_secs(60);

/// A shell has exited but a child of it still holds the pipe: what comes later is let go.
pub const LEFTOVER_PIPE_WAIT: Duration = Duration::from_secs(1);

/// The agent stops, and a task that was killed is still not recorded as ended: it is not waited for
/// any longer, so that a broken disk does not hold up a reboot.
pub const STOP_GIVE_UP: Duration = Duration::from_secs(5);

/// What is still read from a pipe that is let go: as much as the largest pipe holds.
pub const LEFTOVER_PIPE_BYTES: usize = MIB;

/// Where the kernel has no pidfd, a process is looked at this often.
pub const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A group that was told to end is looked for in `/proc` this often: soon at first, since most end
/// at once, then less often, since every look reads one file for each process of the system.
pub const GROUP_POLL_INTERVAL_MIN: Duration = Duration::from_millis(2);
pub const GROUP_POLL_INTERVAL_MAX: Duration = Duration::from_millis(100);

/// What a task leaves behind gets this long from TERM to KILL: its shell has ended, so nobody
/// waits for a result.
pub const LEFTOVER_GRACE: Duration = Duration::from_millis(500);

/// A killed process that is still there after this hangs in the kernel, and is not waited for.
pub const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// From the exit of an orphan of a task to its collection.
pub const COLLECT_DELAY: Duration = Duration::from_millis(100);

/// Looks for processes that are not stopped yet, before those that are get killed.
pub const STOP_ROUNDS_MAX: usize = 50;

/// Processes that one look at the system takes in; the next look finds the others.
pub const PROCESSES_SEEN_MAX: usize = 16 * KIB;

/// What is read of a process's environment.
pub const ENVIRONMENT_BYTES_READ: u64 = MIB as u64;

/// What is read of the kernel's counters of memory events: they are 4 KiB today.
pub const VMSTAT_BYTES_READ: u64 = 16 * KIB as u64;

/// Cgroups of one agent, or below that of one task, that are looked into.
pub const CGROUPS_VISITED_MAX: usize = 1024;

/// Added to the agent's `oom_score_adj` for its tasks: as if they held half of the memory more.
pub const OOM_SCORE_OF_TASKS: i32 = 500;
pub const OOM_SCORE_MAX: i32 = 1000;

/// The lowest priority of the scheduler (`HOSTLINK_TASK_NICE`).
pub const NICE_MAX: u8 = 19;
/// Less memory than this starts no shell (`HOSTLINK_TASK_MEMORY_MAX`).
pub const TASK_MEMORY_MIN: u64 = MIB as u64;
/// Processes of a task: more than `PID_MAX_LIMIT` of Linux cannot be (`HOSTLINK_TASK_PIDS_MAX`).
pub const TASK_PIDS_MAX: u64 = 4 * MIB as u64;
/// Percent of one CPU: a thousand CPUs (`HOSTLINK_TASK_CPU_MAX`).
pub const TASK_CPU_MAX: u64 = 100_000;

/// What is read of `/etc/passwd` and of `/etc/group`; entries behind it are not found.
pub const ACCOUNT_FILE_BYTES_MAX: u64 = MIB as u64;
/// Supplementary groups that a task gets (`NGROUPS_MAX` of old kernels).
pub const GROUPS_MAX: usize = 32;

/// A task that is dropped while it runs is killed and waited for in place, this many times
/// [`GROUP_POLL_INTERVAL_MIN`] at most: the thread stands still meanwhile.
pub const DROPPED_TASK_LOOKS: u32 = 5;

/// One argument of a new process (`MAX_ARG_STRLEN` of Linux), its terminating NUL included.
pub const ARGUMENT_BYTES_MAX: usize = 128 * KIB;

/// A command. A longer one ends `failed` with the reason.
pub const COMMAND_BYTES_MAX: usize = MIB;

/// The tail of a stream that a final may carry (`HOSTLINK_TASK_FINAL_OUTPUT_BYTES`).
pub const FINAL_OUTPUT_BYTES_DEFAULT: usize = 64 * KIB;
pub const FINAL_OUTPUT_BYTES_MAX: usize = MIB;

/// A sentence that says why a task failed.
pub const REASON_BYTES_MAX: usize = 1024;

/// Tasks that run at once (`HOSTLINK_TASK_CONCURRENCY`).
pub const CONCURRENCY_MAX: usize = 4;

// ---- session ----------------------------------------------------------------------------------

/// Messages sent and not yet acknowledged.
pub const WINDOW_MESSAGES: usize = 64;
/// Raw payload bytes sent and not yet acknowledged. A larger message goes alone.
pub const WINDOW_BYTES: usize = 256 * KIB;
/// Of both, at most half is for one stream, so that no stream shuts out the others.
pub const WINDOW_STREAM_MESSAGES: usize = WINDOW_MESSAGES / 2;
pub const WINDOW_STREAM_BYTES: usize = WINDOW_BYTES / 2;

/// Raw payload of one read, unless a single message is larger: what a full commit brings. Only so much
/// is in memory; the rest of the window is names.
pub const READ_BYTES_MAX: usize = CHUNKS_WAITING_MAX * CHUNK_BYTES_MAX;
/// Heads of the unit and the records of a full commit, and its padding to a page.
pub const BATCH_HEADS_BYTES: usize = 8 * KIB;
/// The buffer of a batch, which may have been that of a commit.
pub const BATCH_BUFFER_BYTES: usize = READ_BYTES_MAX + BATCH_HEADS_BYTES;

/// A chunk goes at most so far ahead of the first unacknowledged one of its stream: the outbox
/// cannot note the acknowledgement of a single chunk that is further away.
pub const ACK_SPAN: u64 = 64;

/// A message without acknowledgement is sent again after this, once; then the session is closed.
pub const ACK_TIMEOUT: Duration = Duration::from_secs(30);

/// A stream that fills its half of the window without an acknowledgement for this long is passed
/// over, so that others are not held up behind it.
pub const STREAM_STALL: Duration = Duration::from_secs(1);

/// Reports of the same gap, or sessions without progress, after which a stream is given up
/// (PROTOCOL.md 3, Errors).
pub const STREAM_FAILURES_MAX: u32 = 3;

/// After a resend for a gap error, the next report of the same gap counts this much later: until
/// then reports may still be about what was sent before.
pub const GAP_ROUND: Duration = Duration::from_secs(1);

/// Streams and finals that the session follows at once: those in flight, and as many again that
/// are being sent again or passed over.
pub const LANES_MAX: usize = 2 * WINDOW_MESSAGES;

/// Batches handed to the write loop and not yet written.
pub const BATCHES_IN_WRITER: usize = 2;
/// Finals that answer a repeated delivery and wait behind these batches. A further one is left out:
/// it is on its way in its order.
pub const ANSWERS_IN_WRITER: usize = 4;

/// Streams whose failures are remembered between sessions.
pub const STREAM_FAILURES_REMEMBERED: usize = 64;

/// Hello frame, encoded.
pub const HELLO_BYTES_MAX: usize = 256 * KIB;

/// From the upgrade to `agent.hello_ack`.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(20);
/// From a ping to its pong, or to anything else that arrives.
pub const PONG_TIMEOUT: Duration = Duration::from_secs(20);
/// A socket write that makes no progress.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// The server's time is written to disk no more often: flash wears.
pub const SERVER_TIME_WRITE_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// For a last close frame: whoever it is for may not read any more.
pub const GOODBYE_PATIENCE: Duration = Duration::from_secs(1);
/// A session that was active this long resets the reconnect backoff.
pub const BACKOFF_RESET: Duration = Duration::from_secs(30);
/// Below this no reconnect delay falls, whatever the jitter.
pub const RECONNECT_FLOOR: Duration = Duration::from_millis(100);
/// When the network has returned, something must come over a connection within this, or it counts
/// as dead. Longer than the round trip of a satellite.
pub const NETWORK_PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// The dial after the network's return comes within this: all devices behind one switch come back
/// with it.
pub const NETWORK_RETURN_JITTER: Duration = Duration::from_millis(500);
/// Returns of the network that are acted on in a row; a further one each
/// [`NETWORK_RETURN_INTERVAL`]. A link that flaps must not become a storm of dials.
pub const NETWORK_RETURNS_IN_A_ROW: u32 = 6;
pub const NETWORK_RETURN_INTERVAL: Duration = Duration::from_secs(10);
/// What is read of a message about an interface or an address: all that counts is at its begin.
pub const NETWORK_MESSAGE_BYTES: usize = 512;
/// The longest wait between two attempts to register.
pub const REGISTRATION_RETRY_MAX: Duration = Duration::from_secs(300);
/// A `Retry-After` beyond this is cut: the device must not be sent away for days.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// Commands of tasks that are being recorded, all together; one that is larger goes alone. A task
/// beyond it is refused unrecorded, and polled for later.
pub const RECORDING_BYTES_MAX: usize = 2 * COMMAND_BYTES_MAX;

/// After a larger frame the next one is read only when it has been dealt with.
pub const LARGE_FRAME_BYTES: usize = 16 * KIB;

/// Attempts that wait for a free place to run. A further one is refused unrecorded.
pub const TASK_QUEUE_MAX: usize = 256;

// ---- network ----------------------------------------------------------------------------------

/// A frame and a message that the server sends.
pub const INBOUND_MESSAGE_BYTES_MAX: usize = MIB;
/// An HTTP response body.
pub const RESPONSE_BODY_BYTES_MAX: usize = 4 * MIB;
/// The head of an HTTP response.
pub const RESPONSE_HEAD_BYTES_MAX: usize = 16 * KIB;
/// Finals that were asked for again and wait until output before them is acknowledged.
pub const ANSWERS_WAITING_MAX: usize = 64;
/// Small frames waiting in the control lane of the write loop: a receipt for every task that may
/// be queued, and some more. A server that lets them pile up is disconnected.
pub const CONTROL_LANE_FRAMES: usize = TASK_QUEUE_MAX + 64;
/// Encoded frames waiting in the data lane of the write loop.
pub const DATA_LANE_FRAMES: usize = 4;
/// A frame's buffer that a rare large message has blown up beyond this is not used again.
pub const SPENT_FRAME_BYTES_MAX: usize = 6 * CHUNK_BYTES_MAX;
/// The write loop masks frames into one buffer of this size and writes it when it is full. Half a
/// stream's window returns at once: its chunks, with their heads and some escapes, go in one write.
pub const WRITE_BUFFER_BYTES: usize = 76 * KIB;
/// The largest frame that the agent can send is a final: two texts, each byte of which JSON may
/// write as six, and the envelope.
pub const WRITE_BUFFER_BYTES_MAX: usize =
    WRITE_BUFFER_BYTES + 2 * 6 * FINAL_OUTPUT_BYTES_MAX + 64 * KIB;
/// Name resolution, TCP connect, proxy and TLS handshake together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// One HTTP request from its first byte to the last byte of its answer.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// An HTTP connection that was not used for this long is closed.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(60);
/// Addresses of one name that are tried, and the head start of each before the next one is tried
/// beside it (RFC 8305 section 8).
pub const CONNECT_ADDRESSES_MAX: usize = 8;
pub const CONNECT_STAGGER: Duration = Duration::from_millis(250);
/// Data that the peer's kernel does not acknowledge, or does not make room for: longer than
/// [`WRITE_TIMEOUT`], whose error says more.
pub const TCP_USER_TIMEOUT: Duration = Duration::from_secs(60);
/// TCP keep-alive of a connection on which nothing is sent.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
pub const KEEPALIVE_PROBES: u32 = 3;
/// Header lines of an HTTP response.
pub const RESPONSE_HEADERS_MAX: usize = 100;
/// What is read from a WebSocket at once; messages larger than this are read in several steps.
pub const READ_BUFFER_BYTES: usize = 8 * KIB;
/// What is read from a WebSocket in one turn of the event loop, so that a server that sends
/// without pause does not keep all else waiting: that many bytes are at most 16,384 frames …
pub const READ_TURN_BYTES: usize = 32 * KIB;
/// … and the messages of one turn, for the same reason.
pub const READ_TURN_MESSAGES: u32 = 64;
/// A file of the agent's identity, and the size at which a damaged one is not even read.
pub const STATE_FILE_BYTES_MAX: usize = 64 * KIB;

// ---- outbox -----------------------------------------------------------------------------------

/// A log segment; smaller where the cap asks for it. Four full batches of chunks with their heads:
/// a segment of 256 KiB would hold one and waste the rest.
pub const SEGMENT_BYTES: usize = 520 * KIB;
/// The last commits stay in memory, where live output is read: while one is read, the next is made.
pub const UNITS_IN_MEMORY: usize = 2;
/// A store has no more segments than this: beyond it they become longer, since memory holds a
/// summary of each.
pub const SEGMENTS_MAX: u64 = 4096;
/// The cap is never divided into fewer segments than this.
pub const SEGMENTS_MIN: u64 = 8;
/// A commit begins on this border, so that a torn sector never holds bytes confirmed earlier.
pub const SECTOR_BYTES: usize = 512;
pub const SPOOL_CAP_BYTES_DEFAULT: u64 = 64 * MIB as u64;
pub const SPOOL_CAP_BYTES_MIN: u64 = MIB as u64;
pub const SPOOL_CAP_BYTES_MAX: u64 = 64 * 1024 * MIB as u64;
pub const TERMINAL_RESERVE_BYTES_DEFAULT: u64 = MIB as u64;
pub const TERMINAL_RESERVE_BYTES_MIN: u64 = 256 * KIB as u64;
/// The in-memory store: used where the disk cannot be.
pub const MEMORY_STORE_BYTES: usize = MIB;
/// Attempts that are not finished and acknowledged; their ids stay in memory.
pub const OPEN_ATTEMPTS_MAX: usize = 1024;
/// Finished and acknowledged attempts that are remembered (PROTOCOL.md 4.6).
pub const FINISHED_ATTEMPTS_MAX: usize = 4096;
/// Commands that wait for the storage thread; a further sender waits.
pub const STORAGE_QUEUE: usize = 64;
/// The index may take this long, and this much memory, to open after an unclean stop.
pub const INDEX_CHECK_TIMEOUT: Duration = Duration::from_secs(10);
pub const INDEX_CHECK_MEMORY_BYTES: u64 = 64 * MIB as u64;
/// An index that is read from a copy, since its disk cannot be written, is no larger than this; it
/// has less than 2 MiB. The copy may be in memory.
pub const INDEX_COPY_BYTES_MAX: u64 = 4 * MIB as u64;
/// A file system that stays full for this long is not waited for any more: the oldest output is
/// dropped, as it is when the cap is reached.
pub const DISK_FULL_PATIENCE: Duration = Duration::from_secs(10);
/// A lock that is held is tried again for this long, this often.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(1);
pub const LOCK_RETRY_DELAY: Duration = Duration::from_millis(20);
/// Between attempts to leave the in-memory store for the disk again.
pub const STORE_REOPEN_INTERVAL: Duration = Duration::from_secs(30);

// ---- reference gateway ------------------------------------------------------------------------

/// A frame and a message that an agent sends: a final with two full texts, escaped, fits.
pub const GATEWAY_MESSAGE_BYTES_MAX: usize = 16 * MIB;
/// Body of a report or a submission; both may carry escaped text.
pub const GATEWAY_BODY_BYTES_MAX: usize = 16 * MIB;
/// Bodies that are read at once; a further one waits for its turn.
pub const GATEWAY_BODIES_AT_ONCE: usize = 16;
/// Head of a request.
pub const GATEWAY_HEAD_BYTES_MAX: usize = 16 * KIB;
/// A request from its first byte to the end of its body.
pub const GATEWAY_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections of agents and operators together. A further one is closed.
pub const GATEWAY_CONNECTIONS_MAX: usize = 1024;
pub const GATEWAY_AGENTS_MAX: usize = 16 * KIB;
/// Tasks of one agent that have not ended. A further submission is refused.
pub const GATEWAY_OPEN_TASKS_MAX: usize = 1024;
/// Commands of all tasks that have not ended; they stay in memory.
pub const GATEWAY_OPEN_COMMAND_BYTES_MAX: usize = 64 * MIB;
/// Attempts that have ended and stay in memory, because their agents may still repeat messages.
pub const GATEWAY_ENDED_ATTEMPTS_MAX: usize = 64;
/// Journals that the storage thread keeps open.
pub const GATEWAY_OPEN_JOURNALS_MAX: usize = 128;
/// Records of one session that wait for their commit; beyond it the socket is not read.
pub const GATEWAY_BATCH_BYTES: usize = MIB;
/// The same, in messages.
pub const GATEWAY_BATCH_MESSAGES: usize = 256;
/// Commands that wait for the storage thread, and that one commit takes together.
pub const GATEWAY_STORAGE_QUEUE: usize = 64;
/// Chunks of a stream whose checksum is remembered to tell a changed repeat. Two windows.
pub const GATEWAY_RECENT_CHUNKS: usize = 2 * WINDOW_MESSAGES;
/// Deliveries that wait for their `task.received`; the next ones follow the answers.
pub const GATEWAY_DELIVERIES_WAITING: usize = 32;
/// Tasks, and bytes of their commands, in one answer to a poll or heartbeat. Escaped they still
/// fit what an agent reads.
pub const GATEWAY_POLL_TASKS: usize = 64;
pub const GATEWAY_POLL_BYTES: usize = MIB / 2;
/// Nonces of one agent that are remembered; further requests wait for the first to expire.
pub const GATEWAY_NONCES_MAX: usize = 4096;
/// Distance of a request's timestamp from the gateway's clock (PROTOCOL.md 1).
pub const GATEWAY_CLOCK_WINDOW: Duration = Duration::from_secs(300);
/// The gateway pings this often …
pub const GATEWAY_PING_INTERVAL: Duration = Duration::from_secs(30);
/// … and ends a session from which nothing came for this long.
pub const GATEWAY_IDLE_TIMEOUT: Duration = Duration::from_secs(95);
/// Bytes of a journal that an operator stream reads at once.
pub const GATEWAY_STREAM_READ_BYTES: usize = 64 * KIB;
/// A line is sent this often on a quiet operator stream, so that both ends notice a dead one.
pub const GATEWAY_STREAM_KEEPALIVE: Duration = Duration::from_secs(15);
/// A line of an operator stream: a final with its two texts, escaped.
pub const GATEWAY_STREAM_LINE_BYTES_MAX: usize = 16 * MIB;
/// Sessions get this long to be closed when the gateway stops.
pub const GATEWAY_STOP_WAIT: Duration = Duration::from_secs(3);

// ---- the sum ----------------------------------------------------------------------------------
//
// Worst case of what the agent itself holds, in bytes, with the default settings:
//
//   executor   CONCURRENCY_MAX × 2 streams × CHUNK_BUFFERS_MAX × CHUNK_BYTES_MAX          2,176 KiB
//              CONCURRENCY_MAX × 2 tails × FINAL_OUTPUT_BYTES_DEFAULT                       512 KiB
//              one look at PROCESSES_SEEN_MAX processes, while something is ended            640 KiB
//   outbox     one commit: all streams' waiting chunks                                    1,024 KiB
//              ids and stream marks of OPEN_ATTEMPTS_MAX attempts, ~600 bytes each          600 KiB
//              the UNITS_IN_MEMORY before it, from which live output is read              2,048 KiB
//              one segment read for replay                                                  520 KiB
//   session    in flight: names only; batches of BATCH_BUFFER_BYTES: BATCHES_IN_WRITER, one
//              in hand, one that is being read                                              544 KiB
//   net        data lane, (DATA_LANE_FRAMES + 2) × 16 KiB, six times that if JSON must
//              escape                                                                       576 KiB
//              ANSWERS_IN_WRITER finals with two texts, six times that if JSON must escape  512 KiB
//              one inbound message, raw and decoded                                       2,048 KiB
//              write buffer and read buffers                                                108 KiB
//
// One CPU-bound device runs one task (the default concurrency) and needs a quarter of the first
// three lines.

const _: () = {
    assert!(WINDOW_STREAM_BYTES >= CHUNK_BYTES_MAX);
    assert!(WINDOW_STREAM_MESSAGES >= CHUNKS_WAITING_MAX);
    assert!(WRITE_BUFFER_BYTES > WINDOW_STREAM_BYTES / 2);
    assert!(CHUNKS_WAITING_MAX * CHUNK_BYTES_MAX <= SEGMENT_BYTES);
    assert!(SEGMENT_BYTES as u64 * SEGMENTS_MIN <= SPOOL_CAP_BYTES_DEFAULT);
    assert!(SEGMENT_BYTES.is_multiple_of(SECTOR_BYTES));
    assert!(2 * FINAL_OUTPUT_BYTES_DEFAULT as u64 <= TERMINAL_RESERVE_BYTES_MIN);
    assert!(TERMINAL_RESERVE_BYTES_MIN <= SPOOL_CAP_BYTES_MIN / 2);
    assert!(COMMAND_BYTES_MAX <= INBOUND_MESSAGE_BYTES_MAX);
    assert!(INBOUND_MESSAGE_BYTES_MAX <= RESPONSE_BODY_BYTES_MAX);
    assert!(HELLO_BYTES_MAX < WRITE_BUFFER_BYTES_MAX);
    assert!(ID_BYTES_MAX <= u8::MAX as usize);
    assert!(WRITE_BUFFER_BYTES_MAX <= GATEWAY_MESSAGE_BYTES_MAX);
    assert!(GATEWAY_RECENT_CHUNKS >= WINDOW_MESSAGES);
    assert!(6 * GATEWAY_POLL_BYTES <= RESPONSE_BODY_BYTES_MAX);
};
