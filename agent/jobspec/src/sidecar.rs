//! The sidecar of every mesh service, as `plan` and `status` show it.
//!
//! Nomad injects a docker task that runs Envoy. culvert starts nothing: the node's worker serves the sidecar inside the
//! allocation's network namespace. The task's name stays, so that what people grep for is there.

use crate::{Connect, Group, PortRef, Service};

/// `driver` of an injected task: the sidecar runs inside culvert's own worker.
pub const SIDECAR_DRIVER: &str = "culvert";

/// A sidecar of a group, in the place of Nomad's injected task.
#[derive(Clone, Debug, PartialEq)]
pub struct Sidecar<'a> {
    /// `connect-proxy-<service>`; with another suffix when the group has a task of that name.
    pub task: String,
    /// `connect-proxy:<service>`, Nomad's `Kind`.
    pub kind: String,
    /// The service that it stands before.
    pub service: &'a Service,
    /// The service's `connect` block.
    pub connect: &'a Connect,
}

impl Group {
    /// The sidecars of this group, in the order of its services.
    #[must_use]
    pub fn sidecars(&self) -> Vec<Sidecar<'_>> {
        let mut sidecars: Vec<Sidecar<'_>> = Vec::new();
        for (index, service) in self.services.iter().enumerate() {
            let Some(connect) = &service.connect else { continue };
            let mut task = format!("connect-proxy-{}", service.name);
            let taken = |name: &str| {
                self.tasks.iter().any(|task| task.name == name) || sidecars.iter().any(|other| other.task == name)
            };
            if taken(&task) {
                // Nomad appends random digits; the index gives every plan the same name.
                task = format!("{task}-{index:06x}");
            }
            sidecars.push(Sidecar { task, kind: format!("connect-proxy:{}", service.name), service, connect });
        }
        sidecars
    }
}

impl Sidecar<'_> {
    /// Where it hands connections to the application, as shown: `127.0.0.1:9001`, or with a port's label.
    #[must_use]
    pub fn local_service(&self) -> Option<String> {
        let proxy = &self.connect.sidecar.proxy;
        let port = match (&proxy.local_service_port, &self.service.port) {
            (Some(port), _) | (None, Some(PortRef::Number(port))) => port.to_string(),
            (None, Some(PortRef::Label(label))) => label.clone(),
            (None, None) => return None,
        };
        let address = proxy.local_service_address.map_or_else(|| "127.0.0.1".to_owned(), |address| address.to_string());
        Some(format!("{address}:{port}"))
    }
}
