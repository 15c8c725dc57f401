//! What a control plane sends: whole responses, and single resources (the first byte chooses).
//!
//! Whatever is accepted must be consistent: a listener has its cluster, and an inbound one its policy.
#![no_main]

use culvert_proxy::config::Direction;
use culvert_proxy::config::parse::{parse_cluster, parse_endpoints, parse_listener};
use culvert_proxy::rbac::{Connection, evaluate};
use culvert_proxy::xds::State;
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use envoy_types::pb::google::protobuf::Any;
use libfuzzer_sys::fuzz_target;
use prost::{Message, Name};

fuzz_target!(|data: &[u8]| {
    let Some((kind, body)) = data.split_first() else { return };
    match kind {
        b'c' => cluster(body),
        b'e' => endpoints(body),
        b'l' => listener(body),
        _ => responses(body),
    }
});

fn any<T: Name>(body: &[u8]) -> Any {
    Any { type_url: T::type_url(), value: body.to_vec() }
}

fn cluster(body: &[u8]) {
    let Ok(sent) = Cluster::decode(body) else { return };
    if let Ok(parsed) = parse_cluster(&sent.name, &any::<Cluster>(body)) {
        assert_eq!(parsed.cluster.name, sent.name);
        assert!(parsed.cluster.tls.is_none_or(|tls| !tls.san_matchers.is_empty()));
    }
}

fn endpoints(body: &[u8]) {
    let Ok(sent) = ClusterLoadAssignment::decode(body) else { return };
    if let Ok(parsed) = parse_endpoints(&sent.cluster_name, &any::<ClusterLoadAssignment>(body)) {
        assert!(parsed.iter().all(|endpoint| endpoint.weight > 0 && endpoint.address.port() > 0));
    }
}

fn listener(body: &[u8]) {
    let Ok(sent) = Listener::decode(body) else { return };
    if let Ok(parsed) = parse_listener(&sent.name, &any::<Listener>(body)) {
        check(&parsed.listener);
    }
}

fn responses(body: &[u8]) {
    let mut state = State::default();
    let mut rest = body;
    while !rest.is_empty() {
        let Ok(response) = DeltaDiscoveryResponse::decode_length_delimited(&mut rest) else { return };
        let _ = state.apply(response);
        let config = state.config();
        for listener in config.listeners.values() {
            assert!(config.cluster_of(listener).is_some());
            check(listener);
        }
    }
}

fn check(listener: &culvert_proxy::config::Listener) {
    let inbound = listener.direction == Direction::Inbound;
    assert!(!inbound || (!listener.rbac.is_empty() && listener.tls.is_some()));
    let connection = Connection {
        identity: Some("spiffe://a.consul/ns/default/dc/dc1/svc/web"),
        peer: listener.address,
        local: listener.address,
    };
    let decision = evaluate(&listener.rbac, &connection);
    if let Some(explain) = &listener.explain {
        assert!(!explain.rule(connection.identity, &decision).is_empty());
    }
}
