//! The store of a server: one redb file, 0600, synced to disk before a commit is acknowledged.
//!
//! Layout 1: table `meta` (`schema`, `revision` → u64) and table `rows` (`(table, key)` → `created` u64 LE, `modified`
//! u64 LE, JSON). A file of a newer layout is refused, so that an old program never writes into it.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use redb::{
    Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageError, TableDefinition, TableError,
};
use tracing::{error, info, warn};

use super::feed::{Feed, Watch};
use super::{
    BackendError, Change, Commit, CommitError, Contents, Operation, Revision, Row, RowKey, Store, StoreError, Table,
    Transaction,
};

/// The layout that this program writes.
pub const SCHEMA_VERSION: u64 = 1;
/// Memory that redb may use for pages. Its default of 1 GiB is not for an agent.
const CACHE: usize = 8 << 20;
/// Bytes before the JSON of a row.
const ROW_HEADER: usize = 16;
/// Pause after the file could not be opened again: that may read all of it.
const REOPEN_BACKOFF: Duration = Duration::from_secs(1);

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const ROWS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("rows");

/// Rows in a file.
pub struct RedbStore {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    feed: Feed,
    /// Held over commit and publish, so that watchers see commits in order.
    disk: Mutex<Disk>,
}

/// The file. redb refuses all work after an I/O error: the file has to be closed. After one of a full disk it is opened again.
/// After any other it stays closed, since Linux takes what it could not write for written: the file would look whole in memory.
struct Disk {
    /// `None` after an error, until it could be opened again.
    database: Option<Database>,
    /// What failed at the very end: whether the file has it, shows when it is open again.
    doubtful: Option<Commit>,
    /// Why it is not opened again.
    refusal: Option<Refusal>,
}

struct Refusal {
    error: Arc<StoreError>,
    /// `None`: as long as the agent runs.
    until: Option<Instant>,
}

impl Disk {
    fn open(database: Database) -> Self {
        Self { database: Some(database), doubtful: None, refusal: None }
    }

    fn refuse(&mut self, error: StoreError, until: Option<Instant>) -> StoreError {
        let error = Arc::new(error);
        self.refusal = Some(Refusal { error: Arc::clone(&error), until });
        StoreError::Refused(error)
    }
}

impl RedbStore {
    /// Opens or makes the file. Its directory must exist. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError`]: not accessible, in use, damaged, or of a newer layout.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (database, revision) = open(open_file(path, true)?, path)?;
        let disk = Mutex::new(Disk::open(database));
        Ok(Self { inner: Arc::new(Inner { path: path.to_owned(), feed: Feed::new(revision), disk }) })
    }
}

/// Opens the file. One that is missing is made when it may be `new`.
fn open_file(path: &Path, new: bool) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(new).truncate(false).mode(0o600);
    let file = options.open(path).and_then(make_private);
    file.map_err(|source| StoreError::File { path: path.to_owned(), source })
}

/// The database in the file, with its last revision. One that is empty becomes a new one.
fn open(file: File, path: &Path) -> Result<(Database, Revision), StoreError> {
    opened(Database::builder().set_cache_size(CACHE).create_file(file), path)
}

fn opened(database: Result<Database, DatabaseError>, path: &Path) -> Result<(Database, Revision), StoreError> {
    let database = database.map_err(|err| match err {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        DatabaseError::Storage(err) => storage(err, path),
        other => StoreError::Damaged { path: path.to_owned(), what: other.to_string() },
    })?;
    let revision = prepare(&database, path)?;
    Ok((database, revision))
}

/// Tells a file that is damaged from one that only could not be read or written.
fn storage(err: impl Into<redb::Error>, path: &Path) -> StoreError {
    match err.into() {
        redb::Error::Io(source) if source.kind() != io::ErrorKind::InvalidData => {
            StoreError::File { path: path.to_owned(), source }
        }
        err @ (redb::Error::Io(_) | redb::Error::Corrupted(_)) => {
            StoreError::Damaged { path: path.to_owned(), what: err.to_string() }
        }
        other => StoreError::Backend(Box::new(other)),
    }
}

/// Did the disk fail with anything but that it is full? Also when redb does not say any more what it was.
fn is_lost(err: &BackendError) -> bool {
    match err.downcast_ref::<redb::Error>() {
        Some(redb::Error::Io(source)) => !is_full(source),
        Some(redb::Error::PreviousIo) => true,
        _ => false,
    }
}

