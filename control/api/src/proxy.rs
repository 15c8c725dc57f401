//! The proxy part of a registration.

use culvert_types::Encryption;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::Unsupported;
use crate::service::ServiceRegistration;
use crate::value::is_default;

/// `Connect` of a registration.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Connect {
    /// The application speaks mutual TLS itself.
    #[serde(skip_serializing_if = "is_default")]
    pub native: bool,
    /// The sidecar to register along with the service. Never answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sidecar_service: Option<Box<ServiceRegistration>>,
}

/// `MeshGateway`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct MeshGateway {
    /// Empty, `none`, `local` or `remote`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mode: String,
}

/// `Expose`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Expose {
    /// Expose all HTTP and gRPC checks.
    #[serde(skip_serializing_if = "is_default")]
    pub checks: bool,
    /// Expose these paths.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<ExposePath>,
}

/// One exposed path.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names")]
pub struct ExposePath {
    pub listener_port: u16,
    pub path: String,
    pub local_path_port: u16,
    pub protocol: String,
    pub parsed_from_check: bool,
}

/// `TransparentProxy`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names")]
pub struct TransparentProxy {
    #[serde(skip_serializing_if = "is_default")]
    pub outbound_listener_port: u16,
    #[serde(skip_serializing_if = "is_default")]
    pub dialed_directly: bool,
}

/// `Proxy` of a proxy's registration and of the agent's answer.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/docs/connect/registration/service-registration")]
pub struct Proxy {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination_service_name: String,
    #[serde(rename = "DestinationServiceID", skip_serializing_if = "String::is_empty")]
    pub destination_service_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub local_service_address: String,
    #[serde(skip_serializing_if = "is_default")]
    pub local_service_port: u16,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub local_service_socket_path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mode: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transparent_proxy: Option<TransparentProxy>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub config: Map<String, Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub upstreams: Vec<Upstream>,
    pub mesh_gateway: MeshGateway,
    pub expose: Expose,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_logs: Option<Map<String, Value>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub envoy_extensions: Vec<Value>,
    #[serde(rename = "MutualTLSMode", skip_serializing_if = "String::is_empty")]
    pub mutual_tls_mode: String,
}

/// One upstream.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/docs/connect/registration/service-registration")]
pub struct Upstream {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination_type: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination_namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination_partition: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination_peer: String,
    pub destination_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub datacenter: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub local_bind_address: String,
    #[serde(skip_serializing_if = "is_default")]
    pub local_bind_port: u16,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub local_bind_socket_path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub local_bind_socket_mode: String,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub config: Map<String, Value>,
    pub mesh_gateway: MeshGateway,
    #[serde(skip_serializing_if = "is_default")]
    pub centrally_configured: bool,
}

/// A key of `Proxy.Config` whose value has no meaning.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("Proxy.Config.{key}: {reason}")]
pub struct ProxyConfigError {
    /// The key.
    pub key: &'static str,
    /// What is wrong with its value.
    pub reason: String,
}

impl Proxy {
    /// `Config.encryption`, if set.
    ///
    /// # Errors
    /// [`ProxyConfigError`] when it is not one of the two words.
    pub fn encryption(&self) -> Result<Option<Encryption>, ProxyConfigError> {
        let refused = |reason: String| ProxyConfigError { key: "encryption", reason };
        match self.config.get("encryption") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => text.parse().map(Some).map_err(|error| refused(format!("{error}"))),
            Some(other) => Err(refused(format!("must be a text, got {other}"))),
        }
    }

    /// What Consul knows and culvert does not honour yet.
    ///
    /// # Errors
    /// [`Unsupported`] with the paths.
    pub fn check_supported(&self) -> Result<(), Unsupported> {
        let mut fields = Vec::new();
        let mut refuse = |wrong: bool, field: String| fields.extend(wrong.then_some(field));
        refuse(!self.local_service_socket_path.is_empty(), "Proxy.LocalServiceSocketPath".to_owned());
        refuse(!matches!(self.mode.as_str(), "" | "direct"), format!("Proxy.Mode {:?}", self.mode));
        refuse(self.expose != Expose::default(), "Proxy.Expose".to_owned());
        refuse(!matches!(self.mesh_gateway.mode.as_str(), "" | "none"), "Proxy.MeshGateway.Mode".to_owned());
        refuse(!self.envoy_extensions.is_empty(), "Proxy.EnvoyExtensions".to_owned());
        refuse(!matches!(self.mutual_tls_mode.as_str(), "" | "strict"), "Proxy.MutualTLSMode".to_owned());
        refuse(self.access_logs.as_ref().is_some_and(|logs| !logs.is_empty()), "Proxy.AccessLogs".to_owned());
        for (index, upstream) in self.upstreams.iter().enumerate() {
            let at = |field: &str| format!("Proxy.Upstreams[{index}].{field}");
            refuse(!matches!(upstream.destination_type.as_str(), "" | "service"), at("DestinationType"));
            refuse(!upstream.destination_peer.is_empty(), at("DestinationPeer"));
            refuse(!matches!(upstream.destination_namespace.as_str(), "" | "default"), at("DestinationNamespace"));
            refuse(!matches!(upstream.destination_partition.as_str(), "" | "default"), at("DestinationPartition"));
            refuse(!upstream.local_bind_socket_path.is_empty(), at("LocalBindSocketPath"));
            refuse(!matches!(upstream.mesh_gateway.mode.as_str(), "" | "none"), at("MeshGateway.Mode"));
        }
        Unsupported::unless_empty(fields)
    }
}
