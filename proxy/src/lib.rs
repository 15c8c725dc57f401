//! The data plane of culvert: what carries the bytes between applications.
//!
//! [`bootstrap`] reads how a sidecar was started, [`xds`] fetches configuration from a control plane (culvert's or Consul's),
//! [`config`] is that configuration parsed into types, [`rbac`] decides per connection.

#![forbid(unsafe_code)]

pub mod config;
pub mod rbac;
