//! One connection from its dial to its end: handshake, pings, deadlines, redial.

use std::time::Duration;

use log::{info, warn};

use super::{EXTENSIONS, Effect, Granted, Lease, Now, Session, Settings, hello};
use crate::ids::{AttemptKey, Ids, Stream};
use crate::limits::{
    BACKOFF_RESET, CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, NETWORK_PROBE_TIMEOUT,
    NETWORK_RETURN_JITTER, OPEN_ATTEMPTS_MAX, PONG_TIMEOUT, RECONNECT_FLOOR,
};
use crate::wire::message_id::Piece;
use crate::wire::{Hello, HelloAck, MessageId};

/// The network layer has limits of its own for the connect and for the upgrade after it.
const DIAL_TIMEOUT: Duration = CONNECT_TIMEOUT.saturating_mul(2);

#[derive(Debug)]
pub(super) enum Link {
    /// The WebSocket is disabled.
    Off,
    Down {
        dial_at: Now,
        /// The server has named the time (`Retry-After`): nothing brings it forward.
        is_told: bool,
    },
    Dialing {
        deadline: Now,
    },
    /// Connected; the hello is being prepared or its acknowledgement awaited.
    Handshake {
        deadline: Now,
        hello: Option<SentHello>,
    },
    Active {
        since: Now,
        heard_at: Now,
        pinged_at: Now,
        /// The network has come back, and nothing has been heard since.
        probed_at: Option<Now>,
        proven: bool,
    },
}

/// What has to be known of the hello to understand its acknowledgement.
#[derive(Debug)]
pub(super) struct SentHello {
    message_id: String,
    /// First sequence held of each stream that waits.
    first_held: Vec<(AttemptKey, Stream, u64)>,
    /// The running task that it names.
    running: Option<AttemptKey>,
}

/// The state of the WebSocket session as an operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    Off,
    Down,
    Connecting,
    Handshake,
    Active,
}

impl Link {
    pub fn is_active(&self) -> bool {
        matches!(self, Link::Active { .. })
    }

    pub fn state(&self) -> LinkState {
        match self {
            Link::Off => LinkState::Off,
            Link::Down { .. } => LinkState::Down,
            Link::Dialing { .. } => LinkState::Connecting,
            Link::Handshake { .. } => LinkState::Handshake,
            Link::Active { .. } => LinkState::Active,
        }
    }

    pub fn since(&self) -> Option<Now> {
        match self {
            Link::Active { since, .. } => Some(*since),
            _ => None,
        }
    }

    pub fn next_deadline(&self, settings: &Settings) -> Option<Now> {
        match *self {
            Link::Off => None,
            Link::Down { dial_at, .. } => Some(dial_at),
            Link::Dialing { deadline } | Link::Handshake { deadline, .. } => Some(deadline),
            Link::Active {
                since,
                heard_at,
                pinged_at,
                probed_at,
                proven,
            } => {
                let probe = probed_at.map(|at| at + NETWORK_PROBE_TIMEOUT);
                let reset = (!proven).then_some(since + BACKOFF_RESET);
                let ping_or_pong = pinged_at
                    + if pinged_at > heard_at {
                        PONG_TIMEOUT
                    } else {
                        settings.ping_interval
                    };
                reset.into_iter().chain(probe).chain([ping_or_pong]).min()
            }
        }
    }
}

impl<C: Copy + Ord + Default> Session<C> {
    /// The upgrade has succeeded.
    pub fn connected(&mut self, now: Now) {
        if !matches!(self.link, Link::Dialing { .. }) {
            // It has been given up in the same turn; its end is on the way.
            return;
        }
        self.link = Link::Handshake {
            deadline: now + HANDSHAKE_TIMEOUT,
            hello: None,
        };
        self.effects.push_back(Effect::PrepareHello);
    }

    /// The dial has failed, or the server refused the upgrade.
    pub fn dial_failed(&mut self, why: &str, retry_after: Option<Duration>, now: Now) {
        self.go_down(&format!("cannot connect: {why}"), retry_after, now);
    }

