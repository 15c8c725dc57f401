//! The policy engine over real kernel programs: what it takes over, what it remembers, what it ends, and what it tells of that.

mod common;

use std::io::{ErrorKind, Read as _};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::time::SystemTime;

use aya::maps::MapData;
use common::{APP, PATIENCE, TestWorkload, UPSTREAM, World, echo, eventually, generations, greeting, upstream4};
use culvert_agent::events::EventHub;
use culvert_agent::policy::{Attachment, PolicyEngine, relay};
use culvert_agent::workload::{MacAddress, Workload};
use culvert_control::store::Revision;
use culvert_control::{MeshInstance, MeshUpstream, MeshView};
use culvert_ebpf_common::map;
use culvert_types::{
    Action, ConnectionEvent, ConnectionKind, Datacenter, Encryption, HealthStatus, Intention, RefusalReason,
    ServiceName, TrustDomain, Verdict,
};
use tokio::sync::{broadcast, watch};

/// A node whose mesh the test makes up: `web` (1) calls `api` (2) at 8080 and `db` (3) at 8081.
struct Node {
    policy: Arc<PolicyEngine>,
    mesh: watch::Sender<Arc<MeshView>>,
    told: broadcast::Receiver<Arc<ConnectionEvent>>,
    workloads: Vec<TestWorkload>,
    data_dir: tempfile::TempDir,
    world: World,
}

const SERVICES: [&str; 3] = ["web", "api", "db"];

fn instances() -> Vec<MeshInstance> {
    let name = |text: &str| ServiceName::new(text).expect("a name");
    let instance = |service: &&str| MeshInstance {
        service_id: (*service).to_owned(),
        sidecar_id: format!("{service}-sidecar-proxy"),
        service: name(service),
        node: "node".to_owned(),
        health: HealthStatus::Passing,
        local_port: APP,
        sidecar_port: 21_000,
        encryption: Encryption::BetweenNodes,
        protocol: "tcp".to_owned(),
        upstreams: Vec::new(),
        certificate_not_after: Some(SystemTime::now() + PATIENCE * 100),
    };
    let mut instances: Vec<_> = SERVICES.iter().map(instance).collect();
    let to = |port: u16, service: &str| MeshUpstream {
        destination: name(service),
        bind: (std::net::Ipv4Addr::LOCALHOST, port).into(),
    };
    instances[0].upstreams = vec![to(UPSTREAM, "api"), to(UPSTREAM + 1, "db")];
    instances
}

fn view(instances: Vec<MeshInstance>, denied: &[(&str, &str)]) -> Arc<MeshView> {
    let deny = |(source, destination): &(&str, &str)| Intention {
        source: source.parse().expect("a subject"),
        destination: destination.parse().expect("a subject"),
        action: Action::Deny,
    };
    Arc::new(MeshView {
        revision: Revision(1),
        trust_domain: TrustDomain::new("td.consul").expect("valid"),
        datacenter: Datacenter::new("dc1").expect("valid"),
        node: "node".to_owned(),
        default_action: Action::Allow,
        encryption: Encryption::BetweenNodes,
        intentions: denied.iter().map(deny).collect(),
        instances: instances.into(),
    })
}

impl Node {
    fn new(name: &str) -> Option<Self> {
        let mut world = World::new(name)?;
        let workloads = (1..=3).map(|id| world.workload(id)).collect();
        let data_dir = tempfile::tempdir().expect("a directory");
        let mut node = Self::start(world, workloads, data_dir, view(instances(), &[]));
        node.attach(&[1, 2, 3]);
        Some(node)
    }

    fn start(world: World, workloads: Vec<TestWorkload>, data_dir: tempfile::TempDir, view: Arc<MeshView>) -> Self {
        let (datapath, events) = world.load();
        let (mesh, receiver) = watch::channel(view);
        let policy = PolicyEngine::new(Some(datapath), receiver.clone(), data_dir.path());
        let hub = EventHub::new();
        let told = hub.observe();
        world.runtime().spawn(relay(events.events, Arc::clone(&policy), receiver, hub));
        world.runtime().spawn(Arc::clone(&policy).run());
        Self { policy, mesh, told, workloads, data_dir, world }
    }

