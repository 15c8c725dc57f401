//! A small world for tests of the data path: a node with a bridge and workloads behind veths, all in network namespaces that carry the
//! test's name, and a cgroup and a directory of pins of its own. A guard removes them; leftovers of a run that was killed go first.
//!
//! The test's process moves into the cgroup, and its threads into the namespaces: a socket belongs to the cgroup and the namespace that
//! it was made in. The thread that makes the world stays in the node's namespace.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

pub mod frames;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use culvert_agent::datapath::{
    Datapath, DatapathConfig, FlowEnds, Instance, KernelEvent, PortKind, TcMode, Upstream, UpstreamKey, WorkloadLinks,
    unified_root,
};
use nix::sched::{CloneFlags, setns};
use tokio::sync::mpsc;

/// How long anything that must happen may take on a slow, busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One world at a time per process: the process can be in one cgroup only.
static WORLD: Mutex<()> = Mutex::new(());

/// A node with its bridge.
pub struct World {
    name: String,
    cgroup: PathBuf,
    former_cgroup: PathBuf,
    host: File,
    workloads: Vec<String>,
    pub runtime: Option<tokio::runtime::Runtime>,
    _alone: MutexGuard<'static, ()>,
}

/// A namespace on the bridge.
pub struct TestWorkload {
    pub id: u32,
    pub ifindex: u32,
    pub addr4: Ipv4Addr,
    pub addr6: Ipv6Addr,
    pub mac: [u8; 6],
    netns: File,
    pub netns_name: String,
}

impl World {
    /// Makes the world of the test `name`. Without root the test is skipped, loudly; under CI that is a failure.
    pub fn new(name: &str) -> Option<Self> {
        let alone = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "{name} needs root, and must not be skipped under CI");
            eprintln!("SKIPPED: {name} needs root");
            return None;
        }
        let unified = unified_root().expect("cgroup2 is mounted");
        let former = fs::read_to_string("/proc/self/cgroup").expect("our cgroup");
        let former = former.lines().find_map(|line| line.strip_prefix("0::")).expect("our cgroup of version 2");
        let mut world = Self {
            name: format!("dp-{name}"),
            cgroup: unified.join(format!("culvert-test-{name}")),
            former_cgroup: unified.join(former.trim_start_matches('/')),
            host: File::open("/proc/thread-self/ns/net").expect("our network namespace"),
            workloads: Vec::new(),
            runtime: None,
            _alone: alone,
        };
        world.remove_leftovers();
        ip(&format!("netns add {}-node", world.name));
        enter(&netns_file(&format!("{}-node", world.name)));
        for line in [
            "link set lo up",
            "link add br0 type bridge",
            "addr add 10.77.0.1/24 dev br0",
            "addr add fd77::1/64 dev br0 nodad",
            "link set br0 up",
        ] {
            ip(line);
        }
        fs::create_dir_all(&world.cgroup).expect("a cgroup");
        join_cgroup(&world.cgroup);
        world.restart_runtime();
        Some(world)
    }

    /// Ends every task of the world, as the end of a process does.
    pub fn restart_runtime(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        self.runtime = Some(runtime.expect("a runtime"));
    }

    /// The cgroup of the world.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Configuration of the datapath in this world.
    pub fn config(&self) -> DatapathConfig {
        DatapathConfig::new(PathBuf::from(format!("/sys/fs/bpf/culvert-test-{}", self.name)), self.cgroup.clone())
    }

    /// Loads the programs.
    pub fn load(&self) -> (Datapath, Events) {
        self.load_with(&self.config())
    }

    /// Loads the programs with settings of the test's own.
    pub fn load_with(&self, config: &DatapathConfig) -> (Datapath, Events) {
        let _runtime = self.runtime().enter();
        let (datapath, events) = Datapath::load(config).expect("this kernel has all that the direct path needs");
        (datapath, Events { events, seen: Vec::new() })
    }

    pub fn runtime(&self) -> &tokio::runtime::Runtime {
        self.runtime.as_ref().expect("made with the world")
    }

    /// Adds a workload, `id` from 1 to 200.
    pub fn workload(&mut self, id: u32) -> TestWorkload {
        let netns = format!("{}-{id}", self.name);
        let (addr4, addr6) = (Ipv4Addr::new(10, 77, 0, 100 + id as u8), format!("fd77::{}", 100 + id));
        ip(&format!("netns add {netns}"));
        self.workloads.push(netns.clone());
        ip(&format!("link add v{id} type veth peer name eth0 address 02:00:00:00:77:{id:02x} netns {netns}"));
        ip(&format!("link set v{id} master br0 up"));
        for line in [
            "link set lo up".to_owned(),
            "link set eth0 up".to_owned(),
            format!("addr add {addr4}/24 dev eth0"),
            format!("addr add {addr6}/64 dev eth0 nodad"),
            "route add default via 10.77.0.1".to_owned(),
        ] {
            ip(&format!("-n {netns} {line}"));
        }
        TestWorkload::existing(id, &netns)
    }

    /// Deletes a workload's namespace.
    pub fn delete(&mut self, workload: TestWorkload) {
        let name = workload.netns_name.clone();
        drop(workload);
        ip(&format!("netns del {name}"));
        self.workloads.retain(|other| *other != name);
    }

    fn remove_leftovers(&self) {
        let listing = output("ip", &["netns", "list"]);
        for name in listing.lines().filter_map(|line| line.split(' ').next()) {
            if name.strip_prefix(&self.name).is_some_and(|rest| rest.starts_with('-')) {
                ip(&format!("netns del {name}"));
            }
        }
        remove_pins(&self.config().bpf_dir);
        remove_cgroup(&self.cgroup);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        join_cgroup(&self.former_cgroup);
        enter(&self.host);
        for name in self.workloads.iter().chain([&format!("{}-node", self.name)]) {
            Command::new("ip").args(["netns", "del", name]).status().ok();
        }
        remove_pins(&self.config().bpf_dir);
        // Sockets that are still closing hold the cgroup for a moment.
        eventually("the cgroup is empty", || remove_cgroup(&self.cgroup));
    }
}

