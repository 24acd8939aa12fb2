//! `hostlink-edge`: the agent for edge devices, and the tools to try it.

use std::process::ExitCode;

fn main() -> ExitCode {
    hostlink_edge::threads::bound_blocking_pool();
    ExitCode::from(hostlink_edge::cli::run(std::env::args_os().skip(1)))
}
