//! Clusters.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig, LbPolicy as PbLbPolicy,
};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster as PbCluster, circuit_breakers};
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, ConfigSource, RoutingPriority};
use envoy_types::pb::google::protobuf::Any;

use super::endpoints::load_assignment as read_endpoints;
use super::error::{Path, ResourceError};
use super::{check_name, duration, refuse, tls, unpack};
use crate::config::{Cluster, ClusterKind, LbPolicy};

/// Connect timeout where none is sent: Envoy's default.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A cluster, and the endpoints it still needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ParsedCluster {
    /// The cluster; an EDS one has no endpoints yet.
    pub cluster: Cluster,
    /// The resource that holds the endpoints of an EDS cluster.
    pub endpoints_from: Option<String>,
}

/// Reads the cluster sent under `name`.
///
/// # Errors
/// [`ResourceError`] with the path of the first field that is wrong, or would change behaviour and is not supported.
pub fn parse_cluster(name: &str, resource: &Any) -> Result<ParsedCluster, ResourceError> {
    let path = Path::ROOT;
    #[expect(deprecated, reason = "old fields are looked at in order to refuse them")]
    let PbCluster {
        transport_socket_matches,
        transport_socket_matcher,
        name: own_name,
        alt_stat_name: _, // statistics
        stats_matcher: _, // statistics
        eds_cluster_config,
        connect_timeout,
        per_connection_buffer_limit_bytes: _, // the worker's buffers have a limit of their own
        per_connection_buffer_high_watermark_timeout,
        lb_policy,
        load_assignment,
        health_checks,
        max_requests_per_connection: _, // HTTP
        circuit_breakers,
        upstream_http_protocol_options: _,   // HTTP
        common_http_protocol_options: _,     // HTTP
        http_protocol_options: _,            // HTTP
        http2_protocol_options: _,           // HTTP
        typed_extension_protocol_options: _, // HTTP and other protocols; ours are TCP proxies
        dns_refresh_rate,
        dns_jitter,
        dns_failure_refresh_rate,
        respect_dns_ttl,
        dns_lookup_family,
        dns_resolvers,
        use_tcp_for_dns_lookups,
        dns_resolution_config,
        typed_dns_resolver_config,
        wait_for_warm_on_init: _, // every EDS cluster waits
        outlier_detection,
        cleanup_interval,
        upstream_bind_config,
        lb_subset_config,
        common_lb_config,
        transport_socket,
        metadata: _, // for people and for Envoy's extensions
        protocol_selection,
        upstream_connection_options,
        close_connections_on_host_health_failure,
        ignore_health_on_host_removal: _, // there are no active health checks
        filters,
        load_balancing_policy,
        lrs_server,
        lrs_report_endpoint_metrics: _, // there is no load report
        track_timeout_budgets: _,       // statistics
        upstream_config,
        track_cluster_stats: _, // statistics
        preconnect_policy,
        connection_pool_per_downstream_connection: _, // connections of TCP proxies are never shared
        queuing_policies,
        cluster_discovery_type,
        lb_config,
    } = unpack(resource, &path)?;
    check_name(&own_name, name, &path.field("name"))?;
    let outlier_detection = outlier_detection.unwrap_or_default(); // Consul sends an empty one with every upstream
    refuse!(path;
        transport_socket_matches, transport_socket_matcher, per_connection_buffer_high_watermark_timeout,
        health_checks, dns_refresh_rate, dns_jitter, dns_failure_refresh_rate, respect_dns_ttl, dns_lookup_family,
        dns_resolvers, use_tcp_for_dns_lookups, dns_resolution_config, typed_dns_resolver_config, outlier_detection,
        cleanup_interval, upstream_bind_config, lb_subset_config, protocol_selection, upstream_connection_options,
        close_connections_on_host_health_failure, filters, load_balancing_policy, lrs_server, upstream_config,
        preconnect_policy, queuing_policies, lb_config,
    );
    no_panic_mode(common_lb_config, &path.field("common_lb_config"))?;
    let max_connections = max_connections(circuit_breakers, &path.field("circuit_breakers"))?;
    let connect_timeout = match connect_timeout {
        None => CONNECT_TIMEOUT,
        Some(timeout) => duration(&timeout, &path.field("connect_timeout"))?,
    };
    if connect_timeout.is_zero() {
        return Err(path.field("connect_timeout").invalid("must be longer than zero"));
    }
    let lb_policy = lb_policy_of(lb_policy, &path.field("lb_policy"))?;
    let kind = kind(cluster_discovery_type, &path)?;
    let (endpoints, endpoints_from) = match (kind, load_assignment) {
        (ClusterKind::Static, Some(assignment)) => {
            refuse!(path; eds_cluster_config);
            (read_endpoints(assignment, &path.field("load_assignment"))?, None)
        }
        (ClusterKind::Static, None) => return Err(path.field("load_assignment").missing()),
        (ClusterKind::Eds, None) => (Vec::new(), Some(endpoints_name(eds_cluster_config, name, &path)?)),
        (ClusterKind::Eds, Some(_)) => return Err(path.field("load_assignment").invalid("not for an EDS cluster")),
    };
    let tls = transport_socket.map(|socket| tls::upstream(socket, &path.field("transport_socket"))).transpose()?;
    let cluster = Cluster {
        name: own_name,
        kind,
        connect_timeout,
        lb_policy,
        endpoints: endpoints.into(),
        tls: tls.map(Arc::new),
        max_connections,
    };
    Ok(ParsedCluster { cluster, endpoints_from })
}

