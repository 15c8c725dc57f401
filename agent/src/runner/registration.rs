//! From the services of a task group to what is registered in the catalog.
//!
//! The body is the one that `PUT /v1/agent/service/register` takes, so that the runner has no way into the catalog that
//! other clients lack.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use culvert_jobspec::{
    AllocContext, Check, CheckKind, Environment, Group, Job, NodeContext, Port, PortBinding, PortRef, Proxy, Service,
    SidecarService, Template, TemplateError,
};
use culvert_types::{NameError, ServiceName, format_go_duration};
use serde_json::{Map, Value, json};

use super::RunError;
use super::dialer::{service_prefix, sidecar_id};
use super::services::decode;
use crate::workload::AllocId;

/// The interface of a workload, inside.
pub(super) const INTERFACE: &str = "eth0";

/// One service of an allocation as it is registered.
#[derive(Clone, Debug)]
pub(super) struct Registration {
    /// Catalog ID.
    pub(super) service_id: String,
    /// Name of the service.
    pub(super) service: String,
    /// Ports inside the network namespace where the application is reached: the service's, and the sidecar's target.
    pub(super) ports: Vec<u16>,
    /// Catalog ID of its sidecar, if it takes part in the mesh.
    pub(super) sidecar_id: Option<String>,
    /// Loopback addresses of its upstreams.
    pub(super) upstreams: Vec<std::net::SocketAddr>,
    /// The request body.
    pub(super) body: Value,
}

impl Registration {
    /// The body, asking for the sidecar port that the allocation had before, if it had one.
    pub(super) fn body_with_port(&self, port: Option<u16>) -> Value {
        let mut body = self.body.clone();
        if let (Some(port), Some(sidecar)) = (port, body.pointer_mut("/Connect/SidecarService")) {
            sidecar["Port"] = port.into();
        }
        body
    }
}

/// Where the sidecars of an allocation are reached.
#[derive(Clone, Copy, Debug)]
pub(super) struct SidecarAddress {
    /// What the catalog says: the node's address, or the workload's own when the node advertises a loopback.
    pub(super) advertised: IpAddr,
    /// The workload's address on the bridge.
    pub(super) workload: IpAddr,
    /// Whether the workload has IPv6, and so a `::1`.
    pub(super) ipv6: bool,
}

/// A service that cannot be registered.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RegistrationError {
    /// A name, tag or check uses a variable that has no value here.
    #[error("service of group {group:?}")]
    Template {
        /// The group.
        group: String,
        /// What is wrong with the text.
        #[source]
        source: TemplateError,
    },
    /// What the name became with the values of this allocation.
    #[error("service of group {group:?}")]
    Name {
        /// The group.
        group: String,
        /// What is wrong with it.
        #[source]
        source: NameError,
    },
    /// The port label is not one of the group's.
    #[error("No port of label {label:?} defined in group {group:?}")]
    Port {
        /// The group.
        group: String,
        /// The label.
        label: String,
    },
}

/// An allocation, as far as its services depend on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allocated<'a> {
    /// Its id.
    pub(super) id: &'a AllocId,
    /// Its group.
    pub(super) group: &'a Group,
    /// Its ports by label.
    pub(super) ports: &'a BTreeMap<String, PortBinding>,
    /// What `${…}` means in it.
    pub(super) environment: &'a Environment,
    /// Where its sidecars are reached.
    pub(super) address: SidecarAddress,
}

/// The registrations of all services of an allocation.
///
/// # Errors
/// [`RegistrationError`] names the group and what is wrong; nothing is registered then.
pub(super) fn registrations(allocation: &Allocated<'_>) -> Result<Vec<Registration>, RegistrationError> {
    allocation.group.services.iter().map(|service| registration(allocation, service)).collect()
}

/// Finds out before anything is started whether the services of `job` can be registered at all, on `node`.
///
/// # Errors
/// [`RunError`] names what is wrong with the job.
pub(super) fn check(job: &Job, node: &NodeContext) -> Result<(), RunError> {
    let id = AllocId::random();
    for group in job.groups.iter().filter(|group| group.count > 0) {
        // Any allocation will do: which values there are does not depend on it.
        let unspecified = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        let binding = |port: &Port| PortBinding { host: 1, inside: port.to.or(port.static_port).unwrap_or(1) };
        let ports = group.network.ports.iter().map(|port| (port.label.clone(), binding(port))).collect();
        let context = AllocContext {
            alloc_id: id.to_string(),
            index: group.count - 1,
            node: node.clone(),
            host_ip: unspecified,
            alloc_ip: unspecified,
            alloc_interface: INTERFACE.to_owned(),
            ports,
        };
        let environment = Environment::of_group(job, group, &context)?;
        let address = SidecarAddress { advertised: unspecified, workload: unspecified, ipv6: true };
        let allocated = Allocated { id: &id, group, ports: &context.ports, environment: &environment, address };
        for registration in registrations(&allocated)? {
            check_name(group, &registration.service)?;
            decode(&registration.body)?;
        }
    }
    Ok(())
}