    /// The connection has ended.
    pub fn disconnected(&mut self, why: &str, now: Now) {
        self.go_down(why, None, now);
    }

    /// Ends the connection from this side.
    pub(super) fn close(&mut self, why: &str, retry_after: Option<Duration>, now: Now) {
        if matches!(self.link, Link::Off | Link::Down { .. }) {
            return;
        }
        self.effects.push_back(Effect::Close);
        self.go_down(why, retry_after, now);
    }

    fn go_down(&mut self, why: &str, retry_after: Option<Duration>, now: Now) {
        let was_active = self.link.is_active();
        if matches!(self.link, Link::Off | Link::Down { .. }) {
            return;
        }
        let delay = self.backoff.fail(retry_after, &mut self.random);
        let seconds = delay.as_secs_f32();
        if was_active {
            warn!("disconnected: {why}; next try in {seconds:.1} s");
            self.down_since = now;
        } else {
            warn!("{why}; next try in {seconds:.1} s");
        }
        self.last_error = Some(why.to_owned());
        self.link = Link::Down {
            dial_at: now + delay,
            is_told: retry_after.is_some(),
        };
        self.lease = None;
        self.granted = Granted::default();
        self.cancel_granted = false;
        self.delivery.end();
        self.answers.clear();
        self.gate.session_down(now);
        self.reports.set_in_hello(Vec::new());
        self.reports.look_again();
    }

    /// The snapshot for the hello is ready.
    pub fn hello_ready(&mut self, mut hello: Hello, first_held: Vec<(AttemptKey, Stream, u64)>) {
        let message_id = self.make_message_id("hello");
        let running = hello
            .running_task
            .as_ref()
            .map(|task| AttemptKey::of(&task.task_id, &task.execution_attempt_id));
        let Link::Handshake {
            hello: sent @ None, ..
        } = &mut self.link
        else {
            return;
        };
        *sent = Some(SentHello {
            message_id: message_id.clone(),
            first_held,
            running,
        });
        // A final that is being reported must not go over the WebSocket meanwhile.
        if let Some(busy) = self.reports.busy() {
            hello.unacked_finals.retain(|entry| {
                AttemptKey::of(&entry.task_id, &entry.execution_attempt_id) != busy
            });
        }
        hello.capabilities.results_enabled = self.settings.results;
        hello.capabilities.delivery_enabled = self.settings.delivery;
        hello.capabilities.extensions = EXTENSIONS.map(str::to_owned).to_vec();
        if !self.settings.results {
            // They go by report alone.
            hello.unacked_finals.clear();
        }
        hello::bound(&mut hello);
        let finals = hello.unacked_finals.iter();
        self.reports.set_in_hello(
            finals
                .map(|entry| AttemptKey::of(&entry.task_id, &entry.execution_attempt_id))
                .collect(),
        );
        self.effects.push_back(Effect::SendHello {
            hello: Box::new(hello),
            message_id,
        });
    }

    /// Anything has arrived, pongs included.
    pub fn heard(&mut self, now: Now) {
        if let Link::Active {
            heard_at,
            probed_at,
            ..
        } = &mut self.link
        {
            *heard_at = now;
            *probed_at = None;
        }
    }

    /// A network interface or an address is there that was not. What waits for a network tries
    /// soon. `was_gone`: one has gone before, so that a connection may be dead without a sign of
    /// it: TCP may wait longer until it repeats than the network was away.
    pub fn network_returned(&mut self, was_gone: bool, now: Now) {
        match &mut self.link {
            Link::Off => {}
            Link::Down { .. } => self.dial_soon(now),
            // What was sent into nothing is repeated after a second, two, four and so on.
            Link::Dialing { deadline } => {
                if was_gone && now + DIAL_TIMEOUT >= *deadline + NETWORK_PROBE_TIMEOUT {
                    self.close("cannot connect: the network was gone", None, now);
                    self.dial_soon(now);
                }
            }
            Link::Handshake { deadline, .. } => {
                if was_gone && now + HANDSHAKE_TIMEOUT >= *deadline + NETWORK_PROBE_TIMEOUT {
                    self.close("the network was gone during the handshake", None, now);
                    self.dial_soon(now);
                }
            }
            Link::Active { probed_at, .. } => {
                if was_gone && probed_at.is_none() {
                    *probed_at = Some(now);
                    self.effects.push_back(Effect::Ping);
                }
            }
        }
    }

