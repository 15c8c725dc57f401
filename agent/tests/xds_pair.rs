//! The pair {culvert worker, culvert control plane}: all that the one sends is understood by the other, and the RBAC that is
//! sent decides as [`culvert_types::decide`] does, for every table of intentions over a pair of services.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_api::client::Client;
use culvert_control::{Control, ControlConfig, NodeDialer, Reloadable, XdsPeer};
use culvert_proxy::config::{Listener, ProxyConfig};
use culvert_proxy::rbac::{Connection, evaluate};
use culvert_proxy::xds::{Dial, Node, Transport, XdsChannel, XdsClient};
use culvert_types::{Action, Datacenter, Encryption, Intention, ServiceName, TrustDomain, decide};
use futures::FutureExt;
use futures::future::BoxFuture;
use hyper::Method;
use serde_json::{Value, json};
use tokio::net::UnixStream;

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
        let id = "d5c8c2f4-0000-4000-8000-000000000001";
        let config = ControlConfig {
            settings: Reloadable { default_policy, encryption: Encryption::Always },
            ..ControlConfig::dev("n1", id, Datacenter::new("dc1").expect("name"))
        };
        let control = Arc::new(Control::start(config, Arc::new(NodeDialer)).await.expect("started"));
        let api = Client::new(&control.http_addrs()[0].to_string(), None).expect("address");
        let upstreams = json!([{"DestinationName": "api", "LocalBindPort": 8080}]);
        for (name, port, proxy) in [("api", 9001, json!({})), ("web", 9002, json!({"Upstreams": upstreams}))] {
            // Nobody listens here: the sidecar is as healthy as its service, which has no checks.
            let sidecar = json!({"Proxy": proxy, "Check": {"AliasService": name}});
            let body = json!({"Name": name, "Port": port, "Connect": {"SidecarService": sidecar}});
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
