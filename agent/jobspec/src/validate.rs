//! Rules that reach across blocks: ports, labels, duplicates, what a mesh service needs. Nomad's wording.

use crate::hcl::Problem;
use crate::parse::Session;
use crate::{CheckKind, Group, Job, PortRef, Service};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// Reports what is wrong with `job` as a whole.
pub(crate) fn validate(session: &Session, job: &Job) {
    let validator = Validator { session };
    validator.static_ports(job);
    for (index, group) in job.groups.iter().enumerate() {
        validator.services(index, group);
        validator.upstreams(index, group);
    }
}

struct Validator<'a> {
    session: &'a Session,
}

impl Validator<'_> {
    fn report(&self, path: &str, message: String) {
        self.session.report(Problem::new(self.session.span(path), message));
    }

    /// A port of the host serves one allocation.
    fn static_ports(&self, job: &Job) {
        let mut taken: BTreeMap<u16, String> = BTreeMap::new();
        for (group_index, group) in job.groups.iter().enumerate() {
            for (index, port) in group.network.ports.iter().enumerate() {
                let Some(number) = port.static_port else { continue };
                let path = format!("group.{group_index}.network.port.{index}.static");
                if let Some(owner) = taken.get(&number) {
                    self.report(&path, format!("Static port {number} already reserved by {owner}"));
                }
                taken.entry(number).or_insert_with(|| format!("{}:{}", group.name, port.label));
                if group.count > 1 {
                    let (name, count) = (&group.name, group.count);
                    let message = format!(
                        "group {name:?} has count {count} and static port {number}: one node can give it to one allocation only"
                    );
                    let hint = "leave \"static\" out to get a port of the node's choice, or set count = 1";
                    self.session.report(Problem::new(self.session.span(&path), message).hint(hint));
                }
            }
        }
    }

    fn services(&self, group_index: usize, group: &Group) {
        let mut known = BTreeSet::new();
        for (index, service) in group.services.iter().enumerate() {
            let path = format!("group.{group_index}.service.{index}");
            let name = service.name.to_string();
            if !known.insert((name.clone(), format!("{:?}", service.port))) {
                self.report(&format!("{path}.name"), format!("service {name:?} is duplicate"));
            }
            self.port_label(&format!("{path}.port"), group, service.port.as_ref(), &name);
            if service.connect.is_some() {
                self.connect(&path, group, service, &name);
            }
            self.checks(&path, group, service, &name);
        }
    }

    fn connect(&self, path: &str, group: &Group, service: &Service, name: &str) {
        let literal = |part: &crate::Part| match part {
            crate::Part::Literal(text) => text.chars().any(char::is_uppercase),
            crate::Part::Reference { .. } => false,
        };
        if service.name.parts().iter().any(literal) {
            let group = &group.name;
            let message = format!(
                "Consul Connect service name {name:?} in group {group:?} must not contain uppercase characters"
            );
            self.report(&format!("{path}.name"), message);
        }
    }

    fn port_label(&self, path: &str, group: &Group, port: Option<&PortRef>, service: &str) {
        let Some(PortRef::Label(label)) = port else { return };
        if group.network.port(label).is_some() {
            return;
        }
        let message = format!("port label {label:?} referenced by services {service} does not exist");
        let labels = || group.network.ports.iter().map(|port| port.label.as_str());
        let hint = match crate::decode::closest(label, labels()) {
            Some(close) => format!("did you mean {close:?}?"),
            None => format!("add port {label:?} {{}} to the network of group {:?}", group.name),
        };
        self.session.report(Problem::new(self.session.span(path), message).hint(hint));
    }

    fn checks(&self, service_path: &str, group: &Group, service: &Service, name: &str) {
        let mut known = BTreeSet::new();
        for (index, check) in service.checks.iter().enumerate() {
            let path = format!("{service_path}.check.{index}");
            let check_name = check.name.to_string();
            if check.port.is_none() && service.port.is_none() {
                let message = format!(
                    "Check {check_name} invalid: check requires a port but neither check nor service {name:?} have a port"
                );
                self.report(&path, message);
            }
            self.port_label(&format!("{path}.port"), group, check.port.as_ref(), name);
            if service.connect.is_some() && check.kind == CheckKind::Tcp {
                let message =
                    format!("Check {check_name} invalid: tcp checks are not valid for Connect enabled services");
                let hint = "use type = \"http\"; the sidecar's own listener is checked anyway";
                self.session.report(Problem::new(self.session.span(&format!("{path}.type")), message).hint(hint));
            }
            if !known.insert(check_name.clone()) {
                self.report(&format!("{path}.name"), format!("check {check_name:?} is duplicate"));
            }
        }
    }

    /// All sidecars of a group listen in one network namespace.
    fn upstreams(&self, group_index: usize, group: &Group) {
        let mut binds: BTreeMap<SocketAddr, String> = BTreeMap::new();
        for (index, service) in group.services.iter().enumerate() {
            let Some(connect) = &service.connect else { continue };
            let name = service.name.to_string();
            for (upstream_index, upstream) in connect.sidecar.proxy.upstreams.iter().enumerate() {
                let path = format!(
                    "group.{group_index}.service.{index}.connect.sidecar_service.proxy.upstreams.{upstream_index}.local_bind_port"
                );
                let bind = SocketAddr::new(upstream.local_bind_address, upstream.local_bind_port);
                let both = std::iter::once(bind).chain(on_v6(bind));
                if let Some((bind, other)) = both.clone().find_map(|bind| Some((bind, binds.get(&bind)?))) {
                    let group = &group.name;
                    let message = format!(
                        "Consul Connect services {other:?} and {name:?} in group {group:?} using same address for upstreams ({bind})"
                    );
                    self.report(&path, message);
                }
                for bind in both {
                    binds.entry(bind).or_insert_with(|| name.clone());
                }
                let taken = group.services.iter().find(|service| inside_port(group, service) == Some(bind.port()));
                if let Some(taken) = taken {
                    let message = format!(
                        "upstream {:?} binds {bind}, where service {:?} of group {:?} listens",
                        upstream.destination_name,
                        taken.name.to_string(),
                        group.name
                    );
                    self.report(&path, message);
                }
            }
        }
    }
}

/// An upstream on 127.0.0.1 is on ::1 as well.
fn on_v6(bind: SocketAddr) -> Option<SocketAddr> {
    (bind.ip() == Ipv4Addr::LOCALHOST).then(|| SocketAddr::from((Ipv6Addr::LOCALHOST, bind.port())))
}

/// Where the application of `service` listens, if the job file says it.
fn inside_port(group: &Group, service: &Service) -> Option<u16> {
    match service.port.as_ref()? {
        PortRef::Number(port) => Some(*port),
        PortRef::Label(label) => group.network.port(label).and_then(|port| port.to.or(port.static_port)),
    }
}
