//! Names: of services and datacenters, which reach certificates and DNS labels, and of whatever else is registered.
//!
//! Consul takes any text as the name or ID of a service. Here two things are told apart: a name that an identity is made of
//! ([`ServiceName`], [`Datacenter`]) stands in a SPIFFE path and in an SNI, so it must be one segment of the one and whole
//! labels of the other; any other name or ID ([`check_registered`]) only must not look like a way to another place.

use std::fmt;
use std::str::FromStr;

/// Longest service name: it must fit a DNS label (RFC 1035 §2.3.4) in `<name>.service.consul` and in the SNI.
pub const MAX_SERVICE_NAME: usize = 63;
/// Longest name or ID in a registration. Those that Nomad makes of an allocation, a group and a service stay below 300 bytes.
pub const MAX_REGISTERED: usize = 512;

/// Why a name was refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NameError {
    /// Nothing between the quotes.
    #[error("name is empty")]
    Empty,
    /// More than [`MAX_SERVICE_NAME`] bytes.
    #[error("name {0:?} is longer than {MAX_SERVICE_NAME} bytes")]
    TooLong(String),
    /// More than [`MAX_REGISTERED`] bytes; here are the first ones.
    #[error("{0:?}… is longer than {MAX_REGISTERED} bytes")]
    TooLongToRegister(String),
    /// A control character, or one that ends a line or turns the direction of what is shown after it.
    #[error("{0:?} must not hold control characters, line separators or marks of text direction")]
    Control(String),
    /// `/` at an end or twice, `\`, `.` or `..`: a name that walks through folders wherever it is taken for a path.
    #[error("{0:?} must not look like a file path: no \"\\\\\", and nothing empty, \".\" or \"..\" between slashes")]
    Path(String),
    /// An empty label, or one that starts or ends with a hyphen: no server name (SNI) could hold it.
    #[error("name {name:?} has to be usable in a server name: no \"..\", \".-\" or \"-.\"")]
    Label {
        /// The refused text.
        name: String,
    },
    /// A byte outside `A-Z a-z 0-9 - _ .`, or a name that starts or ends with a separator.
    #[error("name {name:?} must start and end with a letter or digit and hold only letters, digits, '-', '_' and '.'")]
    Character {
        /// The refused text.
        name: String,
    },
}

fn check(name: &str) -> Result<(), NameError> {
    check_characters(name)?;
    // RFC 1123 §2.1, but for the underscores that names of services have.
    if name.split('.').any(|label| label.is_empty() || label.starts_with('-') || label.ends_with('-')) {
        return Err(NameError::Label { name: name.to_owned() });
    }
    Ok(())
}

fn check_characters(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_SERVICE_NAME {
        return Err(NameError::TooLong(name.to_owned()));
    }
    let bytes = name.as_bytes();
    let edge = |byte: u8| byte.is_ascii_alphanumeric();
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !(edge(bytes[0]) && edge(bytes[bytes.len() - 1]) && bytes.iter().all(inner)) {
        return Err(NameError::Character { name: name.to_owned() });
    }
    Ok(())
}

/// Checks a name or ID that no identity is made of: of a service outside of the mesh, of an instance, of a check. As Consul
/// does, it takes any text, but for what could lead astray wherever somebody takes it for a path or prints it.
///
/// # Errors
/// [`NameError`] when the text is empty, longer than [`MAX_REGISTERED`], holds a control character or looks like a path.
pub fn check_registered(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > MAX_REGISTERED {
        return Err(NameError::TooLongToRegister(text.chars().take(MAX_SERVICE_NAME).collect()));
    }
    // Unicode's line and paragraph separators, its explicit directions and its marks of direction (UAX #9 §2).
    let unseen =
        |char| matches!(char, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{61c}');
    if text.chars().any(|char| char.is_control() || unseen(char)) {
        return Err(NameError::Control(text.to_owned()));
    }
    let astray = |segment: &str| matches!(segment, "" | "." | "..");
    if text.contains('\\') || text.split('/').any(astray) {
        return Err(NameError::Path(text.to_owned()));
    }
    Ok(())
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
impl ServiceName {
    /// Takes over a name that was stored. Builds before the rule about labels accepted others, and what they stored must
    /// still be found and removed.
    ///
    /// # Errors
    /// [`NameError`] when no build would have stored it.
    pub fn from_stored(name: &str) -> Result<Self, NameError> {
        check_characters(name)?;
        Ok(Self(name.into()))
    }
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

    #[test]
    fn refuses_what_a_server_name_cannot_carry() {
        for name in ["a..b", "a.-b", "a-.b"] {
            assert_eq!(ServiceName::new(name), Err(NameError::Label { name: name.to_owned() }));
            assert_eq!(ServiceName::from_stored(name).expect("an earlier build took it").as_str(), name);
        }
    }

    #[test]
    fn what_is_registered_may_be_called_anything_but_a_way_elsewhere() {
        let longest = "a".repeat(MAX_REGISTERED);
        for name in ["web", "web:80", "team/web", "a..b", "...", "Été 1", "_nomad-task-1-group-a-web-9001", &longest]
        {
            assert_eq!(check_registered(name), Ok(()), "{name:?}");
        }
        for name in ["..", ".", "../../etc", "/etc", "etc/", "a//b", "a/../b", "a/./b", "..\\etc"] {
            assert_eq!(check_registered(name), Err(NameError::Path(name.to_owned())));
        }
        for name in ["a\nb", "a\0", "\u{1b}[2J", "\u{85}", "a\u{2028}b", "a\u{202e}b", "a\u{2066}b", "a\u{200f}"] {
            assert_eq!(check_registered(name), Err(NameError::Control(name.to_owned())));
        }
        assert_eq!(check_registered(""), Err(NameError::Empty));
        assert!(matches!(check_registered(&format!("{longest}a")), Err(NameError::TooLongToRegister(_))));
    }
}
