//! What is kept of a running or ended task: enough for another agent to find it again, and to be sure that it is it.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::workload::AllocId;

use super::identity::ProcessIdentity;

/// A started task, as the agent keeps it in its own records and the executor in `<task>/executor.json`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TaskRecord {
    /// The allocation.
    pub alloc_id: AllocId,
    /// The task's name.
    pub task: String,
    /// The task's main process; for `exec` the init of its pid namespace, which passes signals on.
    pub process: ProcessIdentity,
    /// The executor: ends after the task, when the exit status is on disk.
    pub executor: ProcessIdentity,
    /// The task's cgroup below each hierarchy's root.
    pub cgroup: PathBuf,
    /// The task's directory, with `exit.json`.
    pub task_dir: PathBuf,
    /// When it was started.
    pub started_at: SystemTime,
    /// Sentences for the task's events: limits that the host cannot enforce.
    pub notes: Vec<String>,
}

/// How a task ended.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ExitStatus {
    /// The exit code; 128 + signal when a signal ended it.
    pub exit_code: i32,
    /// The signal that ended it, 0 for none.
    pub signal: i32,
    /// The kernel killed it for its memory limit.
    pub oom_killed: bool,
    /// Why the status is not the task's own: the executor vanished, the host went down.
    pub error: Option<String>,
    /// When it was started.
    pub started_at: SystemTime,
    /// When it ended.
    pub finished_at: SystemTime,
}

impl ExitStatus {
    /// Did the task end by itself with code 0?
    #[must_use]
    pub fn success(&self) -> bool {
        self.exit_code == 0 && self.signal == 0 && self.error.is_none()
    }
}

/// `exit.json`: the status and whose it is.
#[derive(Deserialize, Serialize)]
pub(crate) struct ExitFile {
    pub(crate) executor: ProcessIdentity,
    pub(crate) status: ExitStatus,
}

/// Name of the record that the executor leaves in the task's directory.
pub(crate) const EXECUTOR_FILE: &str = "executor.json";
/// Name of the exit status in the task's directory.
pub(crate) const EXIT_FILE: &str = "exit.json";

/// End of the name of a file that is being written.
const UNFINISHED: &str = ".new";

/// Writes `value` so that a reader sees the old file or the whole new one, also after a power cut.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let bytes = serde_json::to_vec_pretty(value)?;
    write_atomically(path, &bytes)
}

/// As [`write_json`], for bytes; mode 0600.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(UNFINISHED);
    let temporary = directory.join(name);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    let replaced = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if replaced.is_err() {
        // Half a file is of use to nobody, and where the disk is full its room is.
        drop(fs::remove_file(&temporary));
    }
    replaced?;
    fs::File::open(directory)?.sync_all()
}

/// Removes what [`write_json`] left in `directory` when it was killed in the middle, of files whose names `ours` knows. Nobody
/// may write there at the same time.
pub(crate) fn sweep(directory: &Path, ours: impl Fn(&str) -> bool) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    // Folders are not what was written, whoever made them.
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())) {
        let name = entry.file_name();
        if name.to_str().and_then(|name| name.strip_suffix(UNFINISHED)).is_some_and(&ours) {
            let (path, removed) = (entry.path(), fs::remove_file(entry.path()));
            match removed {
                Ok(()) => info!(path = %path.display(), "removed a file that was never finished"),
                Err(error) => warn!(%error, path = %path.display(), "a file that was never finished stays"),
            }
        }
    }
}

/// Reads what [`write_json`] wrote; `None` when there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The record that an executor left for `task_dir`, if any: for an agent that died before it could keep its own.
///
/// # Errors
/// When the file is there but cannot be read or understood.
pub fn find_record(task_dir: &Path) -> io::Result<Option<TaskRecord>> {
    read_json(&task_dir.join(EXECUTOR_FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("value.json");
        assert_eq!(read_json::<Vec<u8>>(&path).expect("no file"), None);
        for value in [vec![1_u8, 2, 3], vec![4]] {
            write_json(&path, &value).expect("written");
            assert_eq!(read_json(&path).expect("read"), Some(value));
        }
        let names: Vec<_> = fs::read_dir(directory.path()).expect("a directory").collect();
        assert_eq!(names.len(), 1, "no temporary file stays");
    }

    #[test]
    fn only_our_unfinished_files_are_swept() {
        let directory = tempfile::tempdir().expect("a directory");
        let files = ["a.json", "a.json.new", "b.json.new", "new", ".new", "a.json.new.new"];
        for name in files {
            fs::write(directory.path().join(name), "{").expect("a file");
        }
        fs::create_dir(directory.path().join("c.json.new")).expect("a folder");
        sweep(directory.path(), |name| ["a.json", "c.json"].contains(&name));
        sweep(&directory.path().join("missing"), |_| true);
        let left = fs::read_dir(directory.path()).expect("a folder").flatten();
        let mut left: Vec<_> = left.map(|entry| entry.file_name().into_string().expect("text")).collect();
        left.sort_unstable();
        assert_eq!(left, [".new", "a.json", "a.json.new.new", "b.json.new", "c.json.new", "new"]);
    }
}
