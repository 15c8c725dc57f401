//! Whether bytes between two workloads of one node are encrypted.

use std::fmt;
use std::str::FromStr;

/// The `encryption` setting. Ordered: the greater value is the stricter one.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Encryption {
    /// Bytes that never leave the node's kernel are not encrypted; identity and intentions hold all the same.
    BetweenNodes,
    /// Mutual TLS on every mesh connection.
    #[default]
    Always,
}

/// A text that is neither `always` nor `between-nodes`.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("encryption must be \"always\" or \"between-nodes\", got {0:?}")]
pub struct UnknownEncryption(pub String);

impl Encryption {
    /// What holds between two ends: the stricter of both.
    #[must_use]
    pub fn between(self, other: Self) -> Self {
        self.max(other)
    }

    /// The word used in configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BetweenNodes => "between-nodes",
            Self::Always => "always",
        }
    }
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Encryption {
    type Err = UnknownEncryption;
    fn from_str(text: &str) -> Result<Self, UnknownEncryption> {
        match text {
            "always" => Ok(Self::Always),
            "between-nodes" => Ok(Self::BetweenNodes),
            other => Err(UnknownEncryption(other.to_owned())),
        }
    }
}
