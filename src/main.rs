//! `hostlink-edge`: the agent for edge devices, and the tools to try it.

use std::process::ExitCode;

use hostlink_edge::heap::Heap;

#[global_allocator]
static HEAP: Heap = Heap;

fn main() -> ExitCode {
    hostlink_edge::threads::bound_blocking_pool();
    ExitCode::from(hostlink_edge::cli::run(std::env::args_os().skip(1)))
}
