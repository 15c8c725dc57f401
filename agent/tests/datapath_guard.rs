//! The guard at the veth: crafted frames through the loaded programs (`BPF_PROG_TEST_RUN`), and a workload that lies in a real
//! network.

mod common;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use aya::maps::{Array, HashMap, PerCpuArray};
use common::frames::{
    ACK, ADDR4, ADDR6, ALL_NODES, LINK_LOCAL, MAC, OTHER_MAC, OTHER4, OTHER6, Programs, SYN, arp, ethernet, ipv4, ipv6,
    neighbour, tcp, udp,
};
use common::{APP, Pair, TestWorkload, eventually, greeting, table, upstream4};
use culvert_agent::datapath::{KernelEvent, PortKind, Protocol, TcMode};
use culvert_ebpf_common::{
    Auth, FlowKey, PORT_PROTECTED, PORT_PUBLISHED, PortKey, PortRule, Quota, Settings, Upstream, UpstreamKey, Workload,
    map,
};
use socket2::{Domain, Socket, Type};

#[test]
fn frames_leave_with_the_workloads_own_addresses_only() {
    let Some(mut programs) = Programs::load("frames_leave") else { return };
    let data = tcp(80, ACK);
    for (frame, leaves, what) in [
        (ipv4(MAC, ADDR4, OTHER4, 6, 0, &data), true, "its own addresses"),
        (ipv4(OTHER_MAC, ADDR4, OTHER4, 6, 0, &data), false, "a foreign MAC address"),
        (ipv4(MAC, OTHER4, ADDR4, 6, 0, &data), false, "a foreign IPv4 address"),
        (ipv4(MAC, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, 17, 0, &udp(67)), false, "no IPv4 address"),
        (ipv4(MAC, ADDR4, OTHER4, 17, 0x00b9, &[0; 8]), true, "a later fragment"),
        (ipv4(MAC, OTHER4, ADDR4, 17, 0x00b9, &[0; 8]), false, "a foreign fragment"),
        (ipv4(MAC, ADDR4, Ipv4Addr::LOCALHOST, 6, 0, &data), false, "to a loopback address"),
        (ipv6(MAC, ADDR6, OTHER6, 6, &data), true, "its own IPv6 address"),
        (ipv6(OTHER_MAC, ADDR6, OTHER6, 6, &data), false, "a foreign MAC address over IPv6"),
        (ipv6(MAC, OTHER6, ADDR6, 6, &data), false, "a foreign IPv6 address"),
        (ipv6(MAC, LINK_LOCAL, OTHER6, 6, &data), false, "TCP from a link-local address"),
        (ipv6(MAC, ADDR4.to_ipv6_mapped(), OTHER6, 6, &data), false, "a mapped address on the wire"),
        (ipv6(MAC, ADDR6, OTHER4.to_ipv6_mapped(), 6, &data), false, "to a mapped address on the wire"),
        (ethernet(MAC, 0x8100, &[0; 46]), false, "a VLAN tag"),
        (ethernet(MAC, 0x88cc, &[0; 46]), false, "an unknown Ethernet type"),
        (ethernet(MAC, 0x0800, &[0x44; 40]), false, "an impossible header length"),
        (ethernet(MAC, 0x0800, &[0; 40]), false, "not version 4"),
        (ethernet(MAC, 0x86dd, &[0x40; 60]), false, "not version 6"),
    ] {
        assert_eq!(programs.leaves(&frame), leaves, "{what}");
    }
}

#[test]
fn arp_speaks_for_the_workload_only() {
    let Some(mut programs) = Programs::load("arp_speaks") else { return };
    assert!(programs.leaves(&arp(MAC, MAC, ADDR4)));
    assert!(programs.leaves(&arp(MAC, MAC, Ipv4Addr::UNSPECIFIED)), "a probe for its own address");
    assert!(!programs.leaves(&arp(MAC, MAC, OTHER4)));
    assert!(!programs.leaves(&arp(MAC, OTHER_MAC, ADDR4)));
    assert!(!programs.leaves(&arp(OTHER_MAC, MAC, ADDR4)));
    assert!(!programs.leaves(&ethernet(MAC, 0x0806, &[0; 28])), "ARP of another kind");
    assert!(programs.enters(&arp(OTHER_MAC, OTHER_MAC, OTHER4)), "it may be asked");
}

