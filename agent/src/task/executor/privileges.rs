//! Who a task runs as, and giving up everything else for good.

use caps::CapSet;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, User, getegid, geteuid, initgroups, setgroups, setresgid, setresuid};

use super::protocol::Words as _;
use crate::task::spec::Driver;

/// The user of `exec` tasks that name none.
const DEFAULT_USER: &str = "nobody";
/// Its number where the host's user database does not know it (the kernel's overflow uid).
const OVERFLOW_ID: u32 = 65_534;

/// A resolved user.
pub(crate) struct TaskUser {
    /// User.
    pub(crate) uid: u32,
    /// Primary group.
    pub(crate) gid: u32,
    /// Name, home and shell from the user database, where known.
    entry: Option<User>,
}

impl TaskUser {
    /// Resolves a name or a number for `driver`.
    ///
    /// # Errors
    /// In words: unknown user, or root for `exec`.
    pub(crate) fn resolve(driver: Driver, user: Option<&str>) -> Result<Self, String> {
        let user = match (driver, user) {
            (Driver::RawExec, None) => {
                return Ok(Self { uid: geteuid().as_raw(), gid: getegid().as_raw(), entry: None });
            }
            (Driver::Exec, None) => DEFAULT_USER,
            (_, Some(user)) => user,
        };
        let entry = match user.parse::<u32>() {
            Ok(number) => User::from_uid(Uid::from_raw(number)),
            Err(_) => User::from_name(user),
        };
        let entry = entry.words(format_args!("look up user {user:?}"))?;
        let (uid, gid) = match (&entry, user.parse::<u32>()) {
            (Some(entry), _) => (entry.uid.as_raw(), entry.gid.as_raw()),
            (None, Ok(number)) => (number, number),
            (None, Err(_)) if user == DEFAULT_USER => (OVERFLOW_ID, OVERFLOW_ID),
            (None, Err(_)) => return Err(format!("unknown user {user:?}")),
        };
        if driver == Driver::Exec && (uid == 0 || gid == 0) {
            return Err(format!("running as user {user:?} is disallowed"));
        }
        Ok(Self { uid, gid, entry })
    }

    /// `raw_exec` with a `user`: becomes that user as a login would, with its groups. The agent's own user changes nothing.
    pub(super) fn become_user(&self) -> Result<(), String> {
        if self.uid == geteuid().as_raw() {
            return Ok(());
        }
        match &self.entry {
            Some(entry) => {
                let name = std::ffi::CString::new(entry.name.as_str()).map_err(|error| error.to_string())?;
                initgroups(&name, Gid::from_raw(self.gid)).words("set supplementary groups")?;
            }
            None => setgroups(&[]).words("clear supplementary groups")?,
        }
        self.set_ids()
    }

    /// `exec`: becomes the user without groups, capabilities or any way to get more.
    pub(super) fn confine(&self) -> Result<(), String> {
        // The bounding set first: dropping from it needs a capability that the change of user takes away.
        caps::clear(None, CapSet::Bounding).map_err(|error| format!("empty the bounding set: {error}"))?;
        if caps::runtime::ambient_set_supported().is_ok() {
            caps::clear(None, CapSet::Ambient).map_err(|error| format!("empty the ambient set: {error}"))?;
        }
        setgroups(&[]).words("clear supplementary groups")?;
        self.set_ids()?;
        for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
            caps::clear(None, set).map_err(|error| format!("empty the {set:?} set: {error}"))?;
        }
        prctl::set_no_new_privs().words("set no_new_privs")?;
        // A session keyring is inherited: root's keys are not for the task.
        crate::sys::new_session_keyring().words("leave root's session keyring")?;
        verify_no_capabilities()
    }

    fn set_ids(&self) -> Result<(), String> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        setresgid(gid, gid, gid).words(format_args!("set gid {gid}"))?;
        setresuid(uid, uid, uid).words(format_args!("set uid {uid}"))
    }
}

/// The kernel may know capabilities that this program does not: asks it, and refuses to go on with any.
fn verify_no_capabilities() -> Result<(), String> {
    let status = std::fs::read_to_string("/proc/self/status").words("read /proc/self/status")?;
    let sets: Vec<&str> = status.lines().filter(|line| line.starts_with("Cap")).collect();
    let empty = |line: &&str| line.split_once(':').is_some_and(|(_, bits)| bits.trim().bytes().all(|bit| bit == b'0'));
    if sets.len() >= 4 && sets.iter().all(empty) {
        Ok(())
    } else {
        Err(format!("capabilities are left after dropping all: {}", sets.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_defaults_to_nobody_and_refuses_root_by_any_name() {
        let nobody = TaskUser::resolve(Driver::Exec, None).expect("the default user");
        assert_ne!((nobody.uid, nobody.gid), (0, 0));
        for root in ["root", "0"] {
            let refused = TaskUser::resolve(Driver::Exec, Some(root)).map(|user| user.uid);
            assert_eq!(refused, Err(format!("running as user {root:?} is disallowed")));
        }
        assert!(TaskUser::resolve(Driver::Exec, Some("no-such-user-here")).is_err());
    }

    #[test]
    fn raw_exec_defaults_to_the_agents_user() {
        let user = TaskUser::resolve(Driver::RawExec, None).expect("this user");
        assert_eq!(user.uid, geteuid().as_raw());
    }
}
