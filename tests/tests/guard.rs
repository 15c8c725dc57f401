//! What a real agent keeps from an application: connections past the mesh, strangers' certificates, lies about addresses.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use culvert_control::ca::{Authority, CaSettings, Clock};
use culvert_control::state::Ledger;
use culvert_control::store::{RedbStore, Store as _, Table};
use culvert_tests::{
    App, Apps, DATA_DIR, GREETING, Node, NodeOptions, PATIENCE, Server, World, eventually, group, is_direct, upstream,
    upstream6,
};
use culvert_types::Datacenter;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned, SupportedProtocolVersion,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio_util::sync::CancellationToken;

const APP: u16 = 9001;
/// The sender writes the IP header (raw(7)).
const IPPROTO_RAW: i32 = 255;

/// Where the application listens if nobody tells it to be careful.
fn everywhere() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, APP).into()
}

fn refusals(node: &Node, reason: &str, service: &str) -> u64 {
    let labels = [format!("reason=\"{reason}\""), format!("service=\"{service}\"")];
    node.metric("culvert_refusals_total", &[&labels[0], &labels[1]])
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&to, PATIENCE)
}

#[test]
fn nobody_reaches_an_application_past_the_mesh() {
    let world = World::new("guard-ports");
    let mut node = Node::start(&world, NodeOptions { encryption: "between-nodes", ..NodeOptions::default() });
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let published = group("published", APP, "").replace(
        "network { mode = \"bridge\" }",
        "network {\n mode = \"bridge\"\n port \"http\" {\n static = 9555\n to = 9001\n }\n }",
    );
    node.run_job("published", &format!("job \"published\" {{\n{}\n}}\n", published.replace("\"9001\"", "\"http\"")));
    let open = App::of(&node, "published", "published");
    let (server, public) = (pair.called.serve(&[everywhere()]), open.serve(&[everywhere()]));

    for address in [SocketAddr::from((pair.called.v4, APP)), (pair.called.v6, APP).into()] {
        let before = refusals(&node, "unauthorised", "called");
        let attempts = [
            ("the host", connect(address)),
            ("a stranger", pair.stranger.connect(address)),
            ("who may call by its upstream", pair.caller.connect(address)),
        ];
        for (who, attempt) in attempts {
            let error = attempt.err().unwrap_or_else(|| panic!("{who} reaches {address}"));
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{who}, {address}");
        }
        eventually("refusals are told", || refusals(&node, "unauthorised", "called") > before);
    }
    assert!(server.accepted().is_empty(), "somebody came through");

    // By its upstream it is reached, and a published port is open to those that are no workload.
    eventually("the direct path", || pair.caller.greeted(upstream()).is_ok_and(|stream| is_direct(&stream)));
    let mut host = connect((Ipv4Addr::LOCALHOST, 9555).into()).expect("a published port");
    let mut greeting = [0; GREETING.len()];
    host.read_exact(&mut greeting).expect("greeted");
    assert_eq!(greeting, GREETING);
    let gateway = world.run("ip", &["-4", "-o", "addr", "show", "dev", "culvert0"]);
    let gateway = gateway.split_whitespace().nth(3).and_then(|text| text.split('/').next()?.parse().ok());
    let gateway: IpAddr = gateway.expect("the bridge has an address");
    let reached = public.accepted().len();
    for address in [SocketAddr::from((gateway, 9555)), (open.v4, APP).into(), (open.v6, APP).into()] {
        pair.stranger.connect(address).expect_err("a workload reaches a mesh service past the mesh");
    }
    assert_eq!(public.accepted().len(), reached);
    drop((server, public, apps));
    node.leave();
}

/// A SYN from `source` to `destination` (RFC 791, RFC 9293); the kernel fills in the length and checksum of the IP header.
fn syn(source: Ipv4Addr, destination: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(destination) = destination else { unreachable!("IPv4 only") };
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.ip().octets());
    packet.extend(40_000_u16.to_be_bytes());
    packet.extend(destination.port().to_be_bytes());
    packet.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    packet
}

