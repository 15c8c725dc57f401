//! Brings the kernel in line with policy: on every change of the mesh, of the workloads, and when a certificate ends.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_control::{MeshInstance, MeshView};
use culvert_types::decide;
use tokio::sync::{Mutex, watch};
use tracing::{error, info, warn};

use super::{AttachedWorkload, Pair, Route, RouteKey, compile};
use crate::datapath::{Datapath, FlowEnds, Instance, PortKind, Upstream, UpstreamKey, WorkloadLinks};
use crate::report::chain;
use crate::workload::Workload;

/// Pause before what failed is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// Looks again at least this often, even without a change.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// A workload that comes under the kernel programs.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Its number in the kernel tables.
    pub id: u32,
    /// Its network.
    pub workload: Workload,
    /// Catalog IDs of its sidecars.
    pub sidecars: Vec<String>,
    /// Ports of its applications that only the mesh reaches.
    pub protected: Vec<u16>,
    /// Ports inside that the job file publishes on the host.
    pub published: Vec<u16>,
}

impl Attachment {
    /// Every guarded port with its kind. A published port of a mesh service stays closed to other workloads.
    fn ports(&self) -> Vec<(u16, PortKind)> {
        let kind = |port: &u16| if self.published.contains(port) { PortKind::Published } else { PortKind::Protected };
        let ports: BTreeSet<u16> = self.protected.iter().copied().collect();
        ports.iter().map(|port| (*port, kind(port))).collect()
    }
}

struct Attached {
    attachment: Attachment,
    steered: BTreeSet<u16>,
}

struct Inner {
    /// `None`: no eBPF on this node; every connection goes through the worker.
    datapath: Option<Datapath>,
    attached: BTreeMap<u32, Attached>,
    /// Routes in force; `None` before the first were written: the tables may hold what an earlier agent left.
    routes: Option<BTreeMap<RouteKey, Route>>,
    /// Ends whose connections are denied and have been ended.
    denied: BTreeSet<FlowEnds>,
    /// Where the inbound listener of a proxy belongs: workload and port.
    expected: BTreeMap<String, (u32, u16)>,
    /// Workloads of an earlier agent that are not attached again yet; programs of another layout go when it is empty.
    awaited: BTreeSet<u32>,
    /// Numbers of pairs of services, as they come back in events of the kernel. Never reused while the agent runs.
    pairs: Vec<Pair>,
}

/// Owns the kernel tables.
pub struct PolicyEngine {
    inner: Mutex<Inner>,
    mesh: watch::Receiver<Arc<MeshView>>,
}

impl PolicyEngine {
    /// An engine over `datapath`; without one it only remembers.
    #[must_use]
    pub fn new(datapath: Option<Datapath>, mesh: watch::Receiver<Arc<MeshView>>) -> Arc<Self> {
        let inner = Inner {
            datapath,
            attached: BTreeMap::new(),
            routes: None,
            denied: BTreeSet::new(),
            expected: BTreeMap::new(),
            awaited: BTreeSet::new(),
            pairs: Vec::new(),
        };
        Arc::new(Self { inner: Mutex::new(inner), mesh })
    }

    /// Follows the mesh until its source ends.
    pub async fn run(self: Arc<Self>) {
        let mut mesh = self.mesh.clone();
        loop {
            let view = mesh.borrow_and_update().clone();
            let settled = self.inner.lock().await.reconcile(&view);
            let look_again = if settled { self.next_end().await } else { TRY_AGAIN };
            tokio::select! {
                changed = mesh.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(look_again) => {}
            }
        }
    }

    /// Until the first route in force expires.
    async fn next_end(&self) -> Duration {
        let inner = self.inner.lock().await;
        let end = inner.routes.iter().flatten().map(|(_, route)| route.expires).min();
        end.and_then(|end| end.duration_since(SystemTime::now()).ok()).map_or(LOOK_AGAIN, |rest| rest.min(LOOK_AGAIN))
    }

    /// Puts a workload under the kernel programs. Idempotent.
    ///
    /// # Errors
    /// In words. Without the programs a workload could take another's address, so it must not run then.
    pub async fn attach(&self, attachment: Attachment) -> Result<(), String> {
        let view = self.mesh.borrow().clone();
        self.inner.lock().await.attach(attachment, &view)
    }

    /// Takes a workload out of the tables and its programs away.
    pub async fn detach(&self, id: u32) {
        let view = self.mesh.borrow().clone();
        self.inner.lock().await.detach(id, &view);
    }

