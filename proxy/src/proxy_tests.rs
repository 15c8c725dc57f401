//! Whole proxies: an inbound and an outbound one between two applications, fed with configuration as xDS would.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use culvert_types::{ConnectionEvent, ConnectionKind, RefusalReason, Verdict};
use futures::FutureExt;
use futures::future::BoxFuture;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::config::{Cluster, ClusterKind, Endpoint, Identity, LbPolicy, StringMatcher};
use crate::events::EventReader;
use crate::handoff::{Family, SideTraffic};
use crate::metrics::Metrics;
use crate::rbac::{self, Permission, Policy, Principal, Rbac, RbacAction};
use crate::sockets::OwnSockets;
use crate::testing::{Authority, TRUST_DOMAIN, leaf_params, spiffe};
use crate::threads::DataThreads;

#[path = "proxy_tests/certificates.rs"]
mod certificates;
#[path = "proxy_tests/changes.rs"]
mod changes;
#[path = "proxy_tests/silence.rs"]
mod silence;

/// Generous: the machine may be busy. Nothing waits this long unless something hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn free_port() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address")
}

fn allow(services: &[&str]) -> Arc<[Rbac]> {
    let principal =
        |service: &&str| Principal::Authenticated(Some(StringMatcher::exact(&spiffe(service), false).expect("ok")));
    let policy = Policy {
        name: "consul-intentions-layer4".into(),
        permissions: vec![Permission::Any],
        principals: services.iter().map(principal).collect(),
    };
    [Rbac { action: RbacAction::Allow, policies: vec![policy] }].into()
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint { address, weight: 1, healthy: true, node: None, workload: None }
}

fn cluster(name: &str, endpoints: Vec<Endpoint>, tls: Option<crate::config::UpstreamTls>) -> Cluster {
    Cluster {
        name: name.to_owned(),
        kind: ClusterKind::Eds,
        connect_timeout: Duration::from_secs(5),
        lb_policy: LbPolicy::RoundRobin,
        endpoints: endpoints.into(),
        tls: tls.map(Arc::new),
        max_connections: None,
    }
}

fn listener(address: SocketAddr, cluster: &str) -> config::Listener {
    config::Listener {
        name: format!("{cluster}:{address}"),
        address,
        direction: Direction::Outbound,
        tls: None,
        rbac: [].into(),
        cluster: cluster.to_owned(),
        stat_prefix: String::new(),
        max_connections: None,
        max_connect_attempts: None,
        explain: None,
    }
}

fn config(listener: config::Listener, cluster: Cluster) -> ProxyConfig {
    ProxyConfig {
        listeners: BTreeMap::from([(listener.name.clone(), Arc::new(listener))]),
        clusters: BTreeMap::from([(cluster.name.clone(), Arc::new(cluster))]),
    }
}

/// A running proxy and everything to steer and watch it.
struct Running {
    address: SocketAddr,
    config: watch::Sender<Arc<ProxyConfig>>,
    _xds: watch::Sender<xds::Status>,
    status: watch::Receiver<ProxyStatus>,
    stop: Option<oneshot::Sender<Duration>>,
    events: EventReader,
    task: tokio::task::JoinHandle<()>,
    tally: Arc<Tally>,
    _threads: DataThreads,
}

impl Running {
    async fn start(id: &str, first: ProxyConfig, sockets: Arc<dyn Sockets>) -> Self {
        let address = first.listeners.values().next().expect("a listener").address;
        let threads = DataThreads::new(1).expect("thread");
        let (events, reader) = Events::new(Arc::new(Metrics::default()));
        let (config, configs) = watch::channel(Arc::new(first));
        let known = xds::Status { ready: true, version: "1".to_owned(), ..xds::Status::default() };
        let (xds_sender, xds) = watch::channel(known);
        let (publish, mut status) = watch::channel(ProxyStatus::default());
        let (stop, stopped) = oneshot::channel();
        let proxy = Proxy::new(id, "here", sockets, threads.placement(), events);
        let tally = proxy.tally();
        let task = tokio::spawn(proxy.run(Feed { config: configs, status: xds }, publish, stopped));
        timeout(PATIENCE, status.wait_for(|status| status.ready)).await.expect("in time").expect("ready");
        Self {
            address,
            config,
            _xds: xds_sender,
            status,
            stop: Some(stop),
            events: reader,
            task,
            tally,
            _threads: threads,
        }
    }

