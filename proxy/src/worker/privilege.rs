//! Giving up every privilege, before anything is read from anybody.

use std::io;

use caps::{CapSet, CapsHashSet};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{Gid, Uid};

/// The user and group of a worker that is started by root: `nobody`, `nogroup`.
pub const NOBODY: u32 = 65534;

/// Why the worker refuses to run.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Credentials are a thread's own on Linux: with more threads some would keep theirs.
    #[error("{0} threads are running; privileges must be dropped before the second is started")]
    Threads(usize),
    /// A step failed.
    #[error("{step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Something is left after all steps.
    #[error("{0} capabilities are left in the {1} set")]
    Left(usize, &'static str),
    /// The kernel would let an executed file regain privileges.
    #[error("no_new_privs is not in force")]
    NewPrivileges,
}

/// Becomes an ordinary process for good: no capability in any set, user `nobody` if it was root, `no_new_privs`, no core
/// dump (there are keys in memory). Then verifies it.
///
/// # Errors
/// [`PrivilegeError`]; the caller must not go on.
pub fn drop_all() -> Result<(), PrivilegeError> {
    let step = |step| move |source: io::Error| PrivilegeError::Step { step, source };
    let threads = std::fs::read_dir("/proc/self/task").map_err(step("count threads"))?.count();
    if threads != 1 {
        return Err(PrivilegeError::Threads(threads));
    }
    let other = |error: caps::errors::CapsError| io::Error::other(error.to_string());
    let may_set = caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false);
    if may_set {
        caps::clear(None, CapSet::Bounding).map_err(other).map_err(step("clear the bounding set"))?;
    }
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        rustix::thread::set_thread_groups(&[]).map_err(io::Error::from).map_err(step("leave all groups"))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(io::Error::from).map_err(step("become nogroup"))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(io::Error::from).map_err(step("become nobody"))?;
    }
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(other).map_err(step("clear capabilities"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(io::Error::from).map_err(step("set no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .map_err(step("forbid core dumps"))?;
    verify(may_set)
}

fn verify(bounding_too: bool) -> Result<(), PrivilegeError> {
    let sets = [
        (CapSet::Ambient, "ambient", true),
        (CapSet::Inheritable, "inheritable", true),
        (CapSet::Effective, "effective", true),
        (CapSet::Permitted, "permitted", true),
        (CapSet::Bounding, "bounding", bounding_too), // only who had CAP_SETPCAP could clear it; useless with no_new_privs
    ];
    for (set, name, must_be_empty) in sets {
        let left: CapsHashSet = caps::read(None, set).map_err(|error| PrivilegeError::Step {
            step: "read capabilities",
            source: io::Error::other(error.to_string()),
        })?;
        if must_be_empty && !left.is_empty() {
            return Err(PrivilegeError::Left(left.len(), name));
        }
    }
    match rustix::thread::no_new_privs() {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err(PrivilegeError::NewPrivileges),
    }
}

/// Raises the limit of open descriptors as far as it may be raised without privilege. A connection needs two.
pub(crate) fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(limit.maximum)
}
