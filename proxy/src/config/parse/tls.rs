//! TLS contexts: certificates, keys, roots, matchers.
//!
//! What a handshake would trip over later is refused here, where the control plane can be told: a chain that is no
//! certificate, a key of another certificate, a root that is none.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{DataSource, TransportSocket};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SubjectAltNameMatcher, TlsCertificate,
    TlsParameters, UpstreamTlsContext,
};
use prost::{Message, Name};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use zeroize::{Zeroize, Zeroizing};

use super::error::{Path, ResourceError};
use super::matcher::string_matcher;
use super::{refuse, unpack};
use crate::config::{DownstreamTls, Identity, StringMatcher, TlsVersion, UpstreamTls};
use crate::tls::own_identity;

/// Most certificates in the chain of an identity.
pub const MAX_CHAIN: usize = 10;
/// Most trusted roots of one TLS context.
pub const MAX_ROOTS: usize = 256;
/// Largest PEM text, in bytes.
pub const MAX_PEM: usize = 1 << 20;
/// Most subject alternative name matchers of one TLS context.
pub const MAX_SAN_MATCHERS: usize = 10_000;
/// Most application protocols of one TLS context.
pub const MAX_ALPN: usize = 16;

/// What both kinds of context have in common.
struct Common {
    identity: Arc<Identity>,
    roots: Arc<[CertificateDer<'static>]>,
    san_matchers: Vec<StringMatcher>,
    min_version: TlsVersion,
    max_version: TlsVersion,
    alpn: Vec<String>,
}

/// Reads the TLS of an inbound listener.
pub(super) fn downstream(socket: TransportSocket, path: &Path<'_>) -> Result<DownstreamTls, ResourceError> {
    let context: DownstreamTlsContext = typed_config(socket, path)?;
    let DownstreamTlsContext {
        common_tls_context,
        require_client_certificate,
        require_sni,
        disable_stateful_session_resumption,
        session_timeout,
        ocsp_staple_policy,
        full_scan_certs_on_sni_mismatch,
        prefer_client_ciphers,
        session_ticket_keys_type,
    } = context;
    refuse!(path;
        require_sni, disable_stateful_session_resumption, session_timeout, ocsp_staple_policy,
        full_scan_certs_on_sni_mismatch, prefer_client_ciphers, session_ticket_keys_type,
    );
    if !require_client_certificate.is_some_and(|required| required.value) {
        return Err(path.field("require_client_certificate").invalid("must be true on an inbound listener"));
    }
    let common = common(common_tls_context, &path.field("common_tls_context"))?;
    Ok(DownstreamTls {
        identity: common.identity,
        roots: common.roots,
        require_client_certificate: true,
        min_version: common.min_version,
        max_version: common.max_version,
        alpn: common.alpn,
        san_matchers: common.san_matchers,
    })
}

/// Reads the TLS of a cluster.
pub(super) fn upstream(socket: TransportSocket, path: &Path<'_>) -> Result<UpstreamTls, ResourceError> {
    let context: UpstreamTlsContext = typed_config(socket, path)?;
    #[expect(deprecated, reason = "it says what rustls does anyway")]
    let UpstreamTlsContext {
        common_tls_context,
        sni,
        auto_host_sni,
        auto_sni_san_validation,
        allow_renegotiation,
        max_session_keys,
        enforce_rsa_key_usage: _, // rustls always checks what a key may be used for
    } = context;
    refuse!(path; auto_host_sni, auto_sni_san_validation, allow_renegotiation, max_session_keys);
    if sni.is_empty() {
        return Err(path.field("sni").missing());
    }
    let common = common(common_tls_context, &path.field("common_tls_context"))?;
    if let Some(problem) = nameless(&common.identity, path) {
        return Err(problem);
    }
    ServerName::try_from(sni.as_str()).map_err(|_| path.field("sni").invalid(format!("{sni:?} is not a DNS name")))?;
    if common.san_matchers.is_empty() {
        // Envoy would accept every service of the trust domain as this one.
        return Err(path.field("common_tls_context.validation_context.match_typed_subject_alt_names").missing());
    }
    Ok(UpstreamTls {
        identity: common.identity,
        roots: common.roots,
        sni,
        san_matchers: common.san_matchers,
        min_version: common.min_version,
        max_version: common.max_version,
        alpn: common.alpn,
    })
}

/// What is wrong with an identity that does not say who we are: handshakes need to know.
pub(super) fn nameless(identity: &Identity, path: &Path<'_>) -> Option<ResourceError> {
    let path = path.field("common_tls_context");
    own_identity(identity).err().map(|error| path.item("tls_certificates", 0).field("certificate_chain").invalid(error))
}

fn typed_config<T: Message + Name + Default>(socket: TransportSocket, path: &Path<'_>) -> Result<T, ResourceError> {
    let TransportSocket { name: _, config_type } = socket; // the type URL says which one it is
    let Some(ConfigType::TypedConfig(mut any)) = config_type else {
        return Err(path.field("typed_config").missing());
    };
    let unpacked = unpack(&any, path);
    any.value.zeroize(); // it held a private key
    unpacked
}

fn common(context: Option<CommonTlsContext>, path: &Path<'_>) -> Result<Common, ResourceError> {
    #[expect(deprecated, reason = "old fields are looked at in order to refuse them")]
    let CommonTlsContext {
        tls_params,
        tls_certificates,
        tls_certificate_sds_secret_configs,
        tls_certificate_provider_instance,
        custom_tls_certificate_selector,
        tls_certificate_certificate_provider,
        tls_certificate_certificate_provider_instance,
        alpn_protocols,
        custom_handshaker,
        key_log,
        validation_context_type,
    } = context.ok_or_else(|| path.missing())?;
    refuse!(path;
        tls_certificate_sds_secret_configs, tls_certificate_provider_instance, custom_tls_certificate_selector,
        tls_certificate_certificate_provider, tls_certificate_certificate_provider_instance, custom_handshaker, key_log,
    );
    if alpn_protocols.len() > MAX_ALPN {
        return Err(path.field("alpn_protocols").too_many("protocols", MAX_ALPN));
    }
    if alpn_protocols.iter().any(|protocol| protocol.is_empty() || protocol.len() > 255) {
        return Err(path.field("alpn_protocols").invalid("a protocol name has 1 to 255 bytes")); // RFC 7301 §3.1
    }
    let (min_version, max_version) = versions(tls_params.unwrap_or_default(), &path.field("tls_params"))?;
    let (roots, san_matchers) = validation(validation_context_type, path)?;
    let identity = identity(tls_certificates, path)?;
    Ok(Common { identity, roots, san_matchers, min_version, max_version, alpn: alpn_protocols })
}

fn versions(parameters: TlsParameters, path: &Path<'_>) -> Result<(TlsVersion, TlsVersion), ResourceError> {
    let TlsParameters {
        tls_minimum_protocol_version,
        tls_maximum_protocol_version,
        cipher_suites,
        ecdh_curves,
        signature_algorithms,
        compliance_policies,
    } = parameters;
    refuse!(path; cipher_suites, ecdh_curves, signature_algorithms, compliance_policies);
    let version = |number: i32, field: &str, automatic: TlsVersion| match TlsProtocol::try_from(number) {
        Ok(TlsProtocol::TlsAuto) => Ok(automatic),
        Ok(TlsProtocol::TlSv12) => Ok(TlsVersion::V1_2),
        Ok(TlsProtocol::TlSv13) => Ok(TlsVersion::V1_3),
        Ok(TlsProtocol::TlSv10 | TlsProtocol::TlSv11) => {
            Err(path.field(field).invalid("culvert speaks TLS 1.2 and 1.3"))
        }
        Err(_) => Err(path.field(field).invalid(format!("unknown version {number}"))),
    };
    // What is not said: 1.2 for the peers of older control planes, which go no further as clients, up to the best there is.
    let min = version(tls_minimum_protocol_version, "tls_minimum_protocol_version", TlsVersion::V1_2)?;
    let max = version(tls_maximum_protocol_version, "tls_maximum_protocol_version", TlsVersion::V1_3)?;
    if min > max {
        return Err(path.invalid("the oldest version is newer than the newest"));
    }
    Ok((min, max))
}

fn validation(
    context: Option<ValidationContextType>,
    path: &Path<'_>,
) -> Result<(Arc<[CertificateDer<'static>]>, Vec<StringMatcher>), ResourceError> {
    let context = match context {
        Some(ValidationContextType::ValidationContext(context)) => context,
        Some(ValidationContextType::CombinedValidationContext(_)) => {
            return Err(path.field("combined_validation_context").unsupported());
        }
        Some(ValidationContextType::ValidationContextSdsSecretConfig(_)) => {
            return Err(path.field("validation_context_sds_secret_config").unsupported());
        }
        Some(_) => return Err(path.field("validation_context_certificate_provider").unsupported()),
        None => return Err(path.field("validation_context").missing()),
    };
    let path = path.field("validation_context");
    #[expect(deprecated, reason = "Consul up to 1.12 uses the untyped matchers")]
    let CertificateValidationContext {
        trusted_ca,
        ca_certificate_provider_instance,
        system_root_certs,
        watched_directory,
        verify_certificate_spki,
        verify_certificate_hash,
        match_typed_subject_alt_names,
        match_subject_alt_names,
        require_signed_certificate_timestamp,
        crl,
        allow_expired_certificate,
        trust_chain_verification,
        custom_validator_config,
        only_verify_leaf_cert_crl,
        max_verify_depth,
        suppress_client_ca_list,
    } = context;
    refuse!(path;
        ca_certificate_provider_instance, system_root_certs, watched_directory, verify_certificate_spki,
        verify_certificate_hash, require_signed_certificate_timestamp, crl, allow_expired_certificate,
        trust_chain_verification, custom_validator_config, only_verify_leaf_cert_crl, max_verify_depth,
        suppress_client_ca_list,
    );
    let matchers = san_matchers(match_typed_subject_alt_names, match_subject_alt_names, &path)?;
    Ok((roots(trusted_ca, &path.field("trusted_ca"))?, matchers))
}

/// Both spellings of matchers. Ours look at URIs alone: the only kind of name that a mesh certificate is known by.
fn san_matchers(
    typed: Vec<SubjectAltNameMatcher>,
    untyped: Vec<envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher>,
    path: &Path<'_>,
) -> Result<Vec<StringMatcher>, ResourceError> {
    if !typed.is_empty() && !untyped.is_empty() {
        return Err(path.field("match_subject_alt_names").invalid("cannot stand beside match_typed_subject_alt_names"));
    }
    if typed.len().max(untyped.len()) > MAX_SAN_MATCHERS {
        return Err(path.field("match_typed_subject_alt_names").too_many("matchers", MAX_SAN_MATCHERS));
    }
    let mut matchers = Vec::with_capacity(typed.len().max(untyped.len()));
    for (index, matcher) in typed.into_iter().enumerate() {
        let path = path.item("match_typed_subject_alt_names", index);
        let SubjectAltNameMatcher { san_type, matcher, oid } = matcher;
        refuse!(path; oid);
        if san_type != SanType::Uri as i32 {
            return Err(path.field("san_type").invalid("culvert matches URI names alone"));
        }
        let matcher = matcher.ok_or_else(|| path.field("matcher").missing())?;
        matchers.push(string_matcher(matcher, &path.field("matcher"))?);
    }
    for (index, matcher) in untyped.into_iter().enumerate() {
        matchers.push(string_matcher(matcher, &path.item("match_subject_alt_names", index))?);
    }
    Ok(matchers)
}

fn roots(source: Option<DataSource>, path: &Path<'_>) -> Result<Arc<[CertificateDer<'static>]>, ResourceError> {
    let pem = inline(source, path)?;
    let roots = certificates(&pem, MAX_ROOTS, path)?;
    for root in &roots {
        webpki::anchor_from_trusted_cert(root).map_err(|error| path.invalid(format!("not a root: {error}")))?;
    }
    Ok(roots.into())
}

fn identity(certificates_sent: Vec<TlsCertificate>, path: &Path<'_>) -> Result<Arc<Identity>, ResourceError> {
    if certificates_sent.len() > 1 {
        return Err(path.item("tls_certificates", 1).unsupported());
    }
    let path = path.item("tls_certificates", 0);
    let TlsCertificate {
        certificate_chain,
        private_key,
        pkcs12,
        watched_directory,
        private_key_provider,
        password,
        ocsp_staple,
        signed_certificate_timestamp,
        tls_params,
    } = certificates_sent.into_iter().next().ok_or_else(|| path.missing())?;
    refuse!(path;
        pkcs12, watched_directory, private_key_provider, password, ocsp_staple, signed_certificate_timestamp, tls_params,
    );
    let chain_path = path.field("certificate_chain");
    let chain = certificates(&inline(certificate_chain, &chain_path)?, MAX_CHAIN, &chain_path)?;
    let key_path = path.field("private_key");
    let pem = inline(private_key, &key_path)?;
    // The parser's error could quote what it read: it is not passed on.
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| key_path.invalid("not a private key in PEM"))?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    rustls::sign::CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider)
        .map_err(|error| path.invalid(error))?;
    Ok(Arc::new(Identity::new(chain, key)))
}