    fn change(&self, change: impl FnOnce(&mut config::Listener, &mut Cluster)) {
        let now = self.config.borrow().clone();
        let mut listener = config::Listener::clone(now.listeners.values().next().expect("listener"));
        let mut cluster = Cluster::clone(now.clusters.values().next().expect("cluster"));
        change(&mut listener, &mut cluster);
        self.config.send_replace(Arc::new(config(listener, cluster)));
    }

    async fn event(&mut self) -> ConnectionEvent {
        timeout(PATIENCE, self.events.next()).await.expect("an event in time").expect("an event")
    }

    /// The next event of this kind.
    async fn next(&mut self, kind: ConnectionKind) -> ConnectionEvent {
        loop {
            let event = self.event().await;
            if event.kind == kind {
                return event;
            }
        }
    }
}

/// `web` calls `api`, whose application echoes.
struct Mesh {
    authority: Authority,
    inbound: Running,
    outbound: Running,
}

impl Mesh {
    async fn start(allowed: &[&str]) -> Self {
        let authority = Authority::new();
        let inbound = inbound(&authority, allowed, echo().await, Arc::new(OwnSockets)).await;
        let outbound = outbound(&authority, vec![endpoint(inbound.address)]).await;
        Self { authority, inbound, outbound }
    }

    fn client(&self) -> TcpStream {
        call(self.outbound.address)
    }
}

fn public_listener(authority: &Authority) -> config::Listener {
    let mut public = listener(free_port(), "local_app");
    public.direction = Direction::Inbound;
    public.tls = Some(Arc::new(authority.downstream("api")));
    public
}

async fn inbound(authority: &Authority, allowed: &[&str], app: SocketAddr, sockets: Arc<dyn Sockets>) -> Running {
    let mut public = public_listener(authority);
    public.rbac = allow(allowed);
    Running::start("api-sidecar-proxy", config(public, cluster("local_app", vec![endpoint(app)], None)), sockets).await
}

async fn outbound(authority: &Authority, endpoints: Vec<Endpoint>) -> Running {
    let upstream = cluster("api", endpoints, Some(authority.upstream("web", "api")));
    let config = config(listener(free_port(), "api"), upstream);
    Running::start("web-sidecar-proxy", config, Arc::new(OwnSockets)).await
}

/// Connects. Blocking, on loopback, so that a reset right behind the handshake is not taken for a failure to connect.
fn call(address: SocketAddr) -> TcpStream {
    let stream = std::net::TcpStream::connect(address).expect("somebody listens");
    stream.set_nonblocking(true).expect("nonblocking");
    TcpStream::from_std(stream).expect("runtime")
}

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.into_split();
                let _reset_by_peer = tokio::io::copy(&mut read, &mut write).await;
                let _reset_by_peer = write.shutdown().await;
            });
        }
    });
    address
}

async fn ping(stream: &mut TcpStream, text: &[u8]) -> std::io::Result<()> {
    let both = async {
        stream.write_all(text).await?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).await?;
        assert_eq!(answer, text);
        Ok(())
    };
    timeout(PATIENCE, both).await.expect("in time")
}

/// How the stream ends: nothing more must come.
async fn end(stream: &mut TcpStream) -> Result<(), ErrorKind> {
    let mut rest = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("an end in time");
    read.map(|_| assert!(rest.is_empty())).map_err(|error| error.kind())
}

#[tokio::test]
async fn an_allowed_connection_passes_and_both_sides_tell_about_it() {
    let Mesh { mut inbound, mut outbound, .. } = Mesh::start(&["web"]).await;
    let mut client = call(outbound.address);
    ping(&mut client, b"through the mesh").await.expect("echo");
    client.shutdown().await.expect("close");
    assert_eq!(end(&mut client).await, Ok(()));
    for side in [&mut inbound, &mut outbound] {
        let (open, close) = (side.event().await, side.event().await);
        for event in [&open, &close] {
            assert_eq!(event.source.as_ref().expect("source").to_string(), spiffe("web"));
            assert_eq!(event.destination.as_ref().expect("destination").to_string(), spiffe("api"));
            assert_eq!((event.verdict, event.reason), (Verdict::Allow, None));
        }
        assert_eq!((open.kind, close.kind), (ConnectionKind::Open, ConnectionKind::Close));
        assert_eq!((close.bytes_to_destination, close.bytes_to_source), (16, 16));
        assert_eq!(open.rule.as_deref(), open.inbound.then_some("consul-intentions-layer4"));
    }
}

