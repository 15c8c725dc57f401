//! The store of a server: one redb file, 0600, synced to disk before a commit is acknowledged.
//!
//! Layout 1: table `meta` (`schema`, `revision` → u64) and table `rows` (`(table, key)` → `created` u64 LE, `modified`
//! u64 LE, JSON). A file of a newer layout is refused, so that an old program never writes into it.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageError, TableDefinition};
use tracing::{info, warn};

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

/// The file. redb refuses all work after an I/O error, of a full disk say: the file has to be closed and opened again.
struct Disk {
    /// `None` after an error, until it could be opened again.
    database: Option<Database>,
    /// What failed at the very end: whether the file has it, shows when it is open again.
    doubtful: Option<Commit>,
}

impl RedbStore {
    /// Opens or makes the file. Its directory must exist. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError`]: not accessible, in use, damaged, or of a newer layout.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (database, revision) = open(path, true)?;
        let disk = Mutex::new(Disk { database: Some(database), doubtful: None });
        Ok(Self { inner: Arc::new(Inner { path: path.to_owned(), feed: Feed::new(revision), disk }) })
    }
}

/// Opens the file, with its last revision. One that is missing or empty is made when it may be `new`.
fn open(path: &Path, new: bool) -> Result<(Database, Revision), StoreError> {
    let failed = |source| StoreError::File { path: path.to_owned(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(new).truncate(false).mode(0o600);
    let file = options.open(path).and_then(make_private).map_err(failed)?;
    if !new && file.metadata().map_err(failed)?.len() == 0 {
        return Err(StoreError::Damaged { path: path.to_owned(), what: "it is empty".to_owned() });
    }
    let database = Database::builder().set_cache_size(CACHE).create_file(file).map_err(|err| match err {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
        DatabaseError::Storage(StorageError::Io(source)) if source.kind() != io::ErrorKind::InvalidData => {
            StoreError::File { path: path.to_owned(), source }
        }
        other => StoreError::Damaged { path: path.to_owned(), what: other.to_string() },
    })?;
    let revision = prepare(&database, path)?;
    Ok((database, revision))
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
    let backend = |err: redb::Error| StoreError::Backend(err.into());
    let damaged = |what: &str| StoreError::Damaged { path: path.to_owned(), what: what.to_owned() };
    let transaction = database.begin_write().map_err(|err| backend(err.into()))?;
    let revision = {
        let mut meta = transaction.open_table(META).map_err(|err| match err {
            redb::TableError::Storage(err) => backend(err.into()),
            other => damaged(&other.to_string()),
        })?;
        let schema = meta.get("schema").map_err(|err| backend(err.into()))?.map(|value| value.value());
        match schema {
            Some(SCHEMA_VERSION) => {}
            Some(found) if found > SCHEMA_VERSION => {
                return Err(StoreError::NewerLayout { path: path.to_owned(), found });
            }
            Some(found) => return Err(damaged(&format!("layout {found} was never released"))),
            None => {
                let foreign = transaction
                    .list_tables()
                    .map_err(|err| backend(err.into()))?
                    .any(|table| redb::TableHandle::name(&table) != "meta");
                if foreign {
                    return Err(damaged("it has no layout number"));
                }
                meta.insert("schema", SCHEMA_VERSION).map_err(|err| backend(err.into()))?;
                meta.insert("revision", 0).map_err(|err| backend(err.into()))?;
            }
        }
        let revision = meta.get("revision").map_err(|err| backend(err.into()))?.map(|value| value.value());
        Revision(revision.ok_or_else(|| damaged("it has no revision"))?)
    };
    transaction.open_table(ROWS).map_err(|err| damaged(&err.to_string()))?;
    transaction.commit().map_err(|err| backend(err.into()))?;
    Ok(revision)
}

impl Inner {
    fn commit(&self, transaction: Transaction) -> Result<Revision, CommitError> {
        transaction.check()?;
        let mut disk = self.disk.lock();
        let failed = match write(self.database(&mut disk).map_err(|err| CommitError::Backend(err.into()))?, transaction)
        {
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
        disk.database = None;
        if let Err(err) = self.database(&mut disk) {
            warn!(%err, "the state store is closed until it can be opened again");
        }
        Err(CommitError::Backend(failed))
    }

    /// The open file; opens it again after an error. What the file then has more than was told, is told.
    fn database<'a>(&self, disk: &'a mut Disk) -> Result<&'a Database, StoreError> {
        if disk.database.is_none() {
            let (database, revision) = open(&self.path, false)?;
            if let Some(commit) = disk.doubtful.take_if(|commit| commit.revision == revision) {
                self.feed.publish(commit);
            }
            if revision != self.feed.latest() {
                let what = format!("it is at revision {} instead of {}", revision.0, self.feed.latest().0);
                return Err(StoreError::Damaged { path: self.path.clone(), what });
            }
            info!(path = %self.path.display(), "opened the state store again after an error");
            (disk.database, disk.doubtful) = (Some(database), None);
        }
        Ok(disk.database.as_ref().expect("just opened"))
    }

    fn load(&self) -> Result<Contents, StoreError> {
        let mut disk = self.disk.lock();
        let database = self.database(&mut disk)?;
        self.read(database).map_err(StoreError::Backend)
    }

    fn read(&self, database: &Database) -> Result<Contents, BackendError> {
        let read = database.begin_read()?;
        let revision = read.open_table(META)?.get("revision")?.map_or(0, |value| value.value());
        let mut rows = Vec::new();
        for entry in read.open_table(ROWS)?.iter()? {
            let (at, bytes) = entry?;
            let (name, key) = at.value();
            let unknown = || format!("{} holds rows of the unknown table {name:?}", self.path.display());
            let table = Table::from_name(name).ok_or_else(unknown)?;
            rows.push((RowKey::new(table, key), decode(bytes.value())?));
        }
        Ok(Contents { revision: Revision(revision), rows })
    }
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
        Err(err) => Err(WriteError::Doubtful(commit, Box::new(redb::Error::from(err)))),
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
        Self::Backend(Box::new(err.into()))
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
mod tests {
    use super::*;

    fn put(key: &str) -> Transaction {
        let operation = Operation::Put(RowKey::new(Table::Services, key), Bytes::from_static(b"1"));
        Transaction { guards: Vec::new(), operations: vec![operation] }
    }

    fn store() -> (tempfile::TempDir, Arc<Inner>) {
        let directory = tempfile::tempdir().expect("a directory");
        let store = RedbStore::open(&directory.path().join("state.redb")).expect("a new store");
        store.inner.commit(put("first")).expect("committed");
        (directory, store.inner)
    }

    #[test]
    fn a_file_that_an_error_closed_is_opened_again_and_never_made_anew() {
        let (_directory, inner) = store();
        inner.disk.lock().database = None;
        assert_eq!(inner.commit(put("second")).expect("committed"), Revision(2));
        inner.disk.lock().database = None;
        assert_eq!(inner.load().expect("loaded").rows.len(), 2);

        inner.disk.lock().database = None;
        let kept = std::fs::read(&inner.path).expect("a file");
        std::fs::remove_file(&inner.path).expect("removed");
        inner.commit(put("third")).expect_err("no file");
        assert!(!inner.path.exists());
        std::fs::write(&inner.path, "").expect("an empty file");
        inner.commit(put("third")).expect_err("an empty file");
        std::fs::remove_file(&inner.path).expect("removed");
        drop(RedbStore::open(&inner.path).expect("that of another mesh"));
        let other = inner.load().expect_err("of another mesh").to_string();
        assert!(other.contains("it is at revision 0 instead of 2"), "{other}");
        std::fs::write(&inner.path, kept).expect("restored");
        assert_eq!(inner.commit(put("third")).expect("committed"), Revision(3));
    }

    /// Closes the file after a commit that is in it, as one whose number is `ahead` of that.
    fn fail_at_the_end(inner: &Inner, ahead: u64) -> Revision {
        let mut disk = inner.disk.lock();
        let Ok(commit) = write(disk.database.as_ref().expect("open"), put("more")) else {
            panic!("nothing is wrong with the file")
        };
        let revision = Revision(commit.revision.0 + ahead);
        *disk = Disk { database: None, doubtful: Some(Commit { revision, ..commit }) };
        revision
    }

    #[tokio::test]
    async fn what_failed_at_the_end_is_told_if_the_file_has_it() {
        let (_directory, inner) = store();
        let mut watch = inner.feed.watch(Revision(1));
        let revision = fail_at_the_end(&inner, 0);
        inner.load().expect("opened again");
        assert_eq!(watch.next().await.expect("told").revision, revision);
        fail_at_the_end(&inner, 1);
        let other = inner.load().expect_err("neither what was before nor what failed").to_string();
        assert!(other.contains("it is at revision 3 instead of 2"), "{other}");
        assert_eq!(inner.feed.latest(), Revision(2));
    }
}
