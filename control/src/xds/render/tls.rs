//! TLS contexts, with certificates inline as Consul sends them.

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
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::BoolValue;
use prost::{Message, Name};

use super::pack;
use crate::xds::snapshot::{Snapshot, Target};

/// Accepts any service of the trust domain; RBAC says which of them may go on.
pub(super) fn downstream(snapshot: &Snapshot) -> TransportSocket {
    let ours = MatchPattern::Prefix(format!("{}/", snapshot.identity.trust_domain.id()));
    socket(&DownstreamTlsContext {
        common_tls_context: Some(common(snapshot, ours)),
        require_client_certificate: Some(BoolValue { value: true }),
        ..DownstreamTlsContext::default()
    })
}

/// Accepts the service that is called and no other.
pub(super) fn upstream(snapshot: &Snapshot, target: &Target) -> TransportSocket {
    socket(&UpstreamTlsContext {
        common_tls_context: Some(common(snapshot, MatchPattern::Exact(target.identity.to_string()))),
        sni: target.name.clone(),
        ..UpstreamTlsContext::default()
    })
}

fn common(snapshot: &Snapshot, peer: MatchPattern) -> CommonTlsContext {
    let matcher = Some(StringMatcher { match_pattern: Some(peer), ..StringMatcher::default() });
    let validation = CertificateValidationContext {
        trusted_ca: Some(inline(&snapshot.roots)),
        // Typed, so that a DNS name that looks like a SPIFFE ID does not count as one.
        match_typed_subject_alt_names: vec![SubjectAltNameMatcher {
            san_type: SanType::Uri as i32,
            matcher,
            ..SubjectAltNameMatcher::default()
        }],
        ..CertificateValidationContext::default()
    };
    CommonTlsContext {
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv13 as i32,
            // Envoy does not offer 1.3 as a client unless told.
            tls_maximum_protocol_version: TlsProtocol::TlSv13 as i32,
            ..TlsParameters::default()
        }),
        tls_certificates: vec![TlsCertificate {
            certificate_chain: Some(inline(&snapshot.leaf.certificate.chain)),
            private_key: Some(inline(snapshot.leaf.key_pem())),
            ..TlsCertificate::default()
        }],
        validation_context_type: Some(ValidationContextType::ValidationContext(validation)),
        ..CommonTlsContext::default()
    }
}

fn socket<T: Message + Name>(context: &T) -> TransportSocket {
    TransportSocket { name: "tls".to_owned(), config_type: Some(ConfigType::TypedConfig(pack(context))) }
}

fn inline(text: &str) -> DataSource {
    DataSource { specifier: Some(Specifier::InlineString(text.to_owned())), ..DataSource::default() }
}
