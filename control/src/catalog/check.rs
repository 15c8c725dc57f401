//! From the body of a check to what is stored.

use std::collections::BTreeMap;
use std::time::Duration;

use culvert_api::CheckDefinition as Body;
use culvert_types::HealthStatus;

use super::Place;
use super::error::CheckError;
use super::maintenance::fixed;
use crate::checks::{split_host_port, split_url};
use crate::state::rows::{Check, CheckDefinition, Probe, Service};

/// Longest output kept of a check that sets no limit, in bytes.
pub(super) const OUTPUT_MAX_SIZE: usize = 4096;
/// Longest output that a check may ask for, in bytes.
const OUTPUT_MAX_LIMIT: usize = 64 << 10;
/// Time-out of a check that sets none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Shortest interval; a shorter one is raised to it.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Shortest `DeregisterCriticalServiceAfter`; a shorter one is raised to it.
const MIN_DEREGISTER: Duration = Duration::from_secs(60);

/// Reads the check of `PUT /v1/agent/check/register`. Name and tags of its service are the caller's to fill in.
pub(super) fn parse_own(body: Body, place: &Place) -> Result<Check, CheckError> {
    if body.name.is_empty() {
        return Err(CheckError::MissingName);
    }
    let id = first(&[&body.id, &body.check_id, &body.name]);
    check_registered(&id)?;
    let definition = definition(&body, place)?;
    let status = status(&body.status).ok_or(CheckError::BadStatus)?;
    Ok(Check {
        node: place.node.clone(),
        id,
        name: body.name,
        notes: body.notes,
        service_id: body.service_id,
        service_name: String::new(),
        service_tags: Vec::new(),
        status,
        output: String::new(),
        definition,
    })
}

/// Reads the checks of a service; `service:<id>`, or `service:<id>:<n>` if there are several, names those without ID.
pub(super) fn parse_all(bodies: Vec<Body>, service: &Service, place: &Place) -> Result<Vec<Check>, CheckError> {
    let several = bodies.len() > 1;
    let mut checks: Vec<Check> = Vec::with_capacity(bodies.len());
    for (n, body) in bodies.into_iter().enumerate() {
        let auto =
            if several { format!("service:{}:{}", service.id, n + 1) } else { format!("service:{}", service.id) };
        let definition = definition(&body, place)?;
        let status = status(&body.status).ok_or(CheckError::Status)?;
        let given = first(&[&body.check_id, &body.id]);
        if !given.is_empty() {
            check_registered(&given)?;
        }
        let id = first(&[&given, &auto]);
        if checks.iter().any(|check| check.id == id) {
            return Err(CheckError::Duplicate(id));
        }
        let name = first(&[&body.name, &format!("Service '{}' check", service.name)]);
        checks.push(Check {
            node: place.node.clone(),
            id,
            name,
            notes: body.notes,
            service_id: service.id.clone(),
            service_name: service.name.clone(),
            service_tags: service.tags.clone(),
            status,
            output: String::new(),
            definition,
        });
    }
    Ok(checks)
}

/// The check that stands for the node being up: its agent runs it.
pub(super) fn serf_health(node: &str) -> Check {
    Check {
        node: node.to_owned(),
        id: "serfHealth".to_owned(),
        name: "Serf Health Status".to_owned(),
        notes: String::new(),
        service_id: String::new(),
        service_name: String::new(),
        service_tags: Vec::new(),
        status: HealthStatus::Passing,
        output: "Agent alive and reachable".to_owned(),
        definition: fixed(),
    }
}

fn check_registered(id: &str) -> Result<(), CheckError> {
    culvert_types::check_registered(id).map_err(|err| CheckError::Invalid(format!("ID: {err}")))
}

fn first(texts: &[&str]) -> String {
    texts.iter().find(|text| !text.is_empty()).map(|text| (*text).to_owned()).unwrap_or_default()
}

/// Critical, unless the body says otherwise; `None` if it says nothing known.
fn status(text: &str) -> Option<HealthStatus> {
    if text.is_empty() { Some(HealthStatus::Critical) } else { text.parse().ok() }
}

