//! The data plane's own command line: Envoy's flags, a bootstrap file, one workload.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;

use crate::bootstrap::{Bootstrap, Command, HELP};
use crate::{log, sidecar};

/// Does what `args` (without the program's name) say, until it is done or told to end.
#[must_use]
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match dispatch(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    match Command::parse(args) {
        Ok(Command::Serve(args)) => {
            log::to_stderr(args.log_level.as_filter());
            sidecar::run(&args)
        }
        Ok(Command::Validate(args)) => {
            log::to_stderr("info");
            Bootstrap::read(&args.config_path)?;
            print(&format!("configuration '{}' OK\n", args.config_path.display()))
        }
        Ok(Command::Version) => print(&format!("culvert-proxy {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Help) => print(HELP),
        Err(error) => {
            log::to_stderr("info");
            Err(error.into())
        }
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("write to standard output")
}
