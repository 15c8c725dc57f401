//! What the worker would not honour is refused by resource and path; what has no effect is accepted.

use culvert_proxy::config::parse::{parse_cluster, parse_endpoints, parse_listener};
use culvert_proxy::config::{ClusterKind, LbPolicy};
use culvert_proxy::rbac::Rbac;
use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, CommonLbConfig, DiscoveryType};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster, OutlierDetection, circuit_breakers};
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HealthCheck, Metadata, Pipe, address};
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, FilterChainMatch, Listener, ListenerFilter};
use envoy_types::pb::envoy::config::rbac::v3::principal::Identifier;
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action;
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, TlsKeyLog, TlsParameters, UpstreamTlsContext,
};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::{BoolValue, Duration, UInt32Value, UInt64Value};

use super::resources::{self as make, PUBLIC, any, filter, socket};

fn listener_error(listener: &Listener) -> String {
    parse_listener(&listener.name, &any(listener)).expect_err("must be refused").to_string()
}

fn cluster_error(cluster: &Cluster) -> String {
    parse_cluster(&cluster.name, &any(cluster)).expect_err("must be refused").to_string()
}

/// A good public listener, changed.
fn public(change: impl FnOnce(&mut Listener)) -> Listener {
    let mut listener = make::public_listener(&["web"]);
    change(&mut listener);
    listener
}

/// A good upstream cluster, changed.
fn upstream(change: impl FnOnce(&mut Cluster)) -> Cluster {
    let mut cluster = make::eds_cluster("api");
    change(&mut cluster);
    cluster
}

fn with_proxy(change: impl FnOnce(&mut TcpProxy)) -> Listener {
    let mut proxy = make::tcp_proxy("local_app");
    change(&mut proxy);
    make::inbound(vec![filter(&make::rbac(Action::Allow, &["web"])), filter(&proxy)])
}

fn with_tls(change: impl FnOnce(&mut DownstreamTlsContext)) -> Listener {
    let mut tls = make::downstream_tls();
    change(&mut tls);
    public(|listener| listener.filter_chains[0].transport_socket = Some(socket(&tls)))
}

fn with_upstream_tls(change: impl FnOnce(&mut UpstreamTlsContext)) -> Cluster {
    let mut tls = make::upstream_tls("api");
    change(&mut tls);
    upstream(|cluster| cluster.transport_socket = Some(socket(&tls)))
}

fn validation(tls: &mut DownstreamTlsContext) -> &mut CertificateValidationContext {
    let common = tls.common_tls_context.as_mut().expect("common");
    match common.validation_context_type.as_mut() {
        Some(ValidationContextType::ValidationContext(context)) => context,
        other => panic!("{other:?}"),
    }
}

const YES: Option<BoolValue> = Some(BoolValue { value: true });
const NO: Option<BoolValue> = Some(BoolValue { value: false });

#[test]
fn listeners_are_refused_by_path() {
    let unsupported = "not supported by culvert";
    let table: [(Listener, &str, &str); 17] = [
        (public(|one| one.use_original_dst = YES), "use_original_dst", unsupported),
        (public(|one| one.listener_filters = vec![ListenerFilter::default()]), "listener_filters", unsupported),
        (public(|one| one.access_log = vec![AccessLog::default()]), "access_log", unsupported),
        (public(|one| one.bind_to_port = NO), "bind_to_port", unsupported),
        (public(|one| one.default_filter_chain = Some(FilterChain::default())), "default_filter_chain", unsupported),
        (public(|one| one.filter_chains.push(FilterChain::default())), "filter_chains[1]", unsupported),
        (public(|one| one.filter_chains.clear()), "filter_chains[0]", "missing"),
        (
            public(|one| one.traffic_direction = 2),
            "traffic_direction",
            "must be INBOUND for a public listener, else OUTBOUND",
        ),
        (public(|one| one.address = None), "address", "missing"),
        (
            public(|one| one.address = Some(make::address("localhost", 80))),
            "address.socket_address.address",
            "\"localhost\" is not an IP address",
        ),
        (
            public(|one| one.address = Some(make::address("0.0.0.0", 65536))),
            "address.socket_address.port_value",
            "port 65536 is not in 1 to 65535",
        ),
        (
            public(|one| {
                one.address = Some(Address { address: Some(address::Address::Pipe(Pipe::default())) });
            }),
            "address.pipe",
            unsupported,
        ),
        (
            public(|one| {
                let server_names = vec!["web".to_owned()];
                let only = FilterChainMatch { server_names, ..FilterChainMatch::default() };
                one.filter_chains[0].filter_chain_match = Some(only);
            }),
            "filter_chains[0].filter_chain_match",
            unsupported,
        ),
        (public(|one| one.filter_chains[0].transport_socket = None), "filter_chains[0].transport_socket", "missing"),
        (public(|one| one.filter_chains[0].filters.truncate(1)), "filter_chains[0].filters", "no tcp_proxy at the end"),
        (
            public(|one| one.filter_chains[0].filters.reverse()),
            "filter_chains[0].filters[1]",
            "stands after the tcp_proxy, which is the last",
        ),
        (
            make::inbound(vec![filter(&HttpConnectionManager::default())]),
            "filter_chains[0].filters[0]",
            "filter of type \"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\" is not \
             supported by culvert",
        ),
    ];
    for (listener, path, problem) in table {
        assert_eq!(listener_error(&listener), format!("{path}: {problem}"));
    }
}

