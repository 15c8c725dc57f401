//! Is the peer who it must be? Chain by webpki, identity by SPIFFE's rules.
//!
//! [`verify_peer`] is pure and is all there is to it; the rustls verifiers at the end only call it. What a refusal becomes in
//! events is decided in [`PeerRole::refusal`] and in the handshake's error.
//!
//! Rules (SPIFFE X509-SVID §5): the chain leads to one of the bundle's roots at this time, by certificates that may sign; the
//! leaf may not sign, is good for the role its holder plays, and has exactly one URI name, which is a SPIFFE ID with a path
//! in the pinned trust domain. DNS names never identify anybody.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest;
use culvert_types::{RefusalReason, SpiffeId, TrustDomain};
use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::leaf::{Leaf, LeafError};
use super::provider;
use crate::config::StringMatcher;

/// Most certificates a peer may send, leaf included.
pub const MAX_CHAIN: usize = 8;
/// Most chains that a context remembers as good: peers of one service, which are its callers or its instances.
const MAX_KNOWN: usize = 128;
/// Most certificates in a chain that is remembered, leaf included; ours have one or two.
const MAX_KNOWN_CHAIN: usize = 3;

/// Why a bundle is not usable.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RootsError {
    /// Nobody could ever be verified.
    #[error("no root certificate")]
    Empty,
    /// One root cannot be read.
    #[error("root certificate {index}: {reason}")]
    Root {
        /// Position, from 0.
        index: usize,
        /// What webpki says.
        reason: webpki::Error,
    },
}

/// All trusted roots of a trust domain.
#[derive(Debug)]
pub struct Roots(Vec<TrustAnchor<'static>>);

impl Roots {
    /// Reads root certificates.
    ///
    /// # Errors
    /// [`RootsError`] if there is none, or one cannot be read.
    pub fn new(certificates: &[CertificateDer<'_>]) -> Result<Self, RootsError> {
        let anchor = |(index, certificate)| {
            let anchor = webpki::anchor_from_trusted_cert(certificate);
            anchor.map(|anchor| anchor.to_owned()).map_err(|reason| RootsError::Root { index, reason })
        };
        let anchors: Vec<_> = certificates.iter().enumerate().map(anchor).collect::<Result<_, _>>()?;
        if anchors.is_empty() { Err(RootsError::Empty) } else { Ok(Self(anchors)) }
    }
}

/// Which end of the handshake the peer is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PeerRole {
    /// It connected to us.
    Client,
    /// We connected to it.
    Server,
}

impl PeerRole {
    /// The reason in events and metrics for a certificate that is refused.
    #[must_use]
    pub fn refusal(self) -> RefusalReason {
        match self {
            Self::Client => RefusalReason::ClientCertificate,
            Self::Server => RefusalReason::ServerCertificate,
        }
    }
}

/// A verified peer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerIdentity {
    uri: Box<str>,
    id: SpiffeId,
}

