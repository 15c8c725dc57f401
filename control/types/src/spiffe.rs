//! SPIFFE identities in the form Consul gives them.
//!
//! Owns parsing and printing of trust domains and SPIFFE IDs. Source: SPIFFE-ID §2 (syntax), Consul's service path
//! `/ns/<namespace>/dc/<datacenter>/svc/<service>`. Certificates are read elsewhere; here is only text.

use std::fmt;
use std::str::FromStr;

use crate::name::{Datacenter, NameError, ServiceName};

/// Longest SPIFFE ID (SPIFFE-ID §2.3).
pub const MAX_SPIFFE_ID: usize = 2048;
/// Longest trust domain name (SPIFFE-ID §2.1: a host of at most 255 bytes).
pub const MAX_TRUST_DOMAIN: usize = 255;
/// The only namespace of the community edition.
const NAMESPACE: &str = "default";

/// Why a text is not a SPIFFE ID, or not the kind of SPIFFE ID asked for.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SpiffeError {
    /// Not `spiffe://…`.
    #[error("{0:?} does not start with spiffe://")]
    Scheme(String),
    /// Longer than [`MAX_SPIFFE_ID`].
    #[error("SPIFFE ID is longer than {MAX_SPIFFE_ID} bytes")]
    TooLong,
    /// Empty, too long, or a byte outside `a-z 0-9 . - _` (upper case is lowered first).
    #[error("{0:?} is not a trust domain")]
    TrustDomain(String),
    /// An empty segment, `.`/`..`, a trailing slash, a query, a fragment or a byte outside the allowed set.
    #[error("{0:?} is not a SPIFFE path")]
    Path(String),
    /// A valid SPIFFE ID that names no service.
    #[error("{0:?} is not the identity of a service (/ns/default/dc/<dc>/svc/<service>)")]
    NotAService(String),
    /// A name inside the path is not acceptable.
    #[error("service identity")]
    Name(#[from] NameError),
}

/// The authority of a SPIFFE ID, stored in lower case: comparison is case-insensitive by construction.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct TrustDomain(Box<str>);

impl TrustDomain {
    /// Parses `text` (no scheme, no path), lowering its case.
    ///
    /// # Errors
    /// [`SpiffeError::TrustDomain`]. Spec: SPIFFE-ID §2.1.
    pub fn new(text: &str) -> Result<Self, SpiffeError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > MAX_TRUST_DOMAIN || !text.bytes().all(allowed) {
            return Err(SpiffeError::TrustDomain(text.chars().take(MAX_TRUST_DOMAIN).collect()));
        }
        Ok(Self(text.to_ascii_lowercase().into()))
    }

    /// The name, lower case.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of the trust domain itself, as roots carry it: `spiffe://<trust domain>`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("spiffe://{}", self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        Self::new(text)
    }
}

/// Any valid SPIFFE ID: trust domain and path.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    path: Box<str>,
}

impl SpiffeId {
    /// Parses a whole URI.
    ///
    /// # Errors
    /// [`SpiffeError`] naming the part that is wrong. Spec: SPIFFE-ID §2: no query, fragment, user, port or percent-encoding.
    pub fn parse(text: &str) -> Result<Self, SpiffeError> {
        if text.len() > MAX_SPIFFE_ID {
            return Err(SpiffeError::TooLong);
        }
        let scheme = text.get(..9).filter(|scheme| scheme.eq_ignore_ascii_case("spiffe://"));
        let Some(rest) = scheme.map(|_| &text[9..]) else {
            return Err(SpiffeError::Scheme(text.to_owned()));
        };
        let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        let trust_domain = TrustDomain::new(authority)?;
        check_path(path)?;
        Ok(Self { trust_domain, path: path.into() })
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading slash; empty for the trust domain's own ID.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

fn check_path(path: &str) -> Result<(), SpiffeError> {
    if path.is_empty() {
        return Ok(());
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let segment =
        |segment: &str| !segment.is_empty() && segment != "." && segment != ".." && segment.bytes().all(allowed);
    if path[1..].split('/').all(segment) { Ok(()) } else { Err(SpiffeError::Path(path.to_owned())) }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        Self::parse(text)
    }
}

/// The identity of a service: what intentions are about and what a leaf certificate carries as its only URI SAN.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServiceIdentity {
    /// Trust domain of the cluster.
    pub trust_domain: TrustDomain,
    /// Where the service runs. Intentions do not look at it.
    pub datacenter: Datacenter,
    /// The service.
    pub service: ServiceName,
}

impl ServiceIdentity {
    /// The URI form.
    #[must_use]
    pub fn id(&self) -> SpiffeId {
        let path = format!("/ns/{NAMESPACE}/dc/{}/svc/{}", self.datacenter, self.service);
        SpiffeId { trust_domain: self.trust_domain.clone(), path: path.into() }
    }

    /// Reads `spiffe://<td>/ns/default/dc/<dc>/svc/<service>`.
    ///
    /// # Errors
    /// [`SpiffeError`]; [`SpiffeError::NotAService`] for agents, gateways, other namespaces and partitions.
    pub fn parse(text: &str) -> Result<Self, SpiffeError> {
        Self::try_from(SpiffeId::parse(text)?)
    }
}

impl TryFrom<SpiffeId> for ServiceIdentity {
    type Error = SpiffeError;
    fn try_from(id: SpiffeId) -> Result<Self, SpiffeError> {
        let segments: Vec<&str> = id.path().split('/').collect();
        let ["", "ns", NAMESPACE, "dc", datacenter, "svc", service] = segments[..] else {
            return Err(SpiffeError::NotAService(id.to_string()));
        };
        let (datacenter, service) = (Datacenter::new(datacenter)?, ServiceName::new(service)?);
        Ok(Self { trust_domain: id.trust_domain, datacenter, service })
    }
}

impl fmt::Display for ServiceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id().fmt(f)
    }
}
