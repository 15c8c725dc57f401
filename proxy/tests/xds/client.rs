//! The client against a real gRPC server.

use std::sync::Arc;

use culvert_proxy::config::ProxyConfig;
use culvert_proxy::rbac::Rbac;
use culvert_proxy::xds::{DENIED_LIMIT, Node, ServerTrust, Status, Token, XdsChannel, XdsClient};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_types::pb::google::protobuf::BoolValue;
use prost::Name;
use tokio::sync::watch;
use tonic::Status as RpcStatus;

use super::fake::{Fake, FakeStream, eventually, soon};
use super::resources::{self as make, any, resource, response};

const UPSTREAM: &str = "api:127.0.0.1:8080";
const PROXY: &str = "web-sidecar-proxy";

fn start(channel: &XdsChannel) -> XdsClient {
    XdsClient::start(channel.clone(), Node::new(PROXY, "web"), None)
}

async fn config_with(client: &XdsClient, what: &str, is: impl Fn(&ProxyConfig) -> bool) -> Arc<ProxyConfig> {
    let mut seen = client.config();
    let config = soon(what, seen.wait_for(|config| is(config))).await.expect("client runs");
    Arc::clone(&config)
}

async fn status_with(client: &XdsClient, what: &str, is: impl Fn(&Status) -> bool) -> Status {
    let mut seen: watch::Receiver<Status> = client.status();
    let status = soon(what, seen.wait_for(|status| is(status))).await.expect("client runs");
    status.clone()
}

fn clusters(nonce: &str, list: &[Cluster], removed: &[&str]) -> DeltaDiscoveryResponse {
    response::<Cluster>(nonce, list.iter().map(|one| resource(&one.name, "c1", any(one))).collect(), removed)
}

fn listeners(nonce: &str, list: &[Listener], removed: &[&str]) -> DeltaDiscoveryResponse {
    response::<Listener>(nonce, list.iter().map(|one| resource(&one.name, "l1", any(one))).collect(), removed)
}

fn endpoints(nonce: &str, cluster: &str, port: u32) -> DeltaDiscoveryResponse {
    let assignment = make::assignment(cluster, vec![make::endpoint("192.0.2.1", port)]);
    response::<ClusterLoadAssignment>(nonce, vec![resource(cluster, "e1", any(&assignment))], &[])
}

/// Takes the two first requests of a stream.
async fn introduction(stream: &mut FakeStream) -> (DeltaDiscoveryRequest, DeltaDiscoveryRequest) {
    (stream.request::<Cluster>().await, stream.request::<Listener>().await)
}

/// Brings a new stream to one upstream in force.
async fn bring_up(stream: &mut FakeStream) {
    introduction(stream).await;
    stream.accepted::<Cluster>(clusters("1", &[make::eds_cluster("api")], &[])).await;
    let subscription = stream.request::<ClusterLoadAssignment>().await;
    assert_eq!(subscription.resource_names_subscribe, ["api"]);
    stream.accepted::<ClusterLoadAssignment>(endpoints("2", "api", 21000)).await;
    stream.accepted::<Listener>(listeners("3", &[make::outbound(UPSTREAM, 8080, "api")], &[])).await;
}