impl TestWorkload {
    /// A workload that another process of the test has made, from its namespace's name.
    pub fn existing(id: u32, netns_name: &str) -> Self {
        Self {
            id,
            ifindex: nix::net::if_::if_nametoindex(format!("v{id}").as_str()).expect("the veth"),
            addr4: Ipv4Addr::new(10, 77, 0, 100 + id as u8),
            addr6: format!("fd77::{}", 100 + id).parse().expect("an address"),
            mac: [2, 0, 0, 0, 0x77, id as u8],
            netns: netns_file(netns_name),
            netns_name: netns_name.to_owned(),
        }
    }

    /// What the datapath needs to know.
    pub fn links(&self) -> WorkloadLinks {
        WorkloadLinks {
            id: self.id,
            netns: PathBuf::from(format!("/run/netns/{}", self.netns_name)),
            host_ifindex: self.ifindex,
            addr4: self.addr4,
            addr6: Some(self.addr6),
            mac: self.mac,
        }
    }

    pub fn netns_fd(&self) -> OwnedFd {
        self.netns.try_clone().expect("a descriptor").into()
    }

    /// This workload as an instance with its application on `port`.
    pub fn instance(&self, port: u16) -> Instance {
        Instance { workload: self.id, addr4: self.addr4, addr6: Some(self.addr6), port }
    }

    /// Does something inside the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(&self.netns);
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Connects from inside, blocking, with a limit.
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        self.run(|| {
            let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
    }

    /// An application that answers each connection with `greeting`, then echoes.
    pub fn serve(&self, address: &str, greeting: &'static str) -> EchoServer {
        let listener = self.run(|| TcpListener::bind(address).expect("a free port"));
        EchoServer::start(listener, greeting)
    }

    pub fn ip(&self, line: &str) {
        ip(&format!("-n {} {line}", self.netns_name));
    }
}

/// An application: greets, then echoes.
pub struct EchoServer {
    listener: TcpListener,
    accepted: Arc<AtomicUsize>,
    peers: Arc<Mutex<Vec<(SocketAddr, SocketAddr)>>>,
}

impl EchoServer {
    pub fn start(listener: TcpListener, greeting: &'static str) -> Self {
        let accepted = Arc::new(AtomicUsize::new(0));
        let peers = Arc::new(Mutex::new(Vec::new()));
        let server = Self {
            listener: listener.try_clone().expect("a descriptor"),
            accepted: Arc::clone(&accepted),
            peers: Arc::clone(&peers),
        };
        thread::spawn(move || {
            while let Ok((mut stream, peer)) = listener.accept() {
                accepted.fetch_add(1, Ordering::SeqCst);
                if let Ok(local) = stream.local_addr() {
                    peers.lock().expect("no panic").push((peer, local));
                }
                thread::spawn(move || {
                    stream.set_nodelay(true).ok();
                    if stream.write_all(greeting.as_bytes()).is_ok() {
                        let mut reader = stream.try_clone().expect("a descriptor");
                        io::copy(&mut reader, &mut stream).ok();
                    }
                    stream.shutdown(Shutdown::Write).ok();
                });
            }
        });
        server
    }

