//! Hostile certificates, one rule each.

use std::mem::discriminant;
use std::time::Duration;

use culvert_types::TrustDomain;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, NameConstraints, SanType, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::*;
use crate::testing::{Authority, TRUST_DOMAIN, leaf_params, spiffe, uri};

fn trust_domain() -> TrustDomain {
    TrustDomain::new(TRUST_DOMAIN).expect("valid")
}

fn chain(authority: &Authority, params: CertificateParams) -> Vec<CertificateDer<'static>> {
    authority.identity_with(params).chain().to_vec()
}

fn verdict_as(
    role: PeerRole,
    authority: &Authority,
    chain: &[CertificateDer<'_>],
) -> Result<PeerIdentity, PeerRefusal> {
    let roots = Roots::new(&authority.roots()).expect("roots");
    verify_peer(chain, &roots, &trust_domain(), role, now())
}

/// The verdict on a chain, which must be of the same kind on clients and servers.
fn verdict(authority: &Authority, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, PeerRefusal> {
    let [client, server] = [PeerRole::Client, PeerRole::Server].map(|role| verdict_as(role, authority, chain));
    match (&client, &server) {
        (Ok(one), Ok(other)) => assert_eq!(one, other),
        (Err(one), Err(other)) => assert_eq!(discriminant(one), discriminant(other), "{one} and {other}"),
        differ => panic!("{differ:?}"),
    }
    client
}

/// The verdict on a leaf that differs from a good one by `change`.
fn verdict_on(change: impl FnOnce(&mut CertificateParams)) -> Result<PeerIdentity, PeerRefusal> {
    let authority = Authority::new();
    let mut params = leaf_params(&spiffe("web"));
    change(&mut params);
    verdict(&authority, &chain(&authority, params))
}

#[test]
fn an_ordinary_leaf_is_accepted_in_both_roles() {
    assert_eq!(verdict_on(|_| {}).expect("accepted").uri(), spiffe("web"));
}

#[test]
fn dns_names_beside_the_uri_do_no_harm() {
    let with_dns = |params: &mut CertificateParams| {
        params.subject_alt_names.push(SanType::DnsName("web.example".try_into().expect("name")));
    };
    assert_eq!(verdict_on(with_dns).expect("accepted").uri(), spiffe("web"));
}

#[test]
fn another_trust_domain_is_refused() {
    let foreign =
        verdict_on(|params| params.subject_alt_names = vec![uri("spiffe://other.consul/ns/default/dc/dc1/svc/web")]);
    assert!(matches!(foreign, Err(PeerRefusal::ForeignTrustDomain { .. })), "{foreign:?}");
}

#[test]
fn two_uris_are_refused_even_if_equal() {
    for second in [spiffe("api"), spiffe("web"), "https://example.com/".to_owned()] {
        assert_eq!(verdict_on(|params| params.subject_alt_names.push(uri(&second))), Err(PeerRefusal::Uris(2)));
    }
}

#[test]
fn no_uri_is_refused_whatever_else_looks_like_one() {
    assert_eq!(verdict_on(|params| params.subject_alt_names = vec![]), Err(PeerRefusal::Uris(0)));
    let dns = |params: &mut CertificateParams| {
        // A DNS name is IA5String too: nothing stops a CA from writing a SPIFFE ID there.
        params.subject_alt_names = vec![SanType::DnsName(spiffe("web").as_str().try_into().expect("ascii"))];
    };
    assert_eq!(verdict_on(dns), Err(PeerRefusal::Uris(0)));
    let common_name = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![];
        params.distinguished_name.push(DnType::CommonName, spiffe("web"));
    };
    assert_eq!(verdict_on(common_name), Err(PeerRefusal::Uris(0)));
}

#[test]
fn a_uri_that_is_no_workload_is_refused() {
    for bad in [
        "https://example.com/ns/default/dc/dc1/svc/web".to_owned(),
        format!("spiffe://{TRUST_DOMAIN}"),
        format!("spiffe://{TRUST_DOMAIN}/ns/default/../svc/web"),
        format!("spiffe://user@{TRUST_DOMAIN}/web"),
        format!("{}?x", spiffe("web")),
    ] {
        let verdict = verdict_on(|params| params.subject_alt_names = vec![uri(&bad)]);
        assert!(matches!(verdict, Err(PeerRefusal::NotSpiffe(_))), "{bad}: {verdict:?}");
    }
}

#[test]
fn time_is_looked_at() {
    let expired = |params: &mut CertificateParams| params.not_after = date_time_ymd(2020, 1, 1);
    assert_eq!(verdict_on(expired), Err(PeerRefusal::Expired));
    let future = |params: &mut CertificateParams| params.not_before = date_time_ymd(2200, 1, 1);
    assert_eq!(verdict_on(future), Err(PeerRefusal::NotValidYet));
    let authority = Authority::new();
    let mut params = leaf_params(&spiffe("web"));
    (params.not_before, params.not_after) = (date_time_ymd(2030, 1, 1), date_time_ymd(2030, 1, 4));
    let (chain, roots) = (chain(&authority, params), Roots::new(&authority.roots()).expect("roots"));
    let at = |seconds| {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        verify_peer(&chain, &roots, &trust_domain(), PeerRole::Client, now)
    };
    assert_eq!(at(1_893_455_999), Err(PeerRefusal::NotValidYet));
    assert!(at(1_893_456_000).is_ok() && at(1_893_715_200).is_ok());
    assert_eq!(at(1_893_715_201), Err(PeerRefusal::Expired));
}

#[test]
fn a_leaf_that_may_sign_is_refused() {
    let ca = verdict_on(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(ca, Err(PeerRefusal::Chain(webpki::Error::CaUsedAsEndEntity)));
    let signs = verdict_on(|params| params.key_usages.push(KeyUsagePurpose::KeyCertSign));
    assert_eq!(signs, Err(PeerRefusal::MaySign));
}

#[test]
fn a_leaf_for_the_other_role_only_is_refused() {
    let authority = Authority::new();
    for (usage, good, bad) in [
        (ExtendedKeyUsagePurpose::ClientAuth, PeerRole::Client, PeerRole::Server),
        (ExtendedKeyUsagePurpose::ServerAuth, PeerRole::Server, PeerRole::Client),
    ] {
        let mut params = leaf_params(&spiffe("web"));
        params.extended_key_usages = vec![usage];
        let chain = chain(&authority, params);
        assert!(verdict_as(good, &authority, &chain).is_ok());
        assert!(matches!(verdict_as(bad, &authority, &chain), Err(PeerRefusal::Chain(_))));
    }
    let code = verdict_on(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]);
    assert!(matches!(code, Err(PeerRefusal::Chain(_))), "{code:?}");
}

#[test]
fn another_root_is_refused() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let chain = chain(&theirs, leaf_params(&spiffe("web")));
    assert_eq!(verdict(&ours, &chain), Err(PeerRefusal::UnknownIssuer));
    let mut with_root = chain;
    with_root.push(theirs.root.der().clone());
    assert_eq!(verdict(&ours, &with_root), Err(PeerRefusal::UnknownIssuer));
}

