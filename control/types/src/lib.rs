//! The vocabulary of culvert: identities, names, intentions and the one decision function.
//!
//! Pure: no I/O, no clock, no serialisation. The wire forms live in `culvert-api`, the stored forms in `culvert-control`.
//! Everything here is parsed at the edge into types with private fields; inner code cannot hold a bad value.

#![forbid(unsafe_code)]

mod access;
mod decide;
mod duration;
mod encryption;
mod health;
mod intention;
mod name;
pub mod sni;
mod spiffe;

pub use access::{ConnectionEvent, ConnectionKind, Path, RefusalReason, Verdict};
pub use decide::{DecidedBy, Decision, decide};
pub use duration::{DurationError, format_go_duration, parse_go_duration};
pub use encryption::{Encryption, UnknownEncryption};
pub use health::{HealthStatus, UnknownHealthStatus, aggregate};
pub use intention::{Action, Intention, IntentionSubject, Precedence, UnknownAction};
pub use name::{Datacenter, MAX_REGISTERED, MAX_SERVICE_NAME, NameError, ServiceName, check_registered};
pub use spiffe::{MAX_SPIFFE_ID, MAX_TRUST_DOMAIN, ServiceIdentity, SpiffeError, SpiffeId, TrustDomain};
