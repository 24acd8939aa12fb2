//! Entry point of the fuzz target `session` in `fuzz/`: any bytes as what happens to a session.
//!
//! Each byte chooses an event, those behind it its details ([`choices`]). What the server says is
//! arbitrary; what the agent itself tells the session keeps the order that the driver keeps, since
//! only that can happen: an answer follows its effect, and what belongs to a connection ends with
//! it ([`world`]). After every turn the invariants are checked ([`effects`]); in the end a good
//! server must get everything.

mod choices;
mod effects;
mod world;

use std::sync::Arc;
use std::time::Duration;

use self::choices::Choices;
use self::world::World;
use super::reports::ReportResult;
use super::tasks::QueuedTask;
use super::{LinkState, Recorded};
use crate::limits::{RETRY_AFTER_MAX, WINDOW_BYTES};
use crate::wire::server_message::Ack;
use crate::wire::{HelloAck, MessageId, Piece, ServerMessage};

const INCARNATION: &str = "0123456789abcdef";
/// The driver takes so many inputs before it carries out effects.
const INPUTS_PER_TURN: usize = 33;
/// A good server has everything within this virtual time, once all `Retry-After` are over.
const HEALING_TIME: Duration = Duration::from_secs(900);
const HEALING_TURNS_MAX: usize = 20_000;
/// Longer histories find no more, and take long.
const EVENTS_MAX: usize = 2_000;

/// A history of a session.
pub fn session(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let mut world = World::new(&mut choices);
    world.drain();
    let mut inputs = 0;
    for _ in 0..EVENTS_MAX {
        if choices.is_empty() {
            break;
        }
        let turn_ends = event(&mut world, &mut choices);
        inputs += 1;
        if turn_ends || inputs >= INPUTS_PER_TURN {
            world.drain();
            inputs = 0;
        }
    }
    world.drain();
    heal(&mut world);
}

/// True if the driver has a turn after it.
fn event(world: &mut World, choices: &mut Choices) -> bool {
    let choice = choices.byte();
    let now = world.now;
    match choice % 32 {
        0..=6 if world.is_open => {
            let message = choices.server_message(world);
            world.session.received(message, now);
        }
        7 => {
            let millis = [
                1, 10, 100, 500, 999, 1000, 5000, 10_000, 29_999, 30_000, 31_000, 61_000,
            ];
            world.now += Duration::from_millis(millis[choices.below(millis.len())]);
            return true;
        }
        8 | 9 => {
            if let Some(deadline) = world.session.next_deadline(now) {
                world.now = deadline;
                return true;
            }
        }
        10 if world.connection.is_some() => {
            world.connection_is_gone();
            world.session.disconnected("cut", now);
        }
        11 if world.connection.is_some() && !world.is_open => {
            world.connection_is_gone();
            let after = choices.retry_after();
            world.session.dial_failed("refused", after, now);
        }
        0..=6 | 10..=14 => connection_goes_on(world),
        15 if world.is_open && choices.toss() => world.session.heard(now),
        15 => world.session.network_returned(choices.toss(), now),
        16..=18 => {
            let (ids, stream) = (world::ids(choices.task()), choices.stream());
            let bytes = [0, 1, 5461, 16 << 10][choices.below(4)];
            for _ in 0..=choices.below(40) {
                world.store(&ids, |sequence| Piece::Output(stream, sequence), bytes);
            }
            world.session.appended();
        }
        19 => {
            let ids = world::ids(choices.task());
            let bytes = [10, WINDOW_BYTES + 1][choices.below(2)];
            world.store(&ids, |_| Piece::Final, bytes);
            world.session.final_stored();
        }
        20 | 21 => world.batch_arrives(),
        22 => written(world),
        23 => located(world),
        24 => dropped(world),
        25 => recorded(world, choices),
        26 => finals_listed(world),
        27 => reported(world, choices),
        28 => polled(world, choices),
        29 => task_goes_on(world, choices.byte()),
        30 => interrupted(world),
        31 => world.lane_is_full = choices.toss(),
        _ => {}
    }
    choice & 0x80 == 0
}

