//! The data plane as a program of its own: a sidecar with Envoy's command line.
//!
//! `culvert proxy` is the same; this binary is for who wants nothing else in an image.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    culvert_proxy::command::run(std::env::args_os().skip(1))
}
