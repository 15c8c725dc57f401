//! The store of `-dev`: rows in memory, gone with the process.

use std::collections::BTreeMap;

use futures::future::{self, BoxFuture};
use parking_lot::Mutex;

use super::feed::{Feed, Watch};
use super::{Change, Commit, CommitError, Contents, Operation, Revision, Row, RowKey, Store, StoreError, Transaction};

/// Rows in memory.
pub struct MemoryStore {
    inner: Mutex<Inner>,
    feed: Feed,
}

#[derive(Default)]
struct Inner {
    revision: Revision,
    rows: BTreeMap<RowKey, Row>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self { inner: Mutex::default(), feed: Feed::new(Revision(0)) }
    }
}

impl MemoryStore {
    fn commit_now(&self, transaction: Transaction) -> Result<Revision, CommitError> {
        transaction.check()?;
        let mut inner = self.inner.lock();
        for guard in &transaction.guards {
            if !guard.holds(inner.rows.get(guard.key()).map(|row| row.modified)) {
                return Err(CommitError::Conflict(guard.key().clone()));
            }
        }
        let revision = Revision(inner.revision.0 + 1);
        inner.revision = revision;
        let mut changes = Vec::with_capacity(transaction.operations.len());
        for operation in transaction.operations {
            match operation {
                Operation::Put(key, value) => {
                    let created = inner.rows.get(&key).map_or(revision, |row| row.created);
                    let row = Row { value, created, modified: revision };
                    inner.rows.insert(key.clone(), row.clone());
                    changes.push(Change { key, row: Some(row) });
                }
                Operation::Delete(key) => {
                    if inner.rows.remove(&key).is_some() {
                        changes.push(Change { key, row: None });
                    }
                }
            }
        }
        // Under the lock, so that commits are published in order.
        self.feed.publish(Commit { revision, changes });
        Ok(revision)
    }
}

impl Store for MemoryStore {
    fn commit(&self, transaction: Transaction) -> BoxFuture<'_, Result<Revision, CommitError>> {
        Box::pin(future::ready(self.commit_now(transaction)))
    }

    fn load(&self) -> BoxFuture<'_, Result<Contents, StoreError>> {
        let inner = self.inner.lock();
        let rows = inner.rows.iter().map(|(key, row)| (key.clone(), row.clone())).collect();
        Box::pin(future::ready(Ok(Contents { revision: inner.revision, rows })))
    }

    fn watch(&self, after: Revision) -> Watch {
        self.feed.watch(after)
    }
}
