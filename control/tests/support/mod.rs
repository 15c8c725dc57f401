//! What the tests of the xDS server share: a control plane in this process with one node and its services.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub(crate) mod envoy;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_control::Reloadable;
use culvert_control::ca::{Authority, CaSettings, Clock, Leaves};
use culvert_control::state::rows::{
    Check, CheckDefinition, IntentionEntry, Node, Probe, Proxy, ProxySettings, Service, ServiceKind, Upstream, Weights,
};
use culvert_control::state::{Ledger, Plan, UpdateError, intention_key, row_key};
use culvert_control::store::{MemoryStore, Table};
use culvert_control::xds::{XdsConfig, XdsLimits, XdsServer};
use culvert_types::{Action, Datacenter, Encryption, HealthStatus, Intention, ServiceName};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) const NODE: &str = "node1";
/// How long anything may take on a slow, busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A control plane with an xDS server on loopback.
pub(crate) struct Control {
    pub(crate) ledger: Ledger,
    pub(crate) authority: Authority,
    pub(crate) leaves: Leaves,
    pub(crate) settings: watch::Sender<Reloadable>,
    pub(crate) xds: XdsServer,
    pub(crate) stop: CancellationToken,
}

impl Control {
    pub(crate) async fn start(default_policy: Action) -> Self {
        Self::with(default_policy, XdsLimits::default()).await
    }

    pub(crate) async fn with(default_policy: Action, limits: XdsLimits) -> Self {
        let stop = CancellationToken::new();
        let store = Arc::new(MemoryStore::default());
        let ledger = Ledger::start(store, stop.clone()).await.expect("memory store");
        let settings = CaSettings { root_change_smear: Duration::from_millis(200), ..CaSettings::default() };
        let datacenter = Datacenter::new("dc1").expect("name");
        let authority = Authority::open(ledger.clone(), datacenter, settings, Clock::system(), stop.clone());
        let authority = authority.await.expect("a new authority");
        let leaves = Leaves::new(authority.clone(), NODE, stop.clone());
        let (settings, follow) = watch::channel(Reloadable { default_policy, encryption: Encryption::Always });
        let config = XdsConfig {
            node: NODE.to_owned(),
            ledger: ledger.clone(),
            leaves: leaves.clone(),
            settings: follow,
            limits,
            stop: stop.clone(),
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
        let xds = XdsServer::start(config, Some(listener)).expect("bound");
        let control = Self { ledger, authority, leaves, settings, xds, stop };
        control
            .write(|plan| {
                let (id, address) = ("d5c8c2f4-0000-4000-8000-000000000001".to_owned(), Ipv4Addr::LOCALHOST.into());
                plan.put(Table::Nodes, NODE, &Node { name: NODE.to_owned(), id, address, meta: BTreeMap::new() });
            })
            .await;
        control
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.xds.address().expect("it listens")
    }

    pub(crate) async fn write(&self, change: impl Fn(&mut Plan)) {
        let update = self.ledger.update(|_, plan| {
            change(plan);
            Ok::<_, UpdateError>(())
        });
        update.await.expect("memory store");
    }

    pub(crate) async fn put(&self, service: &Service) {
        self.write(|plan| plan.put(Table::Services, row_key(&service.node, &service.id), service)).await;
    }

    pub(crate) async fn deregister(&self, id: &str) {
        self.write(|plan| plan.delete(Table::Services, row_key(NODE, id))).await;
    }

    pub(crate) async fn intend(&self, source: &str, destination: &str, action: Action) {
        let rule = rule(source, destination, action);
        let now = SystemTime::now();
        let entry = IntentionEntry {
            rule,
            id: None,
            description: String::new(),
            meta: BTreeMap::new(),
            created_at: now,
            updated_at: now,
        };
        self.write(|plan| plan.put(Table::Intentions, intention_key(&entry.rule), &entry)).await;
    }

    pub(crate) async fn forget(&self, source: &str, destination: &str) {
        let key = intention_key(&rule(source, destination, Action::Allow));
        self.write(|plan| plan.delete(Table::Intentions, key.clone())).await;
    }

    pub(crate) async fn set_health(&self, service_id: &str, status: HealthStatus) {
        let check = Check {
            node: NODE.to_owned(),
            id: format!("service:{service_id}"),
            name: "test".to_owned(),
            notes: String::new(),
            service_id: service_id.to_owned(),
            service_name: service_id.to_owned(),
            service_tags: Vec::new(),
            status,
            output: String::new(),
            definition: CheckDefinition {
                probe: Probe::Fixed,
                interval: Duration::ZERO,
                timeout: Duration::ZERO,
                success_before_passing: 0,
                failures_before_warning: 0,
                failures_before_critical: 0,
                output_max_size: 4096,
                deregister_critical_service_after: Duration::ZERO,
            },
        };
        self.write(|plan| plan.put(Table::Checks, row_key(NODE, &check.id), &check)).await;
    }

    pub(crate) async fn shutdown(self) {
        self.stop.cancel();
        self.xds.stopped().await;
    }
}

pub(crate) fn rule(source: &str, destination: &str, action: Action) -> Intention {
    Intention { source: source.parse().expect("name"), destination: destination.parse().expect("name"), action }
}

pub(crate) fn name(text: &str) -> ServiceName {
    ServiceName::new(text).expect("name")
}

pub(crate) fn service(name: &str, port: u16) -> Service {
    Service {
        node: NODE.to_owned(),
        id: name.to_owned(),
        name: name.to_owned(),
        kind: ServiceKind::Typical,
        tags: Vec::new(),
        meta: BTreeMap::new(),
        address: String::new(),
        port,
        tagged_addresses: BTreeMap::new(),
        weights: Weights::default(),
        enable_tag_override: false,
        connect_native: false,
        proxy: None,
        declared_sidecar: None,
    }
}

/// The sidecar of `of`, on loopback.
pub(crate) fn sidecar(of: &str, port: u16, application: u16, upstreams: Vec<Upstream>) -> Service {
    let id = format!("{of}-sidecar-proxy");
    let settings = ProxySettings { bind_address: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), ..ProxySettings::default() };
    let proxy = Proxy {
        destination_service_name: of.to_owned(),
        destination_service_id: of.to_owned(),
        local_service_address: "127.0.0.1".to_owned(),
        local_service_port: application,
        settings,
        upstreams,
        ..Proxy::default()
    };
    Service { kind: ServiceKind::ConnectProxy, proxy: Some(proxy), ..service(&id, port) }
}

pub(crate) fn upstream(destination: &str, address: &str, port: u16) -> Upstream {
    Upstream {
        destination_name: destination.to_owned(),
        local_bind_address: address.to_owned(),
        local_bind_port: port,
        ..Upstream::default()
    }
}

/// Asks until the answer is yes.
///
/// # Panics
/// When it is still no after [`PATIENCE`].
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut question: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !question().await {
        assert!(tokio::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
