//! Pauses before what keeps ending is started again: the worker as a whole, and single proxies that it gave up.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// First pause before what keeps ending is started again; doubled up to [`MAX_PAUSE`].
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between two starts.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause between the end of a worker and the start of the next: who calls meanwhile shall wait for less than a
/// second, however often workers end. One that ends at once costs a start every 0.4 s, a few hundredths of a processor.
const MAX_VACANCY: Duration = Duration::from_millis(400);
/// What lived this long was not the cause of its own end: the next start does not wait.
const SETTLED: Duration = Duration::from_secs(10);

/// The pause before the next start of what lived for `lived`, when there was a pause of `before` last time.
pub(super) fn next_pause(before: Duration, lived: Duration) -> Duration {
    if lived >= SETTLED { Duration::ZERO } else { (before * 2).clamp(FIRST_PAUSE, MAX_PAUSE) }
}

/// The pause before another worker follows one that ran and lived for `lived`, when the last pause was `before`.
pub(super) fn vacancy(before: Duration, lived: Duration) -> Duration {
    next_pause(before, lived).min(MAX_VACANCY)
}

/// Proxies that the worker gave up unasked, and when each is served again.
#[derive(Default)]
pub(super) struct Failed {
    proxies: BTreeMap<String, Failure>,
}

struct Failure {
    pause: Duration,
    served: Instant,
    /// When it is to be served again; `None` once it is.
    due: Option<Instant>,
}

impl Failed {
    /// `proxy` failed. Returns the pause until it is due again: none for the first time, since callers wait in the backlog.
    pub(super) fn note(&mut self, proxy: &str) -> Duration {
        let now = Instant::now();
        let known = self.proxies.get(proxy);
        let pause = known.map_or(Duration::ZERO, |known| next_pause(known.pause, now - known.served));
        self.proxies.insert(proxy.to_owned(), Failure { pause, served: now, due: Some(now + pause) });
        pause
    }

    /// `proxy` is not served at present, but will be.
    pub(super) fn waits(&self, proxy: &str) -> bool {
        self.proxies.get(proxy).is_some_and(|failure| failure.due.is_some())
    }

    /// Waits until one is due, for ever if none is; it counts as served then. Cancel-safe.
    pub(super) async fn due(&mut self) -> String {
        let waiting = self.proxies.iter_mut().filter_map(|(proxy, failure)| Some((failure.due?, proxy, failure)));
        match waiting.min_by_key(|(due, ..)| *due) {
            Some((due, proxy, failure)) => {
                sleep_until(due).await;
                (failure.served, failure.due) = (Instant::now(), None);
                proxy.clone()
            }
            None => std::future::pending().await,
        }
    }

    /// `proxy` is not wanted any more.
    pub(super) fn forget(&mut self, proxy: &str) {
        self.proxies.remove(proxy);
    }

    /// There is another worker, and each proxy is served by it.
    pub(super) fn clear(&mut self) {
        self.proxies.clear();
    }
}
