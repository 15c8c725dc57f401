//! From the body of a service registration to what is stored.

use std::collections::BTreeMap;

use culvert_api::{CheckDefinition, ServiceRegistration as Body};
use culvert_types::ServiceName;

use super::error::RegisterError;
use super::sidecar::Sidecar;
use super::{Instance, Place, check, proxy};
use crate::state::rows::{Service, ServiceKind, TaggedAddress, WORKLOAD_ADDRESS, Weights};

/// Most pairs in `Meta`.
const MAX_META_PAIRS: usize = 64;
/// Longest key of `Meta`, in bytes.
const MAX_META_KEY: usize = 128;
/// Longest value of `Meta`, in bytes.
const MAX_META_VALUE: usize = 512;
/// Start of the keys that are not for users.
const RESERVED_META: &str = "consul-";

/// A validated registration.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) main: Instance,
    pub(super) sidecar: Option<Sidecar>,
}

/// Reads and validates a registration as a whole.
pub(super) fn parse(body: Body, place: &Place) -> Result<Wanted, RegisterError> {
    let (parts, connect) = split(body, place)?;
    let Parts { mut service, checks } = parts;
    if service.name.is_empty() {
        return Err(RegisterError::MissingName);
    }
    if service.id.is_empty() {
        service.id.clone_from(&service.name);
    }
    check_registered("Name", &service.name)?;
    check_registered("ID", &service.id)?;
    let invalid = |what: &str| RegisterError::Invalid(what.to_owned());
    let sidecar = match connect {
        Some(Connect::Native) => {
            if service.port == 0 {
                return Err(invalid("Port or SocketPath must be set for a Connect native service."));
            }
            service.connect_native = true;
            None
        }
        Some(Connect::Sidecar(body)) => Some(parse_sidecar(*body, place)?),
        None => None,
    };
    if service.kind == ServiceKind::ConnectProxy {
        if service.port == 0 {
            return Err(invalid("Port or SocketPath must be set for a Connect proxy"));
        }
        if sidecar.is_some() || service.connect_native {
            return Err(invalid("A Proxy cannot also be Connect Native, only typical services"));
        }
    } else if service.proxy.is_some() {
        return Err(invalid("Proxy is set, but Kind is not connect-proxy"));
    }
    if sidecar.is_some() || service.connect_native {
        // It becomes the identity in a certificate.
        ServiceName::new(&service.name)
            .map_err(|err| RegisterError::Invalid(format!("Name: {err}; it becomes the identity of the service")))?;
    }
    let checks = check::parse_all(checks, &service, place).map_err(RegisterError::Check)?;
    if let Some(listening) = &sidecar
        && let Some(own) = &listening.checks
    {
        // Their IDs depend on the sidecar's, which is not complete yet; what they say can be judged now.
        check::parse_all(own.clone(), &listening.service, place).map_err(RegisterError::SidecarCheck)?;
    }
    Ok(Wanted { main: Instance { service, checks }, sidecar })
}

fn check_registered(field: &str, text: &str) -> Result<(), RegisterError> {
    culvert_types::check_registered(text).map_err(|err| RegisterError::Invalid(format!("{field}: {err}")))
}

enum Connect {
    Native,
    Sidecar(Box<Body>),
}

struct Parts {
    service: Service,
    checks: Vec<CheckDefinition>,
}

fn parse_sidecar(body: Body, place: &Place) -> Result<Sidecar, RegisterError> {
    let invalid = |what: &str| RegisterError::Invalid(what.to_owned());
    if !body.id.is_empty() {
        return Err(invalid("A SidecarService cannot specify an ID as this is managed by the agent"));
    }
    if body.connect.as_ref().is_some_and(|connect| connect.sidecar_service.is_some()) {
        return Err(invalid("A SidecarService cannot have a nested SidecarService"));
    }
    if body.connect.as_ref().is_some_and(|connect| connect.native) {
        return Err(invalid("A SidecarService cannot be Connect native"));
    }
    let (Parts { service, checks }, _) = split(body, place)?;
    if !service.name.is_empty() {
        check_registered("SidecarService.Name", &service.name)?;
    }
    Ok(Sidecar { service, checks: (!checks.is_empty()).then_some(checks) })
}

