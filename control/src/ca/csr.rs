//! Certificate signing requests (PKCS #10, RFC 2986): making ours, and judging what others send.
//!
//! A request may ask for one thing only: a leaf for one service of our trust domain and datacenter, on a P-256 key that the
//! asker holds. Everything else in it (a subject, another name, `CA:true`, an extension, an attribute) is refused by name
//! rather than dropped, so that nobody believes to have received what they asked for.

use rcgen::{CertificateParams, CertificateSigningRequestParams, DistinguishedName, PublicKey, SanType};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256};
use x509_parser::prelude::FromDer;

use culvert_types::{Datacenter, ServiceIdentity, SpiffeError, TrustDomain};

use super::key::PrivateKey;

/// Longest request that is looked at, PEM or DER. Ours have some 500 bytes.
pub const MAX_CSR: usize = 16 * 1024;

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// More than [`MAX_CSR`] bytes.
    #[error("certificate request is longer than {MAX_CSR} bytes")]
    TooLong,
    /// Not a PKCS #10 request, or bytes after it.
    #[error("not a PKCS #10 certificate request")]
    Malformed,
    /// The asker does not hold the key, or the request was changed.
    #[error("certificate request is not signed by its own key")]
    Signature,
    /// Another algorithm or curve.
    #[error("certificate request must hold an EC P-256 key and be signed with ECDSA and SHA-256")]
    Algorithm,
    /// It asks for something that leaves do not have.
    #[error("certificate request asks for {0}, which is never given")]
    Asks(String),
    /// No URI, or more than one name.
    #[error("certificate request must hold exactly one URI name, it has {0} names")]
    Names(usize),
    /// The URI is not the identity of a service.
    #[error("certificate request for {uri:?}")]
    Identity {
        /// What the request holds.
        uri: String,
        /// What is wrong with it.
        #[source]
        reason: SpiffeError,
    },
    /// The identity belongs to somebody else's trust domain.
    #[error("certificate request for {identity}, but this authority signs only for trust domain {ours}")]
    TrustDomain {
        /// Whom the request names.
        identity: ServiceIdentity,
        /// The authority's.
        ours: TrustDomain,
    },
    /// The identity belongs to another datacenter.
    #[error("certificate request for {identity}, but this authority signs only for datacenter {ours}")]
    Datacenter {
        /// Whom the request names.
        identity: ServiceIdentity,
        /// The authority's.
        ours: Datacenter,
    },
}

/// A request that passed every check that needs no state.
#[derive(Clone, Debug)]
pub struct Csr {
    identity: ServiceIdentity,
    public_key: PublicKey,
}

impl Csr {
    /// Reads and checks a request, PEM or DER.
    ///
    /// # Errors
    /// [`CsrError`], the first rule that the request breaks.
    pub fn parse(bytes: &[u8]) -> Result<Self, CsrError> {
        if bytes.len() > MAX_CSR {
            return Err(CsrError::TooLong);
        }
        // DER always starts with a SEQUENCE.
        if bytes.first() == Some(&0x30) {
            return Self::from_der(&CertificateSigningRequestDer::from(bytes));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(bytes).map_err(|_| CsrError::Malformed)?;
        Self::from_der(&der)
    }

    fn from_der(der: &CertificateSigningRequestDer<'_>) -> Result<Self, CsrError> {
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        check_algorithm(&request)?;
        let uri = only_name(&request)?;
        let identity = ServiceIdentity::parse(&uri).map_err(|reason| CsrError::Identity { uri, reason })?;
        // Verifies the signature once more over the same bytes, and yields the key in the form that signing takes.
        let parsed = CertificateSigningRequestParams::from_der(der).map_err(|error| match error {
            rcgen::Error::InvalidCertificationRequestSignature => CsrError::Signature,
            _ => CsrError::Malformed,
        })?;
        Ok(Self { identity, public_key: parsed.public_key })
    }

    /// Whom the request is for.
    #[must_use]
    pub fn identity(&self) -> &ServiceIdentity {
        &self.identity
    }

    /// The key to certify.
    pub(crate) fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// Is the identity one that the authority of `trust_domain` and `datacenter` may sign?
    ///
    /// # Errors
    /// [`CsrError::TrustDomain`] or [`CsrError::Datacenter`].
    pub fn check_authority(&self, trust_domain: &TrustDomain, datacenter: &Datacenter) -> Result<(), CsrError> {
        if &self.identity.trust_domain != trust_domain {
            return Err(CsrError::TrustDomain { identity: self.identity.clone(), ours: trust_domain.clone() });
        }
        if &self.identity.datacenter != datacenter {
            return Err(CsrError::Datacenter { identity: self.identity.clone(), ours: datacenter.clone() });
        }
        Ok(())
    }
}

fn check_algorithm(request: &X509CertificationRequest<'_>) -> Result<(), CsrError> {
    let key = &request.certification_request_info.subject_pki.algorithm;
    let curve = key.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    let p256 = key.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY && curve == Some(OID_EC_P256);
    // The curve is checked here because rcgen derives it from the signature's algorithm.
    if !p256 || request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
        return Err(CsrError::Algorithm);
    }
    request.verify_signature().map_err(|_| CsrError::Signature)
}

/// The only thing the request asks for: one URI name.
fn only_name(request: &X509CertificationRequest<'_>) -> Result<String, CsrError> {
    let info = &request.certification_request_info;
    if info.subject.iter().next().is_some() {
        return Err(CsrError::Asks("a subject".to_owned()));
    }
    let mut names = Vec::new();
    let mut seen_extensions = false;
    for attribute in info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(extensions) = attribute.parsed_attribute() else {
            return Err(CsrError::Asks(format!("attribute {}", attribute.oid)));
        };
        if std::mem::replace(&mut seen_extensions, true) {
            return Err(CsrError::Asks("extensions twice".to_owned()));
        }
        for extension in &extensions.extensions {
            let ParsedExtension::SubjectAlternativeName(san) = extension.parsed_extension() else {
                return Err(CsrError::Asks(format!("extension {}", extension.oid)));
            };
            names.extend(san.general_names.iter());
        }
    }
    match names[..] {
        [GeneralName::URI(uri)] => Ok((*uri).to_owned()),
        [other] => Err(CsrError::Asks(format!("the name {other}"))),
        _ => Err(CsrError::Names(names.len())),
    }
}

/// Makes the request for `identity`, signed by `key`; PEM.
///
/// # Errors
/// rcgen's, when signing fails.
pub(crate) fn request(identity: &ServiceIdentity, key: &PrivateKey) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.serialize_request(key.pair())?.pem()
}
