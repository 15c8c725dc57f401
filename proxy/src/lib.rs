//! The data plane of culvert: what carries the bytes between applications.
//!
//! Owns everything between a workload's socket and the wire. Knows no eBPF and no control plane: [`config`] is what it is
//! told, parsed into types, [`xds`] fetches it, [`rbac`] decides per connection, sockets come through [`handoff`], what
//! happened leaves as [`culvert_types::ConnectionEvent`].

#![forbid(unsafe_code)]

pub mod bootstrap;
pub mod config;
pub mod handoff;
pub mod rbac;
pub mod xds;
