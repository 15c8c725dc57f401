//! The network of allocations: a netns each, joined by one bridge, with addresses, masquerade and published ports.
//!
//! ```text
//!   netns culvert-<alloc8>            host
//!   eth0 172.26.64.5 ── veth ── cv<alloc8> ─┐
//!   eth0 172.26.64.6 ── veth ── cv<alloc8> ─┴─ culvert0 172.26.64.1, <ula>::1 ── masquerade ── outside
//! ```
//! * [`Network`] makes and removes all of it by name; [`Network::reconcile`] removes what a crash left.
//! * [`listen`], [`app_sockets`], [`dial`], [`open_in_netns`] make sockets inside a workload's netns for use outside of it.
//!
//! Limits: IPv6 reaches the outside only where the host may become an IPv6 router (not when it learned its default route
//! from one), and published ports are not reachable at `[::1]`, because the kernel has no `route_localnet` for IPv6: use
//! 127.0.0.1. A chain of another program that drops forwarded packets is reported, not overruled.
//!
//! Left out: who may talk to whom. Between workloads of one node packets flow freely here; the eBPF programs on the veths
//! guard the ports of mesh services, or without them [`Network::guard`].

mod alloc_id;
mod firewall;
mod guard;
mod host_ports;
pub mod mounts;
mod netlink;
mod netns;
mod network;
mod node;
mod open;
mod reconcile;
mod settings;
mod sockets;
mod state;
mod sysctl;
mod types;

pub use alloc_id::{AllocId, AllocIdError, SHORT_ID};
pub use firewall::FirewallError;
pub(crate) use host_ports::is_free;
pub use netns::{is_netns, netns_cookie, open_in_netns, run_in_netns};
pub use network::{Network, NetworkError};
pub use node::{NodeFile, NodeFileError};
pub use settings::{MAX_INTERFACE_NAME, NetworkSettings, SettingsError, Subnet4};
pub use sockets::{BACKLOG, MAX_APP_SOCKETS, app_sockets, dial, listen};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use state::Content as NetworkContent;
pub use state::StateError;
pub use sysctl::SysctlError;
pub use types::{MacAddress, PortMap, Workload};
