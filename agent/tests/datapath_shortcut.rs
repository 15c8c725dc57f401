//! Past the bridge: which segments of whose connections go straight from veth to veth, and that the host's packet filter has
//! its say about every connection all the same.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use common::frames::{ACK, ADDR4, ADDR6, MAC, OTHER_MAC, OTHER4, OTHER6, Programs, SYN, ipv4, ipv6, tcp};
use common::{APP, Pair, TestWorkload, echo, eventually, greeting, output, upstream4, upstream6};
use culvert_agent::datapath::TcMode;
use culvert_ebpf_common::{
    Address, PORT_PROTECTED, PORT_PUBLISHED, PORT_STEERED, PortKey, PortRule, WORKLOAD_GUARDED, WORKLOAD_LOOKUP,
    Workload, map,
};

/// `TC_ACT_REDIRECT`: straight to a veth.
const STRAIGHT: u32 = 7;
/// `TC_ACT_UNSPEC`: on to the bridge.
const BRIDGE: u32 = u32::MAX;
const DROP: u32 = 2;
const FIN: u8 = 0x01;
const RST: u8 = 0x04;

/// A frame of the workload to the other one, which has port 9001 of a mesh service, 9002 published too, and 9003 of a sidecar.
fn frame(segment: &[u8]) -> Vec<u8> {
    to(OTHER_MAC, ipv4(MAC, ADDR4, OTHER4, 6, 0, segment))
}

fn to(mac: [u8; 6], mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&mac);
    frame
}

/// With a sequence number other than zero.
fn numbered(segment: &[u8]) -> Vec<u8> {
    let mut segment = segment.to_vec();
    segment[7] = 1;
    segment
}

/// A segment from `port`.
fn from_port(port: u16, flags: u8) -> Vec<u8> {
    let mut segment = tcp(50_001, flags);
    segment[..2].copy_from_slice(&port.to_be_bytes());
    segment
}

fn with_options(segment: &[u8]) -> Vec<u8> {
    let mut frame = frame(&[&[1, 1, 1, 0], segment].concat());
    frame[14] = 0x46;
    frame
}

/// The programs with two workloads, of which the second is known as `flags` say.
fn programs(test: &str, flags: u32) -> Option<Programs> {
    let mut programs = Programs::load(test)?;
    let other = Workload {
        id: 2,
        flags,
        address4: OTHER4.into(),
        address6: OTHER6.into(),
        ifindex: 1,
        mac: OTHER_MAC.into(),
        ..Workload::default()
    };
    let own = programs.table::<u32, Workload>(map::WORKLOAD_IF).get(&1, 0).expect("the workload");
    let ready = Workload { flags: WORKLOAD_LOOKUP | WORKLOAD_GUARDED, ..own };
    let mut addresses = programs.table::<Address, Workload>(map::WORKLOAD_ADDR);
    for (address, workload) in [(IpAddr::V4(OTHER4), other), (OTHER6.into(), other), (ADDR4.into(), ready)] {
        addresses.insert(Address::from(address), workload, 0).expect("written");
    }
    let kinds =
        [(2, 9001, PORT_PROTECTED), (2, 9002, PORT_PUBLISHED), (2, 9003, PORT_STEERED), (1, 9009, PORT_PROTECTED)];
    for (workload, port, kind) in kinds {
        let key = PortKey { workload, port, reserved: 0 };
        programs.table::<PortKey, PortRule>(map::PORTS).insert(key, PortRule { kind }, 0).expect("written");
    }
    Some(programs)
}

#[test]
fn segments_of_direct_connections_that_open_nothing_go_straight() {
    let Some(mut programs) = programs("straight", WORKLOAD_LOOKUP | WORKLOAD_GUARDED) else { return };
    let own = |frame| to(MAC, frame);
    for (frame, verdict, what) in [
        (frame(&tcp(9001, ACK)), STRAIGHT, "to the application"),
        (frame(&tcp(9002, ACK)), STRAIGHT, "to an application that is published too"),
        (frame(&from_port(9009, ACK)), STRAIGHT, "an answer of its own application"),
        (frame(&tcp(9001, ACK | FIN)), STRAIGHT, "the end"),
        (frame(&numbered(&tcp(9001, RST))), STRAIGHT, "a reset"),
        (frame(&from_port(9009, RST | ACK)), BRIDGE, "what refuses one"),
        (to(OTHER_MAC, ipv6(MAC, ADDR6, OTHER6, 6, &tcp(9001, ACK))), STRAIGHT, "over IPv6"),
        (frame(&tcp(9001, SYN)), BRIDGE, "what opens a connection"),
        (frame(&from_port(9009, SYN | ACK)), BRIDGE, "what accepts one"),
        (to(OTHER_MAC, ipv6(MAC, ADDR6, OTHER6, 6, &tcp(9001, SYN))), BRIDGE, "what opens one over IPv6"),
        (frame(&tcp(80, ACK)), BRIDGE, "a port that the mesh knows nothing of"),
        (frame(&tcp(9003, ACK)), BRIDGE, "mutual TLS"),
        (to(OTHER_MAC, ipv4(MAC, ADDR4, OTHER4, 17, 0, &tcp(9001, ACK))), BRIDGE, "a datagram"),
        (
            to(OTHER_MAC, ipv4(MAC, ADDR4, Ipv4Addr::new(192, 0, 2, 1), 6, 0, &tcp(9001, ACK))),
            BRIDGE,
            "leaves the node",
        ),
        (to(OTHER_MAC, ipv4(MAC, ADDR4, OTHER4, 6, 0x2000, &tcp(9001, ACK))), BRIDGE, "a fragment"),
        (with_options(&tcp(9001, ACK)), BRIDGE, "behind IPv4 options"),
        (ipv4(MAC, ADDR4, OTHER4, 6, 0, &tcp(9001, ACK)), BRIDGE, "to the Ethernet address of nobody in particular"),
        (own(ipv4(MAC, ADDR4, ADDR4, 6, 0, &tcp(9009, ACK))), BRIDGE, "to itself"),
        (to(OTHER_MAC, ipv4(OTHER_MAC, ADDR4, OTHER4, 6, 0, &tcp(9001, ACK))), DROP, "from a foreign Ethernet address"),
        (own(ipv4(MAC, OTHER4, ADDR4, 6, 0, &tcp(9009, ACK))), DROP, "from a foreign address"),
        (
            to(OTHER_MAC, ipv6(MAC, ADDR4.to_ipv6_mapped(), OTHER6, 6, &tcp(9001, ACK))),
            DROP,
            "from its own IPv4 address over IPv6",
        ),
        (
            to(OTHER_MAC, ipv6(MAC, ADDR6, OTHER4.to_ipv6_mapped(), 6, &tcp(9001, ACK))),
            DROP,
            "to an IPv4 address over IPv6",
        ),
    ] {
        assert_eq!(programs.run("from_workload", &frame), verdict, "{what}");
    }
}

