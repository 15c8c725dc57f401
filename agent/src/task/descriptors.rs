//! The limit of open descriptors: the agent's own is as high as it may be, its tasks keep the one that the agent was started with.
//!
//! The agent holds every listener of the node, and while it takes over a worker all of them come at once. Tasks are not given as
//! many: programs that use select(2), or close all that they might have inherited, are not made for that.

use std::io;
use std::sync::OnceLock;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// The limit before it was raised.
static BEFORE: OnceLock<Rlimit> = OnceLock::new();

/// Raises this process's limit as far as it may be raised without privilege; returns it, `None` for no limit.
///
/// # Errors
/// Of setrlimit(2); the limit is as before then.
pub fn raise() -> io::Result<Option<u64>> {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: before.maximum, maximum: before.maximum };
    setrlimit(Resource::Nofile, raised)?;
    BEFORE.get_or_init(|| before);
    Ok(raised.current)
}

/// Gives the child `pid` the limit from before [`raise`].
pub(super) fn restore(pid: u32) -> io::Result<()> {
    let Some(before) = BEFORE.get() else { return Ok(()) };
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    prlimit(Some(pid), Resource::Nofile, *before)?;
    Ok(())
}
