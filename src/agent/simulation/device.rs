//! The device: the real agent on a simulated disk, from start to kill, again and again.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use async_channel::Sender;
use smol::LocalExecutor;

use super::ledger::Ledger;
use super::outside::{Call, Outside};
use super::server::{AGENT_ID, INCARNATION};
use super::time::VirtualTime;
use super::toggles::{Dice, Toggles};
use super::{HAS_PANICKED, tell};
use crate::agent::Context;
use crate::agent::clock::Clock;
use crate::agent::clock_floor::ClockFloor;
use crate::agent::driver::{Driver, Input, queued_tasks};
use crate::agent::notify::Notifier;
use crate::agent::pace::Pace;
use crate::agent::startup::session_settings;
use crate::config::{self, Config};
use crate::executor::host::Host;
use crate::ids::{AttemptKey, Incarnation, Stream};
use crate::net;
use crate::outbox::simulated::{self, Fault, Keep, SimDisk, Store};
use crate::session::{Session, Settings};

/// As in a real start.
const INPUTS_WAITING: usize = 64;
/// The agent's tasks may not go on more often than this without time passing.
const TICKS_MAX: u32 = 50_000;

/// What the real agent needs and the simulation never uses: made once for each thread.
struct Props {
    dialer: Rc<net::Dialer>,
    signer: Rc<net::Signer>,
    notifier: Rc<Notifier>,
    clock_floor: Rc<ClockFloor>,
    host: Rc<Host>,
    config: Config,
}

thread_local! {
    static PROPS: Rc<Props> = Rc::new(Props::new());
}

impl Props {
    fn new() -> Props {
        const BASE: &str = "http://127.0.0.1:9";
        let environment = [("SH_CONTROL_PLANE_URL".into(), BASE.into())];
        let loaded = config::load(environment.into_iter(), None);
        Props {
            dialer: Rc::new(net::testing::dialer(BASE)),
            signer: Rc::new(net::testing::signer(AGENT_ID, BASE)),
            notifier: Rc::new(Notifier::default()),
            clock_floor: Rc::new(ClockFloor::default()),
            host: Rc::new(Host::default()),
            config: loaded.config.expect("a good configuration"),
        }
    }
}

/// From a start to its end.
struct Life {
    executor: Rc<LocalExecutor<'static>>,
    driver: smol::Task<()>,
    inputs: Sender<Input>,
    outside: Rc<Outside>,
    store: Store,
}

pub struct Device {
    time: Rc<VirtualTime>,
    ledger: Rc<RefCell<Ledger>>,
    disk: SimDisk,
    cap_bytes: u64,
    config: Config,
    settings: Settings,
    life: Option<Life>,
    /// A further start is on its way.
    starting: bool,
    may_break: bool,
    /// Streams given up in the last turn of the store that dropped something, until the tasks have
    /// heard of that turn.
    dropped: Option<Vec<(AttemptKey, Stream)>>,
    /// Streams that the store was asked to give up: a start may find that on the disk, also if the
    /// answer was an error, or the power went.
    to_give_up: Vec<(AttemptKey, Stream)>,
}

thread_local! {
    static WALL_MS: Cell<u64> = const { Cell::new(0) };
}

/// The system clock: it may jump.
fn wall_ms() -> u64 {
    WALL_MS.get()
}

impl Device {
    pub fn new(
        dice: &mut Dice,
        toggles: &Toggles,
        time: Rc<VirtualTime>,
        ledger: Rc<RefCell<Ledger>>,
    ) -> Device {
        let mut config = PROPS.with(|props| props.config.clone());
        let seconds = |n: u64| Duration::from_secs(n);
        config.ws_enabled = !dice.one_in(30);
        config.ws_results_enabled = !dice.one_in(20);
        config.ws_delivery_enabled = !dice.one_in(10);
        config.ws_reconnect_min = dice.millis(100, 2_000);
        config.ws_reconnect_max = seconds(dice.pick(&[1, 5, 60]));
        config.ws_ping_interval = seconds(dice.pick(&[5, 30]));
        config.polling_fallback_threshold = seconds(dice.pick(&[0, 5, 30]));
        config.task_poll_interval = seconds(dice.pick(&[2, 10, 30]));
        // Without heartbeats a task without a result channel may never be offered.
        config.heartbeat_interval =
            seconds(dice.pick(&[5, 30, if toggles.without_channel { 5 } else { 0 }]));
        config.task_concurrency = 1 + dice.below(3) as usize;
        config.task_kill_grace = seconds(dice.pick(&[0, 10]));
        let settings = session_settings(&config, AGENT_ID.into());
        let disk = SimDisk::default();
        disk.look_for_marks();
        WALL_MS.set(1_000_000);
        Device {
            time,
            ledger,
            disk,
            cap_bytes: match (toggles.small_cap, toggles.large_chunks) {
                (true, _) => 32 << 10,
                _ if toggles.late.bulk => 16 << 20,
                (false, true) => 4 << 20,
                (false, false) => 512 << 10,
            },
            config,
            settings,
            life: None,
            starting: false,
            may_break: true,
            dropped: None,
            to_give_up: Vec::new(),
        }
    }

