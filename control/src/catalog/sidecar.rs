//! What a sidecar is when its registration says little: Consul's defaults.

use std::collections::BTreeSet;
use std::time::Duration;

use culvert_api::CheckDefinition;

use super::error::RegisterError;
use super::{Instance, Place, check};
use crate::state::State;
use crate::state::rows::{Service, ServiceKind};

/// Interval of the check that a sidecar listens.
const LISTENING_INTERVAL: Duration = Duration::from_secs(10);

/// A declared sidecar: what was given, and what has to be filled in from its service and the state.
#[derive(Clone, Debug)]
pub(super) struct Sidecar {
    /// Validated; what was not given is empty.
    pub(super) service: Service,
    /// `None`: the two default checks.
    pub(super) checks: Option<Vec<CheckDefinition>>,
}

/// ID of the sidecar that the service `id` declares.
pub(super) fn sidecar_id(id: &str) -> String {
    format!("{id}-sidecar-proxy")
}

impl Sidecar {
    /// Fills in what was not given.
    ///
    /// # Errors
    /// No free port, or a check that is wrong.
    pub(super) fn complete(&self, parent: &Service, state: &State, place: &Place) -> Result<Instance, RegisterError> {
        let mut service = self.service.clone();
        service.id = sidecar_id(&parent.id);
        service.kind = ServiceKind::ConnectProxy;
        if service.name.is_empty() {
            service.name = format!("{}-sidecar-proxy", parent.name);
        }
        if service.address.is_empty() {
            service.address.clone_from(&parent.address);
        }
        if service.tags.is_empty() {
            service.tags.clone_from(&parent.tags);
        }
        if service.meta.is_empty() {
            service.meta.clone_from(&parent.meta);
        }
        if service.port == 0 {
            service.port = free_port(state, place, &service.id)?;
        }
        let proxy = service.proxy.get_or_insert_default();
        proxy.destination_service_name.clone_from(&parent.name);
        proxy.destination_service_id.clone_from(&parent.id);
        if proxy.local_service_address.is_empty() {
            proxy.local_service_address = "127.0.0.1".to_owned();
        }
        if proxy.local_service_port == 0 {
            proxy.local_service_port = parent.port;
        }
        let checks = self.checks.clone().unwrap_or_else(|| default_checks(&service, parent));
        let checks = check::parse_all(checks, &service, place).map_err(RegisterError::SidecarCheck)?;
        Ok(Instance { service, checks })
    }
}

/// The port that the sidecar has already if it is of the range, else the lowest that no service of this node has.
fn free_port(state: &State, place: &Place, id: &str) -> Result<u16, RegisterError> {
    let range = place.sidecar_ports.clone().ok_or(RegisterError::NoPortAssignment)?;
    let (low, high) = (*range.start(), *range.end());
    if let Some(port) = state.service(&place.node, id).map(|service| service.port).filter(|port| range.contains(port)) {
        return Ok(port);
    }
    let used: BTreeSet<u16> = state.services_of(&place.node).map(|service| service.port).collect();
    range.into_iter().find(|port| !used.contains(port)).ok_or(RegisterError::NoPortLeft(low, high))
}

/// Does it listen, and is its service well? In front of an application without a port nobody listens for the mesh.
fn default_checks(sidecar: &Service, parent: &Service) -> Vec<CheckDefinition> {
    let aliasing = CheckDefinition {
        name: format!("Connect Sidecar Aliasing {}", parent.id),
        alias_service: parent.id.clone(),
        ..CheckDefinition::default()
    };
    let Some(proxy) = sidecar.proxy.as_ref().filter(|proxy| proxy.local_service_port != 0) else {
        return vec![aliasing];
    };
    let host = if sidecar.address.is_empty() { &proxy.local_service_address } else { &sidecar.address };
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let listening = CheckDefinition {
        name: "Connect Sidecar Listening".to_owned(),
        tcp: format!("{host}:{}", sidecar.port),
        interval: LISTENING_INTERVAL.into(),
        ..CheckDefinition::default()
    };
    vec![listening, aliasing]
}