#[test]
fn tcp_proxies_are_refused_by_path() {
    let hour = Some(Duration { seconds: 3600, nanos: 0 });
    let table: [(Listener, &str, &str); 5] = [
        (with_proxy(|one| one.idle_timeout = hour), "idle_timeout", "not supported by culvert"),
        (
            with_proxy(|one| one.max_downstream_connection_duration = hour),
            "max_downstream_connection_duration",
            "not supported by culvert",
        ),
        (
            with_proxy(|one| one.metadata_match = Some(Metadata::default())),
            "metadata_match",
            "not supported by culvert",
        ),
        (with_proxy(|one| one.cluster_specifier = None), "cluster", "missing"),
        (
            with_proxy(|one| one.max_connect_attempts = Some(UInt32Value { value: 0 })),
            "max_connect_attempts",
            "must be at least 1",
        ),
    ];
    for (listener, path, problem) in table {
        assert_eq!(listener_error(&listener), format!("filter_chains[0].filters[1].{path}: {problem}"));
    }
}

#[test]
fn tls_contexts_are_refused_by_path() {
    let at = "filter_chains[0].transport_socket";
    let common = |change: fn(&mut envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::CommonTlsContext)| {
        with_tls(|tls| change(tls.common_tls_context.as_mut().expect("common")))
    };
    let table: [(Listener, &str); 12] = [
        (
            with_tls(|tls| tls.require_client_certificate = NO),
            "require_client_certificate: must be true on an inbound listener",
        ),
        (with_tls(|tls| tls.require_sni = YES), "require_sni: not supported by culvert"),
        (with_tls(|tls| tls.common_tls_context = None), "common_tls_context: missing"),
        (
            common(|tls| tls.key_log = Some(TlsKeyLog::default())),
            "common_tls_context.key_log: not supported by culvert",
        ),
        (
            common(|tls| {
                tls.tls_params = Some(TlsParameters { cipher_suites: vec!["X".to_owned()], ..TlsParameters::default() })
            }),
            "common_tls_context.tls_params.cipher_suites: not supported by culvert",
        ),
        (
            common(|tls| {
                tls.tls_params = Some(TlsParameters { tls_minimum_protocol_version: 1, ..TlsParameters::default() })
            }),
            "common_tls_context.tls_params.tls_minimum_protocol_version: culvert speaks TLS 1.2 and 1.3",
        ),
        (common(|tls| tls.validation_context_type = None), "common_tls_context.validation_context: missing"),
        (
            with_tls(|tls| validation(tls).allow_expired_certificate = true),
            "common_tls_context.validation_context.allow_expired_certificate: not supported by culvert",
        ),
        (
            with_tls(|tls| validation(tls).trusted_ca = None),
            "common_tls_context.validation_context.trusted_ca: missing",
        ),
        (
            with_tls(|tls| {
                let file = Some(Specifier::Filename("/etc/ca.pem".to_owned()));
                validation(tls).trusted_ca.as_mut().expect("ca").specifier = file;
            }),
            "common_tls_context.validation_context.trusted_ca.filename: not supported by culvert",
        ),
        (
            common(|tls| {
                let key = tls.tls_certificates[0].private_key.as_mut().expect("key");
                key.specifier = Some(Specifier::InlineString("[redacted]".to_owned()));
            }),
            "common_tls_context.tls_certificates[0].private_key: not a private key in PEM",
        ),
        (
            common(|tls| {
                let other = rcgen::KeyPair::generate().expect("key").serialize_pem();
                let key = tls.tls_certificates[0].private_key.as_mut().expect("key");
                key.specifier = Some(Specifier::InlineString(other));
            }),
            "common_tls_context.tls_certificates[0]: keys may not be consistent: KeyMismatch",
        ),
    ];
    for (listener, error) in table {
        assert_eq!(listener_error(&listener), format!("{at}.{error}"));
    }
}

