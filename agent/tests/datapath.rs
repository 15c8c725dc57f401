//! The direct path in real network namespaces, with real programs: who reaches whom, and by which way of connecting.

mod common;

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, SystemTime};

use common::{
    APP, PATIENCE, Pair, TestWorkload, UPSTREAM, World, echo, eventually, greeting, table, upstream, upstream4,
    upstream6,
};
use culvert_agent::datapath::{KernelEvent, PortKind};
use culvert_ebpf_common::{FAMILY_V4, ListenerKey, PortKey, PortRule, map};
use nix::sys::socket::{MsgFlags, SockaddrIn, sendto};
use socket2::{Domain, Socket, Type};

/// Connects from `workload` with a socket that `prepare` has changed.
fn connect_with(
    workload: &TestWorkload,
    domain: Domain,
    to: SocketAddr,
    prepare: impl FnOnce(&Socket) -> io::Result<()> + Send,
) -> io::Result<TcpStream> {
    workload.run(|| {
        let socket = Socket::new(domain, Type::STREAM, None)?;
        prepare(&socket)?;
        socket.connect(&to.into())?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket.into())
    })
}

#[test]
fn an_authorised_connection_reaches_an_application_on_loopback() {
    let Some(mut pair) = Pair::new("authorised") else { return };
    let server = pair.b.serve("127.0.0.1:9001", "b");
    let mut stream = pair.a.connect(upstream4()).expect("the direct path");
    assert_eq!(greeting(&mut stream), "b");
    echo(&mut stream, b"hello").expect("an echo");
    assert_eq!(stream.peer_addr().expect("a peer"), upstream4(), "the application sees what it asked for");
    let (peer, own) = server.peers()[0];
    assert_eq!((peer.ip(), own), (pair.a.addr4.into(), (pair.b.addr4, APP).into()));

    let opened = pair.events.expect("open", |event| matches!(event, KernelEvent::Open(_)));
    let KernelEvent::Open(opened) = opened else { unreachable!("just matched") };
    assert_eq!((opened.source, opened.destination, opened.upstream_port), (pair.a.id, pair.b.id, UPSTREAM));
    assert_eq!(opened.flow.destination, SocketAddr::from((pair.b.addr4, APP)));
    drop(stream);
    let closed = pair.events.expect("close", |event| matches!(event, KernelEvent::Close { .. }));
    let KernelEvent::Close { connection, bytes_to_destination, bytes_to_source, .. } = closed else {
        unreachable!("just matched")
    };
    assert_eq!(connection.cookie, opened.cookie);
    assert_eq!((bytes_to_destination, bytes_to_source), (5, 6));
}

#[test]
fn an_unauthorised_connection_is_refused() {
    let Some(mut pair) = Pair::new("unauthorised") else { return };
    let everywhere = pair.b.serve("[::]:9001", "b");
    for destination in [SocketAddr::from((pair.b.addr4, APP)), SocketAddr::from((pair.b.addr6, APP))] {
        let refused = pair.a.connect(destination).expect_err("a caller without leave");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{destination}");
        let refused = TcpStream::connect(destination).expect_err("the host has no leave either");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{destination}");
    }
    pair.events.expect("refused", |event| {
        matches!(event, KernelEvent::Refused(packet)
            if packet.source == Some(pair.a.id) && packet.destination == Some(pair.b.id) && packet.flow.destination.port() == APP)
    });
    assert_eq!(everywhere.accepted(), 0);
    let mut own = pair.b.connect((pair.b.addr4, APP)).expect("a workload reaches itself");
    assert_eq!(greeting(&mut own), "b");
}

#[test]
fn a_link_local_address_is_no_way_around() {
    let Some(pair) = Pair::new("linklocal") else { return };
    let server = pair.b.serve("[::]:9001", "b");
    let link_local: Ipv6Addr = "fe80::ff:fe00:7702".parse().expect("made of the MAC address");
    let scope = pair.a.run(|| nix::net::if_::if_nametoindex("eth0").expect("an interface"));
    let to = std::net::SocketAddrV6::new(link_local, APP, 0, scope).into();
    let listed = common::output("ip", &["-n", &pair.b.netns_name, "-6", "addr", "show", "dev", "eth0"]);
    assert!(listed.contains(&link_local.to_string()), "{listed}");
    let attempt = pair.a.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)));
    assert!(attempt.is_err());
    assert_eq!(server.accepted(), 0);
}

