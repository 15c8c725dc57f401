//! From xDS resources to the types of [`super`], refusing what the worker would not honour.
//!
//! Every message is taken apart field by field, without `..`: a field that a newer version of the API adds does not compile
//! until somebody says whether it is read, refused or inert. `refuse!` refuses by path; a field bound to `_` is inert, with
//! the reason beside it. The table for users is `docs/reference/xds.md`.
//!
//! As in Envoy, fields unknown to this version of the API are dropped by the decoder and cannot be seen here.

mod address;
mod cluster;
mod endpoints;
mod error;
mod listener;
mod matcher;
mod metadata;
mod rbac;
mod tls;

use envoy_types::pb::google::protobuf::{Any, Duration as PbDuration};
use prost::{Message, Name};
use std::time::Duration;

pub use cluster::{ParsedCluster, parse_cluster};
pub use endpoints::{MAX_ENDPOINTS, parse_endpoints};
pub use error::{Problem, ResourceError};
pub use listener::{MAX_FILTERS, ParsedListener, parse_listener};
pub use rbac::{MAX_RBAC_DEPTH, MAX_RBAC_RULES};
pub use tls::{MAX_ALPN, MAX_CHAIN, MAX_PEM, MAX_ROOTS, MAX_SAN_MATCHERS};

use error::Path;

/// Longest name of a resource, in bytes.
pub const MAX_NAME: usize = 1024;

/// Refuses every named binding that does not hold its default value, by its path.
macro_rules! refuse {
    ($path:expr; $($field:ident),+ $(,)?) => {
        $(if !$crate::config::parse::is_default(&$field) {
            return Err($path.field(stringify!($field)).unsupported());
        })+
    };
}
use refuse;

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Unpacks `any` as a `T`.
fn unpack<T: Message + Name + Default>(any: &Any, path: &Path<'_>) -> Result<T, ResourceError> {
    if message_name(any) != T::full_name() {
        return Err(path.invalid(format!("type {:?}, expected {:?}", any.type_url, T::full_name())));
    }
    T::decode(any.value.as_slice()).map_err(|error| path.invalid(format!("not a {}: {error}", T::full_name())))
}

/// The message that `any` holds: what follows the last slash of its type URL.
fn message_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// Checks the name inside a resource against the one it was sent under.
fn check_name(inside: &str, outside: &str, path: &Path<'_>) -> Result<(), ResourceError> {
    if inside.is_empty() {
        return Err(path.missing());
    }
    if inside.len() > MAX_NAME {
        return Err(path.too_many("bytes", MAX_NAME));
    }
    if inside != outside {
        return Err(path.invalid(format!("{inside:?} sent as resource {outside:?}")));
    }
    Ok(())
}

/// Reads a duration that must not be negative.
fn duration(value: &PbDuration, path: &Path<'_>) -> Result<Duration, ResourceError> {
    let invalid = || path.invalid(format!("duration of {} s and {} ns", value.seconds, value.nanos));
    let seconds = u64::try_from(value.seconds).map_err(|_| invalid())?;
    let nanos = u32::try_from(value.nanos).ok().filter(|nanos| *nanos < 1_000_000_000).ok_or_else(invalid)?;
    Ok(Duration::new(seconds, nanos))
}
