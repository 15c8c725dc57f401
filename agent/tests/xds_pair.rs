//! The pair {culvert worker, culvert control plane}: all that the one sends is understood by the other, and the RBAC that is
//! sent decides as [`culvert_types::decide`] does, for every table of intentions over a pair of services. Certificates that the
//! one renews and rotates are used by the other without a lost byte.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use culvert_api::client::Client;
use culvert_control::ca::{CaSettings, Leaf};
use culvert_control::{Control, ControlConfig, NodeDialer, Reloadable, XdsPeer};
use culvert_proxy::config::{Listener, ProxyConfig};
use culvert_proxy::events::{EventReader, Events};
use culvert_proxy::handoff::ProxyStatus;
use culvert_proxy::metrics::Metrics;
use culvert_proxy::proxy::{Feed, Proxy};
use culvert_proxy::rbac::{Connection, evaluate};
use culvert_proxy::sockets::OwnSockets;
use culvert_proxy::threads::DataThreads;
use culvert_proxy::xds::{Dial, Node, Transport, XdsChannel, XdsClient};
use culvert_types::{Action, Datacenter, Encryption, Intention, ServiceName, TrustDomain, decide};
use futures::FutureExt;
use futures::future::BoxFuture;
use hyper::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Longest wait for anything that must happen. Generous: machines are slow.
const PATIENCE: Duration = Duration::from_secs(60);
/// Every rule that can speak about calls of `web` and `db` to `api`.
const RULES: [(&str, &str); 4] = [("web", "api"), ("*", "api"), ("web", "*"), ("*", "*")];

/// Hands the control plane one end of a socket pair, as the agent does for its worker.
struct HandOver(Arc<Control>);

impl Dial for HandOver {
    fn dial(&self) -> BoxFuture<'static, io::Result<Box<dyn Transport>>> {
        let control = Arc::clone(&self.0);
        async move {
            let (ours, theirs) = UnixStream::pair()?;
            control.serve_xds(theirs, XdsPeer::Node);
            Ok(Box::new(ours) as Box<dyn Transport>)
        }
        .boxed()
    }
}

struct World {
    control: Arc<Control>,
    api: Client,
    channel: XdsChannel,
}

impl World {
    /// `web` calls `api`; both have sidecars.
    async fn start(default_policy: Action) -> Self {
        Self::with(default_policy, CaSettings::default(), Ipv4Addr::LOCALHOST, 9001).await
    }

    /// Everything is at `here`; the application of `api` at `port`.
    async fn with(default_policy: Action, ca: CaSettings, here: Ipv4Addr, port: u16) -> Self {
        let id = "d5c8c2f4-0000-4000-8000-000000000001";
        let config = ControlConfig {
            settings: Reloadable { default_policy, encryption: Encryption::Always },
            ca,
            ..ControlConfig::dev("n1", id, Datacenter::new("dc1").expect("name"))
        };
        let control = Arc::new(Control::start(config, Arc::new(NodeDialer)).await.expect("started"));
        let api = Client::new(&control.http_addrs()[0].to_string(), None).expect("address");
        let mut upstream = json!({"DestinationName": "api", "LocalBindPort": 8080});
        let mut at = json!({});
        if here != Ipv4Addr::LOCALHOST {
            at = json!({"Address": here});
            upstream["LocalBindAddress"] = json!(here);
        }
        for (name, port, upstreams) in [("api", port, json!([])), ("web", 9002, json!([upstream]))] {
            // Nobody listens here: the sidecar is as healthy as its service, which has no checks.
            let proxy = json!({"Upstreams": upstreams, "LocalServiceAddress": here});
            let mut body = at.clone();
            body["Name"] = json!(name);
            body["Port"] = json!(port);
            body["Connect"] = json!({"SidecarService": {"Proxy": proxy, "Check": {"AliasService": name}}});
            control.register_service(serde_json::from_value(body).expect("body")).await.expect("registered");
        }
        let channel = XdsChannel::over(HandOver(Arc::clone(&control)));
        Self { control, api, channel }
    }

    fn proxy(&self, service: &str) -> XdsClient {
        XdsClient::start(self.channel.clone(), Node::new(format!("{service}-sidecar-proxy"), service), None)
    }

