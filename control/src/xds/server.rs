//! The gRPC server: TCP and given unix connections, one service for proxies and one for health checks.
//!
//! Bound before it runs; ends every stream when told to stop. `x-consul-token` is accepted and has no meaning while ACLs are
//! off.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use futures::stream::Stream as FuturesStream;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::{Request, Response, Status as GrpcStatus, Streaming};
use tracing::{error, warn};

use super::health::WithHealth;
use super::peer::{Connection, Io, XdsPeer};
use super::status::Status;
use super::stream::{self, RESPONSES};
use crate::ca::Leaves;
use crate::config::Reloadable;
use crate::state::Ledger;

/// Pause after a failed accept: running out of descriptors must not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Accepted connections that wait for the server.
const ACCEPTED: usize = 64;

/// Limits of the xDS server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct XdsLimits {
    /// Open connections; beyond, new ones wait in the backlog. Default 1024.
    pub max_connections: usize,
    /// Open streams of all connections; beyond, a stream is answered with `RESOURCE_EXHAUSTED`. Default 4096.
    pub max_streams: usize,
    /// Largest request, in bytes; default 4 MiB.
    pub max_request: usize,
    /// Largest response, in bytes; default 64 MiB.
    pub max_response: usize,
    /// A connection that does not answer is probed after this time and closed after as much again. Default 30 s.
    pub keepalive: Duration,
}

impl Default for XdsLimits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_streams: 4096,
            max_request: 4 << 20,
            max_response: 64 << 20,
            keepalive: Duration::from_secs(30),
        }
    }
}

/// What the server serves from.
pub struct XdsConfig {
    /// This node: only its own proxies are served.
    pub node: String,
    /// Catalog and intentions.
    pub ledger: Ledger,
    /// Certificates.
    pub leaves: Leaves,
    /// The default policy, as last reloaded.
    pub settings: watch::Receiver<Reloadable>,
    /// Limits.
    pub limits: XdsLimits,
    /// Ends everything.
    pub stop: CancellationToken,
}

/// What every stream shares.
pub(super) struct Shared {
    pub(super) node: String,
    pub(super) ledger: Ledger,
    pub(super) leaves: Leaves,
    pub(super) settings: watch::Receiver<Reloadable>,
    pub(super) status: Status,
    pub(super) stop: CancellationToken,
    streams: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// A running xDS server.
pub struct XdsServer {
    shared: Arc<Shared>,
    address: Option<SocketAddr>,
    connections: Arc<Semaphore>,
    accepted: mpsc::Sender<io::Result<Connection>>,
}

impl XdsServer {
    /// Starts to serve, on `listener` if there is one, and whatever [`Self::serve`] brings.
    ///
    /// # Errors
    /// When the listener's address cannot be read.
    pub fn start(config: XdsConfig, listener: Option<TcpListener>) -> io::Result<Self> {
        let XdsConfig { node, ledger, leaves, settings, limits, stop } = config;
        let address = listener.as_ref().map(TcpListener::local_addr).transpose()?;
        let (accepted, connections) = mpsc::channel(ACCEPTED);
        let shared = Arc::new(Shared {
            node,
            ledger,
            leaves,
            settings,
            status: Status::default(),
            stop: stop.clone(),
            streams: Arc::new(Semaphore::new(limits.max_streams)),
            tasks: TaskTracker::new(),
        });
        let server = Self { shared, address, connections: Arc::new(Semaphore::new(limits.max_connections)), accepted };
        server.shared.tasks.spawn(serve(Arc::clone(&server.shared), limits, connections));
        if let Some(listener) = listener {
            let (connections, accepted) = (Arc::clone(&server.connections), server.accepted.clone());
            let accept = async move { stop.run_until_cancelled(accept(listener, connections, accepted)).await };
            server.shared.tasks.spawn(accept);
        }
        Ok(server)
    }

    /// Where it listens for TCP.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Serves a connection that somebody else made, for example one end of a socket pair.
    pub fn serve(&self, stream: UnixStream, peer: XdsPeer) {
        let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
            warn!("too many xDS connections, one more was refused");
            return;
        };
        let (accepted, stop) = (self.accepted.clone(), self.shared.stop.clone());
        self.shared.tasks.spawn(async move {
            let connection = Connection { io: Io::Unix(stream), peer, _permit: permit };
            stop.run_until_cancelled(accepted.send(Ok(connection))).await
        });
    }

    /// The connected proxies.
    #[must_use]
    pub fn status(&self) -> &Status {
        &self.shared.status
    }

    /// Waits until every stream has ended. They end when the token of [`XdsConfig::stop`] is cancelled.
    pub async fn stopped(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

async fn accept(listener: TcpListener, connections: Arc<Semaphore>, accepted: mpsc::Sender<io::Result<Connection>>) {
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(err) => {
                warn!(%err, "accepting an xDS connection failed");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        if let Err(err) = stream.set_nodelay(true) {
            warn!(%err, "an xDS connection keeps Nagle's delay");
        }
        let connection = Connection { io: Io::Tcp(stream), peer: XdsPeer::Node, _permit: permit };
        if accepted.send(Ok(connection)).await.is_err() {
            return;
        }
    }
}

async fn serve(shared: Arc<Shared>, limits: XdsLimits, connections: mpsc::Receiver<io::Result<Connection>>) {
    let ads = AggregatedDiscoveryServiceServer::new(Ads { shared: Arc::clone(&shared) })
        .max_decoding_message_size(limits.max_request)
        .max_encoding_message_size(limits.max_response);
    let streams = u32::try_from(limits.max_streams).unwrap_or(u32::MAX);
    let served = Server::builder()
        .http2_keepalive_interval(Some(limits.keepalive))
        .http2_keepalive_timeout(Some(limits.keepalive))
        .max_concurrent_streams(Some(streams))
        .serve_with_incoming_shutdown(
            WithHealth::new(ads),
            ReceiverStream::new(connections),
            shared.stop.clone().cancelled_owned(),
        )
        .await;
    if let Err(err) = served {
        error!(%err, "the xDS server ended");
    }
}

/// The service that proxies call.
struct Ads {
    shared: Arc<Shared>,
}

type Responses<T> = Pin<Box<dyn FuturesStream<Item = Result<T, GrpcStatus>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, GrpcStatus> {
        Err(GrpcStatus::unimplemented("only incremental xDS is served: set ads_config.api_type to DELTA_GRPC"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, GrpcStatus> {
        let permit = Arc::clone(&self.shared.streams).try_acquire_owned().map_err(|_| {
            self.shared.status.refused_stream();
            GrpcStatus::resource_exhausted("too many xDS streams on this agent")
        })?;
        let peer = request.extensions().get::<XdsPeer>().cloned();
        let peer = peer.ok_or_else(|| GrpcStatus::internal("a connection without a peer"))?;
        let (responses, receiver) = mpsc::channel(RESPONSES);
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            stream::serve(shared, peer, request.into_inner(), responses).await;
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
