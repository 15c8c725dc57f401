//! Jobs: culvert's own endpoints below `/v1/culvert`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::value::Timestamp;

/// Body of `PUT /v1/culvert/jobs` and `POST /v1/culvert/jobs/plan`: the text of a job file. The agent parses it itself.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct JobSubmission {
    /// The text.
    pub source: String,
    /// Name of the file, for messages.
    pub file: String,
    /// Values given with `-var`.
    pub variables: BTreeMap<String, String>,
}

/// Answer to a submission.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct JobSubmitted {
    /// The job.
    #[serde(rename = "ID")]
    pub id: String,
    /// Its version.
    pub version: u64,
    /// Allocations made.
    pub created: Vec<String>,
    /// Allocations stopped.
    pub stopped: Vec<String>,
    /// Allocations left alone.
    pub kept: Vec<String>,
}

/// Answer to a plan.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct JobPlan {
    /// The difference, ready to print.
    pub diff: String,
    /// Would a submission change anything?
    pub changes: bool,
}

/// Answer to a stop.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct JobStopped {
    /// Allocations stopped; everything of them is gone.
    pub stopped: Vec<String>,
}

/// Element of `GET /v1/culvert/jobs`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Nomad's names")]
pub struct JobListEntry {
    #[serde(rename = "ID")]
    pub id: String,
    #[serde(rename = "Type")]
    pub job_type: String,
    pub priority: u8,
    pub status: String,
    pub submitted: Timestamp,
}

/// `GET /v1/culvert/job/:id`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Nomad's names; Status is pending, running or dead")]
pub struct JobStatus {
    #[serde(rename = "ID")]
    pub id: String,
    pub version: u64,
    pub status: String,
    pub stopped: bool,
    pub submitted: Timestamp,
    pub datacenters: Vec<String>,
    pub allocations: Vec<AllocationStatus>,
}

/// An allocation.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Nomad's names; Status is pending, running, complete or failed")]
pub struct AllocationStatus {
    #[serde(rename = "ID")]
    pub id: String,
    pub group: String,
    pub index: u32,
    pub version: u64,
    pub status: String,
    /// It was told to stop and is there until everything of it is gone.
    pub stopping: bool,
    /// Why it does not get on.
    pub error: Option<String>,
    pub created: Timestamp,
    pub addresses: Vec<String>,
    /// Host port and port inside, by label.
    pub ports: BTreeMap<String, (u16, u16)>,
    pub services: Vec<ServiceStatus>,
    pub tasks: Vec<TaskStatus>,
}

/// A service of an allocation.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "named as in the catalog")]
pub struct ServiceStatus {
    #[serde(rename = "ServiceID")]
    pub service_id: String,
    pub service: String,
    #[serde(rename = "SidecarID")]
    pub sidecar_id: Option<String>,
    pub sidecar_port: Option<u16>,
    /// SPIFFE ID.
    pub identity: Option<String>,
    /// `passing`, `warning` or `critical`.
    pub health: Option<String>,
}

/// A task of an allocation.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Nomad's names; State is pending, running or dead")]
pub struct TaskStatus {
    pub name: String,
    pub state: String,
    pub failed: bool,
    pub restarts: u32,
    pub pid: Option<u32>,
    pub exit_code: Option<i32>,
    pub events: Vec<TaskEvent>,
}

/// Something that happened to a task.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Nomad's names")]
pub struct TaskEvent {
    pub at: Timestamp,
    #[serde(rename = "Type")]
    pub kind: String,
    pub message: String,
}
