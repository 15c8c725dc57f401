//! What an agent says of itself: `GET /v1/agent/self`, `/members`, `/version`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `Config` of `/v1/agent/self`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names, see consul.io/api-docs/agent")]
pub struct AgentConfig {
    pub datacenter: String,
    pub primary_datacenter: String,
    pub node_name: String,
    #[serde(rename = "NodeID")]
    pub node_id: String,
    pub revision: String,
    pub server: bool,
    pub version: String,
    pub build_date: String,
}

/// `xDS.Ports`; -1 where the port is off.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct XdsPorts {
    /// Port without TLS.
    pub plaintext: i32,
    /// Port with TLS.
    #[serde(rename = "TLS")]
    pub tls: i32,
}

/// `xDS` of `/v1/agent/self`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct XdsSelf {
    /// Versions of each proxy, newest first.
    pub supported_proxies: std::collections::BTreeMap<String, Vec<String>>,
    /// Port of the xDS server.
    pub port: i32,
    /// The same by kind.
    pub ports: XdsPorts,
}

/// `/v1/agent/self`: an object of objects.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AgentSelf {
    /// What Nomad's fingerprint reads.
    pub config: AgentConfig,
    /// Everything else that clients look up.
    pub debug_config: Map<String, Value>,
    /// Always null: no network coordinates.
    pub coord: Option<Map<String, Value>>,
    /// This agent as a member.
    pub member: Member,
    /// Objects of texts.
    pub stats: Map<String, Value>,
    /// Node meta.
    pub meta: Map<String, Value>,
    /// Left out when gRPC is off.
    #[serde(rename = "xDS", skip_serializing_if = "Option::is_none")]
    pub xds: Option<XdsSelf>,
}

/// A member of the cluster.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names; Status: 1 alive, 2 leaving, 3 left, 4 failed")]
pub struct Member {
    pub name: String,
    pub addr: String,
    pub port: u16,
    pub tags: Map<String, Value>,
    pub status: u8,
    pub protocol_min: u8,
    pub protocol_max: u8,
    pub protocol_cur: u8,
    pub delegate_min: u8,
    pub delegate_max: u8,
    pub delegate_cur: u8,
}

/// `/v1/agent/version`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase", default)]
#[expect(missing_docs, reason = "Consul's names")]
pub struct VersionInfo {
    #[serde(rename = "SHA")]
    pub sha: String,
    pub build_date: String,
    pub human_version: String,
    #[serde(rename = "FIPS")]
    pub fips: String,
}
