//! The catalog of this node: what its services, sidecars and checks are, by the rules of Consul's agent.
//!
//! One way in for everybody: the HTTP API and the job runner call the same functions. A registration is validated as a
//! whole ([`service`], [`check`], [`proxy`]), its sidecar is filled in ([`sidecar`]), and everything that it makes is
//! committed in one transaction. Saying the same again changes nothing: no check is reset, no port moves, no reader wakes.
//!
//! Left out: running checks ([`crate::checks`]) and printing rows as the API's bodies (`http::view`).

mod check;
mod error;
mod maintenance;
mod proxy;
mod service;
mod sidecar;

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use culvert_api::{CheckDefinition, ServiceRegistration};
use culvert_types::ServiceName;
use tracing::{info, warn};

use crate::state::rows::{self, Check, Service};
use crate::state::{Ledger, Plan, State, Stored, UpdateError, row_key};
use crate::store::{MAX_OPERATIONS, Table};

pub(crate) use self::error::{CheckError, UnknownCheck};
pub use self::error::{RegisterError, UnknownService};

/// Most checks of one instance, beside those of maintenance. A registration that replaces all checks of a service and of its
/// sidecar, or a deregistration of both, has to fit into one transaction.
pub(crate) const MAX_CHECKS: usize = 30;
const _: () = assert!(2 * (1 + 2 * MAX_CHECKS + 1) <= MAX_OPERATIONS);
/// Rows of a former name that one transaction removes.
const FORGET_AT_A_TIME: usize = MAX_OPERATIONS / 2;

/// Where a node is, for what is registered on it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Name of the node.
    pub node: String,
    /// Address of services that give none.
    pub advertise: IpAddr,
    /// Datacenter.
    pub datacenter: culvert_types::Datacenter,
    /// Ports for sidecars that name none.
    pub sidecar_ports: Option<RangeInclusive<u16>>,
    /// Indent JSON always.
    pub dev: bool,
}

/// What a registration made.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Registered {
    /// ID of the service.
    pub service_id: String,
    /// ID of its sidecar, if it declared one.
    pub sidecar_id: Option<String>,
    /// Port of its sidecar, if it declared one.
    pub sidecar_port: Option<u16>,
}

/// Registrations on this node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Catalog {
    ledger: Ledger,
    place: Arc<Place>,
}

impl Catalog {
    /// The catalog of `place`.
    #[must_use]
    pub(crate) fn new(ledger: Ledger, place: Arc<Place>) -> Self {
        Self { ledger, place }
    }

    /// Registers or re-registers a service, its checks and the sidecar that it declares.
    ///
    /// Checks that are registered already keep their status. Checks of the service that `body` does not name stay, unless
    /// `replace_checks`.
    ///
    /// # Errors
    /// [`RegisterError`]; nothing is changed then.
    pub(crate) async fn register_service(
        &self,
        body: ServiceRegistration,
        replace_checks: bool,
    ) -> Result<Registered, RegisterError> {
        let wanted = service::parse(body, &self.place)?;
        if let Err(error) = ServiceName::new(&wanted.main.service.name) {
            warn!(%error, id = wanted.main.service.id, "registered a service that can never be in the mesh");
        }
        self.ledger
            .update(|state, plan| {
                let sidecar = wanted.sidecar.as_ref();
                let sidecar = sidecar.map(|sidecar| sidecar.complete(&wanted.main.service, state, &self.place));
                let sidecar = sidecar.transpose()?;
                let mut main = wanted.main.clone();
                main.service.declared_sidecar = match &sidecar {
                    Some(sidecar) => Some(sidecar.service.id.clone()),
                    None => self.earlier_sidecar(state, &main.service.id),
                };
                for instance in sidecar.iter().chain([&main]) {
                    self.put(state, plan, instance, replace_checks)?;
                }
                Ok(Registered {
                    service_id: main.service.id,
                    sidecar_port: sidecar.as_ref().map(|sidecar| sidecar.service.port),
                    sidecar_id: sidecar.map(|sidecar| sidecar.service.id),
                })
            })
            .await
    }

    /// The sidecar that an earlier registration of `id` declared, if it is still there: it goes when the service goes.
    fn earlier_sidecar(&self, state: &State, id: &str) -> Option<String> {
        let declared = state.service(&self.place.node, id)?.declared_sidecar.clone()?;
        state.service(&self.place.node, &declared).map(|_| declared)
    }

    fn put(
        &self,
        state: &State,
        plan: &mut Plan,
        instance: &Instance,
        replace_checks: bool,
    ) -> Result<(), RegisterError> {
        let Instance { service, checks } = instance;
        let node = &self.place.node;
        plan.put(Table::Services, row_key(node, &service.id), service);
        for check in checks {
            let check = match state.check(node, &check.id) {
                Some(existing) => keep_verdict(check, existing),
                None => check.clone(),
            };
            plan.put(Table::Checks, row_key(node, &check.id), &check);
        }
        let mut kept = 0;
        for check in state.checks_of(node, &service.id) {
            if checks.iter().any(|new| new.id == check.id) {
                continue;
            }
            if replace_checks && !maintenance::is_maintenance(check) {
                plan.delete(Table::Checks, row_key(node, &check.id));
                continue;
            }
            kept += usize::from(!maintenance::is_maintenance(check));
            if check.service_name != service.name || check.service_tags != service.tags {
                let (service_name, service_tags) = (service.name.clone(), service.tags.clone());
                let check = Check { service_name, service_tags, ..check.value.clone() };
                plan.put(Table::Checks, row_key(node, &check.id), &check);
            }
        }
        if kept + checks.len() > MAX_CHECKS {
            return Err(RegisterError::Check(CheckError::TooMany(service.id.clone())));
        }
        Ok(())
    }