#[test]
fn clusters_are_refused_by_path() {
    let unsupported = "not supported by culvert";
    let table: [(Cluster, &str, &str); 13] = [
        (upstream(|one| one.health_checks = vec![HealthCheck::default()]), "health_checks", unsupported),
        (
            upstream(|one| {
                one.outlier_detection = Some(OutlierDetection {
                    consecutive_5xx: Some(UInt32Value { value: 3 }),
                    ..OutlierDetection::default()
                });
            }),
            "outlier_detection",
            unsupported,
        ),
        (upstream(|one| one.lb_policy = 2), "lb_policy", "RING_HASH is not supported by culvert"),
        (
            upstream(|one| {
                one.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst as i32));
            }),
            "type",
            "ORIGINAL_DST is not supported by culvert",
        ),
        (upstream(|one| one.eds_cluster_config = None), "eds_cluster_config", "missing"),
        (
            upstream(|one| one.connect_timeout = Some(Duration { seconds: -1, nanos: 0 })),
            "connect_timeout",
            "duration of -1 s and 0 ns",
        ),
        (
            upstream(|one| one.connect_timeout = Some(Duration::default())),
            "connect_timeout",
            "must be longer than zero",
        ),
        (
            upstream(|one| {
                one.common_lb_config = Some(CommonLbConfig {
                    healthy_panic_threshold: Some(Percent { value: 50.0 }),
                    ..CommonLbConfig::default()
                });
            }),
            "common_lb_config.healthy_panic_threshold",
            unsupported,
        ),
        (
            upstream(|one| {
                let threshold = circuit_breakers::Thresholds {
                    max_pending_requests: Some(UInt32Value { value: 1 }),
                    ..circuit_breakers::Thresholds::default()
                };
                one.circuit_breakers =
                    Some(CircuitBreakers { thresholds: vec![threshold], ..CircuitBreakers::default() });
            }),
            "circuit_breakers.thresholds[0].max_pending_requests",
            unsupported,
        ),
        (with_upstream_tls(|tls| tls.sni.clear()), "transport_socket.sni", "missing"),
        (with_upstream_tls(|tls| tls.allow_renegotiation = true), "transport_socket.allow_renegotiation", unsupported),
        (
            with_upstream_tls(|tls| tls.common_tls_context = Some(make::common_tls(None))),
            "transport_socket.common_tls_context.validation_context.match_typed_subject_alt_names",
            "missing",
        ),
        (make::static_cluster("", 80), "name", "missing"),
    ];
    for (cluster, path, problem) in table {
        assert_eq!(cluster_error(&cluster), format!("{path}: {problem}"));
    }
}

#[test]
fn endpoints_are_refused_by_path() {
    let error = |change: fn(&mut envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment)| {
        let mut assignment = make::assignment("api", vec![make::endpoint("192.0.2.1", 21000)]);
        change(&mut assignment);
        parse_endpoints("api", &any(&assignment)).expect_err("must be refused").to_string()
    };
    let at = "endpoints[0].lb_endpoints[0]";
    assert_eq!(error(|one| one.endpoints[0].priority = 1), "endpoints[0].priority: not supported by culvert");
    assert_eq!(
        error(|one| one.endpoints[0].lb_endpoints[0].health_status = 5),
        format!("{at}.health_status: DEGRADED is not supported by culvert")
    );
    assert_eq!(
        error(|one| one.endpoints[0].lb_endpoints[0].load_balancing_weight = Some(UInt32Value { value: 0 })),
        format!("{at}.load_balancing_weight: must be at least 1")
    );
    assert_eq!(error(|one| one.endpoints[0].lb_endpoints[0].host_identifier = None), format!("{at}.endpoint: missing"));
    assert_eq!(error(|one| one.cluster_name = "db".to_owned()), "cluster_name: \"db\" sent as resource \"api\"");
}

#[test]
fn a_resource_of_another_type_is_refused() {
    let error = parse_listener("api", &any(&make::static_cluster("api", 80))).expect_err("a cluster").to_string();
    assert_eq!(
        error,
        "type \"type.googleapis.com/envoy.config.cluster.v3.Cluster\", expected \"envoy.config.listener.v3.Listener\""
    );
}

