//! Brings the kernel in line with policy: on every change of the mesh, of the workloads, and when a certificate ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use culvert_control::MeshView;
use tokio::sync::{Mutex, Notify, watch};
use tracing::{error, info, warn};

use super::inherited::Inherited;
use super::pairs::Pairs;
use super::revocation::{Revoked, denied};
use super::{AttachedWorkload, Pair, Route, RouteKey, compile};
use crate::datapath::{Datapath, FlowEnds, Instance, PortKind, Upstream, UpstreamKey, WorkloadLinks, destroy_flows};
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
    fn links(&self) -> WorkloadLinks {
        let Workload { netns, host_ifindex, addr4, addr6, mac, .. } = &self.workload;
        let netns = netns.clone();
        WorkloadLinks { id: self.id, netns, host_ifindex: *host_ifindex, addr4: *addr4, addr6: *addr6, mac: mac.0 }
    }

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
    /// Routes in force, and those of an earlier agent that stay; `None` when the tables may hold something else.
    routes: Option<(BTreeMap<RouteKey, Route>, BTreeSet<UpstreamKey>)>,
    inherited: Inherited,
    pairs: Pairs,
    /// Ends whose connections are denied and have been ended.
    denied: BTreeSet<FlowEnds>,
    revoked: Revoked,
    /// Where the inbound listener of a proxy belongs: workload and port.
    expected: BTreeMap<String, (u32, u16)>,
    /// Workloads of an earlier agent that are not attached again yet; programs of another layout go when it is empty.
    awaited: BTreeSet<u32>,
}

/// Owns the kernel tables.
pub struct PolicyEngine {
    inner: Mutex<Inner>,
    mesh: watch::Receiver<Arc<MeshView>>,
    /// Rung when something has to be tried again.
    again: Notify,
}

