//! Identities and trust of TLS contexts.

use std::fmt;
use std::sync::Arc;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use super::StringMatcher;

/// A certificate chain and its private key. The key is wiped when the last holder drops it, and never printed.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<PrivateKeyDer<'static>>,
}

impl Identity {
    /// Joins a chain, leaf first, with the key of the leaf. Whether the two belong together is checked by who uses them.
    #[must_use]
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Self {
        Self { chain, key: Zeroizing::new(key) }
    }

    /// The chain, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The leaf's private key.
    #[must_use]
    pub fn key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain && self.key.secret_der() == other.key.secret_der()
    }
}

impl Eq for Identity {}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("certificates", &self.chain.len()).finish_non_exhaustive()
    }
}

/// A TLS protocol version that the worker speaks.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum TlsVersion {
    /// TLS 1.2 (RFC 5246).
    V1_2,
    /// TLS 1.3 (RFC 8446).
    V1_3,
}

/// How accepted connections are authenticated.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DownstreamTls {
    /// Who we are.
    pub identity: Arc<Identity>,
    /// Who may vouch for the peer.
    pub roots: Arc<[CertificateDer<'static>]>,
    /// Must the peer show a certificate? The parser accepts nothing else for inbound listeners.
    pub require_client_certificate: bool,
    /// Oldest version accepted.
    pub min_version: TlsVersion,
    /// Newest version accepted.
    pub max_version: TlsVersion,
    /// Application protocols in order of preference; empty for TCP.
    pub alpn: Vec<String>,
    /// If not empty, the peer's URI SAN must match one of them.
    pub san_matchers: Vec<StringMatcher>,
}

/// How we authenticate to an instance, and it to us.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UpstreamTls {
    /// Who we are.
    pub identity: Arc<Identity>,
    /// Who may vouch for the peer.
    pub roots: Arc<[CertificateDer<'static>]>,
    /// Server name to send; it is not what the certificate is checked against.
    pub sni: String,
    /// The peer's URI SAN must match one of them; never empty.
    pub san_matchers: Vec<StringMatcher>,
    /// Oldest version accepted.
    pub min_version: TlsVersion,
    /// Newest version accepted.
    pub max_version: TlsVersion,
    /// Application protocols in order of preference; empty for TCP.
    pub alpn: Vec<String>,
}
