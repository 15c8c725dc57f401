//! Leave to open one connection: given before the SYN leaves, used once, void in time, bounded in number.

mod common;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use common::{APP, PATIENCE, Pair, echo, eventually, greeting, table, upstream4, upstream6};
use culvert_agent::datapath::KernelEvent;
use culvert_ebpf_common::{Auth, FlowKey, Quota};
use socket2::{Domain, Socket, Type};

/// The upstream in each family.
fn ways() -> [SocketAddr; 2] {
    [upstream4(), upstream6()]
}

/// Any address of the same family.
fn any(like: SocketAddr, port: u16) -> SocketAddr {
    if like.is_ipv4() { (Ipv4Addr::UNSPECIFIED, port).into() } else { (Ipv6Addr::UNSPECIFIED, port).into() }
}

/// Where `b`'s application would be without the mesh, in the same family.
fn past_the_mesh(pair: &Pair, like: SocketAddr) -> SocketAddr {
    if like.is_ipv4() { (pair.b.addr4, APP).into() } else { (pair.b.addr6, APP).into() }
}

/// Starts to connect from `a` and does not wait.
fn start(pair: &Pair, to: SocketAddr, from_port: u16) -> Socket {
    pair.a.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("a flag");
        socket.bind(&any(to, from_port).into()).expect("a port");
        socket.set_nonblocking(true).expect("a flag");
        let started = socket.connect(&to.into());
        assert!(started.is_ok() || started.is_err_and(|error| error.raw_os_error() == Some(libc::EINPROGRESS)));
        socket
    })
}

/// Waits for what becomes of it.
fn finish(socket: &Socket) -> io::Result<TcpStream> {
    let mut end = None;
    eventually("connected or not", || {
        end = socket.take_error().expect("an option");
        end.is_some() || socket.peer_addr().is_ok()
    });
    if let Some(error) = end {
        return Err(error);
    }
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket.try_clone()?.into())
}

/// Authorisations that the kernel holds.
fn given(pair: &Pair) -> Vec<FlowKey> {
    table::<FlowKey, Auth>(&pair.world, "AUTH").keys().map(|key| key.expect("a key")).collect()
}

fn stay_on_one_cpu() {
    let ourselves = nix::unistd::Pid::from_raw(0);
    let allowed = nix::sched::sched_getaffinity(ourselves).expect("CPUs");
    let first = (0..nix::sched::CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false)).expect("a CPU");
    let mut one = nix::sched::CpuSet::new();
    one.set(first).expect("a CPU");
    nix::sched::sched_setaffinity(ourselves, &one).expect("an allowed CPU");
}

fn outstanding(pair: &Pair) -> i64 {
    table::<u32, Quota>(&pair.world, "QUOTA").get(&pair.a.id, 0).expect("a quota").outstanding
}

#[test]
fn leave_is_for_one_connection_and_used_up_by_it() {
    let Some(pair) = Pair::new("usedup") else { return };
    let server = pair.b.serve("[::]:9001", "b");
    for to in ways() {
        let mut stream = finish(&start(&pair, to, 40_000)).expect("the direct path");
        assert_eq!(greeting(&mut stream), "b");
        eventually("leave is used up", || given(&pair).is_empty());
        assert_eq!(outstanding(&pair), 0);

        // The very same four values, without asking for leave.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("a flag");
        drop(stream);
        let again = pair.a.run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("a flag");
            eventually("the port is free", || socket.bind(&any(to, 40_000).into()).is_ok());
            socket.connect(&past_the_mesh(&pair, to).into())
        });
        assert_eq!(again.expect_err("no leave any more").kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
    assert_eq!(server.accepted(), 2);
}

#[test]
fn a_lost_syn_is_sent_again_under_the_same_leave() {
    let Some(pair) = Pair::new("lostsyn") else { return };
    let _servers = ["127.0.0.1:9001", "[::1]:9001"].map(|address| pair.b.serve(address, "b"));
    pair.settle_neighbours();
    for to in ways() {
        pair.lose_frames(true);
        let socket = start(&pair, to, 0);
        assert_eq!(given(&pair).len(), 1);
        assert_eq!(outstanding(&pair), 1);
        pair.lose_frames(false);
        let mut stream = finish(&socket).unwrap_or_else(|error| panic!("the second SYN arrives at {to}: {error}"));
        assert_eq!(greeting(&mut stream), "b");
        eventually("leave is used up", || given(&pair).is_empty() && outstanding(&pair) == 0);
    }
}

#[test]
fn leave_expires() {
    let Some(mut pair) = Pair::with("expires", |config| config.auth_ttl = Duration::from_millis(300)) else { return };
    let server = pair.b.serve("[::]:9001", "b");
    pair.settle_neighbours();
    for to in ways() {
        pair.lose_frames(true);
        // The SYN goes again after one second.
        let socket = start(&pair, to, 0);
        std::thread::sleep(Duration::from_millis(400));
        pair.lose_frames(false);
        let refused = finish(&socket).expect_err("too late");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{to}");
        assert_eq!(server.accepted(), 0);
        let called = past_the_mesh(&pair, to);
        let fits = |event: &_| matches!(event, KernelEvent::Fail(failed) if failed.flow.destination == called);
        pair.events.expect("fail", fits);
        assert_eq!((given(&pair).len(), outstanding(&pair)), (0, 0), "a failed attempt leaves nothing");
    }
}

