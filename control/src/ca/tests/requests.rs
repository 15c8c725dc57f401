//! Requests that ask for what they may not have.

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};

use super::world::{NODE, World, instance, name};
use crate::ca::csr::{Csr, CsrError, MAX_CSR};
use crate::ca::{CaSettings, SignError};

const TD: &str = "11111111-2222-3333-4444-555555555555.consul";

fn uri(text: &str) -> SanType {
    SanType::URI(text.to_owned().try_into().expect("IA5"))
}

fn web() -> SanType {
    uri(&format!("spiffe://{TD}/ns/default/dc/dc1/svc/web"))
}

fn params(names: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params
}

fn csr(params: &CertificateParams) -> Vec<u8> {
    let key = KeyPair::generate().expect("P-256");
    params.serialize_request(&key).expect("request").der().to_vec()
}

fn refusal(params: &CertificateParams) -> String {
    Csr::parse(&csr(params)).expect_err("hostile").to_string()
}

#[test]
fn an_honest_request_is_read_in_pem_and_der() {
    let key = KeyPair::generate().expect("P-256");
    let request = params(vec![web()]).serialize_request(&key).expect("request");
    for bytes in [request.der().to_vec(), request.pem().expect("PEM").into_bytes()] {
        let csr = Csr::parse(&bytes).expect("honest");
        assert_eq!(csr.identity().to_string(), format!("spiffe://{TD}/ns/default/dc/dc1/svc/web"));
    }
}

#[test]
fn exactly_one_uri_name_is_asked_for() {
    assert!(matches!(Csr::parse(&csr(&params(vec![]))), Err(CsrError::Names(0))));
    assert!(matches!(Csr::parse(&csr(&params(vec![web(), web()]))), Err(CsrError::Names(2))));
    let dns = SanType::DnsName("web.service.consul".to_owned().try_into().expect("IA5"));
    assert!(matches!(Csr::parse(&csr(&params(vec![web(), dns.clone()]))), Err(CsrError::Names(2))));
    assert!(refusal(&params(vec![dns])).contains("which is never given"));
    let spiffe_as_dns = SanType::DnsName(format!("spiffe://{TD}/ns/default/dc/dc1/svc/web").try_into().expect("IA5"));
    assert!(refusal(&params(vec![spiffe_as_dns])).contains("which is never given"));
}

#[test]
fn the_uri_is_the_identity_of_a_service() {
    let bad = [
        format!("spiffe://{TD}"),
        format!("spiffe://{TD}/ns/default/dc/dc1/svc/"),
        format!("spiffe://{TD}/ns/default/dc/dc1/svc/web/extra"),
        format!("spiffe://{TD}/ns/other/dc/dc1/svc/web"),
        format!("spiffe://{TD}/agent/client/dc/dc1/id/node1"),
        format!("spiffe://{TD}/ns/default/dc/dc1/svc/web?x=1"),
        format!("spiffe://{TD}/ns/default/dc/dc1/svc/%77eb"),
        format!("spiffe://{TD}:8443/ns/default/dc/dc1/svc/web"),
        format!("spiffe://user@{TD}/ns/default/dc/dc1/svc/web"),
        "https://example.org/".to_owned(),
        String::new(),
    ];
    for text in bad {
        let result = Csr::parse(&csr(&params(vec![uri(&text)])));
        assert!(matches!(result, Err(CsrError::Identity { .. })), "{text}: {result:?}");
    }
}

#[test]
fn nothing_else_may_be_asked_for() {
    let mut subject = params(vec![web()]);
    subject.distinguished_name.push(DnType::CommonName, "admin");
    assert!(refusal(&subject).contains("a subject"));
    let mut ca = params(vec![web()]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert!(refusal(&ca).contains("extension 2.5.29.19"));
    let mut not_ca = params(vec![web()]);
    not_ca.is_ca = IsCa::ExplicitNoCa;
    assert!(refusal(&not_ca).contains("extension 2.5.29.19"));
    let mut usage = params(vec![web()]);
    usage.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    assert!(refusal(&usage).contains("extension 2.5.29.15"));
    let mut extended = params(vec![web()]);
    extended.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    assert!(refusal(&extended).contains("extension 2.5.29.37"));
    let mut custom = params(vec![web()]);
    custom.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![0x05, 0x00])];
    assert!(refusal(&custom).contains("extension 1.2.3.4"));
    let key = KeyPair::generate().expect("P-256");
    let attribute =
        rcgen::Attribute { oid: &[1, 2, 840, 113_549, 1, 9, 7], values: vec![0x31, 0x03, 0x0c, 0x01, 0x61] };
    let request = params(vec![web()]).serialize_request_with_attributes(&key, vec![attribute]).expect("request");
    let error = Csr::parse(request.der()).expect_err("a challenge password").to_string();
    assert!(error.contains("attribute 1.2.840.113549.1.9.7"), "{error}");
}