#[tokio::test]
async fn introduces_itself_subscribes_and_acknowledges() {
    let mut fake = Fake::start();
    let token = Token::new("s3cret".to_owned()).expect("ascii");
    let node = Node::new(PROXY, "web").with("node_name", "n1");
    let client = XdsClient::start(XdsChannel::over(fake.dialer()), node, token);
    let mut stream = fake.stream().await;
    assert_eq!(stream.token.as_deref(), Some("s3cret"));

    let (first, second) = introduction(&mut stream).await;
    let node = first.node.expect("the first request says who asks");
    assert_eq!((node.id.as_str(), node.cluster.as_str()), (PROXY, "web"));
    assert!(node.metadata.expect("metadata").fields.contains_key("node_name"));
    assert_eq!(second.node, None);
    for request in [&first.resource_names_subscribe, &second.resource_names_subscribe] {
        assert!(request.is_empty(), "everything: {request:?}");
    }

    stream.accepted::<Cluster>(clusters("1", &[make::eds_cluster("api")], &[])).await;
    let subscription = stream.request::<ClusterLoadAssignment>().await;
    assert_eq!(
        (subscription.resource_names_subscribe, subscription.response_nonce.as_str()),
        (vec!["api".to_owned()], "")
    );
    stream.accepted::<ClusterLoadAssignment>(endpoints("2", "api", 21000)).await;
    stream.accepted::<Listener>(listeners("3", &[make::outbound(UPSTREAM, 8080, "api")], &[])).await;

    let config = config_with(&client, "the listener", |config| !config.listeners.is_empty()).await;
    assert_eq!(config.clusters["api"].endpoints[0].address.port(), 21000);
    let status = status_with(&client, "ready", |status| status.ready).await;
    assert!(status.connected && status.last_nack.is_none());
    assert_eq!((status.version.as_str(), status.nonce.as_str()), ("rev-3", "3"));
}

#[tokio::test]
async fn refuses_by_name_keeps_the_last_good_and_applies_the_rest() {
    let mut fake = Fake::start();
    let client = start(&XdsChannel::over(fake.dialer()));
    let mut stream = fake.stream().await;
    bring_up(&mut stream).await;

    let mut bad = make::outbound(UPSTREAM, 9999, "api");
    bad.transparent = Some(BoolValue { value: true });
    let other = make::outbound("other", 8081, "api");
    let answer = stream.answer::<Listener>(listeners("4", &[bad, other], &[])).await;
    let error = answer.error_detail.expect("refused");
    assert_eq!(error.code, tonic::Code::InvalidArgument as i32);
    assert_eq!(error.message, format!("resource {UPSTREAM:?}: transparent: not supported by culvert"));

    let config = config_with(&client, "the other listener", |config| config.listeners.contains_key("other")).await;
    assert_eq!(config.listeners[UPSTREAM].address.port(), 8080);
    let status = status_with(&client, "the refusal", |status| status.last_nack.is_some()).await;
    let nack = status.last_nack.expect("nack");
    assert_eq!((nack.resource.as_str(), nack.reason.as_str()), (UPSTREAM, "transparent: not supported by culvert"));
    assert!(!status.ready);

    // A refusal does not end the conversation.
    stream.accepted::<Listener>(listeners("5", &[make::outbound(UPSTREAM, 9999, "api")], &[])).await;
    config_with(&client, "the corrected one", |config| config.listeners[UPSTREAM].address.port() == 9999).await;
    status_with(&client, "nothing outstanding", |status| status.last_nack.is_none() && status.ready).await;
}

#[tokio::test]
async fn keeps_its_configuration_without_a_control_plane_and_says_what_it_has_when_back() {
    let mut fake = Fake::start();
    let channel = XdsChannel::over(fake.dialer());
    let client = start(&channel);
    let mut stream = fake.stream().await;
    bring_up(&mut stream).await;
    let before = config_with(&client, "the listener", |config| !config.listeners.is_empty()).await;

    fake.set_up(false);
    fake.cut();
    let status = status_with(&client, "the loss", |status| !status.connected).await;
    assert!(status.ready && status.disconnected_because.is_some(), "{status:?}");
    let dialled = fake.dialled();
    eventually("another attempt", || fake.dialled() > dialled).await;
    assert_eq!(*client.config().borrow(), before);

    fake.set_up(true);
    channel.retry_now();
    let mut stream = fake.stream().await;
    let (cluster, listener) = introduction(&mut stream).await;
    assert!(cluster.node.is_some(), "every stream says who asks");
    assert_eq!(cluster.initial_resource_versions["api"], "c1");
    assert_eq!(listener.initial_resource_versions[UPSTREAM], "l1");
    let endpoint = stream.request::<ClusterLoadAssignment>().await;
    assert_eq!(
        (endpoint.resource_names_subscribe, &*endpoint.initial_resource_versions["api"]),
        (vec!["api".to_owned()], "e1")
    );

    // The control plane says only what changed meanwhile.
    stream.accepted::<Listener>(listeners("1", &[], &[UPSTREAM])).await;
    config_with(&client, "the removal", |config| config.listeners.is_empty()).await;
    status_with(&client, "connected", |status| status.connected && status.disconnected_because.is_none()).await;
}

