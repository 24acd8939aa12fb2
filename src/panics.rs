//! What a panic does. It is a bug, and nobody knows what it has left half done: the agent ends at once
//! and is started again by whoever looks after it, which loses nothing. Left alone, an executor keeps
//! the panic of a task for whoever awaits that task, mostly nobody, and the agent would live on without
//! a part of itself.
//!
//! sled panics on damaged files. In calls that are [`guarded`] that is an error like any other, and in
//! threads of its own it ends those alone.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

thread_local! {
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What was called has panicked. Its message went to stderr.
#[derive(Debug)]
pub struct Panicked;

/// Calls what may panic on damaged data.
pub fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, Panicked> {
    let outer = IS_GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    IS_GUARDED.set(outer);
    result.map_err(|_| Panicked)
}

/// From now on a panic of one of our own threads ends the process.
pub fn end_the_process() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if !IS_GUARDED.get() && is_ours(thread::current().name()) {
            std::process::abort();
        }
    }));
}

/// `main`, the storage thread, and those of the pool for blocking calls.
fn is_ours(name: Option<&str>) -> bool {
    name.is_some_and(|name| name == "main" || name == "outbox" || name.starts_with("blocking-"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use smol::LocalExecutor;

    use super::*;

    const THREAD: &str = "HOSTLINK_PANICS_IN";

    /// What becomes of a process in which a task panics that nobody awaits, in a thread of this name.
    fn after_a_panic_in(thread: &str) -> ExitStatus {
        let own = std::env::current_exe().expect("this test has a file");
        let mut child = Command::new(own);
        child.args(["--exact", "panics::tests::in_a_process_of_its_own"]);
        let output = child.env(THREAD, thread).output().expect("it runs");
        output.status
    }

    #[test]
    fn in_a_process_of_its_own() {
        let Ok(name) = std::env::var(THREAD) else {
            return;
        };
        end_the_process();
        let panicking = thread::Builder::new().name(name.clone()).spawn(|| {
            assert!(guarded(|| panic!("expected")).is_err());
            let executor = LocalExecutor::new();
            executor.spawn(async { panic!("a bug") }).detach();
            while executor.try_tick() {}
        });
        let survived = panicking.expect("a thread").join();
        assert!(survived.is_ok(), "the executor keeps the panic");
    }

    #[test]
    fn a_panic_of_a_task_ends_the_process() {
        const SIGABRT: i32 = 6;
        for thread in ["outbox", "blocking-1"] {
            assert_eq!(after_a_panic_in(thread).signal(), Some(SIGABRT), "{thread}");
        }
    }

    #[test]
    fn a_thread_of_the_index_ends_alone() {
        assert_eq!(after_a_panic_in("sled-io-1").code(), Some(0));
    }
}