fn usurp(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[test]
fn a_workload_that_lies_about_its_address_or_listens_on_a_sidecars_port_gains_nothing() {
    let world = World::new("guard-lies");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&[everywhere()]);
    let before = refusals(&node, "spoofed", "stranger");
    let target = SocketAddr::from((pair.called.v4, APP));
    pair.stranger.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW))).expect("a raw socket");
        socket.send_to(&syn(pair.caller.v4, target), &SockAddr::from(target)).expect("sent");
    });
    eventually("the lie is told", || refusals(&node, "spoofed", "stranger") > before);

    // Nobody can listen where the worker does, whatever the socket is told to share.
    let port = pair.called.sidecar_port;
    for address in [SocketAddr::from((pair.called.v4, port)), (Ipv4Addr::LOCALHOST, port).into()] {
        let error = pair.called.run(|| usurp(address)).expect_err("listens where the worker does");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
    }
    // By IPv6 it is possible, and nothing of the mesh gets there.
    let beside = pair.called.run(|| usurp((pair.called.v6, port).into())).expect("nobody listens there");
    for upstream in [upstream(), upstream6()] {
        pair.caller.greeted(upstream).expect("by way of the worker");
    }
    let error = beside.accept().expect_err("a connection of the mesh");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    drop((server, apps));
    node.leave();
}

/// Takes any server: the test is about who the client is.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// What a client shows.
struct Shown {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// The SPIFFE ID of `service`.
fn name(trust_domain: &str, service: &str) -> String {
    format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/{service}")
}

/// The node's own authority, in the hands of somebody who signs what it never would.
struct Thief {
    root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    trust_domain: String,
}

impl Thief {
    /// Makes the authority that the agent will find, and keeps its key.
    fn make() -> Self {
        std::fs::create_dir_all(DATA_DIR).expect("a folder");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let thief = runtime.block_on(async {
            let store = RedbStore::open(&std::path::Path::new(DATA_DIR).join("state.redb")).expect("a new store");
            let (store, stop) = (Arc::new(store), CancellationToken::new());
            let ledger = Ledger::start(Arc::clone(&store) as _, stop.clone()).await.expect("a new state");
            let datacenter = Datacenter::new("dc1").expect("a name");
            let authority =
                Authority::open(ledger, datacenter, CaSettings::default(), Clock::system(), stop.clone()).await;
            let authority = authority.expect("a new authority");
            let contents = store.load().await.expect("its rows");
            let root =
                contents.rows.iter().find(|(key, _)| key.table == Table::Authority && key.key.starts_with("root/"));
            let root: serde_json::Value = serde_json::from_slice(&root.expect("a root").1.value).expect("JSON");
            let text = |name: &str| root[name].as_str().expect("a text").to_owned();
            let key = KeyPair::from_pem(&text("private_key")).expect("a key");
            stop.cancel();
            Self {
                root: CertificateDer::from_pem_slice(text("certificate").as_bytes()).expect("a certificate"),
                issuer: Issuer::from_ca_cert_pem(&text("certificate"), key).expect("an issuer"),
                trust_domain: authority.trust_domain().to_string(),
            }
        });
        runtime.shutdown_timeout(Duration::from_secs(10));
        thief
    }

    /// A certificate as the authority makes them for `caller`, changed by `change`.
    fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> Option<Shown> {
        self.leaf_by(&self.issuer, change)
    }

    fn leaf_by(&self, issuer: &Issuer<'_, KeyPair>, change: impl FnOnce(&mut CertificateParams)) -> Option<Shown> {
        let mut params = CertificateParams::new(vec![]).expect("parameters");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = vec![self.uri("caller")];
        params.is_ca = IsCa::ExplicitNoCa;
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let leaf = params.signed_by(&key, issuer).expect("signed");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        Some(Shown { chain: vec![leaf.der().clone(), self.root.clone()], key })
    }

    fn uri(&self, service: &str) -> SanType {
        SanType::URI(name(&self.trust_domain, service).try_into().expect("ASCII"))
    }

