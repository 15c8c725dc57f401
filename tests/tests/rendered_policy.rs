//! Control plane and worker together mean what `decide` says: what the one renders, the other parses without complaint and
//! judges alike.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_control::Reloadable;
use culvert_control::ca::{Authority, CaSettings, Clock, Leaf, Leaves, Roots};
use culvert_control::state::rows::{IntentionEntry, Proxy, ProxySettings, Service, ServiceKind, Upstream, Weights};
use culvert_control::state::{Ledger, State, UpdateError, intention_key, row_key};
use culvert_control::store::{Contents, MemoryStore, Revision, Row, RowKey, Table};
use culvert_control::xds::render::{Kind, LOCAL_APP, render};
use culvert_control::xds::snapshot::{Context, Snapshot};
use culvert_control::xds::{XdsConfig, XdsLimits, XdsServer};
use culvert_proxy::config::parse::{parse_cluster, parse_endpoints, parse_listener};
use culvert_proxy::config::{Listener, ProxyConfig};
use culvert_proxy::rbac::{Connection, evaluate};
use culvert_proxy::xds::{Node, XdsChannel, XdsClient};
use culvert_types::{
    Action, Datacenter, DecidedBy, Encryption, Intention, IntentionSubject, ServiceIdentity, ServiceName, decide,
};
use proptest::prelude::*;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const NODE: &str = "node1";
const NAMES: [&str; 5] = ["web", "web.v2", "webxv2", "api", "db-1_x"];
const PATIENCE: Duration = Duration::from_secs(60);

fn name(text: &str) -> ServiceName {
    ServiceName::new(text).expect("name")
}

/// The sidecar of `of`, which calls `api`.
fn sidecar(of: &str) -> Service {
    let upstream = Upstream {
        destination_name: "api".to_owned(),
        local_bind_port: 8080,
        connect_timeout: Some(Duration::from_millis(1500)),
        max_connections: Some(7),
        ..Upstream::default()
    };
    let settings = ProxySettings { max_inbound_connections: Some(9), ..ProxySettings::default() };
    let proxy = Proxy {
        destination_service_name: of.to_owned(),
        local_service_address: "127.0.0.1".to_owned(),
        local_service_port: 9001,
        settings,
        upstreams: vec![upstream],
        ..Proxy::default()
    };
    Service {
        node: NODE.to_owned(),
        id: format!("{of}-sidecar-proxy"),
        name: format!("{of}-sidecar-proxy"),
        kind: ServiceKind::ConnectProxy,
        tags: Vec::new(),
        meta: BTreeMap::new(),
        address: "192.0.2.1".to_owned(),
        port: 21000,
        tagged_addresses: BTreeMap::new(),
        weights: Weights::default(),
        enable_tag_override: false,
        connect_native: false,
        proxy: Some(proxy),
        declared_sidecar: None,
    }
}

fn entry(rule: &Intention) -> IntentionEntry {
    IntentionEntry {
        rule: rule.clone(),
        id: None,
        description: String::new(),
        meta: BTreeMap::new(),
        created_at: SystemTime::UNIX_EPOCH,
        updated_at: SystemTime::UNIX_EPOCH,
    }
}

/// An authority with a leaf for the sidecar of `of`, and what serves it.
struct World {
    ledger: Ledger,
    leaves: Leaves,
    stop: CancellationToken,
}

impl World {
    async fn with(of: &str) -> Self {
        let stop = CancellationToken::new();
        let ledger = Ledger::start(Arc::new(MemoryStore::default()), stop.clone()).await.expect("memory");
        let datacenter = Datacenter::new("dc1").expect("name");
        let settings = CaSettings::default();
        let authority = Authority::open(ledger.clone(), datacenter, settings, Clock::system(), stop.clone());
        let leaves = Leaves::new(authority.await.expect("a new authority"), NODE, stop.clone());
        let world = Self { ledger, leaves, stop };
        let sidecar = sidecar(of);
        world.put(Table::Services, &row_key(NODE, &sidecar.id), &sidecar).await;
        world
    }

    async fn put<T: serde::Serialize>(&self, table: Table, key: &str, value: &T) {
        let update = self.ledger.update(|_, plan| {
            plan.put(table, key, value);
            Ok::<_, UpdateError>(())
        });
        update.await.expect("memory");
    }
}

/// The state of a node with one sidecar and these intentions.
fn state(of: &str, intentions: &[Intention]) -> State {
    let row = |value: Vec<u8>| Row { value: value.into(), created: Revision(1), modified: Revision(1) };
    let sidecar = sidecar(of);
    let service = serde_json::to_vec(&sidecar).expect("JSON");
    let mut rows = vec![(RowKey::new(Table::Services, row_key(NODE, &sidecar.id)), row(service))];
    let unique: BTreeMap<String, &Intention> = intentions.iter().map(|rule| (intention_key(rule), rule)).collect();
    for (key, rule) in unique {
        rows.push((RowKey::new(Table::Intentions, key), row(serde_json::to_vec(&entry(rule)).expect("JSON"))));
    }
    State::load(Contents { revision: Revision(1), rows }).expect("rows of ours")
}

