//! What goes wrong by itself: cuts, stalls, kills, power cuts, a disk that fails. And its end.

use std::time::Duration;

use super::tell;
use super::world::{Event, World};

impl World {
    pub(super) fn server_speaks(&mut self) {
        let now = self.now();
        let numbers: Vec<u64> = self.connections.iter().map(|each| each.number).collect();
        for number in numbers {
            // What is said may end a connection.
            let Some(connection) = self.connections.iter_mut().find(|it| it.number == number)
            else {
                continue;
            };
            let says = self.server.speak(&mut connection.talk, now);
            self.will_say(number, says);
        }
        let pause = match self.healed_at {
            None => self.dice.millis(100, 2_000),
            Some(_) => Duration::from_secs(1),
        };
        self.later(pause, Event::ServerSpeaks);
    }

    pub(super) fn make_trouble(&mut self) {
        let last = self.connections.len().checked_sub(1);
        let toggles = &self.toggles;
        let possible = [
            toggles.cuts,
            toggles.stalls,
            toggles.stalls,
            toggles.restarts,
            toggles.kills,
            toggles.power_cuts,
            toggles.stops,
            toggles.suspends,
            toggles.disk_errors || toggles.disk_full || toggles.bad_block,
            toggles.power_cuts,
        ];
        let chosen = self.dice.below(possible.len() as u64) as usize;
        if !possible[chosen] {
            return;
        }
        tell!("{:?} trouble {chosen}", self.time.now());
        match (chosen, last) {
            (0, Some(last)) => self.end(last),
            (1, Some(last)) => {
                let connection = &mut self.connections[last];
                connection.stalled_up = !connection.stalled_up;
                let number = connection.number;
                self.later(Duration::ZERO, Event::Up(number));
            }
            (2, Some(last)) => {
                let connection = &mut self.connections[last];
                connection.stalled_down = !connection.stalled_down;
                let (number, waiting) = (connection.number, connection.down.len());
                for _ in 0..waiting {
                    self.later(Duration::ZERO, Event::Down(number));
                }
            }
            (3, _) => {
                self.drop_connections();
                if self.toggles.forgets && self.dice.one_in(2) {
                    self.server.forget();
                }
            }
            (4, _) if self.device.is_on() => {
                self.device.kill();
                self.comes_back();
            }
            (5, _) if self.device.is_on() => self.power_cut(),
            (6, _) => self.device.terminate(),
            (7, _) => {
                let pause = self.dice.pick(&[1_000, 20_000, 200_000]);
                self.time.suspend(Duration::from_millis(pause));
            }
            (8, _) => self.device.break_disk(&mut self.dice, &self.toggles),
            (9, _) if self.device.is_on() => self.device.cut_power_soon(&mut self.dice),
            _ => {}
        }
    }

    pub(super) fn power_cut(&mut self) {
        self.device.power_cut(&mut self.dice);
        self.comes_back();
    }

    /// After a kill or a power cut the network may deliver what it has, or not.
    fn comes_back(&mut self) {
        if self.dice.one_in(2) {
            self.drop_connections();
        }
        self.store_is_due = false;
        let pause = self.dice.millis(10, 3_000);
        self.later(pause, Event::Start);
    }

    pub(super) fn heal(&mut self) {
        tell!("{:?} healed", self.now());
        self.healed_at = Some(self.now());
        self.server.healed = true;
        self.device.repair();
        // What stands still stays dead without a word; the agent has to notice.
        for connection in &mut self.connections {
            connection.dead |= connection.stalled_up || connection.stalled_down;
        }
        if !self.device.is_on() && !self.device.is_starting() {
            self.later(Duration::from_millis(10), Event::Start);
        }
    }
}
