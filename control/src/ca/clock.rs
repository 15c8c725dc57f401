//! The time the certificate authority goes by, as a value: tests run days of certificate life in milliseconds.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Longest single sleep of [`Clock::sleep_until`]: after it the wall clock is read again, so that a jump of the clock or a
/// suspended machine delays a renewal by at most this much.
const MAX_NAP: Duration = Duration::from_secs(60);

/// Where the time comes from.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The system's wall clock.
    #[must_use]
    pub fn system() -> Self {
        Self(Arc::new(SystemTime::now))
    }

    /// A clock that starts at `start` and advances with tokio's timer, which tests pause and advance at will.
    ///
    /// # Panics
    /// Outside a tokio runtime with a paused or running timer, as `tokio::time::Instant::now` does.
    #[must_use]
    pub fn following_tokio(start: SystemTime) -> Self {
        let origin = tokio::time::Instant::now();
        Self(Arc::new(move || start + origin.elapsed()))
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }

    /// Waits until the clock shows `deadline`, noticing jumps of the clock within a minute.
    pub async fn sleep_until(&self, deadline: SystemTime) {
        while let Ok(left) = deadline.duration_since(self.now()) {
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(MAX_NAP)).await;
        }
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}