    /// The agent is gone, another one starts and knows `view`.
    fn restart(self, view: Arc<MeshView>) -> Self {
        let Self { policy, mesh, told, workloads, data_dir, mut world } = self;
        drop((mesh, told, policy));
        world.restart_runtime();
        let node = Self::start(world, workloads, data_dir, view);
        node.world.runtime().block_on(node.policy.retain(&[1, 2, 3]));
        node
    }

    fn attach(&mut self, ids: &[u32]) {
        for id in ids {
            let links = self.workload(*id).links();
            let workload = Workload {
                netns: links.netns,
                netns_cookie: 0,
                host_interface: format!("v{id}"),
                host_ifindex: links.host_ifindex,
                addr4: links.addr4,
                addr6: links.addr6,
                mac: MacAddress(links.mac),
            };
            let sidecars = vec![format!("{}-sidecar-proxy", SERVICES[*id as usize - 1])];
            let (id, published) = (*id, Vec::new());
            let attachment = Attachment { id, workload, sidecars, protected: vec![APP], published };
            self.world.runtime().block_on(self.policy.attach(attachment)).expect("attached");
        }
    }

    fn workload(&self, id: u32) -> &TestWorkload {
        &self.workloads[id as usize - 1]
    }

    /// What answers `web` at its upstream.
    fn way(&self, upstream: u16) -> String {
        let mut stream = self.workload(1).connect((upstream4().ip(), upstream)).expect("something answers");
        greeting(&mut stream)
    }

    fn connect(&self, upstream: u16) -> TcpStream {
        let mut stream = self.workload(1).connect((upstream4().ip(), upstream)).expect("something answers");
        assert!(matches!(greeting(&mut stream).as_str(), "api" | "db"), "direct");
        stream
    }

    /// Waits for an event of the calling side.
    fn told(&mut self, kind: ConnectionKind) -> Arc<ConnectionEvent> {
        let runtime = self.world.runtime.as_ref().expect("made with the world");
        let wanted = async {
            loop {
                let event = self.told.recv().await.expect("the hub is there");
                if event.kind == kind && !event.inbound {
                    return event;
                }
            }
        };
        runtime.block_on(async { tokio::time::timeout(PATIENCE, wanted).await.expect("told in time") })
    }
}

/// Ends by a reset or an abort, and not by itself.
fn is_cut(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let error = stream.read(&mut [0; 1]).expect_err("no end of its own");
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset)
}

#[test]
fn direct_routes_stay_while_an_agent_starts() {
    let Some(node) = Node::new("policystart") else { return };
    let _proxy = node.workload(1).serve("127.0.0.1:8080", "proxy");
    let _api = node.workload(2).serve("0.0.0.0:9001", "api");
    eventually("the direct path", || node.way(UPSTREAM) == "api");
    // The new one knows no instance yet, then some of the workloads, then no certificate.
    let mut node = node.restart(view(Vec::new(), &[]));
    let direct = |node: &Node| {
        for _ in 0..20 {
            assert_eq!(node.way(UPSTREAM), "api");
        }
    };
    direct(&node);
    node.attach(&[1]);
    direct(&node);
    node.attach(&[2, 3]);
    direct(&node);
    let mut early = instances();
    early[1].certificate_not_after = None;
    node.mesh.send_replace(view(early, &[]));
    direct(&node);
    node.mesh.send_replace(view(instances(), &[]));
    direct(&node);
    // What has been compiled again follows the compiler.
    let mut critical = instances();
    critical[1].health = HealthStatus::Critical;
    node.mesh.send_replace(view(critical, &[]));
    eventually("proxied", || node.way(UPSTREAM) == "proxy");
}

