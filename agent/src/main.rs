//! The `culvert` command: every role of the product in one binary.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use culvert_agent::cli::{self, AgentArgs, Roles};
use culvert_agent::{config, node, task};
use culvert_proxy::log;

fn main() -> ExitCode {
    // Executors of tasks, and what they start, are this same binary; they must not see a runtime or a thread.
    if let Some(code) = task::executor::dispatch(std::env::args_os()) {
        return code;
    }
    cli::main(&Roles { agent, proxy: culvert_proxy::command::run, worker })
}

fn agent(args: AgentArgs) -> anyhow::Result<()> {
    let settings = config::load(&args)?;
    log::to_stderr(settings.log_level.as_str());
    node::run(settings, Box::new(move || Ok(config::load(&args)?)))
}

fn worker(_: Vec<OsString>) -> ExitCode {
    log::to_stderr(&std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()));
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    match control.map_err(anyhow::Error::from).and_then(culvert_proxy::worker::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
