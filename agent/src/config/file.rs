//! Configuration files: HCL and JSON, flattened to settings that know where they were written.

use std::fmt::Display;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hcl_edit::Span as _;
use hcl_edit::expr::{Expression, ObjectKey};
use hcl_edit::structure::{Body, Structure};

/// Longest file that is read.
const MAX_FILE: u64 = 1 << 20;
/// Deepest nesting of blocks and objects.
const MAX_DEPTH: usize = 16;

/// Keys that Consul's agent knows and culvert does not honour yet. A prefix stands for everything below it.
const KNOWN: &[&str] = &[
    "acl",
    "addresses",
    "advertise_addr_wan",
    "alt_domain",
    "auto_config",
    "auto_encrypt",
    "auto_reload_config",
    "autopilot",
    "bootstrap",
    "bootstrap_expect",
    "ca_file",
    "ca_path",
    "cache",
    "cert_file",
    "check",
    "checks",
    "check_update_interval",
    "config_entries",
    "connect",
    "default_query_time",
    "disable_remote_exec",
    "disable_update_check",
    "dns_config",
    "domain",
    "enable_debug",
    "enable_local_script_checks",
    "enable_script_checks",
    "enable_syslog",
    "encrypt",
    "encrypt_verify_incoming",
    "encrypt_verify_outgoing",
    "gossip_lan",
    "gossip_wan",
    "http_config",
    "key_file",
    "leave_on_terminate",
    "license_path",
    "limits",
    "log_file",
    "log_json",
    "max_query_time",
    "node_id",
    "node_meta",
    "peering",
    "performance",
    "pid_file",
    "ports",
    "primary_datacenter",
    "raft_protocol",
    "recursors",
    "rejoin_after_leave",
    "retry_interval",
    "retry_join",
    "retry_join_wan",
    "retry_max",
    "service",
    "services",
    "session_ttl_min",
    "skip_leave_on_interrupt",
    "start_join",
    "tagged_addresses",
    "telemetry",
    "tls",
    "translate_wan_addrs",
    "ui",
    "ui_config",
    "unix_sockets",
    "use_streaming_backend",
    "verify_incoming",
    "verify_outgoing",
    "verify_server_hostname",
    "watches",
    "xds",
];

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {message}")]
pub struct ConfigError {
    /// File, line and column; or the file alone.
    pub place: String,
    /// What is wrong.
    pub message: String,
}

/// One key with its value and place.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Names from the outermost block to the key, joined by dots.
    pub path: String,
    place: String,
    value: Value,
}

#[derive(Clone, Debug)]
enum Value {
    Text(String),
    Number(f64),
    Boolean(bool),
    Other,
}

impl Setting {
    /// An error about this setting.
    pub(super) fn refuse(&self, message: impl Display) -> ConfigError {
        ConfigError { place: self.place.clone(), message: format!("{}: {message}", self.path) }
    }

    pub(super) fn text(&self) -> Result<&str, ConfigError> {
        match &self.value {
            Value::Text(text) => Ok(text),
            _ => Err(self.refuse("a text is expected")),
        }
    }

    pub(super) fn boolean(&self) -> Result<bool, ConfigError> {
        match self.value {
            Value::Boolean(value) => Ok(value),
            _ => Err(self.refuse("true or false is expected")),
        }
    }

    /// A port; 0 and -1 mean off.
    pub(super) fn port(&self) -> Result<Option<u16>, ConfigError> {
        match self.value {
            Value::Number(number) if number == 0.0 || number == -1.0 => Ok(None),
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be a whole u16")]
            Value::Number(number) if number.fract() == 0.0 && (1.0..=65535.0).contains(&number) => {
                Ok(Some(number as u16))
            }
            _ => Err(self.refuse("a port (1 to 65535, or -1 for off) is expected")),
        }
    }

    pub(super) fn parsed<T: FromStr<Err: Display>>(&self) -> Result<T, ConfigError> {
        self.text()?.parse().map_err(|error| self.refuse(error))
    }
}

/// The error for a key that is not honoured.
pub(super) fn unknown(setting: &Setting) -> ConfigError {
    let top = setting.path.split('.').next().unwrap_or_default();
    let message = if KNOWN.contains(&top) {
        format!("{} is not supported by culvert yet; remove it", setting.path)
    } else {
        format!("invalid config key {}", setting.path)
    };
    ConfigError { place: setting.place.clone(), message }
}

/// The text of a file.
pub(super) fn load(path: &Path) -> Result<String, ConfigError> {
    let failed = |error: std::io::Error| ConfigError { place: path.display().to_string(), message: error.to_string() };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(failed(std::io::Error::other(format!("longer than {MAX_FILE} bytes"))));
    }
    Ok(text)
}

