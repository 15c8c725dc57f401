//! What a proxy is sent, decoded with the generated types.

use std::time::{Duration, SystemTime};

use culvert_types::{Action, Datacenter, Intention, ServiceIdentity, ServiceName, TrustDomain, sni};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType as SocketConfig;
use envoy_types::pb::envoy::config::core::v3::{Metadata, TrafficDirection, TransportSocket};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext, UpstreamTlsContext,
};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::Value;
use envoy_types::pb::google::protobuf::value::Kind as ValueKind;
use zeroize::Zeroizing;

use super::*;
use crate::ca::{Leaf, SignedLeaf};
use crate::xds::snapshot::{Inbound, Instance, Outbound, Target};

const TD: &str = "11111111-2222-3333-4444-555555555555.consul";
const API: &str = "count-api.default.dc1.internal.11111111-2222-3333-4444-555555555555.consul";

fn identity(service: &str) -> ServiceIdentity {
    ServiceIdentity {
        trust_domain: TrustDomain::new(TD).expect("valid"),
        datacenter: Datacenter::new("dc1").expect("name"),
        service: ServiceName::new(service).expect("name"),
    }
}

fn intention(source: &str, destination: &str, action: Action) -> Intention {
    Intention { source: source.parse().expect("subject"), destination: destination.parse().expect("subject"), action }
}

/// The dashboard of the countdash job.
fn dashboard() -> Snapshot {
    let api = identity("count-api");
    let cluster = sni::service(&api.service, &api.datacenter, &api.trust_domain);
    assert_eq!(cluster, API);
    let certificate = SignedLeaf {
        identity: identity("count-dashboard"),
        chain: "CHAIN".to_owned(),
        serial: "0a".to_owned(),
        root_id: "r1".to_owned(),
        valid_after: SystemTime::UNIX_EPOCH,
        valid_before: SystemTime::UNIX_EPOCH,
    };
    let instance = |address: &str, workload: Option<&str>| Instance {
        address: address.parse().expect("address"),
        node: "node1".to_owned(),
        workload: workload.map(|text| text.parse().expect("address")),
        weight: 1,
    };
    let outbound = |bind: &str| Outbound {
        name: format!("count-api:{bind}"),
        bind: bind.parse().expect("address"),
        stat_prefix: "upstream.count-api.default.dc1".to_owned(),
        cluster: cluster.clone(),
    };
    Snapshot {
        identity: identity("count-dashboard"),
        inbound: Some(Inbound {
            bind: "0.0.0.0:25560".parse().expect("address"),
            application: "127.0.0.1:9002".parse().expect("address"),
            connect_timeout: Duration::from_secs(5),
            max_connections: None,
        }),
        default_action: Action::Deny,
        intentions: vec![
            intention("web", "count-dashboard", Action::Allow),
            intention("*", "count-dashboard", Action::Deny),
        ],
        outbound: vec![outbound("127.0.0.1:8080"), outbound("[::1]:8080")],
        targets: vec![Target {
            name: cluster.clone(),
            identity: api,
            connect_timeout: Duration::from_millis(1500),
            max_connections: Some(77),
            instances: vec![
                instance("192.0.2.2:22716", Some("172.26.64.5:21000")),
                instance("[2001:db8::1]:22716", None),
            ],
        }],
        leaf: Arc::new(Leaf::new(certificate, Zeroizing::new("KEY".to_owned()))),
        roots: "ROOTS".into(),
    }
}

fn decode<T: Message + Default>(resources: &Resources, kind: Kind, name: &str) -> T {
    let resource = resources.of(kind).get(name).unwrap_or_else(|| panic!("{name} in {:?}", resources.of(kind)));
    assert_eq!(resource.body.type_url, kind.type_url());
    T::decode(resource.body.value.as_slice()).expect("the twin has the fields of the original")
}

fn listener(resources: &Resources, name: &str) -> Listener {
    let listener: Listener = decode(resources, Kind::Listener, name);
    assert_eq!(listener.name, name);
    assert_eq!(listener.filter_chains.len(), 1);
    listener
}

