//! The data plane of culvert: what carries the bytes between applications.
//!
//! Owns everything between a workload's socket and the wire. Knows no eBPF and no control plane: [`xds`] fetches what it is
//! told, [`config`] is that parsed into types, [`rbac`] decides per connection, sockets come through [`handoff`], what
//! happened leaves as [`culvert_types::ConnectionEvent`]. [`l4`] carries the bytes, [`tls`] protects them.
//!
//! Two ways to run it: as the node's worker, started by the agent, and as a sidecar for one workload with Envoy's command
//! line ([`bootstrap`]).

#![forbid(unsafe_code)]

mod balance;
pub mod bootstrap;
pub mod command;
pub mod config;
pub mod events;
pub mod handoff;
mod l4;
pub mod log;
pub mod metrics;
pub mod proxy;
pub mod rbac;
mod sidecar;
pub mod sockets;
pub mod threads;
pub mod tls;
pub mod worker;
pub mod xds;

#[cfg(test)]
mod testing;
