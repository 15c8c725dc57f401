//! The data plane as a program of its own: a sidecar with Envoy's command line, or the node's worker.
//!
//! `culvert` contains the same; this binary is for who wants nothing else in an image.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::Context as _;
use culvert_proxy::bootstrap::{Bootstrap, Command, HELP};
use culvert_proxy::{sidecar, worker};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    if std::env::args_os().nth(1).as_deref() == Some(OsStr::new("worker")) {
        log(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")));
        let control =
            std::io::stdin().as_fd().try_clone_to_owned().context("the control socket has to be standard input")?;
        return worker::run(control);
    }
    match Command::parse(std::env::args_os().skip(1)) {
        Ok(Command::Serve(args)) => {
            log(EnvFilter::new(args.log_level.as_filter()));
            sidecar::run(&args)
        }
        Ok(Command::Validate(args)) => {
            log(EnvFilter::new("info"));
            Bootstrap::read(&args.config_path)?;
            print(&format!("configuration '{}' OK\n", args.config_path.display()))
        }
        Ok(Command::Version) => print(&format!("culvert-proxy {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Command::Help) => print(HELP),
        Err(error) => {
            log(EnvFilter::new("info"));
            Err(error.into())
        }
    }
}

fn log(filter: EnvFilter) {
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    std::io::stdout().write_all(text.as_bytes()).context("write to standard output")
}
