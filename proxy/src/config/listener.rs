//! Listeners: one address, one filter chain.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{DownstreamTls, Explain};
use crate::rbac::Rbac;

/// Which side of the workload a listener serves.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Direction {
    /// From the mesh to the local application: TLS and RBAC are mandatory.
    Inbound,
    /// From the local application to an upstream.
    Outbound,
}

/// One listener with its only filter chain: TLS, then RBAC filters, then a TCP proxy to one cluster.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listener {
    /// Resource name, for example `public_listener:0.0.0.0:21000`.
    pub name: String,
    /// Where to accept. `[::]` accepts IPv4 too.
    pub address: SocketAddr,
    /// Inbound or outbound.
    pub direction: Direction,
    /// TLS of accepted connections; `None` means plain TCP (only outbound).
    pub tls: Option<Arc<DownstreamTls>>,
    /// Evaluated in order, each must allow. Never empty for an inbound listener: without policy it is one that denies all.
    pub rbac: Arc<[Rbac]>,
    /// The cluster that accepted connections go to; may be absent from the snapshot, then connections are refused.
    pub cluster: String,
    /// Name of the TCP proxy in statistics, for example `upstream.count-api.default.dc1`.
    pub stat_prefix: String,
    /// Most connections open at a time (`envoy.filters.network.connection_limit`).
    pub max_connections: Option<u64>,
    /// Most instances to try for one connection (`max_connect_attempts`, at least 1).
    pub max_connect_attempts: Option<u32>,
    /// What the control plane says about the reasons behind the RBAC rules, for events.
    pub explain: Option<Explain>,
}