// ---- what is owed to the session --------------------------------------------------------------

/// The upgrade, or the snapshot for the hello.
fn connection_goes_on(world: &mut World) {
    if world.connection.is_some() && !world.is_open {
        world.is_open = true;
        world.session.connected(world.now);
    } else if let Some((number, hello, first_held)) = world.hellos.pop_front()
        && world.connection == Some(number)
    {
        world.session.hello_ready(hello, first_held);
    }
}

fn written(world: &mut World) {
    if let Some(number) = world.in_writer.pop_front()
        && world.connection == Some(number)
    {
        world.session.transmitted();
    }
}

fn located(world: &mut World) {
    if let Some((key, stream, from, at)) = world.located.pop_front() {
        world.session.located(key, stream, from, at, world.now);
    }
}

fn dropped(world: &mut World) {
    if let Some(what) = world.drops.pop_front() {
        world.drop_from_store(&what);
        world.session.settled(true);
    }
}

fn recorded(world: &mut World, choices: &mut Choices) {
    if world.records.is_empty() {
        return;
    }
    let index = choices.below(world.records.len());
    let Some((offer, origin)) = world.records.remove(index) else {
        return;
    };
    let outcome = match choices.byte() {
        0..=9 => Recorded::NoRoom,
        _ if world.known.insert(offer.ids.key()) => Recorded::New,
        choice => [
            Recorded::Received,
            Recorded::Started,
            Recorded::Finished { held: true },
            Recorded::Finished { held: false },
            Recorded::Discarded,
        ][usize::from(choice) % 5],
    };
    let task = QueuedTask {
        ids: Arc::new(offer.ids),
        priority: offer.priority,
        timeout_seconds: offer.timeout_seconds,
    };
    world.session.recorded(task, outcome, origin, world.now);
}

fn finals_listed(world: &mut World) {
    if let Some(waiting) = world.finals.take() {
        world.session.finals_listed(&waiting);
    }
}

fn reported(world: &mut World, choices: &mut Choices) {
    let Some(ids) = world.report.take() else {
        return;
    };
    let waits = world
        .held()
        .any(|held| held.ids == *ids && held.piece == Piece::Final);
    let why = String::new();
    let result = match choices.byte() {
        _ if !waits => ReportResult::Gone,
        // Without the WebSocket a refused final has no way left.
        0..=20 if world.settings.websocket && world.settings.results => {
            ReportResult::Refused { why }
        }
        21..=80 => ReportResult::Retry {
            after: choices.retry_after(),
            why,
        },
        _ => ReportResult::Done,
    };
    if result == ReportResult::Done {
        world.forget_final(ids.key());
    }
    world.session.reported(&ids, &result, world.now);
}

/// A task of a poll or heartbeat, or its end.
fn polled(world: &mut World, choices: &mut Choices) {
    let now = world.now;
    let choice = choices.byte();
    if choice < 100 && (world.polling || world.heartbeat) {
        let offer = choices.offer();
        return world.session.offered(offer, false, now);
    }
    let failed = (choice >= 200).then(|| choices.retry_after());
    if std::mem::take(&mut world.polling) {
        world.session.polled(failed, now);
    } else if std::mem::take(&mut world.heartbeat) {
        world.session.heartbeat_done(failed, now);
    }
}

fn task_goes_on(world: &mut World, which: u8) {
    if world.running.is_empty() {
        return;
    }
    let index = usize::from(which) % world.running.len();
    let ids = Arc::clone(&world.running[index].ids);
    if !std::mem::replace(&mut world.running[index].started, true) {
        return world.session.task_started(ids.key(), world.now);
    }
    world.running.remove(index);
    world.store(&ids, |_| Piece::Final, 10);
    world.session.task_ended(ids.key());
}

