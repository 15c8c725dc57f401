//! The state store: rows `(table, key) -> JSON bytes`, changed by transactions, watched by revision.
//!
//! Owns the contract that every backend keeps and the two embedded ones: [`MemoryStore`] (`-dev`) and [`RedbStore`]
//! (a file, durable before it acknowledges). The contract asks nothing that etcd does not offer: optimistic guards per
//! row, one revision for the whole store, rows that know the revisions of their creation and last change, and a watch
//! that starts at a revision and may answer "compacted, load again". What the bytes mean is the business of
//! [`crate::state`].

mod feed;
mod memory;
mod redb;

use std::fmt;
use std::path::PathBuf;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::disk::remedy;

pub use self::feed::Watch;
pub use self::memory::MemoryStore;
pub use self::redb::{RedbStore, SCHEMA_VERSION};

/// Most operations in one transaction; etcd's default (`--max-txn-ops`), so that a plan fits every backend.
pub const MAX_OPERATIONS: usize = 128;
/// Largest value of one row, in bytes; below etcd's request limit of 1.5 MiB.
pub const MAX_VALUE: usize = 1 << 20;

/// Number of a committed transaction: grows by one with each, never repeats, is `X-Consul-Index` at the API.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A family of rows. The order is that of the array of indexes in [`crate::state::State`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Table {
    /// Nodes, by name.
    Nodes,
    /// Service instances, by `<node>/<service id>`.
    Services,
    /// Health checks, by `<node>/<check id>`.
    Checks,
    /// Intentions, by `<destination>/<source>`.
    Intentions,
    /// The certificate authority: trust domain, configuration, roots and their keys, serial numbers.
    Authority,
}

impl Table {
    /// Every table.
    pub const ALL: [Self; 5] = [Self::Nodes, Self::Services, Self::Checks, Self::Intentions, Self::Authority];

    /// The name under which a backend stores it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Services => "services",
            Self::Checks => "checks",
            Self::Intentions => "intentions",
            Self::Authority => "authority",
        }
    }

    /// The table of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.as_str() == name)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where a row is.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct RowKey {
    /// The family.
    pub table: Table,
    /// The name in it.
    pub key: String,
}

impl RowKey {
    /// `key` in `table`.
    #[must_use]
    pub fn new(table: Table, key: impl Into<String>) -> Self {
        Self { table, key: key.into() }
    }
}

impl fmt::Display for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.table, self.key)
    }
}

/// One stored value. `Debug` shows its length only: rows of the authority hold private keys.
#[derive(Clone, Eq, PartialEq)]
pub struct Row {
    /// JSON.
    pub value: Bytes,
    /// The revision that made the row (again, after a deletion).
    pub created: Revision,
    /// The revision of the last put.
    pub modified: Revision,
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { value, created, modified } = self;
        write!(f, "Row({} bytes, created {created}, modified {modified})", value.len())
    }
}

/// What must hold of a row for a transaction to be committed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Guard {
    /// There is no such row.
    Absent(RowKey),
    /// The row was last changed by exactly this revision.
    Unchanged(RowKey, Revision),
}

impl Guard {
    /// The row it is about.
    #[must_use]
    pub fn key(&self) -> &RowKey {
        match self {
            Self::Absent(key) | Self::Unchanged(key, _) => key,
        }
    }

    /// Does it hold, given the revision of the row's last change?
    #[must_use]
    pub(crate) fn holds(&self, modified: Option<Revision>) -> bool {
        match self {
            Self::Absent(_) => modified.is_none(),
            Self::Unchanged(_, expected) => modified == Some(*expected),
        }
    }
}

/// One change. `Debug` shows no value.
#[derive(Clone, Eq, PartialEq)]
pub enum Operation {
    /// Makes or replaces a row.
    Put(RowKey, Bytes),
    /// Removes a row; no error if there is none.
    Delete(RowKey),
}

impl Operation {
    /// The row it changes.
    #[must_use]
    pub fn key(&self) -> &RowKey {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put(key, value) => write!(f, "Put({key}, {} bytes)", value.len()),
            Self::Delete(key) => write!(f, "Delete({key})"),
        }
    }
}

/// Guards and changes that happen together or not at all. Each row is changed at most once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Transaction {
    /// All must hold.
    pub guards: Vec<Guard>,
    /// All are done, under one revision.
    pub operations: Vec<Operation>,
}