#[tokio::test]
async fn what_is_carried_is_known_while_it_is_and_afterwards() {
    let mut mesh = Mesh::start(&["web"]).await;
    let open = |open, bytes| SideTraffic { open, bytes_to_destination: bytes, bytes_to_source: bytes };
    let carried = async |what: &str, inbound: SideTraffic, outbound: SideTraffic, mesh: &Mesh| {
        let seen = || (mesh.inbound.tally.read().inbound, mesh.outbound.tally.read().outbound);
        let settled = async {
            while seen() != (inbound, outbound) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(timeout(PATIENCE, settled).await.is_ok(), "{what}: {:?}", seen());
    };
    let (mut one, mut other) = (mesh.client(), mesh.client());
    ping(&mut one, b"12345").await.expect("echo");
    ping(&mut other, b"123").await.expect("echo");
    carried("two are open", open(2, 8), open(2, 8), &mesh).await;
    drop(one);
    carried("one has ended", open(1, 8), open(1, 8), &mesh).await;
    mesh.outbound.tally.count_anew();
    ping(&mut other, b"1234").await.expect("echo");
    carried("one side counts anew", open(1, 12), open(1, 4), &mesh).await;
    mesh.outbound.change(|listener, _| listener.address = free_port());
    drop(other);
    carried("all have ended, and so has their listener", open(0, 12), open(0, 4), &mesh).await;
    mesh.inbound.change(|listener, _| listener.rbac = allow(&["admin"]));
    let address = mesh.outbound.config.borrow().listeners.values().next().expect("one").address;
    let moved = async {
        while std::net::TcpStream::connect(address).is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, moved).await.expect("the new listener listens");
    mesh.inbound.next(ConnectionKind::Refuse).await;
    let mut refused = call(address);
    let _reset = end(&mut refused).await;
    mesh.inbound.next(ConnectionKind::Refuse).await;
    assert_eq!(mesh.inbound.tally.read().inbound, open(0, 12), "what is refused is not open");
}

#[tokio::test]
async fn a_proxy_that_fails_leaves_no_connection_to_a_policy_that_nobody_follows() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"carried").await.expect("echo");
    mesh.inbound.task.abort(); // its parts are dropped as by a panic
    end(&mut client).await.expect_err("reset");
    assert_eq!(mesh.inbound.next(ConnectionKind::Close).await.bytes_to_destination, 7);
}

#[tokio::test]
async fn a_denied_connection_is_reset_and_told_with_its_rule() {
    let mut mesh = Mesh::start(&["admin"]).await;
    for first in [&b""[..], b"the caller speaks before it is judged"] {
        let mut client = mesh.client();
        // The kernel tells of a reset once, to whichever comes first.
        let ended = match client.write_all(first).await {
            Ok(()) => end(&mut client).await,
            Err(error) => Err(error.kind()),
        };
        assert_eq!(ended, Err(ErrorKind::ConnectionReset));
        let event = mesh.inbound.next(ConnectionKind::Refuse).await;
        assert_eq!((event.reason, event.verdict), (Some(RefusalReason::Intention), Verdict::Deny));
        assert_eq!((event.rule.as_deref(), event.inbound), (Some("default"), true));
        assert_eq!(event.source.expect("source").to_string(), spiffe("web"));
        // The calling side had opened before it could know, and hears of the verdict, not just of a reset.
        let told = mesh.outbound.next(ConnectionKind::Close).await;
        assert_eq!((told.reason, told.verdict), (Some(RefusalReason::Intention), Verdict::Deny), "{told:?}");
    }
}