fn is_full(source: &io::Error) -> bool {
    matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The mode at creation says nothing of a file that was there: restored from a backup, say. Keys are in it.
fn make_private(file: File) -> io::Result<File> {
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        warn!(mode = format!("{:o}", mode & 0o7777), "the state file was readable by others, which is ended now");
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

/// Checks the layout, or writes it into a new file; returns the last revision.
fn prepare(database: &Database, path: &Path) -> Result<Revision, StoreError> {
    let failed = |err: StorageError| storage(err, path);
    let damaged = |what: &str| StoreError::Damaged { path: path.to_owned(), what: what.to_owned() };
    let unusable = |err: TableError| match err {
        TableError::Storage(err) => failed(err),
        other => damaged(&other.to_string()),
    };
    let transaction = database.begin_write().map_err(|err| storage(err, path))?;
    let revision = {
        let mut meta = transaction.open_table(META).map_err(unusable)?;
        let schema = meta.get("schema").map_err(failed)?.map(|value| value.value());
        match schema {
            Some(SCHEMA_VERSION) => {}
            Some(found) if found > SCHEMA_VERSION => {
                return Err(StoreError::NewerLayout { path: path.to_owned(), found });
            }
            Some(found) => return Err(damaged(&format!("layout {found} was never released"))),
            None => {
                let foreign =
                    transaction.list_tables().map_err(failed)?.any(|table| redb::TableHandle::name(&table) != "meta");
                if foreign {
                    return Err(damaged("it has no layout number"));
                }
                meta.insert("schema", SCHEMA_VERSION).map_err(failed)?;
                meta.insert("revision", 0).map_err(failed)?;
            }
        }
        let revision = meta.get("revision").map_err(failed)?.map(|value| value.value());
        Revision(revision.ok_or_else(|| damaged("it has no revision"))?)
    };
    transaction.open_table(ROWS).map_err(unusable)?;
    transaction.commit().map_err(|err| storage(err, path))?;
    Ok(revision)
}

impl Inner {
    fn commit(&self, transaction: Transaction) -> Result<Revision, CommitError> {
        transaction.check()?;
        let mut disk = self.disk.lock();
        let database = self.database(&mut disk).map_err(|err| CommitError::Backend(err.into()))?;
        let failed = match write(database, transaction) {
            Ok(commit) => {
                let revision = commit.revision;
                self.feed.publish(commit);
                return Ok(revision);
            }
            Err(WriteError::Conflict(key)) => return Err(CommitError::Conflict(key)),
            Err(WriteError::Backend(err)) => err,
            Err(WriteError::Doubtful(commit, err)) => {
                disk.doubtful = Some(commit);
                err
            }
        };
        self.close(&mut disk, &failed);
        Err(CommitError::Backend(failed))
    }

    /// Closes the file after an error. Opens it again if that is safe.
    fn close(&self, disk: &mut Disk, failed: &BackendError) {
        disk.database = None;
        if is_lost(failed) {
            let err = disk.refuse(self.lost(failed.to_string()), None);
            error!(%err, "the state store takes no changes any more");
        } else if let Err(err) = self.database(disk) {
            warn!(%err, "the state store is closed until it can be opened again");
        }
    }

    fn lost(&self, what: String) -> StoreError {
        StoreError::Lost { path: self.path.clone(), what }
    }

    /// The open file; opens it again after an error.
    fn database<'a>(&self, disk: &'a mut Disk) -> Result<&'a Database, StoreError> {
        if disk.database.is_none() {
            let refused = disk.refusal.as_ref();
            if let Some(refusal) = refused.filter(|refusal| refusal.until.is_none_or(|until| Instant::now() < until)) {
                return Err(StoreError::Refused(Arc::clone(&refusal.error)));
            }
            self.reopen(disk).map_err(|err| {
                let until = (!matches!(err, StoreError::Lost { .. })).then(|| Instant::now() + REOPEN_BACKOFF);
                disk.refuse(err, until)
            })?;
        }
        Ok(disk.database.as_ref().expect("just opened"))
    }

    /// Opens the file again. What it then has more than was told, is told.
    fn reopen(&self, disk: &mut Disk) -> Result<(), StoreError> {
        let displaced = |what: String| StoreError::Displaced { path: self.path.clone(), what };
        let file = open_file(&self.path, false)?;
        let length = file.metadata().map_err(|source| StoreError::File { path: self.path.clone(), source })?.len();
        if length == 0 {
            return Err(displaced("it is empty".to_owned()));
        }
        let (database, revision) = open(file, &self.path).map_err(|err| match err {
            StoreError::File { source, .. } if !is_full(&source) => self.lost(source.to_string()),
            StoreError::Backend(err) if is_lost(&err) => self.lost(err.to_string()),
            StoreError::Damaged { what, .. } => displaced(what),
            other => other,
        })?;
        if let Some(commit) = disk.doubtful.take_if(|commit| commit.revision == revision) {
            self.feed.publish(commit);
        }
        if revision != self.feed.latest() {
            return Err(displaced(format!("it is at revision {revision} instead of {}", self.feed.latest())));
        }
        info!(path = %self.path.display(), "opened the state store again after an error");
        *disk = Disk::open(database);
        Ok(())
    }

    fn load(&self) -> Result<Contents, StoreError> {
        let mut disk = self.disk.lock();
        let read = self.read(self.database(&mut disk)?);
        read.map_err(|err| {
            self.close(&mut disk, &err);
            StoreError::Backend(err)
        })
    }

    fn read(&self, database: &Database) -> Result<Contents, BackendError> {
        let read = database.begin_read().map_err(backend)?;
        let meta = read.open_table(META).map_err(backend)?;
        let revision = meta.get("revision").map_err(backend)?.map_or(0, |value| value.value());
        let mut rows = Vec::new();
        for entry in read.open_table(ROWS).map_err(backend)?.iter().map_err(backend)? {
            let (at, bytes) = entry.map_err(backend)?;
            let (name, key) = at.value();
            let unknown = || format!("{} holds rows of the unknown table {name:?}", self.path.display());
            let table = Table::from_name(name).ok_or_else(unknown)?;
            rows.push((RowKey::new(table, key), decode(bytes.value())?));
        }
        Ok(Contents { revision: Revision(revision), rows })
    }
}

