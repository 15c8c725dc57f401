//! The name of an allocation: a UUID whose first eight digits name the kernel objects made for it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Digits of the ID in the names of the netns and the veth: an interface name holds 15 bytes.
pub const SHORT_ID: usize = 8;

/// A text that is not a lower-case, hyphenated UUID.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is not an allocation ID (a lower-case UUID)")]
pub struct AllocIdError(String);

/// An allocation's ID: a UUID in lower case with hyphens, so that it is safe in paths, cgroup and interface names.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct AllocId(Box<str>);

impl AllocId {
    /// Checks and takes over `text`.
    ///
    /// # Errors
    /// [`AllocIdError`] when it is not a UUID in its usual lower-case form.
    pub fn new(text: &str) -> Result<Self, AllocIdError> {
        let parsed = uuid::Uuid::try_parse(text).map_err(|_| AllocIdError(text.chars().take(64).collect()))?;
        if parsed.hyphenated().to_string() == text {
            Ok(Self(text.into()))
        } else {
            Err(AllocIdError(text.chars().take(64).collect()))
        }
    }

    /// A new random ID.
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().hyphenated().to_string().into())
    }

    /// The whole ID.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first [`SHORT_ID`] digits: part of the names of netns and veth.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..SHORT_ID]
    }
}

impl fmt::Display for AllocId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for AllocId {
    type Err = AllocIdError;
    fn from_str(text: &str) -> Result<Self, AllocIdError> {
        Self::new(text)
    }
}

impl TryFrom<String> for AllocId {
    type Error = AllocIdError;
    fn try_from(text: String) -> Result<Self, AllocIdError> {
        Self::new(&text)
    }
}

impl From<AllocId> for String {
    fn from(id: AllocId) -> Self {
        id.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_only_the_canonical_form() {
        assert_eq!(AllocId::new("b6d4f8c2-0000-4000-8000-00000000002a").expect("a UUID").short(), "b6d4f8c2");
        for text in [
            "",
            "b6d4f8c2",
            "../../../etc",
            "B6D4F8C2-0000-4000-8000-00000000002A",
            "{b6d4f8c2-0000-4000-8000-00000000002a}",
            "b6d4f8c200004000800000000000002a",
            "b6d4f8c2-0000-4000-8000-00000000002a\n",
        ] {
            assert!(AllocId::new(text).is_err(), "{text:?}");
        }
        assert_eq!(AllocId::new(AllocId::random().as_str()).map(|id| id.short().len()), Ok(SHORT_ID));
    }
}
