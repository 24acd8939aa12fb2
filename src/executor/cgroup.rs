//! A cgroup (version 2) for each task, where the agent may make one: nobody leaves it unnoticed, it
//! is killed as a whole, and it bounds memory, processes and CPU.
//!
//! Below the agent's own cgroup stands one folder of this agent, and in it a leaf for each task,
//! named by its attempt. Whether that works is tried at the start, by really doing it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};

use super::procfs::{self, Process};
use super::setup;
use crate::ids::AttemptKey;
use crate::limits::CGROUPS_VISITED_MAX;

/// Where the agent goes itself if its own cgroup must be free of processes.
const OWN_LEAF: &str = "hostlink-agent";
const PROBE_LEAF: &str = "probe";
/// `cpu.max` counts in this period, the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// What a task may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bounds {
    pub memory_bytes: Option<u64>,
    pub processes: Option<u64>,
    /// Of one CPU.
    pub cpu_percent: Option<u64>,
}

/// The folder of this agent's tasks.
#[derive(Debug)]
pub struct Cgroups {
    dir: PathBuf,
    bounds: Bounds,
}

/// What a task has used, as far as the kernel tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    pub user_and_system: Option<(Duration, Duration)>,
    pub memory_peak_bytes: Option<u64>,
    /// The kernel has killed for want of memory. `None` where memory is not counted by cgroup.
    pub out_of_memory: Option<bool>,
}

impl Cgroups {
    /// Tries to make them. `agent` names this agent among all. Bounds that cannot be kept are left
    /// out: [`Cgroups::bounds`] tells which can; the second value says why.
    pub fn open(agent: &str, wanted: Bounds) -> Result<(Cgroups, Vec<String>), String> {
        let read = |path: &str| {
            fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
        };
        let own = own_dir(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)?;
        let dir = own.join(format!("hostlink-{agent}"));
        make_dir(&dir)?;
        let mut cgroups = Cgroups {
            dir,
            bounds: Bounds::default(),
        };
        if let Err(why) = cgroups.probe() {
            cgroups.close();
            return Err(why);
        }
        let mut complaints = Vec::new();
        cgroups.bounds = wanted;
        for (setting, controller, value) in [
            (
                "HOSTLINK_TASK_MEMORY_MAX",
                "memory",
                &mut cgroups.bounds.memory_bytes,
            ),
            (
                "HOSTLINK_TASK_PIDS_MAX",
                "pids",
                &mut cgroups.bounds.processes,
            ),
            (
                "HOSTLINK_TASK_CPU_MAX",
                "cpu",
                &mut cgroups.bounds.cpu_percent,
            ),
        ] {
            if value.is_none() {
                continue;
            }
            if let Err(why) = enable_below(&own, &cgroups.dir, controller) {
                *value = None;
                complaints.push(format!("{setting} cannot be kept by a cgroup: {why}"));
            }
        }
        // A leaf that hands down what it should may take no process any more.
        if cgroups.bounds != Bounds::default()
            && let Err(why) = cgroups.probe()
        {
            cgroups.close();
            return Err(why);
        }
        Ok((cgroups, complaints))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// A process of ours really enters a leaf.
    fn probe(&self) -> Result<(), String> {
        let leaf = Leaf(self.dir.join(PROBE_LEAF));
        make_dir(&leaf.0)?;
        let mut step = std::ffi::OsString::from("cgroup=");
        step.push(leaf.procs());
        let status = Command::new("/proc/self/exe")
            .arg0("hostlink-edge")
            .args([OsStr::new(setup::COMMAND), &step, OsStr::new("--")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        leaf.remove();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(_) => Err(format!("no process may enter {}", self.dir.display())),
            Err(error) => Err(format!("cannot run the helper: {error}")),
        }
    }

    /// A leaf with the bounds, for a task that is about to start.
    pub fn make(&self, key: AttemptKey) -> Result<Leaf, String> {
        let leaf = self.leaf(key);
        make_dir(&leaf.0)?;
        let bounds = &self.bounds;
        let quota = bounds.cpu_percent.map(|percent| {
            let quota = percent * (CPU_PERIOD_US / 100);
            format!("{quota} {CPU_PERIOD_US}")
        });
        let set = |name: &str, value: Option<String>| match value {
            Some(value) => leaf.write(name, &value),
            None => Ok(()),
        };
        let bounded = set("memory.max", bounds.memory_bytes.map(|it| it.to_string()))
            .and_then(|()| set("pids.max", bounds.processes.map(|it| it.to_string())))
            .and_then(|()| set("cpu.max", quota));
        if let Err(why) = bounded {
            leaf.remove();
            return Err(why);
        }
        if bounds.memory_bytes.is_some() {
            // All of the task at once: half a task is no use. Kernels before 4.19 cannot.
            let _ = leaf.write("memory.oom.group", "1");
            // Else it would go on into the swap. A kernel without swap has no such file.
            let _ = leaf.write("memory.swap.max", "0");
        }
        Ok(leaf)
    }

    pub fn leaf(&self, key: AttemptKey) -> Leaf {
        Leaf(self.dir.join(key.to_string()))
    }

    /// Attempts that have a leaf.
    pub fn leaves(&self) -> Vec<AttemptKey> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names
            .filter_map(|name| AttemptKey::parse(&name))
            .take(CGROUPS_VISITED_MAX)
            .collect()
    }

    /// Removes the leaves that nobody lives in.
    pub fn remove_leaves(&self) {
        for key in self.leaves() {
            self.leaf(key).remove();
        }
    }

    /// Removes what is empty.
    pub fn close(&self) {
        self.remove_leaves();
        let _ = fs::remove_dir(&self.dir);
    }
}

/// The cgroup of one task.
#[derive(Debug)]
pub struct Leaf(PathBuf);

impl Leaf {
    /// The file by which a process enters.
    pub fn procs(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }

