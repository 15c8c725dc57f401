//! The listeners of the HTTP API: bounded connections, time-outs, drain.
//!
//! Bound by [`HttpServer::bind`], served by [`HttpServer::run`]. The timer of hyper is set on purpose: without it no header
//! time-out works, and it counts between the requests of a kept-alive connection too.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;
use tracing::{debug, warn};

use crate::config::HttpLimits;
use crate::metrics::Metrics;

/// Longest request header, in bytes.
const MAX_HEADER: usize = 64 << 10;
/// Pause after a failed accept: running out of descriptors must not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Time to tell a client that it has too many connections, and for it to read that.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Most bytes of its request that are read meanwhile, and thrown away.
const MAX_REFUSED_REQUEST: u64 = 256 << 10;
/// Clients that are given that time at once; others are told and closed.
const MAX_REFUSALS: usize = 64;
/// What it is told.
const REFUSAL: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain; charset=utf-8\r\n\
    Connection: close\r\nContent-Length: 50\r\n\r\nYour IP is issuing too many concurrent connections";

/// Why the API could not listen.
#[derive(Debug, thiserror::Error)]
#[error("HTTP API: listen on {address}")]
pub struct BindError {
    /// Where.
    pub address: SocketAddr,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Who sends a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    /// A process of this host, in the agent's network namespace.
    pub(super) is_local: bool,
}

impl Client {
    /// `own` is this end's address: what comes from it, or from a loopback, comes from this host. The kernel drops packets
    /// of others that carry such a source.
    fn new(peer: IpAddr, own: Option<IpAddr>) -> Self {
        let (peer, own) = (peer.to_canonical(), own.map(|own| own.to_canonical()));
        Self { is_local: peer.is_loopback() || own == Some(peer) }
    }
}

/// Bound listeners.
pub(crate) struct HttpServer {
    listeners: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
    limits: HttpLimits,
    metrics: Metrics,
}

impl HttpServer {
    pub(crate) async fn bind(
        addresses: &[SocketAddr],
        limits: HttpLimits,
        metrics: Metrics,
    ) -> Result<Self, BindError> {
        let (mut listeners, mut bound) = (Vec::new(), Vec::new());
        for &address in addresses {
            let failed = |source| BindError { address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            bound.push(listener.local_addr().map_err(failed)?);
            listeners.push(listener);
        }
        Ok(Self { listeners, addresses: bound, limits, metrics })
    }

    /// Where it listens, with the ports that the system chose.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Serves `router` until `drain`; then gives open requests the drain time, and ends.
    pub(crate) async fn run(self, router: Router, drain: CancellationToken) {
        let (connections, force) = (TaskTracker::new(), CancellationToken::new());
        let shared = Arc::new(Shared {
            router,
            limits: self.limits,
            metrics: self.metrics,
            clients: Mutex::default(),
            refusals: Arc::new(Semaphore::new(MAX_REFUSALS)),
            drain: drain.clone(),
            force: force.clone(),
            connections: connections.clone(),
        });
        let accepting = TaskTracker::new();
        for listener in self.listeners {
            accepting.spawn(Arc::clone(&shared).accept(listener));
        }
        accepting.close();
        accepting.wait().await;
        connections.close();
        if tokio::time::timeout(self.limits.drain_timeout, connections.wait()).await.is_err() {
            warn!(open = connections.len(), "HTTP API: drain time passed, closing connections");
            force.cancel();
            connections.wait().await;
        }
    }
}

struct Shared {
    router: Router,
    limits: HttpLimits,
    metrics: Metrics,
    /// Open connections by client.
    clients: Mutex<HashMap<IpAddr, usize>>,
    refusals: Arc<Semaphore>,
    drain: CancellationToken,
    force: CancellationToken,
    connections: TaskTracker,
}

impl Shared {
    async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.drain.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(err) => {
                    warn!(%err, "HTTP API: accept failed");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                    continue;
                }
            };
            match Place::take(&self, peer.ip()) {
                Some(place) => drop(self.connections.spawn(Arc::clone(&self).serve(stream, peer, place))),
                None => {
                    self.metrics.connection_refused();
                    debug!(%peer, "HTTP API: too many connections");
                    match Arc::clone(&self.refusals).try_acquire_owned() {
                        Ok(place) => drop(self.connections.spawn(refuse(stream, place))),
                        // A new socket has room for it.
                        Err(_) => drop(stream.try_write(REFUSAL)),
                    }
                }
            }
        }
    }

    async fn serve(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, _place: Place) {
        let _counted = self.metrics.connection();
        // Small answers must not wait for an acknowledgement.
        if let Err(err) = stream.set_nodelay(true) {
            debug!(%peer, %err, "HTTP API: TCP_NODELAY not set");
        }
        let router = self.router.clone();
        let client = Client::new(peer.ip(), stream.local_addr().ok().map(|own| own.ip()));
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            let router = router.clone();
            request.extensions_mut().insert(client);
            async move {
                let response: Result<Response<Body>, Infallible> = router.oneshot(request.map(Body::new)).await;
                response
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_timeout)
            .max_buf_size(MAX_HEADER)
            // As Go writes them, for clients that compare names byte by byte.
            .title_case_headers(true)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let served = self.force.run_until_cancelled(async {
            tokio::select! {
                biased;
                served = connection.as_mut() => served,
                () = self.drain.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        });
        if let Some(Err(err)) = served.await {
            debug!(%peer, %err, "HTTP API: connection ended");
        }
    }
}

/// Closed with its request unread, a connection is reset, and the client may never see the answer (RFC 9112 §9.6).
async fn refuse(mut stream: TcpStream, _place: OwnedSemaphorePermit) {
    let told = async {
        stream.write_all(REFUSAL).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(MAX_REFUSED_REQUEST), &mut tokio::io::sink()).await
    };
    // Best effort: a client that does not read is closed all the same.
    if let Ok(Err(err)) = tokio::time::timeout(REFUSAL_TIMEOUT, told).await {
        debug!(%err, "HTTP API: refusal not sent");
    }
}

/// One connection of one client, counted until dropped.
struct Place {
    shared: Arc<Shared>,
    client: IpAddr,
}

impl Place {
    fn take(shared: &Arc<Shared>, client: IpAddr) -> Option<Self> {
        let mut clients = shared.clients.lock();
        let all: usize = clients.values().sum();
        if all >= shared.limits.max_connections {
            return None;
        }
        let open = clients.entry(client).or_default();
        if *open >= shared.limits.max_connections_per_client {
            return None;
        }
        *open += 1;
        Some(Self { shared: Arc::clone(shared), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut clients = self.shared.clients.lock();
        if let Some(open) = clients.get_mut(&self.client) {
            *open -= 1;
            if *open == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_local_when_no_other_host_can_send_from_its_address() {
        for (peer, own, is_local) in [
            ("127.0.0.1", Some("127.0.0.1"), true),
            ("127.0.0.1", None, true),
            ("::1", Some("::1"), true),
            ("::ffff:127.0.0.1", Some("::ffff:127.0.0.1"), true),
            ("192.0.2.7", Some("192.0.2.7"), true),
            ("::ffff:192.0.2.7", Some("192.0.2.7"), true),
            ("192.0.2.8", Some("192.0.2.7"), false),
            ("172.26.64.2", Some("172.26.64.1"), false),
            ("2001:db8::1", Some("2001:db8::2"), false),
            ("192.0.2.7", None, false),
        ] {
            let address = |text: &str| text.parse().expect("an address");
            assert_eq!(Client::new(address(peer), own.map(address)).is_local, is_local, "{peer} to {own:?}");
        }
    }
}