    /// The listening socket.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Peer and own address of every accepted connection.
    pub fn peers(&self) -> Vec<(SocketAddr, SocketAddr)> {
        self.peers.lock().expect("no panic").clone()
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        // Wakes the accepting thread, which then closes its copy.
        socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both).ok();
    }
}

/// Reads the greeting.
pub fn greeting(stream: &mut TcpStream) -> String {
    let mut buffer = [0; 64];
    let length = stream.read(&mut buffer).expect("a greeting");
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// Sends and expects the same back.
pub fn echo(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    stream.write_all(message)?;
    let mut back = vec![0; message.len()];
    stream.read_exact(&mut back)?;
    assert_eq!(back, message, "the echo differs");
    Ok(())
}

/// Kernel events, remembered.
pub struct Events {
    pub events: mpsc::Receiver<KernelEvent>,
    pub seen: Vec<KernelEvent>,
}

impl Events {
    /// Waits for an event that fits.
    pub fn expect(&mut self, what: &str, fits: impl Fn(&KernelEvent) -> bool) -> KernelEvent {
        let deadline = Instant::now() + PATIENCE;
        let mut looked = 0;
        loop {
            while let Ok(event) = self.events.try_recv() {
                self.seen.push(event);
            }
            if let Some(event) = self.seen[looked..].iter().find(|event| fits(event)) {
                return *event;
            }
            looked = self.seen.len();
            assert!(Instant::now() < deadline, "no event: {what}; seen: {:#?}", self.seen);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Events so far.
    pub fn drain(&mut self) -> &[KernelEvent] {
        while let Ok(event) = self.events.try_recv() {
            self.seen.push(event);
        }
        &self.seen
    }
}

/// An upstream entry: from `address` in the workload to `instances`.
pub fn upstream(
    workload: &TestWorkload,
    address: impl Into<SocketAddr>,
    instances: &[Instance],
) -> (UpstreamKey, Upstream) {
    let key = UpstreamKey { workload: workload.id, address: address.into() };
    (key, Upstream { service: 1, instances: instances.to_vec(), not_after: None })
}

/// Tries until it holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Runs `ip`.
pub fn ip(line: &str) {
    let result = Command::new("ip").args(line.split(' ')).output().expect("ip (iproute2) is installed");
    assert!(result.status.success(), "ip {line}: {}", String::from_utf8_lossy(&result.stderr));
}

/// What a program prints.
pub fn output(program: &str, arguments: &[&str]) -> String {
    let result = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    String::from_utf8_lossy(&result.stdout).into_owned()
}

/// Moves the calling thread into a network namespace.
pub fn enter(netns: &File) {
    setns(netns, CloneFlags::CLONE_NEWNET).expect("a network namespace can be entered");
}

fn netns_file(name: &str) -> File {
    File::open(format!("/run/netns/{name}")).expect("a named network namespace")
}

pub fn join_cgroup(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).expect("the cgroup can be joined");
}

/// Removes a cgroup and those below it; is it gone?
fn remove_cgroup(cgroup: &Path) -> bool {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    !cgroup.exists() || fs::remove_dir(cgroup).is_ok()
}

fn remove_pins(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_pins(&entry.path());
        } else {
            fs::remove_file(entry.path()).ok();
        }
    }
    fs::remove_dir(directory).ok();
}

/// Port of the application in [`Pair`].
pub const APP: u16 = 9001;
/// Port of the upstream in [`Pair`].
pub const UPSTREAM: u16 = 8080;

/// The upstream's address in the calling workload.
pub fn upstream4() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, UPSTREAM).into()
}

/// The same, in IPv6.
pub fn upstream6() -> SocketAddr {
    (Ipv6Addr::LOCALHOST, UPSTREAM).into()
}

/// Two workloads: `a` may call `b`'s application through its upstream, directly, over both families.
pub struct Pair {
    pub datapath: Datapath,
    pub events: Events,
    pub a: TestWorkload,
    pub b: TestWorkload,
    pub world: World,
}

impl Pair {
    pub fn new(name: &str) -> Option<Self> {
        Self::with(name, |_| {})
    }

    /// With settings of the test's own.
    pub fn with(name: &str, settings: impl FnOnce(&mut DatapathConfig)) -> Option<Self> {
        let mut world = World::new(name)?;
        let (a, b) = (world.workload(1), world.workload(2));
        let mut config = world.config();
        settings(&mut config);
        let (datapath, events) = world.load_with(&config);
        let mut pair = Self { datapath, events, a, b, world };
        pair.attach();
        Some(pair)
    }