/// What services and sidecars have in common.
fn split(body: Body, place: &Place) -> Result<(Parts, Option<Connect>), RegisterError> {
    refuse_unsupported(&body)?;
    if matches!(body.address.as_str(), "0.0.0.0" | "::" | "[::]") {
        return Err(RegisterError::Address);
    }
    check_meta(&body.meta)?;
    let kind = match body.kind.as_str() {
        "" | "typical" => ServiceKind::Typical,
        "connect-proxy" => ServiceKind::ConnectProxy,
        other => return Err(RegisterError::Unsupported(format!("Kind {other:?}"))),
    };
    let connect = match body.connect {
        Some(connect) if connect.native && connect.sidecar_service.is_some() => {
            let what = "a service is either Connect native or has a SidecarService, not both";
            return Err(RegisterError::Invalid(what.to_owned()));
        }
        Some(connect) if connect.native => Some(Connect::Native),
        Some(connect) => connect.sidecar_service.map(Connect::Sidecar),
        None => None,
    };
    let named = kind == ServiceKind::ConnectProxy;
    let service = Service {
        node: place.node.clone(),
        id: body.id,
        name: body.name,
        kind,
        tags: body.tags,
        meta: body.meta,
        address: body.address,
        port: body.port,
        tagged_addresses: tagged_addresses(body.tagged_addresses)?,
        weights: weights(body.weights)?,
        enable_tag_override: body.enable_tag_override,
        connect_native: false,
        proxy: body.proxy.map(|body| proxy::parse(body, named, place)).transpose()?,
        declared_sidecar: None,
    };
    if named && service.proxy.is_none() {
        return Err(RegisterError::Proxy(
            "Proxy.DestinationServiceName must be non-empty for Connect proxy services".to_owned(),
        ));
    }
    let checks = body.check.into_iter().chain(body.checks).filter(|check| *check != CheckDefinition::default());
    Ok((Parts { service, checks: checks.collect() }, connect))
}

/// Refuses by name what would be ignored otherwise.
fn refuse_unsupported(body: &Body) -> Result<(), RegisterError> {
    let fields = [
        (!body.socket_path.is_empty(), "SocketPath"),
        (body.locality.as_ref().is_some_and(|locality| !locality.is_empty()), "Locality"),
        (!matches!(body.namespace.as_str(), "" | "default"), "Namespace"),
        (!matches!(body.partition.as_str(), "" | "default"), "Partition"),
    ];
    let refused: Vec<&str> = fields.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    if refused.is_empty() { Ok(()) } else { Err(RegisterError::Unsupported(refused.join(", "))) }
}

fn weights(body: Option<culvert_api::Weights>) -> Result<Weights, RegisterError> {
    let Some(body) = body else { return Ok(Weights::default()) };
    if body.passing < 1 {
        return Err(RegisterError::Weights("Passing must be greater than 0"));
    }
    if body.warning < 0 {
        return Err(RegisterError::Weights("Warning must be greater than or equal 0"));
    }
    let (passing, warning) = (u16::try_from(body.passing), u16::try_from(body.warning));
    match (passing, warning) {
        (Ok(passing), Ok(warning)) => Ok(Weights { passing, warning }),
        _ => Err(RegisterError::Weights("Passing and Warning must be at most 65535")),
    }
}

fn tagged_addresses(
    body: BTreeMap<String, culvert_api::ServiceAddress>,
) -> Result<BTreeMap<String, TaggedAddress>, RegisterError> {
    if let Some(workload) = body.get(WORKLOAD_ADDRESS)
        && workload.address.parse::<std::net::IpAddr>().is_err()
    {
        let what = format!("TaggedAddresses.{WORKLOAD_ADDRESS}: {:?} is not an IP address", workload.address);
        return Err(RegisterError::Invalid(what));
    }
    Ok(body.into_iter().map(|(tag, at)| (tag, TaggedAddress { address: at.address, port: at.port })).collect())
}

/// Consul's rules for metadata, and its texts.
fn check_meta(meta: &BTreeMap<String, String>) -> Result<(), RegisterError> {
    if meta.len() > MAX_META_PAIRS {
        let what = format!("Node metadata cannot contain more than {MAX_META_PAIRS} key/value pairs");
        return Err(RegisterError::Meta(what));
    }
    for (key, value) in meta {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let wrong = if key.is_empty() {
            "Key cannot be blank".to_owned()
        } else if !key.bytes().all(valid) {
            "Key contains invalid characters".to_owned()
        } else if key.len() > MAX_META_KEY {
            format!("Key is too long (limit: {MAX_META_KEY} characters)")
        } else if key.starts_with(RESERVED_META) {
            format!("Key prefix '{RESERVED_META}' is reserved for internal use")
        } else if value.len() > MAX_META_VALUE {
            format!("Value is too long (limit: {MAX_META_VALUE} characters)")
        } else {
            continue;
        };
        return Err(RegisterError::Meta(format!("Couldn't load metadata pair ('{key}', '{value}'): {wrong}")));
    }
    Ok(())
}
