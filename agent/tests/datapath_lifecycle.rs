//! What comes and goes: listeners, agents, revocations, workloads. Programs outlive their loader, and leave nothing behind.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData};
use common::{
    APP, EchoServer, PATIENCE, Pair, World, echo, eventually, generations, greeting, links, table, upstream4, upstream6,
};
use culvert_agent::datapath::{Datapath, DatapathConfig, FlowEnds, KernelEvent, PortKind};
use culvert_ebpf_common::{
    Address, Auth, FlowKey, LAYOUT, PortKey, PortRule, Quota, Upstream, UpstreamKey, Workload, map,
};
use socket2::{Domain, Socket, Type};

#[test]
fn a_listener_that_was_there_before_the_agent_is_reached() {
    let Some(mut world) = World::new("before") else { return };
    let (a, b) = (world.workload(1), world.workload(2));
    let v4 = b.serve("127.0.0.1:9001", "before");
    let v6 = b.serve("[::1]:9001", "before");
    let (datapath, events) = world.load();
    let mut pair = Pair { datapath, events, a, b, world };
    pair.attach();
    for upstream in [upstream4(), upstream6()] {
        let mut stream = pair.a.connect(upstream).expect("the direct path");
        assert_eq!(greeting(&mut stream), "before");
    }
    assert_eq!((v4.accepted(), v6.accepted()), (1, 1));
}

#[test]
fn a_listener_may_come_go_and_come_again() {
    let Some(pair) = Pair::new("comeagain") else { return };
    let _proxy = pair.proxy();
    let way = || pair.a.connect(upstream4()).map(|mut stream| greeting(&mut stream));
    assert_eq!(way().expect("proxied"), "proxy", "nobody listens yet");
    for _ in 0..3 {
        let server = pair.b.serve("127.0.0.1:9001", "b");
        assert_eq!(way().expect("direct"), "b");
        drop(server);
        // In the moment of its end a listener refuses, as always.
        eventually("the listener is gone", || way().is_ok_and(|way| way == "proxy"));
    }
}

#[test]
fn members_of_a_reuseport_group_stand_in_for_each_other() {
    let Some(pair) = Pair::new("reuseport") else { return };
    let _proxy = pair.proxy();
    let listen = || {
        pair.b.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_reuse_port(true).expect("a flag");
            socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, APP)).into()).expect("a port");
            socket.listen(16).expect("listening");
            EchoServer::start(TcpListener::from(socket), "member")
        })
    };
    let mut members: Vec<_> = (0..6).map(|_| listen()).collect();
    for _ in 0..5 {
        members.remove(0);
        // The last ones were crowded out of the table, and are found by a search.
        eventually("a member answers", || {
            pair.a
                .connect(upstream4())
                .is_ok_and(|mut stream| stream.read(&mut [0; 1]).is_ok_and(|length| length == 1) && is_direct(&stream))
        });
    }
}

/// Did the connection leave the workload, whatever its peer's address is said to be?
fn is_direct(stream: &TcpStream) -> bool {
    stream.local_addr().is_ok_and(|own| !own.ip().is_loopback())
}

/// Connections that are made one after the other, as long as it lives.
struct Traffic {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    thread: JoinHandle<Vec<String>>,
}

impl Traffic {
    /// Direct ones.
    fn start(pair: &Pair) -> Self {
        Self::begin(pair, true)
    }

    /// Direct or proxied ones.
    fn either(pair: &Pair) -> Self {
        Self::begin(pair, false)
    }

    fn begin(pair: &Pair, direct: bool) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let netns = fs::File::open(format!("/run/netns/{}", pair.a.netns_name)).expect("a namespace");
        let thread = thread::spawn({
            let (stop, made) = (Arc::clone(&stop), Arc::clone(&made));
            move || {
                common::enter(&netns);
                let mut failures = Vec::new();
                while !stop.load(Ordering::SeqCst) {
                    if let Err(error) = one_connection(direct) {
                        failures.push(format!("connection {}: {error}", made.load(Ordering::SeqCst)));
                    }
                    made.fetch_add(1, Ordering::SeqCst);
                }
                failures
            }
        });
        Self { stop, made, thread }
    }

    /// Waits until so many more were made.
    fn more(&self, count: usize) {
        let target = self.made.load(Ordering::SeqCst) + count;
        eventually("traffic flows", || self.made.load(Ordering::SeqCst) >= target);
    }

    /// Ends it; no connection may have failed.
    fn finish(self) {
        self.stop.store(true, Ordering::SeqCst);
        let failures = self.thread.join().expect("no panic");
        assert!(failures.is_empty(), "of {}: {failures:#?}", self.made.load(Ordering::SeqCst));
    }
}