#[test]
fn neighbour_discovery_speaks_for_the_workload_only() {
    let Some(mut programs) = Programs::load("neighbours") else { return };
    let none = Ipv6Addr::UNSPECIFIED;
    let long: Vec<_> = std::iter::repeat_n((14, MAC), 4).chain([(2, OTHER_MAC)]).collect();
    for (source, message, leaves, what) in [
        (ADDR6, neighbour(135, Some(OTHER6), &[(1, MAC)]), true, "a solicitation"),
        (none, neighbour(135, Some(ADDR6), &[]), true, "detection of a duplicate address"),
        (none, neighbour(135, Some(ADDR6), &[(14, OTHER_MAC)]), true, "with a nonce"),
        (ADDR6, neighbour(135, Some(OTHER6), &[(1, OTHER_MAC)]), false, "a solicitation with a foreign MAC address"),
        (OTHER6, neighbour(135, Some(ADDR6), &[(1, MAC)]), false, "a solicitation from a foreign address"),
        (ADDR6, neighbour(136, Some(ADDR6), &[(2, MAC)]), true, "an advertisement of its own address"),
        (LINK_LOCAL, neighbour(136, Some(LINK_LOCAL), &[(2, MAC)]), true, "an advertisement of its link-local address"),
        (ADDR6, neighbour(136, Some(OTHER6), &[(2, MAC)]), false, "an advertisement of a foreign address"),
        (LINK_LOCAL, neighbour(136, Some(OTHER6), &[(2, MAC)]), false, "the same from a link-local address"),
        (ADDR6, neighbour(136, Some(ADDR6), &[(2, OTHER_MAC)]), false, "an advertisement with a foreign MAC address"),
        (ADDR6, neighbour(136, Some(ADDR6), &[(14, MAC), (2, OTHER_MAC)]), false, "hidden behind another option"),
        (ADDR6, neighbour(136, Some(ADDR6), &long), false, "hidden behind many options"),
        (LINK_LOCAL, neighbour(133, None, &[(1, MAC)]), true, "a router solicitation"),
        (LINK_LOCAL, neighbour(134, None, &[]), false, "a router advertisement"),
        (LINK_LOCAL, neighbour(137, None, &[]), false, "a redirect"),
        (ADDR6, neighbour(128, None, &[]), true, "an echo request"),
        (none, neighbour(128, None, &[]), false, "an echo request from nowhere"),
    ] {
        assert_eq!(programs.leaves(&ipv6(MAC, source, ALL_NODES, 58, &message)), leaves, "{what}");
    }
    // Behind a hop-by-hop header, as reports of multicast listeners are.
    let behind = |message: Vec<u8>| [&[58, 0, 5, 2, 0, 0, 1, 0], message.as_slice()].concat();
    assert!(programs.leaves(&ipv6(MAC, LINK_LOCAL, ALL_NODES, 0, &behind(neighbour(143, None, &[])))));
    let hidden = behind(neighbour(136, Some(ADDR6), &[(2, MAC)]));
    assert!(!programs.leaves(&ipv6(MAC, ADDR6, ALL_NODES, 0, &hidden)), "no honest one has extension headers");
    let endless: Vec<u8> = std::iter::repeat_n([60, 0, 1, 4, 0, 0, 0, 0], 12).flatten().collect();
    assert!(!programs.leaves(&ipv6(MAC, ADDR6, ALL_NODES, 60, &endless)), "extension headers without end");
}