fn check_name(group: &Group, name: &str) -> Result<(), RegistrationError> {
    let checked = ServiceName::new(name);
    checked.map(drop).map_err(|source| RegistrationError::Name { group: group.name.clone(), source })
}

fn registration(allocation: &Allocated<'_>, service: &Service) -> Result<Registration, RegistrationError> {
    let Allocated { id: alloc, group, .. } = *allocation;
    let text = |template: &Template, field| render(template, field, allocation);
    let texts =
        |templates: &[Template], field| templates.iter().map(|one| text(one, field)).collect::<Result<Vec<_>, _>>();
    let name = text(&service.name, "name")?;
    if service.connect.is_some() {
        // Any other name that runs since before there was a rule goes on: no identity is made of it.
        check_name(group, &name)?;
    }
    let port = service.port.as_ref().map(|port| inside_port(allocation, port)).transpose()?;
    let label = service.port.as_ref().map_or_else(String::new, |port| match port {
        PortRef::Label(label) => label.clone(),
        PortRef::Number(number) => number.to_string(),
    });
    let service_id = format!("{}group-{}-{name}-{label}", service_prefix(alloc), group.name);
    let mut meta = rendered_map(&service.meta, allocation)?;
    meta.insert("external-source".to_owned(), "culvert".into());
    let checks = service.checks.iter().map(|check| check_body(allocation, check, port));
    let mut body = json!({
        "ID": service_id, "Name": name, "Tags": texts(&service.tags, "tags")?, "Meta": meta,
        "Checks": checks.collect::<Result<Vec<_>, _>>()?,
    });
    if let Some(port) = port {
        body["Port"] = port.into();
    }
    let sidecar = service.connect.as_ref().map(|connect| &connect.sidecar);
    if let Some(sidecar) = sidecar {
        body["Connect"] = json!({"SidecarService": sidecar_body(allocation, sidecar)?});
    }
    let sidecar_id = sidecar.map(|_| sidecar_id(&service_id));
    let upstreams = sidecar.map_or(&[][..], |sidecar| &sidecar.proxy.upstreams);
    let upstreams = upstreams.iter().map(|one| (one.local_bind_address, one.local_bind_port).into()).collect();
    let ports = port.into_iter().chain(sidecar.and_then(|sidecar| sidecar.proxy.local_service_port)).collect();
    Ok(Registration { service_id, service: name, ports, sidecar_id, upstreams, body })
}

fn sidecar_body(allocation: &Allocated<'_>, sidecar: &SidecarService) -> Result<Value, RegistrationError> {
    let address = allocation.address;
    let mut body = json!({
        "Address": address.advertised,
        "Meta": rendered_map(&sidecar.meta, allocation)?,
        // Port 0: the one that the catalog assigns to the sidecar.
        "TaggedAddresses": {"culvert-workload": {"Address": address.workload, "Port": 0}},
        "Proxy": proxy_body(&sidecar.proxy, address.ipv6),
    });
    if let Some(tags) = &sidecar.tags {
        let tags = tags.iter().map(|tag| render(tag, "tags", allocation));
        body["Tags"] = tags.collect::<Result<Vec<_>, _>>()?.into();
    }
    Ok(body)
}

fn proxy_body(proxy: &Proxy, ipv6: bool) -> Value {
    let upstreams = proxy.upstreams.iter().map(|upstream| {
        // An address that is given stands for itself alone; without one the listeners are those of `localhost`.
        let localhost = ipv6 && upstream.local_bind_address == Ipv4Addr::LOCALHOST;
        json!({
            "DestinationName": upstream.destination_name,
            "LocalBindAddress": if localhost { String::new() } else { upstream.local_bind_address.to_string() },
            "LocalBindPort": upstream.local_bind_port, "Config": upstream.config,
        })
    });
    let mut body = json!({"Upstreams": upstreams.collect::<Vec<_>>(), "Config": proxy.config});
    if let Some(address) = proxy.local_service_address {
        body["LocalServiceAddress"] = json!(address);
    }
    if let Some(port) = proxy.local_service_port {
        body["LocalServicePort"] = port.into();
    }
    body
}