impl PeerIdentity {
    /// The URI name as it stands in the certificate: what matchers and RBAC look at.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The same, parsed.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Reads the identity out of a leaf, by all rules that concern the leaf's names and usages alone.
    ///
    /// # Errors
    /// [`PeerRefusal`].
    pub fn of_leaf(leaf: &CertificateDer<'_>) -> Result<Self, PeerRefusal> {
        let leaf = Leaf::read(leaf).map_err(PeerRefusal::Malformed)?;
        if leaf.may_sign_certificates {
            return Err(PeerRefusal::MaySign);
        }
        let [uri] = leaf.uris[..] else { return Err(PeerRefusal::Uris(leaf.uris.len())) };
        let id = SpiffeId::parse(uri).map_err(|error| PeerRefusal::NotSpiffe(error.to_string()))?;
        if id.path().is_empty() {
            return Err(PeerRefusal::NotSpiffe(format!("{id} names a trust domain, not a workload")));
        }
        Ok(Self { uri: uri.into(), id })
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

/// Why a peer's certificate is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PeerRefusal {
    /// It sent none.
    #[error("peer sent no certificate")]
    Missing,
    /// It sent more than [`MAX_CHAIN`].
    #[error("peer sent {0} certificates, at most {MAX_CHAIN} are looked at")]
    TooMany(usize),
    /// The certificate's life is over.
    #[error("certificate has expired")]
    Expired,
    /// The certificate's life has not begun.
    #[error("certificate is not valid yet")]
    NotValidYet,
    /// No root of the bundle vouches for it.
    #[error("no trusted root vouches for the certificate")]
    UnknownIssuer,
    /// Anything else that webpki finds wrong with the chain.
    #[error("certificate chain: {0}")]
    Chain(webpki::Error),
    /// The extensions cannot be read.
    #[error("{0}")]
    Malformed(LeafError),
    /// The leaf's key usage lets it sign certificates (SPIFFE X509-SVID §4.3).
    #[error("leaf certificate may sign certificates")]
    MaySign,
    /// Not exactly one URI name.
    #[error("certificate has {0} URI names, a SPIFFE identity is exactly one")]
    Uris(usize),
    /// The URI name is not the SPIFFE ID of a workload.
    #[error("URI name: {0}")]
    NotSpiffe(String),
    /// Another trust domain.
    #[error("{peer} is not of trust domain {expected}")]
    ForeignTrustDomain {
        /// Who the peer says it is.
        peer: SpiffeId,
        /// The trust domain that is accepted.
        expected: TrustDomain,
    },
    /// A good identity, but not one of those expected here.
    #[error("{peer} is not an identity expected here")]
    Unexpected {
        /// Who the peer is.
        peer: SpiffeId,
    },
}

impl From<webpki::Error> for PeerRefusal {
    fn from(error: webpki::Error) -> Self {
        match error {
            webpki::Error::CertExpired { .. } => Self::Expired,
            webpki::Error::CertNotValidYet { .. } => Self::NotValidYet,
            webpki::Error::UnknownIssuer => Self::UnknownIssuer,
            other => Self::Chain(other),
        }
    }
}

/// The alert the peer gets: precise where TLS has a word for it, and never more than that.
impl From<PeerRefusal> for rustls::Error {
    fn from(refusal: PeerRefusal) -> Self {
        Self::InvalidCertificate(match refusal {
            PeerRefusal::Missing => return Self::NoCertificatesPresented,
            PeerRefusal::Expired => CertificateError::Expired,
            PeerRefusal::NotValidYet => CertificateError::NotValidYet,
            PeerRefusal::UnknownIssuer => CertificateError::UnknownIssuer,
            PeerRefusal::Malformed(_) => CertificateError::BadEncoding,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

/// Verifies the chain that a peer sent, leaf first, and says who it is.
///
/// # Errors
/// [`PeerRefusal`]: the first rule that is broken.
pub fn verify_peer(
    chain: &[CertificateDer<'_>],
    roots: &Roots,
    trust_domain: &TrustDomain,
    role: PeerRole,
    now: UnixTime,
) -> Result<PeerIdentity, PeerRefusal> {
    let [leaf, intermediates @ ..] = chain else { return Err(PeerRefusal::Missing) };
    if chain.len() > MAX_CHAIN {
        return Err(PeerRefusal::TooMany(chain.len()));
    }
    let usage = match role {
        PeerRole::Client => KeyUsage::client_auth(),
        PeerRole::Server => KeyUsage::server_auth(),
    };
    let algorithms = provider().signature_verification_algorithms.all;
    EndEntityCert::try_from(leaf)?.verify_for_usage(algorithms, &roots.0, intermediates, now, usage, None, None)?;
    let peer = PeerIdentity::of_leaf(leaf)?;
    if peer.id.trust_domain() != trust_domain {
        return Err(PeerRefusal::ForeignTrustDomain { peer: peer.id, expected: trust_domain.clone() });
    }
    Ok(peer)
}

/// [`verify_peer`] with everything that one TLS context fixes. What it found good before, byte by byte, it need not compute again:
/// roots, names and role are the same, and the clock is looked at each time. That the peer has the key, every handshake proves.
///
/// Peers choose what is remembered: certificates that nobody needs, behind a good leaf, make any number of good chains. They
/// displace those that are not in use, and cost their holder a handshake each.
#[derive(Debug)]
pub(super) struct Verifier {
    roots: Roots,
    trust_domain: TrustDomain,
    /// If not empty, one must match the URI name.
    names: Vec<StringMatcher>,
    role: PeerRole,
    /// The one used last comes first.
    known: Mutex<VecDeque<Known>>,
}

/// A chain that was found good.
#[derive(Debug)]
struct Known {
    chain: Fingerprint,
    /// When it was found good, and the first end of a certificate in it: seconds since 1970.
    good: Range<u64>,
}

/// Stands for a chain: small, whatever a peer sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Fingerprint([u8; digest::SHA256_OUTPUT_LEN]);

impl Fingerprint {
    /// `None` for a chain that is too long to be remembered.
    fn of(leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Option<Self> {
        if rest.len() >= MAX_KNOWN_CHAIN {
            return None;
        }
        let mut context = digest::Context::new(&digest::SHA256);
        for certificate in std::iter::once(leaf).chain(rest) {
            // Where one ends is part of it: other certificates may be the same bytes when put together.
            context.update(&certificate.len().to_be_bytes());
            context.update(certificate);
        }
        context.finish().as_ref().try_into().ok().map(Self)
    }
}

impl Verifier {
    pub(super) fn new(roots: Roots, trust_domain: TrustDomain, names: Vec<StringMatcher>, role: PeerRole) -> Self {
        Self { roots, trust_domain, names, role, known: Mutex::default() }
    }

    fn verify(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>], now: UnixTime) -> Result<(), PeerRefusal> {
        let fingerprint = Fingerprint::of(leaf, rest);
        if fingerprint.is_some_and(|fingerprint| self.knows(fingerprint, now)) {
            return Ok(());
        }
        let chain: Vec<CertificateDer<'_>> = std::iter::once(leaf).chain(rest).cloned().collect();
        let peer = verify_peer(&chain, &self.roots, &self.trust_domain, self.role, now)?;
        if !self.names.is_empty() && !self.names.iter().any(|name| name.matches(peer.uri())) {
            return Err(PeerRefusal::Unexpected { peer: peer.id });
        }
        if let Some(fingerprint) = fingerprint {
            self.remember(fingerprint, &chain, now);
        }
        Ok(())
    }

    /// Was exactly this chain found good, and is it still?
    fn knows(&self, chain: Fingerprint, now: UnixTime) -> bool {
        let mut known = self.known.lock();
        let good = known.iter().position(|known| known.chain == chain && known.good.contains(&now.as_secs()));
        let Some(used) = good.and_then(|at| known.remove(at)) else { return false };
        known.push_front(used);
        true
    }

    fn remember(&self, fingerprint: Fingerprint, chain: &[CertificateDer<'_>], now: UnixTime) {
        let ends = chain.iter().map(|certificate| Leaf::read(certificate).ok()?.not_after);
        // One whose end cannot be read is verified each time.
        let Some(end) = ends.collect::<Option<Vec<_>>>().and_then(|ends| ends.into_iter().min()) else { return };
        let mut known = self.known.lock();
        known.retain(|known: &Known| known.chain != fingerprint && now.as_secs() < known.good.end);
        known.truncate(MAX_KNOWN - 1);
        known.push_front(Known { chain: fingerprint, good: now.as_secs()..end });
    }
}

fn algorithms() -> &'static WebPkiSupportedAlgorithms {
    &provider().signature_verification_algorithms
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[] // a mesh client has one identity: nothing to choose by hints
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>, // the SNI is routing information; the identity is the URI name
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// The clock of the machine, as certificates count.
#[must_use]
pub fn now() -> UnixTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixTime::since_unix_epoch(since)
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