    /// Brings the next dial forward, unless the server has named its time.
    fn dial_soon(&mut self, now: Now) {
        if let Link::Down {
            dial_at,
            is_told: false,
        } = &mut self.link
        {
            self.backoff.reset();
            let jitter = self.random.up_to(NETWORK_RETURN_JITTER);
            *dial_at = (*dial_at).min(now + jitter.max(RECONNECT_FLOOR));
            info!("the network has returned: connecting soon");
        }
    }

    /// The server has acknowledged something: it works.
    pub(super) fn prove_link(&mut self) {
        if let Link::Active { proven, .. } = &mut self.link
            && !*proven
        {
            *proven = true;
            self.backoff.reset();
        }
    }

    pub(super) fn hello_acknowledged(&mut self, ack: HelloAck, now: Now) {
        let Link::Handshake {
            hello: Some(sent), ..
        } = &mut self.link
        else {
            self.close("hello_ack out of turn", None, now);
            return;
        };
        if ack.acked_type != "agent.hello" || ack.acked_message_id != sent.message_id {
            self.close("hello_ack for another hello", None, now);
            return;
        }
        let first_held = std::mem::take(&mut sent.first_held);
        let named_in_hello = sent.running;
        let delivery_enabled = self.settings.delivery && ack.delivery_enabled;
        self.link = Link::Active {
            since: now,
            heard_at: now,
            pinged_at: now,
            probed_at: None,
            proven: false,
        };
        self.granted = Granted {
            binary_output: ack.grants("binary_output"),
            usage: ack.grants("usage"),
        };
        self.cancel_granted = ack.grants("cancel");
        self.lease = ack
            .lease_interval_seconds
            .filter(|&seconds| seconds > 0 && ack.grants("lease"))
            .map(|seconds| {
                let interval = Duration::from_secs(seconds.min(86_400));
                Lease {
                    interval,
                    next_at: now + interval,
                }
            });
        info!(
            "connected; delivery over the WebSocket is {}",
            if delivery_enabled { "on" } else { "off" }
        );
        self.delivery.begin();
        self.reports.set_in_hello(Vec::new());
        self.delivery.withhold(self.reports.busy());
        self.gate.session_active(delivery_enabled, now);
        if ack.has_directives() {
            self.follow_directives(ack, &first_held);
        }
        // Also one that has started since the hello, which then names none.
        let running = self.tasks.running();
        let others: Vec<_> = running
            .iter()
            .filter(|task| task.started_at.is_some() && task.ids.has_result_channel())
            .filter(|task| Some(task.key) != named_in_hello)
            .map(|task| task.ids.clone())
            .collect();
        for ids in others {
            self.effects.push_back(Effect::SendStarted(ids));
        }
    }

