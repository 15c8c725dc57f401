//! The delta protocol over real connections, with a real gRPC client.

mod support;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use culvert_control::xds::render::Kind;
use culvert_control::xds::{XdsLimits, XdsPeer};
use culvert_types::Action;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest};
use envoy_types::pb::google::rpc;
use hyper_util::rt::TokioIo;
use prost::Message;
use support::{Control, PATIENCE, eventually, service, sidecar, upstream};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

const WEB: &str = "web-sidecar-proxy";
const API: &str = "api-sidecar-proxy";

/// `web` calls `api`; both have sidecars.
async fn countdash(default_policy: Action, limits: XdsLimits) -> Control {
    let control = Control::with(default_policy, limits).await;
    control.put(&service("api", 9001)).await;
    control.put(&sidecar("api", 21000, 9001, Vec::new())).await;
    control.put(&service("web", 9002)).await;
    control.put(&sidecar("web", 21001, 9002, vec![upstream("api", "", 8080)])).await;
    control
}

async fn channel(control: &Control) -> Channel {
    let endpoint = Endpoint::try_from(format!("http://{}", control.address())).expect("URI");
    endpoint.connect().await.expect("the server listens")
}

/// A channel over a socket pair whose other end the server got.
async fn handed_over(control: &Control, peer: XdsPeer) -> Channel {
    let (ours, theirs) = UnixStream::pair().expect("socket pair");
    control.xds.serve(theirs, peer);
    let mut ours = Some(ours);
    let connect = tower::service_fn(move |_| {
        let stream = ours.take().map(TokioIo::new).ok_or_else(|| std::io::Error::other("used up"));
        std::future::ready(stream)
    });
    Endpoint::from_static("http://xds").connect_with_connector(connect).await.expect("the server serves it")
}

/// One stream of a client.
struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    proxy: String,
    named: bool,
}

impl Client {
    async fn open(channel: Channel, proxy: &str) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(64);
        let mut request = Request::new(ReceiverStream::new(receiver));
        request.metadata_mut().insert("x-consul-token", "anything".parse().expect("ASCII"));
        let limit = 64 << 20;
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_encoding_message_size(limit);
        let responses = client.delta_aggregated_resources(request).await?.into_inner();
        Ok(Self { requests, responses, proxy: proxy.to_owned(), named: false })
    }

    /// Connected, subscribed to all clusters and listeners.
    async fn ready(control: &Control, proxy: &str) -> Self {
        let mut client = Self::open(channel(control).await, proxy).await.expect("accepted");
        client.subscribe(Kind::Cluster, &[]).await;
        client.subscribe(Kind::Listener, &[]).await;
        client
    }

    async fn send(&mut self, mut request: DeltaDiscoveryRequest) {
        if !std::mem::replace(&mut self.named, true) {
            request.node = Some(Node { id: self.proxy.clone(), cluster: "test".to_owned(), ..Node::default() });
        }
        self.requests.send(request).await.expect("open");
    }

    async fn subscribe(&mut self, kind: Kind, names: &[&str]) {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        self.send(DeltaDiscoveryRequest { resource_names_subscribe: names, ..of(kind) }).await;
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let message = timeout(PATIENCE, self.responses.message()).await.expect("an answer in time")?;
        message.ok_or_else(|| Status::cancelled("the server ended the stream without a reason"))
    }

    async fn ack(&mut self, response: &DeltaDiscoveryResponse) {
        let nonce = response.nonce.clone();
        let request = DeltaDiscoveryRequest { response_nonce: nonce, ..DeltaDiscoveryRequest::default() };
        self.send(DeltaDiscoveryRequest { type_url: response.type_url.clone(), ..request }).await;
    }

    async fn nack(&mut self, response: &DeltaDiscoveryResponse, why: &str) {
        let error_detail = Some(rpc::Status { code: 13, message: why.to_owned(), ..rpc::Status::default() });
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        self.send(DeltaDiscoveryRequest { type_url, response_nonce, error_detail, ..of(Kind::Cluster) }).await;
    }

    /// The next response of `kind`, acknowledging all on the way.
    async fn next_of(&mut self, kind: Kind) -> DeltaDiscoveryResponse {
        loop {
            let response = self.next().await.expect("open");
            self.ack(&response).await;
            if response.type_url == kind.type_url() {
                return response;
            }
        }
    }

    /// How the server ended the stream.
    async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

