//! A peer's certificate: the whole verification against a real root, and the reader of the leaf's names by itself, which
//! no signature keeps random bytes away from.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use culvert_proxy::tls::{PeerIdentity, PeerRole, Roots, verify_peer};
use culvert_types::TrustDomain;
use libfuzzer_sys::fuzz_target;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};

/// Inside the life of the certificates among the seeds.
const NOW: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(1_900_000_000));

static PINNED: LazyLock<(Roots, TrustDomain)> = LazyLock::new(|| {
    let root = include_bytes!("../../../proxy/tests/fixtures/consul-1.10/pki/root.pem");
    let root = CertificateDer::from_pem_slice(root).expect("fixture");
    let trust_domain = TrustDomain::new("11111111-2222-3333-4444-555555555555.consul").expect("fixture");
    (Roots::new(&[root]).expect("fixture"), trust_domain)
});

fuzz_target!(|data: &[u8]| {
    let (roots, trust_domain) = &*PINNED;
    let leaf = CertificateDer::from(data);
    let own = PeerIdentity::of_leaf(&leaf);
    for role in [PeerRole::Client, PeerRole::Server] {
        if let Ok(peer) = verify_peer(std::slice::from_ref(&leaf), roots, trust_domain, role, NOW) {
            assert_eq!(Ok(&peer), own.as_ref());
            assert_eq!(peer.id().trust_domain(), trust_domain);
        }
    }
});
