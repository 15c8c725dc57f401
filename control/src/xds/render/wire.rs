//! Twins of the messages that hold maps.
//!
//! The generated types keep maps in a `HashMap`, whose order differs from one value to the next; so would the encoded bytes and the
//! version made of them. These twins have the same field numbers and encode maps in the order of their keys. A test decodes
//! them as the generated types.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::{Address, HealthStatus, TrafficDirection};
use envoy_types::pb::envoy::config::endpoint::v3::Endpoint;
use envoy_types::pb::envoy::config::listener::v3::FilterChain;
use envoy_types::pb::envoy::config::rbac::v3::Policy;
use envoy_types::pb::envoy::config::rbac::v3::rbac::Action;
use envoy_types::pb::google::protobuf::UInt32Value;
use prost::{Message, Oneof};

/// `envoy.extensions.filters.network.rbac.v3.RBAC`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct RbacFilter {
    #[prost(message, optional, tag = "1")]
    pub(super) rules: Option<Rules>,
    #[prost(string, tag = "3")]
    pub(super) stat_prefix: String,
}

/// `envoy.config.rbac.v3.RBAC`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Rules {
    #[prost(enumeration = "Action", tag = "1")]
    pub(super) action: i32,
    #[prost(btree_map = "string, message", tag = "2")]
    pub(super) policies: BTreeMap<String, Policy>,
}

/// `envoy.config.core.v3.Metadata`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Metadata {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(super) filter_metadata: BTreeMap<String, Struct>,
}

/// `google.protobuf.Struct`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Struct {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(super) fields: BTreeMap<String, Value>,
}

/// `google.protobuf.Value`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Value {
    #[prost(oneof = "ValueKind", tags = "3, 5, 6")]
    pub(super) kind: Option<ValueKind>,
}

/// What of `google.protobuf.Value.kind` is used.
#[derive(Clone, PartialEq, Oneof)]
pub(super) enum ValueKind {
    #[prost(string, tag = "3")]
    String(String),
    #[prost(message, tag = "5")]
    Struct(Struct),
    #[prost(message, tag = "6")]
    List(ListValue),
}

/// `google.protobuf.ListValue`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ListValue {
    #[prost(message, repeated, tag = "1")]
    pub(super) values: Vec<Value>,
}

/// `envoy.config.listener.v3.Listener`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Listener {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(message, optional, tag = "2")]
    pub(super) address: Option<Address>,
    #[prost(message, repeated, tag = "3")]
    pub(super) filter_chains: Vec<FilterChain>,
    #[prost(message, optional, tag = "6")]
    pub(super) metadata: Option<Metadata>,
    #[prost(enumeration = "TrafficDirection", tag = "16")]
    pub(super) traffic_direction: i32,
}

/// `envoy.config.endpoint.v3.ClusterLoadAssignment`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ClusterLoadAssignment {
    #[prost(string, tag = "1")]
    pub(super) cluster_name: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) endpoints: Vec<LocalityLbEndpoints>,
}

/// `envoy.config.endpoint.v3.LocalityLbEndpoints`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LocalityLbEndpoints {
    #[prost(message, repeated, tag = "2")]
    pub(super) lb_endpoints: Vec<LbEndpoint>,
}

/// `envoy.config.endpoint.v3.LbEndpoint`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LbEndpoint {
    #[prost(message, optional, tag = "1")]
    pub(super) endpoint: Option<Endpoint>,
    #[prost(enumeration = "HealthStatus", tag = "2")]
    pub(super) health_status: i32,
    #[prost(message, optional, tag = "3")]
    pub(super) metadata: Option<Metadata>,
    #[prost(message, optional, tag = "4")]
    pub(super) load_balancing_weight: Option<UInt32Value>,
}
