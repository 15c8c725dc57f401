//! Alias checks: the health of another service instance, and of the node.

use std::sync::Arc;

use culvert_types::HealthStatus;

use super::probe::Outcome;
use crate::state::rows::{Check, Probe};
use crate::state::{State, Stored};

/// Alias checks of `node` whose verdict is not what the checks they follow say now.
pub(super) fn changed(state: &State, node: &str) -> Vec<(Arc<Stored<Check>>, Outcome)> {
    let mut changed = Vec::new();
    for check in state.checks_on(node) {
        let Probe::Alias { service } = &check.definition.probe else { continue };
        let outcome = follow(state, check, service);
        if outcome.status != check.status || check.output.is_empty() {
            changed.push((Arc::clone(check), outcome));
        }
    }
    changed
}

/// The worst of the followed checks.
fn follow(state: &State, alias: &Check, service: &str) -> Outcome {
    if !service.is_empty() && state.service(&alias.node, service).is_none() {
        let output = format!("Service {service} could not be found on node {}", alias.node);
        return Outcome { status: HealthStatus::Critical, output };
    }
    let node_checks = state.checks_of(&alias.node, "");
    let service_checks = (!service.is_empty()).then(|| state.checks_of(&alias.node, service));
    let followed = node_checks.chain(service_checks.into_iter().flatten()).filter(|check| !follows(check, alias));
    let worst = followed.reduce(|worst, check| if check.status > worst.status { check } else { worst });
    match worst {
        None => Outcome { status: HealthStatus::Passing, output: "No checks found.".to_owned() },
        Some(check) if check.status == HealthStatus::Passing => {
            Outcome { status: HealthStatus::Passing, output: "All checks passing.".to_owned() }
        }
        Some(check) => {
            let output = format!("Aliased check {:?} failing: {}", check.name, check.output);
            Outcome { status: check.status, output }
        }
    }
}

/// Does `check` follow the service of `alias`, or is it `alias` itself? Two checks that follow each other would hold each
/// other critical for ever.
fn follows(check: &Check, alias: &Check) -> bool {
    matches!(&check.definition.probe, Probe::Alias { service } if *service == alias.service_id) || check.id == alias.id
}