#[test]
fn ipv6_goes_direct() {
    let Some(mut pair) = Pair::new("ipv6") else { return };
    let server = pair.b.serve("[::1]:9001", "six");
    let mut stream = pair.a.connect(upstream6()).expect("the direct path");
    assert_eq!(greeting(&mut stream), "six");
    echo(&mut stream, &[7; 100_000]).expect("an echo");
    assert_eq!(stream.peer_addr().expect("a peer"), upstream6());
    assert_eq!(server.peers()[0].0.ip(), pair.a.addr6);
    drop(stream);
    let closed = pair.events.expect("close", |event| matches!(event, KernelEvent::Close { .. }));
    let KernelEvent::Close { bytes_to_destination, bytes_to_source, connection, .. } = closed else {
        unreachable!("just matched")
    };
    assert_eq!((bytes_to_destination, bytes_to_source), (100_000, 100_003));
    assert_eq!(connection.flow.destination, SocketAddr::from((pair.b.addr6, APP)));
}

#[test]
fn a_v4_mapped_connection_goes_direct() {
    let Some(pair) = Pair::new("mapped") else { return };
    let server = pair.b.serve("127.0.0.1:9001", "four");
    let mapped = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), UPSTREAM));
    let mut stream = connect_with(&pair.a, Domain::IPV6, mapped, |_| Ok(())).expect("the direct path");
    assert_eq!(greeting(&mut stream), "four");
    echo(&mut stream, b"hello").expect("an echo");
    assert_eq!(stream.peer_addr().expect("a peer"), mapped);
    assert_eq!(server.peers()[0].0.ip(), pair.a.addr4);
}

#[test]
fn a_dual_stack_listener_takes_both_families() {
    let Some(pair) = Pair::new("dualstack") else { return };
    let server = pair.b.serve("[::]:9001", "both");
    for upstream in [upstream4(), upstream6()] {
        let mut stream = pair.a.connect(upstream).expect("the direct path");
        assert_eq!(greeting(&mut stream), "both", "{upstream}");
    }
    assert_eq!(server.accepted(), 2);
}

#[test]
fn equal_loopback_tuples_in_two_workloads_do_not_meet() {
    let Some(mut world) = World::new("equaltuples") else { return };
    let [a1, a2, b1, b2] = [1, 2, 3, 4].map(|id| world.workload(id));
    let (mut datapath, _events) = world.load();
    for workload in [&a1, &a2, &b1, &b2] {
        datapath.attach(&workload.links()).expect("attached");
        datapath.set_ports(workload.id, &[(APP, PortKind::Protected)]).expect("ports");
    }
    let (_one, _two) = (b1.serve("127.0.0.1:9001", "one"), b2.serve("127.0.0.1:9001", "two"));
    let desired = BTreeMap::from([
        upstream(&a1, upstream4(), &[b1.instance(APP)]),
        upstream(&a2, upstream4(), &[b2.instance(APP)]),
    ]);
    datapath.apply(&desired).expect("applied");
    let from = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 40_000));
    let connect = |workload| connect_with(workload, Domain::IPV4, upstream4(), |socket| socket.bind(&from.into()));
    let mut first = connect(&a1).expect("the direct path");
    let mut second = connect(&a2).expect("the direct path");
    assert_eq!((greeting(&mut first), greeting(&mut second)), ("one".into(), "two".into()));
    assert_eq!(first.local_addr().expect("an address").port(), second.local_addr().expect("an address").port());
    assert_eq!(first.peer_addr().expect("a peer"), second.peer_addr().expect("a peer"));
}

#[test]
fn a_socket_bound_to_loopback_or_to_a_device_is_left_to_the_proxy() {
    let Some(pair) = Pair::new("bound") else { return };
    let (_proxy, server) = (pair.proxy(), pair.b.serve("[::]:9001", "b"));
    let _proxy6 = pair.a.serve("[::1]:8080", "proxy");
    let mapped = |address: Ipv4Addr, port| SocketAddr::from((address.to_ipv6_mapped(), port));
    let (loopback, own) = (Ipv4Addr::LOCALHOST, pair.a.addr4);
    // Each with the loopback address of its kind, and with the workload's own.
    for (domain, upstream, loopback, own) in [
        (Domain::IPV4, upstream4(), SocketAddr::from((loopback, 0)), SocketAddr::from((own, 0))),
        (Domain::IPV6, upstream6(), (Ipv6Addr::LOCALHOST, 0).into(), (pair.a.addr6, 0).into()),
        (Domain::IPV6, mapped(loopback, UPSTREAM), mapped(loopback, 0), mapped(own, 0)),
    ] {
        let before = server.accepted();
        let way = |prepare: &(dyn Fn(&Socket) -> io::Result<()> + Sync)| {
            let mut stream = connect_with(&pair.a, domain, upstream, prepare).expect("either way");
            greeting(&mut stream)
        };
        assert_eq!(way(&|socket| socket.bind(&loopback.into())), "proxy", "{loopback}");
        assert_eq!(way(&|socket| socket.bind_device(Some(b"lo"))), "proxy", "{upstream}");
        assert_eq!(server.accepted(), before);
        assert_eq!(way(&|socket| socket.bind(&own.into())), "b", "its own address does no harm: {own}");
    }
}

