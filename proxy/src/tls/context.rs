//! What a handshake needs, made once per configuration.

use std::sync::Arc;

use culvert_types::TrustDomain;
use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::ServerName;

use super::leaf::Leaf;
use super::provider;
use super::verify::{PeerIdentity, PeerRefusal, PeerRole, Roots, RootsError, Verifier};
use crate::config::{DownstreamTls, Identity, StringMatcher, TlsVersion, UpstreamTls};

/// Why a TLS context cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The bundle.
    #[error("trusted roots: {0}")]
    Roots(#[source] RootsError),
    /// Our own chain is empty.
    #[error("certificate chain is empty")]
    NoCertificate,
    /// Our own leaf does not say who we are; the trust domain to pin is read from it.
    #[error("own certificate: {0}")]
    OwnIdentity(PeerRefusal),
    /// A connection without a client certificate has no identity to judge.
    #[error("client certificates are not required: every mesh connection is mutual TLS")]
    ClientCertificateOptional,
    /// No version between oldest and newest.
    #[error("oldest TLS version is newer than the newest")]
    Versions,
    /// The server name is no DNS name.
    #[error("server name {0:?} is not a DNS name")]
    Sni(String),
    /// Key and certificate do not belong together, or rustls cannot use them.
    #[error("certificate and key: {0}")]
    Key(#[source] rustls::Error),
}

/// For accepting connections.
#[derive(Debug)]
pub struct ServerContext {
    pub(super) config: Arc<ServerConfig>,
    own: PeerIdentity,
    not_after: Option<u64>,
}

/// For connecting to the instances of one cluster.
#[derive(Debug)]
pub struct ClientContext {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
    own: PeerIdentity,
    not_after: Option<u64>,
}

impl ServerContext {
    /// Prepares a listener's TLS.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn new(tls: &DownstreamTls) -> Result<Self, ContextError> {
        if !tls.require_client_certificate {
            return Err(ContextError::ClientCertificateOptional);
        }
        let (own, not_after) = own_identity(&tls.identity)?;
        let verifier = verifier(&own, &tls.roots, &tls.san_matchers, PeerRole::Client)?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&versions(tls.min_version, tls.max_version)?)
            .map_err(ContextError::Key)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(tls.identity.chain().to_vec(), tls.identity.key().clone_key())
            .map_err(ContextError::Key)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = alpn(&tls.alpn);
        config.enable_secret_extraction = true; // for `record`; the keys stay in this process
        Ok(Self { config: Arc::new(config), own, not_after })
    }

    /// Who we are.
    #[must_use]
    pub fn own(&self) -> &PeerIdentity {
        &self.own
    }

    /// When our certificate's life ends, seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> Option<u64> {
        self.not_after
    }
}

impl ClientContext {
    /// Prepares a cluster's TLS.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn new(tls: &UpstreamTls) -> Result<Self, ContextError> {
        let (own, not_after) = own_identity(&tls.identity)?;
        let verifier = verifier(&own, &tls.roots, &tls.san_matchers, PeerRole::Server)?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&versions(tls.min_version, tls.max_version)?)
            .map_err(ContextError::Key)?
            .dangerous() // rustls' word for a verifier of one's own; this one is stricter than the usual
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(tls.identity.chain().to_vec(), tls.identity.key().clone_key())
            .map_err(ContextError::Key)?;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = alpn(&tls.alpn);
        config.enable_secret_extraction = true; // for `record`; the keys stay in this process
        let name = ServerName::try_from(tls.sni.clone()).map_err(|_| ContextError::Sni(tls.sni.clone()))?;
        Ok(Self { config: Arc::new(config), name, own, not_after })
    }

    /// Who we are.
    #[must_use]
    pub fn own(&self) -> &PeerIdentity {
        &self.own
    }

    /// When our certificate's life ends, seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> Option<u64> {
        self.not_after
    }
}

/// Who `identity` says we are, and until when, in seconds since 1970.
pub(crate) fn own_identity(identity: &Identity) -> Result<(PeerIdentity, Option<u64>), ContextError> {
    let leaf = identity.chain().first().ok_or(ContextError::NoCertificate)?;
    let own = PeerIdentity::of_leaf(leaf).map_err(ContextError::OwnIdentity)?;
    let not_after = Leaf::read(leaf).ok().and_then(|leaf| leaf.not_after);
    Ok((own, not_after))
}

/// The pinned trust domain is our own: identities of another one are not ours to judge.
fn verifier(
    own: &PeerIdentity,
    roots: &[rustls_pki_types::CertificateDer<'_>],
    names: &[StringMatcher],
    role: PeerRole,
) -> Result<Verifier, ContextError> {
    let trust_domain: TrustDomain = own.id().trust_domain().clone();
    let roots = Roots::new(roots).map_err(ContextError::Roots)?;
    Ok(Verifier::new(roots, trust_domain, names.to_vec(), role))
}

fn versions(min: TlsVersion, max: TlsVersion) -> Result<Vec<&'static SupportedProtocolVersion>, ContextError> {
    let all = [(TlsVersion::V1_3, &rustls::version::TLS13), (TlsVersion::V1_2, &rustls::version::TLS12)];
    let within: Vec<_> =
        all.into_iter().filter(|(version, _)| (min..=max).contains(version)).map(|(_, known)| known).collect();
    if within.is_empty() { Err(ContextError::Versions) } else { Ok(within) }
}

fn alpn(protocols: &[String]) -> Vec<Vec<u8>> {
    protocols.iter().map(|protocol| protocol.clone().into_bytes()).collect()
}