fn of(kind: Kind) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: kind.type_url().to_owned(), ..DeltaDiscoveryRequest::default() }
}

fn names(response: &DeltaDiscoveryResponse) -> BTreeSet<String> {
    response.resources.iter().map(|resource| resource.name.clone()).collect()
}

fn versions(response: &DeltaDiscoveryResponse) -> HashMap<String, String> {
    response.resources.iter().map(|resource| (resource.name.clone(), resource.version.clone())).collect()
}

fn api_cluster(control: &Control) -> String {
    format!("api.default.dc1.internal.{}", control.authority.trust_domain())
}

#[tokio::test]
async fn a_proxy_gets_its_own_resources_and_no_others() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let cluster = api_cluster(&control);
    let mut web = Client::ready(&control, WEB).await;
    assert_eq!(names(&web.next_of(Kind::Cluster).await), [cluster.clone(), "local_app".to_owned()].into());
    assert_eq!(names(&web.next_of(Kind::Listener).await), ["public_listener:127.0.0.1:21001".to_owned()].into());
    web.subscribe(Kind::Endpoints, &[&cluster]).await;
    assert_eq!(names(&web.next_of(Kind::Endpoints).await), [cluster].into());
    let upstreams = ["api:127.0.0.1:8080", "api:[::1]:8080"].map(str::to_owned);
    assert_eq!(names(&web.next_of(Kind::Listener).await), upstreams.into(), "once their endpoints are there");

    let mut api = Client::ready(&control, API).await;
    assert_eq!(names(&api.next_of(Kind::Cluster).await), ["local_app".to_owned()].into());
    assert_eq!(names(&api.next_of(Kind::Listener).await), ["public_listener:127.0.0.1:21000".to_owned()].into());
    control.shutdown().await;
}

#[tokio::test]
async fn an_intention_reaches_the_proxy_it_concerns_at_once() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let mut api = Client::ready(&control, API).await;
    let first = api.next_of(Kind::Listener).await;
    control.intend("web", "other", Action::Allow).await;
    control.intend("web", "api", Action::Allow).await;
    let second = api.next_of(Kind::Listener).await;
    assert_ne!(versions(&first), versions(&second));
    let any = second.resources[0].resource.as_ref().expect("a body");
    let listener = Listener::decode(any.value.as_slice()).expect("a listener");
    let text = format!("{:?}", listener.metadata);
    assert!(text.contains("web") && !text.contains("other"), "{text}");
    control.shutdown().await;
}

#[tokio::test]
async fn who_is_no_registered_proxy_is_told_so() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let refused = async |proxy: &str| {
        let mut client = Client::open(channel(&control).await, proxy).await.expect("the stream opens");
        client.subscribe(Kind::Cluster, &[]).await;
        client.end().await
    };
    let unknown = refused("nobody").await;
    assert_eq!(unknown.code(), Code::PermissionDenied);
    assert!(unknown.message().contains("\"nobody\" is not registered"), "{unknown}");
    let application = refused("api").await;
    assert_eq!(application.code(), Code::PermissionDenied);
    assert!(application.message().contains("\"api\" is no proxy"), "{application}");
    let nameless = refused("").await;
    assert_eq!(nameless.code(), Code::InvalidArgument);
    assert!(nameless.message().contains("node.id"), "{nameless}");
    assert!(control.xds.status().proxies().is_empty());
    control.shutdown().await;
}

