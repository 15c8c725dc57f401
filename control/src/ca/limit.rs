//! How many requests the authority signs per second: a token bucket, as Consul's `CSRMaxPerSecond`.

use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

/// A bucket that holds one second's worth of tokens and refills continuously.
#[derive(Debug)]
pub(crate) struct RateLimit(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    refilled: SystemTime,
}

impl RateLimit {
    /// A bucket that is full from the start, whatever its size.
    pub(crate) fn new(now: SystemTime) -> Self {
        Self(Mutex::new(Bucket { tokens: f64::INFINITY, refilled: now }))
    }

    /// Takes one token; `false` if there is none. `per_second` 0 means no limit.
    pub(crate) fn take(&self, now: SystemTime, per_second: u32) -> bool {
        if per_second == 0 {
            return true;
        }
        let per_second = f64::from(per_second);
        let mut bucket = self.0.lock();
        // A clock that went back refills nothing.
        let passed = now.duration_since(bucket.refilled).unwrap_or(Duration::ZERO);
        bucket.tokens = (bucket.tokens + passed.as_secs_f64() * per_second).min(per_second);
        bucket.refilled = now;
        let granted = bucket.tokens >= 1.0;
        if granted {
            bucket.tokens -= 1.0;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_of_one_second_passes_then_the_rate_holds() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let limit = RateLimit::new(start);
        assert_eq!((0..80).filter(|_| limit.take(start, 50)).count(), 50);
        let later = start + Duration::from_millis(100);
        assert_eq!((0..80).filter(|_| limit.take(later, 50)).count(), 5);
    }

    #[test]
    fn zero_means_no_limit_and_a_clock_that_goes_back_does_no_harm() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let limit = RateLimit::new(start);
        assert!((0..1_000).all(|_| limit.take(start, 0)));
        assert!(limit.take(start, 1));
        assert!(!limit.take(start - Duration::from_secs(500), 1));
        assert!(!limit.take(start - Duration::from_secs(500), 1));
    }
}
