//! Leaf certificates: what is in one, and signing one.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyUsagePurpose, SanType,
    SerialNumber,
};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use culvert_types::ServiceIdentity;

use super::NOT_BEFORE_SLACK;
use super::csr::Csr;
use super::key::{PrivateKey, key_identifier};
use super::root::{colon_hex, whole_seconds};

/// A signed certificate, on its way back to who asked.
#[derive(Clone, Debug)]
pub struct SignedLeaf {
    /// Whose it is.
    pub identity: ServiceIdentity,
    /// Leaf, then the intermediates of its root (the cross-signed one while a rotation lasts); PEM.
    pub chain: String,
    /// Colon-separated hex.
    pub serial: String,
    /// Id of the root that signed.
    pub root_id: String,
    /// Start of validity.
    pub valid_after: SystemTime,
    /// End of validity.
    pub valid_before: SystemTime,
}

/// A certificate with its private key, as a proxy needs it. `Debug` leaves the key out.
#[derive(Clone)]
pub struct Leaf {
    /// The certificate.
    pub certificate: SignedLeaf,
    key: Zeroizing<String>,
}

impl Leaf {
    pub(crate) fn new(certificate: SignedLeaf, key: Zeroizing<String>) -> Self {
        Self { certificate, key }
    }

    /// The private key, SEC 1 PEM. It leaves this process only towards the proxy or application whose identity it is.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key
    }
}

impl PartialEq for Leaf {
    fn eq(&self, other: &Self) -> bool {
        self.certificate.chain == other.certificate.chain
    }
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// The root that signs, as [`sign`] needs it.
pub(crate) struct Signer<'a> {
    pub(crate) root_id: &'a str,
    pub(crate) certificate: &'a str,
    pub(crate) not_after: SystemTime,
    pub(crate) intermediates: &'a [String],
    pub(crate) key: &'a PrivateKey,
}

/// Signs a leaf for the checked request, valid from a minute ago for `ttl`, at most as long as the root.
///
/// Spec: SPIFFE X509-SVID §2 (one URI name), §4.1 (`cA` false), §4.3 and §4.4 (key usages); RFC 5280 §4.2.1.6 (the name is
/// critical because the subject is empty).
pub(crate) fn sign(
    signer: &Signer<'_>,
    csr: &Csr,
    serial: u64,
    now: SystemTime,
    ttl: Duration,
) -> Result<SignedLeaf, rcgen::Error> {
    let valid_after = whole_seconds(now - NOT_BEFORE_SLACK);
    let valid_before = whole_seconds(now + ttl).min(signer.not_after);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(csr.identity().to_string().try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
        KeyUsagePurpose::DataEncipherment,
        KeyUsagePurpose::KeyAgreement,
    ];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.key_identifier_method = KeyIdMethod::PreSpecified(key_identifier(csr.public_key()));
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from(serial));
    params.not_before = OffsetDateTime::from(valid_after);
    params.not_after = OffsetDateTime::from(valid_before);
    let issuer = Issuer::from_ca_cert_pem(signer.certificate, signer.key.pair())?;
    let mut chain = params.signed_by(csr.public_key(), &issuer)?.pem();
    for intermediate in signer.intermediates {
        chain.push_str(intermediate);
    }
    let identity = csr.identity().clone();
    let (serial, root_id) = (serial_hex(serial), signer.root_id.to_owned());
    Ok(SignedLeaf { identity, chain, serial, root_id, valid_after, valid_before })
}

/// `0a:1f`: the bytes of the number without leading zeros.
fn serial_hex(serial: u64) -> String {
    let bytes = serial.to_be_bytes();
    let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len() - 1);
    colon_hex(&bytes[first..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_print_without_leading_zeros() {
        assert_eq!(serial_hex(0), "00");
        assert_eq!(serial_hex(8), "08");
        assert_eq!(serial_hex(0x0a1f), "0a:1f");
    }
}