#[tokio::test]
async fn a_deregistered_proxy_hears_who_may_call_it_until_it_hangs_up() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let mut api = Client::ready(&control, API).await;
    let registered = api.next_of(Kind::Listener).await;
    control.deregister(API).await;
    control.intend("web", "api", Action::Allow).await;
    let after = api.next_of(Kind::Listener).await;
    assert_eq!(names(&after), names(&registered), "the same listener");
    let any = after.resources[0].resource.as_ref().expect("a body");
    let text = format!("{:?}", Listener::decode(any.value.as_slice()).expect("a listener").metadata);
    assert!(text.contains("web"), "with the new rule: {text}");
    drop(api);
    eventually("it is not listed any more", async || control.xds.status().proxies().is_empty()).await;
    let mut again = Client::open(channel(&control).await, API).await.expect("the stream opens");
    again.subscribe(Kind::Listener, &[]).await;
    assert_eq!(again.end().await.code(), Code::PermissionDenied, "what is not registered cannot begin");
    control.shutdown().await;
}

#[tokio::test]
async fn a_workload_may_be_its_own_proxy_only() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let own = XdsPeer::Only(Arc::new([API.to_owned()].into()));
    let channel = handed_over(&control, own).await;
    let mut other = Client::open(channel.clone(), WEB).await.expect("the stream opens");
    other.subscribe(Kind::Cluster, &[]).await;
    let refused = other.end().await;
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("may not act as proxy"), "{refused}");
    let mut own = Client::open(channel, API).await.expect("the stream opens");
    own.subscribe(Kind::Listener, &[]).await;
    assert_eq!(names(&own.next_of(Kind::Listener).await).len(), 1);
    control.shutdown().await;
}

#[tokio::test]
async fn one_connection_carries_the_streams_of_many_proxies() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let channel = handed_over(&control, XdsPeer::Node).await;
    let mut clients = Vec::new();
    for proxy in [WEB, API] {
        let mut client = Client::open(channel.clone(), proxy).await.expect("the stream opens");
        client.subscribe(Kind::Listener, &[]).await;
        clients.push(client);
    }
    for client in &mut clients {
        client.next_of(Kind::Listener).await;
    }
    assert_eq!(control.xds.status().proxies().len(), 2);
    control.shutdown().await;
}

#[tokio::test]
async fn a_client_that_comes_back_gets_only_what_changed_meanwhile() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let cluster = api_cluster(&control);
    let mut before = Client::ready(&control, WEB).await;
    let clusters = versions(&before.next_of(Kind::Cluster).await);
    let mut listeners = versions(&before.next_of(Kind::Listener).await);
    before.subscribe(Kind::Endpoints, &[&cluster]).await;
    let endpoints = versions(&before.next_of(Kind::Endpoints).await);
    listeners.extend(versions(&before.next_of(Kind::Listener).await));
    assert_eq!(listeners.len(), 3);
    // Another stream keeps the certificate, as a proxy that reconnects at once would find it.
    let keep = control.leaves.watch(&support::name("web")).expect("room");
    drop(before);
    control.intend("x", "web", Action::Allow).await;

    let mut after = Client::open(channel(&control).await, WEB).await.expect("accepted");
    let known = [(Kind::Cluster, clusters), (Kind::Endpoints, endpoints), (Kind::Listener, listeners)];
    for (kind, initial_resource_versions) in known {
        let resource_names_subscribe = if kind == Kind::Endpoints { vec![cluster.clone()] } else { Vec::new() };
        after.send(DeltaDiscoveryRequest { initial_resource_versions, resource_names_subscribe, ..of(kind) }).await;
    }
    let response = after.next().await.expect("open");
    assert_eq!(names(&response), ["public_listener:127.0.0.1:21001".to_owned()].into());
    assert!(response.removed_resources.is_empty());
    drop(keep);
    control.shutdown().await;
}

#[tokio::test]
async fn a_refusal_is_shown_with_its_reason_and_later_updates_flow() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let mut api = Client::ready(&control, API).await;
    let response = loop {
        let response = api.next().await.expect("open");
        if response.type_url == Kind::Listener.type_url() {
            break response;
        }
        api.ack(&response).await;
    };
    api.nack(&response, "public_listener: no room for port 21000").await;
    let refusals = || control.xds.status().proxies().remove(API).map(|status| status.refusals).unwrap_or_default();
    eventually("the refusal is shown", async || refusals().contains_key(&Kind::Listener)).await;
    let refusal = refusals().remove(&Kind::Listener).expect("shown");
    assert_eq!(refusal.reason, "public_listener: no room for port 21000");
    assert_eq!(refusal.resources, ["public_listener:127.0.0.1:21000"]);

    control.intend("web", "api", Action::Allow).await;
    api.next_of(Kind::Listener).await;
    eventually("it is forgotten once accepted", async || refusals().is_empty()).await;
    control.shutdown().await;
}

