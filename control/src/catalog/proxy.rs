//! From the `Proxy` of a sidecar to what is stored.
//!
//! `Config` maps are kept as sent and echoed; the keys that have a meaning are read here, once. A key without one is
//! refused by name: a limit that silently does not limit is worse than an error.

use std::net::IpAddr;
use std::time::Duration;

use culvert_api as api;
use culvert_types::{Encryption, ServiceName};
use serde_json::{Map, Value};

use super::Place;
use super::error::RegisterError;
use crate::state::rows::{Proxy, ProxySettings, Upstream};
use crate::xds::listen_addresses;

/// Most upstreams of one proxy.
const MAX_UPSTREAMS: usize = 256;

/// Reads a proxy. `named`: it must say whom it represents (a sidecar that is declared by its service does not).
pub(super) fn parse(body: api::Proxy, named: bool, place: &Place) -> Result<Proxy, RegisterError> {
    refuse_unsupported(&body, place)?;
    if named {
        if body.destination_service_name.is_empty() {
            return Err(failed("Proxy.DestinationServiceName must be non-empty for Connect proxy services"));
        }
        service_name("Proxy.DestinationServiceName", &body.destination_service_name)?;
    }
    if !body.local_service_address.is_empty() && body.local_service_address.parse::<IpAddr>().is_err() {
        return Err(failed(format!("Proxy.LocalServiceAddress {:?} is not an IP address", body.local_service_address)));
    }
    if body.upstreams.len() > MAX_UPSTREAMS {
        return Err(failed(format!("Proxy.Upstreams: more than {MAX_UPSTREAMS}")));
    }
    let settings = settings(&body.config)?;
    let mut upstreams: Vec<Upstream> = Vec::with_capacity(body.upstreams.len());
    for upstream in body.upstreams {
        let upstream = parse_upstream(upstream)?;
        refuse_duplicate(&upstreams, &upstream)?;
        upstreams.push(upstream);
    }
    Ok(Proxy {
        destination_service_name: body.destination_service_name,
        destination_service_id: body.destination_service_id,
        local_service_address: body.local_service_address,
        local_service_port: body.local_service_port,
        config: body.config,
        settings,
        upstreams,
        mode: body.mode,
        mesh_gateway: body.mesh_gateway.mode,
        mutual_tls_mode: body.mutual_tls_mode,
    })
}

/// Refuses by name what would be ignored otherwise.
fn refuse_unsupported(body: &api::Proxy, place: &Place) -> Result<(), RegisterError> {
    body.check_supported().map_err(|err| RegisterError::Unsupported(err.fields.join(", ")))?;
    if body.transparent_proxy.as_ref().is_some_and(|tproxy| *tproxy != api::TransparentProxy::default()) {
        return Err(RegisterError::Unsupported("Proxy.TransparentProxy".to_owned()));
    }
    for upstream in &body.upstreams {
        let at = |field: &str| format!("Proxy.Upstreams[{}].{field}", upstream.destination_name);
        if !upstream.datacenter.is_empty() && upstream.datacenter != place.datacenter.as_str() {
            return Err(RegisterError::Unsupported(format!("{} {:?}", at("Datacenter"), upstream.datacenter)));
        }
        if !upstream.local_bind_socket_mode.is_empty() {
            return Err(RegisterError::Unsupported(at("LocalBindSocketMode")));
        }
    }
    Ok(())
}

fn failed(what: impl Into<String>) -> RegisterError {
    RegisterError::Proxy(what.into())
}

/// A name that ends up in a certificate.
pub(super) fn service_name(field: &str, text: &str) -> Result<(), RegisterError> {
    ServiceName::new(text).map(|_| ()).map_err(|err| failed(format!("{field}: {err}")))
}

fn settings(config: &Map<String, Value>) -> Result<ProxySettings, RegisterError> {
    let mut settings = ProxySettings::default();
    for (key, value) in config {
        let field = || format!("Proxy.Config.{key}");
        match key.as_str() {
            "encryption" => {
                let encryption: Result<Encryption, _> = text(&field, value)?.parse();
                settings.encryption = Some(encryption.map_err(|err| failed(format!("{}: {err}", field())))?);
            }
            "bind_address" => {
                let address = text(&field, value)?;
                let parsed =
                    address.parse().map_err(|_| failed(format!("{}: {address:?} is not an IP address", field())));
                settings.bind_address = Some(parsed?);
            }
            "bind_port" => {
                settings.bind_port = Some(number(&field, value, u16::MAX.into())? as u16).filter(|port| *port > 0)
            }
            "local_connect_timeout_ms" => settings.local_connect_timeout = Some(milliseconds(&field, value)?),
            "max_inbound_connections" => {
                settings.max_inbound_connections = Some(number(&field, value, u32::MAX.into())? as u32);
            }
            "protocol" => protocol(&field, value)?,
            // Consul gives it to proxies for their upstreams; those have their own setting, which wins.
            "connect_timeout_ms" => settings.connect_timeout = Some(milliseconds(&field, value)?),
            // Labels of Envoy's statistics, sent by Nomad: nothing of culvert's depends on them.
            "envoy_stats_tags" => {}
            _ => return Err(RegisterError::Unsupported(field())),
        }
    }
    Ok(settings)
}

