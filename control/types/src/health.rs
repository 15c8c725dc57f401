//! Health of a check and of an instance.

use std::fmt;
use std::str::FromStr;

/// State of one check; ordered from best to worst.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum HealthStatus {
    /// Takes traffic.
    Passing,
    /// Discoverable, but takes no mesh traffic while a passing instance exists.
    Warning,
    /// Takes no traffic.
    Critical,
}

/// A text that is no check status.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown check status {0:?}")]
pub struct UnknownHealthStatus(pub String);

/// The worst of all checks; an instance without checks is passing (as in Consul).
pub fn aggregate(checks: impl IntoIterator<Item = HealthStatus>) -> HealthStatus {
    checks.into_iter().max().unwrap_or(HealthStatus::Passing)
}

impl HealthStatus {
    /// Consul's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passing => "passing",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

impl fmt::Display for HealthStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for HealthStatus {
    type Err = UnknownHealthStatus;
    fn from_str(text: &str) -> Result<Self, UnknownHealthStatus> {
        match text {
            "passing" => Ok(Self::Passing),
            "warning" => Ok(Self::Warning),
            "critical" => Ok(Self::Critical),
            other => Err(UnknownHealthStatus(other.to_owned())),
        }
    }
}