    /// Attaches both, guards the application, opens the upstream.
    pub fn attach(&mut self) {
        self.datapath.attach(&self.a.links()).expect("attached");
        self.datapath.attach(&self.b.links()).expect("attached");
        self.datapath.set_ports(self.b.id, &[(APP, PortKind::Protected)]).expect("ports");
        self.datapath.apply(&self.desired()).expect("applied");
    }

    /// Replaces the datapath by one that is loaded now, as the next agent does.
    pub fn reload(self) -> Self {
        let Self { datapath, events, a, b, world } = self;
        drop((datapath, events));
        let (datapath, events) = world.load();
        let mut pair = Self { datapath, events, a, b, world };
        pair.attach();
        pair
    }

    /// The upstream in both families.
    pub fn desired(&self) -> BTreeMap<UpstreamKey, Upstream> {
        let instances = [self.b.instance(APP)];
        BTreeMap::from([upstream(&self.a, upstream4(), &instances), upstream(&self.a, upstream6(), &instances)])
    }

    /// How many links hold programs: five on the cgroup, and per workload one in its namespace and two at its veth; without tcx
    /// the latter are filters, not links.
    pub fn links_expected(&self) -> usize {
        5 + 2 * if self.datapath.tc_mode() == TcMode::Tcx { 3 } else { 1 }
    }

    /// Ids of the programs that links hold.
    pub fn program_ids(&self) -> Vec<u32> {
        let directory = generations(&self.world).pop().expect("a generation").join("links");
        let links = fs::read_dir(directory).expect("links").flatten();
        let mut ids: Vec<u32> = links
            .map(|entry| {
                let link = aya::programs::links::PinnedLink::from_pin(entry.path()).expect("a pinned link");
                aya::programs::links::FdLink::from(link).info().expect("its description").program_id()
            })
            .collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Between whom connections live.
    pub fn ends(&self) -> BTreeSet<FlowEnds> {
        BTreeSet::from([FlowEnds { source: self.a.id, destination: self.b.id, port: APP }])
    }

    /// What listens where the worker would: connections that do not take the direct path end here.
    pub fn proxy(&self) -> EchoServer {
        self.a.serve("127.0.0.1:8080", "proxy")
    }

    /// Frames to `b` find their way without asking: a lost answer would delay the test.
    pub fn settle_neighbours(&self) {
        for (workload, other) in [(&self.a, &self.b), (&self.b, &self.a)] {
            let mac = other.mac.map(|byte| format!("{byte:02x}")).join(":");
            for address in [IpAddr::from(other.addr4), other.addr6.into()] {
                workload.ip(&format!("neigh replace {address} lladdr {mac} dev eth0 nud permanent"));
            }
        }
    }

    /// Loses every frame to and from `b`, or no more.
    pub fn lose_frames(&self, lose: bool) {
        ip(&format!("link set v{} {}", self.b.id, if lose { "down" } else { "up" }));
    }
}

/// A pinned table of the world, as the kernel holds it.
pub fn table<K: aya::Pod, V: aya::Pod>(world: &World, name: &str) -> aya::maps::HashMap<aya::maps::MapData, K, V> {
    let generation = generations(world).pop().expect("a generation");
    let map = aya::maps::MapData::from_pin(generation.join("maps").join(name)).expect("a pinned map");
    let map = if name == "AUTH" { aya::maps::Map::LruHashMap(map) } else { aya::maps::Map::HashMap(map) };
    map.try_into().expect("a table of this type")
}

/// The pinned table of listening applications.
pub fn listeners(world: &World) -> aya::maps::SockHash<aya::maps::MapData, culvert_ebpf_common::ListenerKey> {
    let generation = generations(world).pop().expect("a generation");
    let map = aya::maps::MapData::from_pin(generation.join("maps").join("LISTENERS")).expect("a pinned map");
    aya::maps::Map::SockHash(map).try_into().expect("a table of sockets")
}

/// Directories of pins, oldest first.
pub fn generations(world: &World) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.config().bpf_dir).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries.map(|entry| entry.path()).collect();
    found.sort_by_key(|path| path.to_string_lossy().rsplit('-').next().and_then(|number| number.parse::<u64>().ok()));
    found
}

/// Names of pinned links.
pub fn links(world: &World) -> Vec<String> {
    let directories = generations(world).into_iter().filter_map(|path| fs::read_dir(path.join("links")).ok());
    let mut names: Vec<_> =
        directories.flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}
