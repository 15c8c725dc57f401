//! The agent's settings: defaults, then files in lexical order, then flags.
//!
//! Files are HCL or JSON with Consul's keys. A key that nobody knows is refused, and so is one that Consul knows and culvert does not
//! honour yet: by name, with its place. Nothing is read from the environment.

mod file;

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use culvert_types::{Action, Datacenter, Encryption};

pub use file::{ConfigError, Setting};

/// Everything the agent can be told.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentSettings {
    /// `-dev`: state in memory, loopback only, workloads removed when the agent ends.
    pub dev: bool,
    /// `server`: this agent holds the state.
    pub server: bool,
    /// `node_name`; default: the host's name.
    pub node_name: Option<String>,
    /// `datacenter`, default `dc1`.
    pub datacenter: Datacenter,
    /// `data_dir`, default `/var/lib/culvert`, with `-dev` `/run/culvert`.
    pub data_dir: Option<PathBuf>,
    /// `client_addr`: where the HTTP API and xDS listen, default 127.0.0.1.
    pub client_addr: IpAddr,
    /// `advertise_addr` or `bind_addr`: where other nodes reach this one, default 127.0.0.1 with `-dev`.
    pub advertise: Option<IpAddr>,
    /// `ports.http`, default 8500.
    pub http_port: u16,
    /// `ports.grpc`, default 8502; `None` turns it off.
    pub grpc_port: Option<u16>,
    /// `ports.sidecar_min_port` to `ports.sidecar_max_port`, default 21000-21255; `None`: no assignment.
    pub sidecar_ports: Option<RangeInclusive<u16>>,
    /// `log_level`, default info (`-dev`: debug as in Consul would hide what matters here; info as well).
    pub log_level: String,
    /// `default_intention_policy`; default deny, with `-dev` allow.
    pub default_policy: Option<Action>,
    /// `encryption`, default always.
    pub encryption: Encryption,
    /// `ebpf.enabled`, `-no-ebpf`; default on, where the kernel can.
    pub ebpf: bool,
    /// `ebpf.bpf_dir`, default `/sys/fs/bpf/culvert`.
    pub bpf_dir: PathBuf,
    /// `cgroup_parent`, default `culvert`.
    pub cgroup_parent: String,
    /// `connect.ca_config.leaf_cert_ttl`, default 72h.
    pub leaf_ttl: Duration,
}

impl Default for AgentSettings {
    fn default() -> Self {
        Self {
            dev: false,
            server: false,
            node_name: None,
            datacenter: Datacenter::new("dc1").expect("a valid name"),
            data_dir: None,
            client_addr: Ipv4Addr::LOCALHOST.into(),
            advertise: None,
            http_port: 8500,
            grpc_port: Some(8502),
            sidecar_ports: Some(21000..=21255),
            log_level: "info".to_owned(),
            default_policy: None,
            encryption: Encryption::Always,
            ebpf: true,
            bpf_dir: PathBuf::from("/sys/fs/bpf/culvert"),
            cgroup_parent: "culvert".to_owned(),
            leaf_ttl: Duration::from_secs(72 * 3600),
        }
    }
}

