//! `connect`: how a service takes part in the mesh.

use crate::Template;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The `connect` block. Only the sidecar form exists; `native` and `gateway` are refused by name.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Connect {
    /// The `sidecar_service` block.
    pub sidecar: SidecarService,
}

/// `sidecar_service {}`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct SidecarService {
    /// `tags`; `None`: the service's.
    pub tags: Option<Vec<Template>>,
    /// `meta`; empty: the service's.
    pub meta: BTreeMap<String, Template>,
    /// `proxy`.
    pub proxy: Proxy,
}

/// `proxy {}` of a sidecar.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Proxy {
    /// `local_service_address`; `None`: 127.0.0.1.
    pub local_service_address: Option<IpAddr>,
    /// `local_service_port`; `None`: the service's port inside the namespace.
    pub local_service_port: Option<u16>,
    /// `upstreams`; binds are unique within the group.
    pub upstreams: Vec<Upstream>,
    /// `config`: goes to Consul's `Proxy.Config`. Keys: `encryption`, `protocol`, `local_connect_timeout_ms`,
    /// `max_inbound_connections`.
    pub config: Map<String, Value>,
}

/// `upstreams {}`: a service that becomes reachable on a local address.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Upstream {
    /// `destination_name`.
    pub destination_name: String,
    /// `local_bind_address`, 127.0.0.1 unless set; a loopback address.
    pub local_bind_address: IpAddr,
    /// `local_bind_port`.
    pub local_bind_port: u16,
    /// `config` of the upstream. Keys: `connect_timeout_ms`, `limits { max_connections }`, `protocol`.
    pub config: Map<String, Value>,
}
