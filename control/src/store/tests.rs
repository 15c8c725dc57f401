//! The contract, held against every backend, and what only the file owes.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;

use proptest::prelude::*;

use super::*;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn put(key: &str, value: &str) -> Operation {
    Operation::Put(RowKey::new(Table::Services, key), Bytes::copy_from_slice(value.as_bytes()))
}

fn delete(key: &str) -> Operation {
    Operation::Delete(RowKey::new(Table::Services, key))
}

fn change(operations: Vec<Operation>) -> Transaction {
    Transaction { guards: Vec::new(), operations }
}

/// Runs `test` on an empty memory store and on an empty file.
fn on_each_backend(test: impl AsyncFn(&dyn Store)) {
    let directory = tempfile::tempdir().expect("a directory");
    let file = RedbStore::open(&directory.path().join("state.redb")).expect("a new store");
    runtime().block_on(async {
        test(&MemoryStore::default()).await;
        test(&file).await;
    });
}

async fn rows(store: &dyn Store) -> BTreeMap<String, (String, u64, u64)> {
    let contents = store.load().await.expect("load");
    let text = |row: &Row| String::from_utf8(row.value.to_vec()).expect("tests store text");
    let entry = |(key, row): (RowKey, Row)| (key.key, (text(&row), row.created.0, row.modified.0));
    contents.rows.into_iter().map(entry).collect()
}

#[test]
fn rows_know_when_they_were_made_and_changed() {
    on_each_backend(async |store| {
        assert_eq!(store.commit(change(vec![put("a", "1"), put("b", "1")])).await.expect("commit"), Revision(1));
        assert_eq!(store.commit(change(vec![put("a", "2")])).await.expect("commit"), Revision(2));
        assert_eq!(store.commit(change(vec![delete("b")])).await.expect("commit"), Revision(3));
        assert_eq!(store.commit(change(vec![put("b", "3")])).await.expect("commit"), Revision(4));
        let expected = [("a".to_owned(), ("2".to_owned(), 1, 2)), ("b".to_owned(), ("3".to_owned(), 4, 4))];
        assert_eq!(rows(store).await, BTreeMap::from(expected));
    });
}

#[test]
fn a_guard_that_fails_leaves_nothing_behind() {
    on_each_backend(async |store| {
        store.commit(change(vec![put("a", "1")])).await.expect("commit");
        let key = RowKey::new(Table::Services, "a");
        for guard in [Guard::Absent(key.clone()), Guard::Unchanged(key.clone(), Revision(7))] {
            let transaction = Transaction { guards: vec![guard], operations: vec![put("new", "x"), delete("a")] };
            let refused = store.commit(transaction).await;
            assert!(matches!(refused, Err(CommitError::Conflict(at)) if at == key));
        }
        assert_eq!(rows(store).await.keys().collect::<Vec<_>>(), ["a"]);
        let guards = vec![Guard::Unchanged(key, Revision(1)), Guard::Absent(RowKey::new(Table::Checks, "a"))];
        let accepted = store.commit(Transaction { guards, operations: vec![put("a", "2")] }).await;
        assert_eq!(accepted.expect("guards hold"), Revision(2), "a refused transaction takes no revision");
    });
}

#[test]
fn a_transaction_that_no_backend_could_take_is_refused() {
    on_each_backend(async |store| {
        let twice = store.commit(change(vec![put("a", "1"), delete("a")])).await;
        assert!(matches!(twice, Err(CommitError::TwiceInOneTransaction(_))));
        let many = (0..=MAX_OPERATIONS).map(|n| put(&n.to_string(), "")).collect();
        assert!(matches!(store.commit(change(many)).await, Err(CommitError::TooManyOperations(_))));
        let large = store.commit(change(vec![put("a", &"x".repeat(MAX_VALUE + 1))])).await;
        assert!(matches!(large, Err(CommitError::TooLarge { .. })));
        assert!(rows(store).await.is_empty());
    });
}

#[test]
fn a_watch_sees_every_commit_after_its_revision_once_and_in_order() {
    on_each_backend(async |store| {
        for n in 0..3 {
            store.commit(change(vec![put("a", &n.to_string())])).await.expect("commit");
        }
        let mut watch = store.watch(Revision(1));
        assert_eq!(watch.next().await.expect("kept").revision, Revision(2));
        assert_eq!(watch.next().await.expect("kept").revision, Revision(3));
        let (seen, committed) = tokio::join!(watch.next(), store.commit(change(vec![delete("a"), delete("none")])));
        let seen = seen.expect("woken");
        assert_eq!(seen.revision, committed.expect("commit"));
        assert_eq!(seen.changes, [Change { key: RowKey::new(Table::Services, "a"), row: None }]);
    });
}

#[test]
fn a_watch_that_fell_behind_is_told_to_load_again() {
    on_each_backend(async |store| {
        let mut watch = store.watch(Revision(0));
        for n in 0..=feed::HISTORY {
            store.commit(change(vec![put("a", &n.to_string())])).await.expect("commit");
        }
        assert_eq!(watch.next().await, Err(WatchError::Compacted));
        let mut late = store.watch(Revision(feed::HISTORY as u64));
        assert_eq!(late.next().await.expect("kept").revision, Revision(feed::HISTORY as u64 + 1));
    });
}

