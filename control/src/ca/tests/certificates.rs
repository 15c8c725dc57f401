//! Field by field: roots and leaves look as Consul's do.

use std::time::{Duration, SystemTime};

use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::world::{START, World, ders, sidecar, verify};
use crate::ca::CaSettings;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn only_uri(certificate: &X509Certificate<'_>) -> (String, bool) {
    let san = certificate.get_extension_unique(&OID_X509_EXT_SUBJECT_ALT_NAME).expect("one").expect("SAN");
    let ParsedExtension::SubjectAlternativeName(names) = san.parsed_extension() else { panic!("a parsed SAN") };
    let [GeneralName::URI(uri)] = names.general_names[..] else { panic!("one URI, got {names:?}") };
    (uri.to_owned(), san.critical)
}

#[tokio::test(start_paused = true)]
async fn a_root_looks_as_consuls() {
    let world = World::new(CaSettings::default()).await;
    let roots = world.authority.roots().expect("rows");
    let [root] = &roots.roots[..] else { panic!("one root") };
    let der = &ders(&root.certificate)[0];
    let (rest, certificate) = X509Certificate::from_der(der).expect("DER");
    assert!(rest.is_empty());
    let domain = world.trust_domain();
    let prefix = &domain.as_str()[..8];
    let subject = certificate.subject().to_string();
    let random =
        subject.strip_prefix("CN=pri-").and_then(|rest| rest.strip_suffix(&format!(".consul.ca.{prefix}.consul")));
    let random = random.unwrap_or_else(|| panic!("subject {subject}"));
    assert!(random.len() == 8 && random.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase()));
    assert_eq!(certificate.issuer().to_string(), subject);
    assert_eq!(only_uri(&certificate), (domain.id(), false));
    assert!(certificate.is_ca());
    assert_eq!(certificate.basic_constraints().expect("one").expect("some").value.path_len_constraint, None);
    let usage = certificate.key_usage().expect("one").expect("some").value;
    assert!(usage.key_cert_sign() && usage.crl_sign() && usage.digital_signature());
    assert_eq!(usage.flags.count_ones(), 3);
    assert!(certificate.extended_key_usage().expect("one").is_none());
    assert_eq!(certificate.validity().not_before.timestamp(), START.as_secs() as i64 - 60);
    assert_eq!(certificate.validity().not_after.timestamp(), (START + 3650 * DAY).as_secs() as i64);
    assert_eq!(certificate.raw_serial_as_string(), "01");
    certificate.verify_signature(None).expect("self-signed");
    let key_id = certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    });
    assert_eq!(key_id.expect("SKI").len(), 32, "as Consul: the whole SHA-256");
    assert_eq!(root.id.len(), 59, "SHA-1 with colons: {}", root.id);
    assert!(root.active && root.intermediates.is_empty() && roots.active_id == root.id);
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_leaf_looks_as_consuls() {
    let world = World::new(CaSettings::default()).await;
    world.register("count-api").await;
    let leaf = world.leaf("count-api").await;
    let der = &ders(&leaf.certificate.chain)[0];
    let (_, certificate) = X509Certificate::from_der(der).expect("DER");
    assert_eq!(certificate.subject().to_string(), "");
    assert_eq!(only_uri(&certificate), (world.identity("count-api").to_string(), true));
    assert!(!certificate.is_ca());
    assert!(certificate.basic_constraints().expect("one").expect("present").critical);
    let usage = certificate.key_usage().expect("one").expect("some").value;
    assert!(
        usage.digital_signature() && usage.key_encipherment() && usage.data_encipherment() && usage.key_agreement()
    );
    assert_eq!(usage.flags.count_ones(), 4);
    let extended = certificate.extended_key_usage().expect("one").expect("some").value;
    assert!(extended.client_auth && extended.server_auth && !extended.any && extended.other.is_empty());
    assert_eq!(certificate.validity().not_before.timestamp(), START.as_secs() as i64 - 60);
    assert_eq!(certificate.validity().not_after.timestamp(), (START + 3 * DAY).as_secs() as i64);
    assert_eq!(leaf.certificate.serial, certificate.raw_serial_as_string());
    verify(&leaf.certificate.chain, &world.bundle(), world.clock.now()).expect("webpki accepts it");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn the_key_is_sec1_and_belongs_to_the_certificate() {
    let world = World::new(CaSettings::default()).await;
    world.put(sidecar("web")).await;
    let leaf = world.leaf("web").await;
    assert!(leaf.key_pem().starts_with("-----BEGIN EC PRIVATE KEY-----\n"));
    assert!(leaf.key_pem().lines().all(|line| line.len() <= 64));
    let PrivateKeyDer::Sec1(key) = PrivateKeyDer::from_pem_slice(leaf.key_pem().as_bytes()).expect("PEM") else {
        panic!("SEC 1")
    };
    let curve = &aws_lc_rs::signature::ECDSA_P256_SHA256_ASN1_SIGNING;
    let pair = aws_lc_rs::signature::EcdsaKeyPair::from_private_key_der(curve, key.secret_sec1_der()).expect("P-256");
    let der = &ders(&leaf.certificate.chain)[0];
    let (_, certificate) = X509Certificate::from_der(der).expect("DER");
    use aws_lc_rs::signature::KeyPair as _;
    assert_eq!(certificate.public_key().subject_public_key.data.as_ref(), pair.public_key().as_ref());
    assert!(!format!("{leaf:?}").contains("PRIVATE"), "no key in Debug");
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn no_private_key_but_the_active_roots_is_stored() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    world.leaf("web").await;
    world.authority.rotate().await.expect("rotation");
    world.leaf("web").await;
    let contents = world.store.load().await.expect("memory");
    let keys = contents.rows.iter().filter(|(_, row)| String::from_utf8_lossy(&row.value).contains("PRIVATE KEY"));
    let active = world.authority.roots().expect("rows").active_id.clone();
    assert_eq!(keys.map(|(key, _)| key.key.clone()).collect::<Vec<_>>(), [format!("root/{active}")]);
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn an_expired_leaf_is_not_accepted_and_one_of_another_mesh_neither() {
    let (world, other) = (World::new(CaSettings::default()).await, World::new(CaSettings::default()).await);
    assert_ne!(world.trust_domain(), other.trust_domain());
    world.register("web").await;
    let leaf = world.leaf("web").await;
    let at = leaf.certificate.valid_before + Duration::from_secs(1);
    assert!(matches!(verify(&leaf.certificate.chain, &world.bundle(), at), Err(webpki::Error::CertExpired { .. })));
    let before = leaf.certificate.valid_after - Duration::from_secs(1);
    assert!(verify(&leaf.certificate.chain, &world.bundle(), before).is_err());
    assert!(verify(&leaf.certificate.chain, &other.bundle(), world.clock.now()).is_err());
    world.stop.cancel();
    other.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_leaf_never_outlives_its_root() {
    let settings = CaSettings {
        leaf_ttl: Duration::from_secs(100),
        root_ttl: Duration::from_secs(150),
        allow_short_ttls_for_tests: true,
        ..CaSettings::default()
    };
    let world = World::new(settings).await;
    world.register("web").await;
    tokio::time::advance(Duration::from_secs(90)).await;
    let leaf = world.leaf("web").await;
    assert_eq!(leaf.certificate.valid_before, SystemTime::UNIX_EPOCH + START + Duration::from_secs(150));
    world.stop.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_reopened_authority_is_the_same_one_and_never_repeats_a_serial_number() {
    let world = World::new(CaSettings::default()).await;
    world.register("web").await;
    let first = world.leaf("web").await;
    world.stop.cancel();
    let again = World::on(world.store.clone(), CaSettings::default(), world.clock.clone()).await;
    assert_eq!(again.trust_domain(), world.trust_domain());
    assert_eq!(again.bundle(), world.bundle());
    let second = again.leaf("web").await;
    assert_ne!(first.certificate.serial, second.certificate.serial);
    assert!(second.certificate.serial > first.certificate.serial);
    verify(&first.certificate.chain, &again.bundle(), again.clock.now()).expect("still good");
    again.stop.cancel();
}
