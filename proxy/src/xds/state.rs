//! What a proxy knows from its control plane, and what of it is in force. No I/O.
//!
//! * A refused resource leaves its last good version in force; the others of the same response apply.
//! * A cluster is usable when its endpoints are known; until then its previous version serves.
//! * A listener applies when its cluster is usable; until then its previous version serves. Only the target waits: identity,
//!   roots and policy of an inbound listener apply at once, since a policy that waits is a policy that does not hold.
//! * A removed cluster stays as long as a listener in force sends to it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as PbCluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener as PbListener;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use envoy_types::pb::google::protobuf::Any;
use prost::Name;

use super::status::Nack;
use crate::config::parse::{ParsedCluster, Problem, ResourceError, parse_cluster, parse_endpoints, parse_listener};
use crate::config::{Cluster, Direction, Endpoint, Listener, ProxyConfig};
use crate::rbac::Rbac;

/// Most resources of one kind that a proxy accepts.
pub const MAX_RESOURCES: usize = 10_000;
/// Marks the version of a resource that is in use but not as it was sent: the next stream gets it again.
const COMPLAINED: &str = "refused:";

/// The kinds of resources that the worker subscribes to.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ResourceKind {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoints,
    /// LDS.
    Listener,
}

/// A response of a type that nobody subscribed to.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("resources of type {0:?} were not asked for")]
pub struct UnknownType(pub String);

impl ResourceKind {
    /// In the order in which a proxy asks for them: make before break.
    pub const ALL: [Self; 3] = [Self::Cluster, Self::Endpoints, Self::Listener];

    /// The type URL.
    #[must_use]
    pub fn type_url(self) -> String {
        match self {
            Self::Cluster => PbCluster::type_url(),
            Self::Endpoints => ClusterLoadAssignment::type_url(),
            Self::Listener => PbListener::type_url(),
        }
    }

    /// The kind with this type URL.
    ///
    /// # Errors
    /// [`UnknownType`].
    pub fn from_type_url(url: &str) -> Result<Self, UnknownType> {
        let known = Self::ALL.into_iter().find(|kind| kind.type_url() == url);
        known.ok_or_else(|| UnknownType(url.chars().take(256).collect()))
    }
}

/// A resource that was refused, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rejection {
    /// Its name.
    pub resource: String,
    /// Path and problem.
    pub error: ResourceError,
}

impl From<&Rejection> for Nack {
    fn from(rejection: &Rejection) -> Self {
        Self { resource: rejection.resource.clone(), reason: rejection.error.to_string() }
    }
}

#[derive(Debug)]
struct Versioned<T> {
    version: String,
    value: T,
}

/// Resources of one kind by name.
type Resources<T> = BTreeMap<String, Versioned<T>>;

/// Everything one proxy knows.
#[derive(Debug, Default)]
pub struct State {
    clusters: Resources<ParsedCluster>,
    endpoints: Resources<Arc<[Endpoint]>>,
    listeners: Resources<Arc<Listener>>,
    /// Resources whose last version was refused, with the reason.
    refused: BTreeMap<(ResourceKind, String), ResourceError>,
    /// The control plane has said which listeners there are.
    listeners_known: bool,
    in_force: Arc<ProxyConfig>,
}

impl State {
    /// Takes in a response: what is good in it is in force afterwards, as far as the order of things allows.
    ///
    /// # Errors
    /// [`UnknownType`]: nothing of it was applied.
    pub fn apply(&mut self, response: DeltaDiscoveryResponse) -> Result<Vec<Rejection>, UnknownType> {
        let kind = ResourceKind::from_type_url(&response.type_url)?;
        for name in response.removed_resources {
            self.remove(kind, &name);
        }
        let mut seen = BTreeSet::new();
        let mut rejections = Vec::new();
        for resource in response.resources {
            let name = resource.name.clone();
            let accepted = if seen.insert(name.clone()) {
                self.accept(kind, resource)
            } else {
                Err(problem("", Problem::Invalid("sent twice in one response".to_owned())))
            };
            let key = (kind, name);
            match accepted {
                Ok(()) => {
                    self.refused.remove(&key);
                }
                Err(error) => {
                    rejections.push(Rejection { resource: key.1.clone(), error: error.clone() });
                    if self.refused.len() < MAX_RESOURCES {
                        self.refused.insert(key, error);
                    }
                }
            }
        }
        self.listeners_known |= kind == ResourceKind::Listener;
        self.forget_unneeded_endpoints();
        self.in_force = Arc::new(self.settle());
        Ok(rejections)
    }

    /// Nobody says any more who may connect: inbound listeners deny, until each is sent anew.
    pub(super) fn lose_policy(&mut self) {
        for known in self.listeners.values_mut().filter(|known| known.value.direction == Direction::Inbound) {
            let deny = [Rbac::deny_all()];
            if *known.value.rbac != deny {
                known.value = Arc::new(Listener { rbac: deny.into(), explain: None, ..Listener::clone(&known.value) });
                known.version = format!("{COMPLAINED}{}", known.version);
            }
        }
        self.in_force = Arc::new(self.settle());
    }

    /// What is in force. The same `Arc` until the next [`Self::apply`].
    #[must_use]
    pub fn config(&self) -> &Arc<ProxyConfig> {
        &self.in_force
    }

    /// The names of the endpoint resources that the clusters need.
    #[must_use]
    pub fn endpoints_needed(&self) -> BTreeSet<String> {
        self.clusters.values().filter_map(|cluster| cluster.value.endpoints_from.clone()).collect()
    }

