//! Clusters: a destination and its instances.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::UpstreamTls;

/// Where the instances of a cluster come from.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ClusterKind {
    /// From the cluster itself.
    Static,
    /// From endpoint discovery.
    Eds,
}

/// How an instance is chosen among the healthy ones.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum LbPolicy {
    /// In turn, by weight.
    #[default]
    RoundRobin,
    /// The one with fewer open connections of two random ones.
    LeastRequest,
    /// Any.
    Random,
}

/// A destination.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cluster {
    /// Resource name; for upstreams the SNI name of the destination, for the application `local_app`.
    pub name: String,
    /// Where `endpoints` came from.
    pub kind: ClusterKind,
    /// Longest time for one attempt to connect, the TLS handshake not included. Envoy's default is 5 s.
    pub connect_timeout: Duration,
    /// How an instance is chosen.
    pub lb_policy: LbPolicy,
    /// All instances, healthy or not. There is no panic mode: unhealthy ones are never chosen.
    pub endpoints: Arc<[Endpoint]>,
    /// Mutual TLS to the instances; `None` means plain TCP.
    pub tls: Option<Arc<UpstreamTls>>,
    /// Most connections open at a time to the whole cluster (circuit breaker of default priority). Envoy's default is 1024.
    pub max_connections: Option<u32>,
}

/// One instance.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// Where it is reached from other nodes.
    pub address: SocketAddr,
    /// Share of connections relative to the others, at least 1.
    pub weight: u32,
    /// May it get connections?
    pub healthy: bool,
    /// The node it runs on (`filter_metadata["culvert"].node`), where the control plane says so.
    pub node: Option<String>,
    /// Where it is reached from the same node, without NAT (`filter_metadata["culvert"].workload`).
    pub workload: Option<SocketAddr>,
}

impl Endpoint {
    /// Where a proxy on `node` connects to.
    #[must_use]
    pub fn address_from(&self, node: &str) -> SocketAddr {
        match (&self.node, self.workload) {
            (Some(own), Some(workload)) if own == node => workload,
            _ => self.address,
        }
    }
}