#[test]
fn what_would_open_a_guarded_port_does_not_enter() {
    let Some(mut programs) = Programs::load("does_not_enter") else { return };
    let outside4 = Ipv4Addr::new(192, 0, 2, 1);
    let rule = |kind| PortRule { kind };
    for (port, kind) in [(9001, PORT_PROTECTED), (9002, PORT_PUBLISHED)] {
        let key = PortKey { workload: 1, port, reserved: 0 };
        programs.table::<PortKey, PortRule>(map::PORTS).insert(key, rule(kind), 0).expect("written");
    }
    let from = |source, protocol, payload: &[u8]| ipv4(OTHER_MAC, source, ADDR4, protocol, 0, payload);
    for (frame, enters, what) in [
        (from(OTHER4, 6, &tcp(80, SYN)), true, "a port without a rule"),
        (from(OTHER4, 6, &tcp(9001, SYN)), false, "a SYN without leave"),
        (from(OTHER4, 6, &tcp(9001, SYN | 0xc0)), false, "a SYN with ECN flags"),
        (from(OTHER4, 6, &tcp(9001, ACK)), true, "an established connection"),
        (from(OTHER4, 6, &tcp(9001, SYN | ACK)), true, "an answer"),
        (from(outside4, 6, &tcp(9001, SYN)), false, "a SYN from outside"),
        (from(OTHER4, 6, &tcp(9002, SYN)), false, "a workload on a published port"),
        (from(outside4, 6, &tcp(9002, SYN)), true, "from outside on a published port"),
        (from(OTHER4, 17, &udp(9001)), false, "a datagram"),
        (from(outside4, 17, &udp(9002)), true, "a datagram from outside on a published port"),
        (from(OTHER4, 17, &udp(53)), true, "a datagram to a port without a rule"),
        (from(OTHER4, 6, &tcp(9001, SYN)[..8]), false, "a SYN that cannot be read"),
        (from(ADDR4, 6, &tcp(80, SYN)), false, "from the workload's own address"),
        (from(Ipv4Addr::LOCALHOST, 6, &tcp(80, SYN)), false, "from a loopback address"),
        (ipv4(OTHER_MAC, OTHER4, Ipv4Addr::LOCALHOST, 6, 0, &tcp(80, SYN)), false, "to a loopback address"),
        (ipv6(OTHER_MAC, OTHER6, ADDR6, 6, &tcp(9001, SYN)), false, "a SYN over IPv6"),
        (
            ipv6(OTHER_MAC, OTHER6, ADDR6, 60, &[&[6, 0, 1, 4, 0, 0, 0, 0], &*tcp(9001, SYN)].concat()),
            false,
            "behind an extension header",
        ),
        (ipv6(OTHER_MAC, OTHER6, LINK_LOCAL, 6, &tcp(9001, SYN)), false, "to a link-local address"),
        (ipv6(OTHER_MAC, OTHER6, ADDR6, 6, &tcp(80, SYN)), true, "another port over IPv6"),
        (
            ipv6(OTHER_MAC, LINK_LOCAL, ADDR6, 58, &neighbour(135, Some(ADDR6), &[(1, OTHER_MAC)])),
            true,
            "a solicitation",
        ),
    ] {
        assert_eq!(programs.enters(&frame), enters, "{what}");
    }
}

