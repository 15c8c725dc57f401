//! One key at a time: what each means, and what its value must look like. Flags go the same way as files.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use culvert_types::{Action, Datacenter, Encryption, parse_go_duration};

use super::keys::{BLOCKS, UNSUPPORTED};
use super::settings::LogLevel;
use super::text::{self, Entry, Node, Place, Value};
use super::{ConfigError, Origin};
use crate::cli::AgentArgs;

/// Longest node name; it is a label of DNS names.
const MAX_NODE_NAME: usize = 63;

/// Pairs of `node_meta`; bytes of a key and of a value (Consul's).
const MAX_META: usize = 64;
const MAX_META_KEY: usize = 128;
const MAX_META_VALUE: usize = 512;

/// What was said so far; `None` where nothing was.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) dev: bool,
    pub(super) server: Option<bool>,
    pub(super) datacenter: Option<Datacenter>,
    pub(super) node_name: Option<String>,
    pub(super) node_meta: BTreeMap<String, String>,
    pub(super) data_dir: Option<PathBuf>,
    pub(super) bind: Option<IpAddr>,
    pub(super) client: Option<Vec<IpAddr>>,
    pub(super) advertise: Option<IpAddr>,
    pub(super) log_level: Option<LogLevel>,
    pub(super) http_port: Option<u16>,
    /// `Some(None)`: turned off.
    pub(super) grpc_port: Option<Option<u16>>,
    pub(super) sidecar_min: Option<u16>,
    pub(super) sidecar_max: Option<u16>,
    pub(super) leaf_ttl: Option<Duration>,
    pub(super) intermediate_ttl: Option<Duration>,
    pub(super) root_ttl: Option<Duration>,
    pub(super) csr_max_per_second: Option<u32>,
    pub(super) default_policy: Option<Action>,
    pub(super) encryption: Option<Encryption>,
    pub(super) ebpf: Option<bool>,
    pub(super) bpf_dir: Option<PathBuf>,
    pub(super) cgroup_parent: Option<String>,
    pub(super) http_conns: Option<usize>,
    pub(super) http_conns_per_client: Option<usize>,
}

/// A value on its way into a setting, with what an error has to say.
struct Given<'a> {
    key: &'a str,
    origin: &'a Origin,
    value: &'a Value,
}

impl Given<'_> {
    fn refuse(&self, message: impl Into<String>) -> ConfigError {
        ConfigError::Value { origin: self.origin.clone(), key: self.key.to_owned(), message: message.into() }
    }

    fn wanted(&self, what: &str) -> ConfigError {
        self.refuse(format!("must be {what}, got {}", self.value.kind()))
    }

    fn text(&self) -> Result<&str, ConfigError> {
        match self.value {
            Value::Text(text) => Ok(text),
            _ => Err(self.wanted("a string")),
        }
    }

    /// Anything that reads itself from a text.
    fn parsed<T: FromStr<Err: std::fmt::Display>>(&self) -> Result<T, ConfigError> {
        self.text()?.parse().map_err(|error: T::Err| self.refuse(error.to_string()))
    }

    fn boolean(&self) -> Result<bool, ConfigError> {
        match self.value {
            Value::Bool(value) => Ok(*value),
            _ => Err(self.wanted("true or false")),
        }
    }

    fn integer(&self) -> Result<i64, ConfigError> {
        match self.value {
            Value::Integer(value) => Ok(*value),
            _ => Err(self.wanted("a whole number")),
        }
    }

    fn number<T: TryFrom<i64>>(&self, what: &str) -> Result<T, ConfigError> {
        let number = self.integer()?;
        T::try_from(number).map_err(|_| self.refuse(format!("must be {what}, got {number}")))
    }

    /// A port; `None` for 0 and -1, which turn it off.
    fn port_or_off(&self) -> Result<Option<u16>, ConfigError> {
        if self.integer()? == -1 {
            return Ok(None);
        }
        Ok(Some(self.number("a port, or -1")?).filter(|port| *port != 0))
    }

    fn positive(&self) -> Result<usize, ConfigError> {
        let number: usize = self.number("greater than 0")?;
        if number == 0 { Err(self.refuse("must be greater than 0")) } else { Ok(number) }
    }

    fn duration(&self) -> Result<Duration, ConfigError> {
        parse_go_duration(self.text()?).map_err(|error| self.refuse(error.to_string()))
    }

    fn address(&self) -> Result<IpAddr, ConfigError> {
        self.one_address(self.text()?)
    }

    fn one_address(&self, text: &str) -> Result<IpAddr, ConfigError> {
        if text.contains("{{") {
            return Err(self.refuse("templates are not supported by culvert yet: give an IP address"));
        }
        if text.starts_with("unix://") {
            return Err(self.refuse("unix sockets are not supported by culvert yet: give an IP address"));
        }
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        bare.parse().map_err(|_| self.refuse(format!("{text:?} is no IP address")))
    }

    fn path(&self) -> Result<PathBuf, ConfigError> {
        let path = PathBuf::from(self.text()?);
        if path.is_absolute() { Ok(path) } else { Err(self.refuse("must be an absolute path")) }
    }

    /// A text that is one of `allowed`, or an error that lists them.
    fn only(&self, allowed: &Value) -> Result<(), ConfigError> {
        if self.value == allowed {
            return Ok(());
        }
        Err(ConfigError::Unsupported {
            origin: self.origin.clone(),
            key: format!("{} = {}", self.key, shown(self.value)),
        })
    }

    fn node_name(&self) -> Result<String, ConfigError> {
        let name = self.text()?;
        check_node_name(name).map_err(|message| self.refuse(message))?;
        Ok(name.to_owned())
    }

    /// Pairs of texts, by Consul's rules for the meta of a node.
    fn meta(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let Value::Object(entries) = self.value else { return Err(self.wanted("a block of strings")) };
        let mut pairs = BTreeMap::new();
        for Entry { key, node, .. } in entries {
            let Value::Text(value) = &node.value else {
                return Err(self.refuse(format!("the value of {key:?} must be a string, got {}", node.value.kind())));
            };
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            if !(1..=MAX_META_KEY).contains(&key.len()) || !key.bytes().all(allowed) || key.starts_with("consul-") {
                return Err(self.refuse(format!(
                    "key {key:?} must be 1 to {MAX_META_KEY} letters, digits, '-' and '_', and not begin with \"consul-\""
                )));
            }
            if value.len() > MAX_META_VALUE {
                return Err(self.refuse(format!("the value of {key:?} is longer than {MAX_META_VALUE} bytes")));
            }
            pairs.insert(key.clone(), value.clone());
        }
        Ok(pairs)
    }

    fn cgroup(&self) -> Result<String, ConfigError> {
        let name = self.text()?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let segment = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(allowed);
        if name.len() <= 255 && name.split('/').all(segment) {
            Ok(name.to_owned())
        } else {
            Err(self.refuse("must be a cgroup's path below the root, such as \"culvert\""))
        }
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("{text:?}"),
        Value::Bool(value) => value.to_string(),
        Value::Integer(value) => value.to_string(),
        other => other.kind().to_owned(),
    }
}

