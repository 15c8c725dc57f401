//! Whole proxies: an inbound and an outbound one between two applications, fed with configuration as xDS would.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use culvert_types::{ConnectionEvent, ConnectionKind, RefusalReason, Verdict};
use futures::FutureExt;
use futures::future::BoxFuture;
use proptest::prelude::*;
use rcgen::CertificateParams;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::config::{Cluster, ClusterKind, Endpoint, Identity, LbPolicy, StringMatcher};
use crate::events::EventReader;
use crate::handoff::{Family, SideTraffic};
use crate::metrics::Metrics;
use crate::rbac::{self, Permission, Policy, Principal, Rbac, RbacAction};
use crate::sockets::OwnSockets;
use crate::testing::{Authority, TRUST_DOMAIN, leaf_params, spiffe};
use crate::threads::DataThreads;

/// Generous: the machine may be busy. Nothing waits this long unless something hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn free_port() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address")
}

fn allow(services: &[&str]) -> Arc<[Rbac]> {
    let principal =
        |service: &&str| Principal::Authenticated(Some(StringMatcher::exact(&spiffe(service), false).expect("ok")));
    let policy = Policy {
        name: "consul-intentions-layer4".into(),
        permissions: vec![Permission::Any],
        principals: services.iter().map(principal).collect(),
    };
    [Rbac { action: RbacAction::Allow, policies: vec![policy] }].into()
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint { address, weight: 1, healthy: true, node: None, workload: None }
}

fn cluster(name: &str, endpoints: Vec<Endpoint>, tls: Option<crate::config::UpstreamTls>) -> Cluster {
    Cluster {
        name: name.to_owned(),
        kind: ClusterKind::Eds,
        connect_timeout: Duration::from_secs(5),
        lb_policy: LbPolicy::RoundRobin,
        endpoints: endpoints.into(),
        tls: tls.map(Arc::new),
        max_connections: None,
    }
}

fn listener(address: SocketAddr, cluster: &str) -> config::Listener {
    config::Listener {
        name: format!("{cluster}:{address}"),
        address,
        direction: Direction::Outbound,
        tls: None,
        rbac: [].into(),
        cluster: cluster.to_owned(),
        stat_prefix: String::new(),
        max_connections: None,
        max_connect_attempts: None,
        explain: None,
    }
}

fn config(listener: config::Listener, cluster: Cluster) -> ProxyConfig {
    ProxyConfig {
        listeners: BTreeMap::from([(listener.name.clone(), Arc::new(listener))]),
        clusters: BTreeMap::from([(cluster.name.clone(), Arc::new(cluster))]),
    }
}

/// A running proxy and everything to steer and watch it.
struct Running {
    address: SocketAddr,
    config: watch::Sender<Arc<ProxyConfig>>,
    _xds: watch::Sender<xds::Status>,
    status: watch::Receiver<ProxyStatus>,
    stop: Option<oneshot::Sender<Duration>>,
    events: EventReader,
    task: tokio::task::JoinHandle<()>,
    tally: Arc<Tally>,
    _threads: DataThreads,
}

impl Running {
    async fn start(id: &str, first: ProxyConfig, sockets: Arc<dyn Sockets>) -> Self {
        let address = first.listeners.values().next().expect("a listener").address;
        let threads = DataThreads::new(1).expect("thread");
        let (events, reader) = Events::new(Arc::new(Metrics::default()));
        let (config, configs) = watch::channel(Arc::new(first));
        let known = xds::Status { ready: true, version: "1".to_owned(), ..xds::Status::default() };
        let (xds_sender, xds) = watch::channel(known);
        let (publish, mut status) = watch::channel(ProxyStatus::default());
        let (stop, stopped) = oneshot::channel();
        let proxy = Proxy::new(id, "here", sockets, threads.placement(), events);
        let tally = proxy.tally();
        let task = tokio::spawn(proxy.run(Feed { config: configs, status: xds }, publish, stopped));
        timeout(PATIENCE, status.wait_for(|status| status.ready)).await.expect("in time").expect("ready");
        Self {
            address,
            config,
            _xds: xds_sender,
            status,
            stop: Some(stop),
            events: reader,
            task,
            tally,
            _threads: threads,
        }
    }

    fn change(&self, change: impl FnOnce(&mut config::Listener, &mut Cluster)) {
        let now = self.config.borrow().clone();
        let mut listener = config::Listener::clone(now.listeners.values().next().expect("listener"));
        let mut cluster = Cluster::clone(now.clusters.values().next().expect("cluster"));
        change(&mut listener, &mut cluster);
        self.config.send_replace(Arc::new(config(listener, cluster)));
    }

    async fn event(&mut self) -> ConnectionEvent {
        timeout(PATIENCE, self.events.next()).await.expect("an event in time").expect("an event")
    }

