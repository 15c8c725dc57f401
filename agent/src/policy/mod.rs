//! Compiles policy into what the kernel may connect directly.
//!
//! [`compile`] is pure: from the mesh as the control plane sees it and the workloads of this node to the set of [`Route`]s. A route is there
//! only while *everything* holds: same node, both ends `between-nodes`, intention allows, both certificates valid, a passing
//! instance whose workload is attached. What is missing goes through the worker: a missing entry never means "allow".

mod apply;
mod inherited;
mod kernel_events;
mod pairs;
mod revocation;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::SystemTime;

use culvert_control::{MeshInstance, MeshView};
use culvert_ebpf_common::MAX_INSTANCES;
use culvert_types::{Encryption, HealthStatus, ServiceName, decide};

pub use apply::{Attachment, PolicyEngine};
pub use kernel_events::relay;
pub use pairs::Pair;

/// A workload whose kernel programs are all in place.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AttachedWorkload {
    /// Number of the workload in the kernel tables.
    pub id: u32,
    /// Its address on the bridge.
    pub address4: Ipv4Addr,
    /// Its IPv6 address on the bridge, where the node has IPv6.
    pub address6: Option<Ipv6Addr>,
    /// Catalog IDs of the sidecars of its services.
    pub sidecars: Vec<String>,
}

/// One instance that may be reached directly.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct RouteInstance {
    /// Number of its workload.
    pub workload: u32,
    /// Its address.
    pub address4: Ipv4Addr,
    /// Its IPv6 address.
    pub address6: Option<Ipv6Addr>,
    /// Where the application listens.
    pub port: u16,
}

/// From an upstream's address in one workload to the instances behind it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// Who calls.
    pub source: ServiceName,
    /// Who is called.
    pub destination: ServiceName,
    /// The rule that allows it, for events.
    pub rule: String,
    /// Where it may go: at least one, at most [`MAX_INSTANCES`].
    pub instances: Vec<RouteInstance>,
    /// End of the first certificate to expire: the route is void from then on.
    pub expires: SystemTime,
}

/// Where an application connects to: its workload and the loopback address.
pub type RouteKey = (u32, SocketAddr);

/// All routes that hold at `now`.
#[must_use]
pub fn compile(view: &MeshView, workloads: &[AttachedWorkload], now: SystemTime) -> BTreeMap<RouteKey, Route> {
    let by_sidecar: BTreeMap<&str, &AttachedWorkload> = workloads
        .iter()
        .flat_map(|workload| workload.sidecars.iter().map(move |sidecar| (sidecar.as_str(), workload)))
        .collect();
    let local = |instance: &&MeshInstance| instance.node == view.node;
    let mut routes = BTreeMap::new();
    for source in view.instances.iter().filter(local) {
        let Some(workload) = by_sidecar.get(source.sidecar_id.as_str()) else { continue };
        for upstream in &source.upstreams {
            let Some(route) = route(view, source, &upstream.destination, &by_sidecar, now) else { continue };
            for bind in offered(upstream.bind) {
                routes.insert((workload.id, bind), route.clone());
            }
        }
    }
    routes
}

/// An upstream on 127.0.0.1 is offered on ::1 as well, as the worker's listeners are.
fn offered(bind: SocketAddr) -> impl Iterator<Item = SocketAddr> {
    let v6 =
        (bind.ip() == IpAddr::from(Ipv4Addr::LOCALHOST)).then(|| SocketAddr::from((Ipv6Addr::LOCALHOST, bind.port())));
    std::iter::once(bind).chain(v6)
}

fn route(
    view: &MeshView,
    source: &MeshInstance,
    destination: &ServiceName,
    by_sidecar: &BTreeMap<&str, &AttachedWorkload>,
    now: SystemTime,
) -> Option<Route> {
    let source_valid = valid_until(source, now)?;
    let decision = decide(view.intentions.iter(), &source.service, destination, view.default_action);
    if !decision.allowed() {
        return None;
    }
    let mut expires = source_valid;
    let mut instances = Vec::new();
    for called in view.instances.iter().filter(|called| called.service == *destination) {
        // One end that wants encryption everywhere decides for the whole service: balancing must not change the answer.
        if source.encryption.between(called.encryption) == Encryption::Always {
            return None;
        }
        if called.node != view.node || called.health != HealthStatus::Passing || called.protocol != "tcp" {
            continue;
        }
        let Some(valid) = valid_until(called, now) else { continue };
        let Some(workload) = by_sidecar.get(called.sidecar_id.as_str()) else { continue };
        if called.local_port == 0 {
            continue;
        }
        expires = expires.min(valid);
        let (workload, address4, address6) = (workload.id, workload.address4, workload.address6);
        instances.push(RouteInstance { workload, address4, address6, port: called.local_port });
    }
    instances.sort_unstable();
    let (source, destination, rule) = (source.service.clone(), destination.clone(), decision.by.to_string());
    // Among more instances than an entry holds, the worker balances: the rest would starve.
    (1..=MAX_INSTANCES).contains(&instances.len()).then_some(Route { source, destination, rule, instances, expires })
}

/// End of the instance's certificate, if it has one that is valid at `now`.
fn valid_until(instance: &MeshInstance, now: SystemTime) -> Option<SystemTime> {
    instance.certificate_not_after.filter(|end| *end > now)
}
