//! Which instances, which addresses, which intentions.

use std::collections::BTreeMap;
use std::time::SystemTime;

use culvert_types::TrustDomain;
use zeroize::Zeroizing;

use super::*;
use crate::ca::SignedLeaf;
use crate::state::rows::{
    Check, CheckDefinition, IntentionEntry, Node, Probe, TaggedAddress, WORKLOAD_ADDRESS, Weights,
};
use crate::state::{intention_key, row_key};
use crate::store::{Contents, Revision, Row, RowKey, Table};

const NODE: &str = "node1";

fn service(node: &str, name: &str, port: u16) -> Service {
    Service {
        node: node.to_owned(),
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

fn sidecar(node: &str, of: &str, port: u16) -> Service {
    let proxy = Proxy {
        destination_service_name: of.to_owned(),
        destination_service_id: of.to_owned(),
        local_service_address: "127.0.0.1".to_owned(),
        local_service_port: 9001,
        ..Proxy::default()
    };
    let id = format!("{of}-sidecar-proxy");
    Service { kind: ServiceKind::ConnectProxy, proxy: Some(proxy), ..service(node, &id, port) }
}

fn calls(mut sidecar: Service, upstreams: &[(&str, &str, u16)]) -> Service {
    let upstream = |(name, address, port): &(&str, &str, u16)| Upstream {
        destination_name: (*name).to_owned(),
        local_bind_address: (*address).to_owned(),
        local_bind_port: *port,
        ..Upstream::default()
    };
    sidecar.proxy.as_mut().expect("a sidecar").upstreams = upstreams.iter().map(upstream).collect();
    sidecar
}

fn check(node: &str, service: &str, status: HealthStatus) -> Check {
    Check {
        node: node.to_owned(),
        id: format!("service:{service}"),
        name: "test".to_owned(),
        notes: String::new(),
        service_id: service.to_owned(),
        service_name: service.to_owned(),
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
            output_max_size: 1,
            deregister_critical_service_after: Duration::ZERO,
        },
    }
}

fn state(services: &[Service], checks: &[Check], intentions: &[Intention]) -> State {
    let row = |table, key: String, value: Vec<u8>| {
        let row = Row { value: value.into(), created: Revision(1), modified: Revision(1) };
        (RowKey::new(table, key), row)
    };
    let mut rows = Vec::new();
    for (name, address) in [(NODE, "192.0.2.1"), ("node2", "2001:db8::2")] {
        let address = address.parse().expect("address");
        let node = Node { name: name.to_owned(), id: "id".to_owned(), address, meta: BTreeMap::new() };
        rows.push(row(Table::Nodes, name.to_owned(), json(&node)));
    }
    for service in services {
        rows.push(row(Table::Services, row_key(&service.node, &service.id), json(service)));
    }
    for check in checks {
        rows.push(row(Table::Checks, row_key(&check.node, &check.id), json(check)));
    }
    for rule in intentions {
        let entry = IntentionEntry {
            rule: rule.clone(),
            id: None,
            description: String::new(),
            meta: BTreeMap::new(),
            created_at: SystemTime::UNIX_EPOCH,
            updated_at: SystemTime::UNIX_EPOCH,
        };
        rows.push(row(Table::Intentions, intention_key(rule), json(&entry)));
    }
    State::load(Contents { revision: Revision(1), rows }).expect("rows of ours")
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("rows serialise")
}

fn take(state: &State, id: &str) -> Result<Snapshot, SnapshotError> {
    let trust_domain = TrustDomain::new("td.consul").expect("valid");
    let identity = ServiceIdentity {
        trust_domain: trust_domain.clone(),
        datacenter: culvert_types::Datacenter::new("dc1").expect("name"),
        service: ServiceName::new("web").expect("name"),
    };
    let certificate = SignedLeaf {
        identity,
        chain: String::new(),
        serial: String::new(),
        root_id: String::new(),
        valid_after: SystemTime::UNIX_EPOCH,
        valid_before: SystemTime::UNIX_EPOCH,
    };
    let leaf = Arc::new(Leaf::new(certificate, Zeroizing::default()));
    let (active_id, index) = (String::new(), Revision(1));
    let roots = Roots { trust_domain, active_id, roots: Vec::new(), index, bundle: "ROOTS".into() };
    Snapshot::take(state, id, &Context { node: NODE, default_action: Action::Deny, roots: &roots, leaf: &leaf })
}

fn web_calls_api(services: Vec<Service>, checks: &[Check]) -> Vec<Instance> {
    let web = calls(sidecar(NODE, "web", 21001), &[("api", "", 8080)]);
    let services: Vec<Service> = services.into_iter().chain([web]).collect();
    let mut snapshot = take(&state(&services, checks, &[]), "web-sidecar-proxy").expect("registered");
    assert_eq!(snapshot.targets.len(), 1);
    snapshot.targets.remove(0).instances
}

fn addresses(instances: &[Instance]) -> Vec<String> {
    instances.iter().map(|instance| instance.address.to_string()).collect()
}

#[test]
fn every_passing_instance_of_every_node_takes_traffic() {
    let services = vec![sidecar(NODE, "api", 21000), sidecar("node2", "api", 21000)];
    let instances = web_calls_api(services, &[]);
    assert_eq!(
        addresses(&instances),
        ["192.0.2.1:21000", "[2001:db8::2]:21000"],
        "the node's address where none is given"
    );
    assert_eq!(instances[1].node, "node2");
}

#[test]
fn warning_instances_take_traffic_only_without_passing_ones_and_critical_ones_never() {
    use HealthStatus::{Critical, Passing, Warning};
    let cases: [(HealthStatus, HealthStatus, &[&str]); 5] = [
        (Passing, Warning, &["192.0.2.1:21000"]),
        (Warning, Warning, &["192.0.2.1:21000", "[2001:db8::2]:21000"]),
        (Critical, Warning, &["[2001:db8::2]:21000"]),
        (Critical, Passing, &["[2001:db8::2]:21000"]),
        (Critical, Critical, &[]),
    ];
    for (one, two, expected) in cases {
        // Of the application behind the sidecar, or of the sidecar itself: either counts.
        for checked in ["api", "api-sidecar-proxy"] {
            let services = vec![sidecar(NODE, "api", 21000), sidecar("node2", "api", 21000)];
            let checks = [check(NODE, checked, one), check("node2", checked, two)];
            assert_eq!(addresses(&web_calls_api(services, &checks)), expected, "{one} {two} {checked}");
        }
    }
}

#[test]
fn weights_follow_health() {
    let weighted = Service { weights: Weights { passing: 10, warning: 0 }, ..sidecar(NODE, "api", 21000) };
    assert_eq!(web_calls_api(vec![weighted.clone()], &[])[0].weight, 10);
    let checks = [check(NODE, "api", HealthStatus::Warning)];
    assert_eq!(web_calls_api(vec![weighted], &checks)[0].weight, 1, "at least 1: Envoy refuses 0");
}

#[test]
fn an_instance_tells_its_address_inside_the_node() {
    let mut api = sidecar(NODE, "api", 30_000);
    api.address = "127.0.0.7".to_owned();
    let workload = TaggedAddress { address: "172.26.64.5".to_owned(), port: 21000 };
    api.tagged_addresses.insert(WORKLOAD_ADDRESS.to_owned(), workload);
    let instances = web_calls_api(vec![api], &[]);
    assert_eq!(addresses(&instances), ["127.0.0.7:30000"]);
    assert_eq!(instances[0].workload.map(|at| at.to_string()).as_deref(), Some("172.26.64.5:21000"));
}

#[test]
fn host_names_and_missing_ports_are_no_endpoints() {
    let named = Service { address: "api.example".to_owned(), ..sidecar(NODE, "api", 21000) };
    assert!(web_calls_api(vec![named], &[]).is_empty());
    assert!(web_calls_api(vec![sidecar(NODE, "api", 0)], &[]).is_empty());
}

#[test]
fn an_upstream_without_an_address_listens_on_both_loopbacks() {
    let upstreams = [("api", "", 8080), ("db", "127.0.0.9", 5432), ("api", "::1", 8081)];
    let web = calls(sidecar(NODE, "web", 21001), &upstreams);
    let snapshot = take(&state(&[web], &[], &[]), "web-sidecar-proxy").expect("registered");
    let names: Vec<&str> = snapshot.outbound.iter().map(|outbound| outbound.name.as_str()).collect();
    assert_eq!(names, ["api:127.0.0.1:8080", "api:[::1]:8080", "db:127.0.0.9:5432", "api:[::1]:8081"]);
    let targets: Vec<&str> = snapshot.targets.iter().map(|target| target.name.as_str()).collect();
    assert_eq!(targets, ["api.default.dc1.internal.td.consul", "db.default.dc1.internal.td.consul"], "one per service");
    assert_eq!(snapshot.targets[0].identity.to_string(), "spiffe://td.consul/ns/default/dc/dc1/svc/api");
}

#[test]
fn the_inbound_address_is_the_registrations_or_the_sidecars_or_any() {
    let bind = |change: &dyn Fn(&mut Service)| {
        let mut web = sidecar(NODE, "web", 21001);
        change(&mut web);
        let snapshot = take(&state(&[web], &[], &[]), "web-sidecar-proxy").expect("registered");
        snapshot.inbound.map(|inbound| inbound.bind.to_string())
    };
    let settings = |web: &mut Service, address: Option<&str>, port| {
        let settings = &mut web.proxy.as_mut().expect("a sidecar").settings;
        settings.bind_address = address.map(|text| text.parse().expect("address"));
        settings.bind_port = port;
    };
    assert_eq!(bind(&|_| {}).as_deref(), Some("0.0.0.0:21001"));
    assert_eq!(bind(&|web| web.address = "192.0.2.7".to_owned()).as_deref(), Some("192.0.2.7:21001"));
    assert_eq!(bind(&|web| web.address = "web.example".to_owned()).as_deref(), Some("0.0.0.0:21001"));
    assert_eq!(bind(&|web| settings(web, Some("::"), Some(20_000))).as_deref(), Some("[::]:20000"));
    let in_a_workload = |web: &mut Service| {
        web.address = "192.0.2.7".to_owned();
        let workload = TaggedAddress { address: "172.26.64.5".to_owned(), port: 0 };
        web.tagged_addresses.insert(WORKLOAD_ADDRESS.to_owned(), workload);
    };
    assert_eq!(bind(&in_a_workload).as_deref(), Some("0.0.0.0:21001"), "192.0.2.7 is outside of its namespace");
    assert_eq!(bind(&|web| web.port = 0), None);
    assert_eq!(bind(&|web| web.proxy.as_mut().expect("a sidecar").local_service_port = 0), None);
}

#[test]
fn only_intentions_about_the_service_are_taken_in_the_order_in_which_they_are_tried() {
    let rule = |source: &str, destination: &str, action| Intention {
        source: source.parse().expect("subject"),
        destination: destination.parse().expect("subject"),
        action,
    };
    let intentions = [
        rule("*", "*", Action::Deny),
        rule("a", "other", Action::Allow),
        rule("*", "web", Action::Deny),
        rule("a", "web", Action::Allow),
        rule("a", "*", Action::Allow),
    ];
    let state = state(&[sidecar(NODE, "web", 21001)], &[], &intentions);
    let snapshot = take(&state, "web-sidecar-proxy").expect("registered");
    let order: Vec<String> =
        snapshot.intentions.iter().map(|rule| format!("{} {}", rule.source, rule.destination)).collect();
    assert_eq!(order, ["a web", "* web", "a *", "* *"]);
}

#[test]
fn only_proxies_of_this_node_have_a_snapshot() {
    let services = [sidecar("node2", "web", 21001), service(NODE, "api", 9001)];
    let state = state(&services, &[], &[]);
    assert_eq!(take(&state, "web-sidecar-proxy"), Err(SnapshotError::NotRegistered("web-sidecar-proxy".to_owned())));
    assert_eq!(take(&state, "api"), Err(SnapshotError::NotAProxy("api".to_owned())));
}

#[test]
fn an_upstream_connects_within_its_own_time_or_the_proxys_or_five_seconds() {
    let seconds = Duration::from_secs;
    for (proxy, upstream, wanted) in [
        (None, None, CONNECT_TIMEOUT),
        (Some(seconds(2)), None, seconds(2)),
        (None, Some(seconds(1)), seconds(1)),
        (Some(seconds(2)), Some(seconds(1)), seconds(1)),
    ] {
        let mut web = calls(sidecar(NODE, "web", 21001), &[("api", "", 8080)]);
        let registered = web.proxy.as_mut().expect("a sidecar");
        registered.settings.connect_timeout = proxy;
        registered.upstreams[0].connect_timeout = upstream;
        let snapshot = take(&state(&[web], &[], &[]), "web-sidecar-proxy").expect("registered");
        assert_eq!(snapshot.targets[0].connect_timeout, wanted, "{proxy:?} {upstream:?}");
        assert_eq!(snapshot.inbound.expect("it listens").connect_timeout, CONNECT_TIMEOUT, "that is another setting");
    }
}