    /// The next event of this kind.
    async fn next(&mut self, kind: ConnectionKind) -> ConnectionEvent {
        loop {
            let event = self.event().await;
            if event.kind == kind {
                return event;
            }
        }
    }
}

/// `web` calls `api`, whose application echoes.
struct Mesh {
    authority: Authority,
    inbound: Running,
    outbound: Running,
}

impl Mesh {
    async fn start(allowed: &[&str]) -> Self {
        let authority = Authority::new();
        let inbound = inbound(&authority, allowed, echo().await, Arc::new(OwnSockets)).await;
        let outbound = outbound(&authority, vec![endpoint(inbound.address)]).await;
        Self { authority, inbound, outbound }
    }

    fn client(&self) -> TcpStream {
        call(self.outbound.address)
    }
}

fn public_listener(authority: &Authority) -> config::Listener {
    let mut public = listener(free_port(), "local_app");
    public.direction = Direction::Inbound;
    public.tls = Some(Arc::new(authority.downstream("api")));
    public
}

async fn inbound(authority: &Authority, allowed: &[&str], app: SocketAddr, sockets: Arc<dyn Sockets>) -> Running {
    let mut public = public_listener(authority);
    public.rbac = allow(allowed);
    Running::start("api-sidecar-proxy", config(public, cluster("local_app", vec![endpoint(app)], None)), sockets).await
}

async fn outbound(authority: &Authority, endpoints: Vec<Endpoint>) -> Running {
    let upstream = cluster("api", endpoints, Some(authority.upstream("web", "api")));
    let config = config(listener(free_port(), "api"), upstream);
    Running::start("web-sidecar-proxy", config, Arc::new(OwnSockets)).await
}

/// Connects. Blocking, on loopback, so that a reset right behind the handshake is not taken for a failure to connect.
fn call(address: SocketAddr) -> TcpStream {
    let stream = std::net::TcpStream::connect(address).expect("somebody listens");
    stream.set_nonblocking(true).expect("nonblocking");
    TcpStream::from_std(stream).expect("runtime")
}

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.into_split();
                let _reset_by_peer = tokio::io::copy(&mut read, &mut write).await;
                let _reset_by_peer = write.shutdown().await;
            });
        }
    });
    address
}

async fn ping(stream: &mut TcpStream, text: &[u8]) -> std::io::Result<()> {
    let both = async {
        stream.write_all(text).await?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).await?;
        assert_eq!(answer, text);
        Ok(())
    };
    timeout(PATIENCE, both).await.expect("in time")
}

/// How the stream ends: nothing more must come.
async fn end(stream: &mut TcpStream) -> Result<(), ErrorKind> {
    let mut rest = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("an end in time");
    read.map(|_| assert!(rest.is_empty())).map_err(|error| error.kind())
}

#[tokio::test]
async fn an_allowed_connection_passes_and_both_sides_tell_about_it() {
    let Mesh { mut inbound, mut outbound, .. } = Mesh::start(&["web"]).await;
    let mut client = call(outbound.address);
    ping(&mut client, b"through the mesh").await.expect("echo");
    client.shutdown().await.expect("close");
    assert_eq!(end(&mut client).await, Ok(()));
    for side in [&mut inbound, &mut outbound] {
        let (open, close) = (side.event().await, side.event().await);
        for event in [&open, &close] {
            assert_eq!(event.source.as_ref().expect("source").to_string(), spiffe("web"));
            assert_eq!(event.destination.as_ref().expect("destination").to_string(), spiffe("api"));
            assert_eq!((event.verdict, event.reason), (Verdict::Allow, None));
        }
        assert_eq!((open.kind, close.kind), (ConnectionKind::Open, ConnectionKind::Close));
        assert_eq!((close.bytes_to_destination, close.bytes_to_source), (16, 16));
        assert_eq!(open.rule.as_deref(), open.inbound.then_some("consul-intentions-layer4"));
    }
}