    /// An authority of somebody else, with our trust domain on it.
    fn forged_issuer(&self) -> Issuer<'static, KeyPair> {
        let mut params = CertificateParams::new(vec![]).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let uri = format!("spiffe://{}", self.trust_domain);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("ASCII"))];
        Issuer::new(params, KeyPair::generate().expect("a key"))
    }

    /// Name, certificate, and the reason that is told for its refusal.
    fn hostile(&self) -> Vec<(&'static str, Option<Shown>, &'static str)> {
        let certificate = "client_certificate";
        let dns = |name: String| SanType::DnsName(name.try_into().expect("ASCII"));
        let elsewhere = || SanType::URI(name(&self.trust_domain.replace('-', ""), "caller").try_into().expect("ASCII"));
        vec![
            ("none", None, certificate),
            ("another authority with our trust domain", self.leaf_by(&self.forged_issuer(), |_| {}), certificate),
            ("two names", self.leaf(|leaf| leaf.subject_alt_names.push(self.uri("called"))), certificate),
            ("no name", self.leaf(|leaf| leaf.subject_alt_names.clear()), certificate),
            (
                "a name of another trust domain",
                self.leaf(|leaf| leaf.subject_alt_names = vec![elsewhere()]),
                certificate,
            ),
            (
                "a DNS name alone",
                self.leaf(|leaf| leaf.subject_alt_names = vec![dns("spiffe.example".to_owned())]),
                certificate,
            ),
            (
                "a DNS name that says what the URI would",
                self.leaf(|leaf| leaf.subject_alt_names = vec![dns(name(&self.trust_domain, "caller"))]),
                certificate,
            ),
            (
                "one that may sign",
                self.leaf(|leaf| leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
                certificate,
            ),
            (
                "one that has expired",
                self.leaf(|leaf| {
                    leaf.not_before = rcgen::date_time_ymd(2020, 1, 1);
                    leaf.not_after = rcgen::date_time_ymd(2021, 1, 1);
                }),
                certificate,
            ),
            ("denied by name", self.leaf(|leaf| leaf.subject_alt_names = vec![self.uri("stranger")]), "intention"),
        ]
    }
}

/// What the node itself gives to `service`.
fn leaf_of(node: &Node, service: &str) -> Shown {
    let leaf = node.api(&format!("/v1/agent/connect/ca/leaf/{service}"));
    let text = |name: &str| leaf[name].as_str().expect("a text").as_bytes().to_vec();
    Shown {
        chain: CertificateDer::pem_slice_iter(&text("CertPEM")).map(|one| one.expect("a certificate")).collect(),
        key: PrivateKeyDer::from_pem_slice(&text("PrivateKeyPEM")).expect("a key"),
    }
}

/// Speaks TLS to a sidecar and asks the application behind it for its greeting.
fn speak(
    from: &App,
    to: SocketAddr,
    shown: Option<Shown>,
    version: &'static SupportedProtocolVersion,
) -> io::Result<Vec<u8>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).expect("a version");
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer));
    let config = match shown {
        Some(shown) => config.with_client_auth_cert(shown.chain, shown.key).expect("a key of its certificate"),
        None => config.with_no_client_auth(),
    };
    let name = ServerName::try_from("called.default.dc1.internal").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut stream = StreamOwned::new(connection, from.connect(to)?);
    stream.write_all(b"let me in")?;
    let mut greeting = vec![0; GREETING.len()];
    stream.read_exact(&mut greeting)?;
    Ok(greeting)
}

#[test]
fn a_sidecar_lets_in_who_shows_a_certificate_of_the_mesh_and_is_allowed_and_nobody_else() {
    let world = World::new("guard-tls");
    let thief = Thief::make();
    let mut node = Node::start(&world, NodeOptions { server: true, ..NodeOptions::default() });
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    node.culvert(&["intention", "create", "-allow", "caller", "called"]);
    node.culvert(&["intention", "create", "-deny", "stranger", "called"]);
    let server: Server = pair.called.serve(&[everywhere()]);
    let sidecar = SocketAddr::from((pair.called.v4, pair.called.sidecar_port));
    eventually("the caller gets in", || pair.caller.greeted(upstream()).is_ok());
    let tls13 = &rustls::version::TLS13;
    let greeting = speak(&pair.stranger, sidecar, Some(leaf_of(&node, "caller")), tls13);
    assert_eq!(greeting.expect("a certificate of the node's"), GREETING, "the test's client works");
    let greeting = speak(&pair.stranger, sidecar, thief.leaf(|_| {}), tls13);
    assert_eq!(greeting.expect("a certificate by the node's authority"), GREETING, "and so does what it makes itself");

    let accepted = server.accepted().len();
    for (what, shown, reason) in thief.hostile() {
        let before = refusals(&node, reason, "called");
        speak(&pair.stranger, sidecar, shown, tls13).expect_err(what);
        eventually(&format!("{what}: refused for {reason}"), || refusals(&node, reason, "called") > before);
    }
    let before = refusals(&node, "handshake", "called");
    let old = speak(&pair.stranger, sidecar, Some(leaf_of(&node, "caller")), &rustls::version::TLS12);
    old.expect_err("TLS 1.2");
    eventually("TLS 1.2 is refused in the handshake", || refusals(&node, "handshake", "called") > before);
    let by_rule = node.metric("culvert_refusals_total", &["stranger => called (deny", "service=\"called\""]);
    assert_eq!(by_rule, 1, "the rule is told");
    assert_eq!(server.accepted().len(), accepted, "somebody reached the application");
    drop((server, apps));
    node.leave();
}