/// What the worker makes of the public listener.
fn public_listener(state: &State, of: &str, default_action: Action, roots: &Roots, leaf: &Arc<Leaf>) -> Listener {
    let context = Context { node: NODE, default_action, roots, leaf };
    let snapshot = Snapshot::take(state, &format!("{of}-sidecar-proxy"), &context).expect("registered");
    let resources = render(&snapshot);
    for (name, resource) in resources.of(Kind::Cluster) {
        parse_cluster(name, &resource.body).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for (name, resource) in resources.of(Kind::Endpoints) {
        parse_endpoints(name, &resource.body).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let mut public = None;
    for (name, resource) in resources.of(Kind::Listener) {
        let parsed = parse_listener(name, &resource.body).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(parsed.complaint, None, "{name}");
        if name.starts_with("public_listener") {
            public = Some(parsed.listener);
        }
    }
    public.expect("the application listens")
}

fn subject() -> impl Strategy<Value = IntentionSubject> {
    prop_oneof![
        3 => proptest::sample::select(&NAMES[..]).prop_map(|text| IntentionSubject::Exact(name(text))),
        1 => Just(IntentionSubject::Any),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Allow), Just(Action::Deny)]
}

fn intention() -> impl Strategy<Value = Intention> {
    (subject(), subject(), action()).prop_map(|(source, destination, action)| Intention { source, destination, action })
}

#[test]
fn the_worker_judges_as_decide_does_and_names_the_same_rule() {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let (roots, leaf) = runtime.block_on(async {
        let world = World::with("api").await;
        let leaf = world.leaves.get(&name("api")).await.expect("leaf");
        (world.leaves.authority().roots().expect("rows"), leaf)
    });
    let mut runner = proptest::test_runner::TestRunner::default();
    let inputs = (proptest::collection::vec(intention(), 0..12), action());
    let outcome = runner.run(&inputs, |(intentions, default)| {
        let state = state("api", &intentions);
        let listener = public_listener(&state, "api", default, &roots, &leaf);
        let explain = listener.explain.as_ref().expect("explained");
        for source in NAMES.into_iter().chain(["stranger"]).map(name) {
            let (trust_domain, datacenter) = (roots.trust_domain.clone(), Datacenter::new("dc2").expect("name"));
            let id = ServiceIdentity { trust_domain, datacenter, service: source.clone() }.to_string();
            let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1);
            let connection = Connection { identity: Some(&id), peer: loopback, local: loopback };
            let verdict = evaluate(&listener.rbac, &connection);
            let decision = decide(state.rules().iter(), &source, &name("api"), default);
            prop_assert_eq!(verdict.allowed, decision.allowed(), "{} to api", source);
            prop_assert_eq!(explain.rule(Some(&id), &verdict), decision.by.to_string());
            let policy = verdict.policy.as_deref().map(str::to_owned);
            let expected = match decision.by {
                DecidedBy::Intention(rule) if rule.action != default => Some(rule.to_string()),
                _ => None,
            };
            prop_assert_eq!(policy, expected, "the policy is named after the intention that decided");
        }
        Ok(())
    });
    outcome.expect("equal verdicts");
}

#[tokio::test]
async fn the_workers_client_takes_everything_that_the_control_plane_sends() {
    let world = World::with("web").await;
    let (_settings, follow) =
        watch::channel(Reloadable { default_policy: Action::Deny, encryption: Encryption::Always });
    let config = XdsConfig {
        node: NODE.to_owned(),
        ledger: world.ledger.clone(),
        leaves: world.leaves.clone(),
        settings: follow,
        limits: XdsLimits::default(),
        stop: world.stop.clone(),
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
    let server = XdsServer::start(config, Some(listener)).expect("bound");
    let channel = XdsChannel::tcp(server.address().expect("bound"));
    let client = XdsClient::start(channel, Node::new("web-sidecar-proxy", "web"), None);
    let mut config = client.config();
    let complete = |config: &Arc<ProxyConfig>| config.listeners.len() == 3 && config.clusters.len() == 2;
    tokio::time::timeout(PATIENCE, config.wait_for(complete)).await.expect("in time").expect("the client runs");
    assert!(config.borrow().clusters.contains_key(LOCAL_APP));
    assert_eq!(client.status().borrow().last_nack, None);

    let rule = Intention {
        source: "x".parse().expect("name"),
        destination: "web".parse().expect("name"),
        action: Action::Allow,
    };
    world.put(Table::Intentions, &intention_key(&rule), &entry(&rule)).await;
    let explained = |config: &Arc<ProxyConfig>| {
        let explain = config.listeners.values().find_map(|listener| listener.explain.as_ref());
        explain.is_some_and(|explain| *explain.intentions == [rule.clone()])
    };
    tokio::time::timeout(PATIENCE, config.wait_for(explained)).await.expect("in time").expect("the client runs");
    world.leaves.authority().rotate().await.expect("rotation");
    let both = |config: &Arc<ProxyConfig>| {
        config.listeners.values().any(|listener| listener.tls.as_ref().is_some_and(|tls| tls.roots.len() == 2))
    };
    tokio::time::timeout(PATIENCE, config.wait_for(both)).await.expect("in time").expect("the client runs");
    assert_eq!(client.status().borrow().last_nack, None);
    let proxies = server.status().proxies();
    assert!(proxies["web-sidecar-proxy"].refusals.is_empty());
    world.stop.cancel();
    server.stopped().await;
}
