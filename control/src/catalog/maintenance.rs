//! Maintenance: a critical check that an operator puts on a service or the node.

use std::time::Duration;

use culvert_types::HealthStatus;

use super::{Catalog, UnknownService};
use crate::state::rows::{Check, CheckDefinition, Probe};
use crate::state::{UpdateError, row_key};
use crate::store::Table;

/// ID of the node's maintenance check.
const NODE: &str = "_node_maintenance";
/// Start of the ID of a service's.
const SERVICE: &str = "_service_maintenance:";

/// Is it one? Registrations do not remove it.
pub(super) fn is_maintenance(check: &Check) -> bool {
    check.id == NODE || check.id.starts_with(SERVICE)
}

impl Catalog {
    /// Puts a service into maintenance, or ends it.
    ///
    /// # Errors
    /// [`UnknownService`].
    pub(crate) async fn service_maintenance(&self, id: &str, enable: bool, reason: &str) -> Result<(), UnknownService> {
        self.ledger
            .update(|state, plan| {
                let service = state.service(&self.place.node, id);
                let service = service.ok_or_else(|| UnknownService::Unknown(id.to_owned()))?;
                let default = "Maintenance mode is enabled for this service, but no reason was provided. \
                    This is a default message.";
                let mut check = self.check(format!("{SERVICE}{id}"), "Service Maintenance Mode", reason, default);
                check.service_id.clone_from(&service.id);
                check.service_name.clone_from(&service.name);
                check.service_tags.clone_from(&service.tags);
                let key = row_key(&self.place.node, &check.id);
                if enable {
                    plan.put(Table::Checks, key, &check)
                } else {
                    plan.delete(Table::Checks, key)
                }
                Ok(())
            })
            .await
    }

    /// Puts the node into maintenance, or ends it.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub(crate) async fn node_maintenance(&self, enable: bool, reason: &str) -> Result<(), UpdateError> {
        let default = "Maintenance mode is enabled for this node, but no reason was provided. \
            This is a default message.";
        let check = self.check(NODE.to_owned(), "Node Maintenance Mode", reason, default);
        let key = row_key(&self.place.node, NODE);
        self.ledger
            .update(|_, plan| {
                if enable {
                    plan.put(Table::Checks, key.clone(), &check);
                } else {
                    plan.delete(Table::Checks, key.clone());
                }
                Ok(())
            })
            .await
    }

    fn check(&self, id: String, name: &str, reason: &str, default: &str) -> Check {
        Check {
            node: self.place.node.clone(),
            id,
            name: name.to_owned(),
            notes: (if reason.is_empty() { default } else { reason }).to_owned(),
            service_id: String::new(),
            service_name: String::new(),
            service_tags: Vec::new(),
            status: HealthStatus::Critical,
            output: String::new(),
            definition: fixed(),
        }
    }
}

/// The definition of a check that nobody runs.
pub(super) fn fixed() -> CheckDefinition {
    CheckDefinition {
        probe: Probe::Fixed,
        interval: Duration::ZERO,
        timeout: Duration::ZERO,
        success_before_passing: 0,
        failures_before_warning: 0,
        failures_before_critical: 0,
        output_max_size: super::check::OUTPUT_MAX_SIZE,
        deregister_critical_service_after: Duration::ZERO,
    }
}
