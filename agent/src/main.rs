//! The `culvert` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Executors of tasks are this same binary; they must not see a runtime or a thread.
    if let Some(code) = culvert_agent::task::executor::dispatch(std::env::args_os()) {
        return code;
    }
    ExitCode::FAILURE
}
