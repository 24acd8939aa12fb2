//! A clock that moves only when the simulation moves it, and the timers on it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Timers stand still while the device sleeps, its clock does not.
#[derive(Default)]
pub struct VirtualTime {
    awake: Cell<Duration>,
    asleep: Cell<Duration>,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    timers_made: Cell<u64>,
}

impl VirtualTime {
    pub fn now(&self) -> Duration {
        self.awake.get() + self.asleep.get()
    }

    /// Waits so long.
    pub fn sleep(self: &Rc<Self>, duration: Duration) -> Sleep {
        Sleep {
            time: self.clone(),
            at: self.awake.get().saturating_add(duration),
            number: None,
        }
    }

    /// When the next timer ends.
    pub fn next(&self) -> Option<Duration> {
        let timers = self.timers.borrow();
        let ((at, _), _) = timers.first_key_value()?;
        Some(*at + self.asleep.get())
    }

    /// Moves on to this time; timers that end until then wake their owners.
    pub fn advance_to(&self, at: Duration) {
        let awake = at.saturating_sub(self.asleep.get()).max(self.awake.get());
        self.awake.set(awake);
        loop {
            let timer = {
                let mut timers = self.timers.borrow_mut();
                match timers.first_key_value() {
                    Some(((at, _), _)) if *at <= awake => timers.pop_first(),
                    _ => return,
                }
            };
            if let Some((_, waker)) = timer {
                waker.wake();
            }
        }
    }

    /// The device sleeps for so long.
    pub fn suspend(&self, duration: Duration) {
        self.asleep.set(self.asleep.get() + duration);
    }
}

pub struct Sleep {
    time: Rc<VirtualTime>,
    at: Duration,
    /// Set while it waits.
    number: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.time.awake.get() >= self.at {
            return Poll::Ready(());
        }
        let number = match self.number {
            Some(number) => number,
            None => {
                let number = self.time.timers_made.get();
                self.time.timers_made.set(number + 1);
                number
            }
        };
        self.number = Some(number);
        let key = (self.at, number);
        let mut timers = self.time.timers.borrow_mut();
        match timers.get_mut(&key) {
            Some(waker) => waker.clone_from(cx.waker()),
            None => drop(timers.insert(key, cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.time.timers.borrow_mut().remove(&(self.at, number));
        }
    }
}
