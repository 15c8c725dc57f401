//! Listeners and their filters.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3::listener::connection_balance_config::BalanceType;
use envoy_types::pb::envoy::config::listener::v3::listener::{ConnectionBalanceConfig, DeprecatedV1};
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener as PbListener, filter};
use envoy_types::pb::envoy::extensions::filters::network::connection_limit::v3::ConnectionLimit;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as RbacFilter;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration as PbDuration};
use prost::Name;

use super::address::socket_address;
use super::error::{Path, ResourceError};
use super::{check_name, duration, message_name, metadata, rbac, refuse, tls, unpack};
use crate::config::{Direction, Listener};
use crate::rbac::Rbac;

/// Most filters in a filter chain.
pub const MAX_FILTERS: usize = 16;
/// How Consul names listeners that serve the mesh.
const PUBLIC_PREFIX: &str = "public_listener:";

/// A listener that can be put to use, even if something about it has to be reported.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ParsedListener {
    /// What to do.
    pub listener: Listener,
    /// What was wrong with its policy, its explanation, or the name in its own certificate. An inbound listener whose RBAC
    /// cannot be read denies all instead of going on with an older policy, which might be wider; one that does not know who
    /// it is goes on with the identity before, if there was one, and with the new policy.
    pub complaint: Option<ResourceError>,
}

/// What the filters of a chain amount to.
#[derive(Default)]
struct Filters {
    rbac: Vec<Rbac>,
    max_connections: Option<u64>,
    proxy: Option<Proxy>,
    complaint: Option<ResourceError>,
}

struct Proxy {
    cluster: String,
    stat_prefix: String,
    max_connect_attempts: Option<u32>,
}

/// Reads the listener sent under `name`.
///
/// # Errors
/// [`ResourceError`] with the path of the first field that is wrong, or would change behaviour and is not supported.
pub fn parse_listener(name: &str, resource: &Any) -> Result<ParsedListener, ResourceError> {
    let path = Path::ROOT;
    #[expect(deprecated, reason = "old fields are looked at in order to refuse them")]
    let PbListener {
        name: own_name,
        address,
        additional_addresses,
        stat_prefix: _,   // statistics
        stats_matcher: _, // statistics
        filter_chains,
        fcds_config,
        filter_chain_matcher,
        use_original_dst,
        default_filter_chain,
        per_connection_buffer_limit_bytes: _, // the worker's buffers have a limit of their own
        per_connection_buffer_high_watermark_timeout,
        metadata,
        deprecated_v1,
        drain_type: _, // about health check failures, which do not drain here
        listener_filters,
        listener_filters_timeout: _,             // there are no listener filters
        continue_on_listener_filters_timeout: _, // likewise
        transparent,
        freebind,
        socket_options,
        tcp_fast_open_queue_length,
        traffic_direction,
        udp_listener_config,
        api_listener,
        connection_balance_config,
        reuse_port: _,        // sockets are opened as the worker needs them
        enable_reuse_port: _, // likewise
        access_log,
        tcp_backlog_size,
        max_connections_to_accept_per_socket_event: _, // scheduling inside Envoy
        bind_to_port,
        enable_mptcp,
        ignore_global_conn_limit,
        bypass_overload_manager,
        tcp_keepalive,
        listener_specifier,
    } = unpack(resource, &path)?;
    check_name(&own_name, name, &path.field("name"))?;
    let (use_original_dst, transparent) = (set(use_original_dst), set(transparent));
    let freebind = set(freebind);
    refuse!(path;
        additional_addresses, fcds_config, filter_chain_matcher, use_original_dst, default_filter_chain,
        per_connection_buffer_high_watermark_timeout, listener_filters, transparent, freebind, socket_options,
        tcp_fast_open_queue_length, udp_listener_config, api_listener, access_log, tcp_backlog_size, enable_mptcp,
        ignore_global_conn_limit, bypass_overload_manager, tcp_keepalive, listener_specifier,
    );
    must_bind(bind_to_port, deprecated_v1, &path)?;
    exact_balance(connection_balance_config, &path)?;

    let direction = direction(traffic_direction, name, &path)?;
    let address = socket_address(address, &path.field("address"))?;
    let chain = only_chain(filter_chains, &path)?;
    let chain_path = path.item("filter_chains", 0);
    let socket_path = chain_path.field("transport_socket");
    let socket = chain.transport_socket.map(|socket| tls::downstream(socket, &socket_path));
    let tls = match (socket.transpose()?, direction) {
        (None, Direction::Inbound) => return Err(socket_path.missing()),
        (Some(_), Direction::Outbound) => return Err(socket_path.unsupported()),
        (tls, _) => tls.map(Arc::new),
    };
    let nameless = tls.as_ref().and_then(|tls| tls::nameless(&tls.identity, &socket_path));
    let mut filters = filters(chain.filters, direction, &chain_path)?;
    let proxy = filters.proxy.ok_or_else(|| chain_path.field("filters").invalid("no tcp_proxy at the end"))?;
    if direction == Direction::Inbound && filters.rbac.is_empty() {
        filters.rbac.push(Rbac::deny_all()); // a proxy without policy denies
    }
    let explain = metadata::explain(metadata.as_ref(), &path.field("metadata"));
    let (explain, unexplained) = explain.map_or_else(|error| (None, Some(error)), |explain| (explain, None));
    let listener = Listener {
        name: own_name,
        address,
        direction,
        tls,
        rbac: filters.rbac.into(),
        cluster: proxy.cluster,
        stat_prefix: proxy.stat_prefix,
        max_connections: filters.max_connections,
        max_connect_attempts: proxy.max_connect_attempts,
        explain,
    };
    Ok(ParsedListener { listener, complaint: filters.complaint.or(nameless).or(unexplained) })
}

