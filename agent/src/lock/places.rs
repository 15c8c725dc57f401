//! Locks of what agents of several network namespaces can share.
//!
//! Whoever may open a file or a directory, for reading alone, may lock it: what the agent makes here, others may not open. Else
//! any user could keep the next agent from starting.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, major, minor};
use tracing::{debug, warn};

use super::{Holder, LockError, MAX_ANSWER};

/// How often a place is opened again that was replaced while it was being locked.
const ATTEMPTS: usize = 8;

/// What is locked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// The named network namespaces, by a file beside their directory: that one itself is locked by `ip netns`.
    Netns,
    /// The cgroup below which tasks run.
    Cgroup,
    /// The directory of pins.
    Pins,
    /// The data directory: the state store has a lock of its own, but with `-dev` there is none.
    Data,
}

impl Place {
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Netns => "the network namespaces in /run/netns, locked by",
            Self::Cgroup => "the cgroup",
            Self::Pins => "the directory of kernel programs",
            Self::Data => "the data directory",
        }
    }

    pub(super) fn instead(self) -> &'static str {
        match self {
            Self::Netns => "start this one in a mount namespace with a /run of its own",
            Self::Cgroup => "set another cgroup_parent",
            Self::Pins => "set another ebpf.bpf_dir",
            Self::Data => "set another data_dir",
        }
    }
}

/// The locks that this agent holds. Dropped when the agent ends in order: it removes its lock file then.
#[derive(Debug)]
pub(crate) struct Places {
    holder: Holder,
    held: Vec<(PathBuf, File)>,
    lock_file: Option<PathBuf>,
    /// A cgroup that was made to be locked: it goes again if nothing comes of the start.
    made: Option<PathBuf>,
}

impl Places {
    /// No lock yet, for the agent `holder`.
    pub(crate) fn new(holder: Holder) -> Self {
        Self { holder, held: Vec::new(), lock_file: None, made: None }
    }

    /// Locks the named network namespaces by a file, which says who holds it.
    ///
    /// # Errors
    /// [`LockError::Used`] with the holder.
    pub(crate) fn take_file(&mut self, path: &Path) -> Result<(), LockError> {
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let mut file = self.lock(Place::Netns, path, || open().and_then(make_private))?;
        let text = serde_json::to_vec(&self.holder).expect("a holder is plain data");
        if let Err(error) = file.set_len(0).and_then(|()| file.write_all(&text)) {
            warn!(%error, path = %path.display(), "another agent that finds the lock taken will not know by whom");
        }
        self.held.push((path.to_owned(), file));
        self.lock_file = Some(path.to_owned());
        Ok(())
    }

    /// Locks the cgroup of all tasks, which is made if need be.
    ///
    /// # Errors
    /// [`LockError::Used`].
    pub(crate) fn take_cgroup(&mut self, path: &Path) -> Result<(), LockError> {
        let missing = !path.exists();
        // Others may pass through to what is below.
        let open = || DirBuilder::new().recursive(true).mode(0o711).create(path).and_then(|()| File::open(path));
        let file = self.lock(Place::Cgroup, path, || open().and_then(make_private))?;
        self.held.push((path.to_owned(), file));
        self.made = missing.then(|| path.to_owned());
        Ok(())
    }