#[tokio::test]
async fn follows_clusters_with_its_endpoint_subscriptions() {
    let mut fake = Fake::start();
    let client = start(&XdsChannel::over(fake.dialer()));
    let mut stream = fake.stream().await;
    bring_up(&mut stream).await;

    stream.accepted::<Cluster>(clusters("4", &[make::eds_cluster("db")], &[])).await;
    let request = stream.request::<ClusterLoadAssignment>().await;
    assert_eq!((request.resource_names_subscribe.len(), request.resource_names_subscribe[0].as_str()), (1, "db"));
    assert!(request.resource_names_unsubscribe.is_empty());
    stream.accepted::<ClusterLoadAssignment>(endpoints("5", "db", 21001)).await;
    config_with(&client, "the new cluster", |config| config.clusters.contains_key("db")).await;

    stream.accepted::<Listener>(listeners("6", &[], &[UPSTREAM])).await;
    stream.accepted::<Cluster>(clusters("7", &[], &["api"])).await;
    let request = stream.request::<ClusterLoadAssignment>().await;
    assert_eq!(request.resource_names_unsubscribe, ["api"]);
    let config = config_with(&client, "the removal", |config| !config.clusters.contains_key("api")).await;
    assert_eq!(config.clusters.keys().collect::<Vec<_>>(), ["db"]);
}

#[tokio::test]
async fn an_update_without_a_change_wakes_nobody() {
    let mut fake = Fake::start();
    let client = start(&XdsChannel::over(fake.dialer()));
    let mut stream = fake.stream().await;
    bring_up(&mut stream).await;
    config_with(&client, "the listener", |config| !config.listeners.is_empty()).await;
    let mut seen = client.config();
    seen.mark_unchanged();
    stream.accepted::<Listener>(listeners("4", &[make::outbound(UPSTREAM, 8080, "api")], &[])).await;
    status_with(&client, "the update", |status| status.nonce == "4").await;
    assert!(!seen.has_changed().expect("client runs"));
}

#[tokio::test]
async fn a_type_that_was_not_asked_for_is_refused() {
    let mut fake = Fake::start();
    let client = start(&XdsChannel::over(fake.dialer()));
    let mut stream = fake.stream().await;
    introduction(&mut stream).await;
    let secret = DeltaDiscoveryResponse {
        type_url: "type.googleapis.com/x.Secret".to_owned(),
        nonce: "9".to_owned(),
        ..Default::default()
    };
    stream.send(secret).await;
    let answer = stream.next().await.expect("stream is open");
    assert_eq!(answer.response_nonce, "9");
    assert!(answer.error_detail.expect("refused").message.contains("were not asked for"));
    stream.accepted::<Cluster>(clusters("10", &[make::static_cluster("local_app", 80)], &[])).await;
    config_with(&client, "the cluster", |config| config.clusters.contains_key("local_app")).await;
}

#[tokio::test]
async fn proxies_share_a_connection_and_reconnect_by_themselves() {
    let mut fake = Fake::start();
    let channel = XdsChannel::over(fake.dialer());
    let clients: Vec<XdsClient> = (0..8)
        .map(|index| XdsClient::start(channel.clone(), Node::new(format!("proxy-{index}"), "web"), None))
        .collect();
    let mut streams = Vec::new();
    for _ in &clients {
        let mut stream = fake.stream().await;
        let id = introduction(&mut stream).await.0.node.expect("node").id;
        stream.accepted::<Cluster>(clusters("1", &[make::static_cluster(&id, 80)], &[])).await;
        streams.push(stream);
    }
    for (index, client) in clients.iter().enumerate() {
        let own = format!("proxy-{index}");
        config_with(client, "its own configuration", |config| config.clusters.contains_key(&own)).await;
    }
    assert_eq!(fake.dialled(), 1);

    // One stream ends; the others do not notice.
    streams.remove(0).fail(RpcStatus::permission_denied("no such token")).await;
    let mut stream = fake.stream().await;
    introduction(&mut stream).await;
    stream.accepted::<Cluster>(clusters("2", &[], &[])).await;
    assert_eq!(fake.dialled(), 1);
    streams[0].accepted::<Cluster>(clusters("3", &[], &[])).await;
}