#[test]
fn only_p256_keys_that_signed_the_request_are_certified() {
    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P521_SHA256] {
        let key = KeyPair::generate_for(algorithm).expect("key");
        let request = params(vec![web()]).serialize_request(&key).expect("request");
        assert!(matches!(Csr::parse(request.der()), Err(CsrError::Algorithm)), "{algorithm:?}");
    }
    // Another key under the same signature.
    let (key, other) = (KeyPair::generate().expect("key"), KeyPair::generate().expect("key"));
    let request = params(vec![web()]).serialize_request(&key).expect("request");
    let mut forged = request.der().to_vec();
    let at = forged.windows(65).position(|window| window == key.public_key_raw()).expect("the key");
    forged[at..at + 65].copy_from_slice(other.public_key_raw());
    assert!(matches!(Csr::parse(&forged), Err(CsrError::Signature)));
}

#[test]
fn a_curve_that_disagrees_with_the_signature_is_refused() {
    // A P-384 key whose request says ecdsa-with-SHA256.
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("key");
    let request = params(vec![web()]).serialize_request(&key).expect("request");
    let sha384 = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03];
    let mut forged = request.der().to_vec();
    let at = forged.windows(8).rposition(|window| window == sha384).expect("the algorithm");
    forged[at + 7] = 0x02;
    assert!(matches!(Csr::parse(&forged), Err(CsrError::Algorithm)));
}

#[test]
fn size_and_trailing_bytes_are_limited() {
    assert!(matches!(Csr::parse(&vec![0x30; MAX_CSR + 1]), Err(CsrError::TooLong)));
    let mut trailing = csr(&params(vec![web()]));
    trailing.push(0);
    assert!(matches!(Csr::parse(&trailing), Err(CsrError::Malformed)));
    assert!(matches!(Csr::parse(b""), Err(CsrError::Malformed)));
    assert!(Csr::parse(b"-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n").is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Csr::parse(&bytes).is_err());
    }

    #[test]
    fn a_request_with_any_changed_byte_is_never_another_identity(at in 0_usize..1000, flip in 1_u8..=255) {
        let mut bytes = csr(&params(vec![web()]));
        let at = at % bytes.len();
        bytes[at] ^= flip;
        if let Ok(csr) = Csr::parse(&bytes) {
            // Only the signature's own encoding leaves room for change without invalidating it.
            prop_assert_eq!(csr.identity().service.as_str(), "web");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn only_our_trust_domain_and_datacenter_are_signed() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let sign = async |identity: String| world.authority.sign(NODE, &csr(&params(vec![uri(&identity)]))).await;
    let ours = world.identity("web").to_string();
    sign(ours.clone()).await.expect("ours");
    let foreign = sign(format!("spiffe://{TD}/ns/default/dc/dc1/svc/web")).await;
    assert!(matches!(foreign, Err(SignError::Csr(CsrError::TrustDomain { .. }))), "{foreign:?}");
    let elsewhere = sign(ours.replace("/dc/dc1/", "/dc/dc2/")).await;
    assert!(matches!(elsewhere, Err(SignError::Csr(CsrError::Datacenter { .. }))), "{elsewhere:?}");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn only_a_service_of_the_asker_is_signed() {
    let world = World::new(CaSettings::default()).await;
    let mut elsewhere = instance("web");
    elsewhere.node = "node2".to_owned();
    world.put(elsewhere).await;
    let request = csr(&params(vec![uri(&world.identity("web").to_string())]));
    let refused = world.authority.sign(NODE, &request).await;
    assert!(
        matches!(&refused, Err(SignError::NotRegistered { service, .. }) if *service == name("web")),
        "{refused:?}"
    );
    world.authority.sign("node2", &request).await.expect("node2 has it");
    world.register("web").await;
    world.authority.sign(NODE, &request).await.expect("now node1 has it too");
    world.deregister("web").await;
    assert!(world.authority.sign(NODE, &request).await.is_err(), "and not any more");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn more_requests_than_the_limit_are_told_to_come_later() {
    let world = World::new(CaSettings { csr_max_per_second: 5, ..CaSettings::default() }).await;
    world.register("web").await;
    let request = csr(&params(vec![uri(&world.identity("web").to_string())]));
    for _ in 0..5 {
        world.authority.sign(NODE, &request).await.expect("within the limit");
    }
    let refused = world.authority.sign(NODE, &request).await.expect_err("the sixth");
    assert_eq!(refused.to_string(), "Rate limit reached, try again later");
    tokio::time::advance(std::time::Duration::from_secs(1)).await;
    world.authority.sign(NODE, &request).await.expect("a second later");
    world.stop.cancel();
}