    /// Whether anybody is alive in it, or in those that the task may have made below.
    pub fn is_populated(&self) -> bool {
        field(&self.read("cgroup.events"), "populated") == Some(1)
    }

    /// Who is alive in it, and in those below.
    pub fn living(&self) -> Vec<Process> {
        let mut found: Vec<Process> = self.ids().into_iter().filter_map(procfs::find).collect();
        found.retain(|process| !process.is_dead);
        found
    }

    /// How many live in it, and in those below.
    pub fn population(&self) -> usize {
        self.ids().len()
    }

    /// Whether one of these lives in it.
    pub fn holds(&self, any: &[Pid]) -> bool {
        self.ids().iter().any(|id| any.contains(id))
    }

    fn ids(&self) -> Vec<Pid> {
        if !self.is_populated() {
            return Vec::new();
        }
        let mut found = Vec::new();
        for dir in self.with_descendants() {
            let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            let ids = procs.lines().filter_map(|line| line.parse().ok());
            found.extend(ids.filter_map(Pid::from_raw));
        }
        found
    }

    /// Nobody in it goes on; KILL reaches them all the same. False where the kernel cannot (before
    /// 5.2).
    pub fn freeze(&self) -> bool {
        self.write("cgroup.freeze", "1").is_ok()
    }

    pub fn thaw(&self) {
        let _ = self.write("cgroup.freeze", "0");
    }

    /// KILL to all at once; before Linux 5.14 to one after the other.
    pub fn kill(&self) {
        if self.write("cgroup.kill", "1").is_err() {
            self.freeze();
            for member in self.living() {
                member.signal(Signal::KILL);
            }
        }
    }

    pub fn used(&self) -> Used {
        let cpu = self.read("cpu.stat");
        let time = |name| field(&cpu, name).map(Duration::from_micros);
        Used {
            user_and_system: time("user_usec").zip(time("system_usec")),
            memory_peak_bytes: self.read("memory.peak").trim().parse().ok(),
            out_of_memory: field(&self.read("memory.events"), "oom_kill").map(|n| n > 0),
        }
    }

    #[cfg(test)]
    pub fn at(dir: PathBuf) -> Leaf {
        Leaf(dir)
    }

    /// A leaf that somebody still lives in stays.
    pub fn remove(&self) {
        for dir in self.with_descendants().iter().rev() {
            let _ = fs::remove_dir(dir);
        }
    }