/// As the bridge floods it, or sends it back.
#[test]
fn what_is_not_for_the_workload_is_kept_from_it_and_not_told() {
    let Some(mut programs) = Programs::load("not_for") else { return };
    let mut ring = aya::maps::RingBuf::try_from(programs.0.take_map(map::EVENTS).expect("a map")).expect("its type");
    let key = PortKey { workload: 1, port: 9001, reserved: 0 };
    programs.table::<PortKey, PortRule>(map::PORTS).insert(key, PortRule { kind: PORT_PROTECTED }, 0).expect("written");
    let to = |mac: [u8; 6], mut frame: Vec<u8>| {
        frame[..6].copy_from_slice(&mac);
        frame
    };
    for (frame, enters, what) in [
        (to(MAC, ipv4(OTHER_MAC, OTHER4, ADDR4, 6, 0, &tcp(80, ACK))), true, "a segment for it"),
        (to([2, 0, 0, 0, 0, 3], ipv4(OTHER_MAC, OTHER4, ADDR4, 6, 0, &tcp(80, ACK))), false, "a segment for another"),
        (to([2, 0, 0, 0, 0, 3], ipv4(OTHER_MAC, OTHER4, ADDR4, 6, 0, &tcp(9001, SYN))), false, "a SYN for another"),
        (to([2, 0, 0, 0, 0, 3], arp(OTHER_MAC, OTHER_MAC, OTHER4)), false, "ARP for another"),
        (to(MAC, ipv4(MAC, OTHER4, ADDR4, 6, 0, &tcp(80, SYN))), true, "its own, to its published port"),
        (ipv6(MAC, ADDR6, ALL_NODES, 58, &neighbour(135, Some(OTHER6), &[(1, MAC)])), false, "its own to a group"),
    ] {
        assert_eq!(programs.enters(&frame), enters, "{what}");
    }
    assert!(ring.next().is_none(), "none of it is worth telling");
}

#[test]
fn fragments_options_and_tags_are_judged_by_what_they_carry() {
    let Some(mut programs) = Programs::load("fragments") else { return };
    let key = PortKey { workload: 1, port: 9001, reserved: 0 };
    programs.table::<PortKey, PortRule>(map::PORTS).insert(key, PortRule { kind: PORT_PROTECTED }, 0).expect("written");
    const MORE: u16 = 0x2000;
    let part = |fragment, protocol, payload: &[u8]| ipv4(OTHER_MAC, OTHER4, ADDR4, protocol, fragment, payload);
    let part6 = |fragment: u16, next: u8, payload: &[u8]| {
        let [high, low] = fragment.to_be_bytes();
        ipv6(OTHER_MAC, OTHER6, ADDR6, 44, &[&[next, 0, high, low, 0, 0, 0, 7], payload].concat())
    };
    let with_options = |port| {
        let mut frame = ipv4(OTHER_MAC, OTHER4, ADDR4, 6, 0, &[&[1, 1, 1, 0], &*tcp(port, SYN)].concat());
        frame[14] = 0x46;
        frame
    };
    let tagged = |mut frame: Vec<u8>| {
        frame.splice(12..12, [0x81, 0, 0, 7]);
        frame
    };
    for (frame, enters, what) in [
        (part(MORE, 6, &tcp(9001, SYN)), false, "a SYN in a first fragment"),
        (part(MORE, 6, &tcp(80, SYN)), true, "the same to a port without a rule"),
        (part(MORE, 6, &tcp(9001, ACK)), true, "a first fragment that opens nothing"),
        (part(MORE, 6, &tcp(9001, SYN)[..8]), false, "a first fragment too small for its flags"),
        (part(MORE, 6, &tcp(9001, ACK)[..8]), false, "whatever they are"),
        (part(MORE, 6, &[]), false, "a first fragment without ports"),
        (part(MORE | 1, 6, &tcp(9001, SYN)[8..]), true, "a later fragment, whose first one was judged"),
        (part(MORE, 17, &udp(9001)), false, "a datagram in a first fragment"),
        (part(MORE, 17, &udp(9001)[..2]), false, "a datagram too small for its ports"),
        (part(185, 17, &[0; 8]), true, "a datagram's last fragment"),
        (part6(1, 6, &tcp(9001, SYN)), false, "a SYN in a first fragment over IPv6"),
        (part6(1, 6, &tcp(80, SYN)), true, "the same to a port without a rule"),
        (part6(0, 6, &tcp(9001, SYN)), false, "a SYN in the only fragment"),
        (part6(1, 6, &tcp(9001, SYN)[..8]), false, "a first fragment too small for its flags over IPv6"),
        (part6(8 | 1, 6, &tcp(9001, SYN)[8..]), true, "a later fragment over IPv6"),
        (part6(1, 17, &udp(9001)), false, "a datagram in a first fragment over IPv6"),
        (part6(1, 60, &[&[6, 0, 1, 4, 0, 0, 0, 0], &*tcp(9001, SYN)].concat()), false, "with a header after that"),
        (with_options(9001), false, "a SYN behind IPv4 options"),
        (with_options(80), true, "the same to a port without a rule"),
        (tagged(part(0, 6, &tcp(80, SYN))), false, "a VLAN tag"),
        (tagged(part6(0, 6, &tcp(80, ACK))), false, "a VLAN tag over IPv6"),
    ] {
        assert_eq!(programs.enters(&frame), enters, "{what}");
    }
}

