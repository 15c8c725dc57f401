//! A control plane: a real gRPC server in this process, steered by the test.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use culvert_proxy::xds::{Dial, Transport};
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use prost::Name;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Longest wait for anything that must happen. Generous: machines are slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the test waits for, or a panic that says so.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {PATIENCE:?}"),
    }
}

/// Waits until `is` holds.
pub(crate) async fn eventually(what: &str, is: impl Fn() -> bool) {
    let polling = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(what, polling).await;
}

/// One delta stream, seen from the server.
pub(crate) struct FakeStream {
    pub(crate) token: Option<String>,
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl FakeStream {
    /// The next request; `None` when the client ended the stream.
    pub(crate) async fn next(&mut self) -> Option<DeltaDiscoveryRequest> {
        soon("a request", self.requests.next()).await.and_then(Result::ok)
    }

    /// The next request, which must be about `T`.
    pub(crate) async fn request<T: Name>(&mut self) -> DeltaDiscoveryRequest {
        let request = self.next().await.expect("stream is open");
        assert_eq!(request.type_url, T::type_url(), "{request:?}");
        request
    }

    pub(crate) async fn send(&self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).await.expect("stream is open");
    }

    /// Sends a response and returns what the client says to it.
    pub(crate) async fn answer<T: Name>(&mut self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
        let nonce = response.nonce.clone();
        self.send(response).await;
        let answer = self.request::<T>().await;
        assert_eq!(answer.response_nonce, nonce);
        answer
    }

    /// Sends a response that the client must accept.
    pub(crate) async fn accepted<T: Name>(&mut self, response: DeltaDiscoveryResponse) {
        assert_eq!(self.answer::<T>(response).await.error_detail, None);
    }

    /// Ends the stream with an error.
    pub(crate) async fn fail(self, status: Status) {
        self.responses.send(Err(status)).await.expect("stream is open");
    }
}

struct Service(mpsc::Sender<FakeStream>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Pin<Box<dyn Stream<Item = Result<DiscoveryResponse, Status>> + Send>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let token = request.metadata().get("x-consul-token").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (responses, receiver) = mpsc::channel(16);
        let stream = FakeStream { token, requests: request.into_inner(), responses };
        self.0.send(stream).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// A running control plane. Connections are made by [`Fake::dialer`], as streams handed over.
pub(crate) struct Fake {
    streams: mpsc::Receiver<FakeStream>,
    line: Arc<Line>,
}

/// The way to the control plane.
struct Line {
    up: AtomicBool,
    dialled: AtomicUsize,
    server_ends: mpsc::Sender<io::Result<UnixStream>>,
    /// Second handles of the client ends, by which connections are cut.
    open: Mutex<Vec<std::os::unix::net::UnixStream>>,
}

struct Dialer(Arc<Line>);

impl Dial for Dialer {
    fn dial(&self) -> BoxFuture<'static, io::Result<Box<dyn Transport>>> {
        let line = Arc::clone(&self.0);
        async move {
            line.dialled.fetch_add(1, Ordering::SeqCst);
            if !line.up.load(Ordering::SeqCst) {
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the line is down"));
            }
            let (client, server) = UnixStream::pair()?;
            let client = client.into_std()?;
            line.open.lock().push(client.try_clone()?);
            line.server_ends.send(Ok(server)).await.map_err(io::Error::other)?;
            Ok(Box::new(UnixStream::from_std(client)?) as Box<dyn Transport>)
        }
        .boxed()
    }
}

impl Fake {
    pub(crate) fn start() -> Self {
        let (server_ends, incoming) = mpsc::channel(16);
        let streams = Self::serve(ReceiverStream::new(incoming));
        let (up, dialled) = (AtomicBool::new(true), AtomicUsize::new(0));
        Self { streams, line: Arc::new(Line { up, dialled, server_ends, open: Mutex::default() }) }
    }

    /// Serves on `incoming` until the test's runtime ends.
    pub(crate) fn serve<I, C>(incoming: I) -> mpsc::Receiver<FakeStream>
    where
        I: Stream<Item = io::Result<C>> + Send + 'static,
        C: tonic::transport::server::Connected + tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, streams) = mpsc::channel(16);
        let service = AggregatedDiscoveryServiceServer::new(Service(sender));
        let server = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
        drop(tokio::spawn(server));
        streams
    }

    pub(crate) fn dialer(&self) -> impl Dial + use<> {
        Dialer(Arc::clone(&self.line))
    }

    /// The next stream that a client opens.
    pub(crate) async fn stream(&mut self) -> FakeStream {
        soon("a stream", self.streams.recv()).await.expect("the server runs")
    }

    /// How often the control plane was dialled.
    pub(crate) fn dialled(&self) -> usize {
        self.line.dialled.load(Ordering::SeqCst)
    }

    /// Lets dialling succeed or fail.
    pub(crate) fn set_up(&self, up: bool) {
        self.line.up.store(up, Ordering::SeqCst);
    }

    /// Cuts all connections.
    pub(crate) fn cut(&self) {
        for connection in self.line.open.lock().drain(..) {
            connection.shutdown(std::net::Shutdown::Both).expect("open until now");
        }
    }
}