/// `None` and `false` are the same for the flags that we refuse.
fn set(flag: Option<BoolValue>) -> bool {
    flag.is_some_and(|flag| flag.value)
}

fn must_bind(bind: Option<BoolValue>, old: Option<DeprecatedV1>, path: &Path<'_>) -> Result<(), ResourceError> {
    let old = old.and_then(|old| old.bind_to_port);
    match (bind, old) {
        (Some(BoolValue { value: false }), _) => Err(path.field("bind_to_port").unsupported()),
        (_, Some(BoolValue { value: false })) => Err(path.field("deprecated_v1.bind_to_port").unsupported()),
        _ => Ok(()),
    }
}

/// Exact balance is about the threads of Envoy; the worker has its own scheduler. Other kinds are extensions.
fn exact_balance(config: Option<ConnectionBalanceConfig>, path: &Path<'_>) -> Result<(), ResourceError> {
    match config.map(|config| config.balance_type) {
        None | Some(None | Some(BalanceType::ExactBalance(_))) => Ok(()),
        Some(Some(_)) => Err(path.field("connection_balance_config").unsupported()),
    }
}

fn direction(direction: i32, name: &str, path: &Path<'_>) -> Result<Direction, ResourceError> {
    let public = name.starts_with(PUBLIC_PREFIX);
    match TrafficDirection::try_from(direction) {
        Ok(TrafficDirection::Inbound) => Ok(Direction::Inbound),
        Ok(TrafficDirection::Unspecified) if public => Ok(Direction::Inbound),
        Ok(TrafficDirection::Outbound) if !public => Ok(Direction::Outbound),
        // A guess could open a listener without policy.
        _ => Err(path.field("traffic_direction").invalid("must be INBOUND for a public listener, else OUTBOUND")),
    }
}

/// The filter chain of a listener; what it would be chosen by is refused.
fn only_chain(chains: Vec<FilterChain>, path: &Path<'_>) -> Result<FilterChain, ResourceError> {
    if chains.len() > 1 {
        return Err(path.item("filter_chains", 1).unsupported());
    }
    let path = path.item("filter_chains", 0);
    let chain = chains.into_iter().next().ok_or_else(|| path.missing())?;
    #[expect(deprecated, reason = "old fields are looked at in order to refuse them")]
    let FilterChain {
        filter_chain_match,
        filters,
        use_proxy_proto,
        metadata: _, // for Envoy's extensions
        transport_socket,
        transport_socket_connect_timeout,
        name: _, // for people
    } = chain;
    let filter_chain_match = filter_chain_match.unwrap_or_default(); // an empty one matches everything
    let use_proxy_proto = set(use_proxy_proto);
    refuse!(path; filter_chain_match, use_proxy_proto, transport_socket_connect_timeout);
    Ok(FilterChain { filters, transport_socket, ..FilterChain::default() })
}

fn filters(list: Vec<Filter>, direction: Direction, path: &Path<'_>) -> Result<Filters, ResourceError> {
    if list.len() > MAX_FILTERS {
        return Err(path.field("filters").too_many("filters", MAX_FILTERS));
    }
    let mut filters = Filters::default();
    for (index, one) in list.into_iter().enumerate() {
        let path = path.item("filters", index);
        if filters.proxy.is_some() {
            return Err(path.invalid("stands after the tcp_proxy, which is the last"));
        }
        filters.add(one, direction, &path)?;
    }
    Ok(filters)
}

