//! How long to wait before the control plane is tried again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Longest wait after the first failure.
pub const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Longest wait after any number of failures.
pub const LAST_RETRY: Duration = Duration::from_secs(10);

/// Doubles from [`FIRST_RETRY`] to [`LAST_RETRY`]; each wait is a random part of it, at least half, so that the proxies of a
/// node do not come all at once.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Self { next: FIRST_RETRY }
    }

    /// The wait after one more failure.
    pub(super) fn fail(&mut self) -> Duration {
        let longest = self.next;
        self.next = (longest * 2).min(LAST_RETRY);
        longest / 2 + (longest / 2).mul_f64(random_fraction())
    }

    /// Forgets the failures so far.
    pub(super) fn reset(&mut self) {
        self.next = FIRST_RETRY;
    }
}

/// From 0 to 1. The seeds of the standard library's hash tables are random enough to spread load.
fn random_fraction() -> f64 {
    f64::from(RandomState::new().hash_one(0_u8) as u32) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_and_start_again() {
        let mut backoff = Backoff::new();
        let mut longest = FIRST_RETRY;
        for _ in 0..20 {
            let wait = backoff.fail();
            assert!(wait >= longest / 2 && wait <= longest, "{wait:?} of {longest:?}");
            longest = (longest * 2).min(LAST_RETRY);
        }
        assert_eq!(longest, LAST_RETRY);
        backoff.reset();
        assert!(backoff.fail() <= FIRST_RETRY);
    }

    #[test]
    fn waits_differ() {
        let waits: std::collections::BTreeSet<_> = (0..32).map(|_| Backoff::new().fail()).collect();
        assert!(waits.len() > 16, "{waits:?}");
    }
}
