//! Keeps the typed state current and writes to the store.
//!
//! One task follows the store's watch and publishes each new [`State`]. A write returns after the state that contains it
//! is published, so whoever writes reads its own write.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, warn};

use super::{RowError, State};
use crate::store::{
    CommitError, Guard, Operation, Revision, RowKey, Store, StoreError, Table, Transaction, Watch, WatchError,
};

/// Attempts of one update before it gives up. Only another server can make one fail.
const MAX_ATTEMPTS: usize = 16;

/// Why the state could not be read at start.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A row of it.
    #[error(transparent)]
    Row(#[from] RowError),
}

/// Why an update was not made.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The store refused or failed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The ledger is shutting down.
    #[error("the state store is closed")]
    Closed,
}

/// What an update wants to change, computed from one state. Each row it touches is guarded by the ledger.
#[derive(Debug, Default)]
pub struct Plan {
    operations: Vec<Operation>,
}

impl Plan {
    /// Makes or replaces a row. Left out when the row already says so.
    pub fn put<T: Serialize>(&mut self, table: Table, key: impl Into<String>, value: &T) {
        let json = serde_json::to_vec(value).expect("rows have string keys and no failing serialiser");
        self.operations.push(Operation::Put(RowKey::new(table, key), Bytes::from(json)));
    }

    /// Removes a row.
    pub fn delete(&mut self, table: Table, key: impl Into<String>) {
        self.operations.push(Operation::Delete(RowKey::new(table, key)));
    }

    /// Nothing to do?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// Adds the guard of every row: as `state` knows it.
    fn transaction(self, state: &State) -> Transaction {
        let guard = |operation: &Operation| {
            let key = operation.key().clone();
            match state.modified(key.table, &key.key) {
                None => Guard::Absent(key),
                Some(revision) => Guard::Unchanged(key, revision),
            }
        };
        Transaction { guards: self.operations.iter().map(guard).collect(), operations: self.operations }
    }
}

/// The current state and the way to change it. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    store: Arc<dyn Store>,
    current: watch::Receiver<Arc<State>>,
    /// One plan at a time, from the read of the state to the publication of the next: plans that look at rows which they do
    /// not write (a free port, say) then hold on one server; guards on the written rows cover the others.
    planner: Arc<Mutex<()>>,
    _follower: Arc<AbortOnDropHandle<()>>,
}

impl Ledger {
    /// Loads the store and starts to follow it.
    ///
    /// # Errors
    /// [`LedgerError`] when the store or one of its rows cannot be read.
    pub async fn start(store: Arc<dyn Store>, stop: CancellationToken) -> Result<Self, LedgerError> {
        let state = State::load(store.load().await?)?;
        let watch = store.watch(state.revision());
        let (publish, current) = watch::channel(Arc::new(state));
        let follower = Follower { store: Arc::clone(&store), watch, publish };
        let task = tokio::spawn(async move {
            stop.run_until_cancelled(follower.run()).await;
        });
        let follower = Arc::new(AbortOnDropHandle::new(task));
        Ok(Self { store, current, planner: Arc::default(), _follower: follower })
    }

    /// The latest state.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        Arc::clone(&self.current.borrow())
    }

    /// Follows the state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<State>> {
        self.current.clone()
    }

    /// Commits what `plan` computes from the latest state, and returns what it returned beside.
    ///
    /// `plan` runs again if another server changed a row it writes. An empty plan, or one that would leave every row as it
    /// is, commits nothing. Once the commit is under way it completes even if the caller goes away.
    ///
    /// # Errors
    /// What `plan` returned, or [`UpdateError`].
    pub async fn update<T, E: From<UpdateError>>(
        &self,
        mut plan: impl FnMut(&State, &mut Plan) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut attempt = 0;
        loop {
            let turn = Arc::clone(&self.planner).lock_owned().await;
            let state = self.state();
            let mut wanted = Plan::default();
            let outcome = plan(&state, &mut wanted)?;
            let wanted = self.without_repetition(&state, wanted);
            if wanted.is_empty() {
                return Ok(outcome);
            }
            let ledger = self.clone();
            let transaction = wanted.transaction(&state);
            // A task of its own: a caller that hangs up must not release the turn before the commit is visible.
            let commit = tokio::spawn(async move {
                let committed = ledger.commit(transaction).await;
                drop(turn);
                committed
            });
            match commit.await.unwrap_or(Err(UpdateError::Closed)) {
                Ok(_) => return Ok(outcome),
                Err(UpdateError::Commit(CommitError::Conflict(_))) if attempt < MAX_ATTEMPTS => attempt += 1,
                Err(err) => return Err(err.into()),
            }
            self.past(state.revision()).await?;
        }
    }

    /// Commits and waits until the state shows it.
    async fn commit(&self, transaction: Transaction) -> Result<Revision, UpdateError> {
        let revision = self.store.commit(transaction).await?;
        let mut current = self.current.clone();
        current.wait_for(|state| state.revision() >= revision).await.map_err(|_| UpdateError::Closed)?;
        Ok(revision)
    }

    /// Waits for the change that a conflict announced.
    async fn past(&self, revision: Revision) -> Result<(), UpdateError> {
        let mut current = self.current.clone();
        current.wait_for(|state| state.revision() > revision).await.map_err(|_| UpdateError::Closed)?;
        Ok(())
    }

    /// Drops what would not change anything, so that repetition costs no revision and wakes no reader.
    fn without_repetition(&self, state: &State, mut plan: Plan) -> Plan {
        plan.operations.retain(|operation| match operation {
            Operation::Put(key, value) => !state.says(key, value),
            Operation::Delete(key) => state.modified(key.table, &key.key).is_some(),
        });
        plan
    }
}

/// The task behind [`Ledger::watch`].
struct Follower {
    store: Arc<dyn Store>,
    watch: Watch,
    publish: watch::Sender<Arc<State>>,
}

impl Follower {
    async fn run(mut self) {
        loop {
            match self.watch.next().await {
                Ok(commit) => {
                    let (state, errors) = self.publish.borrow().apply(&commit);
                    for err in errors {
                        error!(err = %Chain(&err), "row ignored, its previous value stays");
                    }
                    self.publish.send_replace(Arc::new(state));
                }
                Err(WatchError::Compacted) => self.reload().await,
                Err(WatchError::Closed) => return,
            }
        }
    }

    async fn reload(&mut self) {
        warn!("fell behind the state store, loading it again");
        let loaded = self.store.load().await.map_err(LedgerError::from);
        match loaded.and_then(|contents| Ok(State::load(contents)?)) {
            Ok(state) => {
                self.watch = self.store.watch(state.revision());
                self.publish.send_replace(Arc::new(state));
            }
            Err(err) => {
                error!(err = %Chain(&err), "state store cannot be loaded, trying again");
                tokio::time::sleep(RELOAD_BACKOFF).await;
            }
        }
    }
}

/// Pause after a failed reload.
const RELOAD_BACKOFF: std::time::Duration = std::time::Duration::from_secs(1);

/// An error with its causes on one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(err) = cause {
            write!(f, ": {err}")?;
            cause = err.source();
        }
        Ok(())
    }
}
