//! What the agent tells the control plane, parsed and typed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use culvert_types::{Action, Datacenter, Encryption};

use crate::ca::{CaSettings, Clock, ConfigurationUpdate};
use crate::xds::XdsLimits;

/// Sidecar ports, as Consul's `ports.sidecar_min_port` and `sidecar_max_port`.
pub const SIDECAR_PORTS: RangeInclusive<u16> = 21000..=21255;

/// Everything that is fixed for the life of a [`crate::Control`].
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Name of this node: unique in the datacenter, no slash.
    pub node_name: String,
    /// UUID of this node.
    pub node_id: String,
    /// `Meta` of this node, beside what Consul's nodes always have.
    pub node_meta: BTreeMap<String, String>,
    /// The datacenter: part of every identity.
    pub datacenter: Datacenter,
    /// Directory of `state.redb`; `None` keeps the state in memory (`-dev`).
    pub data_dir: Option<PathBuf>,
    /// Where the HTTP API listens; port 0 picks a free one.
    pub http: Vec<SocketAddr>,
    /// Where the xDS server listens for proxies that dial it; `None`: only for those handed to [`crate::Control::serve_xds`].
    pub grpc: Option<SocketAddr>,
    /// Where other nodes and clients reach this one.
    pub advertise: IpAddr,
    /// What may be changed while running.
    pub settings: Reloadable,
    /// Ports for sidecars that name none; `None` turns the assignment off.
    pub sidecar_ports: Option<RangeInclusive<u16>>,
    /// Version that clients see: `X.Y.Z`, at least 1.8.0 for Nomad.
    pub version: &'static str,
    /// Indent every JSON answer, as an agent in `-dev` mode does.
    pub dev: bool,
    /// How a new certificate authority is made.
    pub ca: CaSettings,
    /// Settings of the authority that the operator gave: they hold for one that is there already, too.
    pub ca_given: ConfigurationUpdate,
    /// What the certificate authority takes for the time.
    pub clock: Clock,
    /// Limits of the HTTP API.
    pub limits: HttpLimits,
    /// Limits of the xDS server.
    pub xds_limits: XdsLimits,
    /// The agent's own endpoints (`/v1/culvert/…`, metrics, reload, leave), served beside those of the control plane.
    pub routes: Router,
}

/// What [`crate::Control::reload`] may change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reloadable {
    /// For pairs that no intention speaks about (`default_intention_policy`).
    pub default_policy: Action,
    /// For services that do not set it themselves.
    pub encryption: Encryption,
}

impl Default for Reloadable {
    fn default() -> Self {
        Self { default_policy: Action::Deny, encryption: Encryption::Always }
    }
}

/// Limits of the HTTP API. Each has a default that suits an agent on loopback.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HttpLimits {
    /// Connections in all; default 4096.
    pub max_connections: usize,
    /// Connections per client address (`limits.http_max_conns_per_client`); default 1024, because every blocked read holds
    /// one and all clients of an agent come from loopback.
    pub max_connections_per_client: usize,
    /// Longest request body, in bytes; default 1 MiB.
    pub max_body: usize,
    /// Time for the header of a request, and between requests of one connection; default 2 min.
    pub header_timeout: Duration,
    /// Time for a whole body; default 30 s.
    pub body_timeout: Duration,
    /// Time that open requests get at shutdown; default 5 s.
    pub drain_timeout: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_connections_per_client: 1024,
            max_body: 1 << 20,
            header_timeout: Duration::from_secs(120),
            body_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

impl ControlConfig {
    /// A node in memory, on loopback, with free ports: what `-dev` starts from.
    #[must_use]
    pub fn dev(node_name: &str, node_id: &str, datacenter: Datacenter) -> Self {
        Self {
            node_name: node_name.to_owned(),
            node_id: node_id.to_owned(),
            node_meta: BTreeMap::new(),
            datacenter,
            data_dir: None,
            http: vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)],
            grpc: Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)),
            advertise: Ipv4Addr::LOCALHOST.into(),
            settings: Reloadable { default_policy: Action::Allow, encryption: Encryption::Always },
            sidecar_ports: Some(SIDECAR_PORTS),
            version: CONSUL_VERSION,
            dev: true,
            ca: CaSettings::default(),
            ca_given: ConfigurationUpdate::default(),
            clock: Clock::system(),
            limits: HttpLimits::default(),
            xds_limits: XdsLimits::default(),
            routes: Router::new(),
        }
    }
}

/// The release of Consul whose API this one follows: clients decide by it what they may use.
pub const CONSUL_VERSION: &str = "1.21.4";
