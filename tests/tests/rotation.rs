//! Leaves are renewed and the root is replaced under traffic, on both paths at once: no byte and no connection is lost.
//!
//! The agent is the real one. Its authority was made before, with short lives, and long enough ago for its root to near its
//! end: what is stored wins over an agent's settings.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use culvert_control::ca::{Authority, CaSettings, Clock};
use culvert_control::state::Ledger;
use culvert_control::store::RedbStore;
use culvert_tests::{
    App, Apps, DATA_DIR, Node, NodeOptions, World, calls, echo, eventually, group, is_direct, service, wants,
};
use culvert_types::Datacenter;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

/// Renewed after 24 to 36 s; roots are looked at as often.
const LEAF: Duration = Duration::from_secs(40);
const ROOT: Duration = Duration::from_secs(2000);
/// Nine tenths of the root's life are over when the agent has run for a while; a tenth is more than the test needs.
const AGE: Duration = Duration::from_secs(1780);
/// What is waited for comes by the clock, also on a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Makes the authority that the agent will find.
fn make_authority() {
    std::fs::create_dir_all(DATA_DIR).expect("a folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let store = RedbStore::open(&std::path::Path::new(DATA_DIR).join("state.redb")).expect("a new store");
        let stop = CancellationToken::new();
        let ledger = Ledger::start(Arc::new(store), stop.clone()).await.expect("a new state");
        let settings = CaSettings {
            leaf_ttl: LEAF,
            intermediate_ttl: 3 * LEAF,
            root_ttl: ROOT,
            allow_short_ttls_for_tests: true,
            ..CaSettings::default()
        };
        let (datacenter, clock) = (Datacenter::new("dc1").expect("a name"), SystemTime::now() - AGE);
        let authority = Authority::open(ledger, datacenter, settings, Clock::following_tokio(clock), stop.clone());
        drop(authority.await.expect("a new authority"));
        stop.cancel();
    });
    runtime.shutdown_timeout(Duration::from_secs(10));
}

/// One of the two called services, as the caller sees it.
struct Target {
    port: u16,
    direct: bool,
}

const TARGETS: [Target; 2] = [Target { port: 8080, direct: true }, Target { port: 8081, direct: false }];

impl Target {
    fn address(&self) -> std::net::SocketAddr {
        (std::net::Ipv4Addr::LOCALHOST, self.port).into()
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
    fn last(&self, caller: &App, target: &Target) {
        let mut message = vec![0x5a; 2000];
        let mut exchange = || {
            let mut stream = caller.greeted(target.address())?;
            while self.goes_on() {
                message[..8].copy_from_slice(&self.echoes.fetch_add(1, SeqCst).to_le_bytes());
                echo(&mut stream, &message)?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok::<_, std::io::Error>(())
        };
        if let Err(error) = exchange() {
            self.failed(format!("a lasting connection to port {}: {error}", target.port));
        }
    }

    /// Connections one after the other.
    fn come_and_go(&self, caller: &App, target: &Target) {
        while self.goes_on() {
            let exchange = caller.greeted(target.address()).and_then(|mut stream| {
                echo(&mut stream, b"short")?;
                Ok(is_direct(&stream))
            });
            match exchange {
                Ok(direct) if direct == target.direct => drop(self.connections.fetch_add(1, SeqCst)),
                Ok(_) => self.failed(format!("a connection to port {} took the other path", target.port)),
                Err(error) => self.failed(format!("a connection to port {}: {error}", target.port)),
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

/// A renewal of every leaf, another root, and leaves of that.
fn rotate(node: &Node, traffic: &Traffic) {
    let renewed = |before: &[u64]| leaf_ends(node).iter().zip(before).all(|(now, before)| now > before);
    let (first, (root, _)) = (leaf_ends(node), active_root(node));
    assert!(first.iter().all(|end| *end > 0), "no certificates: {first:?}");
    wait("every leaf is renewed", traffic, || renewed(&first));
    wait("another root signs", traffic, || active_root(node).0 != root);
    let second = leaf_ends(node);
    assert!(!traffic.goes_on() || active_root(node).1 == 2, "the root of before is trusted no more");
    wait("every leaf is renewed by the new root", traffic, || renewed(&second));
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

#[test]
fn leaves_and_the_root_rotate_under_traffic_on_both_paths() {
    let world = World::new("rotation");
    make_authority();
    let settings = "default_intention_policy = \"allow\"".to_owned();
    let options = NodeOptions { server: true, encryption: "between-nodes", settings, ..NodeOptions::default() };
    let mut node = Node::start(&world, options);
    let apps = Apps::join(&world);
    let groups = [
        group("called", 9001, ""),
        group("sealed", 9001, &wants("always")),
        group("caller", 9002, &(calls("called", 8080) + &calls("sealed", 8081))),
    ];
    node.run_job("rotation", &format!("job \"rotation\" {{\n{}\n}}\n", groups.concat()));
    let [called, sealed, caller] = ["called", "sealed", "caller"].map(|group| App::of(&node, "rotation", group));
    let servers = [called.serve(&service()), sealed.serve(&service())];
    for target in &TARGETS {
        eventually("the path is there", || {
            caller.greeted(target.address()).is_ok_and(|stream| is_direct(&stream) == target.direct)
        });
    }

    let traffic = Traffic::default();
    thread::scope(|scope| {
        let stop = StopOnDrop(&traffic);
        for target in &TARGETS {
            for _ in 0..2 {
                scope.spawn(|| traffic.last(&caller, target));
            }
            scope.spawn(|| traffic.come_and_go(&caller, target));
        }
        rotate(&node, &traffic);
        drop(stop);
    });
    let failures = traffic.failures.into_inner().expect("no panic");
    assert!(failures.is_empty(), "{failures:#?}\n{}", node.log());
    drop((servers, apps));
    node.leave();
}