fn interrupted(world: &mut World) {
    if let Some(ids) = world.to_interrupt.pop() {
        world.store(&ids, |_| Piece::Final, 10);
        world.session.final_stored();
    }
}

// ---- the end ----------------------------------------------------------------------------------

/// From now on server, disk and network are good: everything arrives.
fn heal(world: &mut World) {
    let until = world.now + RETRY_AFTER_MAX + HEALING_TIME;
    world.lane_is_full = false;
    for _ in 0..HEALING_TURNS_MAX {
        let mut rounds = 0;
        while is_owed(world) {
            answer_everything(world);
            world.drain();
            rounds += 1;
            assert!(rounds < HEALING_TURNS_MAX, "answers without end");
        }
        if is_healed(world) {
            return;
        }
        let deadline = world.session.next_deadline(world.now);
        world.now = deadline.expect("something waits, and nothing will be done");
        assert!(world.now < until, "not everything arrived");
        world.drain();
    }
    panic!("too many turns");
}

fn is_healed(world: &World) -> bool {
    let channel = world.settings.websocket && world.settings.results;
    let waits = |held: &world::Held| held.piece == Piece::Final || channel;
    let connected = world.session.link_state() == LinkState::Active || !world.settings.websocket;
    let at_rest = world.running.is_empty() && world.session.tasks().waiting() == 0;
    connected && at_rest && !world.held().any(waits)
}

fn is_owed(world: &World) -> bool {
    world.batch.is_some()
        || world.finals.is_some()
        || world.report.is_some()
        || world.polling
        || world.heartbeat
        || world.pings > 0
        || !world.in_writer.is_empty()
        || !world.located.is_empty()
        || !world.drops.is_empty()
        || !world.records.is_empty()
        || !world.running.is_empty()
        || !world.to_interrupt.is_empty()
        || !world.hellos.is_empty()
        || (world.connection.is_some() && !world.is_open)
        || (world.session.link_state() == LinkState::Handshake)
        || world.answered < world.sent.len()
}

fn answer_everything(world: &mut World) {
    let now = world.now;
    let good = &mut Choices(&[0xc0; 64]);
    connection_goes_on(world);
    if world.pings > 0 {
        world.pings = 0;
        world.session.heard(now);
    }
    if world.session.link_state() == LinkState::Handshake && world.hello_sent {
        let ack = HelloAck {
            acked_message_id: world.hello_id.clone(),
            acked_type: "agent.hello".into(),
            ..HelloAck::default()
        };
        let message = ServerMessage::HelloAck(Box::new(ack));
        world.session.received(Ok(message), now);
    }
    for index in world.answered..world.sent.len() {
        let (key, piece) = world.sent[index];
        let incarnation = INCARNATION;
        let id = MessageId {
            incarnation,
            key,
            piece,
        };
        let ack = ServerMessage::Ack(Ack {
            acked_message_id: id.to_string(),
            acked_type: String::new(),
            task_id: None,
            execution_attempt_id: None,
            highest_output_sequence: None,
        });
        world.session.received(Ok(ack), now);
    }
    world.answered = world.sent.len();
    world.batch_arrives();
    written(world);
    located(world);
    dropped(world);
    recorded(world, good);
    finals_listed(world);
    reported(world, good);
    polled(world, &mut Choices(&[150]));
    task_goes_on(world, 0);
    interrupted(world);
}

#[cfg(test)]
mod tests {
    use super::super::backoff::Random;

    #[test]
    fn whatever_happens_the_session_keeps_its_bounds_and_recovers() {
        for seed in 0..2_000 {
            let mut random = Random::new(seed);
            let length = random.next_u64() as usize % 200;
            let bytes: Vec<u8> = (0..length).map(|_| random.next_u64() as u8).collect();
            let outcome = std::panic::catch_unwind(|| super::session(&bytes));
            assert!(outcome.is_ok(), "seed {seed}");
        }
    }
}