#[test]
fn concurrent_commits_are_all_kept_and_seen() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = RedbStore::open(&directory.path().join("state.redb")).expect("a new store");
    let store: &'static RedbStore = Box::leak(Box::new(store));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut watch = store.watch(Revision(0));
        let writers: Vec<_> = (0..20)
            .map(|n| tokio::spawn(async move { store.commit(change(vec![put(&n.to_string(), "x")])).await }))
            .collect();
        for expected in 1..=20 {
            assert_eq!(watch.next().await.expect("kept").revision, Revision(expected));
        }
        for writer in writers {
            writer.await.expect("no panic").expect("commit");
        }
        assert_eq!(rows(store).await.len(), 20);
    });
}

#[test]
fn the_file_is_private_and_survives_reopening() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("state.redb");
    let store = RedbStore::open(&path).expect("a new store");
    runtime().block_on(store.commit(change(vec![put("a", "1")]))).expect("commit");
    assert_eq!(std::fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
    drop(store);
    // As after a careless restore.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("ours");
    let store = RedbStore::open(&path).expect("the same store");
    assert_eq!(std::fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
    let after = runtime().block_on(async {
        assert_eq!(rows(&store).await["a"], ("1".to_owned(), 1, 1));
        store.commit(change(vec![put("a", "2")])).await
    });
    assert_eq!(after.expect("commit"), Revision(2), "revisions go on where they stopped");
}

#[test]
fn a_file_that_is_held_newer_or_foreign_is_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("state.redb");
    let held = RedbStore::open(&path).expect("a new store");
    assert!(matches!(RedbStore::open(&path), Err(StoreError::InUse { .. })));
    drop(held);

    let database = ::redb::Database::open(&path).expect("a redb file");
    let transaction = database.begin_write().expect("write");
    let meta: ::redb::TableDefinition<'_, &str, u64> = ::redb::TableDefinition::new("meta");
    transaction.open_table(meta).expect("open").insert("schema", SCHEMA_VERSION + 1).expect("insert");
    transaction.commit().expect("commit");
    drop(database);
    let newer = RedbStore::open(&path).err().expect("a newer layout is refused");
    assert!(matches!(newer, StoreError::NewerLayout { found, .. } if found == SCHEMA_VERSION + 1), "{newer}");

    std::fs::write(&path, "this is not a database").expect("write");
    assert!(matches!(RedbStore::open(&path), Err(StoreError::Damaged { .. } | StoreError::File { .. })));
    assert!(matches!(RedbStore::open(&directory.path().join("no/such")), Err(StoreError::File { .. })));
}

#[derive(Clone, Debug)]
struct Step {
    guard: Option<(u8, Option<u64>)>,
    changes: BTreeMap<u8, Option<String>>,
}

fn step() -> impl Strategy<Value = Step> {
    let guard = prop::option::of((0..5_u8, prop::option::of(1..12_u64)));
    let changes = prop::collection::btree_map(0..5_u8, prop::option::of("[a-c]{0,3}"), 0..4);
    (guard, changes).prop_map(|(guard, changes)| Step { guard, changes })
}

fn transaction(step: &Step) -> Transaction {
    let key = |n: u8| RowKey::new(Table::Services, n.to_string());
    let guard = |(n, revision): (u8, Option<u64>)| match revision {
        None => Guard::Absent(key(n)),
        Some(revision) => Guard::Unchanged(key(n), Revision(revision)),
    };
    let operation = |(n, value): (&u8, &Option<String>)| match value {
        Some(value) => put(&n.to_string(), value),
        None => delete(&n.to_string()),
    };
    Transaction {
        guards: step.guard.map(guard).into_iter().collect(),
        operations: step.changes.iter().map(operation).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Both backends accept and refuse alike, and hold the same rows; the watch alone rebuilds them.
    #[test]
    fn backends_agree(steps in prop::collection::vec(step(), 1..20)) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.redb");
        let (memory, file) = (MemoryStore::default(), RedbStore::open(&path).expect("a new store"));
        runtime().block_on(async {
            let mut watch = memory.watch(Revision(0));
            let mut rebuilt = BTreeMap::new();
            for step in &steps {
                let (left, right) = (memory.commit(transaction(step)).await, file.commit(transaction(step)).await);
                prop_assert_eq!(left.as_ref().ok(), right.as_ref().ok());
                if let Ok(revision) = left {
                    let commit = watch.next().await.expect("kept");
                    prop_assert_eq!(commit.revision, revision);
                    for Change { key, row } in &commit.changes {
                        match row {
                            Some(row) => rebuilt.insert(key.clone(), row.clone()),
                            None => rebuilt.remove(key),
                        };
                    }
                }
            }
            prop_assert_eq!(rows(&memory).await, rows(&file).await);
            let contents = memory.load().await.expect("load");
            prop_assert_eq!(contents.rows.into_iter().collect::<BTreeMap<_, _>>(), rebuilt);
            Ok(())
        })?;
        drop(file);
        let reopened = RedbStore::open(&path).expect("the same store");
        runtime().block_on(async {
            prop_assert_eq!(rows(&memory).await, rows(&reopened).await);
            Ok(())
        })?;
    }
}
