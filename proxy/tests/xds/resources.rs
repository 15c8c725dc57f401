//! Makes the resources that a control plane of today sends, with an identity of their own.

use std::sync::LazyLock;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig};
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, DataSource, SocketAddress, TrafficDirection,
    TransportSocket, address, transport_socket,
};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints};
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener, filter};
use envoy_types::pb::envoy::config::rbac::v3::{
    Permission, Policy, Principal, Rbac, permission::Rule, principal::Authenticated, principal::Identifier,
    rbac::Action,
};
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as RbacFilter;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SubjectAltNameMatcher, TlsCertificate,
    UpstreamTlsContext,
};
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration, Struct, Value, value::Kind};
use prost::{Message, Name};

pub(crate) const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";

/// The SPIFFE ID of a service.
pub(crate) fn id(service: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{service}")
}

pub(crate) struct Pki {
    pub(crate) root: String,
    pub(crate) chain: String,
    pub(crate) key: String,
}

/// A root and one leaf, made once.
pub(crate) static PKI: LazyLock<Pki> = LazyLock::new(|| {
    let uri = |text: String| vec![rcgen::SanType::URI(text.try_into().expect("ascii"))];
    let mut root = rcgen::CertificateParams::default();
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    root.subject_alt_names = uri(format!("spiffe://{TRUST_DOMAIN}"));
    let root_key = rcgen::KeyPair::generate().expect("key");
    let root_certificate = root.self_signed(&root_key).expect("root");
    let mut leaf = rcgen::CertificateParams::default();
    leaf.subject_alt_names = uri(id("api"));
    let key = rcgen::KeyPair::generate().expect("key");
    let issuer = rcgen::Issuer::new(root, root_key);
    let certificate = leaf.signed_by(&key, &issuer).expect("leaf");
    Pki { root: root_certificate.pem(), chain: certificate.pem(), key: key.serialize_pem() }
});

pub(crate) fn any<T: Message + Name>(message: &T) -> Any {
    Any { type_url: T::type_url(), value: message.encode_to_vec() }
}

pub(crate) fn resource(name: &str, version: &str, body: Any) -> Resource {
    Resource { name: name.to_owned(), version: version.to_owned(), resource: Some(body), ..Resource::default() }
}

pub(crate) fn response<T: Name>(nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: format!("rev-{nonce}"),
        nonce: nonce.to_owned(),
        type_url: T::type_url(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

pub(crate) fn address(ip: &str, port: u32) -> Address {
    let socket = SocketAddress {
        address: ip.to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(port)),
        ..SocketAddress::default()
    };
    Address { address: Some(address::Address::SocketAddress(socket)) }
}

pub(crate) fn inline(text: &str) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineString(text.to_owned())), ..DataSource::default() })
}

pub(crate) fn matcher(pattern: MatchPattern) -> StringMatcher {
    StringMatcher { match_pattern: Some(pattern), ..StringMatcher::default() }
}

pub(crate) fn regex(pattern: &str) -> StringMatcher {
    matcher(MatchPattern::SafeRegex(RegexMatcher { regex: pattern.to_owned(), engine_type: None }))
}

/// Identity and roots, and the URI that the peer must have, if one is given.
pub(crate) fn common_tls(peer: Option<&str>) -> CommonTlsContext {
    let certificate = TlsCertificate {
        certificate_chain: inline(&PKI.chain),
        private_key: inline(&PKI.key),
        ..TlsCertificate::default()
    };
    let matchers = peer.map(|peer| SubjectAltNameMatcher {
        san_type: SanType::Uri as i32,
        matcher: Some(matcher(MatchPattern::Exact(peer.to_owned()))),
        ..SubjectAltNameMatcher::default()
    });
    let validation = CertificateValidationContext {
        trusted_ca: inline(&PKI.root),
        match_typed_subject_alt_names: matchers.into_iter().collect(),
        ..CertificateValidationContext::default()
    };
    CommonTlsContext {
        tls_certificates: vec![certificate],
        validation_context_type: Some(ValidationContextType::ValidationContext(validation)),
        ..CommonTlsContext::default()
    }
}

pub(crate) fn socket<T: Message + Name>(context: &T) -> TransportSocket {
    let config_type = Some(transport_socket::ConfigType::TypedConfig(any(context)));
    TransportSocket { name: "tls".to_owned(), config_type }
}

pub(crate) fn downstream_tls() -> DownstreamTlsContext {
    DownstreamTlsContext {
        common_tls_context: Some(common_tls(None)),
        require_client_certificate: Some(BoolValue { value: true }),
        ..DownstreamTlsContext::default()
    }
}