impl Filters {
    fn add(&mut self, filter: Filter, direction: Direction, path: &Path<'_>) -> Result<(), ResourceError> {
        let Filter { name: _, config_type } = filter; // the type URL says which one it is
        let any = match config_type {
            Some(filter::ConfigType::TypedConfig(any)) => any,
            Some(filter::ConfigType::ConfigDiscovery(_)) => return Err(path.field("config_discovery").unsupported()),
            None => return Err(path.field("typed_config").missing()),
        };
        let kind = message_name(&any);
        if kind == RbacFilter::full_name() {
            match unpack(&any, path).and_then(|filter| rbac::filter(filter, path)) {
                Ok(rbac) => self.rbac.extend(rbac),
                Err(error) if direction == Direction::Inbound => {
                    self.rbac.push(Rbac::deny_all());
                    self.complaint.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        } else if kind == ConnectionLimit::full_name() {
            let limit = connection_limit(unpack(&any, path)?, path)?;
            self.max_connections = Some(self.max_connections.map_or(limit, |other| other.min(limit)));
        } else if kind == TcpProxy::full_name() {
            self.proxy = Some(tcp_proxy(unpack(&any, path)?, path)?);
        } else {
            return Err(path.invalid(format!("filter of type {kind:?} is not supported by culvert")));
        }
        Ok(())
    }
}

fn connection_limit(filter: ConnectionLimit, path: &Path<'_>) -> Result<u64, ResourceError> {
    let ConnectionLimit { stat_prefix: _, max_connections, delay, runtime_enabled } = filter;
    refuse!(path; delay, runtime_enabled);
    match max_connections {
        Some(limit) if limit.value > 0 => Ok(limit.value),
        Some(_) => Err(path.field("max_connections").invalid("must be at least 1")),
        None => Err(path.field("max_connections").missing()),
    }
}

fn tcp_proxy(filter: TcpProxy, path: &Path<'_>) -> Result<Proxy, ResourceError> {
    #[expect(deprecated, reason = "old fields are about access logs, which are refused as a whole")]
    let TcpProxy {
        stat_prefix,
        on_demand,
        metadata_match,
        idle_timeout,
        downstream_idle_timeout,
        upstream_idle_timeout,
        access_log,
        max_connect_attempts,
        backoff_options,
        hash_policy,
        tunneling_config,
        max_downstream_connection_duration,
        max_downstream_connection_duration_jitter_percentage: _, // there is no such duration
        access_log_flush_interval: _,                            // there is no access log
        flush_access_log_on_connected: _,                        // likewise
        access_log_options: _,                                   // likewise
        proxy_protocol_tlvs,
        proxy_protocol_tlv_merge_policy: _, // there is no proxy protocol
        upstream_connect_mode,
        max_early_data_bytes,
        check_drain_close,
        cluster_specifier,
    } = filter;
    refuse!(path;
        on_demand, metadata_match, access_log, backoff_options, hash_policy, tunneling_config,
        max_downstream_connection_duration, proxy_protocol_tlvs, upstream_connect_mode, max_early_data_bytes,
        check_drain_close,
    );
    let idle = [
        ("idle_timeout", idle_timeout),
        ("downstream_idle_timeout", downstream_idle_timeout),
        ("upstream_idle_timeout", upstream_idle_timeout),
    ];
    for (field, timeout) in idle {
        never(timeout, &path.field(field))?;
    }
    let max_connect_attempts = max_connect_attempts.map(|attempts| attempts.value);
    if max_connect_attempts == Some(0) {
        return Err(path.field("max_connect_attempts").invalid("must be at least 1"));
    }
    match cluster_specifier {
        Some(ClusterSpecifier::Cluster(cluster)) if !cluster.is_empty() => {
            Ok(Proxy { cluster, stat_prefix, max_connect_attempts })
        }
        Some(ClusterSpecifier::WeightedClusters(_)) => Err(path.field("weighted_clusters").unsupported()),
        _ => Err(path.field("cluster").missing()),
    }
}

/// Zero switches an idle timeout off; culvert has none, and ends no idle connection.
fn never(timeout: Option<PbDuration>, path: &Path<'_>) -> Result<(), ResourceError> {
    match timeout.map(|timeout| duration(&timeout, path)).transpose()? {
        None => Ok(()),
        Some(timeout) if timeout.is_zero() => Ok(()),
        Some(_) => Err(path.unsupported()),
    }
}
