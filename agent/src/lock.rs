//! One agent for whatever an agent takes for its own.
//!
//! The bridge and the nftables table are of a network namespace, and so is their lock: an abstract unix socket. Who finds it
//! taken asks it who is running. Named network namespaces are of a mount namespace, cgroups and pins of the host: an agent of
//! another network namespace finds them, and would remove what no record of its own names. Each has an flock ([`places`]).
//! The kernel drops all of them with the process, also on `kill -9`; children do not inherit them (close-on-exec).

mod places;

use std::io::{Read as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::warn;

pub(crate) use places::{Place, Places};

/// Abstract name of the lock.
const NAME: &[u8] = b"culvert/agent";
/// How long a running agent may take to say who it is.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long a process may hold the name that does not answer: one that was killed holds it until the kernel has taken it down.
const SILENT_FOR: Duration = Duration::from_secs(2);
/// Pause between two attempts meanwhile.
const SILENT_PAUSE: Duration = Duration::from_millis(20);
/// Longest answer that is read.
const MAX_ANSWER: u64 = 4096;

/// Who holds the lock.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Holder {
    /// Process id, in the holder's pid namespace.
    pub pid: u32,
    /// Where the holder keeps its state.
    pub data_dir: PathBuf,
    /// When it started: seconds since 1970.
    pub started: u64,
}

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another agent runs in this network namespace.
    #[error(
        "another culvert agent is running here: pid {}, data directory {}; stop it with `culvert leave`, or use its API",
        .0.pid, .0.data_dir.display()
    )]
    Running(Holder),
    /// Something holds the name but does not say who it is.
    #[error(
        "the name @culvert/agent is taken by a process that does not answer as an agent: end it; `ss -xlp` shows which it is"
    )]
    Silent,
    /// The socket could not be made.
    #[error("take the agent lock @culvert/agent")]
    Socket(#[source] std::io::Error),
    /// An agent of another network namespace uses what this one would use.
    #[error(
        "{} {} is used by another culvert agent, of another network namespace{who}: each would remove what the other one \
         runs; stop that one with `culvert leave` where it runs, or {}",
        place.what(), path.display(), place.instead()
    )]
    Used {
        /// What it is.
        place: Place,
        /// Where.
        path: PathBuf,
        /// Who that is, as far as it can be told; with a comma before it.
        who: String,
    },
    /// A lock that cannot be taken.
    #[error("lock {} {}", place.what(), path.display())]
    Place {
        /// What it is.
        place: Place,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Takes the lock of the network namespace until this process ends, for an agent that keeps its state in `data_dir`. A thread
/// of its own answers who holds it.
///
/// # Errors
/// [`LockError::Running`] with the holder when another agent runs in this network namespace.
pub(crate) fn take(data_dir: &Path, started: u64) -> Result<Holder, LockError> {
    let address = SocketAddr::from_abstract_name(NAME).map_err(LockError::Socket)?;
    let listener = listen(&address)?;
    let holder = Holder { pid: std::process::id(), data_dir: data_dir.to_owned(), started };
    let told = holder.clone();
    std::thread::Builder::new()
        .name("agent-lock".into())
        .spawn(move || answer(&listener, &told))
        .map_err(LockError::Socket)?;
    Ok(holder)
}

fn listen(address: &SocketAddr) -> Result<UnixListener, LockError> {
    let start = Instant::now();
    loop {
        match UnixListener::bind_addr(address) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => match ask(address) {
                LockError::Silent if start.elapsed() < SILENT_FOR => std::thread::sleep(SILENT_PAUSE),
                taken => return Err(taken),
            },
            Err(error) => return Err(LockError::Socket(error)),
        }
    }
}

fn ask(address: &SocketAddr) -> LockError {
    let holder = || -> std::io::Result<Holder> {
        let stream = UnixStream::connect_addr(address)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        let mut text = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut text)?;
        Ok(serde_json::from_str(&text)?)
    };
    holder().map_or(LockError::Silent, LockError::Running)
}

fn answer(listener: &UnixListener, holder: &Holder) {
    let text = serde_json::to_vec(holder).expect("a holder is plain data");
    for stream in listener.incoming() {
        let told = stream.and_then(|mut stream| {
            stream.set_write_timeout(Some(ANSWER_WITHIN))?;
            stream.write_all(&text)
        });
        if let Err(error) = told {
            warn!(%error, "could not tell another agent who holds the lock");
            std::thread::sleep(Duration::from_millis(50)); // an error that repeats must not spin
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_one_that_is_being_taken_down_is_waited_for() {
        let address = SocketAddr::from_abstract_name(format!("culvert/test-{}", std::process::id())).expect("a name");
        let dying = UnixListener::bind_addr(&address).expect("free");
        std::thread::scope(|scope| {
            let next = scope.spawn(|| listen(&address));
            drop(dying.accept().expect("asked who it is")); // without an answer
            drop(dying);
            next.join().expect("no panic").expect("free again");
        });
    }
}