/// Every `.hcl` and `.json` of a folder, in lexical order.
pub(super) fn in_folder(folder: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed =
        |error: std::io::Error| ConfigError { place: folder.display().to_string(), message: error.to_string() };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "hcl" || extension == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Every setting of a text, in the order written.
pub(super) fn parse(text: &str, path: &Path, json: bool) -> Result<Vec<Setting>, ConfigError> {
    let mut reader = Reader { text, path, settings: Vec::new() };
    if json {
        let value: serde_json::Value = serde_json::from_str(text).map_err(|error| ConfigError {
            place: format!("{}:{}:{}", path.display(), error.line(), error.column()),
            message: error.to_string(),
        })?;
        reader.json("", &value)?;
        return Ok(reader.settings);
    }
    // hcl-edit recurses: nesting is bounded before it sees the text.
    let open = text.bytes().filter(|byte| matches!(byte, b'{' | b'[' | b'(')).count();
    if open > 4096 {
        return Err(reader.error(0, "too many brackets"));
    }
    let body: Body = text.parse().map_err(|error: hcl_edit::parser::Error| ConfigError {
        place: format!("{}:{}:{}", path.display(), error.location().line(), error.location().column()),
        message: error.message().to_owned(),
    })?;
    reader.body("", &body, 0)?;
    Ok(reader.settings)
}

struct Reader<'a> {
    text: &'a str,
    path: &'a Path,
    settings: Vec<Setting>,
}

impl Reader<'_> {
    fn place(&self, offset: usize) -> String {
        let before = self.text.get(..offset).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|character| *character != '\n').count() + 1;
        format!("{}:{line}:{column}", self.path.display())
    }

    fn error(&self, offset: usize, message: impl Display) -> ConfigError {
        ConfigError { place: self.place(offset), message: message.to_string() }
    }

    fn body(&mut self, prefix: &str, body: &Body, depth: usize) -> Result<(), ConfigError> {
        for structure in body {
            let offset = structure.span().map_or(0, |span| span.start);
            if depth > MAX_DEPTH {
                return Err(self.error(offset, "nested too deeply"));
            }
            match structure {
                Structure::Attribute(attribute) => {
                    self.value(&join(prefix, attribute.key.as_str()), &attribute.value, offset, depth + 1)?;
                }
                Structure::Block(block) => self.body(&join(prefix, block.ident.as_str()), &block.body, depth + 1)?,
            }
        }
        Ok(())
    }

    fn value(&mut self, path: &str, value: &Expression, offset: usize, depth: usize) -> Result<(), ConfigError> {
        if depth > MAX_DEPTH {
            return Err(self.error(offset, "nested too deeply"));
        }
        let value = match value {
            Expression::Object(object) => {
                for (key, value) in object {
                    let key = match key {
                        ObjectKey::Ident(ident) => ident.as_str().to_owned(),
                        ObjectKey::Expression(Expression::String(text)) => text.as_str().to_owned(),
                        ObjectKey::Expression(_) => return Err(self.error(offset, "a key must be a plain name")),
                    };
                    let at = value.expr().span().map_or(offset, |span| span.start);
                    self.value(&join(path, &key), value.expr(), at, depth + 1)?;
                }
                return Ok(());
            }
            Expression::String(text) => Value::Text(text.as_str().to_owned()),
            Expression::Number(number) => Value::Number(number.as_f64().unwrap_or(f64::NAN)),
            Expression::Bool(value) => Value::Boolean(*value.value()),
            Expression::UnaryOp(_) => Value::Number(-1.0),
            _ => Value::Other,
        };
        self.settings.push(Setting { path: path.to_owned(), place: self.place(offset), value });
        Ok(())
    }

    /// serde_json keeps no positions: the place is the file.
    fn json(&mut self, path: &str, value: &serde_json::Value) -> Result<(), ConfigError> {
        let value = match value {
            serde_json::Value::Object(object) => {
                for (key, value) in object {
                    self.json(&join(path, key), value)?;
                }
                return Ok(());
            }
            serde_json::Value::String(text) => Value::Text(text.clone()),
            serde_json::Value::Number(number) => Value::Number(number.as_f64().unwrap_or(f64::NAN)),
            serde_json::Value::Bool(value) => Value::Boolean(*value),
            serde_json::Value::Array(_) | serde_json::Value::Null => Value::Other,
        };
        self.settings.push(Setting { path: path.to_owned(), place: self.path.display().to_string(), value });
        Ok(())
    }
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}