#[tokio::test]
async fn what_is_carried_is_known_while_it_is_and_afterwards() {
    let mut mesh = Mesh::start(&["web"]).await;
    let open = |open, bytes| SideTraffic { open, bytes_to_destination: bytes, bytes_to_source: bytes };
    let carried = async |what: &str, inbound: SideTraffic, outbound: SideTraffic, mesh: &Mesh| {
        let seen = || (mesh.inbound.tally.read().inbound, mesh.outbound.tally.read().outbound);
        let settled = async {
            while seen() != (inbound, outbound) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(timeout(PATIENCE, settled).await.is_ok(), "{what}: {:?}", seen());
    };
    let (mut one, mut other) = (mesh.client(), mesh.client());
    ping(&mut one, b"12345").await.expect("echo");
    ping(&mut other, b"123").await.expect("echo");
    carried("two are open", open(2, 8), open(2, 8), &mesh).await;
    drop(one);
    carried("one has ended", open(1, 8), open(1, 8), &mesh).await;
    mesh.outbound.tally.count_anew();
    ping(&mut other, b"1234").await.expect("echo");
    carried("one side counts anew", open(1, 12), open(1, 4), &mesh).await;
    mesh.outbound.change(|listener, _| listener.address = free_port());
    drop(other);
    carried("all have ended, and so has their listener", open(0, 12), open(0, 4), &mesh).await;
    mesh.inbound.change(|listener, _| listener.rbac = allow(&["admin"]));
    let mut refused = call(mesh.outbound.config.borrow().listeners.values().next().expect("one").address);
    let _reset = end(&mut refused).await;
    mesh.inbound.next(ConnectionKind::Refuse).await;
    assert_eq!(mesh.inbound.tally.read().inbound, open(0, 12), "what is refused is not open");
}

#[tokio::test]
async fn a_denied_connection_is_reset_and_told_with_its_rule() {
    let mut mesh = Mesh::start(&["admin"]).await;
    for first in [&b""[..], b"the caller speaks before it is judged"] {
        let mut client = mesh.client();
        let _may_be_reset_already = client.write_all(first).await;
        assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
        let event = mesh.inbound.next(ConnectionKind::Refuse).await;
        assert_eq!((event.reason, event.verdict), (Some(RefusalReason::Intention), Verdict::Deny));
        assert_eq!((event.rule.as_deref(), event.inbound), (Some("default"), true));
        assert_eq!(event.source.expect("source").to_string(), spiffe("web"));
        // The calling side had opened before it could know, and hears of the verdict, not just of a reset.
        let told = mesh.outbound.next(ConnectionKind::Close).await;
        assert_eq!((told.reason, told.verdict), (Some(RefusalReason::Intention), Verdict::Deny), "{told:?}");
    }
}

#[tokio::test]
async fn a_policy_that_turns_to_deny_ends_live_connections_and_only_those_it_denies() {
    let mut mesh = Mesh::start(&["web", "admin"]).await;
    let mut denied = mesh.client();
    ping(&mut denied, b"first").await.expect("allowed at first");
    let other = mesh.authority.upstream("admin", "api");
    let admin = config(listener(free_port(), "api"), cluster("api", vec![endpoint(mesh.inbound.address)], Some(other)));
    let admin = Running::start("admin-sidecar-proxy", admin, Arc::new(OwnSockets)).await;
    let mut kept = call(admin.address);
    ping(&mut kept, b"first").await.expect("allowed");
    mesh.inbound.change(|listener, _| listener.rbac = allow(&["admin"]));
    assert_eq!(end(&mut denied).await, Err(ErrorKind::ConnectionReset));
    ping(&mut kept, b"still").await.expect("the other one stays");
    let event = mesh.inbound.next(ConnectionKind::Close).await;
    assert_eq!((event.reason, event.verdict), (Some(RefusalReason::Revoked), Verdict::Deny));
    assert_eq!(event.source.expect("source").to_string(), spiffe("web"));
    assert_eq!(event.bytes_to_destination, 5);
    let told = mesh.outbound.next(ConnectionKind::Close).await;
    assert_eq!((told.reason, told.verdict), (Some(RefusalReason::Revoked), Verdict::Deny), "the caller hears why");
    assert_eq!(end(&mut mesh.client()).await, Err(ErrorKind::ConnectionReset), "new ones neither");
    mesh.inbound.change(|listener, _| listener.rbac = allow(&["web"]));
    let again = async {
        while ping(&mut mesh.client(), b"again").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, again).await.expect("allowed again");
}

#[tokio::test]
async fn a_connection_that_is_older_than_the_trust_domain_obeys_rules_of_the_new_one() {
    const DENIED: &str = "^spiffe://other\\.consul/ns/default/dc/[^/]+/svc/";
    let mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"first").await.expect("allowed");
    let moved = spiffe("api").replace(TRUST_DOMAIN, "other.consul");
    let moved = mesh.authority.identity_with(leaf_params(&moved));
    let deny = |service: &str| -> Arc<[Rbac]> {
        let name = StringMatcher::regex(&format!("{DENIED}{service}$")).expect("a pattern");
        let policy = Policy {
            name: "denied".into(),
            permissions: vec![Permission::Any],
            principals: vec![Principal::Authenticated(Some(name))],
        };
        [Rbac { action: RbacAction::Deny, policies: vec![policy] }].into()
    };
    mesh.inbound.change(|listener, _| {
        let before = listener.tls.as_deref().expect("inbound");
        listener.tls = Some(Arc::new(config::DownstreamTls { identity: moved, ..before.clone() }));
        listener.rbac = deny("admin");
    });
    // New ones of the old domain fail from then on.
    let in_force = async { while ping(&mut mesh.client(), b"x").await.is_ok() {} };
    timeout(PATIENCE, in_force).await.expect("in force");
    ping(&mut client, b"still").await.expect("nobody denies it");
    mesh.inbound.change(|listener, _| listener.rbac = deny("web"));
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_certificate_without_a_name_does_not_hold_back_a_deny() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"allowed").await.expect("echo");
    let mut two_names = leaf_params(&spiffe("api"));
    two_names.subject_alt_names.push(crate::testing::uri(&spiffe("billing")));
    let nameless = mesh.authority.identity_with(two_names);
    mesh.inbound.change(|listener, _| {
        let before = listener.tls.as_deref().expect("inbound");
        listener.tls = Some(Arc::new(config::DownstreamTls { identity: nameless, ..before.clone() }));
        listener.rbac = allow(&["admin"]);
    });
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset), "policy does not wait");
    let reported = |status: &ProxyStatus| {
        status.listeners[0].ready && status.listeners[0].error.as_ref().is_some_and(|error| error.contains("TLS"))
    };
    timeout(PATIENCE, mesh.inbound.status.wait_for(reported)).await.expect("in time").expect("reported");
    assert_eq!(end(&mut mesh.client()).await, Err(ErrorKind::ConnectionReset), "new ones neither");
    let refused = mesh.inbound.next(ConnectionKind::Refuse).await;
    assert_eq!(refused.reason, Some(RefusalReason::Intention), "the identity before still serves");
}

