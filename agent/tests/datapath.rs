//! The direct path in real network namespaces, with real programs: who reaches whom.

mod common;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use common::{World, echo, greeting, upstream};
use culvert_agent::datapath::{KernelEvent, PortKind};

const APP: u16 = 9001;
const UPSTREAM: u16 = 8080;

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

#[test]
fn an_authorised_connection_reaches_an_application_on_loopback() {
    let Some(mut world) = World::new("authorised") else { return };
    let (a, b) = (world.workload(1), world.workload(2));
    let (mut datapath, mut events) = world.load();
    datapath.attach(&a.links()).expect("attached");
    datapath.attach(&b.links()).expect("attached");
    datapath.set_ports(b.id, &[(APP, PortKind::Protected)]).expect("ports");
    let server = b.serve("127.0.0.1:9001", "b");
    let desired = BTreeMap::from([upstream(&a, local(UPSTREAM), &[b.instance(APP)])]);
    assert_eq!(datapath.apply(&desired).expect("applied").added, 1);

    let mut stream = a.connect(local(UPSTREAM)).expect("the direct path");
    assert_eq!(greeting(&mut stream), "b");
    echo(&mut stream, b"hello").expect("an echo");
    assert_eq!(stream.peer_addr().expect("a peer"), local(UPSTREAM), "the application sees what it asked for");
    let (peer, own) = server.peers()[0];
    assert_eq!((peer.ip(), own), (a.addr4.into(), (b.addr4, APP).into()));

    let opened = events.expect("open", |event| matches!(event, KernelEvent::Open(_)));
    let KernelEvent::Open(opened) = opened else { unreachable!("just matched") };
    assert_eq!((opened.source, opened.destination, opened.upstream_port), (a.id, b.id, UPSTREAM));
    drop(stream);
    let closed = events.expect("close", |event| matches!(event, KernelEvent::Close { .. }));
    let KernelEvent::Close { connection, bytes_to_destination, bytes_to_source, .. } = closed else {
        unreachable!("just matched")
    };
    assert_eq!(connection.cookie, opened.cookie);
    assert_eq!((bytes_to_destination, bytes_to_source), (5, 6));
    datapath.remove_all().expect("removed");
}

#[test]
fn an_unauthorised_connection_is_refused() {
    let Some(mut world) = World::new("unauthorised") else { return };
    let (a, b) = (world.workload(1), world.workload(2));
    let (mut datapath, mut events) = world.load();
    datapath.attach(&a.links()).expect("attached");
    datapath.attach(&b.links()).expect("attached");
    datapath.set_ports(b.id, &[(APP, PortKind::Protected)]).expect("ports");
    let everywhere = b.serve("0.0.0.0:9001", "b");
    let refused = a.connect((b.addr4, APP)).expect_err("no leave");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let refused = std::net::TcpStream::connect((b.addr4, APP)).expect_err("the host has no leave either");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    events.expect("refused", |event| {
        matches!(event, KernelEvent::Refused(packet) if packet.source == Some(a.id) && packet.destination == Some(b.id))
    });
    assert_eq!(everywhere.accepted(), 0);
    let mut own = b.connect((b.addr4, APP)).expect("a workload reaches itself");
    assert_eq!(greeting(&mut own), "b");
}
