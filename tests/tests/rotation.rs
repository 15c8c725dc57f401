//! The root is replaced under traffic, and every leaf by it or by its age, on both paths at once: no byte and no connection is lost.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use culvert_control::ca::{Authority, CaSettings, Clock};
use culvert_control::state::Ledger;
use culvert_control::store::RedbStore;
use culvert_tests::{
    App, Apps, DATA_DIR, Node, NodeOptions, Server, World, calls, echo, eventually, group, is_direct, service, wants,
};
use culvert_types::Datacenter;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

/// What is waited for comes by the clock, also on a slow machine: leaves are renewed within half a minute.
const PATIENCE: Duration = Duration::from_secs(120);

/// One of the two called services, as the caller sees it.
struct Target {
    port: u16,
    direct: bool,
}

const TARGETS: [Target; 2] = [Target { port: 8080, direct: true }, Target { port: 8081, direct: false }];

impl Target {
    /// Both ways to it.
    fn ways(&self) -> [SocketAddr; 2] {
        [(Ipv4Addr::LOCALHOST, self.port).into(), (Ipv6Addr::LOCALHOST, self.port).into()]
    }
}

#[derive(Default)]
struct Traffic {
    stop: AtomicBool,
    echoes: AtomicUsize,
    connections: AtomicUsize,
    failures: Mutex<Vec<String>>,
}

impl Traffic {
    fn failed(&self, what: String) {
        self.failures.lock().expect("no panic").push(what);
        self.stop.store(true, SeqCst);
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(SeqCst)
    }

    /// A connection that is kept, with numbered messages.
    fn last(&self, caller: &App, to: SocketAddr) {
        let mut message = vec![0x5a; 2000];
        let mut exchange = || {
            let mut stream = caller.greeted(to)?;
            while self.goes_on() {
                message[..8].copy_from_slice(&self.echoes.fetch_add(1, SeqCst).to_le_bytes());
                echo(&mut stream, &message)?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok::<_, std::io::Error>(())
        };
        if let Err(error) = exchange() {
            self.failed(format!("a lasting connection to {to}: {error}"));
        }
    }

    /// Connections one after the other.
    fn come_and_go(&self, caller: &App, target: &Target) {
        for to in target.ways().into_iter().cycle().take_while(|_| self.goes_on()) {
            let exchange = caller.greeted(to).and_then(|mut stream| {
                echo(&mut stream, b"short")?;
                Ok(is_direct(&stream))
            });
            match exchange {
                Ok(direct) if direct == target.direct => drop(self.connections.fetch_add(1, SeqCst)),
                Ok(_) => self.failed(format!("a connection to {to} took the other path")),
                Err(error) => self.failed(format!("a connection to {to}: {error}")),
            }
            thread::sleep(Duration::from_millis(30));
        }
    }
}

/// When the certificates end that the proxies use, by the agent's metrics.
fn leaf_ends(node: &Node) -> Vec<u64> {
    let end = |group| node.metric("culvert_leaf_not_after_seconds", &[&format!("-group-{group}-")]);
    ["called", "sealed", "caller"].map(end).to_vec()
}

fn active_root(node: &Node) -> (Value, usize) {
    let roots = node.api("/v1/connect/ca/roots");
    (roots["ActiveRootID"].clone(), roots["Roots"].as_array().map_or(0, Vec::len))
}

/// Waits until `done`, or until something failed.
fn wait(what: &str, traffic: &Traffic, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while traffic.goes_on() && !done() {
        assert!(started.elapsed() < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(250));
    }
}

/// Another root, and leaves of it.
fn rotate(node: &Node, traffic: &Traffic) {
    let (leaves, (root, roots)) = (leaf_ends(node), active_root(node));
    assert!(leaves.iter().all(|end| *end > 0), "no certificates: {leaves:?}");
    node.culvert(&["connect", "ca", "rotate"]);
    let (next, trusted) = active_root(node);
    assert!(next != root && trusted == roots + 1, "the root of before is trusted still");
    wait("every leaf is renewed", traffic, || leaf_ends(node).iter().zip(&leaves).all(|(now, before)| now > before));
    let (connections, echoes) = (traffic.connections.load(SeqCst), traffic.echoes.load(SeqCst));
    wait("traffic goes on", traffic, || {
        traffic.connections.load(SeqCst) > connections + 20 && traffic.echoes.load(SeqCst) > echoes + 20
    });
}

struct StopOnDrop<'a>(&'a Traffic);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, SeqCst);
    }
}