fn one_connection(direct: bool) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&upstream4(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut first = [0; 1];
    stream.read_exact(&mut first)?;
    if &first != b"b" {
        return Err(io::Error::other("not the application"));
    }
    if direct && !is_direct(&stream) {
        return Err(io::Error::other("not direct"));
    }
    echo(&mut stream, b"hello")
}

#[test]
fn connections_go_on_while_agents_come_and_go() {
    let Some(mut world) = World::new("restarts") else { return };
    let (a, b) = (world.workload(1), world.workload(2));
    let _server = b.serve("127.0.0.1:9001", "b");
    let config = world.config();

    // An agent that is killed without warning.
    let mut agent = Agent::start(&config, &[&a.netns_name, &b.netns_name]);
    let lasting = a.connect(upstream4()).expect("the direct path");
    agent.kill();
    let mut stream = a.connect(upstream4()).expect("the programs go on without an agent");
    assert_eq!(greeting(&mut stream), "b");
    let (datapath, events) = world.load();
    let mut pair = Pair { datapath, events, a, b, world };
    let traffic = Traffic::start(&pair);
    traffic.more(20);
    pair.attach();
    traffic.more(20);
    for _ in 0..5 {
        pair = pair.reload();
        traffic.more(20);
    }
    drop((pair.datapath, pair.events));
    let mut agent = Agent::start(&config, &[&pair.a.netns_name, &pair.b.netns_name]);
    traffic.more(20);
    agent.kill();
    traffic.more(20);
    let (datapath, events) = pair.world.load();
    let mut pair = Pair { datapath, events, a: pair.a, b: pair.b, world: pair.world };
    traffic.more(20);
    pair.attach();
    traffic.finish();

    assert_eq!(generations(&pair.world).len(), 1, "one generation");
    assert_eq!(links(&pair.world).len(), pair.links_expected(), "one link of each kind");
    let mut lasting = lasting;
    assert_eq!(greeting(&mut lasting), "b");
    assert_eq!(lasting.peer_addr().expect("a peer"), upstream4());
    echo(&mut lasting, b"still here").expect("a connection outlives its agents");
    let cookie = rustix::net::sockopt::socket_cookie(&lasting).expect("a cookie");
    drop(lasting);
    let closed = pair.events.expect(
        "the close is told to the last agent",
        |event| matches!(event, KernelEvent::Close { connection, .. } if connection.cookie == cookie),
    );
    let KernelEvent::Close { bytes_to_destination, bytes_to_source, .. } = closed else { unreachable!("just matched") };
    assert_eq!((bytes_to_destination, bytes_to_source), (10, 11));
}

#[test]
fn programs_of_another_layout_are_replaced_without_a_failed_connection() {
    let Some(pair) = Pair::new("layout") else { return };
    let _proxy = EchoServer::start(pair.a.run(|| TcpListener::bind(upstream4()).expect("a port")), "b");
    let _server = pair.b.serve("127.0.0.1:9001", "b");
    let traffic = Traffic::either(&pair);
    traffic.more(20);
    let Pair { datapath, events, a, b, world } = pair;
    drop((datapath, events));
    let bpf_dir = world.config().bpf_dir;
    fs::rename(bpf_dir.join(format!("v{LAYOUT}-1")), bpf_dir.join("v0-1")).expect("as if of another layout");
    traffic.more(20);
    let (datapath, events) = world.load();
    traffic.more(20);
    let mut pair = Pair { datapath, events, a, b, world };
    assert_eq!(generations(&pair.world).len(), 2);
    pair.attach();
    traffic.more(20);
    pair.datapath.finish_takeover().expect("taken over");
    traffic.more(20);
    traffic.finish();
    assert_eq!(generations(&pair.world), [bpf_dir.join(format!("v{LAYOUT}-2"))]);
    assert_eq!(links(&pair.world).len(), pair.links_expected());
}

