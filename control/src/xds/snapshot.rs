//! What one proxy needs to know, taken from one state: pure data, no protobuf.
//!
//! Two snapshots that are equal render to equal resources, so an update of the state that does not concern a proxy costs it a
//! comparison. Everything here is computed from one `Arc<State>`: policy, instances and health never come from two revisions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use culvert_types::{Action, HealthStatus, Intention, ServiceIdentity, ServiceName, sni};
use tracing::warn;

use crate::ca::{Leaf, Roots};
use crate::state::State;
use crate::state::rows::{Proxy, Service, ServiceKind, Upstream};

/// Time to connect where neither registration nor upstream says another (Consul's default).
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a snapshot takes from outside the state.
#[derive(Clone, Debug)]
pub struct Context<'a> {
    /// This node's name: only its own proxies are served.
    pub node: &'a str,
    /// For pairs without an intention.
    pub default_action: Action,
    /// Every trusted root.
    pub roots: &'a Roots,
    /// The proxy's certificate and key.
    pub leaf: &'a Arc<Leaf>,
}

/// Everything about one proxy, at one revision.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Whom the proxy represents.
    pub identity: ServiceIdentity,
    /// Where the mesh reaches it; `None` if its application listens nowhere.
    pub inbound: Option<Inbound>,
    /// For peers without an intention.
    pub default_action: Action,
    /// Those about this service as destination, in the order in which they are tried.
    pub intentions: Vec<Intention>,
    /// Listeners for the application, in the order of the registration.
    pub outbound: Vec<Outbound>,
    /// One per service called, by SNI name.
    pub targets: Vec<Target>,
    /// Certificate and key.
    pub leaf: Arc<Leaf>,
    /// All trusted roots, PEM.
    pub roots: Arc<str>,
}

/// The inbound side.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Inbound {
    /// Where to listen for the mesh.
    pub bind: SocketAddr,
    /// Where the application listens.
    pub application: SocketAddr,
    /// Longest time to connect to it.
    pub connect_timeout: Duration,
    /// Most connections from the mesh at a time.
    pub max_connections: Option<u32>,
}

/// An address on which the application reaches an upstream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Outbound {
    /// Listener name: `<upstream>:<ip>:<port>`.
    pub name: String,
    /// Where to listen for the application.
    pub bind: SocketAddr,
    /// Name in statistics.
    pub stat_prefix: String,
    /// The target: [`Target::name`].
    pub cluster: String,
}

/// A service that is called.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    /// Cluster name and SNI: `<service>.default.<dc>.internal.<trust domain>`.
    pub name: String,
    /// Whom the certificate must name.
    pub identity: ServiceIdentity,
    /// Longest time to connect to an instance.
    pub connect_timeout: Duration,
    /// Most connections to all instances together.
    pub max_connections: Option<u32>,
    /// Instances that take traffic, by address.
    pub instances: Vec<Instance>,
}

/// An instance that takes traffic.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Instance {
    /// Where it is reached from any node.
    pub address: SocketAddr,
    /// Where it runs.
    pub node: String,
    /// Where it is reached from its own node, without NAT.
    pub workload: Option<SocketAddr>,
    /// Share of connections, at least 1.
    pub weight: u32,
}

/// Why there is no snapshot of a proxy.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SnapshotError {
    /// Nobody registered it here.
    #[error("proxy {0:?} is not registered on this node: register a service of that ID with Kind \"connect-proxy\"")]
    NotRegistered(String),
    /// It is an application.
    #[error("service {0:?} is no proxy: node.id must be the ID of a sidecar, usually \"<service id>-sidecar-proxy\"")]
    NotAProxy(String),
    /// Its destination is not a name that a certificate can carry.
    #[error("proxy {0:?} represents no service")]
    NoDestination(String),
}

/// The service that proxy `id` of `node` represents.
///
/// # Errors
/// [`SnapshotError`] when there is no such proxy.
pub fn represented(state: &State, node: &str, id: &str) -> Result<ServiceName, SnapshotError> {
    let sidecar = state.service(node, id).ok_or_else(|| SnapshotError::NotRegistered(id.to_owned()))?;
    let proxy = match (&sidecar.proxy, sidecar.kind) {
        (Some(proxy), ServiceKind::ConnectProxy) => proxy,
        _ => return Err(SnapshotError::NotAProxy(id.to_owned())),
    };
    proxy.destination().ok_or_else(|| SnapshotError::NoDestination(id.to_owned()))
}

impl Snapshot {
    /// Takes the snapshot of proxy `id`.
    ///
    /// # Errors
    /// [`SnapshotError`] when there is no such proxy (any more).
    pub fn take(state: &State, id: &str, context: &Context<'_>) -> Result<Self, SnapshotError> {
        let service = represented(state, context.node, id)?;
        let sidecar = state.service(context.node, id).ok_or_else(|| SnapshotError::NotRegistered(id.to_owned()))?;
        let proxy = sidecar.proxy.as_ref().ok_or_else(|| SnapshotError::NotAProxy(id.to_owned()))?;
        let of = |service: &ServiceName| ServiceIdentity {
            trust_domain: context.roots.trust_domain.clone(),
            datacenter: context.leaf.certificate.identity.datacenter.clone(),
            service: service.clone(),
        };
        let mut snapshot = Self {
            identity: of(&service),
            inbound: inbound(sidecar, proxy),
            default_action: context.default_action,
            intentions: intentions(state, &service),
            outbound: Vec::new(),
            targets: Vec::new(),
            leaf: Arc::clone(context.leaf),
            roots: Arc::clone(&context.roots.bundle),
        };
        for upstream in &proxy.upstreams {
            match upstream.destination() {
                Some(name) => snapshot.add(state, upstream, proxy.settings.connect_timeout, of(&name)),
                None => warn!(proxy = id, upstream = upstream.destination_name, "left out: not a service name"),
            }
        }
        snapshot.targets.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(snapshot)
    }

