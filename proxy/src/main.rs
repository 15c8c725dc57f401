//! The data plane as a program of its own: a sidecar with Envoy's command line, or (first argument `worker`) the node's worker.
//!
//! `culvert proxy` and `culvert worker` are the same; this binary is for who wants nothing else in an image.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::Context as _;
use culvert_proxy::{command, log, worker};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).as_deref() != Some(OsStr::new("worker")) {
        return command::run(std::env::args_os().skip(1));
    }
    log::to_stderr(&std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()));
    match run_worker() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The control socket is standard input; the next argument, if any, is where to call when the agent is gone.
fn run_worker() -> anyhow::Result<()> {
    let control =
        std::io::stdin().as_fd().try_clone_to_owned().context("the control socket has to be standard input")?;
    match std::env::args().nth(2) {
        Some(adoption) => worker::run_calling(control, &adoption),
        None => worker::run(control),
    }
}