/// No policy at all: what the configuration makes of an inbound listener without RBAC.
#[tokio::test]
async fn without_policy_everything_is_denied() {
    let mesh = Mesh::start(&["web"]).await;
    mesh.inbound.change(|listener, _| listener.rbac = [Rbac::deny_all()].into());
    let denied = async { while ping(&mut mesh.client(), b"x").await.is_ok() {} };
    timeout(PATIENCE, denied).await.expect("denied");
}

#[test]
fn the_verdict_of_rbac_is_the_verdict_of_the_worker() {
    const SERVICES: [&str; 3] = ["web", "admin", "billing"];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(24));
    let strategy = (proptest::sample::subsequence(&SERVICES[..], 0..=3), any::<bool>(), 0usize..3, any::<bool>());
    let outcome = runner.run(&strategy, |(listed, deny, caller, everyone)| {
        runtime.block_on(async {
            let mut rbac = allow(&listed).to_vec();
            if deny {
                rbac[0].action = RbacAction::Deny;
            }
            if everyone {
                rbac[0].policies[0].principals.push(Principal::Authenticated(None));
            }
            let authority = Authority::new();
            let identity = spiffe(SERVICES[caller]);
            let mut public = public_listener(&authority);
            public.rbac = rbac.into();
            let (rbac, local) = (Arc::clone(&public.rbac), public.address);
            let app = cluster("local_app", vec![endpoint(echo().await)], None);
            let mut inbound = Running::start("api", config(public, app), Arc::new(OwnSockets)).await;
            let tls = authority.upstream(SERVICES[caller], "api");
            let upstream = config(listener(free_port(), "api"), cluster("api", vec![endpoint(local)], Some(tls)));
            let outbound = Running::start("caller", upstream, Arc::new(OwnSockets)).await;
            let mut client = call(outbound.address);
            let passed = ping(&mut client, b"x").await.is_ok();
            let seen = rbac::Connection { identity: Some(&identity), peer: outbound.address, local };
            let expected = rbac::evaluate(&rbac, &seen).allowed;
            let event = inbound.event().await;
            prop_assert_eq!((passed, event.kind == ConnectionKind::Open), (expected, expected), "{:?}", event);
            prop_assert_eq!(event.source.expect("known").to_string(), identity);
            Ok(())
        })
    });
    outcome.expect("verdicts agree");
}

/// A client that shows `identity` and looks at nothing itself.
async fn hostile_client(address: SocketAddr, identity: Option<Arc<Identity>>) -> Result<(), ErrorKind> {
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("version")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone));
    let client = match identity {
        Some(identity) => {
            builder.with_client_auth_cert(identity.chain().to_vec(), identity.key().clone_key()).expect("key")
        }
        None => builder.with_no_client_auth(),
    };
    let stream = call(address);
    let name = "api.test".try_into().expect("name");
    let connected = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, stream).await;
    let mut stream = connected.map_err(|error| error.kind())?;
    // TLS 1.3: the client learns of a refusal with its first read.
    stream.write_all(b"x").await.map_err(|error| error.kind())?;
    let read = timeout(PATIENCE, stream.read_exact(&mut [0])).await.expect("in time");
    read.map(|_| ()).map_err(|error| error.kind())
}

