//! One history: the device, the network and the server under one virtual clock and one seed.
//!
//! What happens later is an event with its time. Between two events the agent's tasks run until
//! none of them can go on, as on the real executor.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use async_channel::{Receiver, Sender};

use super::device::Device;
use super::ledger::{self, Ledger, Script};
use super::outside::{Arrival, Call, Line, Sent};
use super::server::{Say, Says, Server, Talk};
use super::tell;
use super::time::VirtualTime;
use super::toggles::{Dice, LateToggles, Toggles};
use crate::limits::REQUEST_TIMEOUT;
use crate::net::{NetError, ReportOutcome};
use crate::wire::http::PolledTasks;

/// With a good server and a good network everything is acknowledged within this time.
const HEALING_TIME: Duration = Duration::from_secs(900);
/// And the session is active within this one: a connection that is dead without a word is noticed
/// by the missing pong, one that hangs by its deadline, and then the longest backoff is waited for.
const RETURN_TIME: Duration = Duration::from_secs(240);
/// More events than this in one history are a loop.
const EVENTS_MAX: u64 = 200_000;

pub enum Event {
    /// The storage thread looks at its queue.
    Store,
    DialEnds(Sender<Result<Line, NetError>>, bool),
    /// The server takes what the agent has sent.
    Up(u64),
    /// The server says something.
    Say(u64, Say),
    /// Something of the server arrives.
    Down(u64),
    HttpArrives(Call),
    TasksAnswer(Sender<Result<PolledTasks, NetError>>, Option<PolledTasks>),
    ReportAnswer(Sender<ReportOutcome>, ReportOutcome),
    Task,
    ServerSpeaks,
    Trouble,
    Start,
    Heal,
}