pub(crate) fn upstream_tls(service: &str) -> UpstreamTlsContext {
    UpstreamTlsContext {
        common_tls_context: Some(common_tls(Some(&id(service)))),
        sni: format!("{service}.default.dc1.internal.{TRUST_DOMAIN}"),
        ..UpstreamTlsContext::default()
    }
}

pub(crate) fn filter<T: Message + Name>(config: &T) -> Filter {
    Filter { name: "filter".to_owned(), config_type: Some(filter::ConfigType::TypedConfig(any(config))) }
}

pub(crate) fn tcp_proxy(cluster: &str) -> TcpProxy {
    TcpProxy {
        stat_prefix: "test".to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..TcpProxy::default()
    }
}

/// Principals for services, as Consul writes them.
pub(crate) fn services(names: &[&str]) -> Vec<Principal> {
    let principal = |name: &&str| {
        let name = regex(&format!("^spiffe://{TRUST_DOMAIN}/ns/default/dc/[^/]+/svc/{name}$"));
        let authenticated = Authenticated { principal_name: Some(name) };
        Principal { identifier: Some(Identifier::Authenticated(authenticated)) }
    };
    names.iter().map(principal).collect()
}

/// One policy for all services, as Consul writes it.
pub(crate) fn rbac(action: Action, names: &[&str]) -> RbacFilter {
    let policy = Policy {
        permissions: vec![Permission { rule: Some(Rule::Any(true)) }],
        principals: services(names),
        ..Policy::default()
    };
    let policies = if names.is_empty() { Vec::new() } else { vec![("consul-intentions-layer4".to_owned(), policy)] };
    let rules = Rbac { action: action as i32, policies: policies.into_iter().collect(), ..Rbac::default() };
    RbacFilter { rules: Some(rules), stat_prefix: "connect_authz".to_owned(), ..RbacFilter::default() }
}

pub(crate) const PUBLIC: &str = "public_listener:0.0.0.0:21000";

pub(crate) fn inbound(filters: Vec<Filter>) -> Listener {
    let chain = FilterChain { filters, transport_socket: Some(socket(&downstream_tls())), ..FilterChain::default() };
    Listener {
        name: PUBLIC.to_owned(),
        address: Some(address("0.0.0.0", 21000)),
        filter_chains: vec![chain],
        traffic_direction: TrafficDirection::Inbound as i32,
        ..Listener::default()
    }
}

/// The public listener that lets `names` in.
pub(crate) fn public_listener(names: &[&str]) -> Listener {
    inbound(vec![filter(&rbac(Action::Allow, names)), filter(&tcp_proxy("local_app"))])
}

pub(crate) fn outbound(name: &str, port: u32, cluster: &str) -> Listener {
    let chain = FilterChain { filters: vec![filter(&tcp_proxy(cluster))], ..FilterChain::default() };
    Listener {
        name: name.to_owned(),
        address: Some(address("127.0.0.1", port)),
        filter_chains: vec![chain],
        traffic_direction: TrafficDirection::Outbound as i32,
        ..Listener::default()
    }
}

pub(crate) fn endpoint(ip: &str, port: u32) -> LbEndpoint {
    let host = Endpoint { address: Some(address(ip, port)), ..Endpoint::default() };
    LbEndpoint { host_identifier: Some(HostIdentifier::Endpoint(host)), ..LbEndpoint::default() }
}

pub(crate) fn assignment(cluster: &str, endpoints: Vec<LbEndpoint>) -> ClusterLoadAssignment {
    let locality = LocalityLbEndpoints { lb_endpoints: endpoints, ..LocalityLbEndpoints::default() };
    ClusterLoadAssignment {
        cluster_name: cluster.to_owned(),
        endpoints: vec![locality],
        ..ClusterLoadAssignment::default()
    }
}

pub(crate) fn static_cluster(name: &str, port: u32) -> Cluster {
    Cluster {
        name: name.to_owned(),
        connect_timeout: Some(Duration { seconds: 5, nanos: 0 }),
        load_assignment: Some(assignment(name, vec![endpoint("127.0.0.1", port)])),
        ..Cluster::default()
    }
}

pub(crate) fn eds_cluster(name: &str) -> Cluster {
    let source = ConfigSource {
        resource_api_version: ApiVersion::V3 as i32,
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    };
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(source), service_name: String::new() }),
        transport_socket: Some(socket(&upstream_tls(name))),
        ..Cluster::default()
    }
}

pub(crate) fn text(text: &str) -> Value {
    Value { kind: Some(Kind::StringValue(text.to_owned())) }
}

pub(crate) fn object(fields: &[(&str, Value)]) -> Struct {
    Struct { fields: fields.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect() }
}
