//! The control plane: catalog, health checks, intentions, certificate authority, Consul's HTTP API, xDS server.
//!
//! Everything is kept in a transactional [`store`], read through an immutable typed [`state`], and changed only through
//! the modules that own its rules. The crate knows no data plane: proxies are clients of its xDS server, and the kernel
//! tables are compiled elsewhere from [`MeshView`].

#![forbid(unsafe_code)]

pub mod ca;
mod catalog;
mod checks;
mod config;
mod control;
pub mod disk;
mod http;
mod intentions;
mod mesh;
mod metrics;
pub mod state;
pub mod store;
pub mod xds;

pub use catalog::{RegisterError, Registered, UnknownService};
pub use checks::{CheckDialer, NodeDialer};
pub use config::{CONSUL_VERSION, ControlConfig, HttpLimits, Reloadable, SIDECAR_PORTS};
pub use control::{Control, StartError};
pub use http::BindError;
#[cfg(any(test, feature = "fuzz"))]
pub use http::fuzz;
pub use mesh::{MeshContext, MeshInstance, MeshUpstream, MeshView};
pub use metrics::Metrics;
pub use xds::XdsPeer;