#[test]
fn without_an_entry_in_force_the_proxy_gets_the_connection() {
    let Some(mut pair) = Pair::new("noentry") else { return };
    let (_proxy, server) = (pair.proxy(), pair.b.serve("127.0.0.1:9001", "b"));
    let way = |pair: &Pair| greeting(&mut pair.a.connect(upstream4()).expect("either way"));
    assert_eq!(way(&pair), "b");

    let mut expired = pair.desired();
    expired.values_mut().for_each(|upstream| upstream.not_after = Some(SystemTime::now() - Duration::from_secs(60)));
    pair.datapath.apply(&expired).expect("applied");
    assert_eq!(way(&pair), "proxy", "expired");
    assert!(pair.datapath.apply(&pair.desired()).expect("applied").removed.is_empty());
    assert_eq!(way(&pair), "b");

    assert_eq!(pair.datapath.apply(&BTreeMap::new()).expect("applied").removed.len(), 2);
    assert_eq!(way(&pair), "proxy", "removed");
    assert_eq!(server.accepted(), 2);

    pair.datapath.apply(&pair.desired()).expect("applied");
    pair.datapath.detach(pair.b.id).expect("detached");
    assert_eq!(way(&pair), "proxy", "the destination is not guarded any more");
}

#[test]
fn a_socket_that_was_led_astray_once_can_connect_elsewhere() {
    let Some(pair) = Pair::new("again") else { return };
    let listener = pair.b.run(|| TcpListener::bind("127.0.0.1:9001").expect("a port"));
    pair.lose_frames(true);
    let (first, peer) = pair.a.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        let first = socket.connect_timeout(&upstream4().into(), Duration::from_millis(300));
        // The same socket, taken back and sent somewhere else.
        let elsewhere = TcpListener::bind("127.0.0.1:7000").expect("a port");
        rustix::net::connect_unspec(&socket).expect("taken back");
        socket.set_nonblocking(false).expect("a flag");
        socket.connect(&elsewhere.local_addr().expect("an address").into()).expect("connected");
        (first, socket.peer_addr().expect("a peer").as_socket())
    });
    assert!(first.is_err());
    assert_eq!(peer, Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 7000))));
    drop(listener);
}

#[test]
fn every_listening_instance_gets_its_share_and_a_silent_one_none() {
    let Some(mut world) = World::new("instances") else { return };
    let [a, b1, b2, b3] = [1, 2, 3, 4].map(|id| world.workload(id));
    let (mut datapath, _events) = world.load();
    for (workload, port) in [(&a, 1), (&b1, 9001), (&b2, 9002), (&b3, 9003)] {
        datapath.attach(&workload.links()).expect("attached");
        datapath.set_ports(workload.id, &[(port, PortKind::Protected)]).expect("ports");
    }
    let (one, two) = (b1.serve("127.0.0.1:9001", "one"), b2.serve("127.0.0.1:9002", "two"));
    let instances = [b1.instance(9001), b2.instance(9002), b3.instance(9003)];
    datapath.apply(&BTreeMap::from([upstream(&a, upstream4(), &instances)])).expect("applied");
    for _ in 0..60 {
        greeting(&mut a.connect(upstream4()).expect("an instance that listens"));
    }
    assert_eq!(one.accepted() + two.accepted(), 60);
    // Chance: less than one in 10⁹ that a fair choice leaves one of them below five.
    assert!(one.accepted() >= 5 && two.accepted() >= 5, "{} and {}", one.accepted(), two.accepted());
}