    pub fn start(&mut self, dice: &mut Dice) {
        self.starting = false;
        if self.life.is_some() {
            return;
        }
        self.dropped = None;
        // A store that cannot be opened is another matter: the agent would run in memory.
        self.disk.clear_fault();
        self.disk.replace_bad_block();
        let name = Incarnation::from_digits(INCARNATION.as_bytes()).expect("digits");
        let opened = simulated::open(&self.disk, self.cap_bytes, name, wall_ms);
        let (handle, store, recovered) = opened.expect("a good disk opens");
        {
            let mut ledger = self.ledger.borrow_mut();
            ledger.life += 1;
            for attempt in &mut ledger.attempts {
                attempt.reporting = false;
                for stream in Stream::ALL {
                    // What was durable although no task was told so counts from now on.
                    let stored = &mut attempt.stored[stream.index()];
                    *stored = store.last(attempt.key, stream).max(*stored);
                }
            }
            // A cut may be durable without an answer, if output may have to make room or its stream
            // was to be given up.
            ledger.drop_chunks(&self.to_give_up, |key, stream, sequence| {
                store.waits(key, stream, sequence)
            });
        }
        let outside = Rc::new(Outside::new(
            self.time.clone(),
            self.ledger.clone(),
            self.disk.clone(),
            self.settings.websocket && self.settings.results,
        ));
        let executor = Rc::new(LocalExecutor::new());
        let (inputs, to_driver) = async_channel::bounded(INPUTS_WAITING);
        let context = PROPS.with(|props| {
            let clock = net::ServerClock::new(&props.dialer.settings().control_plane);
            Rc::new(Context {
                config: self.config.clone(),
                agent_id: AGENT_ID.into(),
                executor: Rc::downgrade(&executor),
                clock: Clock::Virtual(self.time.clone()),
                outbox: handle,
                host: props.host.clone(),
                dialer: props.dialer.clone(),
                websocket: props.dialer.settings().websocket.clone(),
                api: net::Api::new(props.dialer.clone(), clock),
                signer: props.signer.clone(),
                inputs: inputs.clone(),
                watched: Rc::new(Cell::new(false)),
                pace: Pace::default(),
                notifier: props.notifier.clone(),
                clock_floor: props.clock_floor.clone(),
                stopping: Cell::new(false),
                simulated: Some(outside.clone()),
            })
        });
        let begun = self.time.now();
        let incarnation = context.outbox.incarnation().to_string();
        let mut session = Box::new(Session::new(
            self.settings.clone(),
            incarnation,
            dice.next(),
            Duration::ZERO,
        ));
        session.recovered(queued_tasks(recovered));
        // As in a real start: a task of the executor that records offers begins with it.
        let driver = Driver::new(context, session, begun);
        let driver = executor.spawn(driver.run(to_driver));
        self.life = Some(Life {
            executor,
            driver,
            inputs,
            outside,
            store,
        });
    }

    pub fn is_on(&self) -> bool {
        self.life.is_some()
    }

    pub fn is_starting(&self) -> bool {
        self.starting
    }

    pub fn run_tasks(&mut self) {
        let Some(life) = &self.life else {
            return;
        };
        let mut ticks = 0;
        while life.executor.try_tick() {
            ticks += 1;
            assert!(ticks < TICKS_MAX, "tasks go on without an end");
            assert!(!HAS_PANICKED.get(), "a task of the agent has panicked");
        }
        // What one turn has stored and dropped, a task learns to be stored only now.
        self.note_dropped();
        self.dropped = None;
    }

    fn note_dropped(&self) {
        if let (Some(life), Some(given_up)) = (&self.life, &self.dropped) {
            let mut ledger = self.ledger.borrow_mut();
            ledger.drop_chunks(given_up, |key, stream, sequence| {
                life.store.waits(key, stream, sequence)
            });
        }
    }

