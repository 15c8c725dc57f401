//! How the conversation with the control plane stands.

use std::fmt;

/// Longest text of a NACK, in bytes. What does not fit is counted.
pub const MAX_NACK_MESSAGE: usize = 8 * 1024;

/// A resource that was refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Nack {
    /// Its name; empty if the response as a whole was refused.
    pub resource: String,
    /// The path of the field and what is wrong with it.
    pub reason: String,
}

impl fmt::Display for Nack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "resource {:?}: {}", self.resource, self.reason)
    }
}

/// What is known about a proxy's configuration, for operators.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Status {
    /// Is there a stream, and has the control plane answered on it?
    pub connected: bool,
    /// The version of the last response that was applied, by the control plane's count, or its nonce where it sends none.
    pub version: String,
    /// The nonce of the last response that was applied.
    pub nonce: String,
    /// The resource that was refused last. `None` again when nothing refused is outstanding.
    pub last_nack: Option<Nack>,
    /// Are all listeners in force that the control plane wants? False until it has said which.
    pub ready: bool,
    /// Why there is no stream, for people.
    pub disconnected_because: Option<String>,
}

/// One text for all that was refused in a response, within [`MAX_NACK_MESSAGE`].
pub(super) fn nack_message(nacks: &[Nack]) -> String {
    let mut message = String::new();
    for (index, nack) in nacks.iter().enumerate() {
        let next = nack.to_string();
        if !message.is_empty() && message.len() + next.len() > MAX_NACK_MESSAGE {
            message.push_str(&format!("; and {} more", nacks.len() - index));
            break;
        }
        if !message.is_empty() {
            message.push_str("; ");
        }
        message.extend(next.chars().take(MAX_NACK_MESSAGE / 4));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nack_names_resources_and_reasons_within_its_limit() {
        let nack = |name: &str| Nack { resource: name.to_owned(), reason: "filters[0]: not supported".to_owned() };
        assert_eq!(nack_message(&[nack("a")]), "resource \"a\": filters[0]: not supported");
        let many: Vec<Nack> = (0..10_000).map(|index| nack(&index.to_string())).collect();
        let message = nack_message(&many);
        assert!(message.len() < MAX_NACK_MESSAGE + 64, "{}", message.len());
        assert!(message.starts_with("resource \"0\"") && message.ends_with(" more"), "{message}");
    }
}