    async fn set(&self, (source, destination): (&str, &str), action: Option<Action>) {
        let path = format!("/v1/connect/intentions/exact?source={source}&destination={destination}");
        let done: Value = match action {
            None => self.api.call(Method::DELETE, &path, None::<&()>).await.expect("deleted"),
            Some(action) => {
                let body = json!({"SourceName": source, "DestinationName": destination, "SourceType": "consul",
                    "Action": action.as_str()});
                self.api.call(Method::PUT, &path, Some(&body)).await.expect("written")
            }
        };
        assert_eq!(done, json!(true));
    }
}

async fn config_with(client: &XdsClient, what: &str, is: impl Fn(&ProxyConfig) -> bool) -> Arc<ProxyConfig> {
    let mut seen = client.config();
    let waiting = tokio::time::timeout(PATIENCE, seen.wait_for(|config| is(config))).await;
    let status = client.status().borrow().clone();
    assert_eq!(status.last_nack, None);
    let Ok(found) = waiting else {
        let config = client.config().borrow().clone();
        panic!("{what}: not within {PATIENCE:?}; {status:?}; {config:?}");
    };
    let found = found.expect("client runs");
    Arc::clone(&found)
}

fn public(config: &ProxyConfig) -> Option<&Arc<Listener>> {
    config.listeners.iter().find(|(name, _)| name.starts_with("public_listener:")).map(|(_, listener)| listener)
}