    /// Parents before their children.
    fn with_descendants(&self) -> Vec<PathBuf> {
        let mut found = vec![self.0.clone()];
        let mut next = 0;
        while next < found.len() && found.len() < CGROUPS_VISITED_MAX {
            let entries = fs::read_dir(&found[next]).into_iter().flatten().flatten();
            let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            found.extend(entries.filter(is_dir).map(|entry| entry.path()));
            next += 1;
        }
        found
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap_or_default()
    }

    fn write(&self, name: &str, value: &str) -> Result<(), String> {
        let path = self.0.join(name);
        fs::write(&path, value)
            .map_err(|error| format!("cannot write {value} to {}: {error}", path.display()))
    }
}

fn make_dir(dir: &Path) -> Result<(), String> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(format!("cannot make {}: {error}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Hands a controller down from `own` through `dir` to the leaves.
fn enable_below(own: &Path, dir: &Path, controller: &str) -> Result<(), String> {
    let available = fs::read_to_string(own.join("cgroup.controllers")).unwrap_or_default();
    if !available.split_whitespace().any(|it| it == controller) {
        return Err(format!(
            "{} has no controller `{controller}`; give the agent's service a delegated cgroup \
             (systemd: Delegate=yes)",
            own.display()
        ));
    }
    make_inner(own)?;
    for parent in [own, dir] {
        enable(parent, controller).map_err(|error| {
            format!(
                "cannot enable `{controller}` in {}: {error}",
                parent.display()
            )
        })?;
    }
    Ok(())
}

/// Takes this process out of a cgroup that is to hand controllers down. Some (`memory`) the kernel
/// hands down from an empty one only. With others (`cpu`, `pids`) it does so from any, and from then
/// on lets no process into those below. The root alone is free of that.
fn make_inner(own: &Path) -> Result<(), String> {
    let is_root = !own.join("cgroup.events").exists();
    let procs = own.join("cgroup.procs");
    let is_empty = || fs::read_to_string(&procs).is_ok_and(|ids| ids.trim().is_empty());
    if is_root || is_empty() {
        return Ok(());
    }
    let leaf = Leaf(own.join(OWN_LEAF));
    make_dir(&leaf.0)?;
    leaf.write("cgroup.procs", "0")?;
    if is_empty() {
        return Ok(());
    }
    let _ = fs::write(&procs, "0");
    leaf.remove();
    Err(format!(
        "other processes live in {}; give the agent a cgroup of its own",
        own.display()
    ))
}

fn enable(dir: &Path, controller: &str) -> io::Result<()> {
    let file = dir.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&file).unwrap_or_default();
    if enabled.split_whitespace().any(|it| it == controller) {
        return Ok(());
    }
    fs::write(file, format!("+{controller}"))
}

/// `name value` in lines.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    let mut values = text.lines().filter_map(|line| line.split_once(' '));
    values.find(|(key, _)| *key == name)?.1.trim().parse().ok()
}

/// The folder of this process's cgroup: from `/proc/self/mountinfo` (proc_pid_mountinfo(5)) and
/// `/proc/self/cgroup` (cgroups(7)).
fn own_dir(mountinfo: &str, cgroup: &str) -> Result<PathBuf, String> {
    let path = cgroup
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .ok_or("the kernel has no cgroups of version 2")?;
    let mount = mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (kind.split(' ').next()? == "cgroup2").then_some((root, point))
    });
    let (root, point) = mount.ok_or("no cgroup file system of version 2 is mounted")?;
    let below = Path::new(path)
        .strip_prefix(root)
        .ok()
        .filter(|below| !below.components().any(|part| part.as_os_str() == ".."))
        .ok_or_else(|| format!("the agent's cgroup {path} is outside of what is mounted"))?;
    // Where an earlier life of the agent has moved to, and has started this one from.
    let below = match below.file_name() {
        Some(name) if name == OWN_LEAF => below.parent().unwrap_or(below),
        _ => below,
    };
    Ok(Path::new(point).join(below))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const MOUNTS: &str = "24 30 0:22 / /sys rw,nosuid - sysfs sysfs rw\n\
        33 24 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n\
        40 24 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";

    #[test]
    fn the_own_cgroup_is_found_in_every_arrangement() {
        let check = |mounts: &str, cgroup: &str, expected: Result<&str, &str>| {
            let found = own_dir(mounts, cgroup);
            match (&found, expected) {
                (Ok(dir), Ok(expected)) => assert_eq!(dir, Path::new(expected)),
                (Err(why), Err(part)) => assert!(why.contains(part), "{why}"),
                _ => panic!("{cgroup}: {found:?}"),
            }
        };
        let service = "0::/system.slice/hostlink.service\n";
        let folder = "/sys/fs/cgroup/system.slice/hostlink.service";
        check(MOUNTS, service, Ok(folder));
        let moved = "0::/system.slice/hostlink.service/hostlink-agent\n";
        check(MOUNTS, moved, Ok(folder));
        check(MOUNTS, "4:pids:/\n0::/\n", Ok("/sys/fs/cgroup/"));
        let part = MOUNTS.replace("0:28 / ", "0:28 /system.slice ");
        check(&part, service, Ok("/sys/fs/cgroup/hostlink.service"));
        check(&part, "0::/user.slice\n", Err("outside"));
        check(MOUNTS, "0::/../other\n", Err("outside"));
        check(MOUNTS, "4:pids:/\n", Err("version 2"));
        check("", service, Err("mounted"));
        check("a b - cgroup2\n33 24 0:28\n", service, Err("mounted"));
    }

    /// A folder that looks like a cgroup, removed at the end.
    pub struct Fake(pub PathBuf);

    impl Fake {
        pub fn new(name: &str, files: &[(&str, &str)]) -> Fake {
            let name = format!("hostlink-cgroup-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            fs::create_dir_all(&dir).expect("a temporary directory");
            for (name, text) in files {
                fs::write(dir.join(name), text).expect("writable");
            }
            Fake(dir)
        }

        pub fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).unwrap_or_default()
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn bounds_are_written_as_the_kernel_reads_them() {
        let fake = Fake::new("bounds", &[]);
        let bounds = Bounds {
            memory_bytes: Some(32 << 20),
            processes: Some(20),
            cpu_percent: Some(150),
        };
        let dir = fake.0.clone();
        let key = AttemptKey([7; 16]);
        let leaf = Cgroups { dir, bounds }.make(key).expect("writable");
        let read = |name| leaf.read(name);
        assert_eq!(read("memory.max"), "33554432");
        assert_eq!(read("memory.oom.group"), "1");
        assert_eq!(read("pids.max"), "20");
        assert_eq!(read("cpu.max"), "150000 100000");
    }

    #[test]
    fn controllers_are_handed_down_or_missed_with_the_reason() {
        let fake = Fake::new("enable", &[("cgroup.controllers", "cpu memory\n")]);
        let tasks = fake.0.join("tasks");
        fs::create_dir(&tasks).expect("writable");
        enable_below(&fake.0, &tasks, "memory").expect("available");
        assert_eq!(fake.read("cgroup.subtree_control"), "+memory");
        assert_eq!(fake.read("tasks/cgroup.subtree_control"), "+memory");
        let why = enable_below(&fake.0, &tasks, "pids").expect_err("missing");
        assert!(
            why.contains("no controller `pids`") && why.contains("Delegate"),
            "{why}"
        );
    }

    #[test]
    fn the_use_and_the_kernels_kill_are_read() {
        let fake = Fake::new(
            "used",
            &[
                ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\n"),
                ("memory.peak", "4096\n"),
                ("memory.events", "low 0\noom 1\noom_kill 2\n"),
            ],
        );
        let used = Leaf(fake.0.clone()).used();
        let micros = Duration::from_micros;
        assert_eq!(used.user_and_system, Some((micros(20), micros(10))));
        assert_eq!(used.memory_peak_bytes, Some(4096));
        assert_eq!(used.out_of_memory, Some(true));
        assert_eq!(Leaf(fake.0.join("none")).used(), Used::default());
    }
}
