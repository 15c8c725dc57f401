//! The guard of application ports on a node without eBPF.

mod workload_world;

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::Duration;

use culvert_agent::workload::{AllocId, Network, PortMap, listen, open_in_netns};
use workload_world::{ask_from, ask_from_host, in_world, neighbour, tell_addresses};

/// A mesh service's port, one that is published, and one outside the mesh.
const PORTS: [u16; 3] = [9001, 9002, 9003];

#[test]
fn without_kernel_programs_the_packet_filter_guards_application_ports() {
    in_world("nftguard", |world| async move {
        let outside = neighbour("outside", &["10.1.0.1/24", "2001:db8:1::1/64"], &["10.1.0.2/24", "2001:db8:1::2/64"]);
        let network = Network::open(world.settings()).await.expect("opened");
        let id = AllocId::random();
        let web = network.create(&id).await.expect("created");
        let other = network.create(&AllocId::random()).await.expect("created");
        for port in PORTS {
            tell_addresses(listen(&web.netns, ([0_u16; 8], port).into()).await.expect("listening"));
        }
        let map = |port: u16| PortMap { host_port: port, to: port, addr: None, owner: "web:http".into() };
        network.publish(&id, &[map(9002), map(9003)]).await.expect("published");
        network.guard(&web, &PORTS[..2], &PORTS[1..]).await.expect("guarded");

        let web6 = web.addr6.expect("IPv6");
        for own in [web.addr4.to_string(), format!("[{web6}]")] {
            for port in PORTS {
                ask_from(&web.netns, &format!("{own}:{port}")).await.expect("its own");
            }
            for port in &PORTS[..2] {
                let refused = ask_from(&other.netns, &format!("{own}:{port}")).await.expect_err("another workload");
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{own}:{port}");
            }
            ask_from(&other.netns, &format!("{own}:9003")).await.expect("outside the mesh");
            assert!(ask_from_host(&format!("{own}:9001")).await.is_err(), "the host is no caller of the mesh");
            ask_from_host(&format!("{own}:9002")).await.expect("published");
        }
        for node in ["10.1.0.1", "[2001:db8:1::1]"] {
            ask_from(&outside, &format!("{node}:9002")).await.expect("published");
            ask_from(&web.netns, &format!("{node}:9002")).await.expect("its own");
            ask_from(&other.netns, &format!("{node}:9003")).await.expect("outside the mesh");
            ask_from(&other.netns, &format!("{node}:9002")).await.expect_err("a workload is no outsider");
        }
        let server = open_in_netns(&web.netns, || UdpSocket::bind("[::]:9001")).expect("bound");
        server.set_read_timeout(Some(Duration::from_millis(300))).expect("a limit");
        for (any, to) in [("0.0.0.0:0", web.addr4.into()), ("[::]:0", std::net::IpAddr::V6(web6))] {
            let client = open_in_netns(&other.netns, || UdpSocket::bind(any)).expect("bound");
            client.send_to(b"x", (to, 9001)).expect("sent");
            assert!(server.recv(&mut [0; 8]).is_err(), "a datagram to {to}");
        }
        // A connection of its own from such a port is none of the guard's business.
        tell_addresses(listen(&other.netns, "0.0.0.0:7000".parse().expect("an address")).await.expect("listening"));
        let from = open_in_netns(&other.netns, || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&std::net::SocketAddr::from(([0, 0, 0, 0], 9001)).into())?;
            Ok(socket)
        });
        network.guard(&other, &[9001], &[]).await.expect("guarded");
        let target = std::net::SocketAddr::from((web.addr4, 9003));
        from.expect("bound").connect_timeout(&target.into(), Duration::from_secs(5)).expect("answers come back");

        network.guard(&web, &[], &[]).await.expect("left alone");
        ask_from(&other.netns, &format!("{}:9001", web.addr4)).await.expect("the filter is what kept it away");
    });
}
