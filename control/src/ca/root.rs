//! Roots: making one, letting the old one vouch for the new, and reading them back.
//!
//! The certificate fields are Consul's, so that proxies of both systems accept each other's roots: subject
//! `CN=pri-<8 base36>.consul.ca.<first 8 of the trust domain>.consul`, the trust domain as the only URI name, key usage
//! `keyCertSign, cRLSign, digitalSignature`, `CA:true`, key identifiers of 32 bytes.

use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyIdMethod, KeyUsagePurpose,
    SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use culvert_types::TrustDomain;

use super::key::{KeyError, PrivateKey};
use super::{NOT_BEFORE_SLACK, random};

/// Life of the certificate by which the old root vouches for the new one: long enough for every proxy to learn the new root.
pub(crate) const CROSS_SIGNED_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a root could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// Its key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The certificate.
    #[error("make the root certificate")]
    Certificate(#[from] rcgen::Error),
}

/// A fresh root, with the key it was made with.
pub(crate) struct NewRoot {
    pub(crate) key: PrivateKey,
    pub(crate) certificate: String,
    pub(crate) id: String,
    pub(crate) common_name: String,
    pub(crate) serial: u64,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

/// Makes a self-signed root for `trust_domain`, valid for `ttl` from `now`.
pub(crate) fn generate(
    trust_domain: &TrustDomain,
    serial: u64,
    now: SystemTime,
    ttl: Duration,
) -> Result<NewRoot, RootError> {
    let key = PrivateKey::generate()?;
    let common_name = common_name(trust_domain);
    let (not_before, not_after) = (whole_seconds(now - NOT_BEFORE_SLACK), whole_seconds(now + ttl));
    let params = params(trust_domain, &common_name, &key, serial, not_before, not_after)?;
    let certificate = params.self_signed(key.pair())?;
    let id = certificate_id(certificate.der());
    Ok(NewRoot { certificate: certificate.pem(), id, common_name, serial, not_before, not_after, key })
}

/// The certificate by which the holder of `old_key` vouches for `new`: name and key of the new root, signed by the old one.
pub(crate) fn cross_sign(
    trust_domain: &TrustDomain,
    new: &NewRoot,
    old_certificate: &str,
    old_key: &PrivateKey,
    serial: u64,
    now: SystemTime,
) -> Result<String, RootError> {
    let not_after = new.not_after.min(whole_seconds(now + CROSS_SIGNED_TTL));
    let mut params = params(trust_domain, &new.common_name, &new.key, serial, new.not_before, not_after)?;
    params.use_authority_key_identifier_extension = true;
    let issuer = Issuer::from_ca_cert_pem(old_certificate, old_key.pair())?;
    Ok(params.signed_by(new.key.pair(), &issuer)?.pem())
}

/// Certificate times have a resolution of one second.
pub(crate) fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// SHA-1 of the DER form as colon-separated hex: Consul's root id. A name, not a protection.
pub(crate) fn certificate_id(der: &CertificateDer<'_>) -> String {
    colon_hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, der).as_ref())
}

/// `aa:bb:cc`.
pub(crate) fn colon_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// Identifier of the root's key, as Consul's `SigningKeyID` shows it.
pub(crate) fn signing_key_id(key: &PrivateKey) -> String {
    colon_hex(&key.identifier())
}

fn common_name(trust_domain: &TrustDomain) -> String {
    let domain: String = trust_domain.as_str().chars().take(8).collect();
    format!("pri-{}.consul.ca.{domain}.consul", random::base36())
}

fn params(
    trust_domain: &TrustDomain,
    common_name: &str,
    key: &PrivateKey,
    serial: u64,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.subject_alt_names = vec![SanType::URI(trust_domain.id().try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params.key_identifier_method = KeyIdMethod::PreSpecified(key.identifier());
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from(serial));
    params.not_before = OffsetDateTime::from(not_before);
    params.not_after = OffsetDateTime::from(not_after);
    Ok(params)
}
