//! The stored forms: what the JSON of each table's rows says.
//!
//! Kept apart from the wire forms (`culvert-api`) and from the vocabulary (`culvert-types`), so that each may change on
//! its own. Adding a field needs `#[serde(default)]`; anything else needs a new store layout.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use culvert_types::{Encryption, HealthStatus, Intention, IntentionSubject, ServiceName};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::text;

/// Key in `TaggedAddresses` under which the job runner tells where a sidecar listens inside the node (the workload's
/// address on the bridge), for workers of the same node. Port 0 stands for the sidecar's own port.
pub const WORKLOAD_ADDRESS: &str = "culvert-workload";

/// A node: key is its name.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Node {
    /// Unique name.
    pub name: String,
    /// UUID.
    pub id: String,
    /// Where its services are reached when they give no address.
    pub address: IpAddr,
    /// Free pairs.
    #[serde(default)]
    pub meta: BTreeMap<String, String>,
}

/// Is the instance an application or the proxy of one?
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceKind {
    /// An application.
    #[default]
    Typical,
    /// A sidecar.
    ConnectProxy,
}

/// A service instance: key is `<node>/<id>`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Service {
    /// The node that registered it.
    pub node: String,
    /// Unique on the node.
    pub id: String,
    /// What clients ask for.
    pub name: String,
    /// Application or sidecar.
    #[serde(default)]
    pub kind: ServiceKind,
    /// Labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Free pairs.
    #[serde(default)]
    pub meta: BTreeMap<String, String>,
    /// As registered; empty for "the node's".
    #[serde(default)]
    pub address: String,
    /// 0 for none.
    #[serde(default)]
    pub port: u16,
    /// Addresses by role (`lan_ipv4`, `wan`, [`WORKLOAD_ADDRESS`] …).
    #[serde(default)]
    pub tagged_addresses: BTreeMap<String, TaggedAddress>,
    /// Share of traffic by health.
    #[serde(default)]
    pub weights: Weights,
    /// Kept and echoed; there is no anti-entropy here that could override tags.
    #[serde(default)]
    pub enable_tag_override: bool,
    /// The application terminates mutual TLS itself.
    #[serde(default)]
    pub connect_native: bool,
    /// Of a sidecar.
    #[serde(default)]
    pub proxy: Option<Proxy>,
    /// Of an application: the sidecar that its registration declared, and which leaves with it.
    #[serde(default)]
    pub declared_sidecar: Option<String>,
}

/// An address with a role.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TaggedAddress {
    /// Host.
    pub address: String,
    /// Port.
    pub port: u16,
}

/// Share of traffic by health.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Weights {
    /// While passing, at least 1.
    pub passing: u16,
    /// While warning.
    pub warning: u16,
}

impl Default for Weights {
    fn default() -> Self {
        Self { passing: 1, warning: 1 }
    }
}

/// What makes a service instance a sidecar.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Proxy {
    /// Whom it represents: the identity of its certificate.
    pub destination_service_name: ServiceNameText,
    /// Which instance; empty if none was named.
    #[serde(default)]
    pub destination_service_id: String,
    /// Where the application listens, inside the workload.
    #[serde(default)]
    pub local_service_address: String,
    /// Its port; 0 for none.
    #[serde(default)]
    pub local_service_port: u16,
    /// As sent; the keys that have a meaning are in [`ProxySettings`].
    #[serde(default)]
    pub config: Map<String, Value>,
    /// What [`Proxy::config`] says, validated.
    #[serde(default)]
    pub settings: ProxySettings,
    /// Whom the application calls.
    #[serde(default)]
    pub upstreams: Vec<Upstream>,
    /// As sent (``, `direct`).
    #[serde(default)]
    pub mode: String,
    /// As sent (``, `none`).
    #[serde(default)]
    pub mesh_gateway: String,
    /// As sent (``, `strict`).
    #[serde(default)]
    pub mutual_tls_mode: String,
}

/// A service name in a row: text that was a valid [`ServiceName`] when it was written.
pub type ServiceNameText = String;

