//! From flags and environment to a client: Consul's variables, and by name what culvert does not honour.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use culvert_api::Secret;
use culvert_api::client::{Client, ClientError, DEFAULT_ADDRESS, escape};

use super::Env;
use super::args::{ConsulArgs, HttpArgs};

/// Longest token file that is read.
const MAX_TOKEN_FILE: u64 = 64 * 1024;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// A flag or variable that culvert does not honour.
    #[error("{0} is not supported by culvert yet: {1}")]
    Unsupported(String, &'static str),
    /// The token file.
    #[error("read the token file {}", path.display())]
    TokenFile {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The address.
    #[error(transparent)]
    Client(#[from] ClientError),
}

const NO_TLS: &str = "the API is plain HTTP on loopback, or a unix socket";
const NO_NAMESPACES: &str = "there is only the namespace and partition \"default\"";

/// A client for the agent that `args` and `env` name.
pub(super) fn client(args: &HttpArgs, env: &Env) -> Result<Client, ConnectionError> {
    refuse(args, env)?;
    let address = args.http_addr.clone().or_else(|| env.get("CONSUL_HTTP_ADDR"));
    let token = match (&args.token, &args.token_file) {
        (Some(token), _) => Some(token.clone()),
        (None, Some(path)) => Some(read_token(path)?),
        (None, None) => match (env.get("CONSUL_HTTP_TOKEN"), env.get("CONSUL_HTTP_TOKEN_FILE")) {
            (Some(token), _) => Some(token),
            (None, Some(path)) => Some(read_token(Path::new(&path))?),
            (None, None) => None,
        },
    };
    let token = token.filter(|token| !token.is_empty()).map(Secret::new);
    Ok(Client::new(address.as_deref().unwrap_or(DEFAULT_ADDRESS), token)?)
}

fn refuse(args: &HttpArgs, env: &Env) -> Result<(), ConnectionError> {
    let refused = &args.refused;
    for (flag, value) in [
        ("-ca-file", &refused.ca_file),
        ("-ca-path", &refused.ca_path),
        ("-client-cert", &refused.client_cert),
        ("-client-key", &refused.client_key),
        ("-tls-server-name", &refused.tls_server_name),
    ] {
        if value.is_some() {
            return Err(ConnectionError::Unsupported(flag.to_owned(), NO_TLS));
        }
    }
    let is_on = |value: &String| !matches!(value.as_str(), "0" | "f" | "F" | "false" | "FALSE" | "False");
    if env.get("CONSUL_HTTP_SSL").is_some_and(|value| is_on(&value)) {
        return Err(ConnectionError::Unsupported("CONSUL_HTTP_SSL".to_owned(), NO_TLS));
    }
    if env.get("CONSUL_HTTP_AUTH").is_some() {
        return Err(ConnectionError::Unsupported("CONSUL_HTTP_AUTH".to_owned(), "the API takes tokens only"));
    }
    for (flag, variable, value) in
        [("-namespace", "CONSUL_NAMESPACE", &refused.namespace), ("-partition", "CONSUL_PARTITION", &refused.partition)]
    {
        let (name, value) = match value {
            Some(value) => (flag, Some(value.clone())),
            None => (variable, env.get(variable)),
        };
        if value.is_some_and(|value| !matches!(value.as_str(), "" | "default")) {
            return Err(ConnectionError::Unsupported(name.to_owned(), NO_NAMESPACES));
        }
    }
    Ok(())
}

fn read_token(path: &Path) -> Result<String, ConnectionError> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_TOKEN_FILE).read_to_string(&mut text));
    read.map_err(|source| ConnectionError::TokenFile { path: path.to_owned(), source })?;
    Ok(text.trim().to_owned())
}

/// A path with a query, every part encoded.
#[derive(Clone)]
pub(super) struct Target {
    text: String,
    asked: bool,
}

impl Target {
    /// `base` holds no user input.
    pub(super) fn new(base: &str) -> Self {
        Self { text: base.to_owned(), asked: false }
    }

    /// Adds a segment.
    pub(super) fn segment(mut self, segment: &str) -> Self {
        self.text.push('/');
        self.text.push_str(&escape(segment));
        self
    }

    /// Adds a fixed piece of path.
    pub(super) fn path(mut self, path: &str) -> Self {
        self.text.push_str(path);
        self
    }

    /// Adds a parameter.
    pub(super) fn with(mut self, key: &str, value: &str) -> Self {
        self.text.push(if self.asked { '&' } else { '?' });
        self.asked = true;
        self.text.push_str(key);
        self.text.push('=');
        self.text.push_str(&escape(value));
        self
    }

    /// Adds what the common flags of the control plane ask for.
    pub(super) fn consul(self, args: &ConsulArgs, env: &Env) -> Self {
        let datacenter = args.datacenter.clone().or_else(|| env.get("CONSUL_DATACENTER"));
        let path = match datacenter.filter(|name| !name.is_empty()) {
            Some(name) => self.with("dc", &name),
            None => self,
        };
        if args.stale { path.with("stale", "") } else { path }
    }

    /// The request target.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }
}
