//! The life of one allocation: network, kernel, catalog, worker, tasks; and all of it backwards.
//!
//! Up: record (written by the runner) → directories → netns → kernel programs → published ports → catalog → worker's
//! listeners, awaited → tasks. Down: catalog → tasks → worker's listeners → kernel programs → netns → directories → record.
//! The worker goes after the tasks, so that an application can finish its work through the mesh. Every step is
//! idempotent: taking over an allocation after the agent was killed is the same way up, and a step that failed is tried
//! again.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use culvert_jobspec::{AllocContext, Environment, Group, Port, PortBinding};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::dialer::sidecar_id;
use super::records::{AllocationRecord, RecordError};
use super::registration::{Allocated, INTERFACE, Registration, SidecarAddress, registrations};
use super::{AllocationStatus, AllocationView, NodeServices, RunError, ServiceView, ports};
use crate::policy::Attachment;
use crate::report::chain;
use crate::task::{AllocDir, Hierarchies, kill_and_remove};
use crate::worker::Served;
use crate::workload::{AllocId, NetworkError, PortMap, Workload};

/// How long the worker may take to open the listeners of a new workload.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How long connections of a stopped workload may go on after its tasks have ended.
const DRAIN: Duration = Duration::from_secs(2);
/// First pause before a failed step is tried again; doubled up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Attempts to remove an allocation before it is left to the next start of the agent.
const REMOVE_ATTEMPTS: u32 = 5;

/// One allocation.
pub(super) struct Allocation {
    pub(super) id: AllocId,
    pub(super) record: AllocationRecord,
    pub(super) node: Arc<NodeServices>,
    pub(super) view: watch::Sender<AllocationView>,
}

/// What is up before the tasks.
pub(super) struct Up {
    pub(super) workload: Workload,
    pub(super) services: Vec<ServiceView>,
    pub(super) environment: AllocContext,
}

impl Allocation {
    /// Lives until `stop`, then removes everything. Begins when those that it replaces are gone (`after`).
    pub(super) async fn run(self, stop: CancellationToken, after: Vec<CancellationToken>) {
        let tasks = TaskTracker::new();
        let stop_tasks = CancellationToken::new();
        if after.iter().any(|gone| !gone.is_cancelled()) {
            let waits = "waits until the allocations that it replaces are gone".to_owned();
            self.view.send_modify(|view| view.error = Some(waits));
        }
        let replaced = async {
            for gone in after {
                gone.cancelled().await;
            }
        };
        let begins = tokio::select! {
            biased;
            () = stop.cancelled() => false,
            () = replaced => true,
        };
        if !begins {
            // Nothing of it is there, unless an agent before this one left something.
        } else if self.record.failed.is_some() {
            // It failed under an agent before this one, which may have been killed before it had ended everything.
            self.deregister().await;
            self.end_strays().await;
            self.show_dead_tasks();
            stop.cancelled().await;
        } else {
            if let Some(up) = self.bring_up(&stop).await {
                self.start_tasks(&up, &tasks, &stop_tasks);
            }
            self.watch_until(&stop, &tasks, &stop_tasks).await;
        }
        self.take_down(&tasks, &stop_tasks).await;
    }