/// In one type, by which [`is_lost`] knows it.
fn backend(err: impl Into<redb::Error>) -> BackendError {
    Box::new(err.into())
}

/// One redb transaction; dropped (and so rolled back) on any error.
fn write(database: &Database, transaction: Transaction) -> Result<Commit, WriteError> {
    let write = database.begin_write()?;
    let mut changes = Vec::with_capacity(transaction.operations.len());
    let revision = {
        let mut rows = write.open_table(ROWS)?;
        for guard in &transaction.guards {
            let RowKey { table, key } = guard.key();
            let stored = rows.get((table.as_str(), key.as_str()))?;
            let stored = stored.map(|bytes| decode(bytes.value())).transpose().map_err(WriteError::Backend)?;
            let modified = stored.map(|row| row.modified);
            if !guard.holds(modified) {
                return Err(WriteError::Conflict(guard.key().clone()));
            }
        }
        let mut meta = write.open_table(META)?;
        let last = meta.get("revision")?.map_or(0, |value| value.value());
        let revision = Revision(last + 1);
        meta.insert("revision", revision.0)?;
        for operation in transaction.operations {
            match operation {
                Operation::Put(key, value) => {
                    let at = (key.table.as_str(), key.key.as_str());
                    let stored = rows.get(at)?.map(|bytes| decode(bytes.value()));
                    let stored = stored.transpose().map_err(WriteError::Backend)?;
                    let created = stored.map_or(revision, |row| row.created);
                    let row = Row { value, created, modified: revision };
                    rows.insert(at, encode(&row).as_slice())?;
                    changes.push(Change { key, row: Some(row) });
                }
                Operation::Delete(key) => {
                    if rows.remove((key.table.as_str(), key.key.as_str()))?.is_some() {
                        changes.push(Change { key, row: None });
                    }
                }
            }
        }
        revision
    };
    // redb's default durability: the data is on disk (fdatasync) when this returns.
    let commit = Commit { revision, changes };
    match write.commit() {
        Ok(()) => Ok(commit),
        Err(err) => Err(WriteError::Doubtful(commit, backend(err))),
    }
}

/// A conflict, or anything that redb reports.
enum WriteError {
    Conflict(RowKey),
    /// Nothing was done.
    Backend(BackendError),
    /// While it was made durable.
    Doubtful(Commit, BackendError),
}

impl<E: Into<redb::Error>> From<E> for WriteError {
    fn from(err: E) -> Self {
        Self::Backend(backend(err))
    }
}

fn encode(row: &Row) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ROW_HEADER + row.value.len());
    bytes.extend_from_slice(&row.created.0.to_le_bytes());
    bytes.extend_from_slice(&row.modified.0.to_le_bytes());
    bytes.extend_from_slice(&row.value);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Row, BackendError> {
    let short = || format!("a row of {} bytes has no header", bytes.len());
    let (created, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    let (modified, value) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    Ok(Row {
        value: Bytes::copy_from_slice(value),
        created: Revision(u64::from_le_bytes(*created)),
        modified: Revision(u64::from_le_bytes(*modified)),
    })
}

impl Store for RedbStore {
    fn commit(&self, transaction: Transaction) -> BoxFuture<'_, Result<Revision, CommitError>> {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            tokio::task::spawn_blocking(move || inner.commit(transaction))
                .await
                .unwrap_or_else(|err| Err(CommitError::Backend(Box::new(err))))
        })
    }

    fn load(&self) -> BoxFuture<'_, Result<Contents, StoreError>> {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            tokio::task::spawn_blocking(move || inner.load())
                .await
                .unwrap_or_else(|err| Err(StoreError::Backend(Box::new(err))))
        })
    }

    fn watch(&self, after: Revision) -> Watch {
        self.inner.feed.watch(after)
    }
}

#[cfg(test)]
mod tests;
