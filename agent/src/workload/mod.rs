//! The network of allocations: a netns each, joined by one bridge, with addresses, masquerade and published ports.

mod alloc_id;
pub mod mounts;
mod settings;
mod types;

pub use alloc_id::{AllocId, AllocIdError, SHORT_ID};
pub use settings::{MAX_INTERFACE_NAME, NetworkSettings, SettingsError, Subnet4};
pub use types::{MacAddress, PortMap, Workload};