/// Verdict and reason of the worker.
fn judge(listener: &Listener, identity: &str) -> (bool, String) {
    let (peer, local) = (SocketAddr::from(([127, 0, 0, 1], 40000)), listener.address);
    let decision = evaluate(&listener.rbac, &Connection { identity: Some(identity), peer, local });
    let rule = listener.explain.as_ref().expect("culvert explains").rule(Some(identity), &decision);
    (decision.allowed, rule)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_that_is_sent_is_understood() {
    let world = World::start(Action::Deny).await;
    let (web, api) = (world.proxy("web"), world.proxy("api"));
    // Its own, and the upstream on both loopback addresses.
    let config = config_with(&web, "web's listeners", |config| config.listeners.len() == 3).await;
    let outbound = config.listeners.values().find(|one| one.address.port() == 8080).expect("upstream");
    let cluster = config.cluster_of(outbound).expect("its cluster");
    let tls = cluster.tls.as_ref().expect("mutual TLS");
    assert!(cluster.name.starts_with("api.default.dc1.internal.") && tls.sni == cluster.name);
    let listener = config_with(&api, "api's listener", |config| public(config).is_some()).await;
    let listener = public(&listener).expect("public listener");
    let endpoints = config_with(&web, "api's instance", |config| {
        config.clusters.get(&cluster.name).is_some_and(|cluster| !cluster.endpoints.is_empty())
    });
    let endpoint = endpoints.await.clusters[&cluster.name].endpoints[0].clone();
    assert_eq!(endpoint.address.port(), listener.address.port());
    assert_eq!(endpoint.node.as_deref(), Some("n1"));
    for client in [&web, &api] {
        let mut status = client.status();
        let ready = tokio::time::timeout(PATIENCE, status.wait_for(|status| status.ready)).await;
        assert!(ready.expect("in time").expect("client runs").connected);
    }
    world.control.shutdown().await;
}

/// The tables of intentions, each one change away from the one before: reflected counting in base three.
fn table(index: usize) -> [Option<Action>; RULES.len()] {
    let mut table = [None; RULES.len()];
    let mut rest = index;
    for (place, entry) in table.iter_mut().enumerate() {
        let reflected = (index / 3_usize.pow(u32::try_from(place).expect("small") + 1)) % 2 == 1;
        let digit = if reflected { 2 - rest % 3 } else { rest % 3 };
        *entry = [None, Some(Action::Allow), Some(Action::Deny)][digit];
        rest /= 3;
    }
    table
}

/// Every table in turn, set through the API of one running control plane, and judged by a connected worker.
async fn verdicts_are_those_of_decide(default: Action) {
    let world = World::start(default).await;
    let api = world.proxy("api");
    config_with(&api, "api's listener", |config| public(config).is_some()).await;
    let trust_domain = trust_domain(&world).await;
    let destination = ServiceName::new("api").expect("name");
    let mut current = [None; RULES.len()];
    for index in 0..3_usize.pow(4) {
        let wanted = table(index);
        for ((rule, old), new) in RULES.into_iter().zip(current).zip(wanted) {
            if old != new {
                world.set(rule, new).await;
            }
        }
        current = wanted;
        let intentions: Vec<Intention> = RULES
            .into_iter()
            .zip(wanted)
            .filter_map(|((source, destination), action)| {
                let (source, destination) = (source.parse().expect("name"), destination.parse().expect("name"));
                Some(Intention { source, destination, action: action? })
            })
            .collect();
        // The rules of the listener and the intentions behind them come in one resource: when these are there, so are those.
        let arrived = |listener: &Listener| {
            let sent = &listener.explain.as_ref().expect("culvert explains").intentions;
            sent.len() == intentions.len() && intentions.iter().all(|intention| sent.contains(intention))
        };
        let config = config_with(&api, "the new intentions", |config| public(config).is_some_and(|one| arrived(one)));
        let config = config.await;
        for source in ["web", "db"] {
            let name = ServiceName::new(source).expect("name");
            let decision = decide(&intentions, &name, &destination, default);
            let identity = format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/{source}");
            let verdict = judge(public(&config).expect("public listener"), &identity);
            assert_eq!(verdict, (decision.allowed(), decision.by.to_string()), "{source} by {intentions:?}");
        }
    }
    world.control.shutdown().await;
}

async fn trust_domain(world: &World) -> TrustDomain {
    let roots: Value = world.api.get("/v1/connect/ca/roots").await.expect("roots");
    TrustDomain::new(roots["TrustDomain"].as_str().expect("text")).expect("trust domain")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verdicts_by_default_deny_are_those_of_decide() {
    verdicts_are_those_of_decide(Action::Deny).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verdicts_by_default_allow_are_those_of_decide() {
    verdicts_are_those_of_decide(Action::Allow).await;
}

#[test]
fn tables_are_all_there_and_one_change_apart() {
    let tables: Vec<_> = (0..81).map(table).collect();
    for (index, table) in tables.iter().enumerate() {
        assert!(!tables[..index].contains(table), "{table:?} twice");
        if let Some(before) = index.checked_sub(1).map(|before| &tables[before]) {
            assert_eq!(before.iter().zip(table).filter(|(old, new)| old != new).count(), 1);
        }
    }
}

/// A loopback address of this process's own: no port on it is taken, whatever else runs on the machine.
fn own_address() -> Ipv4Addr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 32, high, low.clamp(1, 254))
}

async fn echo_server(here: Ipv4Addr) -> u16 {
    let listener = TcpListener::bind((here, 0)).await.expect("loopback");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                // The peer decides how it ends.
                drop(tokio::io::copy(&mut read, &mut write).await);
            });
        }
    });
    port
}

/// A worker's proxy with sockets of its own, until it is dropped.
struct Running {
    _client: XdsClient,
    _threads: DataThreads,
    _events: EventReader,
    _stop: oneshot::Sender<Duration>,
}

impl Running {
    async fn start(world: &World, service: &str) -> Self {
        let client = world.proxy(service);
        let threads = DataThreads::new(1).expect("a thread");
        let (events, reader) = Events::new(Arc::new(Metrics::default()));
        let id = format!("{service}-sidecar-proxy");
        let proxy = Proxy::new(&id, "n1", Arc::new(OwnSockets), threads.placement(), events);
        let feed = Feed { config: client.config(), status: client.status() };
        let (publish, mut status) = watch::channel(ProxyStatus::default());
        let (stop, stopped) = oneshot::channel();
        tokio::spawn(proxy.run(feed, publish, stopped));
        let ready = tokio::time::timeout(PATIENCE, status.wait_for(|status| status.ready)).await;
        ready.expect("in time").expect("it runs");
        Self { _client: client, _threads: threads, _events: reader, _stop: stop }
    }
}

