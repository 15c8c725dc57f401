//! What the node's policy compiler needs to know of the mesh, rebuilt at each revision.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use culvert_types::{Action, Datacenter, Encryption, HealthStatus, Intention, ServiceName, TrustDomain};
use tracing::warn;

use crate::config::Reloadable;
use crate::state::State;
use crate::state::rows::{Proxy, Service};
use crate::store::Revision;

/// The mesh at one revision.
#[derive(Clone, Debug, PartialEq)]
pub struct MeshView {
    /// Of the state it was computed from. Settings may have changed since without a new revision.
    pub revision: Revision,
    /// Of every identity.
    pub trust_domain: TrustDomain,
    /// Of every identity made here.
    pub datacenter: Datacenter,
    /// This node.
    pub node: String,
    /// For pairs without an intention.
    pub default_action: Action,
    /// For services without a setting.
    pub encryption: Encryption,
    /// In the order in which they are tried.
    pub intentions: Arc<[Intention]>,
    /// Every instance with a sidecar, by node and sidecar ID.
    pub instances: Arc<[MeshInstance]>,
}

/// A service instance and its sidecar.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MeshInstance {
    /// The application's ID; empty if the sidecar names none.
    pub service_id: String,
    /// The sidecar's ID: the proxy ID of its xDS stream.
    pub sidecar_id: String,
    /// Whom it represents.
    pub service: ServiceName,
    /// Where it runs.
    pub node: String,
    /// The worst of the application's, the sidecar's and the node's checks.
    pub health: HealthStatus,
    /// Where the application listens on the workload's loopback; 0 if it does not.
    pub local_port: u16,
    /// Where the sidecar's inbound listener is bound inside the workload.
    pub sidecar_port: u16,
    /// The instance's own setting, or the mesh's.
    pub encryption: Encryption,
    /// `tcp`: the only one so far.
    pub protocol: String,
    /// Whom it calls.
    pub upstreams: Vec<MeshUpstream>,
    /// End of the validity of the leaf in use; `None` if none was issued yet.
    pub certificate_not_after: Option<SystemTime>,
}

/// A service that an application calls on a local address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MeshUpstream {
    /// The service.
    pub destination: ServiceName,
    /// Where the application connects to.
    pub bind: SocketAddr,
}

/// What a view takes from outside the state.
pub struct MeshContext<'a> {
    /// From the CA.
    pub trust_domain: &'a TrustDomain,
    /// From the configuration.
    pub datacenter: &'a Datacenter,
    /// This node's name.
    pub node: &'a str,
    /// As last reloaded.
    pub settings: Reloadable,
    /// End of the validity of a service's leaf.
    pub certificate: &'a dyn Fn(&ServiceName) -> Option<SystemTime>,
}

impl MeshView {
    /// The view of `state`.
    #[must_use]
    pub fn new(state: &State, context: &MeshContext<'_>) -> Self {
        let sidecars = state.sidecars().filter_map(|sidecar| Some((sidecar, sidecar.proxy.as_ref()?)));
        let instances = sidecars.filter_map(|(sidecar, proxy)| instance(state, sidecar, proxy, context));
        Self {
            revision: state.revision(),
            trust_domain: context.trust_domain.clone(),
            datacenter: context.datacenter.clone(),
            node: context.node.to_owned(),
            default_action: context.settings.default_policy,
            encryption: context.settings.encryption,
            intentions: Arc::clone(state.rules()),
            instances: instances.collect(),
        }
    }
}

fn instance(state: &State, sidecar: &Service, proxy: &Proxy, context: &MeshContext<'_>) -> Option<MeshInstance> {
    let Some(service) = proxy.destination() else {
        warn!(sidecar = sidecar.id, "left out of the mesh: its destination is not a service name");
        return None;
    };
    let upstream = |upstream: &crate::state::rows::Upstream| {
        Some(MeshUpstream { destination: upstream.destination()?, bind: upstream.bind()? })
    };
    Some(MeshInstance {
        service_id: proxy.destination_service_id.clone(),
        sidecar_id: sidecar.id.clone(),
        node: sidecar.node.clone(),
        health: state.mesh_health(sidecar),
        local_port: proxy.local_service_port,
        sidecar_port: sidecar.listener_port(),
        encryption: proxy.settings.encryption.unwrap_or(context.settings.encryption),
        protocol: "tcp".to_owned(),
        upstreams: proxy.upstreams.iter().filter_map(upstream).collect(),
        certificate_not_after: (context.certificate)(&service),
        service,
    })
}
