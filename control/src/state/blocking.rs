//! Blocking reads: hold a reader until what it asked about changes, or its wait ends.
//!
//! Source: Consul's HTTP API, "Blocking Queries". A time-out is no error: the reader gets the same data and index again.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use super::{Ledger, State};
use crate::store::Revision;

/// `wait` when the reader names none.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(5 * 60);
/// Longest `wait`; a longer one is cut to it.
pub const MAX_WAIT: Duration = Duration::from_secs(10 * 60);

/// Waits until the index that `scope` computes exceeds `index`, at most `wait` (and up to a sixteenth longer, so that
/// readers that came together do not return together). Returns the latest state; at once for index 0.
pub async fn until(
    ledger: &Ledger,
    index: u64,
    wait: Duration,
    scope: impl Fn(&State) -> Revision + Send,
) -> Arc<State> {
    let mut current = ledger.watch();
    if index == 0 {
        return ledger.state();
    }
    let wait = wait.min(MAX_WAIT);
    let wait = wait + jitter(wait / 16);
    let changed = current.wait_for(|state| scope(state).0.max(1) > index || state.revision().0 < index);
    match tokio::time::timeout(wait, changed).await {
        Ok(Ok(state)) => Arc::clone(&state),
        // Time is up, or the agent is stopping: answer with what there is.
        Ok(Err(_)) | Err(_) => ledger.state(),
    }
}

/// A random time below `most`.
#[must_use]
pub fn jitter(most: Duration) -> Duration {
    let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
    // `RandomState` is seeded by the system and differs for each instance: random enough to spread load.
    let random = RandomState::new().hash_one(0_u8);
    Duration::from_nanos(if most == 0 { 0 } else { random % most })
}