#[test]
fn a_self_signed_leaf_is_refused() {
    let key = KeyPair::generate().expect("key");
    let leaf = leaf_params(&spiffe("web")).self_signed(&key).expect("sign");
    let verdict = verdict(&Authority::new(), &[leaf.der().clone()]);
    assert_eq!(verdict, Err(PeerRefusal::UnknownIssuer));
}

#[test]
fn a_leaf_cannot_issue() {
    let authority = Authority::new();
    // A genuine leaf of the mesh signs a certificate for somebody else.
    let thief_key = KeyPair::generate().expect("key");
    let thief = leaf_params(&spiffe("thief"));
    let thief_certificate = thief.signed_by(&thief_key, &authority.issuer).expect("sign");
    let forged_key = KeyPair::generate().expect("key");
    let issuer = Issuer::new(thief, thief_key);
    let forged = leaf_params(&spiffe("web")).signed_by(&forged_key, &issuer).expect("sign");
    let chain = [forged.der().clone(), thief_certificate.der().clone()];
    assert!(verdict(&authority, &chain).is_err());
}

/// An intermediate of the authority, and a leaf that it signed.
fn through_intermediate(change: impl FnOnce(&mut CertificateParams)) -> Result<PeerIdentity, PeerRefusal> {
    let authority = Authority::new();
    let mut params = CertificateParams::new(vec![]).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, "intermediate");
    change(&mut params);
    let key = KeyPair::generate().expect("key");
    let intermediate = params.signed_by(&key, &authority.issuer).expect("sign");
    let leaf_key = KeyPair::generate().expect("key");
    let leaf = leaf_params(&spiffe("web")).signed_by(&leaf_key, &Issuer::new(params, key)).expect("sign");
    verdict(&authority, &[leaf.der().clone(), intermediate.der().clone()])
}