fn kind(kind: Option<ClusterDiscoveryType>, path: &Path<'_>) -> Result<ClusterKind, ResourceError> {
    let kind = match kind {
        None => DiscoveryType::Static as i32,
        Some(ClusterDiscoveryType::Type(kind)) => kind,
        Some(ClusterDiscoveryType::ClusterType(_)) => return Err(path.field("cluster_type").unsupported()),
    };
    match DiscoveryType::try_from(kind) {
        Ok(DiscoveryType::Static) => Ok(ClusterKind::Static),
        Ok(DiscoveryType::Eds) => Ok(ClusterKind::Eds),
        Ok(other) => Err(path.field("type").invalid(format!("{} is not supported by culvert", other.as_str_name()))),
        Err(_) => Err(path.field("type").invalid(format!("unknown type {kind}"))),
    }
}

/// Endpoints come over the same stream, by the cluster's name unless `service_name` says another.
fn endpoints_name(config: Option<EdsClusterConfig>, name: &str, path: &Path<'_>) -> Result<String, ResourceError> {
    let path = path.field("eds_cluster_config");
    let EdsClusterConfig { eds_config, service_name } = config.ok_or_else(|| path.missing())?;
    let path = path.field("eds_config");
    let ConfigSource {
        authorities,
        initial_fetch_timeout: _, // a cluster waits for its endpoints, however long that takes
        resource_api_version,
        config_source_specifier,
    } = eds_config.ok_or_else(|| path.missing())?;
    refuse!(path; authorities);
    if resource_api_version != ApiVersion::V3 as i32 {
        return Err(path.field("resource_api_version").invalid("must be V3"));
    }
    match config_source_specifier {
        Some(ConfigSourceSpecifier::Ads(_) | ConfigSourceSpecifier::Self_(_)) => {}
        Some(_) => return Err(path.invalid("must be ads")),
        None => return Err(path.missing()),
    }
    Ok(if service_name.is_empty() { name.to_owned() } else { service_name })
}

fn lb_policy_of(policy: i32, path: &Path<'_>) -> Result<LbPolicy, ResourceError> {
    match PbLbPolicy::try_from(policy) {
        Ok(PbLbPolicy::RoundRobin) => Ok(LbPolicy::RoundRobin),
        Ok(PbLbPolicy::LeastRequest) => Ok(LbPolicy::LeastRequest),
        Ok(PbLbPolicy::Random) => Ok(LbPolicy::Random),
        Ok(other) => Err(path.invalid(format!("{} is not supported by culvert", other.as_str_name()))),
        Err(_) => Err(path.invalid(format!("unknown policy {policy}"))),
    }
}

/// Panic mode (to send to unhealthy instances when few are healthy) does not exist here: asking for it is refused.
fn no_panic_mode(config: Option<CommonLbConfig>, path: &Path<'_>) -> Result<(), ResourceError> {
    let CommonLbConfig {
        healthy_panic_threshold,
        update_merge_window: _,             // updates are applied at once
        ignore_new_hosts_until_first_hc: _, // there are no active health checks
        close_connections_on_host_set_change,
        consistent_hashing_lb_config,
        override_host_status,
        locality_config_specifier,
    } = config.unwrap_or_default();
    let healthy_panic_threshold = healthy_panic_threshold.unwrap_or_default();
    refuse!(path;
        healthy_panic_threshold, close_connections_on_host_set_change, consistent_hashing_lb_config,
        override_host_status, locality_config_specifier,
    );
    Ok(())
}

/// The limit of connections of default priority; there is no other priority for TCP.
fn max_connections(breakers: Option<CircuitBreakers>, path: &Path<'_>) -> Result<Option<u32>, ResourceError> {
    let CircuitBreakers { thresholds, per_host_thresholds } = breakers.unwrap_or_default();
    refuse!(path; per_host_thresholds);
    let mut limit = None;
    for (index, threshold) in thresholds.into_iter().enumerate() {
        let path = path.item("thresholds", index);
        let circuit_breakers::Thresholds {
            priority,
            max_connections,
            max_pending_requests,
            max_requests: _,         // HTTP
            max_retries: _,          // HTTP
            retry_budget: _,         // HTTP
            track_remaining: _,      // statistics
            max_connection_pools: _, // connections of TCP proxies are never shared
        } = threshold;
        if priority != RoutingPriority::Default as i32 {
            continue;
        }
        refuse!(path; max_pending_requests);
        limit = max_connections.map(|limit| limit.value).or(limit);
    }
    Ok(limit)
}
