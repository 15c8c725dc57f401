//! Two network namespaces joined by veth and a bridge, with nothing of culvert in the way: no kernel program, no packet
//! filter. The same shape as the workloads of a node.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use culvert_tests::World;

use super::{APPLICATION, Running};
use crate::place::Place;

/// The namespace with the bridge.
const HOST: &str = "plain-host";
/// Who calls, and who is called, with their addresses (RFC 2544 sets 198.18.0.0/15 aside for benchmarks).
pub(super) const CLIENT: (&str, Ipv4Addr) = ("plain-client", Ipv4Addr::new(198, 18, 0, 2));
pub(super) const SERVER: (&str, Ipv4Addr) = ("plain-server", Ipv4Addr::new(198, 18, 0, 3));
/// Where the application listens for calls without a proxy.
const DIRECT_PORT: u16 = 9000;

/// The place inside a namespace of this topology.
pub(super) fn inside(name: &str) -> Place {
    Place { netns: Some(PathBuf::from(format!("/run/netns/{name}"))), cgroup: None }
}

/// What plain TCP connects to.
pub(super) fn target() -> SocketAddr {
    (SERVER.1, DIRECT_PORT).into()
}

/// Makes the namespaces and starts the application, on its loopback address for a proxy beside it, and on the bridge.
pub(super) fn start(world: &World) -> anyhow::Result<Running> {
    world.run("ip", &["netns", "add", HOST]);
    in_netns(world, HOST, &["link", "add", "br0", "type", "bridge"]);
    in_netns(world, HOST, &["link", "set", "br0", "up"]);
    for (name, address) in [CLIENT, SERVER] {
        world.run("ip", &["netns", "add", name]);
        let peer = ["link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", name, "netns", HOST];
        world.run("ip", &peer);
        in_netns(world, HOST, &["link", "set", name, "master", "br0", "up"]);
        in_netns(world, name, &["link", "set", "lo", "up"]);
        in_netns(world, name, &["address", "add", &format!("{address}/24"), "dev", "eth0"]);
        in_netns(world, name, &["link", "set", "eth0", "up"]);
    }
    let listen = [APPLICATION, target()].map(|address| address.to_string());
    Running::own(&inside(SERVER.0), &["serve", &listen[0], &listen[1]])
}

fn in_netns(world: &World, netns: &str, arguments: &[&str]) {
    world.run("ip", &[&["-netns", netns], arguments].concat());
}
