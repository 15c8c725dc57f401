//! Endpoints: the instances of a service that take traffic.

use envoy_types::pb::envoy::config::core::v3::HealthStatus;
use envoy_types::pb::envoy::config::endpoint::v3::Endpoint;
use envoy_types::pb::google::protobuf::UInt32Value;

use super::wire::{ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints};
use super::{address, metadata};
use crate::xds::snapshot::{Instance, Target};

/// All instances of `target`, in one locality. No instance means an empty assignment, which refuses connections.
pub(super) fn assignment(target: &Target) -> ClusterLoadAssignment {
    let lb_endpoints = target.instances.iter().map(endpoint).collect();
    ClusterLoadAssignment { cluster_name: target.name.clone(), endpoints: vec![LocalityLbEndpoints { lb_endpoints }] }
}

fn endpoint(instance: &Instance) -> LbEndpoint {
    LbEndpoint {
        endpoint: Some(Endpoint { address: Some(address(instance.address)), ..Endpoint::default() }),
        health_status: HealthStatus::Healthy as i32,
        metadata: Some(metadata::instance(instance)),
        load_balancing_weight: Some(UInt32Value { value: instance.weight }),
    }
}
