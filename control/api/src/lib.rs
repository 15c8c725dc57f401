//! The wire contract of culvert's control plane: JSON bodies in Consul's exact form, culvert's own endpoints, and a client.
//!
//! Owns what crosses HTTP and nothing else: no server code, no storage, no policy. Bodies come in through [`decode`], which
//! knows Go's rules (keys in any case, snake_case aliases, `null` as the zero value, unknown keys refused); they go out
//! through serde in Go's field order with Consul's `omitempty` rules. Conversions to `culvert-types` stand beside the bodies.
//!
//! Sources: Consul's HTTP API documentation and recorded traffic of a real system.

#![forbid(unsafe_code)]

mod agent;
mod catalog;
mod check;
pub mod client;
mod config_entry;
mod connect;
mod decode;
mod error;
mod event;
mod intention;
mod job;
mod proxy;
mod service;
mod status;
mod value;

pub use agent::{AgentConfig, AgentSelf, Member, VersionInfo, XdsPorts, XdsSelf};
pub use catalog::{CatalogNode, CatalogService, Node, ServiceEntry};
pub use check::{AgentHealth, CheckDefinition, CheckUpdate, HealthCheck, HealthCheckDefinition};
pub use config_entry::{ServiceIntentions, SourceIntention};
pub use connect::{AuthorizeRequest, AuthorizeResponse, CaConfiguration, CaRoot, CaRoots, LeafCert};
pub use decode::{DecodeError, decode, decode_known, decode_value};
pub use error::{ApiError, Unsupported};
pub use event::{EventRecord, EventRecordError};
pub use intention::{Intention, IntentionCheck, IntentionConversionError, IntentionCreated};
pub use job::{
    AllocationStatus, JobListEntry, JobPlan, JobStatus, JobStopped, JobSubmission, JobSubmitted, ServiceStatus,
    TaskEvent, TaskStatus,
};
pub use proxy::{Connect, Expose, ExposePath, MeshGateway, Proxy, ProxyConfigError, TransparentProxy, Upstream};
pub use service::{AgentService, ServiceAddress, ServiceRegistration, Weights};
pub use status::{AgentStatus, EbpfStatus, NackStatus, ProxyStatus, WorkerStatus};
pub use value::{GoDuration, Secret, Timestamp};