#[test]
fn programs_of_another_layout_let_nothing_through_and_go_on_keeping_out() {
    let Some(pair) = Pair::new("layoutvoid") else { return };
    let (_proxy, _server) = (pair.proxy(), pair.b.serve("0.0.0.0:9001", "b"));
    let way = |a: &common::TestWorkload| a.connect(upstream4()).map(|mut stream| greeting(&mut stream));
    assert_eq!(way(&pair.a).expect("direct"), "b");
    let Pair { datapath, events, a, b, world } = pair;
    drop((datapath, events));
    let bpf_dir = world.config().bpf_dir;
    fs::rename(bpf_dir.join(format!("v{LAYOUT}-1")), bpf_dir.join("v0-1")).expect("as if of another layout");
    assert_eq!(way(&a).expect("direct"), "b", "as long as no agent is there");
    let (mut datapath, _events) = world.load();
    assert_eq!(way(&a).expect("proxied"), "proxy", "nobody keeps that leave in line with policy");
    // One of them cannot come up under the new programs; the other has, and the tables are in line.
    datapath.attach(&a.links()).expect("attached");
    datapath.apply(&BTreeMap::new()).expect("applied");
    assert_eq!(way(&a).expect("proxied"), "proxy");
    let refused = a.connect((b.addr4, APP)).expect_err("guarded by the former programs");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(generations(&world).len(), 2);
}

#[test]
fn no_connection_fails_while_the_path_changes() {
    let Some(mut pair) = Pair::new("switch") else { return };
    let _proxy = EchoServer::start(pair.a.run(|| TcpListener::bind(upstream4()).expect("a port")), "b");
    let _server = pair.b.serve("127.0.0.1:9001", "b");
    let traffic: Vec<_> = (0..3).map(|_| Traffic::either(&pair)).collect();
    for _ in 0..100 {
        pair.datapath.apply(&BTreeMap::new()).expect("applied");
        traffic[0].more(1);
        pair.datapath.apply(&pair.desired()).expect("applied");
        traffic[1].more(1);
    }
    traffic.into_iter().for_each(Traffic::finish);
    let opened = pair.events.drain().iter().filter(|event| matches!(event, KernelEvent::Open(_))).count();
    assert!(opened > 0, "some went direct");
    let failed: Vec<_> = pair.events.drain().iter().filter(|event| matches!(event, KernelEvent::Fail(_))).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

/// An agent in a process of its own, to be killed.
struct Agent(Child);

impl Agent {
    fn start(config: &DatapathConfig, netns: &[&str]) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "agent_process", "--ignored", "--nocapture"])
            .env("DATAPATH_BPF_DIR", &config.bpf_dir)
            .env("DATAPATH_CGROUP", &config.cgroup)
            .env("DATAPATH_NETNS", netns.join(","))
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = lines.any(|line| line.is_ok_and(|line| line.contains("agent ready")));
        assert!(ready, "the agent came up");
        Self(child)
    }

    /// `kill -9`.
    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("waited for");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Not a test: the process behind [`Agent`].
