//! The one decision function: may `source` call `destination`?
//!
//! The check API, the RBAC renderer, the eBPF map compiler and `culvert why` all end here; property tests hold every
//! other place that decides equal to it.

use std::fmt;

use crate::intention::{Action, Intention};
use crate::name::ServiceName;

/// What decided: a rule, or nothing matched and the default applied.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DecidedBy<'a> {
    /// The matching intention of highest precedence.
    Intention(&'a Intention),
    /// No intention matched.
    Default,
}

impl fmt::Display for DecidedBy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intention(intention) => intention.fmt(f),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A verdict and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Decision<'a> {
    /// Allow or deny.
    pub action: Action,
    /// The rule behind it.
    pub by: DecidedBy<'a>,
}

impl Decision<'_> {
    /// Is the connection allowed?
    #[must_use]
    pub fn allowed(&self) -> bool {
        self.action == Action::Allow
    }
}

/// Decides whether `source` may open a connection to `destination`.
///
/// The matching intention of highest precedence wins; there is no merging. Without a match `default` applies.
/// Two intentions of equal precedence that both match can only be duplicates of one pair, which the store refuses; should
/// they appear all the same, deny wins: never allow by accident.
#[must_use]
pub fn decide<'a>(
    intentions: impl IntoIterator<Item = &'a Intention>,
    source: &ServiceName,
    destination: &ServiceName,
    default: Action,
) -> Decision<'a> {
    intentions
        .into_iter()
        .filter(|intention| intention.matches(source, destination))
        .max_by_key(|intention| (intention.precedence(), intention.action == Action::Deny))
        .map_or(Decision { action: default, by: DecidedBy::Default }, |intention| Decision {
            action: intention.action,
            by: DecidedBy::Intention(intention),
        })
}
