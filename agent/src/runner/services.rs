//! What an allocation uses of the rest of the node.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use culvert_api::ServiceRegistration;
use culvert_control::{Control, RegisterError, UnknownService};
use culvert_jobspec::{EnvironmentError, NodeContext, TemplateError};
use culvert_types::HealthStatus;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::dialer::{service_prefix, sidecar_id};
use super::records::{RecordError, Records};
use super::registration::RegistrationError;
use crate::policy::PolicyEngine;
use crate::report::chain;
use crate::task::{CgroupError, DirError, ExecutorCommand, StartError, UnknownSignal};
use crate::worker::{NotReady, WorkerHandle};
use crate::workload::{AllocId, Network, NetworkError};

/// Why an allocation, or a part of it, does not come up.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant is one step, and its source says the rest")]
pub enum RunError {
    #[error("the job has no group {0:?}")]
    UnknownGroup(String),
    #[error("driver {0:?} is not supported by culvert yet")]
    Driver(String),
    #[error("allocation directory")]
    Dir(#[from] DirError),
    #[error("network")]
    Network(#[from] NetworkError),
    #[error("cgroups")]
    Cgroup(#[from] CgroupError),
    #[error("kernel programs: {reason}")]
    Kernel { reason: String },
    #[error("environment")]
    Environment(#[from] EnvironmentError),
    #[error("interpolation")]
    Template(#[from] TemplateError),
    #[error("services")]
    Registration(#[from] RegistrationError),
    #[error("the catalog refuses the service: {reason}")]
    Catalog { reason: String, lasting: bool },
    #[error(transparent)]
    Worker(#[from] NotReady),
    #[error(transparent)]
    Task(#[from] StartError),
    #[error("kill_signal")]
    Signal(#[from] UnknownSignal),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("a part of the agent ended in a panic")]
    Aborted(#[source] tokio::task::JoinError),
}

impl RunError {
    /// Would every further attempt fail in the same way, because the job itself is what is wrong?
    #[must_use]
    pub fn lasting(&self) -> bool {
        match self {
            Self::UnknownGroup(_)
            | Self::Driver(_)
            | Self::Environment(_)
            | Self::Template(_)
            | Self::Registration(_)
            | Self::Signal(_) => true,
            Self::Catalog { lasting, .. } => *lasting,
            Self::Task(error) => !error.recoverable(),
            Self::Dir(_)
            | Self::Network(_)
            | Self::Cgroup(_)
            | Self::Kernel { .. }
            | Self::Worker(_)
            | Self::Record(_)
            | Self::Aborted(_) => false,
        }
    }
}

/// The services of the node that allocations are built from.
pub struct NodeServices {
    /// Threads with the rights that allocations need; those of the HTTP server have none.
    pub runtime: Handle,
    /// Namespaces, addresses, ports.
    pub network: Arc<Network>,
    /// Catalog.
    pub control: Arc<Control>,
    /// The worker.
    pub worker: WorkerHandle,
    /// Kernel programs.
    pub policy: Arc<PolicyEngine>,
    /// What is written down.
    pub records: Records,
    /// What `${node.…}` means.
    pub context: NodeContext,
    /// How tasks are started.
    pub executor: ExecutorCommand,
    /// Cancelled when tasks get no more time to end by themselves.
    pub hurry: CancellationToken,
    /// Where this node is reached.
    pub advertise: IpAddr,
    /// The agent's data directory.
    pub data_dir: PathBuf,
    /// Parent of all task cgroups.
    pub cgroup_parent: String,
}

impl NodeServices {
    /// Registers a service; returns the port of its sidecar, if it has one.
    ///
    /// # Errors
    /// [`RunError::Catalog`] with the catalog's text.
    pub(super) async fn register(&self, body: &Value) -> Result<Option<u16>, RunError> {
        let refused = |error: RegisterError| RunError::Catalog {
            // A port, and the disk, may be free again.
            lasting: !matches!(error, RegisterError::NoPortLeft(..) | RegisterError::Update(_)),
            reason: error.to_string(),
        };
        Ok(self.control.register_service(decode(body)?).await.map_err(refused)?.sidecar_port)
    }

    /// Services of an allocation that are in the catalog; each takes its sidecar along.
    pub(super) fn left_in_catalog(&self, id: &AllocId) -> Vec<String> {
        let prefix = service_prefix(id);
        let state = self.control.state();
        let services = state.services_of(&self.context.name).filter(|service| service.id.starts_with(&prefix));
        services.filter(|service| service.proxy.is_none()).map(|service| service.id.clone()).collect()
    }

    /// Health of a service in the catalog: of its own checks, and where it takes part in the mesh also of its sidecar's.
    pub(super) fn health(&self, service_id: &str) -> Option<HealthStatus> {
        let (state, node) = (self.control.state(), &self.context.name);
        state.service(node, service_id)?;
        let sidecar = state.service(node, &sidecar_id(service_id));
        Some(sidecar.map_or_else(|| state.health(node, service_id), |sidecar| state.mesh_health(sidecar)))
    }

    /// Takes a service and its sidecar out of the catalog.
    ///
    /// # Errors
    /// [`RunError::Catalog`] when that cannot be stored.
    pub(super) async fn deregister(&self, service_id: &str) -> Result<(), RunError> {
        match self.control.deregister_service(service_id).await {
            Err(error @ UnknownService::Update(_)) => Err(RunError::Catalog { reason: chain(&error), lasting: false }),
            Err(UnknownService::Unknown(_)) => {
                debug!(service_id, "the service was out of the catalog already");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// The body of a registration as the catalog reads it.
///
/// # Errors
/// [`RunError::Catalog`] with the reader's text.
pub(super) fn decode(body: &Value) -> Result<ServiceRegistration, RunError> {
    let refused = |reason: String| RunError::Catalog { reason, lasting: true };
    ServiceRegistration::decode(body.to_string().as_bytes()).map_err(|error| refused(error.to_string()))
}
