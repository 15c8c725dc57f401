//! The directories of an allocation, laid out as Nomad's.
//!
//! ```text
//! <data_dir>/alloc/<id>/alloc/{data,logs,tmp}     shared by the tasks; logs belong to the agent
//! <data_dir>/alloc/<id>/<task>/{local,secrets,tmp}
//! ```
//! What the agent writes (`logs`, and the task's own directory, which holds `exit.json`) belongs to root and cannot be
//! written by a task: no task can place a link where the executor, running as root, will write.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use super::remove::remove_tree;
use crate::task::Driver;
use crate::workload::AllocId;

/// Size of the in-memory `secrets` directory, as Nomad's.
const SECRETS_SIZE: &str = "1m";

/// A directory that could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {}", path.display())]
pub struct DirError {
    /// What was tried.
    doing: &'static str,
    /// Where.
    path: PathBuf,
    /// Why it failed.
    #[source]
    source: io::Error,
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DirError {
    move |source| DirError { doing, path: path.to_owned(), source }
}

/// The directory of one allocation.
#[derive(Clone, Debug)]
pub struct AllocDir {
    path: PathBuf,
}

/// Where one task finds its directories, seen from the host.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TaskDirs {
    /// The allocation's directory.
    pub alloc: PathBuf,
    /// `alloc/`: shared by all tasks of the allocation.
    pub shared: PathBuf,
    /// `alloc/logs/`.
    pub logs: PathBuf,
    /// The task's own directory.
    pub task: PathBuf,
    /// `<task>/local/`.
    pub local: PathBuf,
    /// `<task>/secrets/`: in memory where the host allows it.
    pub secrets: PathBuf,
    /// `<task>/tmp/`.
    pub tmp: PathBuf,
}

impl TaskDirs {
    /// NOMAD_ALLOC_DIR, NOMAD_TASK_DIR and NOMAD_SECRETS_DIR as a task of `driver` sees them.
    #[must_use]
    pub fn env(&self, driver: Driver) -> [(&'static str, String); 3] {
        let seen = |inside: &str, host: &Path| match driver {
            Driver::Exec => inside.to_owned(),
            Driver::RawExec => host.to_string_lossy().into_owned(),
        };
        [
            ("NOMAD_ALLOC_DIR", seen("/alloc", &self.shared)),
            ("NOMAD_TASK_DIR", seen("/local", &self.local)),
            ("NOMAD_SECRETS_DIR", seen("/secrets", &self.secrets)),
        ]
    }
}

impl AllocDir {
    /// Where allocation `id` lives below `data_dir`; nothing is made yet.
    #[must_use]
    pub fn new(data_dir: &Path, id: &AllocId) -> Self {
        Self { path: data_dir.join("alloc").join(id.as_str()) }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the logs of all tasks lie.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.path.join("alloc/logs")
    }

    /// The directories of `task`, whether or not they exist. The name must have passed
    /// [`crate::task::check_task_name`].
    #[must_use]
    pub fn task(&self, task: &str) -> TaskDirs {
        let shared = self.path.join("alloc");
        let own = self.path.join(task);
        TaskDirs {
            alloc: self.path.clone(),
            logs: shared.join("logs"),
            shared,
            local: own.join("local"),
            secrets: own.join("secrets"),
            tmp: own.join("tmp"),
            task: own,
        }
    }

    /// Makes the shared directories; existing ones stay as they are.
    ///
    /// # Errors
    /// [`DirError`] with the path.
    pub fn create(&self) -> Result<(), DirError> {
        let shared = self.path.join("alloc");
        if let Some(parent) = self.path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(failed("create", parent))?;
        }
        make(&self.path, 0o711, None)?;
        // Sticky: a task may add to the shared directory but not move the agent's `logs` out of the way.
        make(&shared, 0o1777, None)?;
        make(&shared.join("data"), 0o1777, None)?;
        make(&shared.join("tmp"), 0o1777, None)?;
        make(&shared.join("logs"), 0o755, None)
    }

    /// Makes the directories of `task`, owned by `owner` (uid, gid). Idempotent: contents stay.
    ///
    /// # Errors
    /// [`DirError`] with the path. A `secrets` directory that cannot be mounted in memory (no privilege) stays on disk,
    /// mode 0700.
    pub fn add_task(&self, task: &str, owner: (u32, u32)) -> Result<TaskDirs, DirError> {
        self.create()?;
        let dirs = self.task(task);
        make(&dirs.task, 0o755, None)?;
        make(&dirs.local, 0o755, Some(owner))?;
        make(&dirs.tmp, 0o1777, Some(owner))?;
        if !is_mount_point(&dirs.secrets) {
            make(&dirs.secrets, 0o700, Some(owner))?;
            let options = format!("size={SECRETS_SIZE},mode=0700,uid={},gid={}", owner.0, owner.1);
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            if let Err(error) = mount(Some("tmpfs"), &dirs.secrets, Some("tmpfs"), flags, Some(options.as_str())) {
                tracing::warn!(path = %dirs.secrets.display(), %error, "secrets stay on disk: no tmpfs for them");
            }
        }
        Ok(dirs)
    }

    /// Unmounts what was mounted inside and removes everything.
    ///
    /// # Errors
    /// [`DirError`]; nothing is removed below a mount point that could not be unmounted.
    pub fn destroy(&self) -> Result<(), DirError> {
        self.unmount()?;
        remove_tree(&self.path).map_err(failed("remove", &self.path))
    }

    /// Unmounts the `secrets` directories; the rest stays for whoever reads the logs.
    ///
    /// # Errors
    /// [`DirError`] naming the mount point.
    pub fn unmount(&self) -> Result<(), DirError> {
        let mut mounts = crate::workload::mounts::below(&self.path).map_err(failed("list mounts below", &self.path))?;
        mounts.reverse(); // the deepest first
        for point in mounts {
            umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                .map_err(|errno| failed("unmount", &point)(errno.into()))?;
        }
        Ok(())
    }
}

/// Makes one directory with exactly this mode (whatever the umask) and owner.
fn make(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<(), DirError> {
    match fs::DirBuilder::new().mode(mode & 0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let existing = fs::symlink_metadata(path).map_err(failed("look at", path))?;
            if !existing.is_dir() {
                return Err(failed("create", path)(io::Error::from(io::ErrorKind::NotADirectory)));
            }
        }
        Err(error) => return Err(failed("create", path)(error)),
    }
    if let Some((uid, gid)) = owner {
        chown(path, Some(uid), Some(gid)).map_err(failed("change the owner of", path))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("change the mode of", path))
}

/// Does another file system begin at `path`?
fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::symlink_metadata(path).map(|meta| meta.dev()).ok();
    device(path).is_some_and(|own| path.parent().and_then(device).is_some_and(|parent| parent != own))
}