#[test]
fn an_unreadable_policy_is_reported_and_denies_everything() {
    let mut rbac = make::rbac(Action::Allow, &["web"]);
    let policy = rbac.rules.as_mut().expect("rules").policies.values_mut().next().expect("policy");
    policy.principals[0].identifier = Some(Identifier::Header(HeaderMatcher::default()));
    let parsed =
        parse_listener(PUBLIC, &any(&make::inbound(vec![filter(&rbac), filter(&make::tcp_proxy("local_app"))])));
    let parsed = parsed.expect("usable");
    assert_eq!(
        parsed.complaint.expect("complaint").to_string(),
        "filter_chains[0].filters[0].rules.policies[consul-intentions-layer4].principals[0].header: not supported by culvert"
    );
    assert_eq!(*parsed.listener.rbac, [Rbac::deny_all()]);
}

#[test]
fn an_unreadable_policy_of_an_outbound_listener_refuses_it() {
    let mut rbac = make::rbac(Action::Allow, &["("]);
    rbac.stat_prefix.clear();
    let mut listener = make::outbound("api:127.0.0.1:8080", 8080, "api");
    listener.filter_chains[0].filters.insert(0, filter(&rbac));
    let error = listener_error(&listener);
    assert!(error.contains("principal_name.safe_regex: regular expression \"^spiffe://"), "{error}");
}

#[test]
fn fields_without_effect_are_accepted() {
    let listener = public(|one| {
        one.stat_prefix = "x".to_owned();
        one.per_connection_buffer_limit_bytes = Some(UInt32Value { value: 32768 });
        one.enable_reuse_port = YES;
        one.bind_to_port = YES;
        one.use_original_dst = NO;
        one.filter_chains[0].filter_chain_match = Some(FilterChainMatch::default());
        one.filter_chains[0].name = "public".to_owned();
    });
    let parsed = parse_listener(PUBLIC, &any(&listener)).expect("accepted");
    assert_eq!(parsed, parse_listener(PUBLIC, &any(&public(|_| {}))).expect("plain"));
    let cluster = upstream(|one| {
        one.alt_stat_name = "x".to_owned();
        one.outlier_detection = Some(OutlierDetection::default());
        one.circuit_breakers = Some(CircuitBreakers::default());
        let healthy_panic_threshold = Some(Percent::default());
        one.common_lb_config = Some(CommonLbConfig { healthy_panic_threshold, ..CommonLbConfig::default() });
    });
    let parsed = parse_cluster("api", &any(&cluster)).expect("accepted");
    assert_eq!(parsed, parse_cluster("api", &any(&upstream(|_| {}))).expect("plain"));
    assert_eq!(parsed.cluster.kind, ClusterKind::Eds);
    assert_eq!(parsed.endpoints_from.as_deref(), Some("api"));
}

#[test]
fn limits_and_policies_are_read() {
    let limit = ConnectionLimit { max_connections: Some(UInt64Value { value: 7 }), ..ConnectionLimit::default() };
    let mut proxy = make::tcp_proxy("local_app");
    proxy.max_connect_attempts = Some(UInt32Value { value: 3 });
    proxy.idle_timeout = Some(Duration::default());
    let listener = make::inbound(vec![filter(&limit), filter(&make::rbac(Action::Deny, &[])), filter(&proxy)]);
    let parsed = parse_listener(PUBLIC, &any(&listener)).expect("accepted").listener;
    assert_eq!((parsed.max_connections, parsed.max_connect_attempts), (Some(7), Some(3)));

    let threshold = circuit_breakers::Thresholds {
        max_connections: Some(UInt32Value { value: 9 }),
        ..circuit_breakers::Thresholds::default()
    };
    let cluster = upstream(|one| {
        one.lb_policy = 1;
        one.circuit_breakers = Some(CircuitBreakers { thresholds: vec![threshold], ..CircuitBreakers::default() });
        one.eds_cluster_config.as_mut().expect("eds").service_name = "api-endpoints".to_owned();
    });
    let parsed = parse_cluster("api", &any(&cluster)).expect("accepted");
    assert_eq!((parsed.cluster.max_connections, parsed.cluster.lb_policy), (Some(9), LbPolicy::LeastRequest));
    assert_eq!(parsed.endpoints_from.as_deref(), Some("api-endpoints"));
}

