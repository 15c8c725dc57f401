//! Endpoints: the instances of a cluster.

use envoy_types::pb::envoy::config::core::v3::HealthStatus;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as PbEndpoint, LbEndpoint, LocalityLbEndpoints, cluster_load_assignment,
};
use envoy_types::pb::google::protobuf::Any;

use super::address::socket_address;
use super::error::{Path, ResourceError};
use super::{check_name, metadata, refuse, unpack};
use crate::config::Endpoint;

/// Most endpoints of one cluster.
pub const MAX_ENDPOINTS: usize = 10_000;

/// Reads the endpoints sent under `name`.
///
/// # Errors
/// [`ResourceError`] with the path of the first field that is wrong, or would change behaviour and is not supported.
pub fn parse_endpoints(name: &str, resource: &Any) -> Result<Vec<Endpoint>, ResourceError> {
    let assignment: ClusterLoadAssignment = unpack(resource, &Path::ROOT)?;
    check_name(&assignment.cluster_name, name, &Path::ROOT.field("cluster_name"))?;
    load_assignment(assignment, &Path::ROOT)
}

/// Reads a load assignment, also one inside a static cluster.
pub(super) fn load_assignment(
    assignment: ClusterLoadAssignment,
    path: &Path<'_>,
) -> Result<Vec<Endpoint>, ResourceError> {
    let ClusterLoadAssignment { cluster_name: _, endpoints: localities, named_endpoints, policy } = assignment;
    refuse!(path; named_endpoints);
    let cluster_load_assignment::Policy {
        drop_overloads,
        overprovisioning_factor: _, // about priorities, of which there is one
        endpoint_stale_after,
        weighted_priority_health: _, // likewise
    } = policy.unwrap_or_default();
    let policy_path = path.field("policy");
    refuse!(policy_path; drop_overloads, endpoint_stale_after);
    let mut endpoints = Vec::new();
    for (index, locality) in localities.into_iter().enumerate() {
        let path = path.item("endpoints", index);
        let LocalityLbEndpoints {
            locality: _, // balancing does not look at localities
            metadata: _, // for Envoy's extensions
            lb_endpoints,
            load_balancing_weight: _, // of the locality: likewise
            priority,
            proximity: _, // likewise
            lb_config,
        } = locality;
        refuse!(path; priority, lb_config);
        for (index, endpoint) in lb_endpoints.into_iter().enumerate() {
            if endpoints.len() == MAX_ENDPOINTS {
                return Err(path.too_many("endpoints", MAX_ENDPOINTS));
            }
            endpoints.push(lb_endpoint(endpoint, &path.item("lb_endpoints", index))?);
        }
    }
    Ok(endpoints)
}

fn lb_endpoint(endpoint: LbEndpoint, path: &Path<'_>) -> Result<Endpoint, ResourceError> {
    let LbEndpoint { health_status, metadata, load_balancing_weight, host_identifier } = endpoint;
    let host = match host_identifier {
        Some(HostIdentifier::Endpoint(host)) => host,
        Some(HostIdentifier::EndpointName(_)) => return Err(path.field("endpoint_name").unsupported()),
        None => return Err(path.field("endpoint").missing()),
    };
    let healthy = healthy(health_status, &path.field("health_status"))?;
    let weight = load_balancing_weight.map_or(1, |weight| weight.value);
    if weight == 0 {
        return Err(path.field("load_balancing_weight").invalid("must be at least 1"));
    }
    let (node, workload) = metadata::endpoint(metadata.as_ref(), &path.field("metadata"))?;
    let path = path.field("endpoint");
    let PbEndpoint {
        address,
        health_check_config: _, // there are no active health checks
        hostname: _,            // for HTTP
        additional_addresses,
        observability_name: _, // statistics
    } = host;
    refuse!(path; additional_addresses);
    let address = socket_address(address, &path.field("address"))?;
    Ok(Endpoint { address, weight, healthy, node, workload })
}

fn healthy(status: i32, path: &Path<'_>) -> Result<bool, ResourceError> {
    match HealthStatus::try_from(status) {
        Ok(HealthStatus::Unknown | HealthStatus::Healthy) => Ok(true),
        Ok(HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout) => Ok(false),
        Ok(HealthStatus::Degraded) => Err(path.invalid("DEGRADED is not supported by culvert")),
        Err(_) => Err(path.invalid(format!("unknown status {status}"))),
    }
}