#[test]
fn what_is_denied_does_not_outlive_the_start_of_an_agent() {
    let Some(node) = Node::new("policydeny") else { return };
    let _proxies = [8080, 8081].map(|port| node.workload(1).serve(&format!("127.0.0.1:{port}"), "proxy"));
    let (_api, _db) = (node.workload(2).serve("0.0.0.0:9001", "api"), node.workload(3).serve("0.0.0.0:9001", "db"));
    eventually("the direct path", || node.way(UPSTREAM) == "api" && node.way(UPSTREAM + 1) == "db");
    let (mut denied, mut allowed) = (node.connect(UPSTREAM), node.connect(UPSTREAM + 1));
    let mut node = node.restart(view(Vec::new(), &[("web", "api")]));
    eventually("no new connection", || node.way(UPSTREAM) == "proxy");
    assert_eq!(node.way(UPSTREAM + 1), "db");
    node.attach(&[1, 2, 3]);
    assert!(is_cut(&mut denied));
    echo(&mut allowed, b"hello").expect("others live on");
    // Encryption everywhere ends routes, and no connection.
    let mut always = (*view(Vec::new(), &[])).clone();
    always.encryption = Encryption::Always;
    node.mesh.send_replace(Arc::new(always));
    eventually("no new connection", || node.way(UPSTREAM + 1) == "proxy");
    echo(&mut allowed, b"hello").expect("live on");
}

#[test]
fn a_deny_ends_connections_of_services_that_are_deregistered() {
    let Some(mut node) = Node::new("policyderegistered") else { return };
    let (_api, _db) = (node.workload(2).serve("0.0.0.0:9001", "api"), node.workload(3).serve("0.0.0.0:9001", "db"));
    let (mut denied, mut allowed) = (node.connect(UPSTREAM), node.connect(UPSTREAM + 1));
    for gone in [0, 1] {
        let mut rest = instances();
        rest.remove(gone);
        node.mesh.send_replace(view(rest, &[]));
    }
    node.mesh.send_replace(view(Vec::new(), &[]));
    echo(&mut denied, b"hello").expect("who is deregistered may finish his work");
    node.mesh.send_replace(view(Vec::new(), &[("web", "api")]));
    assert!(is_cut(&mut denied));
    let event = node.told(ConnectionKind::Close);
    assert_eq!((event.verdict, event.reason), (Verdict::Deny, Some(RefusalReason::Revoked)));
    assert_eq!(event.rule.as_deref(), Some("web => api (deny, precedence 9)"), "{event:?}");

    // Also after a restart, of what was deregistered before it.
    let mut node = node.restart(view(Vec::new(), &[]));
    node.attach(&[1, 2, 3]);
    echo(&mut allowed, b"hello").expect("lives on");
    node.mesh.send_replace(view(Vec::new(), &[("*", "db")]));
    assert!(is_cut(&mut allowed));
    let event = node.told(ConnectionKind::Close);
    assert_eq!(event.reason, Some(RefusalReason::Revoked));
    assert!(event.destination.as_ref().is_some_and(|id| id.to_string().ends_with("/svc/db")), "{event:?}");
    node.world.runtime().block_on(node.policy.detach(1));
    let kept = std::fs::read_to_string(node.data_dir.path().join("direct.json")).expect("remembered");
    assert!(!kept.contains("web"), "a workload that is gone is forgotten: {kept}");
}

#[test]
fn a_connection_is_told_with_its_own_pair_after_a_restart() {
    let Some(node) = Node::new("policypairs") else { return };
    let (_api, _db) = (node.workload(2).serve("0.0.0.0:9001", "api"), node.workload(3).serve("0.0.0.0:9001", "db"));
    let (api, db) = (node.connect(UPSTREAM), node.connect(UPSTREAM + 1));
    let mut node = node.restart(view(instances(), &[]));
    // The other way round than before.
    node.attach(&[3, 2, 1]);
    for (stream, service) in [(db, "db"), (api, "api")] {
        drop(stream);
        let event = node.told(ConnectionKind::Close);
        assert_eq!((event.verdict, event.rule.as_deref()), (Verdict::Allow, Some("default")));
        let destination = event.destination.as_ref().expect("known").to_string();
        assert!(destination.ends_with(&format!("/svc/{service}")), "{event:?}");
    }
}