fn filter<T: Message + Name + Default>(listener: &Listener, index: usize, name: &str) -> T {
    let filter = &listener.filter_chains[0].filters[index];
    assert_eq!(filter.name, name);
    let Some(ConfigType::TypedConfig(any)) = &filter.config_type else { panic!("typed config") };
    any_of(any)
}

fn any_of<T: Message + Name + Default>(any: &Any) -> T {
    assert_eq!(any.type_url, T::type_url());
    T::decode(any.value.as_slice()).expect("encoded by us")
}

fn tls<T: Message + Name + Default>(socket: Option<&TransportSocket>) -> T {
    let socket = socket.expect("TLS");
    assert_eq!(socket.name, "tls");
    let Some(SocketConfig::TypedConfig(any)) = &socket.config_type else { panic!("typed config") };
    any_of(any)
}

/// Certificates and versions are right; returns the matcher of the peer's URI.
fn peer(common: Option<CommonTlsContext>) -> MatchPattern {
    let common = common.expect("common part");
    let params = common.tls_params.expect("versions");
    assert_eq!(params.tls_minimum_protocol_version, TlsProtocol::TlSv13 as i32);
    let [certificate] = &common.tls_certificates[..] else { panic!("one certificate") };
    let inline = |text: &str| Some(Specifier::InlineString(text.to_owned()));
    assert_eq!(certificate.certificate_chain.as_ref().and_then(|one| one.specifier.clone()), inline("CHAIN"));
    assert_eq!(certificate.private_key.as_ref().and_then(|one| one.specifier.clone()), inline("KEY"));
    let Some(ValidationContextType::ValidationContext(validation)) = common.validation_context_type else {
        panic!("inline validation")
    };
    assert_eq!(validation.trusted_ca.and_then(|one| one.specifier), inline("ROOTS"));
    let [matcher] = &validation.match_typed_subject_alt_names[..] else { panic!("one matcher") };
    assert_eq!(matcher.san_type, SanType::Uri as i32);
    matcher.matcher.clone().and_then(|one| one.match_pattern).expect("a pattern")
}

fn text(value: &Value) -> &str {
    match &value.kind {
        Some(ValueKind::StringValue(text)) => text,
        other => panic!("a text, not {other:?}"),
    }
}

fn ours(metadata: Option<&Metadata>) -> &std::collections::HashMap<String, Value> {
    &metadata.expect("metadata").filter_metadata["culvert"].fields
}

#[test]
fn a_dashboard_gets_consuls_resources() {
    let resources = render(&dashboard());
    let names = |kind| resources.of(kind).keys().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(names(Kind::Cluster), [API, "local_app"]);
    assert_eq!(names(Kind::Endpoints), [API]);
    let listeners = ["count-api:127.0.0.1:8080", "count-api:[::1]:8080", "public_listener:0.0.0.0:25560"];
    assert_eq!(names(Kind::Listener), listeners);
    let needs = |name: &str| resources.of(Kind::Listener)[name].needs.as_deref();
    assert_eq!((needs(listeners[0]), needs(listeners[1]), needs(listeners[2])), (Some(API), Some(API), None));
}

