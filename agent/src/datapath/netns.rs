//! Work inside another network namespace, on a thread of its own: a thread that has changed its namespace is never used again.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use socket2::{Domain, Socket, Type};

use crate::sys;

/// Runs `work` in the network namespace `netns` and returns what it returns.
///
/// # Errors
/// When the thread cannot be made or cannot enter the namespace.
pub(super) fn enter<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    on_thread(|| setns(netns, CloneFlags::CLONE_NEWNET), work)
}

/// Runs `work` in a new network namespace, which ends with it.
///
/// # Errors
/// When the thread or the namespace cannot be made.
pub(super) fn enter_new<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    on_thread(|| unshare(CloneFlags::CLONE_NEWNET), work)
}

fn on_thread<T: Send>(
    change: impl FnOnce() -> nix::Result<()> + Send,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            change()?;
            Ok(work())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The cookie of the network namespace `netns`.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel is older than 5.14.
pub(super) fn cookie(netns: BorrowedFd<'_>) -> io::Result<u64> {
    enter(netns, || sys::netns_cookie(&Socket::new(Domain::UNIX, Type::STREAM, None)?))?
}