#[test]
#[ignore = "started by other tests"]
fn agent_process() {
    let (Some(bpf_dir), Some(cgroup)) = (std::env::var_os("DATAPATH_BPF_DIR"), std::env::var_os("DATAPATH_CGROUP"))
    else {
        return;
    };
    let netns = std::env::var("DATAPATH_NETNS").expect("namespaces");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _guard = runtime.enter();
    let config = DatapathConfig::new(bpf_dir.into(), cgroup.into());
    let (mut datapath, _events) = Datapath::load(&config).expect("loaded");
    let workloads: Vec<_> =
        (1..).zip(netns.split(',')).map(|(id, name)| common::TestWorkload::existing(id, name)).collect();
    for workload in &workloads {
        datapath.attach(&workload.links()).expect("attached");
    }
    datapath.set_ports(2, &[(APP, PortKind::Protected)]).expect("ports");
    let instances = [workloads[1].instance(APP)];
    let desired = [upstream4(), upstream6()].map(|address| common::upstream(&workloads[0], address, &instances));
    datapath.apply(&BTreeMap::from(desired)).expect("applied");
    println!("agent ready");
    loop {
        thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn a_revocation_ends_live_connections_at_both_ends() {
    let Some(mut pair) = Pair::new("revoke") else { return };
    let listener = pair.b.run(|| TcpListener::bind("[::]:9001").expect("a port"));
    let mut accepted: Vec<TcpStream> = Vec::new();
    let mut streams = Vec::new();
    let mapped = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), common::UPSTREAM));
    for upstream in [upstream4(), upstream6(), mapped] {
        let stream = pair.a.run(|| {
            let socket = Socket::new(Domain::for_address(upstream), Type::STREAM, None).expect("a socket");
            socket.connect(&upstream.into()).expect("the direct path");
            TcpStream::from(socket)
        });
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        streams.push(stream);
        accepted.push(listener.accept().expect("accepted").0);
        accepted.last().expect("just pushed").set_read_timeout(Some(PATIENCE)).expect("a limit");
    }
    // An unrelated connection of the same two workloads.
    let _other = pair.b.serve("0.0.0.0:9009", "other");
    let mut unrelated = pair.a.connect((pair.b.addr4, 9009)).expect("not guarded");
    assert_eq!(greeting(&mut unrelated), "other");

    let applied = pair.datapath.apply(&BTreeMap::new()).expect("applied");
    let ends = applied.removed.iter().flat_map(|removed| removed.ends()).collect();
    assert_eq!(ends, pair.ends());
    let began = Instant::now();
    assert!(pair.datapath.destroy_flows(&ends).expect("destroyed") >= 3);
    for stream in &mut streams {
        let error = stream.read(&mut [0; 1]).expect_err("ended");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }
    for stream in &mut accepted {
        let error = stream.read(&mut [0; 1]).expect_err("ended");
        assert!(matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted), "{error}");
    }
    // A second is what is promised; anything near the limit of patience would be a hang.
    assert!(began.elapsed() < PATIENCE / 2, "{:?}", began.elapsed());
    echo(&mut unrelated, b"hello").expect("others are left alone");
    assert_eq!(pair.datapath.destroy_flows(&ends).expect("destroyed"), 0);
    let nobody = [FlowEnds { source: 77, destination: 78, port: 1 }].into();
    assert_eq!(pair.datapath.destroy_flows(&nobody).expect("nobody is attached"), 0);
    for _ in 0..3 {
        pair.events.expect("close", |event| matches!(event, KernelEvent::Close { .. }));
    }
}

#[test]
fn a_connection_that_is_still_opening_is_ended_too() {
    let Some(mut pair) = Pair::new("revokeopening") else { return };
    let server = pair.b.serve("127.0.0.1:9001", "b");
    pair.settle_neighbours();
    pair.lose_frames(true);
    let attempt = pair.a.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_nonblocking(true).expect("a flag");
        socket.connect(&upstream4().into()).expect_err("in progress");
        socket
    });
    pair.datapath.apply(&BTreeMap::new()).expect("applied");
    assert_eq!(pair.datapath.destroy_flows(&pair.ends()).expect("destroyed"), 1);
    pair.lose_frames(false);
    let mut error = None;
    eventually("the attempt ends", || {
        error = attempt.take_error().expect("an option");
        error.is_some()
    });
    assert_eq!(error.expect("just seen").kind(), io::ErrorKind::ConnectionAborted);
    assert_eq!(server.accepted(), 0);
}

/// Every table of the generation, but for the settings, is empty.
fn assert_tables_are_empty(world: &World) {
    fn count<K: aya::Pod, V: aya::Pod>(world: &World, name: &str) -> usize {
        table::<K, V>(world, name).keys().count()
    }
    let counts = [
        (map::UPSTREAM, count::<UpstreamKey, Upstream>(world, map::UPSTREAM)),
        (map::AUTH, count::<FlowKey, Auth>(world, map::AUTH)),
        (map::WORKLOAD_IF, count::<u32, Workload>(world, map::WORKLOAD_IF)),
        (map::WORKLOAD_NETNS, count::<u64, Workload>(world, map::WORKLOAD_NETNS)),
        (map::WORKLOAD_ADDR, count::<Address, Workload>(world, map::WORKLOAD_ADDR)),
        (map::PORTS, count::<PortKey, PortRule>(world, map::PORTS)),
        (map::QUOTA, count::<u32, Quota>(world, map::QUOTA)),
        (map::LISTENERS, sockets(world, map::LISTENERS)),
        (map::STEERED, sockets(world, map::STEERED)),
    ];
    for (name, count) in counts {
        assert_eq!(count, 0, "{name}");
    }
}

fn sockets(world: &World, name: &str) -> usize {
    let generation = generations(world).pop().expect("a generation");
    let map = MapData::from_pin(generation.join("maps").join(name)).expect("a pinned map");
    let map: aya::maps::SockHash<_, culvert_ebpf_common::ListenerKey> =
        Map::SockHash(map).try_into().expect("its type");
    map.keys().count()
}

