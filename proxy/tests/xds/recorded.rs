//! What Consul 1.10 really sent for countdash is understood, whole.

use std::net::SocketAddr;
use std::time::Duration;

use culvert_proxy::config::{ClusterKind, Direction, StringMatcher, TlsVersion};
use culvert_proxy::rbac::{Connection, Rbac, RbacAction, evaluate};
use culvert_proxy::xds::State;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use prost::Message;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::resources::{TRUST_DOMAIN, id};

/// The state after these recorded responses.
fn replay(responses: &[&[u8]]) -> State {
    let mut state = State::default();
    for bytes in responses {
        let response = DeltaDiscoveryResponse::decode(*bytes).expect("fixture");
        assert_eq!(state.apply(response), Ok(Vec::new()));
    }
    state
}

macro_rules! fixture {
    ($name:literal) => {
        include_bytes!(concat!("../fixtures/consul-1.10/", $name))
    };
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("address")
}

fn certificate(pem: &[u8]) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem).expect("fixture")
}

#[test]
fn the_api_serves_its_application_to_the_mesh() {
    let state = replay(&[fixture!("count-api.clusters.binpb"), fixture!("count-api.listeners.binpb")]);
    assert!(state.ready());
    let config = state.config();
    assert_eq!(config.clusters.keys().collect::<Vec<_>>(), ["local_app"]);
    let app = &config.clusters["local_app"];
    assert_eq!((app.kind, app.connect_timeout), (ClusterKind::Static, Duration::from_secs(5)));
    assert_eq!(
        app.endpoints.iter().map(|one| (one.address, one.healthy)).collect::<Vec<_>>(),
        [(address("127.0.0.1:9001"), true)]
    );
    assert!(app.tls.is_none());

    let (name, listener) = config.listeners.first_key_value().expect("one listener");
    assert_eq!(name, "public_listener:0.0.0.0:22716");
    assert_eq!((listener.address, listener.direction), (address("0.0.0.0:22716"), Direction::Inbound));
    assert_eq!((listener.cluster.as_str(), listener.stat_prefix.as_str()), ("local_app", "public_listener"));
    assert_eq!(*listener.rbac, [Rbac { action: RbacAction::Deny, policies: Vec::new() }]);
    let tls = listener.tls.as_ref().expect("tls");
    assert!(tls.require_client_certificate && tls.san_matchers.is_empty() && tls.alpn.is_empty());
    assert_eq!((tls.min_version, tls.max_version), (TlsVersion::V1_2, TlsVersion::V1_3));
    assert_eq!(tls.identity.chain(), [certificate(fixture!("pki/count-api.pem"))]);
    assert_eq!(*tls.roots, [certificate(fixture!("pki/root.pem"))]);
}

#[test]
fn an_empty_deny_list_lets_everybody_in() {
    let state = replay(&[fixture!("count-api.clusters.binpb"), fixture!("count-api.listeners.binpb")]);
    let listener = state.config().listeners.values().next().expect("one listener");
    let identity = id("count-dashboard");
    let connection =
        Connection { identity: Some(&identity), peer: address("192.0.2.9:40000"), local: address("192.0.2.2:22716") };
    assert!(evaluate(&listener.rbac, &connection).allowed);
}

#[test]
fn the_dashboard_reaches_the_api_by_mutual_tls() {
    let upstream = format!("count-api.default.dc1.internal.{TRUST_DOMAIN}");
    let state = replay(&[
        fixture!("count-dashboard.clusters.binpb"),
        fixture!("count-dashboard.endpoints.binpb"),
        fixture!("count-dashboard.listeners.binpb"),
    ]);
    assert!(state.ready());
    let config = state.config();
    assert_eq!(config.listeners.len(), 2);
    let listener = &config.listeners["count-api:127.0.0.1:8080"];
    assert_eq!((listener.address, listener.direction), (address("127.0.0.1:8080"), Direction::Outbound));
    assert_eq!(listener.stat_prefix, "upstream.count-api.default.dc1");
    assert!(listener.tls.is_none() && listener.rbac.is_empty());

    let cluster = config.cluster_of(listener).expect("its cluster");
    assert_eq!((cluster.name.as_str(), cluster.kind), (upstream.as_str(), ClusterKind::Eds));
    assert_eq!(cluster.endpoints.len(), 1);
    assert_eq!(cluster.endpoints[0].address_from("any"), address("192.0.2.2:22716"));
    let tls = cluster.tls.as_ref().expect("tls");
    assert_eq!(tls.sni, upstream);
    assert_eq!(tls.san_matchers, [StringMatcher::exact(&id("count-api"), false).expect("matcher")]);
    assert_eq!(tls.identity.chain(), [certificate(fixture!("pki/count-dashboard.pem"))]);
}

#[test]
fn keys_do_not_appear_in_debug_output() {
    let state = replay(&[fixture!("count-api.clusters.binpb"), fixture!("count-api.listeners.binpb")]);
    let listener = state.config().listeners.values().next().expect("one listener");
    let key = listener.tls.as_ref().expect("tls").identity.key().secret_der();
    let shown = format!("{:?}", state.config());
    assert!(!shown.contains(&format!("{:?}", &key[..8]).trim_matches(['[', ']']).to_owned()), "{shown}");
    assert!(shown.contains("Identity { certificates: 1, .. }"), "{shown}");
}