    /// Locks a directory as it is now, if there is one: also one that took the place of the one that was locked before.
    ///
    /// # Errors
    /// [`LockError::Used`].
    pub(crate) fn take_directory(&mut self, place: Place, path: &Path) -> Result<(), LockError> {
        if self.held.iter().any(|(held, file)| held == path && is_at(file, path)) {
            return Ok(());
        }
        match self.lock(place, path, || File::open(path)) {
            Ok(file) => self.held.push((path.to_owned(), file)),
            Err(LockError::Place { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// From now on there may be something in what was made.
    pub(crate) fn in_use(&mut self) {
        self.made = None;
    }

    fn lock(&self, place: Place, path: &Path, open: impl Fn() -> io::Result<File>) -> Result<File, LockError> {
        let failed = |source| LockError::Place { place, path: path.to_owned(), source };
        for _ in 0..ATTEMPTS {
            let file = open().map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_at(&file, path) => return Ok(file),
                // Its holder has ended, and removed it.
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(LockError::Used { place, path: path.to_owned(), who: who(&file) });
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
        Err(failed(io::Error::other("it is replaced again and again")))
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        if let Some(path) = &self.made
            && let Err(error) = fs::remove_dir(path)
        {
            debug!(%error, path = %path.display(), "cgroup stays");
        }
        if let Some(path) = &self.lock_file
            && let Err(error) = fs::remove_file(path)
        {
            warn!(%error, path = %path.display(), "the lock file stays; nobody holds it");
        }
    }
}

/// The mode at creation says nothing of what was there, made by an earlier version.
fn make_private(file: File) -> io::Result<File> {
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o066 != 0 {
        file.set_permissions(Permissions::from_mode(mode & !0o066))?;
    }
    Ok(file)
}

/// Is `file` what one finds at `path`?
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (file, path) = (file.metadata().map(identity), fs::metadata(path).map(identity));
    matches!((file, path), (Ok(file), Ok(path)) if file == path)
}

/// Who holds the lock of `file`: by the kernel's list of locks, and by what the file says. One that was killed may have written
/// that: the list is right then.
fn who(file: &File) -> String {
    let mut text = String::new();
    let said = file.take(MAX_ANSWER).read_to_string(&mut text).ok().and_then(|_| serde_json::from_str(&text).ok());
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let holder = file.metadata().ok().and_then(|metadata| holder_in(&locks, &metadata));
    match (holder, said) {
        (holder, Some(Holder { pid, data_dir, .. })) if holder.is_none_or(|holder| holder == pid) => {
            format!(", pid {pid}, data directory {}", data_dir.display())
        }
        (Some(pid), _) => format!(", pid {pid}"),
        (None, _) => String::new(),
    }
}

/// The process that holds an flock of this file, of the lines of `/proc/locks` (proc_locks(5)).
fn holder_in(locks: &str, file: &fs::Metadata) -> Option<u32> {
    let identity = format!("{:02x}:{:02x}:{}", major(file.dev()), minor(file.dev()), file.ino());
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_flock = fields.next() == Some("FLOCK");
        let pid = fields.nth(2)?.parse().ok()?;
        let locked = fields.next()? == identity;
        (is_flock && locked).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(data_dir: &Path) -> Places {
        Places::new(Holder { pid: std::process::id(), data_dir: data_dir.to_owned(), started: 0 })
    }

    #[test]
    fn who_comes_second_learns_who_was_first_and_what_to_do() {
        let folder = tempfile::tempdir().expect("a directory");
        let (file, data) = (folder.path().join("culvert.lock"), folder.path().join("data"));
        fs::create_dir(&data).expect("a directory");
        let (mut first, mut second) = (places(&data), places(folder.path()));
        first.take_file(&file).expect("free");
        first.take_directory(Place::Data, &data).expect("free");
        first.take_directory(Place::Data, &data).expect("its own");
        let pid = std::process::id();
        let refused = second.take_file(&file).expect_err("taken").to_string();
        assert!(refused.contains(&format!(", pid {pid}, data directory {}:", data.display())), "{refused}");
        let refused = second.take_directory(Place::Data, &data).expect_err("taken").to_string();
        assert!(refused.contains(&format!(", pid {pid}:")) && refused.contains("set another data_dir"), "{refused}");
        drop(second);
        assert!(file.exists(), "the file of another one stays");
        drop(first);
        assert!(!file.exists(), "removed with its holder");
        places(&data).take_directory(Place::Data, &data).expect("free again");
    }

    #[test]
    fn others_may_not_open_what_is_locked() {
        let folder = tempfile::tempdir().expect("a directory");
        let (file, cgroup) = (folder.path().join("culvert.lock"), folder.path().join("culvert"));
        let mode = |path: &Path| fs::metadata(path).expect("made").permissions().mode() & 0o777;
        for _ in 0..2 {
            let mut places = places(folder.path());
            places.take_file(&file).expect("free");
            places.take_cgroup(&cgroup).expect("free");
            assert_eq!([mode(&file), mode(&cgroup)], [0o600, 0o711]);
            drop(places);
            // As an earlier version left them.
            fs::write(&file, "").expect("a file");
            fs::set_permissions(&file, Permissions::from_mode(0o644)).expect("its own");
            fs::create_dir_all(&cgroup).expect("a directory");
            fs::set_permissions(&cgroup, Permissions::from_mode(0o755)).expect("its own");
        }
    }

    #[test]
    fn what_a_killed_agent_wrote_is_not_taken_for_the_holder() {
        let folder = tempfile::tempdir().expect("a directory");
        let file = folder.path().join("culvert.lock");
        let killed = Holder { pid: u32::MAX, data_dir: "/killed".into(), started: 0 };
        fs::write(&file, serde_json::to_vec(&killed).expect("plain data")).expect("a file");
        let holder = File::open(&file).expect("made");
        flock(&holder, FlockOperation::NonBlockingLockExclusive).expect("free");
        let refused = places(folder.path()).take_file(&file).expect_err("taken").to_string();
        assert!(refused.contains(&format!(", pid {}:", std::process::id())), "{refused}");
    }

    #[test]
    fn a_directory_that_was_made_anew_is_locked_again() {
        let folder = tempfile::tempdir().expect("a directory");
        let pins = folder.path().join("pins");
        let (mut first, mut second) = (places(folder.path()), places(folder.path()));
        first.take_directory(Place::Pins, &pins).expect("there is none");
        for _ in 0..2 {
            fs::create_dir(&pins).expect("a directory");
            first.take_directory(Place::Pins, &pins).expect("free");
            second.take_directory(Place::Pins, &pins).expect_err("taken");
            fs::remove_dir(&pins).expect("empty");
        }
    }

    #[test]
    fn a_cgroup_that_nothing_came_of_is_removed() {
        let folder = tempfile::tempdir().expect("a directory");
        let cgroup = folder.path().join("culvert");
        places(folder.path()).take_cgroup(&cgroup).expect("free");
        assert!(!cgroup.exists());
        let mut used = places(folder.path());
        used.take_cgroup(&cgroup).expect("free");
        used.in_use();
        drop(used);
        assert!(cgroup.exists());
        places(folder.path()).take_cgroup(&cgroup).expect("free");
        assert!(cgroup.exists(), "it was there before");
    }
}
