//! Intentions: which service may call which.

use std::fmt;
use std::str::FromStr;

use crate::name::{NameError, ServiceName};

/// What an intention says about connections it matches.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Action {
    /// Let the connection through.
    Allow,
    /// Refuse it, and end it if it is already open.
    Deny,
}

/// A text that is neither `allow` nor `deny`.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("action must be \"allow\" or \"deny\", got {0:?}")]
pub struct UnknownAction(pub String);

impl Action {
    /// Consul's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Action {
    type Err = UnknownAction;
    fn from_str(text: &str) -> Result<Self, UnknownAction> {
        match text {
            "allow" => Ok(Self::Allow),
            "deny" => Ok(Self::Deny),
            other => Err(UnknownAction(other.to_owned())),
        }
    }
}

/// One side of an intention: a service by name, or every service (`*`).
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum IntentionSubject {
    /// Exactly this service.
    Exact(ServiceName),
    /// Every service of the trust domain.
    Any,
}

impl IntentionSubject {
    /// Does this side cover `service`?
    #[must_use]
    pub fn covers(&self, service: &ServiceName) -> bool {
        match self {
            Self::Exact(name) => name == service,
            Self::Any => true,
        }
    }

    /// The name, or `*`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Exact(name) => name.as_str(),
            Self::Any => "*",
        }
    }
}

impl IntentionSubject {
    /// One that was stored: see [`ServiceName::from_stored`].
    ///
    /// # Errors
    /// [`NameError`] when no build would have stored it.
    pub fn from_stored(text: &str) -> Result<Self, NameError> {
        if text == "*" { Ok(Self::Any) } else { ServiceName::from_stored(text).map(Self::Exact) }
    }
}

impl fmt::Display for IntentionSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for IntentionSubject {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text == "*" { Ok(Self::Any) } else { ServiceName::new(text).map(Self::Exact) }
    }
}

/// Consul's precedence number: 9 exact → exact, 8 any → exact, 6 exact → any, 5 any → any. Higher wins.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Precedence(pub u8);

/// One rule. A pair of source and destination has at most one.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Intention {
    /// Who calls.
    pub source: IntentionSubject,
    /// Who is called.
    pub destination: IntentionSubject,
    /// What happens.
    pub action: Action,
}

impl Intention {
    /// How specific the rule is.
    #[must_use]
    pub fn precedence(&self) -> Precedence {
        Precedence(match (&self.source, &self.destination) {
            (IntentionSubject::Exact(_), IntentionSubject::Exact(_)) => 9,
            (IntentionSubject::Any, IntentionSubject::Exact(_)) => 8,
            (IntentionSubject::Exact(_), IntentionSubject::Any) => 6,
            (IntentionSubject::Any, IntentionSubject::Any) => 5,
        })
    }

    /// Does the rule speak about this pair?
    #[must_use]
    pub fn matches(&self, source: &ServiceName, destination: &ServiceName) -> bool {
        self.source.covers(source) && self.destination.covers(destination)
    }
}

impl fmt::Display for Intention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} => {} ({}, precedence {})", self.source, self.destination, self.action, self.precedence().0)
    }
}
