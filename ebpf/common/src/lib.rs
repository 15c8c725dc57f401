//! What the kernel programs and the agent share: keys and values of the kernel tables, events, and the pure decisions.
//!
//! Every type that crosses the border is `#[repr(C)]`, made of integers only, without padding, with its size asserted:
//! any bit pattern is valid, and a hash over the bytes of a key is a hash over its fields. Addresses are 16 bytes in
//! network order, IPv4 as v4-mapped (RFC 4291 §2.5.5.2); ports are in host order. Times are nanoseconds of the boot
//! clock (`bpf_ktime_get_boot_ns`, `CLOCK_BOOTTIME`).
//!
//! The decisions that the programs take are functions of this crate, so that they are tested on the host.
//! This crate leaves out everything that touches a packet, a socket or a map.

#![cfg_attr(not(test), no_std)]

pub mod account;
pub mod address;
pub mod admit;
pub mod event;
pub mod tables;

pub use account::{ByteCounters, payload_bytes};
pub use address::Address;
pub use admit::{Admission, Arrival, Source, admit};
pub use event::{Event, EventKind};
pub use tables::*;

/// Layout of the maps and of their meaning. Raise it whenever a key, a value, a map type or the sense of a field changes:
/// objects pinned under another layout are never reused.
pub const LAYOUT: u32 = 2;

/// Names of the maps, as in the object and as pinned; at most 15 bytes, the kernel's limit.
pub mod map {
    /// [`crate::UpstreamKey`] → [`crate::Upstream`].
    pub const UPSTREAM: &str = "UPSTREAM";
    /// [`crate::FlowKey`] → [`crate::Auth`].
    pub const AUTH: &str = "AUTH";
    /// [`crate::ListenerKey`] → listening socket of an application.
    pub const LISTENERS: &str = "LISTENERS";
    /// [`crate::ListenerKey`] → listening socket of the worker.
    pub const STEERED: &str = "STEERED";
    /// Interface index of the host's end of a veth → [`crate::Workload`].
    pub const WORKLOAD_IF: &str = "WORKLOAD_IF";
    /// Network namespace cookie → [`crate::Workload`].
    pub const WORKLOAD_NETNS: &str = "WORKLOAD_NETNS";
    /// [`crate::Address`] → [`crate::Workload`].
    pub const WORKLOAD_ADDR: &str = "WORKLOAD_ADDR";
    /// [`crate::PortKey`] → [`crate::PortRule`].
    pub const PORTS: &str = "PORTS";
    /// Socket → [`crate::Connection`].
    pub const CONNECTIONS: &str = "CONNECTIONS";
    /// Workload → [`crate::Quota`].
    pub const QUOTA: &str = "QUOTA";
    /// Index 0 → [`crate::Settings`].
    pub const SETTINGS: &str = "SETTINGS";
    /// Ring buffer of [`crate::Event`].
    pub const EVENTS: &str = "EVENTS";
    /// Index 0 → how many events found the ring full, per CPU.
    pub const LOST: &str = "LOST";

    /// All of them.
    pub const ALL: [&str; 13] = [
        UPSTREAM,
        AUTH,
        LISTENERS,
        STEERED,
        WORKLOAD_IF,
        WORKLOAD_NETNS,
        WORKLOAD_ADDR,
        PORTS,
        CONNECTIONS,
        QUOTA,
        SETTINGS,
        EVENTS,
        LOST,
    ];
}
