//! The workload network in real namespaces: reachability, masquerade, published ports, sockets made inside.

mod workload_world;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use culvert_agent::workload::{
    AllocId, Network, PortMap, Workload, app_sockets, dial, listen, netns_cookie, open_in_netns,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use workload_world::{ask_from, ask_from_host, in_world, neighbour, run, tell_addresses, try_run};

const ANY: &str = "[::]:9001";

async fn serve(workload: &Workload) {
    let listener = listen(&workload.netns, ANY.parse().expect("an address")).await.expect("listening");
    tell_addresses(listener);
}

fn map(host_port: u16, to: u16) -> PortMap {
    PortMap { host_port, to, addr: None, owner: "web:http".into() }
}

#[test]
fn allocations_reach_each_other_and_the_gateway_over_both_families() {
    in_world("reach", |world| async move {
        let network = Network::open(world.settings()).await.expect("opened");
        let one = network.create(&AllocId::random()).await.expect("created");
        let other = network.create(&AllocId::random()).await.expect("created");
        assert_eq!(one.addr4, Ipv4Addr::new(172, 26, 64, 2));
        assert_eq!(other.addr4, Ipv4Addr::new(172, 26, 64, 3));
        serve(&other).await;
        let said = ask_from(&one.netns, "172.26.64.3:9001").await.expect("reachable");
        assert_eq!(said, "172.26.64.2 172.26.64.3", "no translation between workloads");
        let (from, to) = (one.addr6.expect("IPv6"), other.addr6.expect("IPv6"));
        let said = ask_from(&one.netns, &format!("[{to}]:9001")).await.expect("reachable");
        assert_eq!(said, format!("{from} {to}"));
        assert_eq!(ask_from(&other.netns, "127.0.0.1:9001").await.expect("loopback is up"), "127.0.0.1 127.0.0.1");

        tell_addresses(std::net::TcpListener::bind("[::]:8500").map(nonblocking).expect("bound").into());
        let gateway = format!("[{}]:8500", network.gateway6().expect("IPv6"));
        assert_eq!(ask_from(&one.netns, "172.26.64.1:8500").await.expect("the host"), "172.26.64.2 172.26.64.1");
        ask_from(&one.netns, &gateway).await.expect("the host");
        ask_from_host("172.26.64.3:9001").await.expect("the host reaches workloads");

        assert_ne!(one.netns_cookie, 0);
        assert_ne!(one.netns_cookie, other.netns_cookie);
        assert_eq!(netns_cookie(&one.netns).await.expect("a cookie"), one.netns_cookie);
        let link = run("ip", &["-o", "link", "show", "dev", &one.host_interface]);
        assert!(link.starts_with(&format!("{}: ", one.host_ifindex)) && link.contains("master culvert0"), "{link}");
        let inside = run("ip", &["-n", one.netns.file_name().and_then(|n| n.to_str()).expect("a name"), "link"]);
        assert!(inside.contains(&one.mac.to_string()), "{inside}");
    });
}

fn nonblocking(listener: std::net::TcpListener) -> std::net::TcpListener {
    listener.set_nonblocking(true).expect("non-blocking");
    listener
}

#[test]
fn what_leaves_the_node_carries_the_nodes_address() {
    in_world("masquerade", |world| async move {
        let outside = neighbour("outside", &["10.1.0.1/24", "2001:db8:1::1/64"], &["10.1.0.2/24", "2001:db8:1::2/64"]);
        let network = Network::open(world.settings()).await.expect("opened");
        assert_eq!(network.warnings(), [] as [String; 0]);
        let one = network.create(&AllocId::random()).await.expect("created");
        tell_addresses(listen(&outside, ANY.parse().expect("an address")).await.expect("listening"));
        assert_eq!(ask_from(&one.netns, "10.1.0.2:9001").await.expect("outside"), "10.1.0.1 10.1.0.2");
        let said = ask_from(&one.netns, "[2001:db8:1::2]:9001").await.expect("outside");
        assert_eq!(said, "2001:db8:1::1 2001:db8:1::2");
    });
}

async fn published_everywhere(world: workload_world::World, bridge_filter: &str) {
    for family in ["ip", "ip6"] {
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{family}tables");
        if std::path::Path::new(&path).exists() {
            std::fs::write(path, bridge_filter).expect("bridge packets and the packet filter");
        }
    }
    let outside = neighbour("outside", &["10.1.0.1/24", "2001:db8:1::1/64"], &["10.1.0.2/24", "2001:db8:1::2/64"]);
    let network = Network::open(world.settings()).await.expect("opened");
    let (id, other_id) = (AllocId::random(), AllocId::random());
    let web = network.create(&id).await.expect("created");
    let other = network.create(&other_id).await.expect("created");
    serve(&web).await;
    network.publish(&id, &[map(9002, 9001)]).await.expect("published");

    let (a, b) = ("172.26.64.1 172.26.64.2", "the source is the gateway: the answer must come back through the host");
    let hairpin = "169.254.172.26 172.26.64.2";
    assert_eq!(ask_from_host("127.0.0.1:9002").await.expect("localhost"), a, "{b}");
    assert_eq!(ask_from_host("10.1.0.1:9002").await.expect("own address"), "10.1.0.1 172.26.64.2");
    assert_eq!(ask_from_host("172.26.64.1:9002").await.expect("the gateway's"), "172.26.64.1 172.26.64.2");
    assert_eq!(ask_from(&outside, "10.1.0.1:9002").await.expect("outside"), "10.1.0.2 172.26.64.2");
    assert_eq!(ask_from(&other.netns, "10.1.0.1:9002").await.expect("hairpin"), hairpin);
    assert_eq!(ask_from(&other.netns, "172.26.64.1:9002").await.expect("hairpin"), hairpin);
    assert_eq!(ask_from(&web.netns, "10.1.0.1:9002").await.expect("to itself"), a, "{b}");

    let (web6, gateway6) = (web.addr6.expect("IPv6"), network.gateway6().expect("IPv6"));
    let said = ask_from(&outside, "[2001:db8:1::1]:9002").await.expect("outside, IPv6");
    assert_eq!(said, format!("2001:db8:1::2 {web6}"));
    let hairpin6 = network.hairpin()[1];
    for (client, source) in [(&other, hairpin6), (&web, gateway6.into())] {
        let said = ask_from(&client.netns, "[2001:db8:1::1]:9002").await.expect("hairpin, IPv6");
        assert_eq!(said, format!("{source} {web6}"));
    }
    ask_from_host("[2001:db8:1::1]:9002").await.expect("own address, IPv6");

    network.remove(&id).await.expect("removed");
    for client in ["127.0.0.1:9002", "10.1.0.1:9002"] {
        let error = ask_from_host(client).await.expect_err("nothing is published any more");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_published_port_is_reached_from_everywhere() {
    in_world("published", |world| published_everywhere(world, "0"));
}

#[test]
fn a_published_port_is_reached_where_bridged_packets_pass_the_packet_filter() {
    in_world("publishedbr", |world| published_everywhere(world, "1"));
}

#[test]
fn a_port_is_published_for_udp_and_on_one_address_only() {
    in_world("udp", |world| async move {
        let outside = neighbour("outside", &["10.1.0.1/24", "10.1.0.9/24"], &["10.1.0.2/24"]);
        let network = Network::open(world.settings()).await.expect("opened");
        let id = AllocId::random();
        let web = network.create(&id).await.expect("created");
        serve(&web).await;
        let addr = Some("10.1.0.9".parse().expect("an address"));
        let dns = PortMap { addr, owner: "dns:udp".into(), ..map(5300, 53) };
        let http = PortMap { addr, ..map(9002, 9001) };
        network.publish(&id, &[dns, http]).await.expect("published");
        let server = open_in_netns(&web.netns, || std::net::UdpSocket::bind("0.0.0.0:53")).expect("bound");
        let client = open_in_netns(&outside, || std::net::UdpSocket::bind("0.0.0.0:0")).expect("bound");
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(workload_world::PATIENCE)).expect("a time limit");
        }
        client.send_to(b"ask", "10.1.0.9:5300").expect("sent");
        let mut buffer = [0; 16];
        let (length, from) = server.recv_from(&mut buffer).expect("received");
        assert_eq!((&buffer[..length], from.ip().to_string()), (&b"ask"[..], "10.1.0.2".to_owned()));
        server.send_to(b"answer", from).expect("sent");
        let (length, from) = client.recv_from(&mut buffer).expect("received");
        assert_eq!((&buffer[..length], from.to_string()), (&b"answer"[..], "10.1.0.9:5300".to_owned()));

        assert_eq!(ask_from(&outside, "10.1.0.9:9002").await.expect("published"), "10.1.0.2 172.26.64.2");
        assert!(ask_from(&outside, "10.1.0.1:9002").await.is_err(), "published on the other address only");
        assert!(ask_from_host("127.0.0.1:9002").await.is_err(), "published on the other address only");
    });
}

#[test]
fn only_published_ports_are_reached_from_outside_and_the_host_becomes_no_router() {
    in_world("guard", |world| async move {
        let outside = neighbour("outside", &["10.1.0.1/24"], &["10.1.0.2/24"]);
        let inner = neighbour("inner", &["10.2.0.1/24"], &["10.2.0.2/24"]);
        for (name, device) in [("outside", "10.1.0.1"), ("inner", "10.2.0.1")] {
            run("ip", &["-n", name, "route", "add", "default", "via", device]);
        }
        let network = Network::open(world.settings()).await.expect("opened");
        let web = network.create(&AllocId::random()).await.expect("created");
        serve(&web).await;
        tell_addresses(listen(&inner, ANY.parse().expect("an address")).await.expect("listening"));
        assert!(ask_from(&outside, "172.26.64.2:9001").await.is_err(), "a route to the subnet is no way in");
        assert!(ask_from(&outside, "10.2.0.2:9001").await.is_err(), "the host did not forward before");
        let later = neighbour("later", &["10.3.0.1/24"], &["10.3.0.2/24"]);
        run("ip", &["-n", "later", "route", "add", "default", "via", "10.3.0.1"]);
        assert!(
            ask_from(&later, "10.2.0.2:9001").await.is_err(),
            "an interface that came later is none to pass through"
        );
        run("nft", &["delete", "chain", "inet", "culvert", "forward"]);
        ask_from(&outside, "172.26.64.2:9001").await.expect("the chain is what kept it away");
        for from in [&outside, &later] {
            ask_from(from, "10.2.0.2:9001").await.expect("the chain is what kept it away");
        }
    });
}

#[test]
fn a_host_that_forwarded_before_still_does() {
    in_world("router", |world| async move {
        let outside = neighbour("outside", &["10.1.0.1/24"], &["10.1.0.2/24"]);
        let inner = neighbour("inner", &["10.2.0.1/24"], &["10.2.0.2/24"]);
        for (name, device) in [("outside", "10.1.0.1"), ("inner", "10.2.0.1")] {
            run("ip", &["-n", name, "route", "add", "default", "via", device]);
        }
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("a router");
        let network = Network::open(world.settings()).await.expect("opened");
        tell_addresses(listen(&inner, ANY.parse().expect("an address")).await.expect("listening"));
        ask_from(&outside, "10.2.0.2:9001").await.expect("routed");
        network.close_all().await.expect("closed");
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read").trim(), "1");
    });
}

#[test]
fn a_workload_cannot_reach_what_the_host_binds_to_its_loopback() {
    in_world("loopback", |world| async move {
        let network = Network::open(world.settings()).await.expect("opened");
        let web = network.create(&AllocId::random()).await.expect("created");
        let listener = std::net::TcpListener::bind("127.0.0.1:8500").map(nonblocking).expect("bound");
        tell_addresses(listener.into());
        // A hostile root in the workload sends packets for 127.0.0.1 over the wire (CVE-2020-8558).
        let name = web.netns.file_name().and_then(|name| name.to_str()).expect("a name");
        open_in_netns(&web.netns, || {
            for name in ["all", "eth0"] {
                std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/route_localnet"), "1")?;
            }
            Ok(())
        })
        .expect("set");
        run("ip", &["-n", name, "addr", "del", "127.0.0.1/8", "dev", "lo"]);
        run("ip", &["-n", name, "route", "add", "127.0.0.1/32", "via", "172.26.64.1", "src", "172.26.64.2"]);
        assert!(ask_from(&web.netns, "127.0.0.1:8500").await.is_err());
        run("nft", &["delete", "chain", "inet", "culvert", "loopback"]);
        ask_from(&web.netns, "127.0.0.1:8500").await.expect("the chain is what kept it away");
    });
}

#[test]
fn host_ports_in_use_are_refused_with_their_owner() {
    in_world("conflict", |world| async move {
        let network = Network::open(world.settings()).await.expect("opened");
        let (one, other) = (AllocId::random(), AllocId::random());
        for id in [&one, &other] {
            network.create(id).await.expect("created");
        }
        network.publish(&one, &[map(9002, 9001)]).await.expect("published");
        network.publish(&one, &[map(9002, 9001)]).await.expect("its own port is no obstacle");
        let error = network.publish(&other, &[map(9002, 80)]).await.expect_err("taken");
        assert_eq!(error.to_string(), "Static port 9002 already reserved by web:http");
        let twice = network.publish(&other, &[map(9003, 80), map(9003, 81)]).await.expect_err("twice in one job");
        assert_eq!(twice.to_string(), "Static port 9003 already reserved by web:http");

        let listener = std::net::TcpListener::bind("127.0.0.1:9004").expect("bound");
        let error = network.publish(&other, &[map(9004, 80)]).await.expect_err("taken").to_string();
        let expected = format!("Static port 9004 already reserved by process {} (", std::process::id());
        assert!(error.starts_with(&expected), "{error}");
        assert!(error.ends_with("listening on 127.0.0.1:9004/tcp of this host"), "{error}");
        drop(listener);
        network.publish(&other, &[map(9004, 80)]).await.expect("free again");
        network.remove(&one).await.expect("removed");
        network.publish(&other, &[map(9002, 80)]).await.expect("free again");
    });
}

#[test]
fn sockets_made_inside_work_from_outside_and_the_caller_stays_where_it_is() {
    in_world("sockets", |world| async move {
        let network = Network::open(world.settings()).await.expect("opened");
        let web = network.create(&AllocId::random()).await.expect("created");
        let here = || std::fs::read_link("/proc/thread-self/ns/net").expect("a netns");
        let before = here();
        for (port, address) in [(8080, "127.0.0.1:8080"), (8081, "[::1]:8081"), (21000, "[::]:21000")] {
            let bound =
                tell_addresses(listen(&web.netns, address.parse().expect("an address")).await.expect("listening"));
            assert_eq!(bound.port(), port);
            ask_from(&web.netns, address).await.expect("an unspecified address is this host");
        }
        ask_from(&web.netns, "172.26.64.2:21000").await.expect("dual-stack");
        assert!(ask_from_host("127.0.0.1:8080").await.is_err(), "it listens in the workload's netns alone");
        // The same address on another one: loopback listeners of two netns do not meet.
        let other = network.create(&AllocId::random()).await.expect("created");
        listen(&other.netns, "127.0.0.1:8080".parse().expect("an address")).await.expect("listening");
        // SO_REUSEADDR: a listener can be made again at once, although connections linger in TIME_WAIT.
        let address: SocketAddr = "127.0.0.1:8090".parse().expect("an address");
        for _ in 0..3 {
            let listener = tokio::net::TcpListener::from_std(listen(&web.netns, address).await.expect("free").into());
            let listener = listener.expect("a listener");
            let (client, server) = tokio::join!(dial(&web.netns, address), listener.accept());
            drop(server.expect("accepted"));
            let mut client = client.expect("connected");
            assert_eq!(client.read(&mut [0; 1]).await.expect("closed by the server first"), 0);
        }
        for ipv6 in [false, true] {
            let sockets = app_sockets(&web.netns, ipv6, 32).await.expect("made");
            assert_eq!(sockets.len(), 32);
            let target: SocketAddr =
                if ipv6 { (Ipv6Addr::LOCALHOST, 21000).into() } else { (Ipv4Addr::LOCALHOST, 21000).into() };
            for socket in sockets {
                let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
                let mut stream = socket.connect(target).await.expect("the application");
                stream.write_all(b"x").await.expect("writable");
            }
        }
        assert!(app_sockets(&web.netns, false, 1000).await.is_err(), "a batch is bounded");
        assert_eq!(here(), before);
        let missing = dial(std::path::Path::new("/run/netns/none"), address).await.expect_err("no such netns");
        assert!(missing.to_string().contains("/run/netns/none"), "{missing}");
    });
}

#[test]
fn a_subnet_or_bridge_name_that_the_host_uses_is_refused() {
    in_world("overlap", |world| async move {
        let settings = world.settings();
        run("ip", &["link", "add", "culvert0", "type", "veth", "peer", "name", "other0"]);
        let error = Network::open(settings.clone()).await.err().expect("not a bridge").to_string();
        assert!(error.starts_with("interface culvert0 exists and is not a bridge"), "{error}");
        run("ip", &["link", "del", "culvert0"]);
        run("ip", &["link", "add", "lan0", "type", "veth", "peer", "name", "lan1"]);
        run("ip", &["addr", "add", "172.26.70.1/24", "dev", "lan0"]);
        let error = Network::open(settings.clone()).await.err().expect("overlap").to_string();
        assert_eq!(
            error,
            "workload subnet 172.26.64.0/20 overlaps 172.26.70.1 of interface lan0: the interface needs another address"
        );
        run("ip", &["addr", "del", "172.26.70.1/24", "dev", "lan0"]);
        Network::open(settings.clone()).await.expect("opened");
        run(
            "nft",
            &["add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }"],
        );
        let network = Network::open(settings).await.expect("opened again");
        assert!(network.warnings()[0].starts_with("chain ip filter FORWARD drops forwarded packets by default"));
    });
}

#[test]
fn a_missing_nft_is_named() {
    in_world("nonft", |world| async move {
        let settings = culvert_agent::workload::NetworkSettings { nft: "no-such-nft".into(), ..world.settings() };
        let error = Network::open(settings).await.err().expect("no nft").to_string();
        assert_eq!(error, "no-such-nft not found: install nftables");
        assert!(!try_run("nft", &["list", "table", "inet", "culvert"]).0);
    });
}
