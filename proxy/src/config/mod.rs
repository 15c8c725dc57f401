//! What a proxy is told to do: listeners, clusters, endpoints, identities, parsed once from xDS resources.
//!
//! Everything here is immutable and cheap to clone. A [`ProxyConfig`] is a complete snapshot of one proxy; the next one
//! shares by `Arc` whatever did not change, and equality tells what did. Nothing here opens a socket or reads a clock.
//!
//! Left out: fetching ([`crate::xds`]), deciding ([`crate::rbac`]), and what Envoy can do beyond the subset that Consul's
//! own control plane emits for TCP. That is refused by name, see `docs/reference/xds.md`.

mod cluster;
mod explain;
mod listener;
mod matcher;
pub mod parse;
mod tls;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use cluster::{Cluster, ClusterKind, Endpoint, LbPolicy};
pub use explain::Explain;
pub use listener::{Direction, Listener};
pub use matcher::{MAX_PATTERN, MAX_REGEX_CACHE, MAX_REGEX_PROGRAM, MatcherError, StringMatcher};
pub use tls::{DownstreamTls, Identity, TlsVersion, UpstreamTls};

/// Everything one proxy has to do. Keys are resource names, and equal the `name` inside.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ProxyConfig {
    /// Where to accept, and what to do with what is accepted.
    pub listeners: BTreeMap<String, Arc<Listener>>,
    /// Where connections go. A cluster appears here once its endpoints are known.
    pub clusters: BTreeMap<String, Arc<Cluster>>,
}

impl ProxyConfig {
    /// The cluster that `listener` sends to. `None` means that the connection has to be refused.
    #[must_use]
    pub fn cluster_of(&self, listener: &Listener) -> Option<&Arc<Cluster>> {
        self.clusters.get(&listener.cluster)
    }

    /// What holds now for connections that `closed`, an inbound listener, accepted: the listener of its name, or else the
    /// one that leads to the same application. `None` means that nobody says any more who may be connected.
    #[must_use]
    pub fn successor_of(&self, closed: &Listener) -> Option<&Arc<Listener>> {
        let mut inbound = self.listeners.values().filter(|listener| listener.direction == Direction::Inbound);
        self.listeners.get(&closed.name).or_else(|| inbound.find(|listener| listener.cluster == closed.cluster))
    }
}
