//! Host ports of an allocation.

use std::collections::{BTreeMap, BTreeSet};

use culvert_jobspec::{Network, PortBinding};

/// Dynamic ports, as Nomad's default range.
const DYNAMIC: std::ops::RangeInclusive<u16> = 20000..=20999;

/// A port that cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PortError {
    /// Another allocation has it.
    #[error("Static port {port} already reserved by another allocation (label {label:?})")]
    Taken {
        /// The port.
        port: u16,
        /// The label that asks for it.
        label: String,
    },
    /// Every dynamic port is taken.
    #[error("no dynamic port left in {}-{} for label {label:?}", DYNAMIC.start(), DYNAMIC.end())]
    Exhausted {
        /// The label that asks for one.
        label: String,
    },
}

/// Binds the ports of `network`; `used` are those of other allocations.
///
/// # Errors
/// [`PortError`] names the label.
pub(super) fn bind<'a>(
    network: &Network,
    used: impl Iterator<Item = &'a PortBinding>,
) -> Result<BTreeMap<String, PortBinding>, PortError> {
    let mut used: BTreeSet<u16> = used.map(|binding| binding.host).collect();
    // Static ones first: a dynamic one must not take the port that a later label names.
    let (fixed, dynamic): (Vec<_>, Vec<_>) = network.ports.iter().partition(|port| port.static_port.is_some());
    let mut bound = BTreeMap::new();
    for port in fixed.into_iter().chain(dynamic) {
        let host = match port.static_port {
            Some(host) if used.contains(&host) => {
                return Err(PortError::Taken { port: host, label: port.label.clone() });
            }
            Some(host) => host,
            None => DYNAMIC
                .clone()
                .find(|candidate| !used.contains(candidate) && free_on_host(*candidate))
                .ok_or_else(|| PortError::Exhausted { label: port.label.clone() })?,
        };
        used.insert(host);
        bound.insert(port.label.clone(), PortBinding { host, inside: port.to.unwrap_or(host) });
    }
    Ok(bound)
}

/// Nothing on the host listens there now. What comes later is refused when the port is published.
fn free_on_host(port: u16) -> bool {
    std::net::TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, port)).is_ok()
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
        let bound = bind(&wanted, std::iter::empty()).expect("free");
        assert_eq!(bound["http"], PortBinding { host: *DYNAMIC.start(), inside: 80 });
        assert_ne!(bound["any"].host, *DYNAMIC.start());
        assert_eq!(bound["any"].host, bound["any"].inside);
    }

    #[test]
    fn a_static_port_of_another_allocation_is_refused_by_number() {
        let used = [PortBinding { host: 9002, inside: 9002 }];
        let error = bind(&network(vec![port("http", Some(9002), None)]), used.iter()).expect_err("taken");
        assert!(error.to_string().starts_with("Static port 9002 already reserved by"), "{error}");
    }
}
