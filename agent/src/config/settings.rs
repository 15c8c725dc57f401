//! The finished settings, with their defaults.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use culvert_types::{Action, Datacenter, Encryption};

use super::ConfigError;
use super::apply::{Draft, check_node_name};

/// Where state is kept unless told otherwise.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/culvert";
/// Where run-time files are kept under `-dev`.
pub const DEFAULT_DEV_DATA_DIR: &str = "/run/culvert";
const DEFAULT_BPF_DIR: &str = "/sys/fs/bpf/culvert";
const DEFAULT_CGROUP: &str = "culvert";
const DEFAULT_HTTP_PORT: u16 = 8500;
const DEFAULT_GRPC_PORT: u16 = 8502;
const DEFAULT_SIDECAR_PORTS: RangeInclusive<u16> = 21000..=21255;
const DEFAULT_HTTP_CONNS: usize = 4096;
/// Above Consul's 200: every blocked read holds a connection, and all clients of an agent come from loopback.
const DEFAULT_HTTP_CONNS_PER_CLIENT: usize = 1024;

/// Everything the agent is told, checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// Server and agent in one process, loopback only, state in memory (`-dev`).
    pub dev: bool,
    /// Name of this node; default: the host's name up to its first character that a name cannot hold.
    pub node_name: String,
    /// What `${meta.…}` means in job files; also the node's `Meta` in the catalog. Default none.
    pub node_meta: BTreeMap<String, String>,
    /// Datacenter; default `dc1`.
    pub datacenter: Datacenter,
    /// Directory of all files; default [`DEFAULT_DATA_DIR`], with `-dev` [`DEFAULT_DEV_DATA_DIR`].
    pub data_dir: PathBuf,
    /// Where the HTTP API listens; port 0 asks for a free one. Default 127.0.0.1:8500.
    pub http: Vec<SocketAddr>,
    /// Where xDS listens for proxies of other processes; default none, with `-dev` 127.0.0.1:8502.
    pub grpc: Vec<SocketAddr>,
    /// Where other nodes reach this one; default: the bind address, or the source address of the default route.
    pub advertise: IpAddr,
    /// Least important level that is logged; default info.
    pub log_level: LogLevel,
    /// Ports for sidecars that name none; `None` turns the assignment off. Default 21000 to 21255.
    pub sidecar_ports: Option<RangeInclusive<u16>>,
    /// Settings of the certificate authority.
    pub ca: CaTimes,
    /// What holds without an intention; default deny, with `-dev` allow. Changed by a reload.
    pub default_policy: Action,
    /// Whether bytes that stay on the node are encrypted; default always. Changed by a reload.
    pub encryption: Encryption,
    /// The kernel programs.
    pub ebpf: EbpfSettings,
    /// Path of the cgroup that holds all workloads, below the root of cgroup2; default `culvert`.
    pub cgroup_parent: String,
    /// Limits of the HTTP API.
    pub limits: Limits,
}

/// Lives of certificates. Ranges and defaults are the certificate authority's; what is not given stays as it was set last.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CaTimes {
    /// Life of a leaf.
    pub leaf_ttl: Option<Duration>,
    /// Life of an intermediate.
    pub intermediate_ttl: Option<Duration>,
    /// Life of a root.
    pub root_ttl: Option<Duration>,
    /// Certificates signed per second; 0 for no limit.
    pub csr_max_per_second: Option<u32>,
}

/// Settings of the kernel programs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EbpfSettings {
    /// Use them, where the kernel can; default true.
    pub enabled: bool,
    /// Directory of pins; default `/sys/fs/bpf/culvert`.
    pub bpf_dir: PathBuf,
}

/// Limits of the HTTP API.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Connections in all; default 4096.
    pub http_max_conns: usize,
    /// Connections of one client address; default 1024.
    pub http_max_conns_per_client: usize,
}

/// Levels of the log.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// What helps to find a fault.
    Debug,
    /// What an operator wants to know.
    #[default]
    Info,
    /// What may become a fault.
    Warn,
    /// Faults.
    Error,
}

impl LogLevel {
    /// The word that `tracing` filters take.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

impl FromStr for LogLevel {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "trace" => Ok(Self::Trace),
            "debug" => Ok(Self::Debug),
            "info" => Ok(Self::Info),
            "warn" => Ok(Self::Warn),
            "err" | "error" => Ok(Self::Error),
            _ => Err(format!("unknown log level {text:?}: use trace, debug, info, warn or error")),
        }
    }
}

impl Settings {
    /// Names of settings that differ in `new` and that only a restart can change.
    #[must_use]
    pub fn fixed_changes(&self, new: &Self) -> Vec<&'static str> {
        [
            (self.dev != new.dev, "dev"),
            (self.node_name != new.node_name, "node_name"),
            (self.node_meta != new.node_meta, "node_meta"),
            (self.datacenter != new.datacenter, "datacenter"),
            (self.data_dir != new.data_dir, "data_dir"),
            (self.http != new.http, "client_addr, ports.http"),
            (self.grpc != new.grpc, "client_addr, ports.grpc"),
            (self.advertise != new.advertise, "advertise_addr"),
            (self.sidecar_ports != new.sidecar_ports, "ports.sidecar_min_port, ports.sidecar_max_port"),
            (self.ca != new.ca, "connect.ca_config"),
            (self.ebpf != new.ebpf, "ebpf"),
            (self.cgroup_parent != new.cgroup_parent, "cgroup_parent"),
            (self.limits != new.limits, "limits"),
            (self.log_level != new.log_level, "log_level"),
        ]
        .into_iter()
        .filter_map(|(differs, name)| differs.then_some(name))
        .collect()
    }
}