fn certificates(pem: &[u8], limit: usize, path: &Path<'_>) -> Result<Vec<CertificateDer<'static>>, ResourceError> {
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        if certificates.len() == limit {
            return Err(path.too_many("certificates", limit));
        }
        let certificate = certificate.map_err(|error| path.invalid(format!("not PEM: {error}")))?;
        webpki::EndEntityCert::try_from(&certificate)
            .map_err(|error| path.invalid(format!("certificate {}: {error}", certificates.len())))?;
        certificates.push(certificate);
    }
    if certificates.is_empty() { Err(path.invalid("no certificate in it")) } else { Ok(certificates) }
}

/// The bytes of an inline source, wiped after use: some are keys.
fn inline(source: Option<DataSource>, path: &Path<'_>) -> Result<Zeroizing<Vec<u8>>, ResourceError> {
    let DataSource { watched_directory, specifier } = source.ok_or_else(|| path.missing())?;
    refuse!(path; watched_directory);
    let bytes = match specifier {
        Some(Specifier::InlineString(text)) => Zeroizing::new(text.into_bytes()),
        Some(Specifier::InlineBytes(bytes)) => Zeroizing::new(bytes),
        Some(Specifier::Filename(_)) => return Err(path.field("filename").unsupported()),
        Some(Specifier::EnvironmentVariable(_)) => return Err(path.field("environment_variable").unsupported()),
        None => return Err(path.missing()),
    };
    if bytes.len() > MAX_PEM { Err(path.too_many("bytes", MAX_PEM)) } else { Ok(bytes) }
}
