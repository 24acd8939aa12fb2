//! Time for all that waits in this layer: that of the device, or in a simulation a virtual one.

#[cfg(test)]
use std::rc::Rc;
use std::time::Duration;

use smol::Timer;

use super::boot_time;
#[cfg(test)]
use super::simulation::VirtualTime;

pub enum Clock {
    /// Counts suspend.
    Boot,
    #[cfg(test)]
    Virtual(Rc<VirtualTime>),
}

impl Clock {
    /// Time since boot.
    pub fn now(&self) -> Duration {
        match self {
            Clock::Boot => boot_time(),
            #[cfg(test)]
            Clock::Virtual(time) => time.now(),
        }
    }

    /// Waits so long, suspend not counted: whoever has a deadline looks at [`Clock::now`] again.
    pub async fn sleep(&self, duration: Duration) {
        match self {
            Clock::Boot => {
                Timer::after(duration).await;
            }
            #[cfg(test)]
            Clock::Virtual(time) => time.sleep(duration).await,
        }
    }
}
