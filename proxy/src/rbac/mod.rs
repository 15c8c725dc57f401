//! Role-based access control of a connection, exactly as Envoy's network RBAC filter decides.
//!
//! Owns the parsed rules and their evaluation; reading them from xDS is in `config`. Source:
//! `envoy.config.rbac.v3.RBAC`. The rules of evaluation, which are easy to get wrong:
//!
//! * `ALLOW`: allowed if and only if some policy matches. No policies: everything is denied.
//! * `DENY`: allowed if and only if no policy matches. No policies: everything is allowed.
//! * A policy matches if at least one of its permissions and at least one of its principals match.
//! * Several filters on a listener: every one has to allow.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::config::StringMatcher;

/// What a connection is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// The URI SAN of the peer's verified certificate, as it stands there; `None` if the peer showed none.
    pub identity: Option<&'a str>,
    /// Who connected.
    pub peer: SocketAddr,
    /// Where it connected to.
    pub local: SocketAddr,
}

/// What the policies of an [`Rbac`] mean.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum RbacAction {
    /// Policies list what is allowed.
    Allow,
    /// Policies list what is denied.
    Deny,
}

/// One RBAC filter.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rbac {
    /// What a matching policy means.
    pub action: RbacAction,
    /// In the order of their names, as Envoy looks at them.
    pub policies: Vec<Policy>,
}

/// One named rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Policy {
    /// The key in the filter's map, for example `consul-intentions-layer4`.
    pub name: Arc<str>,
    /// What is done; one of them must match.
    pub permissions: Vec<Permission>,
    /// Who does it; one of them must match.
    pub principals: Vec<Principal>,
}

/// A condition on what the connection is for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Permission {
    /// Always.
    Any,
    /// All of them.
    And(Vec<Permission>),
    /// At least one of them.
    Or(Vec<Permission>),
    /// Not this one.
    Not(Box<Permission>),
    /// The port connected to is in this range.
    DestinationPort(RangeInclusive<u16>),
    /// The address connected to is in this network.
    DestinationIp(Cidr),
}

/// A condition on who connects.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Principal {
    /// Anyone.
    Any,
    /// All of them.
    And(Vec<Principal>),
    /// At least one of them.
    Or(Vec<Principal>),
    /// Not this one.
    Not(Box<Principal>),
    /// A peer with a verified certificate, whose URI SAN matches if a matcher is given.
    Authenticated(Option<StringMatcher>),
    /// A peer whose address is in this network. Without proxy protocol Envoy's three kinds of source address are one.
    SourceIp(Cidr),
}

/// A network: address and prefix length.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cidr {
    network: u128,
    mask: u128,
    v4: bool,
}

impl Cidr {
    /// The network of `address` with a prefix of `length` bits; `None` if the address has fewer.
    #[must_use]
    pub fn new(address: IpAddr, length: u32) -> Option<Self> {
        let (bits, width, v4) = bits_of(address);
        let host = width.checked_sub(length)?;
        let mask = if host == 128 { 0 } else { u128::MAX << host };
        Some(Self { network: bits & mask, mask, v4 })
    }

    /// Is `address` in the network? IPv4 addresses written as IPv6 ones (RFC 4291 §2.5.5.2) count as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (bits, _, v4) = bits_of(address);
        self.v4 == v4 && bits & self.mask == self.network
    }
}

/// The bits of an address, how many there are, and whether they are IPv4's.
fn bits_of(address: IpAddr) -> (u128, u32, bool) {
    match address.to_canonical() {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32, true),
        IpAddr::V6(v6) => (v6.to_bits(), 128, false),
    }
}

/// What the RBAC filters say about a connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RbacDecision {
    /// May it go on?
    pub allowed: bool,
    /// The policy that decided; `None` if none matched.
    pub policy: Option<Arc<str>>,
}

/// Judges `connection` by `filters`, in order. The first that denies decides. No filter at all allows: the parser gives
/// every inbound listener at least one.
#[must_use]
pub fn evaluate(filters: &[Rbac], connection: &Connection<'_>) -> RbacDecision {
    let mut decision = RbacDecision { allowed: true, policy: None };
    for filter in filters {
        let next = filter.evaluate(connection);
        if !next.allowed {
            return next;
        }
        decision.policy = next.policy.or(decision.policy);
    }
    decision
}

impl Rbac {
    /// The filter that lets nothing pass: what holds where no policy is known.
    #[must_use]
    pub fn deny_all() -> Self {
        Self { action: RbacAction::Allow, policies: Vec::new() }
    }

    /// Judges `connection` by this filter alone.
    #[must_use]
    pub fn evaluate(&self, connection: &Connection<'_>) -> RbacDecision {
        let matching = self.policies.iter().find(|policy| policy.matches(connection));
        let allowed = match self.action {
            RbacAction::Allow => matching.is_some(),
            RbacAction::Deny => matching.is_none(),
        };
        RbacDecision { allowed, policy: matching.map(|policy| Arc::clone(&policy.name)) }
    }
}

impl Policy {
    fn matches(&self, connection: &Connection<'_>) -> bool {
        self.permissions.iter().any(|permission| permission.matches(connection))
            && self.principals.iter().any(|principal| principal.matches(connection))
    }
}

impl Permission {
    fn matches(&self, connection: &Connection<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::And(all) => all.iter().all(|one| one.matches(connection)),
            Self::Or(any) => any.iter().any(|one| one.matches(connection)),
            Self::Not(other) => !other.matches(connection),
            Self::DestinationPort(ports) => ports.contains(&connection.local.port()),
            Self::DestinationIp(network) => network.contains(connection.local.ip()),
        }
    }
}

impl Principal {
    fn matches(&self, connection: &Connection<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::And(all) => all.iter().all(|one| one.matches(connection)),
            Self::Or(any) => any.iter().any(|one| one.matches(connection)),
            Self::Not(other) => !other.matches(connection),
            Self::Authenticated(None) => connection.identity.is_some(),
            Self::Authenticated(Some(name)) => connection.identity.is_some_and(|identity| name.matches(identity)),
            Self::SourceIp(network) => network.contains(connection.peer.ip()),
        }
    }
}