#[test]
fn leave_lets_exactly_its_own_syn_enter() {
    let Some(mut programs) = Programs::load("leave_lets") else { return };
    let key = PortKey { workload: 1, port: 9001, reserved: 0 };
    programs.table::<PortKey, PortRule>(map::PORTS).insert(key, PortRule { kind: PORT_PROTECTED }, 0).expect("written");
    let upstream = UpstreamKey { netns_cookie: 7, address: Ipv4Addr::LOCALHOST.into(), port: 8080, reserved: [0; 3] };
    let entry = Upstream { epoch: 5, expires: u64::MAX, service: 1, count: 0, instances: [Default::default(); 16] };
    let flow =
        FlowKey { source: OTHER4.into(), destination: ADDR4.into(), source_port: 50_000, destination_port: 9001 };
    let auth = Auth { upstream, epoch: 5, expires: u64::MAX, source_workload: 2, destination_workload: 1 };
    let syn = ipv4(OTHER_MAC, OTHER4, ADDR4, 6, 0, &tcp(9001, SYN));
    let given = |programs: &mut Programs, auth: Auth| {
        let mut table: HashMap<_, FlowKey, Auth> =
            programs.0.map_mut(map::AUTH).expect("a map").try_into().expect("its type");
        table.insert(flow, auth, 0).expect("written");
        programs.enters(&syn)
    };
    assert!(!given(&mut programs, auth), "the entry that gave leave is gone");
    programs.table::<UpstreamKey, Upstream>(map::UPSTREAM).insert(upstream, entry, 0).expect("written");
    assert!(given(&mut programs, auth));
    assert!(!given(&mut programs, Auth { expires: 1, ..auth }), "expired");
    assert!(!given(&mut programs, Auth { epoch: 4, ..auth }), "of an earlier epoch");
    assert!(!given(&mut programs, Auth { destination_workload: 3, ..auth }), "for another workload");
    let expired = Upstream { expires: 1, ..entry };
    programs.table::<UpstreamKey, Upstream>(map::UPSTREAM).insert(upstream, expired, 0).expect("written");
    assert!(!given(&mut programs, auth), "the certificate has expired");
}

#[test]
fn a_veth_without_an_entry_opens_nothing() {
    let Some(mut programs) = Programs::load("without_an_entry") else { return };
    programs.table::<u32, Workload>(map::WORKLOAD_IF).remove(&1).expect("removed");
    assert!(!programs.leaves(&ipv4(MAC, ADDR4, OTHER4, 6, 0, &tcp(80, ACK))));
    assert!(!programs.enters(&ipv4(OTHER_MAC, OTHER4, ADDR4, 6, 0, &tcp(80, SYN))));
    assert!(!programs.enters(&ipv4(OTHER_MAC, OTHER4, ADDR4, 17, 0, &udp(80))));
    assert!(!programs.leaves(&arp(MAC, MAC, ADDR4)));
}

#[test]
fn events_of_refusals_are_bounded() {
    let Some(mut programs) = Programs::load("bounded") else { return };
    let mut ring = aya::maps::RingBuf::try_from(programs.0.take_map(map::EVENTS).expect("a map")).expect("its type");
    let spoofed = ipv4(MAC, OTHER4, ADDR4, 6, 0, &tcp(80, SYN));
    for _ in 0..1000 {
        assert!(!programs.leaves(&spoofed));
    }
    let mut told = 0;
    while ring.next().is_some() {
        told += 1;
    }
    // Eight a second; a slow machine may need several seconds for a thousand runs.
    assert!((1..500).contains(&told), "{told}");
    let quota = programs.table::<u32, Quota>(map::QUOTA).get(&1, 0).expect("a quota");
    assert!(quota.suppressed > 0);
}