#[test]
fn leave_that_was_evicted_is_no_leave() {
    // Each CPU first puts what it has made in a list of its own, where others do not evict it.
    stay_on_one_cpu();
    let Some(pair) = Pair::new("evicted") else { return };
    let server = pair.b.serve("0.0.0.0:9001", "b");
    pair.settle_neighbours();
    pair.lose_frames(true);
    let socket = start(&pair, upstream4(), 0);
    let ours = given(&pair)[0];
    let mut auth = table::<FlowKey, Auth>(&pair.world, "AUTH");
    let mut filler = FlowKey { destination: IpAddr::from([10, 1, 2, 3]).into(), ..FlowKey::default() };
    for number in 0_u32.. {
        assert!(number < 2_000_000, "never evicted");
        filler.source = Ipv4Addr::from(number).into();
        auth.insert(filler, Auth::default(), 0).expect("the least recently used makes room");
        // Looking from here does not count as use.
        if number % 256 == 0 && auth.get(&ours, 0).is_err() {
            break;
        }
    }
    pair.lose_frames(false);
    assert_eq!(finish(&socket).expect_err("refused").kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(server.accepted(), 0);
}

#[test]
fn leave_ends_with_the_entry_that_gave_it_even_if_the_entry_comes_back() {
    let Some(mut pair) = Pair::new("epoch") else { return };
    let server = pair.b.serve("0.0.0.0:9001", "b");
    pair.settle_neighbours();
    pair.lose_frames(true);
    let socket = start(&pair, upstream4(), 0);
    pair.datapath.apply(&BTreeMap::new()).expect("applied");
    pair.datapath.apply(&pair.desired()).expect("applied");
    pair.lose_frames(false);
    assert_eq!(finish(&socket).expect_err("refused").kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(server.accepted(), 0);
}

#[test]
fn leave_outlives_a_change_of_other_entries_and_of_instances() {
    let Some(mut pair) = Pair::new("unchanged") else { return };
    let _server = pair.b.serve("127.0.0.1:9001", "b");
    pair.settle_neighbours();
    pair.lose_frames(true);
    let socket = start(&pair, upstream4(), 0);
    let mut desired = pair.desired();
    let other = common::upstream(&pair.b, upstream4(), &[pair.a.instance(APP)]);
    desired.insert(other.0, other.1);
    desired.values_mut().for_each(|upstream| upstream.instances.push(pair.a.instance(4)));
    let applied = pair.datapath.apply(&desired).expect("applied");
    assert_eq!((applied.removed.len(), applied.added, applied.changed), (0, 1, 2));
    pair.lose_frames(false);
    let mut stream = finish(&socket).expect("still with leave");
    assert_eq!(greeting(&mut stream), "b");
}

#[test]
fn syn_cookies_do_not_get_in_the_way() {
    let Some(pair) = Pair::new("syncookies") else { return };
    pair.b.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").expect("cookies for every SYN"));
    let server = pair.b.serve("[::]:9001", "b");
    for to in ways() {
        for _ in 0..20 {
            let mut stream = pair.a.connect(to).expect("the direct path");
            assert_eq!(greeting(&mut stream), "b");
            echo(&mut stream, b"hello").expect("an echo");
        }
        eventually("leave is used up", || given(&pair).is_empty());
        let refused = pair.a.connect(past_the_mesh(&pair, to)).expect_err("no leave");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
    assert_eq!(server.accepted(), 40);
    let sent = pair.b.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat").expect("counters"));
    let names =
        sent.lines().next().expect("names").split(' ').position(|name| name == "SyncookiesRecv").expect("a counter");
    let received: u64 =
        sent.lines().nth(1).expect("values").split(' ').nth(names).expect("a value").parse().expect("a number");
    assert!(received >= 40, "{received} cookies came back");
}

#[test]
fn half_open_connections_are_bounded_and_the_rest_is_left_to_the_proxy() {
    let Some(pair) = Pair::with("quota", |config| config.auth_cap = 3) else { return };
    let (proxy, _server) = (pair.proxy(), pair.b.serve("127.0.0.1:9001", "b"));
    pair.settle_neighbours();
    pair.lose_frames(true);
    let half_open: Vec<_> = (0..3).map(|_| start(&pair, upstream4(), 0)).collect();
    assert_eq!(outstanding(&pair), 3);
    let mut fourth = pair.a.connect(upstream4()).expect("proxied");
    assert_eq!(greeting(&mut fourth), "proxy");
    drop(half_open);
    eventually("given back", || outstanding(&pair) == 0 && given(&pair).is_empty());
    pair.lose_frames(false);
    let mut fifth = pair.a.connect(upstream4()).expect("direct again");
    assert_eq!(greeting(&mut fifth), "b");
    assert_eq!(proxy.accepted(), 1);
}

#[test]
fn a_listener_that_closes_in_between_refuses_as_ever() {
    let Some(mut pair) = Pair::new("closing") else { return };
    let listener = pair.b.run(|| TcpListener::bind("127.0.0.1:9001").expect("a port"));
    pair.settle_neighbours();
    pair.lose_frames(true);
    let socket = start(&pair, upstream4(), 0);
    drop(listener);
    pair.lose_frames(false);
    assert_eq!(finish(&socket).expect_err("refused").kind(), io::ErrorKind::ConnectionRefused);
    pair.events.expect(
        "no listener",
        |event| matches!(event, KernelEvent::NoListener(packet) if packet.destination == Some(pair.b.id)),
    );
}