/// The settings that culvert honours in `Proxy.Config`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct ProxySettings {
    /// `encryption`; `None`: the mesh's.
    #[serde(default, with = "text::option")]
    pub encryption: Option<Encryption>,
    /// `bind_address` of the inbound listener; `None`: the sidecar's address.
    #[serde(default)]
    pub bind_address: Option<IpAddr>,
    /// `bind_port`; `None`: the sidecar's port.
    #[serde(default)]
    pub bind_port: Option<u16>,
    /// `local_connect_timeout_ms`: connecting to the application.
    #[serde(default)]
    pub local_connect_timeout: Option<Duration>,
    /// `connect_timeout_ms`, for upstreams that set none themselves.
    #[serde(default)]
    pub connect_timeout: Option<Duration>,
    /// `max_inbound_connections`.
    #[serde(default)]
    pub max_inbound_connections: Option<u32>,
}

/// A service that a sidecar makes reachable on a local address.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Upstream {
    /// The service.
    pub destination_name: ServiceNameText,
    /// As sent (``, `service`).
    #[serde(default)]
    pub destination_type: String,
    /// As sent (``, `default`).
    #[serde(default)]
    pub destination_namespace: String,
    /// As sent (``, `default`).
    #[serde(default)]
    pub destination_partition: String,
    /// As sent (``, `none`).
    #[serde(default)]
    pub mesh_gateway: String,
    /// As sent.
    #[serde(default)]
    pub datacenter: String,
    /// As sent; empty: 127.0.0.1.
    #[serde(default)]
    pub local_bind_address: String,
    /// Where the application connects to.
    pub local_bind_port: u16,
    /// As sent.
    #[serde(default)]
    pub config: Map<String, Value>,
    /// `connect_timeout_ms` of [`Upstream::config`]; `None`: the default.
    #[serde(default)]
    pub connect_timeout: Option<Duration>,
    /// `limits.max_connections` of [`Upstream::config`].
    #[serde(default)]
    pub max_connections: Option<u32>,
}

impl Upstream {
    /// Where the sidecar listens for the application; `None` if the stored address is not one (never registered so).
    #[must_use]
    pub fn bind(&self) -> Option<SocketAddr> {
        let text = if self.local_bind_address.is_empty() { "127.0.0.1" } else { &self.local_bind_address };
        Some(SocketAddr::new(text.parse().ok()?, self.local_bind_port))
    }

    /// The service, as a name.
    #[must_use]
    pub fn destination(&self) -> Option<ServiceName> {
        ServiceName::new(&self.destination_name).ok()
    }
}

impl Proxy {
    /// The identity of the proxy, as a name.
    #[must_use]
    pub fn destination(&self) -> Option<ServiceName> {
        ServiceName::new(&self.destination_service_name).ok()
    }
}

impl Service {
    /// The port on which a sidecar's inbound listener is bound inside the workload: `bind_port`, else its port.
    #[must_use]
    pub fn listener_port(&self) -> u16 {
        self.proxy.as_ref().and_then(|proxy| proxy.settings.bind_port).unwrap_or(self.port)
    }

    /// Where workers of the same node reach a sidecar, if the job runner said so ([`WORKLOAD_ADDRESS`]).
    #[must_use]
    pub fn workload_address(&self) -> Option<SocketAddr> {
        let TaggedAddress { address, port } = self.tagged_addresses.get(WORKLOAD_ADDRESS)?;
        let port = if *port == 0 { self.listener_port() } else { *port };
        Some(SocketAddr::new(address.parse().ok()?, port))
    }
}

/// A health check: key is `<node>/<id>`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Check {
    /// The node it runs on.
    pub node: String,
    /// Unique on the node.
    pub id: String,
    /// For people.
    pub name: String,
    /// For people.
    #[serde(default)]
    pub notes: String,
    /// The instance it is about; empty for the whole node.
    #[serde(default)]
    pub service_id: String,
    /// Name of that instance.
    #[serde(default)]
    pub service_name: String,
    /// Its tags.
    #[serde(default)]
    pub service_tags: Vec<String>,
    /// Current verdict.
    #[serde(with = "text")]
    pub status: HealthStatus,
    /// What the last run said.
    #[serde(default)]
    pub output: String,
    /// How it is run.
    pub definition: CheckDefinition,
}

