//! One of the places with `unsafe`: the pool for blocking calls can only be bounded by an environment
//! variable, and setting one is unsound once other threads read the environment.

#![allow(unsafe_code)]

/// Name resolution, reading identity files: never more than a few at once. The pool's own bound
/// is 500 threads.
const BLOCKING_THREADS_MAX: &str = "4";

/// Bounds the pool for blocking calls. To be called first in `main`, before any thread exists.
pub fn bound_blocking_pool() {
    // SAFETY: `main` calls this before it starts any thread, so nobody reads the environment now.
    unsafe { std::env::set_var("BLOCKING_MAX_THREADS", BLOCKING_THREADS_MAX) }
}
