//! What the runner writes down before it acts, so that the next agent finds it.
//!
//! One file per job and one per allocation, replaced atomically. An allocation's record exists before anything else of it
//! and goes last: whatever carries the name of an allocation without a record is garbage.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use culvert_control::disk::remedy;
use culvert_jobspec::{Job, PortBinding};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::task::{read_json, sweep, write_json};
use crate::workload::AllocId;

/// A submitted job.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct JobRecord {
    /// As parsed, variables already put in.
    pub job: Job,
    /// Counts submissions that changed something, from 0.
    pub version: u64,
    /// Stopped jobs are kept until purged.
    pub stopped: bool,
    /// Seconds since 1970.
    pub submitted: u64,
}

/// An allocation: one instance of a task group.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct AllocationRecord {
    /// Its id.
    pub id: String,
    /// Number of its workload in the kernel tables.
    pub workload: u32,
    /// The job it belongs to, as it was when the allocation was made.
    pub job: Job,
    /// Version of that job.
    pub job_version: u64,
    /// The group.
    pub group: String,
    /// Which of the group's instances.
    pub index: u32,
    /// Ports by label.
    pub ports: BTreeMap<String, PortBinding>,
    /// Ports of the sidecars by service ID, once the catalog has assigned them: kept across a restart of the agent.
    #[serde(default)]
    pub sidecar_ports: BTreeMap<String, u16>,
    /// Seconds since 1970.
    pub created: u64,
    /// It shall stop; what is left of it is being removed.
    pub stopping: bool,
    /// Why it failed for good, if it has: it stays as it is until it is stopped or replaced.
    #[serde(default)]
    pub failed: Option<String>,
}

/// A record that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {} ({})", path.display(), remedy(source))]
pub struct RecordError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The files below the data directory.
#[derive(Clone, Debug)]
pub struct Records {
    data_dir: PathBuf,
    /// An allocation's life and who stops it both change its record.
    changing: Arc<Mutex<()>>,
}

impl Records {
    /// Opens the records below `data_dir`, making the folders.
    ///
    /// # Errors
    /// The folders cannot be made.
    pub fn open(data_dir: &Path) -> Result<Self, RecordError> {
        for folder in ["jobs", "allocations"] {
            let path = data_dir.join(folder);
            std::fs::create_dir_all(&path).map_err(|source| RecordError { what: "create", path, source })?;
        }
        Ok(Self { data_dir: data_dir.to_owned(), changing: Arc::default() })
    }

    /// Removes what a predecessor that was killed while it wrote left of records.
    pub fn sweep(&self) {
        let named = |is: fn(&str) -> bool| move |file: &str| file.strip_suffix(".json").is_some_and(is);
        sweep(&self.data_dir.join("jobs"), named(|name| name.bytes().all(|byte| byte.is_ascii_hexdigit())));
        sweep(&self.data_dir.join("allocations"), named(|name| AllocId::new(name).is_ok()));
    }

    /// Every job.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobRecord> {
        read_all(&self.data_dir.join("jobs"))
    }

    /// Every allocation.
    #[must_use]
    pub fn allocations(&self) -> Vec<AllocationRecord> {
        read_all(&self.data_dir.join("allocations"))
    }

    /// Is anything left of the allocation `id`? So it is as long as its record cannot be proven to be gone.
    #[must_use]
    pub fn has_allocation(&self, id: &str) -> bool {
        let found = std::fs::symlink_metadata(self.allocation_path(id));
        !found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Writes down a submission: the new allocations, then the job that wants them. Who is killed in between leaves
    /// allocations of a version that no job has; the next agent removes them.
    ///
    /// # Errors
    /// [`RecordError`]; the records are as they were before.
    pub fn submit(&self, job: &JobRecord, allocations: &[AllocationRecord]) -> Result<(), RecordError> {
        let put = allocations.iter().try_for_each(|allocation| self.put_allocation(allocation));
        put.and_then(|()| self.put_job(job)).inspect_err(|_| {
            for allocation in allocations {
                if let Err(error) = remove(&self.allocation_path(&allocation.id)) {
                    warn!(%error, "the record of an allocation that shall not be stays until the next start");
                }
            }
        })
    }

    /// Writes a job.
    ///
    /// # Errors
    /// [`RecordError`]; the file is as it was before.
    pub fn put_job(&self, record: &JobRecord) -> Result<(), RecordError> {
        write(&self.job_path(&record.job.id), record)
    }

    /// Forgets a job.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn remove_job(&self, id: &str) -> Result<(), RecordError> {
        remove(&self.job_path(id))
    }

    /// Writes an allocation.
    ///
    /// # Errors
    /// [`RecordError`]; the file is as it was before.
    pub fn put_allocation(&self, record: &AllocationRecord) -> Result<(), RecordError> {
        write(&self.allocation_path(&record.id), record)
    }

    /// Changes what is written of an allocation, as it is now; one that is forgotten stays so.
    ///
    /// # Errors
    /// [`RecordError`]; the file is as it was before.
    pub fn change_allocation(&self, id: &str, change: impl FnOnce(&mut AllocationRecord)) -> Result<(), RecordError> {
        let _one_at_a_time = self.changing.lock();
        let path = self.allocation_path(id);
        let record = read_json::<AllocationRecord>(&path);
        let record = record.map_err(|source| RecordError { what: "read", path: path.clone(), source })?;
        let Some(mut record) = record else { return Ok(()) };
        change(&mut record);
        write(&path, &record)
    }

    /// Forgets an allocation, after everything of it is gone.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn remove_allocation(&self, id: &AllocId) -> Result<(), RecordError> {
        let _one_at_a_time = self.changing.lock();
        remove(&self.allocation_path(id.as_str()))
    }

    /// A job's id may hold any character; its file is named by the hex of it.
    fn job_path(&self, id: &str) -> PathBuf {
        let name: String = id.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.data_dir.join("jobs").join(format!("{name}.json"))
    }

    fn allocation_path(&self, id: &str) -> PathBuf {
        self.data_dir.join("allocations").join(format!("{id}.json"))
    }
}

fn read_all<T: DeserializeOwned>(folder: &Path) -> Vec<T> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            warn!(%error, folder = %folder.display(), "cannot read records");
            return Vec::new();
        }
    };
    let paths = entries.flatten().map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .filter_map(|path| read(&path))
        .collect()
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let text = std::fs::read(path).map_err(|error| error.to_string());
    let record = text.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
    record
        .inspect_err(|error| warn!(error, path = %path.display(), "a record is not readable; what it names is removed"))
        .ok()
}

fn write<T: Serialize>(path: &Path, record: &T) -> Result<(), RecordError> {
    write_json(path, record).map_err(|source| RecordError { what: "write", path: path.to_owned(), source })
}

fn remove(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RecordError { what: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