#[test]
fn intermediates_work_and_keep_to_their_constraints() {
    assert!(through_intermediate(|_| {}).is_ok());
    assert!(through_intermediate(|params| params.not_after = date_time_ymd(2020, 1, 1)).is_err());
    assert!(through_intermediate(|params| params.is_ca = IsCa::ExplicitNoCa).is_err());
    let constraints = NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DirectoryName(rcgen::DistinguishedName::new())],
        excluded_subtrees: vec![],
    };
    let constrained = through_intermediate(|params| params.name_constraints = Some(constraints));
    assert_eq!(constrained, Err(PeerRefusal::Chain(webpki::Error::NameConstraintViolation)));
}

#[test]
fn no_certificate_and_too_many_are_refused() {
    let authority = Authority::new();
    assert_eq!(verdict(&authority, &[]), Err(PeerRefusal::Missing));
    let many = vec![chain(&authority, leaf_params(&spiffe("web")))[0].clone(); MAX_CHAIN + 1];
    assert_eq!(verdict(&authority, &many), Err(PeerRefusal::TooMany(MAX_CHAIN + 1)));
}

#[test]
fn an_empty_or_broken_bundle_is_refused() {
    assert_eq!(Roots::new(&[]).expect_err("empty"), RootsError::Empty);
    let good = Authority::new().root.der().clone();
    let broken = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
    assert!(matches!(Roots::new(&[good, broken]), Err(RootsError::Root { index: 1, .. })));
}

#[test]
fn any_root_of_the_bundle_will_do() {
    let (old, new) = (Authority::new(), Authority::new());
    let both = Roots::new(&[old.root.der().clone(), new.root.der().clone()]).expect("roots");
    for authority in [&old, &new] {
        let chain = chain(authority, leaf_params(&spiffe("web")));
        assert!(verify_peer(&chain, &both, &trust_domain(), PeerRole::Server, now()).is_ok());
    }
}

#[test]
fn flipped_bytes_never_pass_and_never_panic() {
    let authority = Authority::new();
    let good = chain(&authority, leaf_params(&spiffe("web"))).remove(0);
    for at in 0..good.len() {
        let mut bytes = good.to_vec();
        bytes[at] ^= 0x55;
        assert!(verdict(&authority, &[CertificateDer::from(bytes)]).is_err(), "byte {at}");
    }
}