#[tokio::test]
async fn a_rotated_root_reaches_clusters_and_listeners() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let mut api = Client::ready(&control, API).await;
    let count = |response: &DeltaDiscoveryResponse| {
        let any = response.resources[0].resource.as_ref().expect("a body");
        String::from_utf8_lossy(&any.value).matches("BEGIN CERTIFICATE").count()
    };
    assert_eq!(count(&api.next_of(Kind::Listener).await), 2, "leaf and root");
    control.authority.rotate().await.expect("rotation");
    // Both roots at once; a moment later, or together with them, a leaf of the new root with the cross-signed certificate.
    let mut seen = count(&api.next_of(Kind::Listener).await);
    while seen != 4 {
        assert_eq!(seen, 3, "the old leaf with both roots");
        seen = count(&api.next_of(Kind::Listener).await);
    }
    control.shutdown().await;
}

#[tokio::test]
async fn streams_and_sizes_are_limited() {
    let limits = XdsLimits { max_streams: 1, max_request: 4096, ..XdsLimits::default() };
    let control = countdash(Action::Deny, limits).await;
    let mut first = Client::ready(&control, API).await;
    first.next_of(Kind::Listener).await;
    let second = match Client::open(channel(&control).await, WEB).await {
        Err(status) => status,
        Ok(mut client) => client.end().await,
    };
    assert_eq!(second.code(), Code::ResourceExhausted, "{second}");
    let long = "x".repeat(8192);
    first.subscribe(Kind::Endpoints, &[&long]).await;
    let refused = first.end().await;
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    drop(first);
    eventually("room again", async || {
        let Ok(mut client) = Client::open(channel(&control).await, WEB).await else { return false };
        client.subscribe(Kind::Listener, &[]).await;
        client.next().await.is_ok()
    })
    .await;
    control.shutdown().await;
}

#[tokio::test]
async fn state_of_the_world_is_refused_with_what_to_do() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let mut client = AggregatedDiscoveryServiceClient::new(channel(&control).await);
    let requests = tokio_stream::iter([DiscoveryRequest::default()]);
    let refused = client.stream_aggregated_resources(requests).await.expect_err("only delta");
    assert_eq!(refused.code(), Code::Unimplemented);
    assert!(refused.message().contains("DELTA_GRPC"), "{refused}");
    control.shutdown().await;
}

#[tokio::test]
async fn shutdown_ends_streams_with_a_reason() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let mut api = Client::ready(&control, API).await;
    api.next_of(Kind::Listener).await;
    let (end, ()) = tokio::join!(api.end(), async {
        timeout(Duration::from_secs(30), control.shutdown()).await.expect("every task ends");
    });
    assert_eq!(end.code(), Code::Unavailable, "{end}");
}

/// `grpc.health.v1.HealthCheckRequest` and its response.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[tokio::test]
async fn health_checks_are_answered_on_the_same_port() {
    let control = countdash(Action::Deny, XdsLimits::default()).await;
    let mut client = tonic::client::Grpc::new(channel(&control).await);
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let mut check = async |service: &str| {
        client.ready().await.expect("connected");
        let codec = tonic_prost::ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
        client.unary(Request::new(HealthCheckRequest { service: service.to_owned() }), path.clone(), codec).await
    };
    assert_eq!(check("").await.expect("serving").into_inner().status, 1);
    let ads = "envoy.service.discovery.v3.AggregatedDiscoveryService";
    assert_eq!(check(ads).await.expect("serving").into_inner().status, 1);
    assert_eq!(check("other").await.expect_err("unknown").code(), Code::NotFound);
    control.shutdown().await;
}