#[test]
fn a_full_table_keeps_nothing_from_being_brought_up_to_date() {
    let Some(mut pair) = Pair::new("full") else { return };
    let c = pair.world.workload(3);
    pair.datapath.attach(&c.links()).expect("attached");
    let (_proxy, _server) = (pair.proxy(), pair.b.serve("0.0.0.0:9001", "b"));
    let way = |pair: &Pair| greeting(&mut pair.a.connect(upstream4()).expect("either way"));
    let mut desired = pair.desired();
    let address = |number: u32| Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() + 1 + number);
    desired.extend((0..16_384).map(|number| upstream(&pair.a, (address(number), 1), &[pair.b.instance(APP)])));
    pair.datapath.apply(&desired).expect_err("more than there is room for");
    assert_eq!(way(&pair), "b", "what was there stays");
    // Its instance is another one now, which does not listen.
    desired.extend([upstream(&pair.a, upstream4(), &[c.instance(APP)])]);
    pair.datapath.apply(&desired).expect_err("still more than there is room for");
    assert_eq!(way(&pair), "proxy");
    pair.datapath.apply(&pair.desired()).expect("room again");
    assert_eq!(way(&pair), "b");

    let mut ports = table::<PortKey, PortRule>(&pair.world, map::PORTS);
    let others = (0..=u32::MAX).map(|workload| PortKey { workload: 1000 + workload, port: 1, reserved: 0 });
    for key in others {
        if ports.insert(key, PortRule { kind: 1 }, 0).is_err() {
            break;
        }
    }
    let guarded = [(APP, PortKind::Protected), (APP + 1, PortKind::Protected)];
    pair.datapath.set_ports(pair.b.id, &guarded).expect_err("a port that is not guarded is told");
    assert_eq!(way(&pair), "b", "what was guarded stays guarded");
    pair.a.connect((pair.b.addr4, APP)).expect_err("what was guarded stays guarded");
}

#[test]
fn a_workload_cannot_fill_the_table_of_listeners() {
    let Some(mut pair) = Pair::new("listeners") else { return };
    let known = |pair: &Pair| {
        let ports: Vec<u16> = common::listeners(&pair.world).keys().map(|key| key.expect("a key").port).collect();
        ports
    };
    let _any = pair.b.run(|| [(); 50].map(|()| TcpListener::bind("0.0.0.0:0").expect("a port")));
    assert_eq!(known(&pair), [] as [u16; 0]);
    let _later = pair.b.serve("0.0.0.0:9002", "later");
    let _server = pair.b.serve("0.0.0.0:9001", "b");
    assert_eq!(known(&pair), [APP]);
    // A port that becomes one of the mesh while somebody listens.
    pair.datapath.set_ports(pair.b.id, &[(APP, PortKind::Protected), (9002, PortKind::Protected)]).expect("ports");
    let mut ports = known(&pair);
    ports.sort_unstable();
    assert_eq!(ports, [APP, 9002]);
}

#[test]
fn who_finds_the_table_of_listeners_full_is_reached_through_the_proxy() {
    let Some(pair) = Pair::new("listenersfull") else { return };
    let _proxy = pair.proxy();
    let mut listeners = common::listeners(&pair.world);
    // One socket may stand under any number of keys; those of workloads that there are not are nobody's way.
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let key = |number: u32| ListenerKey { workload: 1_000 + number, port: 1, family: FAMILY_V4, slot: 0 };
    let held = (0..1 << 20).take_while(|number| listeners.insert(key(*number), other.as_raw_fd(), 0).is_ok()).count();
    assert_eq!(held, 65_536, "full");

    let server = pair.b.serve("0.0.0.0:9001", "b");
    let way = || greeting(&mut pair.a.connect(upstream4()).expect("the proxy answers"));
    for _ in 0..20 {
        assert_eq!(way(), "proxy");
    }
    let refused = pair.a.connect((pair.b.addr4, APP)).expect_err("the application is guarded all the same");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(server.accepted(), 0);
    // Room again: the agent finds who was left out.
    drop(other);
    eventually("the direct path", || way() == "b");
}

#[test]
fn a_published_port_is_open_to_the_host_but_not_to_workloads() {
    let Some(mut pair) = Pair::new("published") else { return };
    pair.datapath.set_ports(pair.b.id, &[(APP, PortKind::Published)]).expect("ports");
    let server = pair.b.serve("0.0.0.0:9001", "b");
    let mut host = TcpStream::connect((pair.b.addr4, APP)).expect("from the host");
    assert_eq!(greeting(&mut host), "b");
    let refused = pair.a.connect((pair.b.addr4, APP)).expect_err("a workload has no leave");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let mut direct = pair.a.connect(upstream4()).expect("with leave");
    assert_eq!(greeting(&mut direct), "b");
    assert_eq!(server.accepted(), 2);
}

