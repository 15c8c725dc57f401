//! Why the authority refuses or fails.

use culvert_types::ServiceName;

use super::MAX_ROOTS;
use super::csr::CsrError;
use super::key::KeyError;
use super::metrics::RefusalLabel;
use super::root::RootError;
use super::rows::RowError;
use super::settings::SettingsError;
use super::view::ViewError;
use crate::state::UpdateError;

/// Why the authority could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A setting.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The first root could not be made.
    #[error(transparent)]
    Root(#[from] RootError),
    /// What is stored.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A stored row.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The store.
    #[error("store the authority")]
    Store(#[from] UpdateError),
}

/// Why a request was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// More than `CSRMaxPerSecond`; the answer is 429 with this text.
    #[error("Rate limit reached, try again later")]
    RateLimit,
    /// The request itself.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The root ended before it was replaced: what it signs would be valid for nobody.
    #[error("the active root has expired; a new one is made within a minute")]
    RootExpired,
    /// The asker has no such service.
    #[error("node {node:?} asks for a certificate of service {service}, which it has not registered")]
    NotRegistered {
        /// Who asks.
        node: String,
        /// For which service.
        service: ServiceName,
    },
    /// What is stored.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A row, while reserving serial numbers.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The store, while reserving serial numbers.
    #[error("reserve serial numbers")]
    Store(#[from] UpdateError),
    /// Signing itself.
    #[error("sign the certificate")]
    Sign(#[from] rcgen::Error),
}

/// Why the root was not rotated. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// The new root or its cross-signed certificate.
    #[error(transparent)]
    Root(#[from] RootError),
    /// What is stored.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The stored key of the old root.
    #[error("private key of the active root")]
    Key(#[from] KeyError),
    /// [`MAX_ROOTS`].
    #[error(
        "{MAX_ROOTS} roots are trusted already: an old one goes when the leaves that it signed have ended, try again later"
    )]
    TooMany,
    /// The authority is not made yet.
    #[error(transparent)]
    View(#[from] ViewError),
    /// Reserving serial numbers.
    #[error(transparent)]
    Serial(#[from] SignError),
    /// The store.
    #[error("store the new root")]
    Store(#[from] UpdateError),
}

/// Why a configuration was refused. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// Another provider than the built-in one.
    #[error("unknown CA provider {0:?}: only \"consul\", the built-in one, is available")]
    Provider(String),
    /// A key that is known to Consul and not honoured here.
    #[error("Config.{0} is not supported: the built-in authority makes its own root")]
    Unsupported(&'static str),
    /// `State` is the provider's to write.
    #[error("State cannot be set: it belongs to the provider")]
    State,
    /// A key that no provider of ours knows.
    #[error("Config.{0:?} is not a setting of the built-in authority")]
    Unknown(String),
    /// A value that cannot be read, or that is not honoured.
    #[error("Config.{key}: {reason}")]
    Value {
        /// As sent.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A value out of its limits.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// What is stored.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The authority is not made yet.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The store.
    #[error("store the configuration")]
    Store(#[from] UpdateError),
}

impl From<&SignError> for RefusalLabel {
    fn from(error: &SignError) -> Self {
        match error {
            SignError::RateLimit => Self::RateLimit,
            SignError::Csr(_) => Self::Request,
            SignError::NotRegistered { .. } => Self::NotRegistered,
            SignError::RootExpired
            | SignError::View(_)
            | SignError::Row(_)
            | SignError::Store(_)
            | SignError::Sign(_) => Self::Internal,
        }
    }
}
