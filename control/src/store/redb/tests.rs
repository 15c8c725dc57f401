//! A file that an error closed, and disks that fail.

use std::sync::atomic::{AtomicUsize, Ordering};

use redb::StorageBackend;
use redb::backends::FileBackend;

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
    let early = inner.load().expect_err("not tried again at once").to_string();
    assert!(!early.contains("it is empty"), "{early}");
    inner.disk.lock().refusal = None;
    let empty = inner.load().expect_err("an empty file").to_string();
    assert!(empty.contains("it is empty") && !empty.contains("remove"), "{empty}");
    inner.disk.lock().refusal = None;
    std::fs::remove_file(&inner.path).expect("removed");
    drop(RedbStore::open(&inner.path).expect("that of another mesh"));
    let other = inner.load().expect_err("of another mesh").to_string();
    assert!(other.contains("it is at revision 0 instead of 2") && !other.contains("remove"), "{other}");
    inner.disk.lock().refusal = None;
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
    *disk = Disk { database: None, doubtful: Some(Commit { revision, ..commit }), refusal: None };
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

/// A disk whose operations of one kind fail after some that do not.
#[derive(Debug)]
struct Failing {
    file: FileBackend,
    kind: Kind,
    left: Arc<AtomicUsize>,
    /// The `errno`.
    error: i32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Any,
    Read,
    Write,
    Sync,
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl Failing {
    fn spend(&self, kind: Kind) -> io::Result<()> {
        if self.kind != Kind::Any && self.kind != kind {
            return Ok(());
        }
        let spent = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        spent.map(drop).map_err(|_| io::Error::from_raw_os_error(self.error))
    }
}

impl StorageBackend for Failing {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.spend(Kind::Read)?;
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.spend(Kind::Write)?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.spend(Kind::Sync)?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.spend(Kind::Write)?;
        self.file.write(offset, data)
    }
}

fn on_a_failing_disk(
    path: &Path,
    kind: Kind,
    left: &Arc<AtomicUsize>,
    error: i32,
) -> Result<(Database, Revision), StoreError> {
    let file = FileBackend::new(open_file(path, false).expect("a file")).expect("a backend");
    let backend = Failing { file, kind, left: Arc::clone(left), error };
    // Without a cache, so that reads reach the disk.
    opened(Database::builder().set_cache_size(0).create_with_backend(backend), path)
}

/// A store whose disk fails from now on.
fn failing(kind: Kind, error: i32) -> (tempfile::TempDir, Arc<Inner>) {
    let (directory, inner) = store();
    inner.disk.lock().database = None;
    let left = Arc::new(AtomicUsize::new(usize::MAX));
    let (database, _) = on_a_failing_disk(&inner.path, kind, &left, error).expect("nothing failed yet");
    left.store(0, Ordering::Relaxed);
    inner.disk.lock().database = Some(database);
    (directory, inner)
}

#[test]
fn after_a_failed_sync_the_file_stays_closed() {
    let (_directory, inner) = failing(Kind::Sync, EIO);
    inner.commit(put("second")).expect_err("not durable");
    for _ in 0..2 {
        let closed = inner.load().expect_err("closed").to_string();
        assert!(closed.contains("restart the agent") && !closed.contains("remove"), "{closed}");
        assert!(inner.disk.lock().database.is_none());
    }
    inner.commit(put("third")).expect_err("closed");
    assert!(inner.disk.lock().refusal.as_ref().is_some_and(|refusal| refusal.until.is_none()));
}

#[test]
fn after_a_full_disk_it_is_opened_again() {
    let (_directory, inner) = failing(Kind::Write, ENOSPC);
    inner.commit(put("second")).expect_err("no room");
    inner.commit(put("second")).expect("there is room again");
}

#[test]
fn a_failed_read_closes_the_file_too() {
    let (_directory, inner) = failing(Kind::Read, ENOSPC);
    inner.load().expect_err("not readable");
    assert_eq!(inner.load().expect("opened again").rows.len(), 1);
    let (_directory, inner) = failing(Kind::Read, EIO);
    inner.load().expect_err("not readable");
    let closed = inner.load().expect_err("closed").to_string();
    assert!(closed.contains("restart the agent"), "{closed}");
}

#[test]
fn a_disk_that_fails_while_the_file_is_opened_is_no_damage_to_the_file() {
    let (_directory, inner) = store();
    inner.disk.lock().database = None;
    let mut failures = 0;
    for operations in 0.. {
        let left = Arc::new(AtomicUsize::new(operations));
        match on_a_failing_disk(&inner.path, Kind::Any, &left, EIO) {
            Ok(_) => break,
            Err(err) => assert!(matches!(err, StoreError::File { .. } | StoreError::Backend(_)), "{operations}: {err}"),
        }
        failures += 1;
    }
    assert!(failures > 2, "{failures}");
}