    /// Of a proxy that is registered no more and still connected: what its registration said stays, all else is that of
    /// `state`. Who may call it must go on to reach it as long as it has connections.
    #[must_use]
    pub fn after_registration(&self, state: &State, context: &Context<'_>) -> Self {
        let targets = self.targets.iter().map(|target| {
            let instances = instances(state, &target.identity.service);
            Target { instances, ..target.clone() }
        });
        Self {
            default_action: context.default_action,
            intentions: intentions(state, &self.identity.service),
            targets: targets.collect(),
            leaf: Arc::clone(context.leaf),
            roots: Arc::clone(&context.roots.bundle),
            ..self.clone()
        }
    }

    /// `connect_timeout`: the proxy's, for upstreams that have none of their own.
    fn add(
        &mut self,
        state: &State,
        upstream: &Upstream,
        connect_timeout: Option<Duration>,
        identity: ServiceIdentity,
    ) {
        let ServiceIdentity { trust_domain, datacenter, service } = &identity;
        let cluster = sni::service(service, datacenter, trust_domain);
        let stat_prefix = format!("upstream.{service}.default.{datacenter}");
        for bind in listen_addresses(upstream) {
            let name = format!("{service}:{bind}");
            if self.outbound.iter().all(|other| other.name != name) {
                let (stat_prefix, cluster) = (stat_prefix.clone(), cluster.clone());
                self.outbound.push(Outbound { name, bind, stat_prefix, cluster });
            }
        }
        if self.targets.iter().any(|target| target.name == cluster) {
            return; // a second port of the same service shares its cluster
        }
        self.targets.push(Target {
            name: cluster,
            connect_timeout: upstream.connect_timeout.or(connect_timeout).unwrap_or(CONNECT_TIMEOUT),
            max_connections: upstream.max_connections,
            instances: instances(state, service),
            identity,
        });
    }
}

/// `bind_address` and `bind_port` of the registration, else the sidecar's own address and port, else every address. A
/// sidecar inside a workload's network namespace has its address outside of it, and listens on every address within.
fn inbound(sidecar: &Service, proxy: &Proxy) -> Option<Inbound> {
    let port = sidecar.listener_port();
    if port == 0 || proxy.local_service_port == 0 {
        return None;
    }
    let anywhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let own = || match sidecar.workload_address() {
        Some(_) => anywhere,
        None => sidecar.address.parse().unwrap_or(anywhere),
    };
    let address = proxy.settings.bind_address.unwrap_or_else(own);
    let application = proxy.local_service_address.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    Some(Inbound {
        bind: SocketAddr::new(address, port),
        application: SocketAddr::new(application, proxy.local_service_port),
        connect_timeout: proxy.settings.local_connect_timeout.unwrap_or(CONNECT_TIMEOUT),
        max_connections: proxy.settings.max_inbound_connections,
    })
}

/// The address asked for; where none was, `localhost` in both families.
pub(crate) fn listen_addresses(upstream: &Upstream) -> Vec<SocketAddr> {
    let Some(bind) = upstream.bind() else {
        warn!(upstream = upstream.destination_name, "left out: its bind address is not an IP address");
        return Vec::new();
    };
    if upstream.local_bind_address.is_empty() {
        return vec![bind, SocketAddr::new(Ipv6Addr::LOCALHOST.into(), bind.port())];
    }
    vec![bind]
}

/// Those about `service` as destination.
fn intentions(state: &State, service: &ServiceName) -> Vec<Intention> {
    state.rules().iter().filter(|rule| rule.destination.covers(service)).cloned().collect()
}

/// The passing instances; those that warn only if none passes; never critical ones.
fn instances(state: &State, service: &ServiceName) -> Vec<Instance> {
    let rows: Vec<(HealthStatus, &Service)> = state
        .connect_instances(service.as_str())
        .map(|row| (state.mesh_health(row), &row.value))
        .filter(|(health, _)| *health != HealthStatus::Critical)
        .collect();
    let best = rows.iter().map(|(health, _)| *health).min();
    let best = rows.into_iter().filter(|(health, _)| Some(*health) == best);
    let mut instances: Vec<Instance> = best.filter_map(|(health, row)| instance(state, row, health)).collect();
    instances.sort();
    instances.dedup_by(|left, right| left.address == right.address);
    instances
}

fn instance(state: &State, row: &Service, health: HealthStatus) -> Option<Instance> {
    let address = match row.address.as_str() {
        "" => state.node(&row.node)?.address,
        text => match text.parse() {
            Ok(address) => address,
            Err(_) => {
                warn!(instance = row.id, address = text, "left out: only IP addresses can be endpoints");
                return None;
            }
        },
    };
    let weight = if health == HealthStatus::Passing { row.weights.passing } else { row.weights.warning };
    (row.port != 0).then(|| Instance {
        address: SocketAddr::new(address, row.port),
        node: row.node.clone(),
        workload: row.workload_address(),
        weight: u32::from(weight.max(1)),
    })
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
