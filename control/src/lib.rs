//! The control plane: catalog, health checks, intentions, certificate authority, Consul's HTTP API, xDS server.
//!
//! Everything is kept in a transactional [`store`], read through an immutable typed [`state`], and changed only through
//! the modules that own its rules. The crate knows no data plane: proxies are clients of its xDS server, and the kernel
//! tables are compiled elsewhere from [`MeshView`].

#![forbid(unsafe_code)]

pub mod ca;
mod config;
mod mesh;
pub mod state;
pub mod store;
pub mod xds;

pub use config::{CONSUL_VERSION, ControlConfig, HttpLimits, Reloadable, SIDECAR_PORTS};
pub use mesh::{MeshContext, MeshInstance, MeshUpstream, MeshView};