impl PolicyEngine {
    /// An engine over `datapath`, which remembers in `data_dir`; without one it only remembers.
    #[must_use]
    pub fn new(datapath: Option<Datapath>, mesh: watch::Receiver<Arc<MeshView>>, data_dir: &Path) -> Arc<Self> {
        let found = datapath.as_ref().map(Datapath::upstreams).transpose().unwrap_or_else(|error| {
            warn!(error = chain(&error), "routes of an earlier agent are not known; they go");
            None
        });
        let found = found.unwrap_or_default();
        let highest = found.values().map(|entry| entry.service).max().unwrap_or_default();
        let inner = Inner {
            datapath,
            attached: BTreeMap::new(),
            routes: None,
            inherited: Inherited::new(&found, Instant::now()),
            pairs: Pairs::load(data_dir, highest),
            denied: BTreeSet::new(),
            revoked: Revoked::default(),
            expected: BTreeMap::new(),
            awaited: BTreeSet::new(),
        };
        Arc::new(Self { inner: Mutex::new(inner), mesh, again: Notify::new() })
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
                () = self.again.notified() => {}
                () = tokio::time::sleep(look_again) => {}
            }
        }
    }

    /// Until the first route in force expires.
    async fn next_end(&self) -> Duration {
        let inner = self.inner.lock().await;
        let end = inner.routes.iter().flat_map(|(routes, _)| routes.values()).map(|route| route.expires).min();
        let rest = end.and_then(|end| end.duration_since(SystemTime::now()).ok());
        let inherited = inner.inherited.end().map(|end| end.saturating_duration_since(Instant::now()));
        [rest, inherited].into_iter().flatten().fold(LOOK_AGAIN, Duration::min)
    }

    /// Puts a workload under the kernel programs. Idempotent.
    ///
    /// # Errors
    /// In words. Without the programs a workload could take another's address, so it must not run then.
    pub async fn attach(&self, attachment: Attachment) -> Result<(), String> {
        let view = self.mesh.borrow().clone();
        let settled = self.inner.lock().await.attach(attachment, &view)?;
        self.try_again_unless(settled);
        Ok(())
    }

    /// Takes a workload out of the tables and its programs away.
    pub async fn detach(&self, id: u32) {
        let view = self.mesh.borrow().clone();
        let settled = self.inner.lock().await.detach(id, &view);
        self.try_again_unless(settled);
    }

    fn try_again_unless(&self, settled: bool) {
        if !settled {
            self.again.notify_one();
        }
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
        self.inner.lock().await.pairs.get(number).cloned()
    }

    /// The rule that ended a connection between `ends` that closed at `at`, if policy did end it.
    pub async fn revoked(&self, ends: &FlowEnds, at: SystemTime) -> Option<String> {
        self.inner.lock().await.revoked.rule(ends, at).map(str::to_owned)
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
        inner.forget(|workload| live.contains(&workload));
        let Some(datapath) = &mut inner.datapath else { return };
        match datapath.retain(live) {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => info!(count = gone.len(), "took the programs off workloads that are gone"),
            Err(error) => warn!(error = chain(&error), "programs of workloads that are gone are not all removed"),
        }
        inner.finish_takeover();
    }

    /// Events of the kernel that were left out since the start.
    pub async fn lost_events(&self) -> u64 {
        self.inner.lock().await.datapath.as_ref().map_or(0, Datapath::lost_events)
    }

    /// Is the direct path available on this node?
    pub async fn active(&self) -> bool {
        self.inner.lock().await.datapath.is_some()
    }

    /// Number of routes in force.
    pub async fn routes(&self) -> usize {
        self.inner.lock().await.routes.as_ref().map_or(0, |(routes, inherited)| routes.len() + inherited.len())
    }

    /// Removes every program and table from the kernel, and what was remembered: the agent leaves.
    ///
    /// # Errors
    /// What could not be removed, in words.
    pub async fn remove_all(&self) -> Result<(), String> {
        let mut inner = self.inner.lock().await;
        let removed = inner.datapath.take().map_or(Ok(()), Datapath::remove_all);
        let forgotten = inner.pairs.remove().map_err(|error| format!("pairs of services: {}", chain(&error)));
        removed.map_err(|error| format!("kernel programs: {}", chain(&error))).and(forgotten)
    }
}