#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &[rustls_pki_types::CertificateDer<'_>],
        _: &rustls_pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// Leaves that differ from a good one in one thing, signed by the mesh's own authority.
fn hostile_leaves() -> Vec<(&'static str, CertificateParams)> {
    let leaf = |change: fn(&mut CertificateParams)| {
        let mut params = leaf_params(&spiffe("web"));
        change(&mut params);
        params
    };
    vec![
        ("wrong trust domain", leaf_params("spiffe://other.consul/ns/default/dc/dc1/svc/web")),
        ("two URIs", leaf(|params| params.subject_alt_names.push(crate::testing::uri(&spiffe("api"))))),
        ("expired", leaf(|params| params.not_after = rcgen::date_time_ymd(2020, 1, 1))),
        ("not yet valid", leaf(|params| params.not_before = rcgen::date_time_ymd(2200, 1, 1))),
        ("CA", leaf(|params| params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained))),
        ("no SAN", leaf(|params| params.subject_alt_names = vec![])),
        ("wrong usage", leaf(|params| params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::CodeSigning])),
        (
            "DNS name like a SPIFFE ID",
            leaf(|params| {
                let name = spiffe("web").as_str().try_into().expect("ascii");
                params.subject_alt_names = vec![rcgen::SanType::DnsName(name)];
            }),
        ),
    ]
}

#[tokio::test]
async fn hostile_clients_are_refused_for_their_certificate() {
    let mut mesh = Mesh::start(&["web"]).await;
    let good = mesh.authority.identity("web");
    assert_eq!(hostile_client(mesh.inbound.address, Some(good)).await, Ok(()), "the client itself works");
    let mut identities: Vec<_> =
        hostile_leaves().into_iter().map(|(what, params)| (what, Some(mesh.authority.identity_with(params)))).collect();
    identities.push(("another root", Some(Authority::new().identity("web"))));
    identities.push(("none", None));
    for (what, identity) in identities {
        assert!(hostile_client(mesh.inbound.address, identity).await.is_err(), "{what}");
        let event = mesh.inbound.next(ConnectionKind::Refuse).await;
        assert_eq!(event.reason, Some(RefusalReason::ClientCertificate), "{what}: {:?}", event.detail);
        assert!(event.source.is_none(), "{what}: a refused name is nobody's name");
    }
}

#[tokio::test]
async fn hostile_servers_are_refused_for_their_certificate() {
    let authority = Authority::new();
    let good = rogue_server(&authority.identity("api")).await;
    let mut upstream = outbound(&authority, vec![endpoint(good)]).await;
    let _client = call(upstream.address);
    assert_eq!(upstream.event().await.kind, ConnectionKind::Open, "the server itself works");
    let mut identities = vec![
        ("another service", authority.identity("billing")),
        ("another root", Authority::new().identity("api")),
        ("no root", self_signed("api")),
    ];
    for (what, mut params) in hostile_leaves() {
        if params.subject_alt_names == [crate::testing::uri(&spiffe("web"))] {
            params.subject_alt_names = vec![crate::testing::uri(&spiffe("api"))]; // wrong in the one thing only
        }
        identities.push((what, authority.identity_with(params)));
    }
    for (what, identity) in identities {
        let mut upstream = outbound(&authority, vec![endpoint(rogue_server(&identity).await)]).await;
        let mut client = call(upstream.address);
        assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset), "{what}");
        let event = upstream.next(ConnectionKind::Refuse).await;
        assert_eq!(event.reason, Some(RefusalReason::ServerCertificate), "{what}: {:?}", event.detail);
    }
}

fn self_signed(service: &str) -> Arc<Identity> {
    let key = rcgen::KeyPair::generate().expect("key");
    let leaf = leaf_params(&spiffe(service)).self_signed(&key).expect("sign");
    let key = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).expect("key");
    Arc::new(Identity::new(vec![leaf.der().clone()], key))
}

/// A server that shows `identity`, asks for nobody else's, and keeps who connects.
async fn rogue_server(identity: &Identity) -> SocketAddr {
    let server = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("version")
        .with_no_client_auth()
        .with_single_cert(identity.chain().to_vec(), identity.key().clone_key())
        .expect("key");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        let (acceptor, mut kept) = (tokio_rustls::TlsAcceptor::from(Arc::new(server)), Vec::new());
        while let Ok((stream, _)) = listener.accept().await {
            kept.push(acceptor.accept(stream).await.ok());
        }
    });
    address
}