#[tokio::test]
async fn a_policy_that_turns_to_deny_ends_live_connections_and_only_those_it_denies() {
    let mut mesh = Mesh::start(&["web", "admin"]).await;
    let mut denied = mesh.client();
    ping(&mut denied, b"first").await.expect("allowed at first");
    let other = mesh.authority.upstream("admin", "api");
    let admin = config(listener(free_port(), "api"), cluster("api", vec![endpoint(mesh.inbound.address)], Some(other)));
    let admin = Running::start("admin-sidecar-proxy", admin, Arc::new(OwnSockets)).await;
    let mut kept = call(admin.address);
    ping(&mut kept, b"first").await.expect("allowed");
    mesh.inbound.change(|listener, _| listener.rbac = allow(&["admin"]));
    assert_eq!(end(&mut denied).await, Err(ErrorKind::ConnectionReset));
    ping(&mut kept, b"still").await.expect("the other one stays");
    let event = mesh.inbound.next(ConnectionKind::Close).await;
    assert_eq!((event.reason, event.verdict), (Some(RefusalReason::Revoked), Verdict::Deny));
    assert_eq!(event.source.expect("source").to_string(), spiffe("web"));
    assert_eq!(event.bytes_to_destination, 5);
    let told = mesh.outbound.next(ConnectionKind::Close).await;
    assert_eq!((told.reason, told.verdict), (Some(RefusalReason::Revoked), Verdict::Deny), "the caller hears why");
    assert_eq!(end(&mut mesh.client()).await, Err(ErrorKind::ConnectionReset), "new ones neither");
    mesh.inbound.change(|listener, _| listener.rbac = allow(&["web"]));
    let again = async {
        while ping(&mut mesh.client(), b"again").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, again).await.expect("allowed again");
}

/// No policy at all: what the configuration makes of an inbound listener without RBAC.
#[tokio::test]
async fn without_policy_everything_is_denied() {
    let mesh = Mesh::start(&["web"]).await;
    mesh.inbound.change(|listener, _| listener.rbac = [Rbac::deny_all()].into());
    let denied = async { while ping(&mut mesh.client(), b"x").await.is_ok() {} };
    timeout(PATIENCE, denied).await.expect("denied");
}

#[test]
fn the_verdict_of_rbac_is_the_verdict_of_the_worker() {
    const SERVICES: [&str; 3] = ["web", "admin", "billing"];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(24));
    let strategy = (proptest::sample::subsequence(&SERVICES[..], 0..=3), any::<bool>(), 0usize..3, any::<bool>());
    let outcome = runner.run(&strategy, |(listed, deny, caller, everyone)| {
        runtime.block_on(async {
            let mut rbac = allow(&listed).to_vec();
            if deny {
                rbac[0].action = RbacAction::Deny;
            }
            if everyone {
                rbac[0].policies[0].principals.push(Principal::Authenticated(None));
            }
            let authority = Authority::new();
            let identity = spiffe(SERVICES[caller]);
            let mut public = public_listener(&authority);
            public.rbac = rbac.into();
            let (rbac, local) = (Arc::clone(&public.rbac), public.address);
            let app = cluster("local_app", vec![endpoint(echo().await)], None);
            let mut inbound = Running::start("api", config(public, app), Arc::new(OwnSockets)).await;
            let tls = authority.upstream(SERVICES[caller], "api");
            let upstream = config(listener(free_port(), "api"), cluster("api", vec![endpoint(local)], Some(tls)));
            let outbound = Running::start("caller", upstream, Arc::new(OwnSockets)).await;
            let mut client = call(outbound.address);
            let passed = ping(&mut client, b"x").await.is_ok();
            let seen = rbac::Connection { identity: Some(&identity), peer: outbound.address, local };
            let expected = rbac::evaluate(&rbac, &seen).allowed;
            let event = inbound.event().await;
            prop_assert_eq!((passed, event.kind == ConnectionKind::Open), (expected, expected), "{:?}", event);
            prop_assert_eq!(event.source.expect("known").to_string(), identity);
            Ok(())
        })
    });
    outcome.expect("verdicts agree");
}

