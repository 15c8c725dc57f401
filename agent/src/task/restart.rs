//! The restart policy as a pure state machine: when does a task that ended start again?
//!
//! Nomad's rules: attempts are counted in a window that opens at the first failure; each restart waits `delay` plus up to a
//! quarter of it at random; when the attempts are used up, mode `fail` gives up and mode `delay` waits for the window's end.
//! No clock and no randomness inside: the caller passes both, so tests decide them.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// The random part of a delay, as a share of it (Nomad's).
const JITTER: f64 = 0.25;

/// What happens when the attempts are used up.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartMode {
    /// The task has failed for good.
    Fail,
    /// Wait until the interval is over, then go on.
    Delay,
}

/// Nomad's `restart` block.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RestartPolicy {
    /// Restarts allowed within `interval`.
    pub attempts: u32,
    /// Length of the window in which attempts are counted.
    pub interval: Duration,
    /// Wait before each restart.
    pub delay: Duration,
    /// What happens after the last attempt.
    pub mode: RestartMode,
}

impl Default for RestartPolicy {
    /// Nomad's default for service jobs.
    fn default() -> Self {
        Self {
            attempts: 2,
            interval: Duration::from_secs(30 * 60),
            delay: Duration::from_secs(15),
            mode: RestartMode::Fail,
        }
    }
}

/// Why a decision was taken, in Nomad's words (they appear in a task's events).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RestartReason {
    /// Another attempt is left.
    WithinPolicy,
    /// `attempts = 0` and `mode = "fail"`.
    NoRestartsAllowed,
    /// The attempts of this interval are used up and the mode is `fail`.
    Exceeded {
        /// The policy's attempts.
        attempts: u32,
        /// The policy's interval.
        interval: Duration,
    },
    /// The attempts of this interval are used up and the mode is `delay`.
    Delayed,
    /// Trying again would fail the same way.
    Unrecoverable,
}

impl fmt::Display for RestartReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WithinPolicy => f.write_str("Restart within policy"),
            Self::NoRestartsAllowed => f.write_str("Policy allows no restarts"),
            Self::Exceeded { attempts, interval } => {
                let interval = culvert_types::format_go_duration(*interval);
                write!(f, "Exceeded allowed attempts {attempts} in interval {interval} and mode is \"fail\"")
            }
            Self::Delayed => f.write_str("Exceeded allowed attempts, applying a delay"),
            Self::Unrecoverable => f.write_str("Error was unrecoverable"),
        }
    }
}

/// What to do with a task that ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RestartDecision {
    /// Start it again after a while.
    After(Duration, RestartReason),
    /// It has failed for good.
    GiveUp(RestartReason),
}

/// The policy and what has happened so far.
#[derive(Clone, Debug)]
pub struct RestartTracker {
    policy: RestartPolicy,
    window: Option<Instant>,
    count: u32,
}

impl RestartTracker {
    /// A tracker that has seen nothing.
    #[must_use]
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, window: None, count: 0 }
    }

    /// Restarts decided in the current window.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Decides after a task ended, or failed to start, at `now`.
    ///
    /// `recoverable`: could another attempt succeed? A missing command is not. `random`: a fresh number in `0.0..1.0`.
    pub fn decide(&mut self, now: Instant, recoverable: bool, random: f64) -> RestartDecision {
        let RestartPolicy { attempts, interval, delay, mode } = self.policy;
        if !recoverable {
            return RestartDecision::GiveUp(RestartReason::Unrecoverable);
        }
        if attempts == 0 && mode == RestartMode::Fail {
            return RestartDecision::GiveUp(RestartReason::NoRestartsAllowed);
        }
        let opened = match self.window {
            Some(opened) if now.saturating_duration_since(opened) <= interval => opened,
            _ => {
                self.count = 0;
                *self.window.insert(now)
            }
        };
        if self.count < attempts {
            self.count += 1;
            return RestartDecision::After(jittered(delay, random), RestartReason::WithinPolicy);
        }
        match mode {
            RestartMode::Fail => RestartDecision::GiveUp(RestartReason::Exceeded { attempts, interval }),
            RestartMode::Delay => {
                let rest = (opened + interval).saturating_duration_since(now);
                // The next window opens when the wait is over, so that its attempts count anew.
                self.window = Some(opened + interval);
                self.count = 0;
                RestartDecision::After(rest + jittered(delay, random), RestartReason::Delayed)
            }
        }
    }
}

fn jittered(delay: Duration, random: f64) -> Duration {
    delay + delay.mul_f64(JITTER * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(attempts: u32, mode: RestartMode) -> RestartPolicy {
        RestartPolicy { attempts, interval: Duration::from_secs(60), delay: Duration::from_secs(4), mode }
    }

    #[test]
    fn gives_up_after_the_attempts_of_one_interval() {
        let start = Instant::now();
        let mut tracker = RestartTracker::new(policy(2, RestartMode::Fail));
        let within = |seconds| RestartDecision::After(Duration::from_secs(seconds), RestartReason::WithinPolicy);
        assert_eq!(tracker.decide(start, true, 0.0), within(4));
        assert_eq!(tracker.decide(start + Duration::from_secs(5), true, 1.0), within(5));
        let RestartDecision::GiveUp(reason) = tracker.decide(start + Duration::from_secs(60), true, 0.0) else {
            panic!("the third failure within the interval must not restart");
        };
        assert_eq!(reason.to_string(), "Exceeded allowed attempts 2 in interval 1m0s and mode is \"fail\"");
    }

    #[test]
    fn counts_anew_when_the_interval_is_over() {
        let start = Instant::now();
        let mut tracker = RestartTracker::new(policy(1, RestartMode::Fail));
        for round in 0..5 {
            let now = start + Duration::from_secs(61 * round);
            assert!(matches!(tracker.decide(now, true, 0.5), RestartDecision::After(..)), "round {round}");
            assert_eq!(tracker.count(), 1);
        }
    }

    #[test]
    fn mode_delay_waits_for_the_end_of_the_interval_and_goes_on() {
        let start = Instant::now();
        let mut tracker = RestartTracker::new(policy(1, RestartMode::Delay));
        assert!(matches!(tracker.decide(start, true, 0.0), RestartDecision::After(..)));
        let decision = tracker.decide(start + Duration::from_secs(10), true, 0.0);
        assert_eq!(decision, RestartDecision::After(Duration::from_secs(50 + 4), RestartReason::Delayed));
        let after = start + Duration::from_secs(65);
        assert!(matches!(tracker.decide(after, true, 0.0), RestartDecision::After(_, RestartReason::WithinPolicy)));
    }

    #[test]
    fn zero_attempts_and_unrecoverable_errors_never_restart() {
        let now = Instant::now();
        let mut none = RestartTracker::new(policy(0, RestartMode::Fail));
        assert_eq!(none.decide(now, true, 0.0), RestartDecision::GiveUp(RestartReason::NoRestartsAllowed));
        let mut some = RestartTracker::new(policy(9, RestartMode::Delay));
        assert_eq!(some.decide(now, false, 0.0), RestartDecision::GiveUp(RestartReason::Unrecoverable));
    }

    #[test]
    fn the_random_part_is_at_most_a_quarter_of_the_delay() {
        for random in [0.0, 0.3, 1.0, 7.0] {
            let delay = jittered(Duration::from_secs(100), random);
            assert!((Duration::from_secs(100)..=Duration::from_secs(125)).contains(&delay), "{random}: {delay:?}");
        }
    }
}