/// Leaf, then root: connections that are open lose nothing, new ones use what is new, and the old root ends with it.
#[tokio::test]
async fn leaves_and_roots_rotate_under_traffic() {
    let Mesh { authority: first, mut inbound, mut outbound } = Mesh::start(&["web"]).await;
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), watch::Sender::new([0u64; 4]));
    let traffic: Vec<_> = (0..4u8)
        .map(|seed| {
            let (address, stop, rounds) = (outbound.address, Arc::clone(&stop), rounds.clone());
            tokio::spawn(async move {
                let mut long = call(address);
                while !stop.load(Ordering::Relaxed) {
                    ping(&mut long, &[seed; 3000]).await.expect("a connection that stays loses nothing");
                    let mut short = call(address);
                    ping(&mut short, &[seed; 100]).await.expect("a new connection works at every moment");
                    rounds.send_modify(|rounds| rounds[usize::from(seed)] += 1);
                }
            })
        })
        .collect();
    let next = Authority::new();
    let roots = |list: &[&Authority]| list.iter().map(|authority| authority.root.der().clone()).collect::<Arc<[_]>>();
    let stages: [(&Authority, Arc<[_]>); 4] = [
        (&first, roots(&[&first])),        // a new leaf
        (&first, roots(&[&first, &next])), // a new root is trusted
        (&next, roots(&[&first, &next])),  // and signs
        (&next, roots(&[&next])),          // the old one is gone
    ];
    for (stage, (signer, roots)) in (0..).zip(stages) {
        let leaf = |service: &str| {
            let mut params = leaf_params(&spiffe(service));
            params.not_after = rcgen::date_time_ymd(2100 + stage, 1, 1); // tells the stages apart
            signer.identity_with(params)
        };
        let (api, web) = (leaf("api"), leaf("web"));
        inbound.change(|listener, _| {
            let tls = signer.downstream("api");
            let (identity, roots) = (Arc::clone(&api), Arc::clone(&roots));
            listener.tls = Some(Arc::new(config::DownstreamTls { identity, roots, ..tls }));
        });
        outbound.change(|_, cluster| {
            let tls = signer.upstream("web", "api");
            let (identity, roots) = (Arc::clone(&web), Arc::clone(&roots));
            cluster.tls = Some(Arc::new(config::UpstreamTls { identity, roots, ..tls }));
        });
        for (side, leaf) in [(&mut inbound, &api), (&mut outbound, &web)] {
            let end = crate::tls::Leaf::read(&leaf.chain()[0]).expect("well-formed").not_after;
            let shows = |status: &ProxyStatus| status.certificate_not_after == end;
            timeout(PATIENCE, side.status.wait_for(shows)).await.expect("in time").expect("in force");
        }
        assert_eq!(shown_leaf(inbound.address).await, api.chain()[0], "stage {stage}");
        // A round that begins now has a handshake of its own with what is in force; one that ended may be older.
        let before = *rounds.borrow();
        let crossed = |now: &[u64; 4]| now.iter().zip(before).all(|(now, before)| *now >= before + 2);
        timeout(PATIENCE, rounds.subscribe().wait_for(crossed)).await.expect("in time").expect("traffic");
    }
    stop.store(true, Ordering::Relaxed);
    for task in traffic {
        task.await.expect("no byte was lost");
    }
    let old = first.identity("web");
    assert!(hostile_client(inbound.address, Some(old)).await.is_err(), "the old root vouches for nobody any more");
}

/// The leaf that whoever listens at `address` shows to a client.
async fn shown_leaf(address: SocketAddr) -> rustls_pki_types::CertificateDer<'static> {
    let client = tokio_rustls::TlsConnector::from(Arc::new(anonymous()));
    let stream = client.connect("api.test".try_into().expect("name"), call(address)).await.expect("its half is done");
    stream.get_ref().1.peer_certificates().expect("a chain")[0].clone()
}

#[tokio::test]
async fn another_instance_is_tried_while_nothing_was_sent() {
    let authority = Authority::new();
    let good = inbound(&authority, &["web"], echo().await, Arc::new(OwnSockets)).await;
    let closed = free_port();
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let hangs_up = silent.local_addr().expect("address");
    tokio::spawn(async move { while silent.accept().await.is_ok() {} });
    let instances = vec![endpoint(closed), endpoint(hangs_up), endpoint(good.address)];
    let mut outbound = outbound(&authority, instances).await;
    for _ in 0..9 {
        let mut client = call(outbound.address);
        ping(&mut client, b"whichever").await.expect("the good one answers");
    }
    for _ in 0..9 {
        assert_eq!(outbound.next(ConnectionKind::Open).await.verdict, Verdict::Allow);
    }
    outbound.change(|listener, _| listener.max_connect_attempts = Some(1));
    let refused = async { while ping(&mut call(outbound.address), b"x").await.is_ok() {} };
    timeout(PATIENCE, refused).await.expect("one attempt is one attempt");
}

