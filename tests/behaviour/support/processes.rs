//! Processes that tasks leave behind, found by an argument that nobody else has.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A `sleep` that is told from all others by the time it sleeps. What is left of it is killed when
/// the test is over.
pub struct Sleeper {
    seconds: String,
}

impl Sleeper {
    pub fn new() -> Sleeper {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Sleeper {
            seconds: format!("1000.{}0{number}", std::process::id()),
        }
    }

    /// Shell words that run it.
    pub fn command(&self) -> String {
        format!("sleep {}", self.seconds)
    }

    /// Those that run now.
    pub fn running(&self) -> Vec<Pid> {
        let wanted = format!("sleep\0{}\0", self.seconds);
        let entries = std::fs::read_dir("/proc").expect("/proc is mounted");
        let ids = entries.flatten().filter_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            line.ends_with(wanted.as_bytes()).then_some(id)
        });
        ids.filter_map(Pid::from_raw).collect()
    }

    /// Waits until so many run, at most this long. Returns how many there are.
    pub fn wait_for(&self, count: usize, time: Duration) -> usize {
        let deadline = Instant::now() + time;
        loop {
            let running = self.running().len();
            if running == count || Instant::now() > deadline {
                return running;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        for id in self.running() {
            let _ = kill_process(id, Signal::KILL);
        }
    }
}

/// Zombies whose parent is this process.
pub fn zombies_of(parent: i32) -> usize {
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted");
    let stats = entries
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let expected = format!(") Z {parent} ");
    stats.filter(|stat| stat.contains(&expected)).count()
}
