//! Published ports under the kernel's guard: the network and the kernel programs together, as on a node.

mod workload_world;

use std::io;
use std::net::UdpSocket;
use std::time::Duration;

use culvert_agent::datapath::{Datapath, DatapathConfig, PortKind, WorkloadLinks, unified_root};
use culvert_agent::workload::{AllocId, Network, PortMap, Workload, listen, open_in_netns};
use workload_world::{World, ask_from, ask_from_host, in_world, neighbour, tell_addresses};

/// Where the application of the mesh listens.
const MESH: u16 = 9001;
/// Where one outside the mesh does.
const PLAIN: u16 = 9003;

fn links(id: u32, workload: &Workload) -> WorkloadLinks {
    WorkloadLinks {
        id,
        netns: workload.netns.clone(),
        host_ifindex: workload.host_ifindex,
        addr4: workload.addr4,
        addr6: workload.addr6,
        mac: workload.mac.0,
    }
}

fn load(world: &World, network: &Network) -> Datapath {
    let cgroup = unified_root().expect("cgroup2").join(&world.cgroup_parent);
    let config = DatapathConfig { hairpin: network.hairpin(), ..DatapathConfig::new(world.dir.join("bpf"), cgroup) };
    Datapath::load(&config).expect("this kernel has all that the guard needs").0
}

/// A datagram from `client` to `address`: does `server` get it?
fn datagram_arrives(client: &UdpSocket, server: &UdpSocket, address: &str) -> bool {
    client.send_to(b"ask", address).expect("sent");
    server.recv_from(&mut [0; 8]).is_ok()
}

#[test]
fn no_workload_reaches_a_mesh_service_through_its_published_port() {
    in_world("meshport", |world| async move {
        let outside = neighbour("outside", &["10.1.0.1/24", "2001:db8:1::1/64"], &["10.1.0.2/24", "2001:db8:1::2/64"]);
        let network = Network::open(world.settings()).await.expect("opened");
        let id = AllocId::random();
        let web = network.create(&id).await.expect("created");
        let other = network.create(&AllocId::random()).await.expect("created");
        let mut datapath = load(&world, &network);
        datapath.attach(&links(1, &web)).expect("attached");
        datapath.attach(&links(2, &other)).expect("attached");
        datapath.set_ports(1, &[(MESH, PortKind::Published)]).expect("guarded");
        for port in [MESH, PLAIN] {
            let listener = listen(&web.netns, ([0_u16; 8], port).into()).await.expect("listening");
            tell_addresses(listener);
        }
        let map = |host_port, to| PortMap { host_port, to, addr: None, owner: "web:http".into() };
        network.publish(&id, &[map(9002, MESH), map(9004, PLAIN)]).await.expect("published");

        for node in ["10.1.0.1", "172.26.64.1", "[2001:db8:1::1]"] {
            let refused = ask_from(&other.netns, &format!("{node}:9002")).await.expect_err("a workload is no outsider");
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{node}");
            ask_from(&other.netns, &format!("{node}:9004")).await.expect("a port outside the mesh");
            ask_from(&web.netns, &format!("{node}:9002")).await.expect("its own");
        }
        ask_from(&outside, "10.1.0.1:9002").await.expect("that is what publishing is for");
        ask_from(&outside, "[2001:db8:1::1]:9002").await.expect("that is what publishing is for");
        let gateway6 = network.gateway6().expect("IPv6");
        for node in ["127.0.0.1", "10.1.0.1", "172.26.64.1", "[2001:db8:1::1]", &format!("[{gateway6}]")] {
            ask_from_host(&format!("{node}:9002")).await.expect("the host is no workload");
        }

        for (any, node) in [("0.0.0.0:0", "10.1.0.1"), ("[::]:0", "[2001:db8:1::1]")] {
            let server = open_in_netns(&web.netns, || UdpSocket::bind(("::", MESH))).expect("bound");
            let plain = open_in_netns(&web.netns, || UdpSocket::bind(("::", PLAIN))).expect("bound");
            let client = open_in_netns(&other.netns, || UdpSocket::bind(any)).expect("bound");
            let stranger = open_in_netns(&outside, || UdpSocket::bind(any)).expect("bound");
            let (mesh_port, plain_port) = (format!("{node}:9002"), format!("{node}:9004"));
            for socket in [&server, &plain] {
                socket.set_read_timeout(Some(workload_world::PATIENCE)).expect("a time limit");
            }
            assert!(datagram_arrives(&client, &plain, &plain_port), "{node}");
            assert!(datagram_arrives(&stranger, &server, &mesh_port), "{node}");
            server.set_read_timeout(Some(Duration::from_millis(300))).expect("a time limit");
            assert!(!datagram_arrives(&client, &server, &mesh_port), "{node}");
        }
        datapath.remove_all().expect("removed");
    });
}
