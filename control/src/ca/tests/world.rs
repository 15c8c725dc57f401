//! An authority on a memory store with one node and its services, and the clock in the test's hand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio_util::sync::CancellationToken;
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use culvert_types::{Datacenter, ServiceIdentity, ServiceName, TrustDomain};

use crate::ca::{Authority, CaSettings, Clock, Leaf, Leaves};
use crate::state::rows::{Proxy, Service, ServiceKind, Weights};
use crate::state::{Ledger, UpdateError, row_key};
use crate::store::{MemoryStore, Store, Table};

pub(super) const NODE: &str = "node1";
pub(super) const HOUR: Duration = Duration::from_secs(3600);
/// 2026-11-21.
pub(super) const START: Duration = Duration::from_secs(1_795_219_200);

pub(super) struct World {
    pub(super) store: Arc<dyn Store>,
    pub(super) ledger: Ledger,
    pub(super) authority: Authority,
    pub(super) leaves: Leaves,
    pub(super) clock: Clock,
    pub(super) stop: CancellationToken,
}

impl World {
    pub(super) async fn new(settings: CaSettings) -> Self {
        let clock = Clock::following_tokio(SystemTime::UNIX_EPOCH + START);
        Self::on(Arc::new(MemoryStore::default()), settings, clock).await
    }

    pub(super) async fn on(store: Arc<dyn Store>, settings: CaSettings, clock: Clock) -> Self {
        let stop = CancellationToken::new();
        let ledger = Ledger::start(Arc::clone(&store), stop.clone()).await.expect("memory store");
        let datacenter = Datacenter::new("dc1").expect("name");
        let authority = Authority::open(ledger.clone(), datacenter, settings, clock.clone(), stop.clone())
            .await
            .expect("a store that is empty or ours");
        let leaves = Leaves::new(authority.clone(), NODE, stop.clone());
        Self { store, ledger, authority, leaves, clock, stop }
    }

    pub(super) async fn register(&self, name: &str) {
        self.put(instance(name)).await;
    }

    pub(super) async fn put(&self, service: Service) {
        let write = self.ledger.update(|_, plan| {
            plan.put(Table::Services, row_key(&service.node, &service.id), &service);
            Ok::<_, UpdateError>(())
        });
        write.await.expect("memory store");
    }

    pub(super) async fn deregister(&self, name: &str) {
        let write = self.ledger.update(|_, plan| {
            plan.delete(Table::Services, row_key(NODE, name));
            Ok::<_, UpdateError>(())
        });
        write.await.expect("memory store");
    }

    pub(super) fn trust_domain(&self) -> TrustDomain {
        self.authority.trust_domain().clone()
    }

    pub(super) fn identity(&self, service: &str) -> ServiceIdentity {
        self.authority.identity(&name(service))
    }

    pub(super) async fn leaf(&self, service: &str) -> Arc<Leaf> {
        self.leaves.get(&name(service)).await.expect("a registered service gets a leaf")
    }

    /// Roots that a proxy would be sent now.
    pub(super) fn bundle(&self) -> String {
        self.authority.roots().expect("rows").bundle.to_string()
    }
}

pub(super) fn name(text: &str) -> ServiceName {
    ServiceName::new(text).expect("name")
}

pub(super) fn instance(name: &str) -> Service {
    Service {
        node: NODE.to_owned(),
        id: name.to_owned(),
        name: name.to_owned(),
        kind: ServiceKind::Typical,
        tags: Vec::new(),
        meta: BTreeMap::new(),
        address: String::new(),
        port: 9001,
        tagged_addresses: BTreeMap::new(),
        weights: Weights::default(),
        enable_tag_override: false,
        connect_native: false,
        proxy: None,
        declared_sidecar: None,
    }
}

pub(super) fn sidecar(of: &str) -> Service {
    let proxy = Proxy {
        destination_service_name: of.to_owned(),
        destination_service_id: of.to_owned(),
        local_service_address: "127.0.0.1".to_owned(),
        local_service_port: 9001,
        ..Proxy::default()
    };
    let name = format!("{of}-sidecar-proxy");
    Service { kind: ServiceKind::ConnectProxy, proxy: Some(proxy), ..instance(&name) }
}

/// Would a proxy that trusts `roots` accept `chain` from a client, and from a server, at `at`?
pub(super) fn verify(chain: &str, roots: &str, at: SystemTime) -> Result<(), webpki::Error> {
    let roots: Vec<CertificateDer<'_>> = ders(roots);
    let anchors: Vec<_> = roots.iter().map(|root| anchor_from_trusted_cert(root).expect("root")).collect();
    let chain: Vec<CertificateDer<'_>> = ders(chain);
    let leaf = EndEntityCert::try_from(&chain[0]).expect("leaf");
    let time = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970"));
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        leaf.verify_for_usage(ALL_VERIFICATION_ALGS, &anchors, &chain[1..], time, usage, None, None)?;
    }
    Ok(())
}

pub(super) fn ders(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(|der| der.expect("PEM that we wrote")).collect()
}
