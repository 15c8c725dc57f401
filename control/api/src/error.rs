//! What an endpoint answers when it does not answer 200: a status and a plain text, as Consul sends it.

use std::fmt;

/// An error reply: `text/plain` with the bare message.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub message: String,
}

impl ApiError {
    /// The request is wrong: 400.
    pub fn bad_request(message: impl fmt::Display) -> Self {
        Self::new(400, message)
    }

    /// The caller may not: 403.
    pub fn forbidden(message: impl fmt::Display) -> Self {
        Self::new(403, message)
    }

    /// There is no such thing: 404.
    pub fn not_found(message: impl fmt::Display) -> Self {
        Self::new(404, message)
    }

    /// The server failed, or one of the validations that Consul answers with 500.
    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(500, message)
    }

    /// Not possible now: 503.
    pub fn unavailable(message: impl fmt::Display) -> Self {
        Self::new(503, message)
    }

    /// Any other status.
    pub fn new(status: u16, message: impl fmt::Display) -> Self {
        Self { status, message: message.to_string() }
    }
}

/// Fields that Consul knows and culvert does not honour yet: refused by name, because ignoring them would change a meaning.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not supported by culvert yet: {}", fields.join(", "))]
pub struct Unsupported {
    /// Paths of the offending fields, for example `Connect.SidecarService.Proxy.Mode "transparent"`.
    pub fields: Vec<String>,
}

impl Unsupported {
    /// `Err` when there is anything to complain about.
    pub(crate) fn unless_empty(fields: Vec<String>) -> Result<(), Self> {
        if fields.is_empty() { Ok(()) } else { Err(Self { fields }) }
    }
}

impl From<Unsupported> for ApiError {
    fn from(unsupported: Unsupported) -> Self {
        Self::bad_request(unsupported)
    }
}