#[test]
fn a_workload_whose_veth_is_not_guarded_is_reached_by_the_bridge_only() {
    for flags in [0, WORKLOAD_LOOKUP, WORKLOAD_GUARDED] {
        let Some(mut programs) = programs("unguarded", flags) else { return };
        assert_eq!(programs.run("from_workload", &frame(&tcp(9001, ACK))), BRIDGE, "{flags}");
    }
}

/// Frames that the bridge has forwarded: TCP segments with SYN, and without.
fn bridged() -> (u64, u64) {
    let count = |name: &str| -> u64 {
        let listing = output("nft", &["list", "counter", "bridge", "seen", name]);
        let words: Vec<&str> = listing.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "packets").expect("a counter");
        words[at + 1].parse().expect("a number")
    };
    (count("opening"), count("others"))
}

fn count_bridged() {
    for line in [
        "add table bridge seen",
        "add counter bridge seen opening",
        "add counter bridge seen others",
        "add chain bridge seen forward { type filter hook forward priority 0; }",
        "add rule bridge seen forward tcp flags & syn == syn counter name opening",
        "add rule bridge seen forward tcp flags & syn != syn counter name others",
    ] {
        let status = std::process::Command::new("nft").arg(line).status().expect("nft");
        assert!(status.success(), "{line}");
    }
}

#[test]
fn the_bridge_sees_direct_connections_open_and_no_more() {
    for clsact in [false, true] {
        let Some(mut pair) = Pair::new("past") else { return };
        if clsact {
            pair.datapath.use_clsact();
            assert_eq!(pair.datapath.tc_mode(), TcMode::Clsact);
            pair.attach();
        }
        let _server = pair.b.serve("[::]:9001", "b");
        let _other = pair.b.serve("[::]:9100", "other");
        count_bridged();
        for to in [upstream4(), upstream6()] {
            let before = bridged();
            let mut stream = pair.a.connect(to).expect("the direct path");
            assert_eq!(greeting(&mut stream), "b");
            for size in [1, 1000, 100_000] {
                echo(&mut stream, &vec![7; size]).expect("an echo");
            }
            drop(stream);
            let after = bridged();
            assert!(after.0 >= before.0 + 2, "{to}: SYN and its answer: {before:?} {after:?}");
            assert_eq!(after.1, before.1, "{to}: nothing else");
        }
        let before = bridged();
        let mut plain = pair.a.connect((pair.b.addr4, 9100)).expect("a port that is not guarded");
        assert_eq!(greeting(&mut plain), "other");
        assert!(bridged().1 > before.1, "connections that are not the mesh's stay on the bridge");
    }
}

#[test]
fn a_packet_filter_of_the_host_may_refuse_a_direct_connection() {
    let Some(pair) = Pair::new("veto") else { return };
    let server = pair.b.serve("127.0.0.1:9001", "b");
    count_bridged();
    let veto = format!("insert rule bridge seen forward ip saddr {} tcp dport {APP} drop", pair.a.addr4);
    let status = std::process::Command::new("nft").arg(veto).status().expect("nft");
    assert!(status.success());
    let attempt = |workload: &TestWorkload, to: SocketAddr| {
        workload.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(1)))
    };
    attempt(&pair.a, upstream4()).expect_err("the filter's say");
    assert_eq!(server.accepted(), 0);
    let status = std::process::Command::new("nft").args(["flush", "ruleset"]).status().expect("nft");
    assert!(status.success());
    eventually("the filter is gone", || attempt(&pair.a, upstream4()).is_ok());
}