    /// What we have, for `initial_resource_versions` of a new stream.
    #[must_use]
    pub fn versions(&self, kind: ResourceKind) -> HashMap<String, String> {
        fn of<T>(resources: &Resources<T>) -> HashMap<String, String> {
            resources.iter().map(|(name, resource)| (name.clone(), resource.version.clone())).collect()
        }
        match kind {
            ResourceKind::Cluster => of(&self.clusters),
            ResourceKind::Endpoints => of(&self.endpoints),
            ResourceKind::Listener => of(&self.listeners),
        }
    }

    /// Is everything in force that the control plane wants?
    #[must_use]
    pub fn ready(&self) -> bool {
        self.listeners_known
            && self.refused.is_empty()
            && self.listeners.iter().all(|(name, wanted)| self.in_force.listeners.get(name) == Some(&wanted.value))
    }

    /// Some resource whose last version was refused.
    #[must_use]
    pub fn outstanding(&self) -> Option<Nack> {
        let ((_, name), error) = self.refused.iter().next()?;
        Some(Nack { resource: name.clone(), reason: error.to_string() })
    }

    fn remove(&mut self, kind: ResourceKind, name: &str) {
        match kind {
            ResourceKind::Cluster => drop(self.clusters.remove(name)),
            ResourceKind::Endpoints => drop(self.endpoints.remove(name)),
            ResourceKind::Listener => drop(self.listeners.remove(name)),
        }
        self.refused.remove(&(kind, name.to_owned()));
    }

    fn accept(&mut self, kind: ResourceKind, resource: Resource) -> Result<(), ResourceError> {
        let Resource { name, resource_name, aliases: _, version, resource, ttl, cache_control: _, metadata: _ } =
            resource;
        if resource_name.is_some() {
            return Err(problem("resource_name", Problem::Unsupported));
        }
        if ttl.is_some() {
            return Err(problem("ttl", Problem::Unsupported));
        }
        let any = resource.ok_or_else(|| problem("resource", Problem::Missing))?;
        match kind {
            ResourceKind::Cluster => {
                room(&self.clusters, &name)?;
                let value = parse_cluster(&name, &any)?;
                self.clusters.insert(name, Versioned { version, value });
                Ok(())
            }
            ResourceKind::Endpoints => {
                room(&self.endpoints, &name)?;
                let value = parse_endpoints(&name, &any)?.into();
                self.endpoints.insert(name, Versioned { version, value });
                Ok(())
            }
            ResourceKind::Listener => self.accept_listener(name, version, &any),
        }
    }

    /// A listener with a complaint is used all the same, and reported.
    fn accept_listener(&mut self, name: String, version: String, any: &Any) -> Result<(), ResourceError> {
        room(&self.listeners, &name)?;
        let parsed = parse_listener(&name, any)?;
        let version = if parsed.complaint.is_some() { format!("{COMPLAINED}{version}") } else { version };
        self.listeners.insert(name, Versioned { version, value: Arc::new(parsed.listener) });
        parsed.complaint.map_or(Ok(()), Err)
    }

    /// Endpoints of clusters that are gone are not updated any more.
    fn forget_unneeded_endpoints(&mut self) {
        let needed = self.endpoints_needed();
        self.endpoints.retain(|name, _| needed.contains(name));
        self.refused.retain(|(kind, name), _| *kind != ResourceKind::Endpoints || needed.contains(name));
    }

    /// Works out what is in force now, from what was and what is known.
    fn settle(&self) -> ProxyConfig {
        let before = &self.in_force;
        let mut clusters = BTreeMap::new();
        for (name, known) in &self.clusters {
            if let Some(cluster) = self.usable(&known.value, before.clusters.get(name)) {
                clusters.insert(name.clone(), cluster);
            }
        }
        let mut listeners = BTreeMap::new();
        for (name, known) in &self.listeners {
            let wanted = &known.value;
            let previous = before.listeners.get(name);
            let next = match previous {
                _ if clusters.contains_key(&wanted.cluster) => Some(Arc::clone(wanted)),
                Some(previous) if wanted.direction == Direction::Inbound => {
                    Some(Arc::new(Listener { cluster: previous.cluster.clone(), ..Listener::clone(wanted) }))
                }
                previous => previous.cloned(),
            };
            if let Some(next) = next {
                listeners.insert(name.clone(), keep(next, previous));
            }
        }
        for listener in listeners.values() {
            if let (false, Some(cluster)) = (clusters.contains_key(&listener.cluster), before.cluster_of(listener)) {
                clusters.insert(listener.cluster.clone(), Arc::clone(cluster));
            }
        }
        ProxyConfig { listeners, clusters }
    }

    /// A cluster with its endpoints; without them the previous version, if there was one.
    fn usable(&self, known: &ParsedCluster, previous: Option<&Arc<Cluster>>) -> Option<Arc<Cluster>> {
        let cluster = match &known.endpoints_from {
            None => known.cluster.clone(),
            Some(name) => match self.endpoints.get(name) {
                Some(endpoints) => Cluster { endpoints: Arc::clone(&endpoints.value), ..known.cluster.clone() },
                None => return previous.cloned(),
            },
        };
        Some(keep(Arc::new(cluster), previous))
    }
}

/// The previous `Arc` if nothing changed, so that readers see by pointer what did.
fn keep<T: PartialEq>(next: Arc<T>, previous: Option<&Arc<T>>) -> Arc<T> {
    previous.filter(|previous| ***previous == *next).map_or(next, Arc::clone)
}

fn room<T>(resources: &Resources<T>, name: &str) -> Result<(), ResourceError> {
    if resources.len() < MAX_RESOURCES || resources.contains_key(name) {
        return Ok(());
    }
    Err(problem("", Problem::TooMany { unit: "resources of its kind", limit: MAX_RESOURCES }))
}

fn problem(path: &str, problem: Problem) -> ResourceError {
    ResourceError { path: path.to_owned(), problem }
}