#[test]
fn a_deleted_workload_leaves_nothing() {
    let Some(mut pair) = Pair::new("deleted") else { return };
    let server = pair.b.serve("127.0.0.1:9001", "b");
    let worker = pair.b.serve("[::]:21000", "worker");
    pair.datapath.set_ports(pair.b.id, &[(APP, PortKind::Protected), (21_000, PortKind::Steered)]).expect("ports");
    pair.datapath.steer(pair.b.id, 21_000, worker.descriptor()).expect("steered");
    let mut stream = pair.a.connect(upstream4()).expect("the direct path");
    assert_eq!(greeting(&mut stream), "b");
    assert!(sockets(&pair.world, map::LISTENERS) > 0 && sockets(&pair.world, map::STEERED) > 0);

    // The namespaces go first, as after a crash: the sockets in them with the processes.
    let Pair { mut datapath, events, a, b, mut world } = pair;
    drop((stream, server, worker));
    let (first, second) = (a.id, b.id);
    world.delete(a);
    world.delete(b);
    eventually("the veths went with the namespaces", || {
        let links = common::output("ip", &["-o", "link", "show"]);
        links.contains("br0") && !links.contains(" v1@") && !links.contains(" v2@")
    });
    assert_eq!(datapath.retain(&[]).expect("detached"), [first, second]);
    assert_tables_are_empty(&world);
    assert_eq!(links(&world).len(), 5, "only those of the cgroup: {:?}", links(&world));
    drop(events);
    datapath.remove_all().expect("removed");
    assert!(generations(&world).is_empty());
}

#[test]
fn nothing_of_ours_is_left_in_the_kernel_after_the_end() {
    let Some(pair) = Pair::new("nothingleft") else { return };
    let server = pair.b.serve("127.0.0.1:9001", "b");
    let mut stream = pair.a.connect(upstream4()).expect("the direct path");
    assert_eq!(greeting(&mut stream), "b");
    let ours = pair.program_ids();
    assert!(ours.len() >= 6, "one program of each kind is attached: {ours:?}");
    let Pair { datapath, events, a, b: _b, world } = pair;
    drop(events);
    datapath.remove_all().expect("removed");
    assert!(generations(&world).is_empty());
    eventually("the programs are unloaded", || {
        aya::programs::loaded_programs().flatten().all(|program| !ours.contains(&program.id()))
    });
    echo(&mut stream, b"hello").expect("a live connection is ordinary TCP and goes on");
    a.connect(upstream4()).expect_err("nobody redirects any more");
    assert_eq!(server.accepted(), 1);
}

#[test]
fn a_workload_that_comes_back_with_other_addresses_leaves_no_trace_of_the_old_ones() {
    let Some(mut pair) = Pair::new("comesback") else { return };
    let mut other = pair.world.workload(9);
    other.id = pair.b.id;
    pair.datapath.attach(&other.links()).expect("attached anew under its id");
    let addresses: Vec<Address> =
        table::<Address, Workload>(&pair.world, map::WORKLOAD_ADDR).keys().map(|key| key.expect("a key")).collect();
    assert_eq!(addresses.len(), 4);
    assert!(!addresses.contains(&pair.b.addr4.into()) && addresses.contains(&other.addr4.into()));
    assert_eq!(table::<u32, Workload>(&pair.world, map::WORKLOAD_IF).keys().count(), 2);
    assert_eq!(table::<u64, Workload>(&pair.world, map::WORKLOAD_NETNS).keys().count(), 2);
}

#[test]
fn a_node_that_cannot_says_why_and_keeps_nothing() {
    let Some(pair) = Pair::new("cannot") else { return };
    let (_proxy, _server) = (pair.proxy(), pair.b.serve("127.0.0.1:9001", "b"));
    let mut stream = pair.a.connect(upstream4()).expect("the direct path");
    assert_eq!(greeting(&mut stream), "b");
    let Pair { datapath, events, a, b: _b, world } = pair;
    drop((datapath, events));
    let directory = tempfile::tempdir().expect("a directory");
    let config = DatapathConfig { cgroup: directory.path().to_owned(), ..world.config() };
    let _runtime = world.runtime().enter();
    let unavailable = Datapath::load(&config).expect_err("no cgroup");
    assert!(unavailable.to_string().contains("not a cgroup of version 2"), "{unavailable}");
    assert!(generations(&world).is_empty(), "what an earlier agent had allowed is allowed no more");
    let mut proxied = a.connect(upstream4()).expect("proxied");
    assert_eq!(greeting(&mut proxied), "proxy");
}
