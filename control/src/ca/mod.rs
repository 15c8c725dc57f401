//! The certificate authority of the mesh: identities, roots and their rotation, leaves and their renewal.
//!
//! Two halves that never share a private key. [`Authority`] holds the roots (in the state store) and signs requests: it is the
//! server's. [`Leaves`] makes keys on this node, has them certified and renews them in time: it is the node agent's. Between
//! them go a certificate request and a certificate, nothing else. Certificates look as Consul's do, field by field, so that a
//! proxy of either system accepts the other's.
//!
//! Left out: checking certificates in handshakes (the data plane does), external authorities, an operator's own root key.

mod authority;
mod clock;
pub mod csr;
mod error;
mod key;
mod leaf;
mod leaves;
mod limit;
mod metrics;
mod pem;
mod random;
mod root;
mod rows;
mod settings;
mod view;
mod wire;

use std::time::Duration;

pub(crate) use self::authority::check_registered;
pub use self::authority::{Authority, Configuration, MAX_ROOTS};
pub use self::clock::Clock;
pub use self::error::{ConfigureError, OpenError, RotateError, SignError};
pub use self::key::KeyError;
pub use self::leaf::{Leaf, SignedLeaf};
pub use self::leaves::{LeafError, LeafWatch, Leaves, MAX_LEAVES};
pub use self::metrics::Metrics;
pub use self::root::RootError;
pub use self::rows::RowError;
pub use self::settings::{CaSettings, MAX_LEAF_TTL, MIN_INTERMEDIATE_TTL, MIN_LEAF_TTL, SettingsError};
pub use self::view::{Root, Roots, ViewError};
pub use self::wire::ConfigurationUpdate;

/// Certificates are valid from this much before they are made: clocks of two nodes differ.
pub(crate) const NOT_BEFORE_SLACK: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