#[test]
fn the_public_listener_asks_for_a_certificate_then_for_an_intention() {
    let listener = listener(&render(&dashboard()), "public_listener:0.0.0.0:25560");
    assert_eq!(listener.address, Some(address("0.0.0.0:25560".parse().expect("address"))));
    assert_eq!(listener.traffic_direction, TrafficDirection::Inbound as i32);
    let context: DownstreamTlsContext = tls(listener.filter_chains[0].transport_socket.as_ref());
    assert!(context.require_client_certificate.is_some_and(|required| required.value));
    assert_eq!(peer(context.common_tls_context), MatchPattern::Prefix(format!("spiffe://{TD}/")));

    assert_eq!(listener.filter_chains[0].filters.len(), 2);
    let rbac: Rbac = filter(&listener, 0, "envoy.filters.network.rbac");
    assert_eq!(rbac.stat_prefix, "connect_authz");
    let rules = rbac.rules.expect("Envoy lets everything pass without rules");
    assert_eq!(rules.policies.keys().collect::<Vec<_>>(), ["web => count-dashboard (allow, precedence 9)"]);
    let proxy: TcpProxy = filter(&listener, 1, "envoy.filters.network.tcp_proxy");
    assert_eq!(proxy.stat_prefix, "public_listener");
    assert_eq!(proxy.cluster_specifier, Some(ClusterSpecifier::Cluster("local_app".to_owned())));
    assert_eq!(proxy.idle_timeout, Some(PbDuration::default()), "idle connections stay");
}

#[test]
fn the_public_listener_says_what_its_rules_were_made_of() {
    let listener = listener(&render(&dashboard()), "public_listener:0.0.0.0:25560");
    let fields = ours(listener.metadata.as_ref());
    assert_eq!((text(&fields["destination"]), text(&fields["default"])), ("count-dashboard", "deny"));
    let Some(ValueKind::ListValue(list)) = &fields["intentions"].kind else { panic!("a list") };
    let listed = list.values.iter().map(|value| match &value.kind {
        Some(ValueKind::StructValue(one)) => {
            ["source", "destination", "action"].map(|key| text(&one.fields[key]).to_owned()).join(" ")
        }
        other => panic!("an object, not {other:?}"),
    });
    assert_eq!(listed.collect::<Vec<_>>(), ["web count-dashboard allow", "* count-dashboard deny"]);
}

#[test]
fn too_many_intentions_are_enforced_without_being_listed() {
    let mut snapshot = dashboard();
    let one = |index: usize| intention(&format!("web{index}"), "count-dashboard", Action::Allow);
    snapshot.intentions = (0..=metadata::MAX_EXPLAINED).map(one).collect();
    let listener = listener(&render(&snapshot), "public_listener:0.0.0.0:25560");
    assert!(ours(listener.metadata.as_ref()).is_empty());
    let rbac: Rbac = filter(&listener, 0, "envoy.filters.network.rbac");
    assert_eq!(rbac.rules.expect("rules").policies.len(), metadata::MAX_EXPLAINED + 1);
}

#[test]
fn a_limit_of_inbound_connections_stands_after_the_policy() {
    let mut snapshot = dashboard();
    if let Some(inbound) = &mut snapshot.inbound {
        inbound.max_connections = Some(5);
    }
    let listener = listener(&render(&snapshot), "public_listener:0.0.0.0:25560");
    assert_eq!(listener.filter_chains[0].filters.len(), 3);
    let limit: ConnectionLimit = filter(&listener, 1, "envoy.filters.network.connection_limit");
    assert_eq!(limit.max_connections.map(|most| most.value), Some(5));
}

#[test]
fn an_upstream_is_reached_on_both_loopbacks_by_plain_tcp() {
    let resources = render(&dashboard());
    for (name, bind) in [("count-api:127.0.0.1:8080", "127.0.0.1:8080"), ("count-api:[::1]:8080", "[::1]:8080")] {
        let listener = listener(&resources, name);
        assert_eq!(listener.address, Some(address(bind.parse().expect("address"))));
        assert_eq!(listener.traffic_direction, TrafficDirection::Outbound as i32);
        assert!(listener.filter_chains[0].transport_socket.is_none());
        let proxy: TcpProxy = filter(&listener, 0, "envoy.filters.network.tcp_proxy");
        assert_eq!(proxy.stat_prefix, "upstream.count-api.default.dc1");
        assert_eq!(proxy.cluster_specifier, Some(ClusterSpecifier::Cluster(API.to_owned())));
    }
}

