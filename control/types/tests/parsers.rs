//! Parsers of outside text: what they accept prints back to the same meaning, what they refuse breaks nothing.

use std::time::Duration;

use culvert_types::{
    Datacenter, ServiceIdentity, ServiceName, SpiffeError, SpiffeId, TrustDomain, format_go_duration, parse_go_duration,
};
use proptest::prelude::*;

fn label() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9]([a-zA-Z0-9_-]{0,9}[a-zA-Z0-9])?(\\.[a-zA-Z0-9]([a-zA-Z0-9_-]{0,9}[a-zA-Z0-9])?)?"
}

proptest! {
    #[test]
    fn a_service_identity_survives_its_text(domain in "[a-zA-Z0-9._-]{1,40}", dc in label(), service in label()) {
        let identity = ServiceIdentity {
            trust_domain: TrustDomain::new(&domain).expect("a domain"),
            datacenter: Datacenter::new(&dc).expect("a name"),
            service: ServiceName::new(&service).expect("a name"),
        };
        let text = identity.to_string();
        prop_assert_eq!(ServiceIdentity::parse(&text).expect("its own text"), identity);
        let canonical = SpiffeId::parse(&text).expect("a SPIFFE ID").to_string();
        prop_assert_eq!(canonical, text);
    }

    #[test]
    fn accepted_text_is_within_the_specification(text in "(spiffe|SPIFFE|http)://[ -~]{0,60}") {
        if let Ok(id) = SpiffeId::parse(&text) {
            let domain = id.trust_domain().as_str();
            prop_assert!(!domain.is_empty());
            prop_assert!(domain.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_')));
            let path = id.path();
            prop_assert!(path.is_empty() || path.starts_with('/'));
            for segment in path.split('/').skip(1) {
                prop_assert!(!segment.is_empty() && segment != "." && segment != "..", "{}", text);
            }
            for forbidden in ['?', '#', '%', '@', ':', ' ', '\\'] {
                prop_assert!(!id.to_string()["spiffe://".len()..].contains(forbidden), "{}", text);
            }
            prop_assert_eq!(SpiffeId::parse(&id.to_string()).expect("its own text"), id);
        }
    }

    #[test]
    fn no_text_breaks_a_parser(text in "\\PC{0,80}") {
        drop(SpiffeId::parse(&text));
        drop(SpiffeId::parse(&format!("spiffe://{text}")));
        drop(ServiceIdentity::parse(&format!("spiffe://td/ns/default/dc/{text}/svc/{text}")));
        drop(TrustDomain::new(&text));
        drop(ServiceName::new(&text));
        drop(parse_go_duration(&text));
    }

    #[test]
    fn a_trust_domain_is_compared_without_case(domain in "[a-zA-Z0-9.-]{1,40}") {
        let upper = TrustDomain::new(&domain.to_ascii_uppercase()).expect("a domain");
        prop_assert_eq!(upper, TrustDomain::new(&domain.to_ascii_lowercase()).expect("a domain"));
    }

    #[test]
    fn durations_survive_their_text(nanos in any::<u64>()) {
        let duration = Duration::from_nanos(nanos);
        let text = format_go_duration(duration);
        prop_assert_eq!(parse_go_duration(&text).expect("its own text"), duration, "{}", text);
    }
}

#[test]
fn only_consuls_service_form_is_a_service_identity() {
    let service = "spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/dc1/svc/web";
    assert_eq!(ServiceIdentity::parse(service).expect("a service").service.as_str(), "web");
    for text in [
        "spiffe://td.consul",
        "spiffe://td.consul/",
        "spiffe://td.consul/agent/client/dc/dc1/id/n1",
        "spiffe://td.consul/gateway/mesh/dc/dc1",
        "spiffe://td.consul/ns/other/dc/dc1/svc/web",
        "spiffe://td.consul/ap/default/ns/default/dc/dc1/svc/web",
        "spiffe://td.consul/ns/default/dc/dc1/svc/web/extra",
        "spiffe://td.consul/ns/default/dc/dc1/svc/",
        "spiffe://td.consul/ns/default/dc/dc1/svc/*",
        "spiffe://td.consul/ns/default/dc/dc1/svc/we%62",
        "spiffe://td.consul//ns/default/dc/dc1/svc/web",
        "spiffe://td.consul/ns/default/dc/dc1/svc/../svc/web",
        "spiffe://user@td.consul/ns/default/dc/dc1/svc/web",
        "spiffe://td.consul:443/ns/default/dc/dc1/svc/web",
        "spiffe:///ns/default/dc/dc1/svc/web",
        "https://td.consul/ns/default/dc/dc1/svc/web",
    ] {
        assert!(ServiceIdentity::parse(text).is_err(), "{text}");
    }
}

#[test]
fn lengths_are_limited() {
    let long = format!("spiffe://td/{}", "a".repeat(2048));
    assert_eq!(SpiffeId::parse(&long), Err(SpiffeError::TooLong));
    assert!(TrustDomain::new(&"a".repeat(256)).is_err());
}
