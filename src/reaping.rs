//! Collects a child that has exited, with what it has used. One of the places with `unsafe`:
//! neither the standard library nor rustix has `wait4`. libc has, but on 32-bit devices with musl
//! its `wait4` is the one of 32-bit times, and that one fills in nothing: all tasks would have used
//! no time and no memory. So the declaration stands here, with the layout that the C library has.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_long};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// Times in `struct rusage`: musl has 64 bits for them everywhere, glibc a `long`.
#[cfg(target_env = "musl")]
type Time = i64;
#[cfg(not(target_env = "musl"))]
type Time = c_long;

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct TimeValue {
    seconds: Time,
    microseconds: Time,
}

/// `struct rusage`, and the room for later fields that musl has behind it.
#[repr(C)]
#[derive(Default)]
struct ResourceUsage {
    user: TimeValue,
    system: TimeValue,
    max_resident_kib: c_long,
    others: [c_long; 13],
    reserved: [c_long; 16],
}

unsafe extern "C" {
    // The name of the call with 64-bit times, where musl has an older one under the plain name.
    #[cfg_attr(
        all(
            target_env = "musl",
            target_pointer_width = "32",
            not(target_arch = "riscv32")
        ),
        link_name = "__wait4_time64"
    )]
    fn wait4(pid: c_int, status: *mut c_int, options: c_int, usage: *mut ResourceUsage) -> c_int;
}

/// What a process and those of its descendants that it has waited for have used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    pub user: Duration,
    pub system: Duration,
    /// The most that one of them had resident, the agent's own memory included until the task's
    /// program was loaded: the kernel counts a child from its creation.
    pub memory_peak_bytes: u64,
}

/// Waits until a child has exited and collects it.
///
/// # Errors
///
/// There is no such child, or it is collected already.
pub fn collect(child: u32) -> io::Result<(ExitStatus, Used)> {
    let pid = c_int::try_from(child).map_err(io::Error::other)?;
    let (mut status, mut usage) = (0, ResourceUsage::default());
    loop {
        // SAFETY: both pointers are to values that live through the call and have the layout that
        // the C library of this target writes; `ResourceUsage` is no smaller than its structure.
        match unsafe { wait4(pid, &raw mut status, 0, &raw mut usage) } {
            0.. => break,
            _ => {
                let why = io::Error::last_os_error();
                if why.kind() != io::ErrorKind::Interrupted {
                    return Err(why);
                }
            }
        }
    }
    let used = Used {
        user: usage.user.into(),
        system: usage.system.into(),
        memory_peak_bytes: u64::try_from(usage.max_resident_kib).unwrap_or(0) * 1024,
    };
    Ok((ExitStatus::from_raw(status), used))
}

impl From<TimeValue> for Duration {
    fn from(time: TimeValue) -> Duration {
        let seconds = Duration::from_secs(time.seconds.try_into().unwrap_or(0));
        seconds + Duration::from_micros(time.microseconds.try_into().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A child's peak counts from its creation, when it still shares the memory of its parent.
    fn own_peak_bytes() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("own status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|text| text.trim().strip_suffix(" kB"));
        kib.expect("a size").parse::<u64>().expect("a number") * 1024
    }

    #[test]
    fn status_time_and_memory_come_with_the_child() {
        // A shell that counts, until it has used a tenth of a second.
        let script = "while :; do
                read -r _ _ _ _ _ _ _ _ _ _ _ _ _ user rest </proc/self/stat
                [ \"$user\" -lt 10 ] || exit 7
                i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done
            done";
        let child = Command::new("/bin/sh").args(["-c", script]).spawn();
        let id = child.expect("a shell").id();
        let (status, used) = collect(id).expect("a child");
        assert_eq!(status.code(), Some(7));
        assert!(used.user >= Duration::from_millis(90), "{used:?}");
        assert!(
            used.user + used.system < Duration::from_secs(30),
            "{used:?}"
        );
        let plausible = 100 * 1024..own_peak_bytes() + 64 * 1024 * 1024;
        assert!(plausible.contains(&used.memory_peak_bytes), "{used:?}");
        let again = collect(id).expect_err("collected already");
        assert_eq!(again.raw_os_error(), Some(10), "ECHILD: {again}");
    }
}
