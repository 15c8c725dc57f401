//! `GET /v1/culvert/status`: what this node does and why.

use serde::{Deserialize, Serialize};

use crate::value::Timestamp;

/// The whole answer.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "the words of the configuration")]
pub struct AgentStatus {
    pub version: String,
    pub node: String,
    pub datacenter: String,
    pub trust_domain: String,
    pub encryption: String,
    pub default_policy: String,
    pub ebpf: EbpfStatus,
    pub worker: WorkerStatus,
    pub jobs: usize,
    pub allocations: usize,
}

/// The kernel side.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EbpfStatus {
    /// Are the programs loaded?
    pub active: bool,
    /// Why not.
    pub reason: Option<String>,
    /// Direct routes in force.
    pub routes: usize,
}

/// The data plane.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct WorkerStatus {
    /// Its process, while it runs.
    pub pid: Option<u32>,
    /// Starts after the first.
    pub restarts: u64,
    /// What it serves.
    pub proxies: Vec<ProxyStatus>,
}

/// One proxy of the worker.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ProxyStatus {
    /// Catalog ID of the sidecar.
    #[serde(rename = "ID")]
    pub id: String,
    /// It accepts on every listener.
    pub ready: bool,
    /// Version of the configuration in force.
    pub xds_version: Option<String>,
    /// The resource refused last.
    pub nack: Option<NackStatus>,
    /// End of its certificate.
    pub certificate_not_after: Option<Timestamp>,
    /// How often the worker gave it up unasked; it was served again each time.
    pub failures: u64,
}

/// A refused resource.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NackStatus {
    /// Its name.
    pub resource: String,
    /// Why.
    pub reason: String,
}
