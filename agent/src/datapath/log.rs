//! Log lines of the kernel programs (`aya-log`): rare branches that no event tells of.
//!
//! They are in the programs only while their target, `culvert_ebpf`, is logged at `debug` when the programs are loaded: otherwise the
//! verifier sees that their level is off, and leaves them out.

use std::io;
use std::os::fd::AsFd as _;

use aya::Ebpf;
use aya_log::{EbpfLogger, Level};
use tokio::io::Interest;
use tokio::task::AbortHandle;
use tracing::{enabled, warn};

use crate::sys::watch;

/// Name of the level in the object.
pub(super) const LEVEL: &str = aya_log::LEVEL;
/// No line at all.
pub(super) const OFF: u8 = 0;

/// The level to load the programs with.
pub(super) fn level() -> u8 {
    if enabled!(target: "culvert_ebpf", tracing::Level::DEBUG) { Level::Debug as u8 } else { OFF }
}

/// Passes the lines of loaded programs on. Within a tokio runtime.
pub(super) fn follow(ebpf: &mut Ebpf) -> io::Result<AbortHandle> {
    let mut logger = EbpfLogger::init(ebpf).map_err(io::Error::other)?;
    let readiness = watch(logger.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
    let follow = async move {
        loop {
            logger.flush();
            if let Err(error) = readiness.readable().await.map(|mut ready| ready.clear_ready()) {
                return warn!(%error, "log lines of the kernel programs cannot be awaited any more");
            }
        }
    };
    Ok(tokio::spawn(follow).abort_handle())
}