#[test]
fn datagrams_to_a_protected_port_are_dropped() {
    let Some(mut pair) = Pair::new("datagrams") else { return };
    let (guarded, open) = pair
        .b
        .run(|| (UdpSocket::bind(("0.0.0.0", APP)).expect("a port"), UdpSocket::bind("0.0.0.0:9002").expect("a port")));
    let sender = pair.a.run(|| UdpSocket::bind("0.0.0.0:0").expect("a port"));
    sender.send_to(b"x", (pair.b.addr4, APP)).expect("sent");
    sender.send_to(b"y", (pair.b.addr4, 9002)).expect("sent");
    open.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let mut buffer = [0; 8];
    assert_eq!(open.recv(&mut buffer).expect("the other port is open"), 1);
    guarded.set_nonblocking(true).expect("a flag");
    assert_eq!(guarded.recv(&mut buffer).expect_err("dropped").kind(), io::ErrorKind::WouldBlock);
    pair.events.expect("refused", |event| {
        matches!(event, KernelEvent::Refused(packet) if packet.protocol == culvert_agent::datapath::Protocol::Udp)
    });
}

#[test]
fn a_steered_port_belongs_to_the_worker_whoever_listens_on_it() {
    let Some(mut pair) = Pair::new("steered") else { return };
    let port = 21_000;
    let worker = pair.b.serve("[::]:21000", "worker");
    let listener = pair.b.run(|| TcpListener::bind("127.0.0.1:0").expect("a port"));
    drop(listener);
    pair.datapath.set_ports(pair.b.id, &[(port, PortKind::Steered)]).expect("ports");
    let refused = pair.a.connect((pair.b.addr4, port)).expect_err("nobody to steer to yet");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    pair.datapath.steer(pair.b.id, port, worker.descriptor()).expect("steered");

    let usurper = pair.b.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("a flag");
        socket.bind(&SocketAddr::from((pair.b.addr4, port)).into()).map(|()| socket)
    });
    for mut stream in [
        pair.a.connect((pair.b.addr4, port)),
        pair.a.connect((pair.b.addr6, port)),
        TcpStream::connect((pair.b.addr4, port)),
    ]
    .map(|attempt| attempt.expect("the worker listens"))
    {
        assert_eq!(greeting(&mut stream), "worker");
    }
    drop(usurper);
    drop(worker);
    eventually("the worker's listener is gone", || pair.a.connect((pair.b.addr4, port)).is_err());
}

#[test]
fn a_nonblocking_and_a_blocking_connect_are_alike() {
    let Some(pair) = Pair::new("nonblocking") else { return };
    let _server = pair.b.serve("127.0.0.1:9001", "b");
    let mut blocking = pair.a.run(|| TcpStream::connect(upstream4())).expect("the direct path");
    assert_eq!(greeting(&mut blocking), "b");
    let mut later = pair.a.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_nonblocking(true).expect("a flag");
        let started = socket.connect(&upstream4().into());
        assert!(started.is_ok() || started.is_err_and(|error| error.raw_os_error() == Some(libc::EINPROGRESS)));
        eventually("connected", || socket.peer_addr().is_ok());
        assert!(socket.take_error().expect("an option").is_none());
        socket.set_nonblocking(false).expect("a flag");
        TcpStream::from(socket)
    });
    assert_eq!(greeting(&mut later), "b");
    assert_eq!(later.peer_addr().expect("a peer"), upstream4());
}

#[test]
fn tcp_fast_open_goes_direct() {
    let Some(pair) = Pair::new("fastopen") else { return };
    for workload in [&pair.a, &pair.b] {
        workload.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1027").expect("fast open, without options"));
    }
    let server = pair.b.serve("127.0.0.1:9001", "");
    for round in 0..3 {
        let mut stream = pair.a.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            let to = SockaddrIn::from(match upstream4() {
                SocketAddr::V4(v4) => v4,
                SocketAddr::V6(_) => unreachable!("an IPv4 address"),
            });
            let fast_open = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
            let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
            assert_eq!(sendto(fd, b"early", &to, fast_open).expect("connects and sends"), 5);
            TcpStream::from(socket)
        });
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let mut back = [0; 5];
        io::Read::read_exact(&mut stream, &mut back).expect("an echo");
        assert_eq!(&back, b"early", "round {round}");
        stream.write_all(b"more").expect("sent");
    }
    assert_eq!(server.accepted(), 3);
    let counters = pair.a.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat").expect("counters"));
    assert!(counter(&counters, "TCPFastOpenActive") > 0, "data went with a SYN at least once");
}

/// A counter of `/proc/net/netstat`.
fn counter(text: &str, name: &str) -> u64 {
    let mut lines = text.lines();
    while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
        if let Some(at) = names.split(' ').position(|other| other == name) {
            return values.split(' ').nth(at).and_then(|value| value.parse().ok()).expect("a number");
        }
    }
    panic!("no counter {name}")
}
