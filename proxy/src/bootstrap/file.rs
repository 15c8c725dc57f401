//! The bootstrap file.

use std::fmt;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde_json::Value;
use zeroize::Zeroizing;

use super::object::Object;
use crate::xds::{Node, ServerTrust, Token, XdsChannel};

/// Largest bootstrap file, in bytes.
pub const MAX_BOOTSTRAP: u64 = 1 << 20;
/// The header that carries the ACL token.
const TOKEN_KEY: &str = "x-consul-token";
/// The only transport socket there is.
const UPSTREAM_TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
/// Where admin access logs may go, since none is written.
const NOWHERE: &str = "/dev/null";

/// What a sidecar is told at its start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bootstrap {
    /// Who we are.
    pub node: Node,
    /// Where our configuration comes from.
    pub control_plane: ControlPlane,
    /// What we authenticate with there.
    pub token: Option<Token>,
    /// Where the admin interface listens.
    pub admin: Option<SocketAddr>,
}

/// How a control plane is reached.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ControlPlane {
    /// A unix socket; a relative path is relative to the working directory.
    Unix(PathBuf),
    /// A TCP address, in clear: on loopback.
    Tcp(SocketAddr),
    /// A TCP address, by TLS.
    Tls(SocketAddr, ServerTrust),
}

impl ControlPlane {
    /// A channel to it.
    #[must_use]
    pub fn channel(&self) -> XdsChannel {
        match self {
            Self::Unix(path) => XdsChannel::unix(path.clone()),
            Self::Tcp(address) => XdsChannel::tcp(*address),
            Self::Tls(address, trust) => XdsChannel::tls(*address, trust),
        }
    }
}

/// Why a bootstrap file is refused. Never quotes values: one of them is a token.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The file cannot be read.
    #[error("bootstrap file {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file has more than [`MAX_BOOTSTRAP`] bytes.
    #[error("bootstrap is larger than {MAX_BOOTSTRAP} bytes")]
    TooLarge,
    /// Not JSON. Envoy also reads YAML; we do not.
    #[error("bootstrap is not JSON: line {line}, column {column}: {category} error")]
    Json {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// What kind of error.
        category: &'static str,
    },
    /// A field is missing, wrong, or would change behaviour and is not supported.
    #[error("bootstrap: {path}: {problem}")]
    Field {
        /// Its path.
        path: String,
        /// What is wrong.
        problem: String,
    },
}

impl BootstrapError {
    pub(super) fn field(path: String, problem: impl fmt::Display) -> Self {
        Self::Field { path, problem: problem.to_string() }
    }
}

impl From<serde_json::Error> for BootstrapError {
    fn from(error: serde_json::Error) -> Self {
        use serde_json::error::Category;
        let category = match error.classify() {
            Category::Io => "read",
            Category::Syntax => "syntax",
            Category::Data => "data",
            Category::Eof => "end of file",
        };
        Self::Json { line: error.line(), column: error.column(), category }
    }
}

impl Bootstrap {
    /// Reads a bootstrap file.
    ///
    /// # Errors
    /// [`BootstrapError`].
    pub fn read(path: &Path) -> Result<Self, BootstrapError> {
        let failed = |source| BootstrapError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        let mut text = Zeroizing::new(Vec::new());
        file.take(MAX_BOOTSTRAP + 1).read_to_end(&mut text).map_err(failed)?;
        Self::parse(&text)
    }

    /// Reads the text of a bootstrap file.
    ///
    /// # Errors
    /// [`BootstrapError`] with the path of the first field that is wrong, or would change behaviour and is not supported.
    pub fn parse(text: &[u8]) -> Result<Self, BootstrapError> {
        if text.len() as u64 > MAX_BOOTSTRAP {
            return Err(BootstrapError::TooLarge);
        }
        let mut root = Object::root(serde_json::from_slice(text)?)?;
        // Names of Envoy's statistics; limits of its regular expressions.
        root.ignore(&["stats_config", "layered_runtime"])?;
        let admin = root.object("admin")?.map(admin).transpose()?.flatten();
        let node = node(root.required_object("node")?)?;
        let (cluster, token) = dynamic_resources(root.required_object("dynamic_resources")?)?;
        let control_plane = static_resources(root.required_object("static_resources")?, &cluster)?;
        root.finish()?;
        Ok(Self { node, control_plane, token, admin })
    }
}

fn admin(mut admin: Object) -> Result<Option<SocketAddr>, BootstrapError> {
    nowhere(&mut admin, "access_log_path")?;
    for mut log in admin.list("access_log")? {
        log.ignore(&["name"])?;
        let mut config = log.required_object("typed_config")?;
        config.ignore(&["@type"])?;
        nowhere(&mut config, "path")?;
        config.finish()?;
        log.finish()?;
    }
    let address = admin.object("address")?.map(socket_address).transpose()?;
    admin.finish()?;
    Ok(address)
}

