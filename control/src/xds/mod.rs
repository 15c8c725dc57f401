//! The xDS server: what each proxy of this node needs, pushed to it the moment it changes.
//!
//! [`snapshot`] takes from one state what concerns one proxy, [`render`] turns that into Envoy's resources with Consul's names,
//! [`session`] is the delta protocol of one stream, [`XdsServer`] the gRPC around it. Both culvert's worker and Envoy are clients.
//! A proxy gets its own configuration and no other; who is not registered here gets none.

mod health;
mod peer;
pub mod render;
mod server;
pub mod session;
pub mod snapshot;
mod status;
mod stream;

pub use self::peer::XdsPeer;
pub use self::server::{XdsConfig, XdsLimits, XdsServer};
pub(crate) use self::snapshot::listen_addresses;
pub use self::status::{ProxyStatus, Status};
