//! Who is let in by certificate: hostile clients and servers, silent ones, and what is renewed under traffic.

use rcgen::CertificateParams;

use super::*;

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

/// A client that shows `identity` and looks at nothing itself.
async fn hostile_client(address: SocketAddr, identity: Option<Arc<Identity>>) -> Result<(), ErrorKind> {
    let client = match identity {
        Some(identity) => {
            careless().with_client_auth_cert(identity.chain().to_vec(), identity.key().clone_key()).expect("key")
        }
        None => careless().with_no_client_auth(),
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
    let client = tokio_rustls::TlsConnector::from(Arc::new(careless().with_no_client_auth()));
    let stream = client.connect("api.test".try_into().expect("name"), call(address)).await.expect("its half is done");
    stream.get_ref().1.peer_certificates().expect("a chain")[0].clone()
}

#[tokio::test]
async fn who_connects_and_says_nothing_holds_nobody_up() {
    let mesh = Mesh::start(&["web"]).await;
    let half = |greeting: &'static [u8]| {
        let mut silent = std::net::TcpStream::connect(mesh.inbound.address).expect("somebody listens");
        std::io::Write::write_all(&mut silent, greeting).expect("written");
        silent
    };
    let start = Instant::now();
    let _silent: Vec<_> = (0..300).map(|_| half(b"")).collect();
    let _stuck: Vec<_> = (0..300).map(|_| half(b"\x16\x03\x01\x02\x00\x01")).collect();
    // These were answered and keep us waiting.
    let _answered: Vec<_> = (0..80).map(|_| half(client_hello())).collect();
    let mut honest = mesh.client();
    let served = tokio::time::timeout_at(start + crate::l4::HANDSHAKE_TIMEOUT, ping(&mut honest, b"and I")).await;
    served.expect("before the others have run out of time").expect("echo");
}

/// A client that looks at nothing.
fn careless() -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("version")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
}

/// The first flight of a client that never sends a second one.
fn client_hello() -> &'static [u8] {
    static HELLO: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
        let mut client = rustls::ClientConnection::new(
            Arc::new(careless().with_no_client_auth()),
            "api.test".try_into().expect("name"),
        )
        .expect("a connection");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("into memory");
        hello
    });
    &HELLO
}

#[tokio::test]
async fn certificates_end_is_reported() {
    let mesh = Mesh::start(&["web"]).await;
    let status = mesh.inbound.status.borrow().clone();
    assert!(status.certificate_not_after.is_some_and(|end| end > 1_700_000_000));
    assert_eq!((status.xds_version.as_deref(), status.proxy.as_str()), (Some("1"), "api-sidecar-proxy"));
}
