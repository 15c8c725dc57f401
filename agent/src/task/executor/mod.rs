//! The executor: one small process per task that outlives the agent, and the stage that becomes the task.
//!
//! Both are the agent's own binary under another first argument. They run before any runtime or thread exists, single
//! threaded, and open no socket. What they exchange:
//!
//! * agent → executor, stdin: the [`TaskSpec`](crate::task::TaskSpec) as JSON (its environment may hold secrets);
//! * executor → agent, stdout: one [`StartReply`], then nothing;
//! * executor ↔ stage: a socket pair as the stage's stdin: [`protocol::StageSpec`] down, [`protocol::StageReply`] up;
//! * executor → whoever reads: `<task>/executor.json` before the task exists, `<task>/exit.json` after it ended.
//!
//! A task never outlives its executor: the kernel kills the stage, and with `exec` the whole pid namespace, when the
//! executor dies (PR_SET_PDEATHSIG).

mod privileges;
mod protocol;
mod sandbox;
mod stage;
mod supervise;

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

pub(crate) use privileges::TaskUser;
pub(crate) use protocol::StartReply;

/// First argument of an executor.
const EXECUTOR: &str = "executor";
/// First argument of a stage.
const STAGE: &str = "executor-stage";

/// Runs the executor or the stage when `args` (with the program's name) ask for one; `None` for any other command. A
/// binary that starts tasks calls this first in `main`, before it makes a thread.
pub fn dispatch(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let role = args.into_iter().nth(1)?;
    if role == OsStr::new(EXECUTOR) {
        Some(supervise::run())
    } else if role == OsStr::new(STAGE) {
        Some(stage::run())
    } else {
        None
    }
}