#[tokio::test]
async fn another_instance_is_tried_while_nothing_was_sent() {
    let authority = Authority::new();
    let good = inbound(&authority, &["web"], echo().await, Arc::new(OwnSockets)).await;
    let closed = free_port();
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let hangs_up = silent.local_addr().expect("address");
    tokio::spawn(async move { while silent.accept().await.is_ok() {} });
    let instances = vec![endpoint(closed), endpoint(hangs_up), endpoint(good.address)];
    let mut outbound = outbound(&authority, instances).await;
    for _ in 0..9 {
        let mut client = call(outbound.address);
        ping(&mut client, b"whichever").await.expect("the good one answers");
    }
    for _ in 0..9 {
        assert_eq!(outbound.next(ConnectionKind::Open).await.verdict, Verdict::Allow);
    }
    outbound.change(|listener, _| listener.max_connect_attempts = Some(1));
    let refused = async { while ping(&mut call(outbound.address), b"x").await.is_ok() {} };
    timeout(PATIENCE, refused).await.expect("one attempt is one attempt");
}

#[tokio::test]
async fn without_a_healthy_instance_the_caller_is_reset() {
    let authority = Authority::new();
    let mut sick = endpoint(free_port());
    sick.healthy = false;
    let mut outbound = outbound(&authority, vec![sick]).await;
    let mut client = call(outbound.address);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    let event = outbound.next(ConnectionKind::Refuse).await;
    assert_eq!((event.reason, event.inbound), (Some(RefusalReason::NoHealthyInstance), false));
    assert_eq!(event.source.expect("source").to_string(), spiffe("web"));
    assert!(event.detail.expect("detail").contains("\"api\""));
}

#[tokio::test]
async fn an_application_that_is_not_there_resets_the_caller() {
    let authority = Authority::new();
    let mut inbound = inbound(&authority, &["web"], free_port(), Arc::new(OwnSockets)).await;
    let outbound = outbound(&authority, vec![endpoint(inbound.address)]).await;
    let mut client = call(outbound.address);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(inbound.next(ConnectionKind::Refuse).await.reason, Some(RefusalReason::Connect));
}

#[tokio::test]
async fn the_limit_of_a_listener_holds_and_frees_up() {
    let mut mesh = Mesh::start(&["web"]).await;
    mesh.outbound.change(|listener, _| listener.max_connections = Some(2));
    // Whether the change is in force shows only by the limit itself.
    let mut held = Vec::new();
    let limited = async {
        loop {
            let mut client = mesh.client();
            if ping(&mut client, b"x").await.is_err() {
                return;
            }
            held.push(client);
        }
    };
    timeout(PATIENCE, limited).await.expect("limited");
    let event = mesh.outbound.next(ConnectionKind::Refuse).await;
    assert_eq!(event.reason, Some(RefusalReason::Limit));
    drop(held);
    let again = async {
        while ping(&mut mesh.client(), b"x").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, again).await.expect("free again");
}

#[tokio::test]
async fn an_upstream_is_offered_on_ipv6_loopback_too() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        assert!(std::env::var_os("CI").is_none(), "CI has IPv6, so that this is tested");
        return eprintln!("SKIPPED: no IPv6 loopback");
    }
    let mesh = Mesh::start(&["web"]).await;
    let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), mesh.outbound.address.port());
    ping(&mut call(v6), b"six").await.expect("echo");
}

/// Fails once in the middle of a connection's task.
struct PanicsOnce(AtomicBool);

impl Sockets for PanicsOnce {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'static, std::io::Result<std::net::TcpListener>> {
        OwnSockets.listen(address)
    }
    fn forget(&self, _: SocketAddr) {}
    fn app_socket(&self, family: Family) -> BoxFuture<'static, std::io::Result<TcpSocket>> {
        let first = !self.0.swap(true, Ordering::SeqCst);
        async move {
            assert!(!first, "the bug of this test");
            OwnSockets.app_socket(family).await
        }
        .boxed()
    }
}

#[tokio::test]
async fn a_panic_ends_its_own_connection_and_no_other() {
    let authority = Authority::new();
    let sockets = Arc::new(PanicsOnce(AtomicBool::new(false)));
    let mut inbound = inbound(&authority, &["web"], echo().await, sockets).await;
    let outbound = outbound(&authority, vec![endpoint(inbound.address)]).await;
    let mut unlucky = call(outbound.address);
    assert_eq!(end(&mut unlucky).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(inbound.next(ConnectionKind::Refuse).await.detail.as_deref(), Some("the connection's task failed"));
    ping(&mut call(outbound.address), b"next").await.expect("echo");
}
