//! What the node's policy compiler needs to know of the mesh, rebuilt at each revision.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use culvert_types::{Action, Datacenter, Encryption, HealthStatus, Intention, ServiceName, TrustDomain};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::ca::{LeafError, LeafWatch, Leaves, check_registered};
use crate::catalog::Place;
use crate::config::Reloadable;
use crate::state::rows::{Proxy, Service, Upstream};
use crate::state::{Ledger, State};
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
    let upstream =
        |upstream: &Upstream| Some(MeshUpstream { destination: upstream.destination()?, bind: upstream.bind()? });
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

/// Leaves that applications asked for over the API: kept while their service is registered, so that the next one to ask gets
/// the same certificate and may wait for its renewal. Bounded by the services of this node.
#[derive(Default)]
pub(crate) struct RequestedLeaves(Mutex<BTreeMap<ServiceName, LeafWatch>>);

impl RequestedLeaves {
    /// The leaf of `service`, which the caller knows to be registered here.
    pub(crate) fn watch(&self, leaves: &Leaves, service: &ServiceName) -> Result<LeafWatch, LeafError> {
        let mut requested = self.0.lock();
        if let Some(watch) = requested.get(service) {
            return Ok(watch.clone());
        }
        let watch = leaves.watch(service)?;
        requested.insert(service.clone(), watch.clone());
        Ok(watch)
    }

    /// Lets go of leaves whose service is gone.
    fn prune(&self, state: &State, node: &str) {
        self.0.lock().retain(|service, _| check_registered(state, node, service).is_ok());
    }
}

/// Computes the view anew whenever the state, a setting or a certificate changes.
pub(crate) struct MeshPublisher {
    ledger: Ledger,
    leaves: Leaves,
    settings: watch::Receiver<Reloadable>,
    place: Arc<Place>,
    publish: watch::Sender<Arc<MeshView>>,
    requested: Arc<RequestedLeaves>,
    kept: BTreeMap<ServiceName, KeptLeaf>,
    /// Rung by every new leaf.
    leaf: Arc<Notify>,
}

/// A leaf that is kept because a sidecar of this node needs it.
struct KeptLeaf {
    watch: LeafWatch,
    _bell: AbortOnDropHandle<()>,
}

impl MeshPublisher {
    pub(crate) fn new(
        ledger: &Ledger,
        leaves: &Leaves,
        settings: watch::Receiver<Reloadable>,
        place: &Arc<Place>,
    ) -> Self {
        let context = MeshContext {
            trust_domain: leaves.authority().trust_domain(),
            datacenter: &place.datacenter,
            node: &place.node,
            settings: *settings.borrow(),
            certificate: &|_| None,
        };
        let view = MeshView::new(&ledger.state(), &context);
        Self {
            ledger: ledger.clone(),
            leaves: leaves.clone(),
            settings,
            place: Arc::clone(place),
            publish: watch::Sender::new(Arc::new(view)),
            requested: Arc::default(),
            kept: BTreeMap::new(),
            leaf: Arc::default(),
        }
    }

    pub(crate) fn requested(&self) -> Arc<RequestedLeaves> {
        Arc::clone(&self.requested)
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<MeshView>> {
        self.publish.subscribe()
    }

    /// Publishes until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut states = self.ledger.watch();
        loop {
            let state = Arc::clone(&states.borrow_and_update());
            let settings = *self.settings.borrow_and_update();
            self.keep_leaves(&state);
            self.requested.prune(&state, &self.place.node);
            self.publish(&state, settings);
            tokio::select! {
                () = stop.cancelled() => return,
                changed = states.changed() => if changed.is_err() { return },
                changed = self.settings.changed() => if changed.is_err() { return },
                () = self.leaf.notified() => {}
            }
        }
    }

    fn publish(&self, state: &State, settings: Reloadable) {
        let certificate =
            |service: &ServiceName| Some(self.kept.get(service)?.watch.latest()?.certificate.valid_before);
        let context = MeshContext {
            trust_domain: self.leaves.authority().trust_domain(),
            datacenter: &self.place.datacenter,
            node: &self.place.node,
            settings,
            certificate: &certificate,
        };
        let view = MeshView::new(state, &context);
        self.publish.send_if_modified(|current| {
            let changed = **current != view;
            if changed {
                *current = Arc::new(view);
            }
            changed
        });
    }

    /// Keeps a leaf for each service that a sidecar of this node represents, whether a proxy asks for it or not: the direct
    /// path needs a valid certificate too.
    fn keep_leaves(&mut self, state: &State) {
        let own = state.services_of(&self.place.node).filter_map(|sidecar| sidecar.proxy.as_ref()?.destination());
        let wanted: BTreeSet<ServiceName> = own.collect();
        self.kept.retain(|service, _| wanted.contains(service));
        for service in wanted {
            if self.kept.contains_key(&service) {
                continue;
            }
            match self.leaves.watch(&service) {
                Ok(watch) => {
                    let bell = ring(watch.clone(), Arc::clone(&self.leaf));
                    self.kept.insert(service, KeptLeaf { watch, _bell: bell });
                }
                Err(err) => warn!(%service, %err, "no certificate for a service of this node"),
            }
        }
    }
}

fn ring(mut watch: LeafWatch, bell: Arc<Notify>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        while watch.changed().await.is_ok() {
            bell.notify_one();
        }
    }))
}
