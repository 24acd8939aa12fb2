//! A cgroup (version 2) as a service manager gives one to an agent.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::Agent;

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup for one agent alone. Removed with everything in it when the test is over.
pub struct Service {
    pub dir: PathBuf,
}

impl Service {
    /// `None`, said loudly, where the machine has no cgroups of version 2 with these controllers, or
    /// nobody may make some.
    pub fn new(controllers: &[&str]) -> Option<Service> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hostlink-test-{}-{number}", std::process::id());
        let dir = Path::new(ROOT).join(name);
        let available = std::fs::read_to_string(format!("{ROOT}/cgroup.controllers"));
        let available = available.unwrap_or_default();
        let has = |wanted: &&str| available.split_whitespace().any(|it| it == *wanted);
        let enabled = controllers.iter().all(|it| {
            has(it)
                && std::fs::write(format!("{ROOT}/cgroup.subtree_control"), format!("+{it}"))
                    .is_ok()
        });
        if enabled && std::fs::create_dir(&dir).is_ok() {
            return Some(Service { dir });
        }
        eprintln!("SKIPPED: no cgroup of version 2 with {controllers:?} can be made here");
        None
    }

    /// Every start of the agent is one in this cgroup. What an earlier one has made is in the way of
    /// nobody: a cgroup that hands controllers down takes no processes.
    pub fn hold(&self, agent: &mut Agent) {
        let dir = self.dir.display();
        agent.set("HOSTLINK_TASK_CGROUP", "auto");
        agent.before(&format!(
            "{{ echo $$ >{dir}/cgroup.procs || echo $$ >{dir}/hostlink-agent/cgroup.procs; }} 2>/dev/null"
        ));
    }

    /// Hands it over to an ordinary user, as cgroups(7) says under "Delegation".
    pub fn delegate(&self, user: u32) {
        for name in [
            "",
            "cgroup.procs",
            "cgroup.subtree_control",
            "cgroup.threads",
        ] {
            let path = self.dir.join(name);
            std::os::unix::fs::chown(path, Some(user), Some(user)).expect("only root comes here");
        }
    }

    /// Cgroups of tasks that are there.
    pub fn leaves(&self) -> Vec<PathBuf> {
        let is_of_tasks = |it: &PathBuf| {
            let name = it.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("hostlink-") && name != "hostlink-agent"
        };
        let of_agents = folders(&self.dir).into_iter().filter(is_of_tasks);
        of_agents.flat_map(|dir| folders(&dir)).collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = std::fs::write(self.dir.join("cgroup.kill"), "1");
        for _ in 0..100 {
            if remove(&self.dir) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} could not be removed", self.dir.display());
    }
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| path.is_dir()).collect()
}

fn remove(dir: &Path) -> bool {
    folders(dir).iter().for_each(|below| {
        remove(below);
    });
    std::fs::remove_dir(dir).is_ok()
}