impl Transaction {
    /// What no backend would take.
    pub(crate) fn check(&self) -> Result<(), CommitError> {
        if self.operations.len() > MAX_OPERATIONS || self.guards.len() > MAX_OPERATIONS {
            return Err(CommitError::TooManyOperations(self.operations.len().max(self.guards.len())));
        }
        let mut seen = std::collections::HashSet::new();
        for operation in &self.operations {
            if !seen.insert(operation.key()) {
                return Err(CommitError::TwiceInOneTransaction(operation.key().clone()));
            }
            if let Operation::Put(key, value) = operation
                && value.len() > MAX_VALUE
            {
                return Err(CommitError::TooLarge { key: key.clone(), length: value.len() });
            }
        }
        Ok(())
    }
}

/// One row after a commit; `None` when it was deleted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Change {
    /// Which row.
    pub key: RowKey,
    /// Its new contents.
    pub row: Option<Row>,
}

/// A committed transaction, as watchers see it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Commit {
    /// Its number.
    pub revision: Revision,
    /// What it changed. Deletions of rows that did not exist are left out.
    pub changes: Vec<Change>,
}

/// Everything, at one revision.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// The last commit that is included.
    pub revision: Revision,
    /// All rows.
    pub rows: Vec<(RowKey, Row)>,
}

/// Why a transaction was not committed. Nothing of it was done, but for what [`CommitError::Backend`] says.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// A guard did not hold: someone else changed the row first.
    #[error("{0} was changed meanwhile")]
    Conflict(RowKey),
    /// More than [`MAX_OPERATIONS`].
    #[error("a transaction of {0} operations exceeds the limit of {MAX_OPERATIONS}")]
    TooManyOperations(usize),
    /// The transaction changes one row twice.
    #[error("a transaction changes {0} twice")]
    TwiceInOneTransaction(RowKey),
    /// More than [`MAX_VALUE`].
    #[error("row {key} of {length} bytes exceeds the limit of {MAX_VALUE}")]
    TooLarge {
        /// Which row.
        key: RowKey,
        /// Its length.
        length: usize,
    },
    /// The backend failed: disk full, I/O error, lost connection. If it failed at the very end, the transaction may have been
    /// done all the same; watchers see it then.
    #[error("the state store failed to commit")]
    Backend(#[source] BackendError),
}

/// Why a store could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file or its directory.
    #[error("state store {path} cannot be used ({})", remedy(source))]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another process holds the file.
    #[error("state store {path} is in use by another process: stop it, or choose another data_dir")]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// Written by a later version of the program.
    #[error(
        "state store {path} has layout {found}, this program knows layouts up to {SCHEMA_VERSION}: \
         run the newer version again, or start with an empty data_dir"
    )]
    NewerLayout {
        /// Which.
        path: PathBuf,
        /// What its schema row says.
        found: u64,
    },
    /// Not a store of ours, or damaged.
    #[error(
        "state store {path} is not readable: {what} (restore it from a backup, or remove it to begin a new mesh without the \
         intentions and certificates of the old one)"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// While the agent runs: not the file that it had open, or damaged since.
    #[error(
        "state store {path} is not as the agent left it: {what} (put the file back, or stop the agent and restore a backup)"
    )]
    Displaced {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// An I/O error closed the file until the agent is restarted.
    #[error(
        "state store {path} is closed since an I/O error, after which what the file shows may not be on the disk: {what} \
         (see whether the disk is in order, then restart the agent)"
    )]
    Lost {
        /// Which.
        path: PathBuf,
        /// The error.
        what: String,
    },
    /// An earlier attempt failed, and it is not time for the next.
    #[error(transparent)]
    Refused(std::sync::Arc<StoreError>),
    /// The backend failed.
    #[error("the state store failed")]
    Backend(#[source] BackendError),
}

/// A backend's own error.
pub type BackendError = Box<dyn std::error::Error + Send + Sync>;

/// Why a watch ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum WatchError {
    /// Commits between the watcher's position and the oldest one kept are gone: load again.
    #[error("the history after the requested revision is gone")]
    Compacted,
    /// The store was closed.
    #[error("the store was closed")]
    Closed,
}

/// A transactional, watchable map of rows.
pub trait Store: Send + Sync {
    /// Checks all guards and applies all operations, or nothing. Durable when it returns.
    ///
    /// Runs to its end even if the returned future is dropped after the first poll.
    fn commit(&self, transaction: Transaction) -> BoxFuture<'_, Result<Revision, CommitError>>;

    /// Everything at the latest revision.
    fn load(&self) -> BoxFuture<'_, Result<Contents, StoreError>>;

    /// Every commit after `after`, in order, each once.
    fn watch(&self, after: Revision) -> Watch;
}

#[cfg(test)]
mod tests;