#[test]
fn what_could_not_be_put_in_force_is_tried_again_soon() {
    let Some(mut world) = World::new("policyagain") else { return };
    let workloads = (1..=3).map(|id| world.workload(id)).collect();
    let data_dir = tempfile::tempdir().expect("a directory");
    let path = data_dir.path().to_owned();
    let mut node = Node::start(world, workloads, data_dir, view(instances(), &[]));
    let _proxy = node.workload(1).serve("127.0.0.1:8080", "proxy");
    let _api = node.workload(2).serve("0.0.0.0:9001", "api");
    std::fs::remove_dir(&path).expect("an empty directory");
    node.attach(&[1, 2]);
    assert_eq!(node.way(UPSTREAM), "proxy", "what cannot be written down is not put in force");
    std::fs::create_dir(&path).expect("a directory");
    // Without another change; the engine looks again by itself only once a minute.
    eventually("direct", || node.way(UPSTREAM) == "api");
}

/// Lets nobody but kernel programs write into the table `name` any more (`BPF_MAP_FREEZE`).
fn freeze(world: &World, name: &str) {
    const BPF_MAP_FREEZE: i32 = 22;
    let pin = generations(world).pop().expect("a generation").join("maps").join(name);
    let table = MapData::from_pin(pin).expect("a pinned map");
    let attributes = [table.fd().as_fd().as_raw_fd(), 0];
    // SAFETY: the attributes are eight bytes, as the call is told, and begin with the descriptor, which `table` keeps open.
    let frozen = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_FREEZE, attributes.as_ptr(), size_of_val(&attributes)) };
    assert_eq!(frozen, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn what_a_table_that_cannot_be_written_lets_through_is_ended_again_and_again() {
    let Some(node) = Node::new("policyfrozen") else { return };
    let _api = node.workload(2).serve("0.0.0.0:9001", "api");
    let mut before = node.connect(UPSTREAM);
    freeze(&node.world, map::UPSTREAM);
    node.mesh.send_replace(view(instances(), &[("web", "api")]));
    assert!(is_cut(&mut before));
    // The route is still there, so that connections begin; none lasts.
    for _ in 0..3 {
        let error = match node.workload(1).connect(upstream4()) {
            Ok(mut later) => loop {
                match later.read(&mut [0; 16]) {
                    Ok(length) => assert!(length > 0, "it is not ended by the application"),
                    Err(error) => break error,
                }
            },
            Err(error) => error, // so soon
        };
        assert!(matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset), "{error}");
    }
}

#[test]
fn a_packet_with_anothers_address_is_told_also_from_outside_the_mesh() {
    let Some(mut world) = World::new("policyspoof") else { return };
    let workloads = (1..=3).map(|id| world.workload(id)).collect();
    let data_dir = tempfile::tempdir().expect("a directory");
    let mut node = Node::start(world, workloads, data_dir, view(Vec::new(), &[]));
    node.attach(&[1]);
    let liar = node.workload(1);
    liar.ip("addr add 10.77.0.250/24 dev eth0");
    liar.run(|| UdpSocket::bind("10.77.0.250:0").and_then(|socket| socket.send_to(b"x", "10.77.0.1:9"))).expect("sent");
    let event = node.told(ConnectionKind::Refuse);
    assert_eq!((event.verdict, event.reason), (Verdict::Deny, Some(RefusalReason::Spoofed)));
    assert_eq!((&event.source, event.reporter.as_str()), (&None, ""));
}

#[test]
fn a_reload_of_the_default_policy_ends_live_connections() {
    let Some(node) = Node::new("policydefault") else { return };
    let _api = node.workload(2).serve("0.0.0.0:9001", "api");
    let mut stream = node.connect(UPSTREAM);
    let mut closed = (*view(instances(), &[])).clone();
    closed.default_action = Action::Deny;
    node.mesh.send_replace(Arc::new(closed));
    assert!(is_cut(&mut stream));
}
