//! From a snapshot to xDS v3 resources: pure, deterministic, with Consul's names.
//!
//! What Envoy cannot know and culvert's worker uses travels as `filter_metadata["culvert"]`, which Envoy ignores:
//!
//! | Where | Keys |
//! |---|---|
//! | public listener | `destination`, `default` (`allow`/`deny`), `intentions`: `[{source, destination, action}]` in the order in which they are tried |
//! | endpoint | `node` (name), `workload` (`ip:port` on that node's bridge, if it has one) |

mod cluster;
mod endpoint;
mod listener;
mod metadata;
mod rbac;
mod tls;
mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{Address, SocketAddress, address, socket_address};
use envoy_types::pb::google::protobuf::{Any, Duration as PbDuration};
use prost::{Message, Name};
use sha2::{Digest, Sha256};

use super::snapshot::Snapshot;

pub use self::rbac::policy_name;

/// Name of the cluster of the local application.
pub const LOCAL_APP: &str = "local_app";

/// A kind of resource, in the order in which additions are pushed.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoints,
    /// LDS.
    Listener,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Cluster, Self::Endpoints, Self::Listener];

    /// `type.googleapis.com/envoy.config.…`.
    #[must_use]
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
        }
    }

    /// The kind of that type URL.
    #[must_use]
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }

    /// For logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Endpoints => "endpoints",
            Self::Listener => "listener",
        }
    }
}

/// One resource, encoded. `Debug` leaves the body out: listeners and clusters hold private keys.
#[derive(Clone, Eq, PartialEq)]
pub struct Resource {
    /// Unique within its kind.
    pub name: String,
    /// SHA-256 of the body, hex: the same content has the same version, on every server and after every restart.
    pub version: String,
    /// The message.
    pub body: Any,
    /// The EDS cluster that has to be there before, for a listener.
    pub needs: Option<String>,
}

impl std::fmt::Debug for Resource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, version, body, needs } = self;
        write!(f, "Resource({name}, version {version}, {} bytes, needs {needs:?})", body.value.len())
    }
}

impl Resource {
    fn new(kind: Kind, name: &str, message: &impl Message, needs: Option<&str>) -> Arc<Self> {
        let value = message.encode_to_vec();
        let version = Sha256::digest(&value).iter().map(|byte| format!("{byte:02x}")).collect();
        let body = Any { type_url: kind.type_url().to_owned(), value };
        Arc::new(Self { name: name.to_owned(), version, body, needs: needs.map(str::to_owned) })
    }
}

/// All resources of one proxy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resources {
    clusters: BTreeMap<String, Arc<Resource>>,
    endpoints: BTreeMap<String, Arc<Resource>>,
    listeners: BTreeMap<String, Arc<Resource>>,
}

impl Resources {
    /// Those of one kind, by name.
    #[must_use]
    pub fn of(&self, kind: Kind) -> &BTreeMap<String, Arc<Resource>> {
        match kind {
            Kind::Cluster => &self.clusters,
            Kind::Endpoints => &self.endpoints,
            Kind::Listener => &self.listeners,
        }
    }

    fn of_mut(&mut self, kind: Kind) -> &mut BTreeMap<String, Arc<Resource>> {
        match kind {
            Kind::Cluster => &mut self.clusters,
            Kind::Endpoints => &mut self.endpoints,
            Kind::Listener => &mut self.listeners,
        }
    }

    /// A version of the whole: of all versions.
    #[must_use]
    pub fn version(&self) -> String {
        let mut hash = Sha256::new();
        for resource in Kind::ALL.iter().flat_map(|kind| self.of(*kind).values()) {
            hash.update(&resource.version);
        }
        hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Renders everything that the proxy of `snapshot` needs.
#[must_use]
pub fn render(snapshot: &Snapshot) -> Resources {
    let mut resources = Resources::default();
    let mut add = |kind: Kind, resource: Arc<Resource>| {
        resources.of_mut(kind).insert(resource.name.clone(), resource);
    };
    if let Some(inbound) = &snapshot.inbound {
        let cluster = cluster::local_app(inbound);
        add(Kind::Cluster, Resource::new(Kind::Cluster, LOCAL_APP, &cluster, None));
        let listener = listener::public(snapshot, inbound);
        add(Kind::Listener, Resource::new(Kind::Listener, &listener.name, &listener, None));
    }
    for target in &snapshot.targets {
        let cluster = cluster::upstream(snapshot, target);
        add(Kind::Cluster, Resource::new(Kind::Cluster, &target.name, &cluster, None));
        let endpoints = endpoint::assignment(target);
        add(Kind::Endpoints, Resource::new(Kind::Endpoints, &target.name, &endpoints, None));
    }
    for outbound in &snapshot.outbound {
        let listener = listener::outbound(outbound);
        add(Kind::Listener, Resource::new(Kind::Listener, &listener.name, &listener, Some(&outbound.cluster)));
    }
    resources
}

fn pack<T: Name + Message>(message: &T) -> Any {
    Any { type_url: T::type_url(), value: message.encode_to_vec() }
}

fn address(address: SocketAddr) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: address.ip().to_string(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(u32::from(address.port()))),
            ..SocketAddress::default()
        })),
    }
}

fn duration(duration: std::time::Duration) -> PbDuration {
    PbDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

/// Resources with these names, versions and needs, and no content.
#[cfg(test)]
pub(super) fn test_resources(rows: &[(Kind, &str, &str, Option<&str>)]) -> Resources {
    let mut resources = Resources::default();
    for (kind, name, version, needs) in rows {
        let body = Any { type_url: kind.type_url().to_owned(), value: Vec::new() };
        let (name, needs) = ((*name).to_owned(), needs.map(str::to_owned));
        let resource = Arc::new(Resource { name: name.clone(), version: (*version).to_owned(), body, needs });
        resources.of_mut(*kind).insert(name, resource);
    }
    resources
}

#[cfg(test)]
mod tests;