impl AgentSettings {
    /// Where the agent keeps its state.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        let default = if self.dev { "/run/culvert" } else { "/var/lib/culvert" };
        self.data_dir.clone().unwrap_or_else(|| PathBuf::from(default))
    }

    /// What holds for pairs that no intention speaks about.
    #[must_use]
    pub fn default_policy(&self) -> Action {
        self.default_policy.unwrap_or(if self.dev { Action::Allow } else { Action::Deny })
    }

    /// Reads files on top of `self`: each of `files`, then each folder's `.hcl` and `.json` in lexical order.
    ///
    /// # Errors
    /// [`ConfigError`] with file, line and column.
    pub fn read(mut self, files: &[PathBuf], folders: &[PathBuf], fragments: &[String]) -> Result<Self, ConfigError> {
        for path in files {
            self.read_file(path)?;
        }
        for folder in folders {
            for path in file::in_folder(folder)? {
                self.read_file(&path)?;
            }
        }
        for fragment in fragments {
            for setting in file::parse(fragment, Path::new("-hcl"), false)? {
                self.set(&setting)?;
            }
        }
        Ok(self)
    }

    fn read_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = file::load(path)?;
        let json = path.extension().is_some_and(|extension| extension == "json");
        for setting in file::parse(&text, path, json)? {
            self.set(&setting)?;
        }
        Ok(())
    }

    fn set(&mut self, setting: &Setting) -> Result<(), ConfigError> {
        match setting.path.as_str() {
            "server" => self.server = setting.boolean()?,
            "node_name" => self.node_name = Some(setting.text()?.to_owned()),
            "datacenter" => self.datacenter = setting.parsed()?,
            "data_dir" => self.data_dir = Some(setting.text()?.into()),
            "client_addr" => self.client_addr = setting.parsed()?,
            "advertise_addr" => self.advertise = Some(setting.parsed()?),
            "bind_addr" => {
                let address: IpAddr = setting.parsed()?;
                if !address.is_unspecified() && self.advertise.is_none() {
                    self.advertise = Some(address);
                }
            }
            "ports.http" => self.http_port = setting.port()?.ok_or_else(|| setting.refuse("cannot be turned off"))?,
            "ports.grpc" => self.grpc_port = setting.port()?,
            "ports.sidecar_min_port" => self.sidecar_ports = sidecar_range(setting.port()?, self.sidecar_max()),
            "ports.sidecar_max_port" => self.sidecar_ports = sidecar_range(self.sidecar_min(), setting.port()?),
            "log_level" => self.log_level = setting.text()?.to_lowercase(),
            "default_intention_policy" => self.default_policy = Some(setting.parsed()?),
            "encryption" => self.encryption = setting.parsed()?,
            "ebpf.enabled" => self.ebpf = setting.boolean()?,
            "ebpf.bpf_dir" => self.bpf_dir = setting.text()?.into(),
            "cgroup_parent" => self.cgroup_parent = setting.text()?.to_owned(),
            "connect.enabled" if setting.boolean()? => {}
            "connect.ca_config.leaf_cert_ttl" => {
                self.leaf_ttl =
                    culvert_types::parse_go_duration(setting.text()?).map_err(|error| setting.refuse(error))?;
            }
            _ => return Err(file::unknown(setting)),
        }
        Ok(())
    }

    fn sidecar_min(&self) -> Option<u16> {
        self.sidecar_ports.as_ref().map(|range| *range.start())
    }

    fn sidecar_max(&self) -> Option<u16> {
        self.sidecar_ports.as_ref().map(|range| *range.end())
    }
}

/// 0 at either end turns the assignment off, as in Consul.
fn sidecar_range(min: Option<u16>, max: Option<u16>) -> Option<RangeInclusive<u16>> {
    Some(min?..=max?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<AgentSettings, ConfigError> {
        AgentSettings::default().read(&[], &[], &[text.to_owned()])
    }

    #[test]
    fn blocks_and_objects_mean_the_same() {
        for text in [
            "ports { grpc = 8600 }\nencryption = \"between-nodes\"",
            "ports = { grpc = 8600 }\nencryption = \"between-nodes\"",
        ] {
            let settings = read(text).expect(text);
            assert_eq!((settings.grpc_port, settings.encryption), (Some(8600), Encryption::BetweenNodes));
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_their_place() {
        let error = read("server = true\n  colour = 1\n").expect_err("unknown").to_string();
        assert_eq!(error, "-hcl:2:3: invalid config key colour");
    }

    #[test]
    fn keys_of_consul_that_are_not_honoured_are_refused_by_name() {
        let error = read("acl { enabled = true }").expect_err("refused").to_string();
        assert!(error.contains("acl.enabled is not supported by culvert yet"), "{error}");
    }

    #[test]
    fn wrong_values_say_what_is_expected() {
        let error = read("encryption = \"sometimes\"").expect_err("refused").to_string();
        assert!(error.starts_with("-hcl:1:1: encryption: ") && error.contains("between-nodes"), "{error}");
    }
}
