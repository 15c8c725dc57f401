//! Services: what is registered and what is answered.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::check::CheckDefinition;
use crate::decode::{DecodeError, decode};
use crate::proxy::{Connect, Proxy};
use crate::value::{Secret, is_default};

/// An address with a port, as in `TaggedAddresses`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ServiceAddress {
    /// Host or IP address.
    pub address: String,
    /// Port; 0 means the service's own.
    pub port: u16,
}

/// Weights for DNS and balancing.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Weights {
    /// While passing; 0 when only the other one is given.
    #[serde(default)]
    pub passing: i64,
    /// While warning; 0 when only the other one is given.
    #[serde(default)]
    pub warning: i64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { passing: 1, warning: 1 }
    }
}

/// Body of `PUT /v1/agent/service/register`; nested as `Connect.SidecarService`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/api-docs/agent/service")]
pub struct ServiceRegistration {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(rename = "ID", skip_serializing_if = "String::is_empty")]
    pub id: String,
    pub name: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "is_default")]
    pub port: u16,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub address: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tagged_addresses: BTreeMap<String, ServiceAddress>,
    #[serde(skip_serializing_if = "is_default")]
    pub enable_tag_override: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<CheckDefinition>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<CheckDefinition>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<Proxy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect: Option<Connect>,
    #[serde(skip_serializing_if = "is_default")]
    pub token: Secret,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locality: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub partition: String,
}

impl ServiceRegistration {
    /// Reads a request body.
    ///
    /// # Errors
    /// [`DecodeError`] naming the key or the place.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        decode(body)
    }
}

/// A service as the agent answers it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/api-docs/agent/service")]
pub struct AgentService {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(rename = "ID")]
    pub id: String,
    pub service: String,
    pub tags: Vec<String>,
    pub meta: BTreeMap<String, String>,
    pub port: u16,
    pub address: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tagged_addresses: BTreeMap<String, ServiceAddress>,
    pub weights: Weights,
    pub enable_tag_override: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub create_index: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub modify_index: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub content_hash: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<Proxy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect: Option<Connect>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub peer_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub datacenter: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locality: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_as_nomad_sends_it_is_read() {
        let body = br#"{"ID":"_nomad-task-1-group-api-count-api-9001","Name":"count-api","Port":9001,"Meta":{"external-source":"nomad"},
            "Check":null,"Checks":null,"Connect":{"SidecarService":{"Port":26196,"Address":"192.0.2.2","Check":null,"Checks":[
            {"Name":"Connect Sidecar Listening","Interval":"10s","TCP":"192.0.2.2:26196"}],
            "Proxy":{"Config":{"bind_address":"0.0.0.0","bind_port":26196},"MeshGateway":{},"Expose":{},
            "Upstreams":[{"DestinationName":"x","LocalBindPort":8080,"MeshGateway":{}}]}}}}"#;
        let registration = ServiceRegistration::decode(body).expect("decode");
        let sidecar = registration.connect.and_then(|connect| connect.sidecar_service).expect("sidecar");
        assert_eq!((sidecar.port, sidecar.checks[0].tcp.as_str()), (26196, "192.0.2.2:26196"));
        let proxy = sidecar.proxy.expect("proxy");
        assert_eq!(proxy.config["bind_port"], 26196);
        assert_eq!(proxy.upstreams[0].local_bind_port, 8080);
    }

    #[test]
    fn keys_are_read_in_any_case_and_with_underscores_and_unknown_ones_refused() {
        let body =
            br#"{"name":"web","tagged_addresses":{"lan":{"address":"10.0.0.1","port":1}},"ENABLETAGOVERRIDE":true}"#;
        let registration = ServiceRegistration::decode(body).expect("decode");
        assert!(registration.enable_tag_override && registration.tagged_addresses["lan"].port == 1);
        let error = ServiceRegistration::decode(br#"{"Name":"web","Colour":1}"#).expect_err("unknown");
        assert_eq!(error.to_string(), "json: unknown field \"Colour\"");
    }
}