    /// The inbound listener of `proxy` will be on `port` of workload `id`.
    pub async fn expect_listener(&self, proxy: &str, id: u32, port: u16) {
        self.inner.lock().await.expected.insert(proxy.to_owned(), (id, port));
    }

    /// The worker opened the inbound listener of `proxy`: the kernel steers its port to it, whatever else listens.
    pub async fn listener_opened(&self, proxy: &str, port: u16, listener: OwnedFd) {
        self.inner.lock().await.steer(proxy, port, &listener);
    }

    /// The pair of services with this number, for events of the kernel.
    pub async fn pair(&self, number: u32) -> Option<Pair> {
        self.inner.lock().await.pairs.get(usize::try_from(number).ok()?.checked_sub(1)?).cloned()
    }

    /// Catalog IDs of the sidecars of a workload, for events of the kernel.
    pub async fn sidecars(&self, id: u32) -> Vec<String> {
        let inner = self.inner.lock().await;
        inner.attached.get(&id).map(|attached| attached.attachment.sidecars.clone()).unwrap_or_default()
    }

    /// Takes programs off workloads that an earlier agent left and that are not in `live`.
    pub async fn retain(&self, live: &[u32]) {
        let mut inner = self.inner.lock().await;
        inner.awaited = live.iter().copied().collect();
        let Some(datapath) = &mut inner.datapath else { return };
        match datapath.retain(live) {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => info!(count = gone.len(), "took the programs off workloads that are gone"),
            Err(error) => warn!(error = chain(&error), "programs of workloads that are gone are not all removed"),
        }
        inner.finish_takeover();
    }

    /// Is the direct path available on this node?
    pub async fn active(&self) -> bool {
        self.inner.lock().await.datapath.is_some()
    }

    /// Number of routes in force.
    pub async fn routes(&self) -> usize {
        self.inner.lock().await.routes.as_ref().map_or(0, BTreeMap::len)
    }

    /// Removes every program and table from the kernel: the agent leaves.
    pub async fn remove_all(&self) {
        let Some(datapath) = self.inner.lock().await.datapath.take() else { return };
        if let Err(error) = datapath.remove_all() {
            error!(error = chain(&error), "kernel programs are not all removed");
        }
    }
}

impl Inner {
    fn attach(&mut self, attachment: Attachment, view: &MeshView) -> Result<(), String> {
        let Some(datapath) = &mut self.datapath else { return Ok(()) };
        let id = attachment.id;
        let workload = &attachment.workload;
        let links = WorkloadLinks {
            id,
            netns: workload.netns.clone(),
            host_ifindex: workload.host_ifindex,
            addr4: workload.addr4,
            addr6: workload.addr6,
            mac: workload.mac.0,
        };
        datapath.attach(&links).map_err(|error| chain(&error))?;
        let steered = self.attached.remove(&id).map(|attached| attached.steered).unwrap_or_default();
        let mut ports = attachment.ports();
        ports.extend(steered.iter().map(|port| (*port, PortKind::Steered)));
        datapath.set_ports(id, &ports).map_err(|error| chain(&error))?;
        self.attached.insert(id, Attached { attachment, steered });
        self.awaited.remove(&id);
        self.finish_takeover();
        self.reconcile(view);
        Ok(())
    }

    /// Once every workload is under this agent's programs, those of an earlier layout go.
    fn finish_takeover(&mut self) {
        if !self.awaited.is_empty() {
            return;
        }
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.finish_takeover()
        {
            warn!(%error, "what programs of another layout have left is not all removed");
        }
    }

    fn detach(&mut self, id: u32, view: &MeshView) {
        self.awaited.remove(&id);
        self.expected.retain(|_, (workload, _)| *workload != id);
        self.attached.remove(&id);
        self.reconcile(view);
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.detach(id)
        {
            warn!(workload = id, error = chain(&error), "kernel programs of a workload are not all removed");
        }
        self.finish_takeover();
    }

    fn steer(&mut self, proxy: &str, port: u16, listener: &OwnedFd) {
        let Some(datapath) = &mut self.datapath else { return };
        let Some((id, expected)) = self.expected.get(proxy).copied() else { return };
        let Some(attached) = self.attached.get_mut(&id).filter(|_| expected == port) else { return };
        let mut ports = attached.attachment.ports();
        ports.extend(attached.steered.iter().chain([&port]).map(|port| (*port, PortKind::Steered)));
        let steered = datapath.steer(id, port, listener.as_fd()).and_then(|()| datapath.set_ports(id, &ports));
        match steered {
            Ok(()) => drop(attached.steered.insert(port)),
            // The listener is reached through the ordinary lookup then.
            Err(error) => warn!(proxy, port, error = chain(&error), "inbound connections are not steered"),
        }
    }

