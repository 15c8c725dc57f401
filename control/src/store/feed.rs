//! Hands committed transactions to watchers: a bounded history and a signal.
//!
//! A watcher that is slower than [`HISTORY`] commits is told so and loads again; nobody waits for it.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Commit, Revision, WatchError};

/// Commits kept for watchers that start late or lag.
pub(super) const HISTORY: usize = 1024;

/// The publishing side, owned by an embedded store.
pub(super) struct Feed {
    shared: Arc<Mutex<History>>,
    latest: watch::Sender<Revision>,
}

struct History {
    /// The last revision that is no longer in `commits`.
    floor: Revision,
    commits: VecDeque<Arc<Commit>>,
}

impl Feed {
    /// A feed whose next commit is the one after `latest`.
    pub(super) fn new(latest: Revision) -> Self {
        let history = History { floor: latest, commits: VecDeque::new() };
        Self { shared: Arc::new(Mutex::new(history)), latest: watch::Sender::new(latest) }
    }

    /// Publishes one commit. Callers publish in the order of revisions.
    pub(super) fn publish(&self, commit: Commit) {
        let revision = commit.revision;
        {
            let mut history = self.shared.lock();
            if history.commits.len() == HISTORY
                && let Some(oldest) = history.commits.pop_front()
            {
                history.floor = oldest.revision;
            }
            history.commits.push_back(Arc::new(commit));
        }
        self.latest.send_replace(revision);
    }

    /// The last one that was published.
    pub(super) fn latest(&self) -> Revision {
        *self.latest.borrow()
    }

    /// Commits after `after`.
    pub(super) fn watch(&self, after: Revision) -> Watch {
        Watch { shared: Arc::clone(&self.shared), latest: self.latest.subscribe(), position: after }
    }
}

/// A reader of commits, in order, from a revision on.
pub struct Watch {
    shared: Arc<Mutex<History>>,
    latest: watch::Receiver<Revision>,
    position: Revision,
}

impl Watch {
    /// The next commit; waits for it. Cancel-safe.
    ///
    /// # Errors
    /// [`WatchError::Compacted`] when the next commit is no longer kept, [`WatchError::Closed`] when the store is gone.
    pub async fn next(&mut self) -> Result<Arc<Commit>, WatchError> {
        loop {
            if let Some(commit) = self.kept()? {
                self.position = commit.revision;
                return Ok(commit);
            }
            self.latest.changed().await.map_err(|_| WatchError::Closed)?;
        }
    }

    /// The first commit after the position, if there is one.
    fn kept(&mut self) -> Result<Option<Arc<Commit>>, WatchError> {
        // Seen before the look, so that a commit between look and wait wakes the wait.
        self.latest.mark_unchanged();
        let history = self.shared.lock();
        if self.position < history.floor {
            return Err(WatchError::Compacted);
        }
        let next = history.commits.partition_point(|commit| commit.revision <= self.position);
        Ok(history.commits.get(next).cloned())
    }
}
