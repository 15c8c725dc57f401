//! Which process is meant: pids are used again, together with start time and boot they are not.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ProcessIdentity {
    /// The pid in the agent's pid namespace.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl ProcessIdentity {
    /// Reads the identity of `pid`.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { pid, start_time: start_time(pid)?, boot_id: boot_id()? })
    }

    /// Does this very process still exist (a zombie counts)?
    ///
    /// # Errors
    /// `/proc` cannot be read, for want of descriptors say: then it is not known.
    pub fn exists(&self) -> io::Result<bool> {
        if boot_id()? != self.boot_id {
            return Ok(false);
        }
        match start_time(self.pid) {
            Ok(start_time) => Ok(start_time == self.start_time),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A pidfd of exactly this process; `None` when it is gone.
    ///
    /// # Errors
    /// It is not known whether it is.
    pub(crate) fn open(&self) -> io::Result<Option<OwnedFd>> {
        // Asked before, too: of another process's thread that has the number by now no pidfd can be had.
        if !self.exists()? {
            return Ok(None);
        }
        let pidfd = match open_pidfd(self.pid) {
            Err(error) if is_gone(&error) => return Ok(None),
            pidfd => pidfd?,
        };
        // While the pidfd is held, the pid cannot come to mean another process.
        Ok(self.exists()?.then_some(pidfd))
    }

    /// Ends exactly this process by SIGKILL, if it still exists.
    ///
    /// # Errors
    /// It may live.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match self.open()?.map(|pidfd| pidfd_send_signal(pidfd, Signal::KILL)) {
            None | Some(Ok(()) | Err(Errno::SRCH)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// Waits until exactly this process has ended; a zombie has.
    ///
    /// # Errors
    /// When the runtime cannot watch the process.
    pub async fn ended(&self) -> io::Result<()> {
        match self.open()? {
            Some(pidfd) => end_of(&pidfd).await,
            None => Ok(()),
        }
    }
}

/// A pidfd of whatever has this pid.
pub(super) fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until the process has ended, and buries it if this process is its parent.
pub(super) async fn end_of(pidfd: &OwnedFd) -> io::Result<()> {
    let watched = crate::sys::watch(pidfd.try_clone()?, Interest::READABLE)?;
    let _ready = watched.readable().await?;
    // After an adoption somebody else is its parent.
    if let Err(error) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        tracing::trace!(%error, "a process is not ours to reap");
    }
    Ok(())
}

/// What changes with every boot of the host.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat: {stat:?}")))
}

/// Field 22; the name in field 2 may hold anything, so counting starts after its closing parenthesis.
fn parse_start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// `ESRCH` is what `/proc` says of a process that ends while it is read.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(error) == Some(Errno::SRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_hostile_name() {
        let tail = "S 1 2 3 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1000 200";
        assert_eq!(parse_start_time(&format!("42 (a) b) R 1) {tail}")), Some(987_654));
        assert_eq!(parse_start_time("42 (cut) S 1 2"), None);
        assert_eq!(parse_start_time(""), None);
    }

    #[test]
    fn this_process_exists_and_an_older_one_of_its_pid_does_not() {
        let own = ProcessIdentity::of(std::process::id()).expect("this process");
        assert!(own.exists().expect("known"));
        assert!(!ProcessIdentity { start_time: own.start_time - 1, ..own.clone() }.exists().expect("known"));
        assert!(!ProcessIdentity { boot_id: "another boot".into(), ..own }.exists().expect("known"));
    }

    #[test]
    fn a_thread_that_has_the_number_of_a_process_of_old_is_not_that_process() {
        let (tell, told) = std::sync::mpsc::channel();
        let (_stay, left) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get()).expect("heard");
            left.recv().expect_err("nobody says anything");
        });
        let number = told.recv().expect("its number").unsigned_abs();
        let own = ProcessIdentity::of(std::process::id()).expect("this process");
        let of_old = ProcessIdentity { pid: number, start_time: own.start_time - 1, ..own };
        assert!(of_old.open().expect("known").is_none());
        of_old.kill().expect("nobody to end");
        drop(_stay);
        thread.join().expect("no panic");
    }
}