/// A node's name is part of DNS names and of paths.
pub(super) fn check_node_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if first && name.len() <= MAX_NODE_NAME && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(format!(
        "node name {name:?} must begin with a letter or digit, hold only those, '-', '_' and '.', and be at most {MAX_NODE_NAME} bytes long"
    ))
}

/// Does the value ask for nothing? Then it does not matter that its key is not honoured.
fn is_inert(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) | Value::Integer(0 | -1) => true,
        Value::Text(text) => text.is_empty(),
        Value::List(elements) => elements.is_empty(),
        Value::Object(entries) => entries.iter().all(|entry| is_inert(&entry.node.value)),
        Value::Bool(true) | Value::Integer(_) | Value::Float(_) => false,
    }
}

impl Draft {
    /// Adds a file or fragment.
    pub(super) fn text(&mut self, text: &str, file: &str) -> Result<(), ConfigError> {
        let origin = |place: Place| Origin::File { file: file.to_owned(), place };
        let entries = text::read(text)
            .map_err(|error| ConfigError::Syntax { origin: origin(error.place), message: error.message })?;
        self.entries("", &entries, &origin)
    }

    fn entries(
        &mut self,
        prefix: &str,
        entries: &[Entry],
        origin: &impl Fn(Place) -> Origin,
    ) -> Result<(), ConfigError> {
        for entry in entries {
            let key = format!("{prefix}{}", entry.key);
            if BLOCKS.contains(&key.as_str()) {
                self.block(&key, &entry.node, origin)?;
            } else {
                self.set(&key, &origin(entry.place), &entry.node.value)?;
            }
        }
        Ok(())
    }

    /// A block, an object, or a list of them.
    fn block(&mut self, key: &str, node: &Node, origin: &impl Fn(Place) -> Origin) -> Result<(), ConfigError> {
        match &node.value {
            Value::Object(entries) => self.entries(&format!("{key}."), entries, origin),
            Value::List(elements) => elements.iter().try_for_each(|element| match &element.value {
                Value::Object(entries) => self.entries(&format!("{key}."), entries, origin),
                other => Err(Given { key, origin: &origin(element.place), value: other }.wanted("a block")),
            }),
            other => Err(Given { key, origin: &origin(node.place), value: other }.wanted("a block")),
        }
    }