#[test]
fn an_event_that_finds_the_ring_full_is_counted() {
    let Some(mut programs) = Programs::load("ring_full") else { return };
    let mut settings: Array<_, Settings> =
        programs.0.map_mut(map::SETTINGS).expect("a map").try_into().expect("its type");
    let unbounded = Settings { epoch: 0, auth_ttl: 1, auth_cap: 1, refusals_per_second: u32::MAX };
    settings.set(0, unbounded, 0).expect("written");
    let spoofed = ipv4(MAC, OTHER4, ADDR4, 6, 0, &tcp(80, SYN));
    let lost = |programs: &mut Programs| -> u64 {
        let map: PerCpuArray<_, u64> = programs.0.map_mut(map::LOST).expect("a map").try_into().expect("its type");
        map.get(&0, 0).expect("counters").iter().sum()
    };
    assert!(!programs.leaves(&spoofed));
    assert_eq!(lost(&mut programs), 0);
    // More than there is room for in a mebibyte.
    for _ in 0..11_000 {
        programs.leaves(&spoofed);
    }
    assert!(lost(&mut programs) > 0);
}

/// Sends a SYN with a forged source from `liar`.
fn send_syn(liar: &TestWorkload, source: SocketAddr, destination: SocketAddr) {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (source.ip(), destination.ip()) else { panic!("IPv4 only") };
    let mut segment = tcp(destination.port(), SYN);
    segment[..2].copy_from_slice(&source.port().to_be_bytes());
    let mut sum: u32 = 6 + segment.len() as u32;
    let pseudo = [from.octets(), to.octets()].concat();
    for pair in pseudo.chunks(2).chain(segment.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    segment[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let packet = ipv4(MAC, from, to, 6, 0, &segment)[14..].to_vec();
    liar.run(|| {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::from(libc::IPPROTO_RAW)))
            .expect("a raw socket");
        raw.send_to(&packet, &destination.into()).expect("sent");
    });
}

/// TCP segments that have reached the workload.
fn segments(workload: &TestWorkload) -> u64 {
    let counters = workload.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").expect("counters"));
    let mut lines = counters.lines().filter(|line| line.starts_with("Tcp:"));
    let at = lines.next().expect("names").split(' ').position(|name| name == "InSegs").expect("a counter");
    lines.next().expect("values").split(' ').nth(at).expect("a value").parse().expect("a number")
}

#[test]
fn a_forged_syn_with_the_leave_of_another_workload_does_not_arrive() {
    for clsact in [false, true] {
        let Some(mut pair) = Pair::new("forged") else { return };
        let liar = pair.world.workload(3);
        if clsact {
            pair.datapath.use_clsact();
            assert_eq!(pair.datapath.tc_mode(), TcMode::Clsact);
        }
        pair.datapath.attach(&liar.links()).expect("attached");
        let server = pair.b.serve("0.0.0.0:9001", "b");

        // Leave that is there for the taking: `a` is about to connect.
        let flow = FlowKey {
            source: pair.a.addr4.into(),
            destination: pair.b.addr4.into(),
            source_port: 5555,
            destination_port: APP,
        };
        let (key, entry) =
            table::<UpstreamKey, Upstream>(&pair.world, "UPSTREAM").iter().next().expect("an entry").expect("readable");
        let auth = Auth {
            upstream: key,
            epoch: entry.epoch,
            expires: u64::MAX,
            source_workload: pair.a.id,
            destination_workload: pair.b.id,
        };
        table::<FlowKey, Auth>(&pair.world, "AUTH").insert(flow, auth, 0).expect("written");
        let (source, destination) = (SocketAddr::from((pair.a.addr4, 5555)), SocketAddr::from((pair.b.addr4, APP)));

        let before = segments(&pair.b);
        send_syn(&liar, source, destination);
        pair.events.expect("spoofed", |event| {
            matches!(event, KernelEvent::Spoofed(packet)
                if packet.source == Some(liar.id)
                    && packet.destination == Some(pair.b.id)
                    && packet.protocol == Protocol::Tcp
                    && packet.flow.source == source
                    && packet.flow.destination == destination)
        });
        assert_eq!(segments(&pair.b), before, "nothing has arrived");
        // The same from the workload that it belongs to: answered, so it has reached the application's port.
        send_syn(&pair.a, source, destination);
        eventually("its own SYN arrives", || segments(&pair.b) > before);
        assert_eq!(server.accepted(), 0);

        pair.datapath.detach(liar.id).expect("detached");
        if clsact {
            let left = common::output("tc", &["filter", "show", "dev", "v3", "ingress"]);
            assert_eq!(left.trim(), "", "the filter is gone");
        }
    }
}

