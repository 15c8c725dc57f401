//! Names that reach certificates, DNS labels and file names: services and datacenters.

use std::fmt;
use std::str::FromStr;

/// Longest service name: it must fit a DNS label (RFC 1035 §2.3.4) in `<name>.service.consul` and in the SNI.
pub const MAX_SERVICE_NAME: usize = 63;

/// Why a name was refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NameError {
    /// Nothing between the quotes.
    #[error("name is empty")]
    Empty,
    /// More than [`MAX_SERVICE_NAME`] bytes.
    #[error("name {0:?} is longer than {MAX_SERVICE_NAME} bytes")]
    TooLong(String),
    /// A byte outside `A-Z a-z 0-9 - _ .`, or a name that starts or ends with a separator.
    #[error("name {name:?} must start and end with a letter or digit and hold only letters, digits, '-', '_' and '.'")]
    Character {
        /// The refused text.
        name: String,
    },
}

fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_SERVICE_NAME {
        return Err(NameError::TooLong(name.to_owned()));
    }
    let bytes = name.as_bytes();
    let edge = |byte: u8| byte.is_ascii_alphanumeric();
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if edge(bytes[0]) && edge(bytes[bytes.len() - 1]) && bytes.iter().all(inner) {
        Ok(())
    } else {
        Err(NameError::Character { name: name.to_owned() })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks and takes over `name`.
            ///
            /// # Errors
            /// [`NameError`] when the text is empty, too long or holds a byte that a certificate or DNS name cannot.
            pub fn new(name: &str) -> Result<Self, NameError> {
                check(name)?;
                Ok(Self(name.into()))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

name_type! {
    /// The name under which instances are registered and to which intentions refer, for example `count-api`.
    ServiceName
}
name_type! {
    /// A datacenter, for example `dc1`: one segment of every service's SPIFFE path.
    Datacenter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_registrations_use() {
        for name in ["a", "count-api", "Count_API.v2", "0web9"] {
            assert_eq!(ServiceName::new(name).expect(name).as_str(), name);
        }
    }

    #[test]
    fn refuses_what_a_certificate_cannot_carry() {
        for name in ["", "-web", "web-", "we/b", "we b", "*", "wéb", &"a".repeat(64)] {
            assert!(ServiceName::new(name).is_err(), "{name:?}");
        }
    }
}
