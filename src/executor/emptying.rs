//! Ends all that lives in cgroups. They are frozen while their members are found: what stands still
//! starts no other, and leaves the processor to the agent. Waiting reads one file, however many there
//! are. Before Linux 5.2 nothing can be frozen, and [`super::ending`] does all of it.

use std::time::{Duration, Instant};

use super::cgroup::Leaf;
use super::ending::{until, within};
use crate::limits::KILL_PATIENCE;

/// TERM to all, up to `grace`, KILL. Returns how many there were, when nobody is left, or nobody who
/// can be killed; 0 if they cannot be frozen.
pub async fn end(leaves: &[Leaf], grace: Duration) -> usize {
    let mut count = 0;
    for leaf in leaves.iter().filter(|leaf| leaf.is_populated()) {
        if !leaf.freeze() {
            continue;
        }
        let living = leaf.living();
        living.iter().for_each(|member| member.terminate());
        count += living.len();
        leaf.thaw();
    }
    if count > 0 && !within(grace, emptied(leaves)).await {
        kill(leaves).await;
    }
    count
}

/// Waits until nobody lives there.
pub async fn emptied(leaves: &[Leaf]) {
    until(|| !leaves.iter().any(Leaf::is_populated)).await;
}

/// KILL, until nobody is left. Thousands need their time to die: it is waited as long as they become
/// fewer, and [`KILL_PATIENCE`] for who is left then.
pub async fn kill(leaves: &[Leaf]) {
    let (mut fewest, mut fewer_at) = (usize::MAX, Instant::now());
    until(|| {
        let left: usize = leaves.iter().map(Leaf::population).sum();
        if left == 0 {
            return true;
        }
        leaves.iter().for_each(Leaf::kill);
        if left < fewest {
            (fewest, fewer_at) = (left, Instant::now());
        }
        fewer_at.elapsed() > KILL_PATIENCE
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use futures_lite::future;
    use smol::Timer;

    use super::super::cgroup::tests::Fake;
    use super::*;
    use crate::limits::GROUP_POLL_INTERVAL_MIN;

    const GRACE: Duration = Duration::from_secs(20);

    /// A shell in a folder that looks like its cgroup.
    struct Inhabited {
        fake: Fake,
        shell: Child,
    }

    impl Drop for Inhabited {
        fn drop(&mut self) {
            let _ = self.shell.kill();
            let _ = self.shell.wait();
        }
    }

    impl Inhabited {
        /// It takes TERM as `trap` says, and is ready.
        fn by(name: &str, trap: &str) -> Inhabited {
            let script = format!("trap '{trap}' TERM; echo; while :; do sleep 0.01; done");
            let mut shell = Command::new("/bin/sh")
                .args(["-c", &script])
                .stdout(Stdio::piped())
                .spawn()
                .expect("a shell");
            let mut said = [0];
            let mut out = shell.stdout.take().expect("piped");
            std::io::Read::read_exact(&mut out, &mut said).expect("its trap is set");
            let id = format!("{}\n", shell.id());
            let files = [
                ("cgroup.procs", id.as_str()),
                ("cgroup.events", "populated 1\n"),
            ];
            let fake = Fake::new(name, &files);
            Inhabited { fake, shell }
        }

        /// Does as the kernel: a killed cgroup kills, and one that nobody lives in says so.
        async fn live(&mut self) {
            let begun = Instant::now();
            loop {
                assert!(begun.elapsed() < GRACE / 2, "nobody ends it");
                if self.fake.read("cgroup.kill") == "1" {
                    let _ = self.shell.kill();
                }
                if self.shell.try_wait().expect("a child").is_some() {
                    let events = self.fake.0.join("cgroup.events");
                    std::fs::write(events, "populated 0\n").expect("writable");
                    return;
                }
                Timer::after(GROUP_POLL_INTERVAL_MIN).await;
            }
        }

        fn end(&mut self, grace: Duration) -> usize {
            let leaf = [Leaf::at(self.fake.0.clone())];
            smol::block_on(future::zip(end(&leaf, grace), self.live())).0
        }
    }

    #[test]
    fn they_are_frozen_told_and_thawed() {
        let mut home = Inhabited::by("obeys", "exit");
        assert_eq!(home.end(GRACE), 1);
        assert_eq!(home.fake.read("cgroup.freeze"), "0", "as it was");
        assert_eq!(home.fake.read("cgroup.kill"), "", "TERM was enough");
    }

    #[test]
    fn who_does_not_obey_is_killed_with_its_cgroup() {
        let mut home = Inhabited::by("stubborn", "");
        assert_eq!(home.end(Duration::from_millis(50)), 1);
        assert_eq!(home.fake.read("cgroup.kill"), "1");
    }

    #[test]
    fn nothing_is_done_where_nobody_lives() {
        let fake = Fake::new("empty", &[("cgroup.events", "populated 0\n")]);
        let leaf = [Leaf::at(fake.0.clone()), Leaf::at(fake.0.join("none"))];
        assert_eq!(smol::block_on(end(&leaf, GRACE)), 0);
        smol::block_on(kill(&leaf));
        assert_eq!(fake.read("cgroup.freeze") + &fake.read("cgroup.kill"), "");
    }

    #[test]
    fn who_cannot_be_frozen_is_left_to_the_hunt() {
        let mut home = Inhabited::by("old-kernel", "exit");
        std::fs::create_dir(home.fake.0.join("cgroup.freeze")).expect("writable");
        let leaf = [Leaf::at(home.fake.0.clone())];
        assert_eq!(smol::block_on(end(&leaf, GRACE)), 0);
        assert!(home.shell.try_wait().expect("a child").is_none());
    }

    /// What hangs in the kernel is not waited for without end.
    #[test]
    fn one_that_does_not_die_is_given_up() {
        let home = Inhabited::by("undead", "");
        let leaf = [Leaf::at(home.fake.0.clone())];
        let begun = Instant::now();
        smol::block_on(kill(&leaf));
        assert!(begun.elapsed() > KILL_PATIENCE);
    }
}