    /// Tries until everything before the tasks is up; `None` when told to stop before, or when no attempt can succeed.
    async fn bring_up(&self, stop: &CancellationToken) -> Option<Up> {
        let mut pause = FIRST_PAUSE;
        loop {
            // Never dropped half-way: what a step does on another thread would go on beside the way down.
            match self.up(stop).await {
                _ if stop.is_cancelled() => return None,
                Ok(up) => return Some(up),
                Err(error) => {
                    if let RunError::Network(NetworkError::PortReserved { port, .. }) = &error {
                        self.bind_again(*port);
                    }
                    let (lasting, error) = (error.lasting(), chain(&error));
                    warn!(alloc = %self.id, error, lasting, "allocation is not up");
                    self.view.send_modify(|view| view.error = Some(error));
                    if lasting {
                        self.view.send_modify(|view| view.status = AllocationStatus::Failed);
                        return None;
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(MAX_PAUSE),
                () = stop.cancelled() => return None,
            }
        }
    }

    /// Chooses another port in place of a dynamic one that cannot be had.
    fn bind_again(&self, taken: u16) {
        let (Ok(group), record) = (self.group(), self.record()) else { return };
        let is_it = |port: &&Port| record.ports.get(&port.label).is_some_and(|binding| binding.host == taken);
        let Some(port) = group.network.ports.iter().find(is_it).filter(|port| port.static_port.is_none()) else {
            return;
        };
        let network = culvert_jobspec::Network { mode: group.network.mode, ports: vec![port.clone()] };
        let mut used = ports::used(self.node.records.allocations().iter());
        used.insert(taken, port.label.clone());
        let bound = ports::bind(&network, used).map_err(|error| error.to_string());
        let changed = bound.and_then(|bound| {
            let change = self.change_record(|record| record.ports.extend(bound.clone()));
            change.map_err(|error| chain(&error))
        });
        if let Err(error) = changed {
            warn!(alloc = %self.id, error, "no other port in place of one that is taken");
        }
    }

    /// As it is written down now.
    fn record(&self) -> AllocationRecord {
        self.view.borrow().record.clone()
    }

    /// Goes through the steps to the end; only waiting for the worker is cut short by `stop`.
    async fn up(&self, stop: &CancellationToken) -> Result<Up, RunError> {
        let group = self.group()?;
        AllocDir::new(&self.node.data_dir, &self.id).create()?;
        let workload = self.node.network.create(&self.id).await?;
        let addresses = std::iter::once(IpAddr::from(workload.addr4)).chain(workload.addr6.map(IpAddr::from)).collect();
        self.view.send_modify(|view| view.addresses = addresses);
        let mut environment = self.context(&workload);
        let registrations = self.registrations(group, &workload, &environment)?;
        // Known before the first is registered: whatever happens on the way, all of them are deregistered in the end.
        let planned = registrations.iter().map(ServiceView::planned).collect();
        self.view.send_modify(|view| view.services = planned);
        self.attach(&workload, &registrations).await?;
        self.node.network.publish(&self.id, &self.port_maps(group, None)).await?;
        let services = self.register(&registrations).await?;
        environment.ports.extend(sidecar_ports(&services));
        self.node.network.publish(&self.id, &self.port_maps(group, Some(&services))).await?;
        self.serve(&workload, &registrations, &services, stop).await?;
        self.view.send_modify(|view| (view.services, view.error) = (services.clone(), None));
        Ok(Up { workload, services, environment })
    }

    pub(super) fn group(&self) -> Result<&Group, RunError> {
        let record = &self.record;
        record.job.group(&record.group).ok_or_else(|| RunError::UnknownGroup(record.group.clone()))
    }

    fn context(&self, workload: &Workload) -> AllocContext {
        AllocContext {
            alloc_id: self.id.to_string(),
            index: self.record.index,
            node: self.node.context.clone(),
            host_ip: self.node.advertise,
            alloc_ip: workload.addr4.into(),
            alloc_interface: INTERFACE.to_owned(),
            ports: self.record().ports,
        }
    }

    fn registrations(
        &self,
        group: &Group,
        workload: &Workload,
        context: &AllocContext,
    ) -> Result<Vec<Registration>, RunError> {
        let advertised = if self.node.advertise.is_loopback() { workload.addr4.into() } else { self.node.advertise };
        let environment = Environment::of_group(&self.record.job, group, context)?;
        let address = SidecarAddress { advertised, workload: workload.addr4.into(), ipv6: workload.addr6.is_some() };
        let ports = &context.ports;
        Ok(registrations(&Allocated { id: &self.id, group, ports, environment: &environment, address })?)
    }

    /// Kernel programs first: from the first packet on, only the workload's own addresses leave it. Without them the packet filter
    /// guards the ports of its applications.
    async fn attach(&self, workload: &Workload, registrations: &[Registration]) -> Result<(), RunError> {
        let meshed = registrations.iter().filter(|registration| registration.sidecar_id.is_some());
        let published: Vec<u16> = self.record().ports.values().map(|port| port.inside).collect();
        let attachment = Attachment {
            id: self.record.workload,
            workload: workload.clone(),
            sidecars: meshed.clone().filter_map(|registration| registration.sidecar_id.clone()).collect(),
            protected: meshed.clone().flat_map(|registration| registration.ports.clone()).collect(),
            published,
        };
        let (protected, published) = (attachment.protected.clone(), attachment.published.clone());
        self.node.policy.attach(attachment).await.map_err(|reason| RunError::Kernel { reason })?;
        // A filter that an agent without programs has left would refuse direct connections.
        let protected = if self.node.policy.active().await { &[] } else { protected.as_slice() };
        Ok(self.node.network.guard(workload, protected, &published).await?)
    }

    /// Ports of the job file, and those of the sidecars where the node is reached from elsewhere.
    fn port_maps(&self, group: &Group, services: Option<&[ServiceView]>) -> Vec<PortMap> {
        let owner = |label: &str| ports::owner(&self.record.job.id, &group.name, label);
        let record = self.record();
        let mut maps: Vec<PortMap> = record
            .ports
            .iter()
            .map(|(label, port)| PortMap { host_port: port.host, to: port.inside, addr: None, owner: owner(label) })
            .collect();
        if !self.node.advertise.is_loopback() {
            let sidecars = services.unwrap_or_default().iter().filter_map(|service| {
                let port = service.sidecar_port?;
                let owner = owner(&format!("connect-proxy-{}", service.service));
                Some(PortMap { host_port: port, to: port, addr: Some(self.node.advertise), owner })
            });
            maps.extend(sidecars);
        }
        maps
    }

    async fn register(&self, registrations: &[Registration]) -> Result<Vec<ServiceView>, RunError> {
        let mut services = Vec::new();
        let before = self.view.borrow().record.sidecar_ports.clone();
        let mut ports = before.clone();
        for registration in registrations {
            let kept = ports.get(&registration.service_id).copied();
            let sidecar_port = self.node.register(&registration.body_with_port(kept)).await?;
            ports.extend(sidecar_port.map(|port| (registration.service_id.clone(), port)));
            services.push(ServiceView { sidecar_port, ..ServiceView::planned(registration) });
        }
        if ports != before {
            self.change_record(|record| record.sidecar_ports.clone_from(&ports))?;
        }
        Ok(services)
    }

    /// Changes the record, on disk first.
    fn change_record(&self, change: impl Fn(&mut AllocationRecord)) -> Result<(), RecordError> {
        self.node.records.change_allocation(self.id.as_str(), &change)?;
        self.view.send_modify(|view| change(&mut view.record));
        Ok(())
    }

    async fn serve(
        &self,
        workload: &Workload,
        registrations: &[Registration],
        services: &[ServiceView],
        stop: &CancellationToken,
    ) -> Result<(), RunError> {
        for (registration, service) in registrations.iter().zip(services) {
            let (Some(proxy), Some(inbound_port)) = (service.sidecar_id.clone(), service.sidecar_port) else {
                continue;
            };
            let (netns, upstreams) = (workload.netns.clone(), registration.upstreams.clone());
            let service = registration.service.clone();
            self.node.policy.expect_listener(&proxy, self.record.workload, inbound_port).await;
            self.node.worker.serve(Served { proxy: proxy.clone(), service, netns, inbound_port, upstreams }).await;
            if let Some(ready) = stop.run_until_cancelled(self.node.worker.ready(&proxy, READY_WITHIN)).await {
                ready?;
            }
        }
        Ok(())
    }

    /// Waits for the end. A task that failed for good takes its siblings along, and the services out of the catalog; so does
    /// what cannot be brought up, with the tasks that an agent before this one started.
    async fn watch_until(&self, stop: &CancellationToken, tasks: &TaskTracker, stop_tasks: &CancellationToken) {
        let mut view = self.view.subscribe();
        let failed = async { view.wait_for(|view| view.status == AllocationStatus::Failed).await.is_ok() };
        tokio::select! {
            () = stop.cancelled() => {}
            _ = failed => {
                self.remember_failure();
                self.deregister().await;
                self.end_tasks(tasks, stop_tasks).await;
                stop.cancelled().await;
            }
        }
    }

    /// A failed allocation stays failed, whatever becomes of the agent.
    fn remember_failure(&self) {
        let why = self.view.borrow().error.clone();
        let why = why.unwrap_or_else(|| {
            let view = self.view.borrow();
            let failed = view.tasks.iter().filter(|(_, task)| task.failed).map(|(name, _)| name.as_str());
            format!("failed tasks: {}", failed.collect::<Vec<_>>().join(", "))
        });
        if let Err(error) = self.change_record(|record| record.failed = Some(why.clone())) {
            warn!(alloc = %self.id, error = chain(&error), "that it failed is not written down: the next agent tries it again");
        }
    }

    async fn end_tasks(&self, tasks: &TaskTracker, stop_tasks: &CancellationToken) {
        stop_tasks.cancel();
        tasks.close();
        tasks.wait().await;
        self.end_strays().await;
    }

    async fn take_down(&self, tasks: &TaskTracker, stop_tasks: &CancellationToken) {
        self.deregister().await;
        self.end_tasks(tasks, stop_tasks).await;
        let stopped = self.sidecars().into_iter().map(|sidecar| async move {
            self.node.worker.stop(&sidecar, DRAIN).await;
        });
        futures::future::join_all(stopped).await;
        self.node.policy.detach(self.record.workload).await;
        for attempt in 1..=REMOVE_ATTEMPTS {
            match self.remove().await {
                Ok(()) => break,
                Err(error) => {
                    let error = chain(&error);
                    warn!(alloc = %self.id, attempt, error, "allocation is not removed yet");
                    self.view.send_modify(|view| view.error = Some(error));
                }
            }
            tokio::time::sleep(FIRST_PAUSE * attempt).await;
        }
        self.view.send_modify(|view| view.status = AllocationStatus::Complete);
    }

    /// Its sidecars: those of this life, and of an earlier one, which may have ended after it left the catalog.
    fn sidecars(&self) -> BTreeSet<String> {
        let view = self.view.borrow();
        let known = view.services.iter().filter_map(|service| service.sidecar_id.clone());
        known.chain(view.record.sidecar_ports.keys().map(|service| sidecar_id(service))).collect()
    }

    async fn deregister(&self) {
        let mut services: BTreeSet<String> = self.node.left_in_catalog(&self.id).into_iter().collect();
        services.extend(self.view.borrow().services.iter().map(|service| service.service_id.clone()));
        for service in services {
            if let Err(error) = self.node.deregister(&service).await {
                warn!(alloc = %self.id, service, error = chain(&error), "a service stays in the catalog for now");
            }
        }
    }

    async fn remove(&self) -> Result<(), RunError> {
        let dir = AllocDir::new(&self.node.data_dir, &self.id);
        let cgroup = Path::new(&self.node.cgroup_parent).join(self.id.as_str());
        let demolish = move || -> Result<(), RunError> {
            kill_and_remove(&Hierarchies::find()?, &cgroup)?;
            Ok(dir.destroy()?)
        };
        // The directory first: what is written down next may need the room that it takes.
        let demolished = tokio::task::spawn_blocking(demolish).await.map_err(RunError::Aborted)?;
        // Those that could not be deregistered on the way down: before their address is somebody else's.
        for service in self.node.left_in_catalog(&self.id) {
            self.node.deregister(&service).await?;
        }
        self.node.network.remove(&self.id).await?;
        demolished?;
        Ok(self.node.records.remove_allocation(&self.id)?)
    }
}

/// The sidecars' ports as tasks see them, labelled as Nomad labels them. The node maps them under the same number.
fn sidecar_ports(services: &[ServiceView]) -> impl Iterator<Item = (String, PortBinding)> {
    services.iter().filter_map(|service| {
        let port = service.sidecar_port?;
        Some((format!("connect-proxy-{}", service.service), PortBinding { host: port, inside: port }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_see_the_ports_of_sidecars_as_nomad_labels_them() {
        let service = |name: &str, sidecar_port| ServiceView {
            service_id: name.to_owned(),
            service: name.to_owned(),
            sidecar_id: None,
            sidecar_port,
        };
        let ports: Vec<_> = sidecar_ports(&[service("count-api", Some(21000)), service("plain", None)]).collect();
        assert_eq!(ports, [("connect-proxy-count-api".to_owned(), PortBinding { host: 21000, inside: 21000 })]);
    }
}
