//! The agent's only unsafe code: system calls that no safe wrapper offers.
//!
//! Everything else (namespaces, mounts, credentials, signals) goes through `nix`, `rustix` and `caps`.

#![allow(unsafe_code, reason = "the one place of the agent that may call the kernel without a wrapper")]

pub(crate) mod bpf;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The cookie of the network namespace that `socket` was made in: the key by which eBPF programs know it.
///
/// # Errors
/// `ENOPROTOOPT` on kernels before 5.14 (`SO_NETNS_COOKIE`).
pub(crate) fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).expect("eight bytes");
    // SAFETY: the descriptor is borrowed for the call; `cookie` is 8 writable bytes, as `length` says, and both outlive
    // the call; the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// `KEYCTL_JOIN_SESSION_KEYRING` of keyctl(2).
const JOIN_SESSION_KEYRING: libc::c_int = 1;

/// Gives the calling thread a new, empty session keyring. A kernel without keyrings has none to leave.
///
/// # Errors
/// `EDQUOT`, `ENOMEM`: the kernel cannot make one.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    // SAFETY: the operation takes a name or NULL; NULL makes an anonymous keyring and reads no memory of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
            0_usize,
            0_usize,
            0_usize,
        )
    };
    if result >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

/// Marks every open descriptor from `first` on as close-on-exec, so that a program started next inherits none that a library
/// forgot to mark. Best effort: kernels before 5.11 do not know it.
pub(crate) fn close_on_exec_from(first: u32) {
    // SAFETY: CLOSE_RANGE_CLOEXEC only sets a flag on descriptors; none is closed, so no owner loses one.
    let result = unsafe { libc::close_range(first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    if result != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "close_range is not available");
    }
}

/// Watches `fd` with the current tokio runtime.
///
/// # Errors
/// When the descriptor cannot be polled (a regular file).
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor all its life, and the `AsyncFd` owns it: it is deregistered
    // before it is closed.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Resets every signal to its default action. Ignored ones stay ignored over exec(2), and an agent started in the background
/// by a script ignores SIGINT: its tasks must not. What is blocked stays blocked.
pub(crate) fn default_signal_actions() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no handler, so no code of ours can run in a signal's context. The numbers that cannot be
        // set (SIGKILL, SIGSTOP, those of the C library) are refused with EINVAL, which changes nothing.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Makes `command` start with no signal blocked, whatever the calling thread blocks: the mask is inherited.
pub(crate) fn unblock_signals(command: &mut Command) {
    let unblock = || Ok(nix::sys::signal::SigSet::empty().thread_set_mask()?);
    // SAFETY: between fork and exec only async-signal-safe work is allowed; this is one system call, without allocation.
    unsafe { command.pre_exec(unblock) };
}