/// The three services, and somebody who calls two of them.
struct Cluster {
    caller: App,
    _servers: [Server; 2],
    _apps: Apps,
}

impl Cluster {
    fn start(world: &World) -> (Node, Self) {
        let settings = "default_intention_policy = \"allow\"".to_owned();
        let options = NodeOptions { server: true, encryption: "between-nodes", settings, ..NodeOptions::default() };
        let node = Node::start(world, options);
        let apps = Apps::join(world);
        let groups = [
            group("called", 9001, ""),
            group("sealed", 9001, &wants("always")),
            group("caller", 9002, &(calls("called", 8080) + &calls("sealed", 8081))),
        ];
        node.run_job("rotation", &format!("job \"rotation\" {{\n{}\n}}\n", groups.concat()));
        let [called, sealed, caller] = ["called", "sealed", "caller"].map(|group| App::of(&node, "rotation", group));
        let servers = [called.serve(&service()), sealed.serve(&service())];
        for target in &TARGETS {
            for to in target.ways() {
                eventually("the path is there", || {
                    caller.greeted(to).is_ok_and(|stream| is_direct(&stream) == target.direct)
                });
            }
        }
        (node, Self { caller, _servers: servers, _apps: apps })
    }

    /// Does `work` while connections last, and come and go; none may fail.
    fn under_traffic(&self, node: &Node, work: impl FnOnce(&Traffic)) {
        let traffic = Traffic::default();
        thread::scope(|scope| {
            let stop = StopOnDrop(&traffic);
            for target in &TARGETS {
                for to in target.ways() {
                    let traffic = &traffic;
                    scope.spawn(move || traffic.last(&self.caller, to));
                }
                scope.spawn(|| traffic.come_and_go(&self.caller, target));
            }
            work(&traffic);
            drop(stop);
        });
        let failures = traffic.failures.into_inner().expect("no panic");
        assert!(failures.is_empty(), "{failures:#?}\n{}", node.log());
    }
}

#[test]
fn roots_and_their_leaves_rotate_under_traffic_on_both_paths() {
    let world = World::new("rotation");
    let (mut node, cluster) = Cluster::start(&world);
    cluster.under_traffic(&node, |traffic| {
        // The second one meets a root that vouches for another already.
        for _ in 0..2 {
            rotate(&node, traffic);
        }
    });
    drop(cluster);
    node.leave();
}

/// Leaves a state behind whose leaves live for `life`. No agent takes so short a one from an operator, but it goes by what its
/// state says.
fn leave_state(life: Duration) {
    std::fs::create_dir_all(DATA_DIR).expect("a folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let authority = runtime.block_on(async {
        let store = RedbStore::open(&Path::new(DATA_DIR).join("state.redb")).expect("a store");
        let stop = CancellationToken::new();
        let ledger = Ledger::start(Arc::new(store), stop.clone()).await.expect("an empty store");
        let settings = CaSettings { leaf_ttl: life, allow_short_ttls_for_tests: true, ..CaSettings::default() };
        let datacenter = Datacenter::new("dc1").expect("a name");
        Authority::open(ledger, datacenter, settings, Clock::system(), stop).await.expect("an authority")
    });
    // The file is free when the last task of the runtime is gone.
    drop(authority);
    drop(runtime);
}

#[test]
fn leaves_of_a_node_are_renewed_by_age_under_traffic_on_both_paths() {
    let world = World::new("renewal");
    let life = Duration::from_secs(20);
    leave_state(life);
    let (mut node, cluster) = Cluster::start(&world);
    let root = active_root(&node);
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    cluster.under_traffic(&node, |traffic| {
        for _ in 0..2 {
            let (leaves, latest) = (leaf_ends(&node), now() + life.as_secs());
            assert!(
                leaves.iter().all(|end| (now()..=latest).contains(end)),
                "{leaves:?} are alive until {latest} at most"
            );
            wait("every leaf is renewed", traffic, || {
                leaf_ends(&node).iter().zip(&leaves).all(|(now, before)| now > before)
            });
        }
    });
    assert_eq!(active_root(&node), root, "no other root made them new");
    drop(cluster);
    node.leave();
}