#[tokio::test]
async fn a_control_plane_that_refuses_the_proxy_for_long_takes_its_policy_away() {
    let mut fake = Fake::start();
    let channel = XdsChannel::over(fake.dialer());
    let client = start(&channel);
    let public = || listeners("2", &[make::public_listener(&["web"])], &[]);
    let denies = |config: &ProxyConfig| *config.listeners[make::PUBLIC].rbac == [Rbac::deny_all()];
    let mut stream = fake.stream().await;
    introduction(&mut stream).await;
    stream.accepted::<Cluster>(clusters("1", &[make::static_cluster("local_app", 80)], &[])).await;
    stream.accepted::<Listener>(public()).await;
    config_with(&client, "policy", |config| config.listeners.contains_key(make::PUBLIC)).await;
    let gone = || RpcStatus::permission_denied("not registered");
    let retry = async |fake: &mut Fake| {
        client.retry_now();
        fake.stream().await
    };

    // Neither a moment without it, nor a control plane that is not there, means anything.
    stream.fail(gone()).await;
    fake.stream().await.fail(RpcStatus::unavailable("shutting down")).await;
    tokio::time::pause();
    tokio::time::advance(DENIED_LIMIT).await;
    tokio::time::resume();
    retry(&mut fake).await.fail(gone()).await;
    let mut stream = retry(&mut fake).await;
    let (_, known) = introduction(&mut stream).await;
    assert_eq!(known.initial_resource_versions[make::PUBLIC], "l1", "what is in force is what was sent");
    assert!(!denies(&client.config().borrow()));

    stream.accepted::<Cluster>(clusters("1", &[], &[])).await;
    stream.fail(gone()).await;
    status_with(&client, "the refusal", |status| !status.connected).await;
    tokio::time::pause();
    tokio::time::advance(DENIED_LIMIT).await;
    tokio::time::resume();
    retry(&mut fake).await.fail(gone()).await;
    config_with(&client, "a proxy that denies", denies).await;

    let mut stream = retry(&mut fake).await;
    let (_, known) = introduction(&mut stream).await;
    assert_ne!(known.initial_resource_versions[make::PUBLIC], "l1", "so that it is sent again");
    stream.accepted::<Cluster>(clusters("1", &[], &[])).await;
    stream.accepted::<Listener>(public()).await;
    config_with(&client, "policy again", |config| !denies(config)).await;
}

#[tokio::test]
async fn says_why_there_is_no_control_plane() {
    let fake = Fake::start();
    fake.set_up(false);
    let client = start(&XdsChannel::over(fake.dialer()));
    let status = status_with(&client, "a reason", |status| status.disconnected_because.is_some()).await;
    assert!(!status.connected && !status.ready);
    assert!(status.disconnected_because.expect("reason").contains("the line is down"));
}

#[tokio::test]
async fn a_new_token_is_used_from_the_next_stream_on() {
    let mut fake = Fake::start();
    let client = start(&XdsChannel::over(fake.dialer()));
    let stream = fake.stream().await;
    assert_eq!(stream.token, None);
    client.set_token(Token::new("second".to_owned()).expect("ascii"));
    stream.fail(RpcStatus::unauthenticated("who are you")).await;
    assert_eq!(fake.stream().await.token.as_deref(), Some("second"));
}

#[tokio::test]
async fn dropping_the_client_ends_its_stream_and_keeps_the_configuration_readable() {
    let mut fake = Fake::start();
    let client = start(&XdsChannel::over(fake.dialer()));
    let mut stream = fake.stream().await;
    bring_up(&mut stream).await;
    config_with(&client, "the listener", |config| !config.listeners.is_empty()).await;
    let config = client.config();
    drop(client);
    assert_eq!(stream.next().await, None);
    assert!(config.borrow().listeners.contains_key(UPSTREAM));
}