#[tokio::test]
async fn without_a_healthy_instance_the_caller_is_reset() {
    let authority = Authority::new();
    let mut sick = endpoint(free_port());
    sick.healthy = false;
    let mut outbound = outbound(&authority, vec![sick]).await;
    let mut client = call(outbound.address);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    let event = outbound.next(ConnectionKind::Refuse).await;
    assert_eq!((event.reason, event.inbound), (Some(RefusalReason::NoHealthyInstance), false));
    assert_eq!(event.source.expect("source").to_string(), spiffe("web"));
    assert!(event.detail.expect("detail").contains("\"api\""));
}

#[tokio::test]
async fn an_application_that_is_not_there_resets_the_caller() {
    let authority = Authority::new();
    let mut inbound = inbound(&authority, &["web"], free_port(), Arc::new(OwnSockets)).await;
    let outbound = outbound(&authority, vec![endpoint(inbound.address)]).await;
    let mut client = call(outbound.address);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(inbound.next(ConnectionKind::Refuse).await.reason, Some(RefusalReason::Connect));
}

#[tokio::test]
async fn the_limit_of_a_listener_holds_and_frees_up() {
    let mut mesh = Mesh::start(&["web"]).await;
    mesh.outbound.change(|listener, _| listener.max_connections = Some(2));
    // Whether the change is in force shows only by the limit itself.
    let mut held = Vec::new();
    let limited = async {
        loop {
            let mut client = mesh.client();
            if ping(&mut client, b"x").await.is_err() {
                return;
            }
            held.push(client);
        }
    };
    timeout(PATIENCE, limited).await.expect("limited");
    let event = mesh.outbound.next(ConnectionKind::Refuse).await;
    assert_eq!(event.reason, Some(RefusalReason::Limit));
    drop(held);
    let again = async {
        while ping(&mut mesh.client(), b"x").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, again).await.expect("free again");
}

#[tokio::test]
async fn draining_refuses_new_connections_and_lets_open_ones_end() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    mesh.outbound.stop.take().expect("running").send(Duration::from_secs(600)).expect("running");
    let refused = async {
        while TcpStream::connect(mesh.outbound.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, refused).await.expect("no listener any more");
    ping(&mut client, b"during").await.expect("an open connection goes on");
    client.shutdown().await.expect("close");
    assert_eq!(end(&mut client).await, Ok(()));
    timeout(PATIENCE, mesh.outbound.task).await.expect("drained").expect("no panic");
}

#[tokio::test]
async fn what_outlives_the_deadline_of_a_drain_is_reset() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    mesh.inbound.stop.take().expect("running").send(Duration::from_millis(100)).expect("running");
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    timeout(PATIENCE, &mut mesh.inbound.task).await.expect("drained").expect("no panic");
    let event = mesh.inbound.next(ConnectionKind::Close).await;
    assert_eq!((event.reason, event.detail.as_deref()), (None, Some("the proxy was stopped")));
}

/// Whatever takes a listener away, a deny ends what it accepted.
#[tokio::test]
async fn connections_that_may_finish_obey_policy_meanwhile() {
    type Take = fn(&mut Mesh);
    let stop: Take = |mesh| {
        mesh.inbound.stop.take().expect("running").send(Duration::from_secs(600)).expect("running");
    };
    let move_it: Take = |mesh| mesh.inbound.change(|listener, _| listener.address = free_port());
    for (what, take) in [("stopped", stop), ("moved", move_it)] {
        let mut mesh = Mesh::start(&["web"]).await;
        let mut client = mesh.client();
        ping(&mut client, b"before").await.expect("echo");
        let before = mesh.inbound.address;
        take(&mut mesh);
        let closed = async {
            while TcpStream::connect(before).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, closed).await.expect("no listener any more");
        ping(&mut client, b"during").await.expect("an open connection goes on");
        mesh.inbound.change(|listener, _| listener.rbac = allow(&["web", "admin"]));
        ping(&mut client, b"allowed").await.expect("a policy that allows changes nothing");
        mesh.inbound.change(|listener, _| listener.rbac = allow(&["admin"]));
        assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset), "{what}");
        assert_eq!(mesh.inbound.next(ConnectionKind::Close).await.reason, Some(RefusalReason::Revoked), "{what}");
    }
}

#[tokio::test]
async fn without_a_listener_that_says_who_may_connect_nobody_may() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    mesh.inbound.config.send_replace(Arc::default());
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(mesh.inbound.next(ConnectionKind::Close).await.reason, Some(RefusalReason::Revoked));
}