    /// Removes a service, its checks, and the sidecar that its registration declared with the sidecar's checks.
    ///
    /// # Errors
    /// [`UnknownService`].
    pub(crate) async fn deregister_service(&self, id: &str) -> Result<(), UnknownService> {
        self.ledger
            .update(|state, plan| {
                let service = state.service(&self.place.node, id);
                let service = service.ok_or_else(|| UnknownService::Unknown(id.to_owned()))?;
                self.delete(state, plan, id);
                if let Some(sidecar) = &service.declared_sidecar {
                    self.delete(state, plan, sidecar);
                }
                Ok(())
            })
            .await
    }

    fn delete(&self, state: &State, plan: &mut Plan, id: &str) {
        let node = &self.place.node;
        plan.delete(Table::Services, row_key(node, id));
        for check in state.checks_of(node, id) {
            plan.delete(Table::Checks, row_key(node, &check.id));
        }
    }

    /// Registers a check of a service or, without `ServiceID`, of the node. Keeps the status of one that is there already,
    /// unless `body` gives one.
    ///
    /// # Errors
    /// [`CheckError`]; nothing is changed then.
    pub(crate) async fn register_check(&self, body: CheckDefinition) -> Result<(), CheckError> {
        let status_given = !body.status.is_empty();
        let wanted = check::parse_own(body, &self.place)?;
        self.ledger
            .update(|state, plan| {
                let mut check = wanted.clone();
                if !check.service_id.is_empty() {
                    let service = state.service(&self.place.node, &check.service_id);
                    let service = service.ok_or_else(|| CheckError::UnknownService(check.service_id.clone()))?;
                    let own = |other: &&Arc<Stored<Check>>| other.id != check.id && !maintenance::is_maintenance(other);
                    if state.checks_of(&self.place.node, &check.service_id).filter(own).count() >= MAX_CHECKS {
                        return Err(CheckError::TooMany(check.service_id));
                    }
                    check.service_name.clone_from(&service.name);
                    check.service_tags.clone_from(&service.tags);
                }
                if let Some(existing) = state.check(&self.place.node, &check.id)
                    && !status_given
                {
                    check = keep_verdict(&check, existing);
                }
                plan.put(Table::Checks, row_key(&self.place.node, &check.id), &check);
                Ok(())
            })
            .await
    }

    /// Removes a check.
    ///
    /// # Errors
    /// [`UnknownCheck`].
    pub(crate) async fn deregister_check(&self, id: &str) -> Result<(), UnknownCheck> {
        self.ledger
            .update(|state, plan| {
                if state.check(&self.place.node, id).is_none() {
                    return Err(UnknownCheck::Unknown(id.to_owned()));
                }
                plan.delete(Table::Checks, row_key(&self.place.node, id));
                Ok(())
            })
            .await
    }

    /// Writes this node and its own check, if they are not there as they should be. Rows of the same node under another name
    /// go first: nobody runs those checks any more, so its instances would take traffic for ever.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub(crate) async fn announce(&self, node: &rows::Node) -> Result<(), UpdateError> {
        while self.ledger.update(|state, plan| Ok::<_, UpdateError>(forget_former(state, plan, node))).await? {}
        let check = check::serf_health(&node.name);
        self.ledger
            .update(|_, plan| {
                plan.put(Table::Nodes, &node.name, node);
                plan.put(Table::Checks, row_key(&node.name, &check.id), &check);
                Ok(())
            })
            .await
    }
}

/// Plans to remove what other names of `node` left, at most [`FORGET_AT_A_TIME`] rows; `false` when there is nothing.
fn forget_former(state: &State, plan: &mut Plan, node: &rows::Node) -> bool {
    let former = |row: &&Arc<Stored<rows::Node>>| row.id == node.id && row.name != node.name;
    let Some(former) = state.nodes().find(former) else { return false };
    let checks = state.checks_on(&former.name).map(|check| (Table::Checks, row_key(&former.name, &check.id)));
    let services = state.services_of(&former.name).map(|row| (Table::Services, row_key(&former.name, &row.id)));
    // The node itself goes last: what is left of it can be found until then.
    let rows = services.chain(checks).chain([(Table::Nodes, former.name.clone())]);
    for (table, key) in rows.take(FORGET_AT_A_TIME) {
        plan.delete(table, key);
    }
    info!(node = node.name, former = former.name, "removing rows that this node left under its former name");
    true
}

/// A service and its checks, ready to be stored.
#[derive(Clone, Debug)]
struct Instance {
    service: Service,
    checks: Vec<Check>,
}

/// `new` with the status and output of the check that it replaces: re-registration is not a result.
fn keep_verdict(new: &Check, existing: &Check) -> Check {
    Check { status: existing.status, output: existing.output.clone(), ..new.clone() }
}

#[cfg(test)]
mod tests;