struct Queued {
    at: Duration,
    number: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Queued) -> bool {
        self.number == other.number
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    fn cmp(&self, other: &Queued) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

pub(super) struct Connection {
    pub number: u64,
    pub arrivals: Option<Sender<Arrival>>,
    pub socket: Receiver<Sent>,
    pub talk: Talk,
    pub up_is_due: bool,
    pub down: VecDeque<Arrival>,
    pub stalled_up: bool,
    pub stalled_down: bool,
    /// Until the network is good again.
    pub dead: bool,
}

pub struct World {
    pub time: Rc<VirtualTime>,
    pub dice: Dice,
    pub toggles: Toggles,
    pub ledger: Rc<RefCell<Ledger>>,
    pub device: Device,
    pub(super) server: Server,
    queue: BinaryHeap<Reverse<Queued>>,
    events_made: u64,
    pub(super) connections: Vec<Connection>,
    connections_made: u64,
    pub(super) store_is_due: bool,
    pub(super) healed_at: Option<Duration>,
    active_at: Option<Duration>,
    pub events: Cell<u64>,
}

impl World {
    pub fn new(seed: u64) -> World {
        World::with(seed, LateToggles::draw(seed))
    }

    pub fn with(seed: u64, late: LateToggles) -> World {
        let mut dice = Dice::new(seed);
        let mut toggles = Toggles::draw(&mut dice, late);
        let time = Rc::new(VirtualTime::default());
        // The store has eight segments, and each failure of the disk costs one of them.
        let may_rotate = toggles.small_cap || toggles.late.fails_at_drops;
        let ledger = Rc::new(RefCell::new(Ledger::new(may_rotate)));
        let device = Device::new(&mut dice, &toggles, time.clone(), ledger.clone());
        // Where results go by report alone, one that is refused for ever has no way left.
        toggles.http_refuses &= device.sends_results();
        let server = Server::new(toggles.clone(), Dice::new(dice.next()), ledger.clone());
        World {
            time,
            dice,
            toggles,
            ledger,
            device,
            server,
            queue: BinaryHeap::new(),
            events_made: 0,
            connections: Vec::new(),
            connections_made: 0,
            store_is_due: false,
            healed_at: None,
            active_at: None,
            events: Cell::new(0),
        }
    }

    pub fn now(&self) -> Duration {
        self.time.now()
    }

    pub(super) fn later(&mut self, pause: Duration, event: Event) {
        self.events_made += 1;
        self.queue.push(Reverse(Queued {
            at: self.now() + pause,
            number: self.events_made,
            event,
        }));
    }

    fn trouble(&mut self, toggle: bool, n: u64) -> bool {
        toggle && self.healed_at.is_none() && self.dice.one_in(n)
    }

    pub fn run(&mut self) {
        for _ in 0..self.toggles.tasks {
            let at = self
                .dice
                .below(self.toggles.troubled_for.as_millis() as u64 * 3 / 4);
            self.later(Duration::from_millis(at), Event::Task);
        }
        self.later(self.toggles.troubled_for, Event::Heal);
        let first = self.dice.millis(50, 3000);
        self.later(first, Event::Trouble);
        self.later(Duration::from_millis(300), Event::ServerSpeaks);
        self.device.start(&mut self.dice);
        while !self.is_over() {
            self.settle();
            self.step();
        }
        let server = &self.server;
        self.ledger
            .borrow()
            .check_all(|number| server.has_been_offered(number));
    }

    /// Everything that can go on without time goes on.
    fn settle(&mut self) {
        loop {
            self.device.run_tasks();
            if self.device.has_stopped() {
                self.device.close();
                self.drop_connections();
                let pause = self.dice.millis(10, 2000);
                self.later(pause, Event::Start);
            }
            let calls = self.device.take_calls();
            if calls.is_empty() {
                break;
            }
            for call in calls {
                self.call(call);
            }
        }
        if !self.store_is_due && self.device.store_waits() {
            self.store_is_due = true;
            let pause = match (
                self.toggles.slow_disk && self.healed_at.is_none(),
                self.dice.below(8),
            ) {
                (true, 0) => self.dice.millis(500, 8_000),
                (true, _) => self.dice.millis(20, 500),
                (false, 0) => self.dice.millis(0, 30),
                (false, _) => Duration::from_micros(200 + self.dice.below(3000)),
            };
            self.later(pause, Event::Store);
        }
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            let stalled = connection.stalled_up || connection.dead;
            if !connection.up_is_due && !stalled && !connection.socket.is_empty() {
                self.connections[index].up_is_due = true;
                let number = self.connections[index].number;
                let pause = self.travel_time();
                self.later(pause, Event::Up(number));
            }
        }
        if let (Some(_), None) = (self.healed_at, self.active_at) {
            self.active_at = self.device.active_since();
        }
    }

    fn travel_time(&mut self) -> Duration {
        if self.toggles.slow && self.healed_at.is_none() && self.dice.one_in(3) {
            return self.dice.millis(200, 3_000);
        }
        self.dice.millis(1, 25)
    }

    fn step(&mut self) {
        let events = self.events.get() + 1;
        self.events.set(events);
        assert!(events < EVENTS_MAX, "more and more happens, without an end");
        let queued_at = self.queue.peek().map(|Reverse(queued)| queued.at);
        let next = queued_at.into_iter().chain(self.time.next()).min();
        let next = next.expect("something always happens");
        self.time.advance_to(next);
        let due = self
            .queue
            .peek()
            .is_some_and(|Reverse(queued)| queued.at <= self.now());
        if due && let Some(Reverse(queued)) = self.queue.pop() {
            self.happen(queued.event);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Store => {
                self.store_is_due = false;
                let aims = self.toggles.late.fails_at_drops && self.healed_at.is_none();
                let fails = match aims && self.dice.one_in(2) {
                    true => self.dice.pick(&[1, 3, 20]),
                    false => 0,
                };
                if self.device.store_turn(fails) {
                    // The power went in the middle of it.
                    self.power_cut();
                }
            }
            Event::DialEnds(answer, works) => self.dial_ends(&answer, works),
            Event::Up(number) => self.up(number),
            Event::Say(number, say) => self.say(number, say),
            Event::Down(number) => self.down(number),
            Event::HttpArrives(call) => self.http_arrives(call),
            // Who asked may be gone.
            Event::TasksAnswer(answer, tasks) => {
                let tasks = tasks.ok_or_else(|| NetError::new("500"));
                let _ = answer.try_send(tasks);
            }
            Event::ReportAnswer(answer, outcome) => {
                let _ = answer.try_send(outcome);
            }
            Event::Task => self.new_task(),
            Event::ServerSpeaks => self.server_speaks(),
            Event::Trouble => {
                if self.healed_at.is_none() {
                    self.make_trouble();
                    let pause = self.dice.pick(&[50, 500, 3000, 10_000]);
                    let pause = self.dice.millis(10, pause);
                    self.later(pause, Event::Trouble);
                }
            }
            Event::Start => {
                tell!("{:?} start", self.time.now());
                self.device.start(&mut self.dice);
            }
            Event::Heal => self.heal(),
        }
    }

    fn new_task(&mut self) {
        let with_channel = !(self.toggles.without_channel && self.dice.one_in(2));
        let mut ledger = self.ledger.borrow_mut();
        let number = ledger.attempts.len();
        let script = Script::draw(&mut self.dice, &self.toggles);
        ledger.add(ledger::name(number, with_channel), script);
        drop(ledger);
        self.server.add_task();
    }

    // ---- the agent's calls --------------------------------------------------------------------

    fn call(&mut self, call: Call) {
        match call {
            Call::Dial(answer) => {
                if self.trouble(self.toggles.dials_hang, 2) {
                    // The agent gives up by itself.
                    return self.later(Duration::from_secs(120), Event::DialEnds(answer, false));
                }
                let works = !self.trouble(self.toggles.dials_fail, 2);
                let pause = self.travel_time();
                self.later(pause, Event::DialEnds(answer, works));
            }
            call => {
                let pause = match self.trouble(self.toggles.http_hangs, 3) {
                    true => self.dice.millis(1_000, 58_000),
                    false => self.travel_time(),
                };
                self.later(pause, Event::HttpArrives(call));
            }
        }
    }

    fn http_arrives(&mut self, call: Call) {
        let fails = self.trouble(self.toggles.http_fails, 2);
        let lost = self.trouble(self.toggles.http_loses_answers, 2);
        let pause = match lost {
            true => REQUEST_TIMEOUT,
            false => self.travel_time(),
        };
        let now = self.now();
        match call {
            Call::Dial(_) => {}
            Call::Poll(answer) | Call::Heartbeat(answer) => {
                let offers = (!fails).then(|| self.server.offers(now));
                self.later(pause, Event::TasksAnswer(answer, offers.filter(|_| !lost)));
            }
            Call::Report(number, answer) => {
                let retry = |after| ReportOutcome::Retry {
                    after,
                    why: "no answer".into(),
                };
                let outcome = if fails {
                    let after = self.dice.one_in(3).then(|| self.dice.millis(0, 20_000));
                    retry(after)
                } else if self.server.refuses_report(number) {
                    ReportOutcome::Refused {
                        status: 404,
                        why: "no such task".into(),
                    }
                } else {
                    self.server.reported(number);
                    match lost {
                        true => retry(None),
                        false => ReportOutcome::Done,
                    }
                };
                self.later(pause, Event::ReportAnswer(answer, outcome));
            }
        }
    }

    fn dial_ends(&mut self, answer: &Sender<Result<Line, NetError>>, works: bool) {
        if !works {
            let _ = answer.try_send(Err(NetError::new("connection refused")));
            return;
        }
        let Some(outside) = self.device.outside() else {
            return;
        };
        let (arrivals, arriving) = async_channel::bounded(512);
        let (socket, sent) = async_channel::bounded(self.toggles.socket_frames);
        let line = Line {
            arrivals: arriving,
            socket,
            outside,
        };
        if answer.try_send(Ok(line)).is_err() {
            return;
        }
        self.connections_made += 1;
        // The agent has one at a time, the server may not know that yet.
        self.connections
            .retain(|connection| !connection.socket.is_closed());
        self.connections.push(Connection {
            number: self.connections_made,
            arrivals: Some(arrivals),
            socket: sent,
            talk: Talk::default(),
            up_is_due: false,
            down: VecDeque::new(),
            stalled_up: false,
            stalled_down: false,
            dead: false,
        });
    }

    fn position(&self, number: u64) -> Option<usize> {
        let mine = |connection: &Connection| connection.number == number;
        self.connections.iter().position(mine)
    }

    fn up(&mut self, number: u64) {
        let Some(index) = self.position(number) else {
            return;
        };
        let now = self.now();
        self.connections[index].up_is_due = false;
        for _ in 0..1 + self.dice.below(12) {
            let connection = &mut self.connections[index];
            if connection.stalled_up || connection.dead {
                return;
            }
            let Ok(sent) = connection.socket.try_recv() else {
                return;
            };
            match sent {
                Sent::Text { frame, way } => {
                    connection.talk.other_way = way;
                    tell!("{now:?} {number} → {}", frame.escape_ascii());
                    let says = self.server.receive(&mut connection.talk, &frame);
                    let is_new = connection.talk.hello_answered;
                    self.will_say(number, says);
                    if is_new {
                        // It takes the place of those before it.
                        self.connections.retain(|other| other.number >= number);
                    }
                    if self.position(number) != Some(index) {
                        return;
                    }
                }
                Sent::Ping => self.arrives(index, Arrival::Pong),
                Sent::Close => return self.end(index),
            }
        }
    }

    pub(super) fn will_say(&mut self, number: u64, says: Says) {
        for (pause, say) in says {
            match pause.is_zero() {
                true => self.say(number, say),
                false => self.later(pause, Event::Say(number, say)),
            }
        }
    }

    fn say(&mut self, number: u64, say: Say) {
        let Some(index) = self.position(number) else {
            return;
        };
        match say {
            Say::Message(message) => {
                let text = self.server.encode(&message);
                self.arrives(index, Arrival::Text(text));
            }
            Say::Raw(text) => self.arrives(index, Arrival::Text(text)),
            Say::Close => self.end(index),
        }
    }

    /// On its way to the agent, behind what is on its way already.
    fn arrives(&mut self, index: usize, arrival: Arrival) {
        let number = self.connections[index].number;
        self.connections[index].down.push_back(arrival);
        let pause = self.travel_time();
        self.later(pause, Event::Down(number));
    }

    fn down(&mut self, number: u64) {
        let Some(index) = self.position(number) else {
            return;
        };
        let connection = &mut self.connections[index];
        if connection.stalled_down || connection.dead {
            return;
        }
        if let Some(arrivals) = &connection.arrivals
            && let Some(arrival) = connection.down.pop_front()
        {
            // The agent may have ended it.
            tell!("{:?} {number} ← {arrival:?}", self.time.now());
            let _ = arrivals.try_send(arrival);
        }
    }

    /// Both ends learn of it at once.
    pub(super) fn end(&mut self, index: usize) {
        self.connections.remove(index);
    }

    pub(super) fn drop_connections(&mut self) {
        self.connections.clear();
    }

    fn is_over(&mut self) -> bool {
        let Some(healed_at) = self.healed_at else {
            return false;
        };
        let now = self.now();
        assert!(
            self.active_at.is_some()
                || !self.device.has_websocket()
                || now < healed_at + RETURN_TIME,
            "no session within the promised time"
        );
        let over = self.device.has_nothing_to_send() && self.server.has_all(&self.ledger.borrow());
        assert!(
            over || now < healed_at + HEALING_TIME,
            "not everything arrived: {}\nat the server:{}",
            self.device.describe(),
            self.server.describe()
        );
        over && (self.active_at.is_some() || !self.device.has_websocket())
    }
}