#[tokio::test]
async fn a_changed_address_moves_the_listener_and_an_unchanged_one_keeps_its_socket() {
    let mut mesh = Mesh::start(&["web"]).await;
    let mut client = mesh.client();
    ping(&mut client, b"before").await.expect("echo");
    let (before, after) = (mesh.outbound.address, free_port());
    mesh.outbound.change(|listener, _| listener.address = after);
    let moved =
        |status: &ProxyStatus| status.listeners.iter().any(|listener| listener.address == after && listener.ready);
    timeout(PATIENCE, mesh.outbound.status.wait_for(moved)).await.expect("in time").expect("moved");
    ping(&mut client, b"after").await.expect("an open connection goes on");
    ping(&mut call(after), b"new").await.expect("echo");
    assert!(TcpStream::connect(before).await.is_err(), "the old address is closed");
}

#[tokio::test]
async fn an_address_in_use_is_reported_and_taken_when_it_is_free() {
    let authority = Authority::new();
    let mut outbound = outbound(&authority, vec![]).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address");
    outbound.change(|listener, _| listener.address = address);
    let reported = |status: &ProxyStatus| {
        !status.ready
            && status
                .listeners
                .iter()
                .any(|listener| listener.error.as_ref().is_some_and(|error| error.contains("listen")))
    };
    timeout(PATIENCE, outbound.status.wait_for(reported)).await.expect("in time").expect("reported");
    drop(taken);
    timeout(PATIENCE, outbound.status.wait_for(|status| status.ready)).await.expect("in time").expect("ready");
}

#[tokio::test]
async fn an_upstream_is_offered_on_ipv6_loopback_too() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        assert!(std::env::var_os("CI").is_none(), "CI has IPv6, so that this is tested");
        return eprintln!("SKIPPED: no IPv6 loopback");
    }
    let mesh = Mesh::start(&["web"]).await;
    let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), mesh.outbound.address.port());
    ping(&mut call(v6), b"six").await.expect("echo");
}

#[tokio::test]
async fn who_connects_and_says_nothing_holds_nobody_up() {
    let mesh = Mesh::start(&["web"]).await;
    let half = |greeting: &'static [u8]| {
        let mut silent = std::net::TcpStream::connect(mesh.inbound.address).expect("somebody listens");
        std::io::Write::write_all(&mut silent, greeting).expect("written");
        silent
    };
    let _silent: Vec<_> = (0..300).map(|_| half(b"")).collect();
    let _stuck: Vec<_> = (0..300).map(|_| half(b"\x16\x03\x01\x02\x00\x01")).collect();
    // These were answered and keep us waiting.
    let _answered: Vec<_> = (0..300).map(|_| half(client_hello())).collect();
    let mut honest = mesh.client();
    let served = timeout(crate::l4::HANDSHAKE_TIMEOUT / 2, ping(&mut honest, b"and I")).await;
    served.expect("before the others have run out of time").expect("echo");
}

/// A client without a certificate that looks at nothing.
fn anonymous() -> rustls::ClientConfig {
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("version")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_no_client_auth()
}

/// The first flight of a client that never sends a second one.
fn client_hello() -> &'static [u8] {
    static HELLO: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
        let mut client = rustls::ClientConnection::new(Arc::new(anonymous()), "api.test".try_into().expect("name"))
            .expect("a connection");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("into memory");
        hello
    });
    &HELLO
}

/// Fails once in the middle of a connection's task.
struct PanicsOnce(AtomicBool);

impl Sockets for PanicsOnce {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'static, std::io::Result<std::net::TcpListener>> {
        OwnSockets.listen(address)
    }
    fn forget(&self, _: SocketAddr) {}
    fn app_socket(&self, family: Family) -> BoxFuture<'static, std::io::Result<TcpSocket>> {
        let first = !self.0.swap(true, Ordering::SeqCst);
        async move {
            assert!(!first, "the bug of this test");
            OwnSockets.app_socket(family).await
        }
        .boxed()
    }
}

#[tokio::test]
async fn a_panic_ends_its_own_connection_and_no_other() {
    let authority = Authority::new();
    let sockets = Arc::new(PanicsOnce(AtomicBool::new(false)));
    let mut inbound = inbound(&authority, &["web"], echo().await, sockets).await;
    let outbound = outbound(&authority, vec![endpoint(inbound.address)]).await;
    let mut unlucky = call(outbound.address);
    assert_eq!(end(&mut unlucky).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(inbound.next(ConnectionKind::Refuse).await.detail.as_deref(), Some("the connection's task failed"));
    ping(&mut call(outbound.address), b"next").await.expect("echo");
}

#[tokio::test]
async fn certificates_end_is_reported() {
    let mesh = Mesh::start(&["web"]).await;
    let status = mesh.inbound.status.borrow().clone();
    assert!(status.certificate_not_after.is_some_and(|end| end > 1_700_000_000));
    assert_eq!((status.xds_version.as_deref(), status.proxy.as_str()), (Some("1"), "api-sidecar-proxy"));
}