/// A check, dialled on the loopback of the workload's network namespace.
fn check_body(
    allocation: &Allocated<'_>,
    check: &Check,
    service_port: Option<u16>,
) -> Result<Value, RegistrationError> {
    let port =
        check.port.as_ref().map(|port| inside_port(allocation, port)).transpose()?.or(service_port).unwrap_or_default();
    let mut body = json!({
        "Name": render(&check.name, "check name", allocation)?,
        "Interval": format_go_duration(check.interval), "Timeout": format_go_duration(check.timeout),
        "Status": check.initial_status.as_str(), "SuccessBeforePassing": check.success_before_passing,
        "FailuresBeforeWarning": check.failures_before_warning, "FailuresBeforeCritical": check.failures_before_critical,
    });
    match &check.kind {
        CheckKind::Tcp => body["TCP"] = format!("127.0.0.1:{port}").into(),
        CheckKind::Http(http) => {
            let path = render(&http.path, "check path", allocation)?;
            body["HTTP"] = format!("http://127.0.0.1:{port}{path}").into();
            body["Method"] = http.method.as_str().into();
            body["Body"] = render(&http.body, "check body", allocation)?.into();
            let mut headers = Map::new();
            for (name, values) in &http.headers {
                let values = values.iter().map(|value| render(value, "check header", allocation));
                headers.insert(name.clone(), values.collect::<Result<Vec<_>, _>>()?.into());
            }
            body["Header"] = headers.into();
        }
    }
    Ok(body)
}

/// The port inside the network namespace: a number as it is, a label as the allocation's ports have it.
fn inside_port(allocation: &Allocated<'_>, port: &PortRef) -> Result<u16, RegistrationError> {
    match port {
        PortRef::Number(number) => Ok(*number),
        PortRef::Label(label) => allocation
            .ports
            .get(label)
            .map(|binding| binding.inside)
            .ok_or_else(|| RegistrationError::Port { group: allocation.group.name.clone(), label: label.clone() }),
    }
}

fn rendered_map(
    templates: &BTreeMap<String, Template>,
    allocation: &Allocated<'_>,
) -> Result<Map<String, Value>, RegistrationError> {
    templates.iter().map(|(key, value)| Ok((key.clone(), render(value, "meta", allocation)?.into()))).collect()
}

fn render(template: &Template, field: &'static str, allocation: &Allocated<'_>) -> Result<String, RegistrationError> {
    template
        .render_strict(field, allocation.environment)
        .map_err(|source| RegistrationError::Template { group: allocation.group.name.clone(), source })
}

#[cfg(test)]
mod tests {
    use culvert_jobspec::Upstream;

    use super::*;
    use crate::report::chain;

    #[test]
    fn a_name_that_no_identity_can_have_is_found_before_anything_starts() {
        let job = r#"job "web" {
            group "web" {
              network { mode = "bridge" }
              service { name = "${meta.called}" }
              task "web" {
                driver = "raw_exec"
                config { command = "true" }
              }
            }
        }"#;
        let job = culvert_jobspec::parse(job, "web.hcl", &BTreeMap::new()).expect("a job");
        let node = |called: &str| NodeContext {
            meta: [("called".to_owned(), called.to_owned())].into(),
            ..NodeContext::default()
        };
        check(&job, &node("web")).expect("a name");
        let blank = "a name with blanks";
        assert!(chain(&check(&job, &node(blank)).expect_err("blanks")).contains(blank));
        // What runs is not ended for its name.
        let id = AllocId::random();
        let (group, ports, unspecified) = (&job.groups[0], BTreeMap::new(), IpAddr::from(Ipv4Addr::UNSPECIFIED));
        let context = AllocContext {
            alloc_id: id.to_string(),
            index: 0,
            node: node(blank),
            host_ip: unspecified,
            alloc_ip: unspecified,
            alloc_interface: INTERFACE.to_owned(),
            ports: BTreeMap::new(),
        };
        let environment = &Environment::of_group(&job, group, &context).expect("an environment");
        let address = SidecarAddress { advertised: unspecified, workload: unspecified, ipv6: true };
        let running = Allocated { id: &id, group, ports: &ports, environment, address };
        assert_eq!(registrations(&running).expect("taken over")[0].service, blank);
        let refused = check(&job, &node("../../etc")).expect_err("a path");
        assert!(chain(&refused).contains("name \"../../etc\" must start"), "{}", chain(&refused));
    }

    #[test]
    fn an_upstream_without_an_address_is_on_localhost_in_both_families() {
        let upstream = |address: &str| Upstream {
            destination_name: "count-api".to_owned(),
            local_bind_address: address.parse().expect("an address"),
            local_bind_port: 8080,
            config: Map::new(),
        };
        let upstreams = vec![upstream("127.0.0.1"), upstream("127.0.0.2"), upstream("::1")];
        let proxy = Proxy { upstreams, ..Proxy::default() };
        let bound = |ipv6| -> Vec<Value> {
            let body = proxy_body(&proxy, ipv6);
            let upstreams = body["Upstreams"].as_array().expect("a list");
            upstreams.iter().map(|upstream| upstream["LocalBindAddress"].clone()).collect()
        };
        assert_eq!(bound(true), ["", "127.0.0.2", "::1"]);
        assert_eq!(bound(false), ["127.0.0.1", "127.0.0.2", "::1"], "there is no ::1 to listen on");
    }
}