/// What is run, when, and what its results mean.
fn definition(body: &Body, place: &Place) -> Result<CheckDefinition, CheckError> {
    refuse_unsupported(body, place)?;
    let invalid = |what: &str| CheckError::Invalid(what.to_owned());
    let (interval, ttl) = (body.interval.0, body.ttl.0);
    let alias = !body.alias_service.is_empty() || !body.alias_node.is_empty();
    let polled = !body.http.is_empty() || !body.tcp.is_empty();
    if !interval.is_zero() && !ttl.is_zero() {
        return Err(invalid("Interval and TTL cannot both be specified"));
    }
    if polled && interval.is_zero() {
        return Err(invalid("Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks"));
    }
    if alias && !interval.is_zero() {
        return Err(invalid("Interval cannot be set for Alias checks"));
    }
    if alias && !ttl.is_zero() {
        return Err(invalid("TTL must be not be set for Alias checks"));
    }
    if !polled && !alias && ttl.is_zero() {
        return Err(invalid("TTL must be > 0 for TTL checks"));
    }
    let (warning, critical) = (body.failures_before_warning, body.failures_before_critical);
    if warning > critical {
        return Err(invalid("FailuresBeforeWarning can't be higher than FailuresBeforeCritical"));
    }
    if !polled && body.success_before_passing.max(warning).max(critical) > 0 {
        return Err(invalid("SuccessBeforePassing and FailuresBefore… count the runs of HTTP and TCP checks only"));
    }
    let output_max_size = if body.output_max_size == 0 { OUTPUT_MAX_SIZE } else { body.output_max_size as usize };
    if output_max_size > OUTPUT_MAX_LIMIT {
        return Err(CheckError::Invalid(format!("OutputMaxSize must be at most {OUTPUT_MAX_LIMIT}")));
    }
    let deregister = body.deregister_critical_service_after.0;
    Ok(CheckDefinition {
        probe: probe(body, alias, ttl)?,
        interval: if polled { interval.max(MIN_INTERVAL) } else { Duration::ZERO },
        timeout: if body.timeout.is_zero() { DEFAULT_TIMEOUT } else { body.timeout.0 },
        success_before_passing: body.success_before_passing,
        failures_before_warning: warning,
        failures_before_critical: critical,
        output_max_size,
        deregister_critical_service_after: if deregister.is_zero() {
            deregister
        } else {
            deregister.max(MIN_DEREGISTER)
        },
    })
}

fn probe(body: &Body, alias: bool, ttl: Duration) -> Result<Probe, CheckError> {
    let kinds = [!body.http.is_empty(), !body.tcp.is_empty(), alias, !ttl.is_zero()];
    if kinds.iter().filter(|kind| **kind).count() > 1 {
        return Err(CheckError::Invalid("only one of HTTP, TCP, TTL and AliasService can be set".to_owned()));
    }
    if alias {
        return Ok(Probe::Alias { service: body.alias_service.clone() });
    }
    if !ttl.is_zero() {
        return Ok(Probe::Ttl(ttl));
    }
    if !body.tcp.is_empty() {
        if split_host_port(&body.tcp).is_none() {
            return Err(CheckError::Invalid(format!("TCP must be host:port, got {:?}", body.tcp)));
        }
        return Ok(Probe::Tcp { address: body.tcp.clone() });
    }
    if body.http.starts_with("https://") {
        return Err(CheckError::Unsupported("HTTP with an https:// URL".to_owned()));
    }
    split_url(&body.http).map_err(|what| CheckError::Invalid(format!("HTTP: {what}")))?;
    let method = if body.method.is_empty() { "GET" } else { &body.method };
    hyper::Method::from_bytes(method.as_bytes())
        .map_err(|_| CheckError::Invalid(format!("Method: {method:?} is not an HTTP method")))?;
    Ok(Probe::Http {
        url: body.http.clone(),
        method: method.to_owned(),
        header: headers(&body.header)?,
        body: body.body.clone(),
        disable_redirects: body.disable_redirects,
    })
}

fn headers(fields: &BTreeMap<String, Vec<String>>) -> Result<BTreeMap<String, Vec<String>>, CheckError> {
    for (name, values) in fields {
        let sendable = name.parse::<hyper::header::HeaderName>().is_ok()
            && values.iter().all(|value| hyper::header::HeaderValue::from_str(value).is_ok());
        if !sendable {
            // Not the value: it may be a secret.
            return Err(CheckError::Invalid(format!("Header: {name:?} is not a header field that can be sent")));
        }
    }
    Ok(fields.clone())
}

/// Refuses by name what would be ignored otherwise.
fn refuse_unsupported(body: &Body, place: &Place) -> Result<(), CheckError> {
    let fields = [
        (!body.script_args.is_empty() || !body.args.is_empty(), "ScriptArgs"),
        (body.tcp_use_tls, "TCPUseTLS"),
        (!body.udp.is_empty(), "UDP"),
        (!body.grpc.is_empty(), "GRPC"),
        (body.grpc_use_tls, "GRPCUseTLS"),
        (!body.h2ping.is_empty(), "H2PING"),
        (!body.os_service.is_empty(), "OSService"),
        (!body.docker_container_id.is_empty(), "DockerContainerID"),
        (!body.shell.is_empty(), "Shell"),
        (!body.session_name.is_empty(), "SessionName"),
        (!body.tls_server_name.is_empty(), "TLSServerName"),
        (!matches!(body.namespace.as_str(), "" | "default"), "Namespace"),
        (!matches!(body.partition.as_str(), "" | "default"), "Partition"),
        (!body.alias_node.is_empty() && body.alias_node != place.node, "AliasNode of another node"),
    ];
    let refused: Vec<&str> = fields.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    if refused.is_empty() { Ok(()) } else { Err(CheckError::Unsupported(refused.join(", "))) }
}
