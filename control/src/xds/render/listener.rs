//! Listeners: one for the mesh, and those on which the application reaches its upstreams.

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain};
use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::google::protobuf::{Any, Duration as PbDuration, UInt64Value};

use super::wire::Listener;
use super::{LOCAL_APP, address, metadata, pack, rbac, tls};
use crate::xds::snapshot::{Inbound, Outbound, Snapshot};

/// Consul's name of the inbound listener, before its address; also its name in statistics.
const PUBLIC_LISTENER: &str = "public_listener";

/// Mutual TLS, then the intentions, then the application.
pub(super) fn public(snapshot: &Snapshot, inbound: &Inbound) -> Listener {
    let limit = inbound.max_connections.map(|most| ConnectionLimit {
        stat_prefix: "inbound_connection_limit".to_owned(),
        max_connections: Some(UInt64Value { value: u64::from(most) }),
        ..ConnectionLimit::default()
    });
    let limit = limit.map(|limit| filter("envoy.filters.network.connection_limit", pack(&limit)));
    let policy = filter("envoy.filters.network.rbac", rbac::filter(snapshot));
    let proxy = tcp_proxy(PUBLIC_LISTENER, LOCAL_APP);
    Listener {
        name: format!("{PUBLIC_LISTENER}:{}", inbound.bind),
        address: Some(address(inbound.bind)),
        filter_chains: vec![FilterChain {
            filters: std::iter::once(policy).chain(limit).chain([proxy]).collect(),
            transport_socket: Some(tls::downstream(snapshot)),
            ..FilterChain::default()
        }],
        metadata: Some(metadata::explanation(snapshot)),
        traffic_direction: TrafficDirection::Inbound as i32,
    }
}

/// Plain TCP from the application to the instances of a service.
pub(super) fn outbound(outbound: &Outbound) -> Listener {
    Listener {
        name: outbound.name.clone(),
        address: Some(address(outbound.bind)),
        filter_chains: vec![FilterChain {
            filters: vec![tcp_proxy(&outbound.stat_prefix, &outbound.cluster)],
            ..FilterChain::default()
        }],
        metadata: None,
        traffic_direction: TrafficDirection::Outbound as i32,
    }
}

fn tcp_proxy(stat_prefix: &str, cluster: &str) -> Filter {
    let proxy = TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        // Never: Envoy's default would end idle connections after an hour.
        idle_timeout: Some(PbDuration::default()),
        ..TcpProxy::default()
    };
    filter("envoy.filters.network.tcp_proxy", pack(&proxy))
}

fn filter(name: &str, config: Any) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(config)) }
}