fn parse_upstream(body: api::Upstream) -> Result<Upstream, RegisterError> {
    let name = body.destination_name.as_str();
    if name.is_empty() {
        return Err(failed("upstream destination name cannot be empty"));
    }
    service_name("upstream destination name", name)?;
    if !body.local_bind_address.is_empty() && body.local_bind_address.parse::<IpAddr>().is_err() {
        let what = format!("upstream {name:?}: LocalBindAddress {:?} is not an IP address", body.local_bind_address);
        return Err(failed(what));
    }
    if body.local_bind_port == 0 {
        return Err(failed("upstream local bind port or local socket path must be defined and nonzero"));
    }
    let (mut connect_timeout, mut max_connections) = (None, None);
    for (key, value) in &body.config {
        let field = || format!("Proxy.Upstreams[{name}].Config.{key}");
        match key.as_str() {
            "protocol" => protocol(&field, value)?,
            "connect_timeout_ms" => connect_timeout = Some(milliseconds(&field, value)?),
            "limits" => max_connections = limits(&field, value)?,
            _ => return Err(RegisterError::Unsupported(field())),
        }
    }
    Ok(Upstream {
        destination_name: body.destination_name,
        destination_type: body.destination_type,
        destination_namespace: body.destination_namespace,
        destination_partition: body.destination_partition,
        datacenter: body.datacenter,
        mesh_gateway: body.mesh_gateway.mode,
        local_bind_address: body.local_bind_address,
        local_bind_port: body.local_bind_port,
        config: body.config,
        connect_timeout,
        max_connections,
    })
}

fn refuse_duplicate(upstreams: &[Upstream], new: &Upstream) -> Result<(), RegisterError> {
    let addresses = listen_addresses(new);
    for old in upstreams {
        let name = &new.destination_name;
        if let Some(at) = listen_addresses(old).iter().find(|at| addresses.contains(at)) {
            return Err(failed(format!("upstreams cannot contain duplicates: {name:?} and another listen on {at}")));
        }
        if old.destination_name == *name {
            return Err(failed(format!("upstreams cannot contain duplicates: {name:?} is there twice")));
        }
    }
    Ok(())
}

fn limits(field: &dyn Fn() -> String, value: &Value) -> Result<Option<u32>, RegisterError> {
    let Value::Object(limits) = value else {
        return Err(failed(format!("{} must be an object", field())));
    };
    let mut max_connections = None;
    for (key, value) in limits {
        let field = || format!("{}.{key}", field());
        match key.to_ascii_lowercase().replace('_', "").as_str() {
            "maxconnections" => max_connections = Some(number(&field, value, u32::MAX.into())? as u32),
            _ => return Err(RegisterError::Unsupported(field())),
        }
    }
    Ok(max_connections)
}

fn protocol(field: &dyn Fn() -> String, value: &Value) -> Result<(), RegisterError> {
    match text(field, value)? {
        "" | "tcp" => Ok(()),
        other => Err(RegisterError::Unsupported(format!("{} {other:?} (only \"tcp\")", field()))),
    }
}

fn text<'a>(field: &dyn Fn() -> String, value: &'a Value) -> Result<&'a str, RegisterError> {
    value.as_str().ok_or_else(|| failed(format!("{} must be a string, got {value}", field())))
}

/// A whole number; like Consul's, it may come as text.
fn number(field: &dyn Fn() -> String, value: &Value, most: u64) -> Result<u64, RegisterError> {
    let number = match value {
        Value::Number(number) => number.as_u64().or_else(|| number.as_f64().and_then(whole)),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    let number = number.filter(|number| *number <= most);
    number.ok_or_else(|| failed(format!("{} must be a whole number from 0 to {most}, got {value}", field())))
}

/// Numbers that went through a float on their way, as HCL's do.
fn whole(float: f64) -> Option<u64> {
    (float >= 0.0 && float.fract() == 0.0 && float < 9e15).then_some(float as u64)
}

fn milliseconds(field: &dyn Fn() -> String, value: &Value) -> Result<Duration, RegisterError> {
    let number = number(field, value, MAX_TIMEOUT_MS)?;
    if number == 0 {
        return Err(failed(format!("{} must be greater than 0", field())));
    }
    Ok(Duration::from_millis(number))
}

/// Longest time-out in a proxy's configuration: one day.
const MAX_TIMEOUT_MS: u64 = 24 * 3600 * 1000;