#[tokio::test]
async fn dials_unix_sockets_and_tcp() {
    let directory = tempfile_dir();
    let path = directory.join("xds.sock");
    let unix = tokio::net::UnixListener::bind(&path).expect("bind");
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = tcp.local_addr().expect("address");
    let mut over_unix = Fake::serve(tokio_stream::wrappers::UnixListenerStream::new(unix));
    let mut over_tcp = Fake::serve(tokio_stream::wrappers::TcpListenerStream::new(tcp));
    let clients = [start(&XdsChannel::unix(path.clone())), start(&XdsChannel::tcp(address))];
    for (client, streams) in clients.iter().zip([&mut over_unix, &mut over_tcp]) {
        let mut stream = soon("a stream", streams.recv()).await.expect("the server runs");
        bring_up(&mut stream).await;
        config_with(client, "the listener", |config| !config.listeners.is_empty()).await;
    }
    std::fs::remove_dir_all(directory).expect("our own directory");
}

/// A control plane behind TLS with a certificate of [`make::PKI`], which has no name that anybody asks for.
async fn behind_tls() -> (std::net::SocketAddr, tokio::sync::mpsc::Receiver<FakeStream>) {
    use rustls_pki_types::pem::PemObject;
    use rustls_pki_types::{CertificateDer, PrivateKeyDer};
    let chain = CertificateDer::from_pem_slice(make::PKI.chain.as_bytes()).expect("chain");
    let key = PrivateKeyDer::from_pem_slice(make::PKI.key.as_bytes()).expect("key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("versions").with_no_client_auth().with_single_cert(vec![chain], key).expect("pair");
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let (plain, incoming) = tokio::sync::mpsc::channel(4);
    let streams = Fake::serve(tokio_stream::wrappers::ReceiverStream::new(incoming));
    drop(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut tls) = acceptor.accept(stream).await else { continue };
            let (mut ours, theirs) = tokio::net::UnixStream::pair().expect("pair");
            plain.send(Ok(theirs)).await.expect("server runs");
            drop(tokio::spawn(async move { tokio::io::copy_bidirectional(&mut tls, &mut ours).await }));
        }
    }));
    (address, streams)
}

#[tokio::test]
async fn dials_tls_and_trusts_the_given_roots_alone() {
    let (address, mut streams) = behind_tls().await;
    let trust = ServerTrust::from_pem(make::PKI.root.as_bytes()).expect("roots");
    let client = start(&XdsChannel::tls(address, &trust));
    let mut stream = soon("a stream", streams.recv()).await.expect("the server runs");
    bring_up(&mut stream).await;
    config_with(&client, "the listener", |config| !config.listeners.is_empty()).await;

    let other = rcgen::generate_simple_self_signed(vec!["x".to_owned()]).expect("certificate").cert.pem();
    let trust = ServerTrust::from_pem(other.as_bytes()).expect("roots");
    let client = start(&XdsChannel::tls(address, &trust));
    let status = status_with(&client, "a refusal", |status| status.disconnected_because.is_some()).await;
    let reason = status.disconnected_because.expect("reason");
    assert!(reason.contains("invalid peer certificate"), "{reason}");
}

/// A directory of this test alone.
fn tempfile_dir() -> std::path::PathBuf {
    let directory = std::env::temp_dir().join(format!("culvert-xds-client-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("temporary directory");
    directory
}

#[test]
fn resource_types_have_the_urls_of_the_api() {
    use culvert_proxy::xds::ResourceKind;
    assert_eq!(ResourceKind::Cluster.type_url(), Cluster::type_url());
    assert_eq!(ResourceKind::from_type_url(&Listener::type_url()), Ok(ResourceKind::Listener));
    assert_eq!(Listener::type_url(), "type.googleapis.com/envoy.config.listener.v3.Listener");
}