    /// Makes the kernel's routes those that hold now, removals first; then ends live connections that are denied now.
    ///
    /// `false` when something has to be tried again.
    fn reconcile(&mut self, view: &MeshView) -> bool {
        let Some(datapath) = &mut self.datapath else { return true };
        let mut settled = true;
        let workloads: Vec<AttachedWorkload> = self.attached.values().map(Attached::workload).collect();
        let desired = compile(view, &workloads, SystemTime::now());
        if self.routes.as_ref() != Some(&desired) {
            let entries = entries(&desired, &mut self.pairs);
            self.routes = match datapath.apply(&entries) {
                Ok(_) => Some(desired),
                Err(error) => {
                    // Removals come first: what is in force is not more than what is allowed. What is denied is ended all the same.
                    error!(error = chain(&error), "kernel routes are not up to date; trying again");
                    settled = false;
                    None
                }
            };
        }
        let denied = denied(view, &workloads);
        // Also pairs that this agent sees for the first time: connections of its predecessor may live there.
        let ends: BTreeSet<FlowEnds> = denied.difference(&self.denied).copied().collect();
        if !ends.is_empty() {
            match datapath.destroy_flows(&ends) {
                Ok(0) => {}
                Ok(count) => info!(count, "ended live direct connections that are denied now"),
                Err(error) => {
                    error!(error = chain(&error), "live direct connections are not all ended; trying again");
                    return false;
                }
            }
        }
        self.denied = denied;
        settled
    }
}

impl Attached {
    fn workload(&self) -> AttachedWorkload {
        let workload = &self.attachment.workload;
        AttachedWorkload {
            id: self.attachment.id,
            address4: workload.addr4,
            address6: workload.addr6,
            sidecars: self.attachment.sidecars.clone(),
        }
    }
}

/// The kernel's form of `routes`.
fn entries(routes: &BTreeMap<RouteKey, Route>, pairs: &mut Vec<Pair>) -> BTreeMap<UpstreamKey, Upstream> {
    let mut entries = BTreeMap::new();
    for ((workload, bind), route) in routes {
        let instances = route.instances.iter().map(|instance| Instance {
            workload: instance.workload,
            addr4: instance.address4,
            addr6: instance.address6,
            port: instance.port,
        });
        let key = UpstreamKey { workload: *workload, address: *bind };
        let (service, instances) = (number(pairs, route), instances.collect());
        entries.insert(key, Upstream { service, instances, not_after: Some(route.expires) });
    }
    entries
}

/// The number of the route's pair; the rule that is told with it is the one in force.
fn number(pairs: &mut Vec<Pair>, route: &Route) -> u32 {
    let same = |pair: &Pair| pair.source == route.source && pair.destination == route.destination;
    let index = pairs.iter().position(same).unwrap_or_else(|| {
        let (source, destination) = (route.source.clone(), route.destination.clone());
        pairs.push(Pair { source, destination, rule: String::new() });
        pairs.len() - 1
    });
    pairs[index].rule.clone_from(&route.rule);
    u32::try_from(index + 1).unwrap_or(u32::MAX)
}

/// Ends between which upstreams are declared and which policy denies now. Health, encryption and expiry move new
/// connections only; they end none.
fn denied(view: &MeshView, workloads: &[AttachedWorkload]) -> BTreeSet<FlowEnds> {
    let home = |instance: &MeshInstance| {
        workloads.iter().find(|workload| workload.sidecars.contains(&instance.sidecar_id)).map(|workload| workload.id)
    };
    let mut denied = BTreeSet::new();
    for source in view.instances.iter() {
        let Some(caller) = home(source) else { continue };
        for upstream in &source.upstreams {
            let decision = decide(view.intentions.iter(), &source.service, &upstream.destination, view.default_action);
            if decision.allowed() {
                continue;
            }
            let called = view.instances.iter().filter(|instance| instance.service == upstream.destination);
            denied.extend(called.filter_map(|instance| {
                Some(FlowEnds { source: caller, destination: home(instance)?, port: instance.local_port })
            }));
        }
    }
    denied
}