/// A log of admin requests is not written.
fn nowhere(object: &mut Object, field: &str) -> Result<(), BootstrapError> {
    match object.text(field)? {
        Some(path) if path != NOWHERE => Err(object.error(field, format!("only {NOWHERE} is supported by culvert"))),
        _ => Ok(()),
    }
}

fn node(mut node: Object) -> Result<Node, BootstrapError> {
    let id = node.required_text("id")?;
    let cluster = node.required_text("cluster")?;
    let metadata = node.object("metadata")?.map(Object::rest).unwrap_or_default();
    // Balancing does not look at localities.
    node.ignore(&["locality"])?;
    node.finish()?;
    Ok(Node { id, cluster, metadata })
}

/// The cluster that configuration comes from, and the token for it.
fn dynamic_resources(mut dynamic: Object) -> Result<(String, Option<Token>), BootstrapError> {
    for field in ["lds_config", "cds_config"] {
        let mut source = dynamic.required_object(field)?;
        source.required_object("ads")?.finish()?;
        // A proxy waits for its configuration, however long that takes.
        source.ignore(&["initial_fetch_timeout"])?;
        source.expect_text("resource_api_version", "V3")?;
        source.finish()?;
    }
    let mut ads = dynamic.required_object("ads_config")?;
    dynamic.finish()?;
    ads.expect_text("api_type", "DELTA_GRPC")?;
    ads.expect_text("transport_api_version", "V3")?;
    let mut service = ads.only("grpc_services")?;
    ads.finish()?;
    let mut token = None;
    for mut header in service.list("initial_metadata")? {
        header.expect_text("key", TOKEN_KEY)?;
        let value = header.text("value")?.unwrap_or_default();
        token = Token::new(value).map_err(|error| header.error("value", error))?;
        header.finish()?;
    }
    let mut grpc = service.required_object("envoy_grpc")?;
    service.finish()?;
    let cluster = grpc.required_text("cluster_name")?;
    grpc.finish()?;
    Ok((cluster, token))
}

fn static_resources(mut resources: Object, control_plane: &str) -> Result<ControlPlane, BootstrapError> {
    let mut cluster = resources.only("clusters")?;
    resources.finish()?;
    cluster.expect_text("name", control_plane)?;
    cluster.expect_text("type", "STATIC")?;
    cluster.ignore(&[
        "connect_timeout",                  // the client's own is as bounded
        "ignore_health_on_host_removal",    // there are no active health checks
        "http2_protocol_options",           // gRPC is HTTP/2
        "typed_extension_protocol_options", // likewise
    ])?;
    let trust = cluster.object("transport_socket")?.map(transport_socket).transpose()?;
    let mut assignment = cluster.required_object("load_assignment")?;
    cluster.finish()?;
    assignment.ignore(&["cluster_name"])?;
    let mut locality = assignment.only("endpoints")?;
    assignment.finish()?;
    let mut endpoint = locality.only("lb_endpoints")?;
    locality.finish()?;
    let mut host = endpoint.required_object("endpoint")?;
    endpoint.finish()?;
    let mut address = host.required_object("address")?;
    host.finish()?;
    if let Some(mut pipe) = address.object("pipe")? {
        let path = pipe.required_text("path")?;
        if trust.is_some() {
            return Err(pipe.error("path", "TLS over a unix socket is not supported by culvert"));
        }
        pipe.finish()?;
        address.finish()?;
        return Ok(ControlPlane::Unix(PathBuf::from(path)));
    }
    let address = socket_address(address)?;
    Ok(trust.map_or(ControlPlane::Tcp(address), |trust| ControlPlane::Tls(address, trust)))
}

/// The roots of the control plane, as Consul writes them for an agent with TLS.
fn transport_socket(mut socket: Object) -> Result<ServerTrust, BootstrapError> {
    socket.ignore(&["name"])?; // the type says which one it is
    let mut config = socket.required_object("typed_config")?;
    socket.finish()?;
    config.expect_text("@type", UPSTREAM_TLS)?;
    let mut common = config.required_object("common_tls_context")?;
    config.finish()?;
    let mut validation = common.required_object("validation_context")?;
    common.finish()?;
    let mut source = validation.required_object("trusted_ca")?;
    validation.finish()?;
    let pem = source.required_text("inline_string")?;
    let trust = ServerTrust::from_pem(pem.as_bytes()).map_err(|error| source.error("inline_string", error))?;
    source.finish()?;
    Ok(trust)
}

fn socket_address(mut address: Object) -> Result<SocketAddr, BootstrapError> {
    let mut socket = address.required_object("socket_address")?;
    address.finish()?;
    let text = socket.required_text("address")?;
    let ip: IpAddr = text.parse().map_err(|_| socket.error("address", "must be an IP address"))?;
    let port = match socket.take("port_value")? {
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(text)) => text.parse().ok(),
        Some(_) => None,
        None => return Err(socket.error("port_value", "missing")),
    };
    let port = port.and_then(|port| u16::try_from(port).ok());
    let port = port.ok_or_else(|| socket.error("port_value", "must be a port from 0 to 65535"))?;
    socket.finish()?;
    Ok(SocketAddr::new(ip, port))
}
