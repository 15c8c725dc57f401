//! Certificates and identities for tests, made fresh in each.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_types::{ConnectionEvent, ConnectionKind, Path, SpiffeId, Verdict};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::{DownstreamTls, Identity, StringMatcher, TlsVersion, UpstreamTls};

/// The trust domain of all tests.
pub(crate) const TRUST_DOMAIN: &str = "11111111-2222-3333-4444-555555555555.consul";

/// The SPIFFE ID of `service`.
pub(crate) fn spiffe(service: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{service}")
}

/// A certificate authority.
pub(crate) struct Authority {
    pub(crate) root: Certificate,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let serial: [u8; 8] = std::array::from_fn(uuid_byte);
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("root {serial:02x?}"));
        params.subject_alt_names.push(uri(&format!("spiffe://{TRUST_DOMAIN}")));
        let key = KeyPair::generate().expect("key");
        let root = params.self_signed(&key).expect("sign");
        Self { root, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn roots(&self) -> Arc<[CertificateDer<'static>]> {
        [self.root.der().clone()].into()
    }

    /// An ordinary identity of `service`.
    pub(crate) fn identity(&self, service: &str) -> Arc<Identity> {
        self.identity_with(leaf_params(&spiffe(service)))
    }

    /// An identity with any certificate.
    pub(crate) fn identity_with(&self, params: CertificateParams) -> Arc<Identity> {
        let key = KeyPair::generate().expect("key");
        let leaf = params.signed_by(&key, &self.issuer).expect("sign");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("key");
        Arc::new(Identity::new(vec![leaf.der().clone()], key))
    }

    /// TLS of the inbound listener of `service`.
    pub(crate) fn downstream(&self, service: &str) -> DownstreamTls {
        DownstreamTls {
            identity: self.identity(service),
            roots: self.roots(),
            require_client_certificate: true,
            min_version: TlsVersion::V1_3,
            max_version: TlsVersion::V1_3,
            alpn: vec![],
            san_matchers: vec![],
        }
    }

    /// TLS of `service`'s connections to `destination`.
    pub(crate) fn upstream(&self, service: &str, destination: &str) -> UpstreamTls {
        UpstreamTls {
            identity: self.identity(service),
            roots: self.roots(),
            sni: format!("{destination}.default.dc1.internal.{TRUST_DOMAIN}"),
            san_matchers: vec![StringMatcher::exact(&spiffe(destination), false).expect("matcher")],
            min_version: TlsVersion::V1_3,
            max_version: TlsVersion::V1_3,
            alpn: vec![],
        }
    }
}

/// A leaf with one URI name, as Consul makes them.
pub(crate) fn leaf_params(uri_name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![]).expect("params");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.subject_alt_names = vec![uri(uri_name)];
    params.is_ca = IsCa::ExplicitNoCa;
    params
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("ascii"))
}

/// A byte that differs from test to test: roots of two authorities must not look alike.
fn uuid_byte(index: usize) -> u8 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(index) & 0xff) as u8
}

/// An event that carries `number`.
pub(crate) fn event(number: u64) -> ConnectionEvent {
    ConnectionEvent {
        at: SystemTime::now(),
        kind: ConnectionKind::Close,
        path: Path::Proxied,
        verdict: Verdict::Allow,
        source: SpiffeId::parse(&spiffe("web")).ok(),
        destination: SpiffeId::parse(&spiffe("api")).ok(),
        reporter: "web-sidecar-proxy".to_owned(),
        inbound: false,
        rule: None,
        reason: None,
        detail: None,
        peer: None,
        bytes_to_destination: 0,
        bytes_to_source: number,
        duration: Duration::ZERO,
    }
}