    /// PROTOCOL.md 4.5. What is not listed is sent as without directives.
    fn follow_directives(&mut self, ack: HelloAck, first_held: &[(AttemptKey, Stream, u64)]) {
        for id in ack.acknowledged_final_message_ids.unwrap_or_default() {
            match self.own_message(&id) {
                Some((key, Piece::Final)) => self.push_ack(super::Ack::Final { key }),
                _ => info!("hello_ack acknowledges {id:.80}, which is no final of this store"),
            }
        }
        // More than this device can hold are none of its attempts.
        let discarded = ack.discarded_attempts.unwrap_or_default();
        for discarded in discarded.into_iter().take(OPEN_ATTEMPTS_MAX) {
            let Some(ids) = Ids::new(&discarded.task_id, &discarded.execution_attempt_id) else {
                continue;
            };
            let key = ids.key();
            let reason = discarded.reason.unwrap_or_default();
            warn!("task {ids}: the server discards it: {reason:.200}");
            self.tasks.remove(key);
            self.delivery.hold();
            self.effects.push_back(Effect::Discard(key));
        }
        for replay in ack.output_replay.unwrap_or_default() {
            let key = AttemptKey::of(&replay.task_id, &replay.execution_attempt_id);
            let (stream, next) = (replay.stream, replay.next_sequence.max(1));
            if next > 1 {
                self.push_ack(super::Ack::Output {
                    key,
                    stream,
                    sequence: next - 1,
                    cumulative: true,
                });
            }
            let hole = first_held
                .iter()
                .any(|&(of, on, first)| (of, on) == (key, stream) && first > next);
            if hole {
                self.delivery.expect(key, stream, next);
            }
        }
    }

    /// The attempt and piece that a message id names, if this store made it or holds it.
    pub(super) fn own_message(&self, id: &str) -> Option<(AttemptKey, Piece)> {
        MessageId::parse(id)
            .filter(|id| id.incarnation == self.incarnation || self.inherits_from(id.incarnation))
            .map(|id| (id.key, id.piece))
    }

    fn inherits_from(&self, store: &str) -> bool {
        self.inherited.iter().any(|other| other.as_str() == store)
    }

    pub(super) fn push_ack(&mut self, ack: super::Ack) {
        if let super::Ack::Output { key, .. } = ack {
            self.answers.acknowledged(key);
        }
        let full = match self.acks.push(ack) {
            Ok(()) => return,
            Err(ack) => ack,
        };
        let acks = std::mem::take(&mut self.acks);
        self.effects.push_back(Effect::Acknowledge(Box::new(acks)));
        let pushed = self.acks.push(full);
        debug_assert!(pushed.is_ok(), "the list was just emptied");
    }

    pub(super) fn is_hello(&self, id: &str) -> bool {
        match &self.link {
            Link::Handshake {
                hello: Some(sent), ..
            } => sent.message_id == id,
            _ => id
                .strip_prefix(self.incarnation.as_str())
                .is_some_and(|rest| rest.starts_with("-hello-")),
        }
    }

    pub(super) fn in_handshake(&self) -> bool {
        matches!(self.link, Link::Handshake { .. })
    }

    pub(super) fn advance_link(&mut self, now: Now) {
        match self.link {
            Link::Off => {}
            Link::Down { dial_at, .. } => {
                if now >= dial_at {
                    self.link = Link::Dialing {
                        deadline: now + DIAL_TIMEOUT,
                    };
                    self.effects.push_back(Effect::Dial);
                }
            }
            Link::Dialing { deadline } => {
                if now >= deadline {
                    self.close("cannot connect: no answer in time", None, now);
                }
            }
            Link::Handshake { deadline, .. } => {
                if now >= deadline {
                    self.close("the server did not answer the hello in time", None, now);
                }
            }
            Link::Active {
                since,
                heard_at,
                pinged_at,
                probed_at,
                proven,
            } => {
                if probed_at.is_some_and(|at| now >= at + NETWORK_PROBE_TIMEOUT) {
                    self.close("nothing came after the network's return", None, now);
                    self.dial_soon(now);
                    return;
                }
                let awaits_pong = pinged_at > heard_at;
                if awaits_pong && now >= pinged_at + PONG_TIMEOUT {
                    self.close("the server does not answer pings", None, now);
                    return;
                }
                if !proven && now >= since + BACKOFF_RESET {
                    self.prove_link();
                }
                // A further ping before the answer would put the deadline of the first one off.
                if !awaits_pong
                    && now >= pinged_at + self.settings.ping_interval
                    && let Link::Active { pinged_at, .. } = &mut self.link
                {
                    *pinged_at = now;
                    self.effects.push_back(Effect::Ping);
                }
            }
        }
    }
}
