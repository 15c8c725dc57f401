//! Services and their checks.

use super::Connect;
use crate::{Template, duration};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// One `service` block of a group.
///
/// `${JOB}`, `${TASKGROUP}`, `${TASK}` (the word `group`) and `${BASE}` are already replaced.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Service {
    /// `name`, `<job>-<group>` unless set.
    pub name: Template,
    /// `port`: where the application listens inside the network namespace.
    pub port: Option<PortRef>,
    /// `tags`.
    pub tags: Vec<Template>,
    /// `meta` of the service.
    pub meta: BTreeMap<String, Template>,
    /// `check` blocks; names are unique within the service.
    pub checks: Vec<Check>,
    /// `connect`: the service is part of the mesh.
    pub connect: Option<Connect>,
}

/// `port = "http"` or `port = "9001"`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PortRef {
    /// A `port` block of the group's network.
    Label(String),
    /// A port inside the network namespace; nothing is published.
    Number(u16),
}

/// One `check` block, run from inside the network namespace.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Check {
    /// `name`, `service: "<service>" check` unless set.
    pub name: Template,
    /// `type` and what belongs to it.
    pub kind: CheckKind,
    /// `port`; `None`: the service's.
    pub port: Option<PortRef>,
    /// `interval`, at least 1 s.
    #[serde(with = "duration::text")]
    pub interval: Duration,
    /// `timeout`, at least 1 s.
    #[serde(with = "duration::text")]
    pub timeout: Duration,
    /// `initial_status`, critical unless set.
    pub initial_status: CheckStatus,
    /// Successes in a row before the check passes; 0 and 1 mean the first one.
    pub success_before_passing: u32,
    /// Failures in a row before the check is critical; 0 and 1 mean the first one.
    pub failures_before_critical: u32,
    /// Failures in a row before the check warns; 0: as `failures_before_critical`, so it never warns first.
    pub failures_before_warning: u32,
}

/// `type` of a check. Nomad's `grpc` and `script` are refused by name.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckKind {
    /// An HTTP request; 2xx passes, 429 warns, everything else is critical.
    Http(HttpCheck),
    /// A TCP connection that opens.
    Tcp,
}

/// What an HTTP check sends.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct HttpCheck {
    /// Starts with `/`; may hold a query.
    pub path: Template,
    /// `method`, GET unless set.
    pub method: String,
    /// `header`: name → values.
    pub headers: BTreeMap<String, Vec<Template>>,
    /// `body`, empty unless set.
    pub body: Template,
}

/// A check's state.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    /// The service gets traffic.
    Passing,
    /// The service gets traffic, and someone should look.
    Warning,
    /// The service gets none.
    #[default]
    Critical,
}

impl CheckStatus {
    /// As Consul writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passing => "passing",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}