/// Does it know the chain? Asking counts as use.
fn knows(verifier: &Verifier, chain: &[CertificateDer<'_>], now: UnixTime) -> bool {
    Fingerprint::of(&chain[0], &chain[1..]).is_some_and(|fingerprint| verifier.knows(fingerprint, now))
}

#[test]
fn a_chain_that_was_good_is_known_until_it_ends_and_only_to_who_found_it_good() {
    let (authority, other) = (Authority::new(), Authority::new());
    let verifier = |authority: &Authority, role| {
        Verifier::new(Roots::new(&authority.roots()).expect("roots"), trust_domain(), vec![], role)
    };
    let ours = verifier(&authority, PeerRole::Client);
    let known = chain(&authority, leaf_params(&spiffe("web")));
    let (leaf, rest) = known.split_first().expect("a leaf");
    let (now, end) = (now(), Leaf::read(leaf).expect("well-formed").not_after.expect("an end"));
    assert!(!knows(&ours, &known, now));
    ours.verify(leaf, rest, now).expect("good");
    ours.verify(leaf, rest, now).expect("still good");
    assert!(knows(&ours, &known, now));
    assert_eq!(ours.known.lock().len(), 1);

    let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    assert!(knows(&ours, &known, at(end - 1)) && !knows(&ours, &known, at(end)));
    assert_eq!(ours.verify(leaf, rest, at(end + 1)), Err(PeerRefusal::Expired));
    assert!(!knows(&ours, &known, at(now.as_secs() - 1)), "the clock was put back");
    assert_eq!(ours.verify(leaf, rest, at(0)), Err(PeerRefusal::NotValidYet));

    let further = chain(&authority, leaf_params(&spiffe("api")));
    assert!(!knows(&ours, &[leaf.clone(), further[0].clone()], now), "with another certificate behind it");
    assert!(!knows(&ours, &further, now), "another leaf of the same authority");
    assert!(!knows(&verifier(&authority, PeerRole::Server), &known, now));
    assert_eq!(verifier(&other, PeerRole::Client).verify(leaf, rest, now), Err(PeerRefusal::UnknownIssuer));
}

#[test]
fn what_is_refused_is_not_known_and_what_is_known_is_bounded() {
    let (authority, other) = (Authority::new(), Authority::new());
    let roots = Roots::new(&authority.roots()).expect("roots");
    let name = StringMatcher::exact(&spiffe("web"), false).expect("matcher");
    let verifier = Verifier::new(roots, trust_domain(), vec![name], PeerRole::Client);
    for (authority, service) in [(&other, "web"), (&authority, "api")] {
        let refused = chain(authority, leaf_params(&spiffe(service)));
        verifier.verify(&refused[0], &refused[1..], now()).expect_err("foreign, or of another name");
    }
    assert!(verifier.known.lock().is_empty());
    let mut used = chain(&authority, leaf_params(&spiffe("web")));
    used.extend(vec![used[0].clone(); MAX_KNOWN_CHAIN]);
    verifier.verify(&used[0], &used[1..], now()).expect("good, with others behind it");
    assert!(verifier.known.lock().is_empty(), "too long");
    used.truncate(MAX_KNOWN_CHAIN);
    verifier.verify(&used[0], &used[1..], now()).expect("good, with others behind it");
    let leaf = chain(&authority, leaf_params(&spiffe("web")));
    let unused: Vec<_> = (0..=MAX_KNOWN).map(|_| chain(&authority, leaf_params(&spiffe("any"))).remove(0)).collect();
    for extra in &unused {
        verifier.verify(&leaf[0], std::slice::from_ref(extra), now()).expect("good, with another behind it");
        assert!(knows(&verifier, &used, now()), "what is used stays");
    }
    assert_eq!(verifier.known.lock().len(), MAX_KNOWN);
    for (number, extra) in unused.iter().enumerate() {
        let known = knows(&verifier, &[leaf[0].clone(), extra.clone()], now());
        assert_eq!(known, number > 1, "{number}: those used last");
    }
}

#[test]
fn chains_of_the_same_bytes_differ() {
    let fingerprint = |chain: &[&[u8]]| {
        let chain: Vec<_> = chain.iter().map(|bytes| CertificateDer::from(bytes.to_vec())).collect();
        Fingerprint::of(&chain[0], &chain[1..]).expect("not too long")
    };
    let chains: [&[&[u8]]; 5] = [&[b"abc"], &[b"a", b"bc"], &[b"ab", b"c"], &[b"a", b"b", b"c"], &[b"abc", b""]];
    for (at, one) in chains.iter().enumerate() {
        for (other_at, other) in chains.iter().enumerate() {
            assert_eq!(fingerprint(one) == fingerprint(other), at == other_at, "{at} {other_at}");
        }
    }
}
