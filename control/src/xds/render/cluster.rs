//! Clusters: the local application, and one per service that is called.

use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig, LbPolicy,
};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster, OutlierDetection, circuit_breakers};
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::{AggregatedConfigSource, ApiVersion, ConfigSource};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints};
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::UInt32Value;

use super::{LOCAL_APP, address, duration, tls};
use crate::xds::snapshot::{Inbound, Snapshot, Target};

/// The application on its loopback address: a literal, so that nothing resolves or rewrites it.
pub(super) fn local_app(inbound: &Inbound) -> Cluster {
    let endpoint = Endpoint { address: Some(address(inbound.application)), ..Endpoint::default() };
    let endpoint = LbEndpoint { host_identifier: Some(HostIdentifier::Endpoint(endpoint)), ..LbEndpoint::default() };
    Cluster {
        name: LOCAL_APP.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static as i32)),
        connect_timeout: Some(duration(inbound.connect_timeout)),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: LOCAL_APP.to_owned(),
            endpoints: vec![LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..LocalityLbEndpoints::default() }],
            ..ClusterLoadAssignment::default()
        }),
        ..Cluster::default()
    }
}

/// The instances of a service, by endpoint discovery, over mutual TLS.
pub(super) fn upstream(snapshot: &Snapshot, target: &Target) -> Cluster {
    let limit = |most: u32| circuit_breakers::Thresholds {
        max_connections: Some(UInt32Value { value: most }),
        ..circuit_breakers::Thresholds::default()
    };
    let thresholds = target.max_connections.map(limit).into_iter().collect();
    let ads = ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource::default())),
        resource_api_version: ApiVersion::V3 as i32,
        ..ConfigSource::default()
    };
    Cluster {
        name: target.name.clone(),
        alt_stat_name: target.name.clone(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(ads), ..EdsClusterConfig::default() }),
        connect_timeout: Some(duration(target.connect_timeout)),
        lb_policy: LbPolicy::LeastRequest as i32,
        circuit_breakers: Some(CircuitBreakers { thresholds, ..CircuitBreakers::default() }),
        outlier_detection: Some(OutlierDetection::default()),
        // No panic mode: an unhealthy instance gets nothing, even if all are.
        common_lb_config: Some(CommonLbConfig {
            healthy_panic_threshold: Some(Percent { value: 0.0 }),
            ..CommonLbConfig::default()
        }),
        transport_socket: Some(tls::upstream(snapshot, target)),
        ..Cluster::default()
    }
}
