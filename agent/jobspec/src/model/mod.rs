//! The shape of a checked job. Defaults are filled in; ranges, labels and names hold (see `validate`).
//!
//! Everything here serialises to JSON and back without loss, so that an agent can keep a job across restarts.

mod connect;
mod job;
mod service;
mod task;

pub use connect::{Connect, Proxy, SidecarService, Upstream};
pub use job::{Group, Job, JobType, Network, NetworkMode, Origins, Port};
pub use service::{Check, CheckKind, CheckStatus, HttpCheck, PortRef, Service};
pub use task::{Command, Driver, Logs, Resources, RestartMode, RestartPolicy, Task, UnknownTask};
