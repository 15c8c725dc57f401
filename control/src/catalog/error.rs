//! Why the catalog refuses. The texts are Consul's where clients or people know them.

use super::MAX_CHECKS;
use crate::state::UpdateError;

/// Why a service was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// No `Name`.
    #[error("Missing service name")]
    MissingName,
    /// 0.0.0.0, `::` or `[::]`.
    #[error("Invalid service address")]
    Address,
    /// `Weights`.
    #[error("Invalid Weights: {0}")]
    Weights(&'static str),
    /// `Meta`.
    #[error("Invalid Service Meta: {0}")]
    Meta(String),
    /// A check of the service.
    #[error("{0}")]
    Check(#[source] CheckError),
    /// A check of its sidecar.
    #[error("Invalid check in sidecar_service: {0}")]
    SidecarCheck(#[source] CheckError),
    /// Anything else about the service.
    #[error("Validation failed: {0}")]
    Invalid(String),
    /// The proxy of a sidecar.
    #[error("Failed Validation: {0}")]
    Proxy(String),
    /// Something that Consul knows and culvert does not do.
    #[error("not supported by culvert yet: {0}")]
    Unsupported(String),
    /// `ports.sidecar_min_port` is 0.
    #[error("no port provided for sidecar_service and auto-assignment disabled in config")]
    NoPortAssignment,
    /// All are taken.
    #[error("no port provided for sidecar_service and none left in the configured range [{0}, {1}]")]
    NoPortLeft(u16, u16),
    /// The store.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// Why a check was not registered.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// No `Name`, and no service that could give one.
    #[error("Missing check name")]
    MissingName,
    /// `Status` of a check that is registered by itself.
    #[error("Bad check status")]
    BadStatus,
    /// `Status` of a check inside a service.
    #[error("Status for checks must 'passing', 'warning', 'critical'")]
    Status,
    /// Two checks of one registration have the same ID.
    #[error("Invalid check: duplicate check ID {0:?}")]
    Duplicate(String),
    /// [`super::MAX_CHECKS`].
    #[error("Invalid check: service {0:?} would have more than {MAX_CHECKS} checks")]
    TooMany(String),
    /// What it does or when.
    #[error("Invalid check: {0}")]
    Invalid(String),
    /// Something that Consul knows and culvert does not do.
    #[error("Invalid check: not supported by culvert yet: {0}")]
    Unsupported(String),
    /// `ServiceID`.
    #[error("ServiceID {0:?} does not exist")]
    UnknownService(String),
    /// The store.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// Why a service was not deregistered or put into maintenance.
#[derive(Debug, thiserror::Error)]
pub enum UnknownService {
    /// Not registered on this node.
    #[error("Unknown service ID {0:?}. Ensure that the service ID is passed, not the service name.")]
    Unknown(String),
    /// The store.
    #[error(transparent)]
    Update(#[from] UpdateError),
}

/// Why a check was not deregistered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnknownCheck {
    /// Not registered on this node.
    #[error("Unknown check ID {0:?}. Ensure that the check ID is passed, not the check name.")]
    Unknown(String),
    /// The store.
    #[error(transparent)]
    Update(#[from] UpdateError),
}