#[test]
fn an_upstream_cluster_accepts_the_service_that_is_called_and_no_other() {
    let cluster: Cluster = decode(&render(&dashboard()), Kind::Cluster, API);
    assert_eq!((cluster.name.as_str(), cluster.alt_stat_name.as_str()), (API, API));
    assert_eq!(cluster.cluster_discovery_type, Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)));
    assert_eq!(cluster.lb_policy, LbPolicy::LeastRequest as i32);
    assert_eq!(cluster.connect_timeout, Some(PbDuration { seconds: 1, nanos: 500_000_000 }));
    let breakers = cluster.circuit_breakers.expect("breakers");
    assert_eq!(breakers.thresholds[0].max_connections.map(|most| most.value), Some(77));
    let panic = cluster.common_lb_config.and_then(|config| config.healthy_panic_threshold).expect("no panic mode");
    assert_eq!(panic.value, 0.0);
    let context: UpstreamTlsContext = tls(cluster.transport_socket.as_ref());
    assert_eq!(context.sni, API);
    assert_eq!(peer(context.common_tls_context), MatchPattern::Exact(identity("count-api").to_string()));
}

#[test]
fn endpoints_tell_where_they_run() {
    let assignment: ClusterLoadAssignment = decode(&render(&dashboard()), Kind::Endpoints, API);
    assert_eq!(assignment.cluster_name, API);
    let [locality] = &assignment.endpoints[..] else { panic!("one locality") };
    let found = locality.lb_endpoints.iter().map(|one| {
        let Some(HostIdentifier::Endpoint(endpoint)) = &one.host_identifier else { panic!("an address") };
        let fields = ours(one.metadata.as_ref());
        (endpoint.address.clone(), text(&fields["node"]), fields.get("workload").map(text))
    });
    let at = |text: &str| Some(address(text.parse().expect("address")));
    let expected =
        [(at("192.0.2.2:22716"), "node1", Some("172.26.64.5:21000")), (at("[2001:db8::1]:22716"), "node1", None)];
    assert_eq!(found.collect::<Vec<_>>(), expected);
}

#[test]
fn the_local_application_has_a_literal_address() {
    let cluster: Cluster = decode(&render(&dashboard()), Kind::Cluster, LOCAL_APP);
    assert_eq!(cluster.cluster_discovery_type, Some(ClusterDiscoveryType::Type(DiscoveryType::Static as i32)));
    let assignment = cluster.load_assignment.expect("static");
    let Some(HostIdentifier::Endpoint(endpoint)) = &assignment.endpoints[0].lb_endpoints[0].host_identifier else {
        panic!("an address")
    };
    assert_eq!(endpoint.address, Some(address("127.0.0.1:9002".parse().expect("address"))));
    assert!(cluster.transport_socket.is_none());
}

#[test]
fn an_application_that_listens_nowhere_is_not_reachable() {
    let resources = render(&Snapshot { inbound: None, ..dashboard() });
    assert!(!resources.of(Kind::Cluster).contains_key(LOCAL_APP));
    assert_eq!(resources.of(Kind::Listener).len(), 2);
}

#[test]
fn equal_snapshots_have_equal_versions_and_different_ones_differ_only_where_they_do() {
    let mut snapshot = dashboard();
    snapshot.intentions = (0..50).map(|index| intention(&format!("web{index}"), "*", Action::Allow)).collect();
    let first = render(&snapshot);
    for _ in 0..5 {
        assert_eq!(render(&snapshot.clone()), first, "maps are encoded in order");
    }
    let mut changed = snapshot.clone();
    changed.intentions.pop();
    let second = render(&changed);
    assert_ne!(first.version(), second.version());
    for kind in Kind::ALL {
        for (name, resource) in first.of(kind) {
            let same = second.of(kind)[name].version == resource.version;
            assert_eq!(same, !name.starts_with("public_listener"), "{name}");
        }
    }
}

#[test]
fn debug_output_holds_no_key() {
    let snapshot = dashboard();
    let resources = render(&snapshot);
    assert!(!format!("{snapshot:?}{resources:?}").contains("KEY"));
}