impl Draft {
    /// Fills in the defaults and checks what only holds together.
    pub(super) fn finish(self) -> Result<Settings, ConfigError> {
        let dev = self.dev;
        if !dev && self.server != Some(true) {
            return Err(ConfigError::Together(
                "culvert runs on one node yet: start the agent with -server (or server = true), or with -dev"
                    .to_owned(),
            ));
        }
        let client = self.client.clone().unwrap_or_else(|| vec![Ipv4Addr::LOCALHOST.into()]);
        let on = |port: u16| client.iter().map(|address| SocketAddr::new(*address, port)).collect::<Vec<_>>();
        let grpc_port = self.grpc_port.unwrap_or(dev.then_some(DEFAULT_GRPC_PORT));
        let default_dir = if dev { DEFAULT_DEV_DATA_DIR } else { DEFAULT_DATA_DIR };
        Ok(Settings {
            dev,
            advertise: self.advertise()?,
            sidecar_ports: self.sidecar_ports()?,
            http: on(self.http_port.unwrap_or(DEFAULT_HTTP_PORT)),
            grpc: grpc_port.map(on).unwrap_or_default(),
            node_name: self.node_name.map_or_else(host_name, Ok)?,
            node_meta: self.node_meta,
            datacenter: self.datacenter.unwrap_or_else(|| Datacenter::new("dc1").expect("a valid name")),
            data_dir: self.data_dir.unwrap_or_else(|| default_dir.into()),
            log_level: self.log_level.unwrap_or_default(),
            ca: CaTimes {
                leaf_ttl: self.leaf_ttl,
                intermediate_ttl: self.intermediate_ttl,
                root_ttl: self.root_ttl,
                csr_max_per_second: self.csr_max_per_second,
            },
            default_policy: self.default_policy.unwrap_or(if dev { Action::Allow } else { Action::Deny }),
            encryption: self.encryption.unwrap_or_default(),
            ebpf: EbpfSettings {
                enabled: self.ebpf.unwrap_or(true),
                bpf_dir: self.bpf_dir.unwrap_or_else(|| DEFAULT_BPF_DIR.into()),
            },
            cgroup_parent: self.cgroup_parent.unwrap_or_else(|| DEFAULT_CGROUP.to_owned()),
            limits: Limits {
                http_max_conns: self.http_conns.unwrap_or(DEFAULT_HTTP_CONNS),
                http_max_conns_per_client: self.http_conns_per_client.unwrap_or(DEFAULT_HTTP_CONNS_PER_CLIENT),
            },
        })
    }

    fn advertise(&self) -> Result<IpAddr, ConfigError> {
        let bind = self.bind.unwrap_or(match self.dev {
            true => Ipv4Addr::LOCALHOST.into(),
            false => Ipv4Addr::UNSPECIFIED.into(),
        });
        let address = match self.advertise {
            Some(address) => address,
            None if bind.is_unspecified() => outgoing_address(bind).ok_or_else(|| {
                ConfigError::Together(
                    "cannot tell which address to advertise: set advertise_addr or bind_addr".to_owned(),
                )
            })?,
            None => bind,
        };
        if address.is_unspecified() || address.is_multicast() {
            return Err(ConfigError::Together(format!("advertise_addr cannot be {address}")));
        }
        Ok(address)
    }

    fn sidecar_ports(&self) -> Result<Option<RangeInclusive<u16>>, ConfigError> {
        let min = self.sidecar_min.unwrap_or(*DEFAULT_SIDECAR_PORTS.start());
        let max = self.sidecar_max.unwrap_or(*DEFAULT_SIDECAR_PORTS.end());
        if min == 0 || max == 0 {
            return Ok(None);
        }
        if min > max {
            let message = format!("ports.sidecar_min_port {min} is greater than ports.sidecar_max_port {max}");
            return Err(ConfigError::Together(message));
        }
        Ok(Some(min..=max))
    }
}

/// The source address that the kernel would use towards the outside. Nothing is sent: a UDP socket is only connected.
fn outgoing_address(family: IpAddr) -> Option<IpAddr> {
    // Documentation addresses (RFC 5737, RFC 3849): any address beyond the default route does.
    let (local, far): (IpAddr, IpAddr) = match family {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into()),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()),
    };
    let socket = UdpSocket::bind((local, 0)).ok()?;
    socket.connect((far, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_unspecified())
}

fn host_name() -> Result<String, ConfigError> {
    let path = PathBuf::from("/proc/sys/kernel/hostname");
    let name = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path, source })?;
    let name = name.trim();
    check_node_name(name)
        .map_err(|message| ConfigError::Together(format!("the host's name: {message}; set node_name")))?;
    Ok(name.to_owned())
}