    pub fn take_calls(&mut self) -> Vec<Call> {
        match &self.life {
            Some(life) => std::mem::take(&mut life.outside.calls.borrow_mut()),
            None => Vec::new(),
        }
    }

    pub fn outside(&self) -> Option<Rc<Outside>> {
        self.life.as_ref().map(|life| life.outside.clone())
    }

    pub fn active_since(&self) -> Option<Duration> {
        self.life.as_ref()?.outside.active_since.get()
    }

    pub fn sends_results(&self) -> bool {
        self.settings.websocket && self.settings.results
    }

    pub fn has_websocket(&self) -> bool {
        self.settings.websocket
    }

    // ---- the disk -----------------------------------------------------------------------------

    pub fn store_waits(&self) -> bool {
        self.life
            .as_ref()
            .is_some_and(|life| life.store.waiting() > 0)
    }

    /// A turn of the storage thread. If something is to be dropped in it, `fails` calls of the disk
    /// fail. True if the power went meanwhile.
    pub fn store_turn(&mut self, fails: u64) -> bool {
        let Some(life) = &mut self.life else {
            return false;
        };
        let aims = fails > 0 && self.may_break && !self.disk.has_fault();
        let turn = life.store.turn(|turn| {
            if aims && turn.is_to_drop {
                self.disk.set_fault(0, Fault::Io(fails));
            }
        });
        if aims {
            self.disk.clear_fault();
        }
        life.outside.store_has_noted(&turn, &life.store);
        if turn.has_dropped || !turn.given_up.is_empty() {
            tell!("{:?} {turn:?}", self.time.now());
        }
        for &(key, stream) in &turn.given_up {
            self.ledger.borrow_mut().give_up(key, stream);
        }
        self.to_give_up.extend(&turn.given_up);
        if self.disk.is_crashed() {
            return true;
        }
        if turn.has_dropped {
            self.dropped = Some(turn.given_up);
            self.note_dropped();
        }
        false
    }

    pub fn break_disk(&mut self, dice: &mut Dice, toggles: &Toggles) {
        if !self.may_break || self.disk.has_fault() {
            return;
        }
        let count = dice.pick(&[1, 3, 20]);
        let fault = match dice.below(3) {
            0 if toggles.disk_errors => Fault::Io(count),
            1 if toggles.disk_full => Fault::NoSpace(count),
            2 if toggles.bad_block => Fault::BadFile,
            _ => return,
        };
        self.disk.set_fault(dice.below(6), fault);
    }

    pub fn cut_power_soon(&mut self, dice: &mut Dice) {
        self.disk.set_fault(dice.below(8), Fault::Crash);
    }

    pub fn repair(&mut self) {
        self.may_break = false;
        if !self.disk.is_crashed() {
            self.disk.clear_fault();
        }
    }

    // ---- the end ------------------------------------------------------------------------------

    /// `kill -9`: the page cache stays.
    pub fn kill(&mut self) {
        self.life = None;
        self.starting = true;
        self.disk.clear_fault();
    }

    pub fn power_cut(&mut self, dice: &mut Dice) {
        self.life = None;
        self.starting = true;
        let keep = match dice.below(8) {
            0 | 1 => Keep::Nothing,
            2 => Keep::Everything,
            3 => Keep::FirstHalf,
            4 => Keep::LastHalf,
            5 => Keep::Pages(dice.next()),
            _ => Keep::Some(dice.next()),
        };
        self.disk.crash(keep);
        // Without a battery the clock begins anew, or is wrong by years.
        WALL_MS.set(dice.pick(&[0, 1_000_000, 1 << 40]));
    }

    /// TERM.
    pub fn terminate(&mut self) {
        if let Some(life) = &self.life {
            let _ = life.inputs.try_send(Input::Terminate);
        }
    }

    pub fn has_stopped(&self) -> bool {
        self.life
            .as_ref()
            .is_some_and(|life| life.driver.is_finished())
    }

    /// The last step of an orderly stop.
    pub fn close(&mut self) {
        if let Some(life) = self.life.take() {
            life.store.close();
            self.starting = true;
        }
    }

    pub fn has_nothing_to_send(&self) -> bool {
        let Some(life) = &self.life else {
            return false;
        };
        life.store.waiting() == 0 && life.store.counts().messages_waiting == 0
    }

    pub fn describe(&self) -> String {
        match &self.life {
            Some(life) => format!("{:?}", life.store.counts()),
            None => "the agent does not run".to_owned(),
        }
    }
}
