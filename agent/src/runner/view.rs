//! What is known of an allocation, for whoever asks.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::records::AllocationRecord;
use super::registration::Registration;
use super::tasks::TaskView;

/// Where an allocation stands, in Nomad's words.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum AllocationStatus {
    /// Being set up.
    #[default]
    Pending,
    /// Its tasks run.
    Running,
    /// It was stopped, everything of it is gone.
    Complete,
    /// A task failed for good.
    Failed,
}

impl AllocationStatus {
    /// Nomad's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Failed => "failed",
        }
    }
}

/// A registered service of an allocation.
#[derive(Clone, Debug)]
pub struct ServiceView {
    /// Catalog ID.
    pub service_id: String,
    /// Its name.
    pub service: String,
    /// Catalog ID of its sidecar.
    pub sidecar_id: Option<String>,
    /// Port of the sidecar's inbound listener.
    pub sidecar_port: Option<u16>,
}

impl ServiceView {
    pub(super) fn planned(registration: &Registration) -> Self {
        Self {
            service_id: registration.service_id.clone(),
            service: registration.service.clone(),
            sidecar_id: registration.sidecar_id.clone(),
            sidecar_port: None,
        }
    }
}

/// What is known of an allocation.
#[derive(Clone, Debug)]
pub struct AllocationView {
    /// As written down.
    pub record: AllocationRecord,
    /// Where it stands.
    pub status: AllocationStatus,
    /// Why it does not get on.
    pub error: Option<String>,
    /// Its addresses on the bridge.
    pub addresses: Vec<IpAddr>,
    /// Its services.
    pub services: Vec<ServiceView>,
    /// Its tasks by name.
    pub tasks: BTreeMap<String, TaskView>,
}