#[test]
fn a_workload_that_takes_anothers_address_is_cut_off() {
    let Some(mut pair) = Pair::new("takes") else { return };
    let receiver = pair.b.run(|| UdpSocket::bind("[::]:9003").expect("a port"));
    receiver.set_read_timeout(Some(Duration::from_millis(200))).expect("a limit");
    let send = |pair: &Pair, from: IpAddr, to: IpAddr| {
        let sent = pair.a.run(|| UdpSocket::bind((from, 0))?.send_to(b"x", (to, 9003)));
        let mut buffer = [0; 8];
        let arrived = sent.and_then(|_| receiver.recv(&mut buffer));
        match arrived {
            Ok(_) => true,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => false,
            Err(error) => panic!("{error}"),
        }
    };
    let (to4, to6) = (IpAddr::V4(pair.b.addr4), IpAddr::V6(pair.b.addr6));
    let (own4, own6) = (IpAddr::V4(pair.a.addr4), IpAddr::V6(pair.a.addr6));
    eventually("neighbours are known", || send(&pair, own4, to4) && send(&pair, own6, to6));
    pair.a.ip("addr add 10.77.0.77/24 dev eth0");
    pair.a.ip("addr add fd77::77/64 dev eth0 nodad");
    assert!(!send(&pair, "10.77.0.77".parse().expect("an address"), to4));
    assert!(!send(&pair, "fd77::77".parse().expect("an address"), to6));
    pair.events.expect("spoofed", |event| matches!(event, KernelEvent::Spoofed(packet) if packet.flow.source.ip() == "fd77::77".parse::<IpAddr>().expect("an address")));
    pair.a.ip("link set eth0 address 02:00:00:00:77:99");
    assert!(!send(&pair, own4, to4), "a foreign MAC address");
}

#[test]
fn without_the_lookup_program_the_veth_still_keeps_callers_out() {
    let Some(mut pair) = Pair::new("nolookup") else { return };
    let server = pair.b.serve("0.0.0.0:9001", "b");
    pair.datapath.set_ports(pair.b.id, &[(APP, PortKind::Protected)]).expect("ports");
    let mut workloads = table::<u32, Workload>(&pair.world, "WORKLOAD_IF");
    let entry = workloads.get(&pair.b.ifindex, 0).expect("an entry");
    workloads.insert(pair.b.ifindex, Workload { flags: 2, ..entry }, 0).expect("written");
    let attempt =
        pair.a.run(|| std::net::TcpStream::connect_timeout(&(pair.b.addr4, APP).into(), Duration::from_millis(500)));
    assert_eq!(attempt.expect_err("dropped").kind(), io::ErrorKind::TimedOut);
    pair.events.expect(
        "refused",
        |event| matches!(event, KernelEvent::Refused(packet) if packet.destination == Some(pair.b.id)),
    );
    let mut direct = pair.a.connect(upstream4()).expect("leave still counts");
    assert_eq!(greeting(&mut direct), "b");
    assert_eq!(server.accepted(), 1);
}
