//! The verdict on a packet that would open something on a workload's port: one function, used by `sk_lookup` and by tc.

use crate::tables::{PORT_PROTECTED, PORT_PUBLISHED, PORT_STEERED};

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Source {
    /// From the workload itself, within its namespace.
    Own,
    /// From another workload of this node.
    Workload,
    /// From anywhere else: the host, or beyond.
    Outside,
}

/// What arrives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Arrival {
    /// A TCP segment that belongs to no socket yet, with a valid authorisation for exactly this connection and workload.
    TcpAuthorised,
    /// Any other TCP segment that belongs to no socket yet.
    Tcp,
    /// A datagram.
    Udp,
}

/// What to do with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Admission {
    /// Not ours: the ordinary lookup goes on.
    Pass,
    /// To the application's listener.
    Application,
    /// To the worker's listener.
    Worker,
    /// Refused.
    Refuse,
}

/// Decides about a packet for a port of kind `rule` (a `PORT_…` constant; 0 when the port has no rule).
///
/// Steered ports belong to the worker whoever calls, the mutual TLS handshake decides there. A kind that this version does not
/// know is refused.
#[inline(always)]
#[must_use]
pub const fn admit(rule: u32, source: Source, arrival: Arrival) -> Admission {
    match rule {
        0 => Admission::Pass,
        PORT_STEERED => match arrival {
            Arrival::Tcp | Arrival::TcpAuthorised => Admission::Worker,
            Arrival::Udp => Admission::Pass,
        },
        PORT_PROTECTED | PORT_PUBLISHED => match (arrival, source) {
            (Arrival::TcpAuthorised, _) => Admission::Application,
            (_, Source::Own) => Admission::Pass,
            (_, Source::Outside) if rule == PORT_PUBLISHED => Admission::Pass,
            _ => Admission::Refuse,
        },
        _ => Admission::Refuse,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: [Source; 3] = [Source::Own, Source::Workload, Source::Outside];
    const ARRIVALS: [Arrival; 3] = [Arrival::TcpAuthorised, Arrival::Tcp, Arrival::Udp];

    #[test]
    fn a_port_without_a_rule_is_left_alone() {
        for source in SOURCES {
            for arrival in ARRIVALS {
                assert_eq!(admit(0, source, arrival), Admission::Pass);
            }
        }
    }

    #[test]
    fn only_an_authorised_connection_reaches_a_protected_application() {
        for rule in [PORT_PROTECTED, PORT_PUBLISHED] {
            for source in SOURCES {
                assert_eq!(admit(rule, source, Arrival::TcpAuthorised), Admission::Application);
            }
            for arrival in [Arrival::Tcp, Arrival::Udp] {
                assert_eq!(admit(rule, Source::Workload, arrival), Admission::Refuse);
                assert_eq!(admit(rule, Source::Own, arrival), Admission::Pass);
            }
        }
        for arrival in [Arrival::Tcp, Arrival::Udp] {
            assert_eq!(admit(PORT_PROTECTED, Source::Outside, arrival), Admission::Refuse);
            assert_eq!(admit(PORT_PUBLISHED, Source::Outside, arrival), Admission::Pass);
        }
    }

    #[test]
    fn a_steered_port_is_the_workers_whoever_calls() {
        for source in SOURCES {
            assert_eq!(admit(PORT_STEERED, source, Arrival::Tcp), Admission::Worker);
            assert_eq!(admit(PORT_STEERED, source, Arrival::TcpAuthorised), Admission::Worker);
        }
    }

    #[test]
    fn an_unknown_kind_of_port_is_refused() {
        for rule in [4, u32::MAX] {
            for source in SOURCES {
                for arrival in ARRIVALS {
                    assert_eq!(admit(rule, source, arrival), Admission::Refuse);
                }
            }
        }
    }
}
