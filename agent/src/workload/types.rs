//! What the network tells about an allocation, and what it is told to publish.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The network of one allocation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Workload {
    /// The netns: `/run/netns/culvert-<alloc8>`.
    pub netns: PathBuf,
    /// Its cookie, by which eBPF programs know it; 0 on kernels before 5.14.
    pub netns_cookie: u64,
    /// Host side of the veth pair: `cv<alloc8>`.
    pub host_interface: String,
    /// Its index in the host's netns.
    pub host_ifindex: u32,
    /// Address of `eth0` inside.
    pub addr4: Ipv4Addr,
    /// IPv6 address of `eth0`; `None` where the host has no IPv6.
    pub addr6: Option<Ipv6Addr>,
    /// Ethernet address of `eth0`.
    pub mac: MacAddress,
}

/// One published port: the host's `host_port`, TCP and UDP, reaches port `to` of the allocation.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PortMap {
    /// Port on the host.
    pub host_port: u16,
    /// Port inside the allocation's netns.
    pub to: u16,
    /// The host's address it is published on; `None`: every local address, 127.0.0.1 included.
    pub addr: Option<IpAddr>,
    /// Who has it, for the error of the next one who wants it: `dashboard:http`.
    pub owner: String,
}