    /// Sets one key.
    fn set(&mut self, key: &str, origin: &Origin, value: &Value) -> Result<(), ConfigError> {
        let given = Given { key, origin, value };
        match key {
            "datacenter" => self.datacenter = Some(given.parsed()?),
            "node_name" | "node" => self.node_name = Some(given.node_name()?),
            "node_meta" => {
                self.node_meta.extend(given.meta()?);
                if self.node_meta.len() > MAX_META {
                    return Err(given.refuse(format!("must be at most {MAX_META} pairs")));
                }
            }
            "data_dir" => self.data_dir = Some(given.path()?),
            "server" => self.server = Some(given.boolean()?),
            "bootstrap" => drop(given.boolean()?), // one server is all there is: it always is its own leader
            "bootstrap_expect" => given.only(&Value::Integer(1))?,
            "bind_addr" => self.bind = Some(given.address()?),
            "client_addr" => {
                let addresses = given.text()?.split_whitespace().map(|text| given.one_address(text));
                let addresses = addresses.collect::<Result<Vec<_>, _>>()?;
                if addresses.is_empty() {
                    return Err(given.refuse("must name at least one IP address"));
                }
                self.client = Some(addresses);
            }
            "advertise_addr" => self.advertise = Some(given.address()?),
            "log_level" => self.log_level = Some(given.parsed()?),
            "default_intention_policy" => self.default_policy = Some(given.parsed()?),
            "encryption" => self.encryption = Some(given.parsed()?),
            "cgroup_parent" => self.cgroup_parent = Some(given.cgroup()?),
            // culvert never phones home and never runs what others send it.
            "disable_update_check" => drop(given.boolean()?),
            "disable_remote_exec" => given.only(&Value::Bool(true))?,
            _ => return self.set_inside(&given),
        }
        Ok(())
    }

    /// Keys inside blocks, and what is left over.
    fn set_inside(&mut self, given: &Given<'_>) -> Result<(), ConfigError> {
        match given.key {
            "ports.http" => self.http_port = Some(given.number("a port, or 0 for a free one")?),
            "ports.grpc" => self.grpc_port = Some(given.port_or_off()?),
            "ports.sidecar_min_port" => self.sidecar_min = Some(given.number("a port, or 0")?),
            "ports.sidecar_max_port" => self.sidecar_max = Some(given.number("a port, or 0")?),
            "connect.enabled" => given.only(&Value::Bool(true))?,
            "connect.ca_provider" => given.only(&Value::Text("consul".to_owned()))?,
            "connect.ca_config.leaf_cert_ttl" => self.leaf_ttl = Some(given.duration()?),
            "connect.ca_config.intermediate_cert_ttl" => self.intermediate_ttl = Some(given.duration()?),
            "connect.ca_config.root_cert_ttl" => self.root_ttl = Some(given.duration()?),
            "connect.ca_config.csr_max_per_second" => self.csr_max_per_second = Some(given.number("0 or more")?),
            "connect.ca_config.private_key_type" => given.only(&Value::Text("ec".to_owned()))?,
            "connect.ca_config.private_key_bits" => given.only(&Value::Integer(256))?,
            "acl.enabled" => given.only(&Value::Bool(false))?,
            // Without ACLs it has no effect, in Consul neither: `default_intention_policy` is what counts.
            "acl.default_policy" => drop(given.parsed::<Action>()?),
            "ebpf.enabled" => self.ebpf = Some(given.boolean()?),
            "ebpf.bpf_dir" => self.bpf_dir = Some(given.path()?),
            "limits.http_max_conns" => self.http_conns = Some(given.positive()?),
            "limits.http_max_conns_per_client" => self.http_conns_per_client = Some(given.positive()?),
            key if UNSUPPORTED.binary_search(&key).is_ok() => {
                if !is_inert(given.value) {
                    return Err(ConfigError::Unsupported { origin: given.origin.clone(), key: key.to_owned() });
                }
            }
            key => return Err(ConfigError::UnknownKey { origin: given.origin.clone(), key: key.to_owned() }),
        }
        Ok(())
    }

    /// Adds the command line.
    pub(super) fn flags(&mut self, args: &AgentArgs) -> Result<(), ConfigError> {
        self.dev = args.dev;
        let text = |text: &Option<String>| text.clone().map(Value::Text);
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| Value::Text(path.display().to_string()));
        let absolute = args.data_dir.as_ref().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()));
        for (flag, key, value) in [
            ("-server", "server", args.server.then_some(Value::Bool(true))),
            ("-data-dir", "data_dir", path(&absolute)),
            ("-node", "node_name", text(&args.node)),
            ("-datacenter", "datacenter", text(&args.datacenter)),
            ("-bind", "bind_addr", text(&args.bind)),
            ("-client", "client_addr", text(&args.client)),
            ("-advertise", "advertise_addr", text(&args.advertise)),
            ("-http-port", "ports.http", args.http_port.map(Value::Integer)),
            ("-grpc-port", "ports.grpc", args.grpc_port.map(Value::Integer)),
            ("-log-level", "log_level", text(&args.log_level)),
            ("-encryption", "encryption", text(&args.encryption)),
            ("-default-intention-policy", "default_intention_policy", text(&args.default_intention_policy)),
            ("-no-ebpf", "ebpf.enabled", args.no_ebpf.then_some(Value::Bool(false))),
            ("-bpf-dir", "ebpf.bpf_dir", path(&args.bpf_dir)),
            ("-cgroup-parent", "cgroup_parent", text(&args.cgroup_parent)),
        ] {
            if let Some(value) = value {
                self.set(key, &Origin::Flag(flag), &value)?;
            }
        }
        Ok(())
    }
}