impl Inner {
    /// `Ok(false)` when something has to be tried again.
    fn attach(&mut self, attachment: Attachment, view: &MeshView) -> Result<bool, String> {
        let id = attachment.id;
        if let Some(datapath) = &mut self.datapath {
            datapath.attach(&attachment.links()).map_err(|error| chain(&error))?;
        }
        let steered = self.attached.remove(&id).map(|attached| attached.steered).unwrap_or_default();
        if let Some(datapath) = &mut self.datapath {
            let mut ports = attachment.ports();
            ports.extend(steered.iter().map(|port| (*port, PortKind::Steered)));
            datapath.set_ports(id, &ports).map_err(|error| chain(&error))?;
        }
        self.attached.insert(id, Attached { attachment, steered });
        self.awaited.remove(&id);
        self.finish_takeover();
        // Those that could not be reached in its namespace before.
        self.denied.retain(|ends| ends.source != id && ends.destination != id);
        Ok(self.reconcile(view))
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

    /// What is known of workloads that are not `live`, no connection needs any more.
    fn forget(&mut self, live: impl Fn(u32) -> bool + Copy) {
        self.pairs.retain(live);
        self.inherited.retain(live);
        self.denied.retain(|ends| live(ends.source) && live(ends.destination));
    }

    /// `false` when something has to be tried again.
    fn detach(&mut self, id: u32, view: &MeshView) -> bool {
        self.awaited.remove(&id);
        self.expected.retain(|_, (workload, _)| *workload != id);
        self.attached.remove(&id);
        self.forget(|workload| workload != id);
        let settled = self.reconcile(view);
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.detach(id)
        {
            warn!(workload = id, error = chain(&error), "kernel programs of a workload are not all removed");
        }
        self.finish_takeover();
        settled
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
        let workloads: Vec<AttachedWorkload> = self.attached.values().map(Attached::workload).collect();
        let applied = self.apply(view, compile(view, &workloads, SystemTime::now()));
        let denied = denied(view, &workloads, &self.pairs);
        let ended = self.end(&denied);
        // What is in force after a failure may open connections until it is put right: they are ended then.
        self.denied = if applied && ended { denied.into_keys().collect() } else { BTreeSet::new() };
        applied && ended
    }

    fn apply(&mut self, view: &MeshView, mut routes: BTreeMap<RouteKey, Route>) -> bool {
        let Some(datapath) = &mut self.datapath else { return true };
        let remembered = self.pairs.remember(&routes);
        if let Err(error) = &remembered {
            error!(error = chain(error), "new kernel routes cannot be written down, and are left out; trying again");
            routes.retain(|key, route| self.pairs.covers(key, route).is_some());
        }
        self.pairs.note_rules(view);
        let kept = self.inherited.settle(view, &self.pairs, &routes, Instant::now());
        let target = Some((routes, kept));
        if self.routes == target {
            return remembered.is_ok();
        }
        self.routes = target.filter(|(routes, kept)| {
            let applied = datapath.apply_beside(&entries(routes, &self.pairs), kept);
            // Removals come first: what is in force is not more than what is allowed.
            applied
                .inspect_err(|error| error!(error = chain(error), "kernel routes are not up to date; trying again"))
                .is_ok()
        });
        remembered.is_ok() && self.routes.is_some()
    }

    /// Ends live connections that are `denied` and were not, or were perhaps not ended.
    fn end(&mut self, denied: &BTreeMap<FlowEnds, String>) -> bool {
        let new: BTreeMap<_, _> = denied.iter().filter(|(ends, _)| !self.denied.contains(ends)).collect();
        if new.is_empty() {
            return true;
        }
        let (from, ends) = (SystemTime::now(), new.keys().map(|ends| **ends).collect());
        let destroyed = match &self.datapath {
            Some(datapath) => datapath.destroy_flows(&ends),
            None => self.destroy_without_programs(&ends),
        };
        self.revoked.note(new, from, SystemTime::now());
        match destroyed {
            Ok(0) => true,
            Ok(count) => {
                info!(count, "ended live direct connections that are denied now");
                true
            }
            Err(error) => {
                error!(error = chain(&error), "live direct connections are not all ended; trying again");
                false
            }
        }
    }
}

impl Inner {
    /// What an earlier agent's programs let through lives on without them.
    fn destroy_without_programs(&self, ends: &BTreeSet<FlowEnds>) -> io::Result<usize> {
        let workload = |id: u32| self.attached.get(&id).map(|attached| &attached.attachment.workload);
        let of = |workload: &Workload| {
            let v6 = workload.addr6.map(IpAddr::from);
            std::iter::once(workload.addr4.into()).chain(v6).collect()
        };
        let addresses = self.attached.keys().filter_map(|id| Some((*id, of(workload(*id)?)))).collect();
        destroy_flows(ends, &addresses, |id| match workload(id) {
            Some(workload) => Ok(File::open(&workload.netns)?.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        })
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

/// The kernel's form of `routes`; those that are not written down are left out.
fn entries(routes: &BTreeMap<RouteKey, Route>, pairs: &Pairs) -> BTreeMap<UpstreamKey, Upstream> {
    let mut entries = BTreeMap::new();
    for (key, route) in routes {
        let Some(service) = pairs.covers(key, route) else { continue };
        let instances = route.instances.iter().map(|instance| Instance {
            workload: instance.workload,
            addr4: instance.address4,
            addr6: instance.address6,
            port: instance.port,
        });
        let upstream = Upstream { service, instances: instances.collect(), not_after: Some(route.expires) };
        entries.insert(UpstreamKey { workload: key.0, address: key.1 }, upstream);
    }
    entries
}
