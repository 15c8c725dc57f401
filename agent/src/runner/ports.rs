//! Host ports of an allocation.

use std::collections::BTreeMap;

use culvert_jobspec::{Network, PortBinding};

use super::records::AllocationRecord;
use crate::workload::is_free;

/// Dynamic ports, as Nomad's default range.
const DYNAMIC: std::ops::RangeInclusive<u16> = 20000..=20999;

/// A port that cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PortError {
    /// Another allocation has it. Nomad's wording.
    #[error("Static port {port} already reserved by {owner}")]
    Taken {
        /// The port.
        port: u16,
        /// `<job>.<group>:<label>` of the other one.
        owner: String,
    },
    /// Every dynamic port is taken.
    #[error("no dynamic port left in {}-{} for label {label:?}", DYNAMIC.start(), DYNAMIC.end())]
    Exhausted {
        /// The label that asks for one.
        label: String,
    },
}

/// Who has a port, for the error of the next one who wants it.
pub(super) fn owner(job: &str, group: &str, label: &str) -> String {
    format!("{job}.{group}:{label}")
}

/// The host's ports of allocations, with their owners.
pub(super) fn used<'a>(allocations: impl Iterator<Item = &'a AllocationRecord>) -> BTreeMap<u16, String> {
    let of = |record: &'a AllocationRecord| {
        let ports = record.ports.iter();
        ports.map(|(label, port)| (port.host, owner(&record.job.id, &record.group, label)))
    };
    allocations.flat_map(of).collect()
}

/// Binds the ports of `network`; `used` are those of other allocations.
///
/// # Errors
/// [`PortError`].
pub(super) fn bind(
    network: &Network,
    mut used: BTreeMap<u16, String>,
) -> Result<BTreeMap<String, PortBinding>, PortError> {
    // Static ones first: a dynamic one must not take the port that a later label names.
    let (fixed, dynamic): (Vec<_>, Vec<_>) = network.ports.iter().partition(|port| port.static_port.is_some());
    let mut bound = BTreeMap::new();
    for port in fixed.into_iter().chain(dynamic) {
        let host = match port.static_port {
            Some(host) => match used.get(&host) {
                Some(owner) => return Err(PortError::Taken { port: host, owner: owner.clone() }),
                None => host,
            },
            // What the host takes later is refused when the port is published; then there is another choice.
            None => DYNAMIC
                .clone()
                .find(|candidate| !used.contains_key(candidate) && is_free(*candidate))
                .ok_or_else(|| PortError::Exhausted { label: port.label.clone() })?,
        };
        used.insert(host, port.label.clone());
        bound.insert(port.label.clone(), PortBinding { host, inside: port.to.unwrap_or(host) });
    }
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use culvert_jobspec::{NetworkMode, Port};

    use super::*;

    fn port(label: &str, static_port: Option<u16>, to: Option<u16>) -> Port {
        Port { label: label.to_owned(), static_port, to }
    }

    fn network(ports: Vec<Port>) -> Network {
        Network { mode: NetworkMode::Bridge, ports }
    }

    #[test]
    fn static_ports_keep_their_number_and_dynamic_ones_avoid_them() {
        let wanted = network(vec![port("any", None, None), port("http", Some(*DYNAMIC.start()), Some(80))]);
        let bound = bind(&wanted, BTreeMap::new()).expect("free");
        assert_eq!(bound["http"], PortBinding { host: *DYNAMIC.start(), inside: 80 });
        assert_ne!(bound["any"].host, *DYNAMIC.start());
        assert_eq!(bound["any"].host, bound["any"].inside);
    }

    #[test]
    fn a_static_port_of_another_allocation_is_refused_by_number() {
        let used = [(9002, owner("web", "g", "http"))].into();
        let error = bind(&network(vec![port("http", Some(9002), None)]), used).expect_err("taken");
        assert_eq!(error.to_string(), "Static port 9002 already reserved by web.g:http");
    }

    #[test]
    fn a_dynamic_port_is_one_that_can_be_published() {
        let wanted = network(vec![port("any", None, None)]);
        let chosen = || bind(&wanted, BTreeMap::new()).expect("free")["any"].host;
        let (udp, v6) = (chosen(), std::net::Ipv6Addr::LOCALHOST);
        let _udp = std::net::UdpSocket::bind(("127.0.0.1", udp)).expect("free");
        let tcp = chosen();
        let _tcp = std::net::TcpListener::bind((v6, tcp)).expect("free");
        assert!(![udp, tcp].contains(&chosen()) && udp != tcp);
    }
}
