//! The certificate authority on the wire, and authorization.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::value::{Secret, Timestamp};

/// `/v1/connect/ca/roots` and `/v1/agent/connect/ca/roots`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CaRoots {
    /// ID of the root that signs.
    #[serde(rename = "ActiveRootID")]
    pub active_root_id: String,
    /// `<uuid>.consul`.
    pub trust_domain: String,
    /// All trusted roots.
    pub roots: Vec<CaRoot>,
}

/// One root.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/api-docs/connect/ca")]
pub struct CaRoot {
    #[serde(rename = "ID")]
    pub id: String,
    pub name: String,
    pub serial_number: u64,
    #[serde(rename = "SigningKeyID")]
    pub signing_key_id: String,
    pub external_trust_domain: String,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    pub root_cert: String,
    pub intermediate_certs: Option<Vec<String>>,
    pub active: bool,
    pub private_key_type: String,
    pub private_key_bits: u32,
    pub create_index: u64,
    pub modify_index: u64,
}

/// `/v1/agent/connect/ca/leaf/:service`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/api-docs/agent/connect")]
pub struct LeafCert {
    pub serial_number: String,
    #[serde(rename = "CertPEM")]
    pub cert_pem: String,
    #[serde(rename = "PrivateKeyPEM")]
    pub private_key_pem: Secret,
    pub service: String,
    #[serde(rename = "ServiceURI")]
    pub service_uri: String,
    pub valid_after: Timestamp,
    pub valid_before: Timestamp,
    pub create_index: u64,
    pub modify_index: u64,
}

/// `/v1/connect/ca/configuration`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/api-docs/connect/ca")]
pub struct CaConfiguration {
    pub provider: String,
    pub config: Map<String, Value>,
    pub state: Option<Map<String, Value>>,
    pub force_without_cross_signing: bool,
    pub create_index: u64,
    pub modify_index: u64,
}

/// Body of `POST /v1/agent/connect/authorize`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names")]
pub struct AuthorizeRequest {
    pub target: String,
    #[serde(rename = "ClientCertURI")]
    pub client_cert_uri: String,
    pub client_cert_serial: String,
    pub namespace: String,
}

/// Its answer.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AuthorizeResponse {
    /// May it?
    pub authorized: bool,
    /// Which rule says so.
    pub reason: String,
}