/// Sends numbered bytes, and takes exactly them back.
async fn ping(stream: &mut TcpStream, round: u64, length: usize) {
    let sent: Vec<u8> = round.to_be_bytes().into_iter().cycle().take(length).collect();
    let mut back = vec![0; length];
    stream.write_all(&sent).await.expect("no connection is lost");
    let read = tokio::time::timeout(PATIENCE, stream.read_exact(&mut back)).await;
    read.expect("in time").expect("no byte is lost");
    assert!(back == sent, "round {round}: other bytes came back");
}

/// One connection that lasts beside one after another, until `end`. Each round is counted.
async fn traffic(upstream: SocketAddr, rounds: Arc<AtomicU64>, end: CancellationToken) {
    let call = async || TcpStream::connect(upstream).await.expect("the upstream listens");
    let mut lasting = call().await;
    for round in 0.. {
        if end.is_cancelled() {
            break;
        }
        ping(&mut lasting, round, 3000).await;
        let mut short = call().await;
        ping(&mut short, round, 100).await;
        end_well(short).await;
        rounds.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    end_well(lasting).await;
}

async fn end_well(mut stream: TcpStream) {
    stream.shutdown().await.expect("half-closed");
    let mut rest = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    read.expect("in time").expect("a clean end");
    assert!(rest.is_empty(), "{} bytes that nobody sent", rest.len());
}

/// Waits for `what`, then for more rounds of traffic in that state.
async fn under_traffic(rounds: &AtomicU64, what: &str, mut is: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is().await {
        assert!(start.elapsed() < 2 * PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let seen = rounds.load(Ordering::Relaxed);
    while rounds.load(Ordering::Relaxed) < seen + 40 {
        assert!(start.elapsed() < 2 * PATIENCE, "the traffic stands still: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaves_and_roots_rotate_under_traffic_without_a_lost_byte() {
    let here = own_address();
    let ca = CaSettings {
        leaf_ttl: Duration::from_secs(12),
        allow_short_ttls_for_tests: true,
        root_change_smear: Duration::from_millis(200),
        ..CaSettings::default()
    };
    let world = World::with(Action::Allow, ca, here, echo_server(here).await).await;
    let _running = (Running::start(&world, "api").await, Running::start(&world, "web").await);
    let upstream = SocketAddr::from((here, 8080));
    eventually(async || {
        let mut stream = TcpStream::connect(upstream).await.ok()?;
        stream.write_all(b"?").await.ok()?;
        stream.read_u8().await.ok()
    })
    .await;

    let (rounds, end) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
    let callers: Vec<_> = (0..3).map(|_| tokio::spawn(traffic(upstream, Arc::clone(&rounds), end.clone()))).collect();
    let leaves = async || -> [Arc<Leaf>; 2] {
        let leaf = async |name: &str| {
            let name = ServiceName::new(name).expect("name");
            world.control.leaves().get(&name).await.expect("a leaf")
        };
        [leaf("web").await, leaf("api").await]
    };
    let first = leaves().await;
    under_traffic(&rounds, "both leaves are renewed", async || {
        let now = leaves().await;
        first.iter().zip(now).all(|(old, new)| old.certificate.serial != new.certificate.serial)
    })
    .await;
    let authority = world.control.authority();
    let old = authority.roots().expect("rows").active_id.clone();
    authority.rotate().await.expect("rotated");
    assert_eq!(authority.roots().expect("rows").roots.len(), 2);
    under_traffic(&rounds, "both leaves are from the new root", async || {
        leaves().await.iter().all(|leaf| leaf.certificate.root_id != old)
    })
    .await;
    under_traffic(&rounds, "the old root is gone", async || {
        authority.drop_old_roots().await.expect("stored");
        authority.roots().expect("rows").roots.len() == 1
    })
    .await;
    assert!(callers.iter().all(|caller| !caller.is_finished()), "one has lost something");
    end.cancel();
    for caller in callers {
        caller.await.expect("no byte was lost");
    }
    world.control.shutdown().await;
}

/// Asks until there is an answer.
async fn eventually<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "nothing was carried in {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