#[test]
fn a_certificate_without_a_name_is_told_and_the_policy_beside_it_applies() {
    let certificate = |common: &mut Option<CommonTlsContext>| {
        let key = rcgen::KeyPair::generate().expect("key");
        let leaf = rcgen::CertificateParams::default().self_signed(&key).expect("leaf");
        let sent = &mut common.as_mut().expect("common").tls_certificates[0];
        sent.certificate_chain = make::inline(&leaf.pem());
        sent.private_key = make::inline(&key.serialize_pem());
    };
    let place = "common_tls_context.tls_certificates[0].certificate_chain: own certificate: ";
    let listener = with_tls(|tls| certificate(&mut tls.common_tls_context));
    let parsed = parse_listener(PUBLIC, &any(&listener)).expect("accepted");
    let complaint = parsed.complaint.expect("complaint").to_string();
    assert!(complaint.starts_with(&format!("filter_chains[0].transport_socket.{place}")), "{complaint}");
    let good = parse_listener(PUBLIC, &any(&public(|_| {}))).expect("accepted").listener;
    assert_eq!(parsed.listener.rbac, good.rbac);
    let refused = cluster_error(&with_upstream_tls(|tls| certificate(&mut tls.common_tls_context)));
    assert!(refused.starts_with(&format!("transport_socket.{place}")), "{refused}");
}

#[test]
fn both_spellings_of_name_matchers_mean_the_same() {
    let untyped = with_upstream_tls(|tls| {
        let mut common = make::common_tls(None);
        if let Some(ValidationContextType::ValidationContext(context)) = &mut common.validation_context_type {
            #[expect(deprecated, reason = "Consul up to 1.12 uses it")]
            context.match_subject_alt_names.push(make::matcher(MatchPattern::Exact(make::id("api"))));
        }
        tls.common_tls_context = Some(common);
    });
    let parsed = |cluster: &Cluster| parse_cluster("api", &any(cluster)).expect("accepted").cluster.tls;
    assert_eq!(parsed(&untyped), parsed(&upstream(|_| {})));
}

#[test]
fn metadata_for_culvert_is_read() {
    let mut listener = make::public_listener(&["web"]);
    let rule = make::object(&[
        ("source", make::text("web")),
        ("destination", make::text("api")),
        ("action", make::text("allow")),
    ]);
    use envoy_types::pb::google::protobuf::value::Kind;
    use envoy_types::pb::google::protobuf::{ListValue, Value};
    let rule = Value { kind: Some(Kind::StructValue(rule)) };
    let list = Value { kind: Some(Kind::ListValue(ListValue { values: vec![rule] })) };
    let ours = |default: &str| Metadata {
        filter_metadata: [(
            "culvert".to_owned(),
            make::object(&[
                ("destination", make::text("api")),
                ("default", make::text(default)),
                ("intentions", list.clone()),
                ("from_the_future", make::text("ignored")),
            ]),
        )]
        .into(),
        ..Metadata::default()
    };
    listener.metadata = Some(ours("deny"));
    let parsed = parse_listener(PUBLIC, &any(&listener)).expect("accepted");
    assert_eq!(parsed.complaint, None);
    let explain = parsed.listener.explain.expect("explained");
    assert_eq!(explain.intentions[0].to_string(), "web => api (allow, precedence 9)");

    // A wrong explanation is reported and left out; the policy applies.
    listener.metadata = Some(ours("perhaps"));
    let wrong = parse_listener(PUBLIC, &any(&listener)).expect("accepted");
    let complaint = wrong.complaint.expect("complaint").to_string();
    assert!(complaint.starts_with("metadata.filter_metadata[culvert].default: action must be"), "{complaint}");
    assert_eq!((wrong.listener.explain, wrong.listener.rbac), (None, parsed.listener.rbac));

    let mut endpoint = make::endpoint("192.0.2.1", 21000);
    let fields = make::object(&[("node", make::text("n1")), ("workload", make::text("172.26.64.5:21000"))]);
    endpoint.metadata =
        Some(Metadata { filter_metadata: [("culvert".to_owned(), fields)].into(), ..Metadata::default() });
    let parsed = parse_endpoints("api", &any(&make::assignment("api", vec![endpoint]))).expect("accepted");
    assert_eq!(parsed[0].address_from("n1").to_string(), "172.26.64.5:21000");
    assert_eq!(parsed[0].address_from("n2").to_string(), "192.0.2.1:21000");
}