/// What a check does and when its verdict changes.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct CheckDefinition {
    /// What is run.
    pub probe: Probe,
    /// Time between runs; zero where nothing is run.
    #[serde(default)]
    pub interval: Duration,
    /// Longest run.
    #[serde(default)]
    pub timeout: Duration,
    /// Successes in a row that make it pass; 0 and 1 mean the first.
    #[serde(default)]
    pub success_before_passing: u32,
    /// Failures in a row that make it warn; 0: it does not warn first.
    #[serde(default)]
    pub failures_before_warning: u32,
    /// Failures in a row that make it critical; 0 and 1 mean the first.
    #[serde(default)]
    pub failures_before_critical: u32,
    /// Longest stored output, in bytes.
    pub output_max_size: usize,
    /// Time in critical after which the service is deregistered; zero for never.
    #[serde(default)]
    pub deregister_critical_service_after: Duration,
}

/// What a check runs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// Nothing: set by the agent itself (`serfHealth`, maintenance).
    Fixed,
    /// Nothing: clients report, and silence longer than this turns it critical.
    Ttl(Duration),
    /// Connects.
    Tcp {
        /// `host:port`.
        address: String,
    },
    /// Asks.
    Http {
        /// `http://…`.
        url: String,
        /// `GET` unless said otherwise.
        method: String,
        /// Extra header fields, as sent.
        #[serde(default)]
        header: BTreeMap<String, Vec<String>>,
        /// Sent with the request.
        #[serde(default)]
        body: String,
        /// Takes a redirect as the answer.
        #[serde(default)]
        disable_redirects: bool,
    },
    /// Follows another instance of this node, and the node itself.
    Alias {
        /// Its ID; empty: the node only.
        service: String,
    },
}

impl Probe {
    /// Consul's word for it in `Type`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Fixed => "",
            Self::Ttl(_) => "ttl",
            Self::Tcp { .. } => "tcp",
            Self::Http { .. } => "http",
            Self::Alias { .. } => "alias",
        }
    }
}

/// An intention with what the API keeps beside the rule: key is `<destination>/<source>`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IntentionEntry {
    /// The rule.
    pub rule: Intention,
    /// UUID, of intentions made through the old `POST` endpoint.
    pub id: Option<String>,
    /// For people.
    pub description: String,
    /// Free pairs.
    pub meta: BTreeMap<String, String>,
    /// First write.
    pub created_at: SystemTime,
    /// Last write.
    pub updated_at: SystemTime,
}

/// [`IntentionEntry`] as JSON.
#[derive(Deserialize, Serialize)]
struct IntentionJson {
    source: String,
    destination: String,
    action: String,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    description: String,
    #[serde(default)]
    meta: BTreeMap<String, String>,
    created_at: SystemTime,
    updated_at: SystemTime,
}

impl Serialize for IntentionEntry {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        IntentionJson {
            source: self.rule.source.to_string(),
            destination: self.rule.destination.to_string(),
            action: self.rule.action.to_string(),
            id: self.id.clone(),
            description: self.description.clone(),
            meta: self.meta.clone(),
            created_at: self.created_at,
            updated_at: self.updated_at,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for IntentionEntry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let json = IntentionJson::deserialize(deserializer)?;
        let rule = Intention {
            source: IntentionSubject::from_stored(&json.source).map_err(D::Error::custom)?,
            destination: IntentionSubject::from_stored(&json.destination).map_err(D::Error::custom)?,
            action: json.action.parse().map_err(D::Error::custom)?,
        };
        let IntentionJson { id, description, meta, created_at, updated_at, .. } = json;
        Ok(Self { rule, id, description, meta, created_at, updated_at })
    }
}
