//! One connection to a control plane, shared by the streams of many proxies and dialled again when it breaks.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use futures::FutureExt;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use super::trust::ServerTrust;

/// Longest wait for a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest response of a control plane, in bytes.
pub const MAX_MESSAGE: usize = 64 << 20;
/// Idle time after which the kernel probes a TCP connection. HTTP/2 pings are not used: Consul's server hangs up on clients
/// that ping more often than it likes, and on a unix socket the end of the peer is seen at once.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);
/// What stands in `:authority`. No server looks at it.
const AUTHORITY: &str = "http://control-plane";

/// A connected byte stream.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// Makes a connection to the control plane, as often as one is needed.
pub trait Dial: Send + Sync + 'static {
    /// Dials once. The caller bounds the time.
    fn dial(&self) -> BoxFuture<'static, io::Result<Box<dyn Transport>>>;
}

/// A connection to a control plane. Clones share it. Nothing is dialled before the first stream.
#[derive(Clone)]
pub struct XdsChannel {
    channel: Channel,
    wake: watch::Sender<()>,
}

impl fmt::Debug for XdsChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XdsChannel").finish_non_exhaustive()
    }
}

impl XdsChannel {
    /// Connects by means of `dial`: for example over streams that the agent hands over.
    #[must_use]
    pub fn over(dial: impl Dial) -> Self {
        let dial = Arc::new(dial);
        let connector = tower::service_fn(move |_: Uri| {
            let dialled = dial.dial();
            async move {
                let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
                let stream = tokio::time::timeout(CONNECT_TIMEOUT, dialled).await.map_err(timed_out)??;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        let channel = Endpoint::from_static(AUTHORITY).connect_with_connector_lazy(connector);
        Self { channel, wake: watch::Sender::new(()) }
    }

    /// Connects to a unix socket by its path.
    #[must_use]
    pub fn unix(path: PathBuf) -> Self {
        Self::over(Unix(path))
    }

    /// Connects to a TCP address, in clear: for loopback.
    #[must_use]
    pub fn tcp(address: SocketAddr) -> Self {
        Self::over(Tcp(address))
    }

    /// Connects to a TCP address by TLS.
    #[must_use]
    pub fn tls(address: SocketAddr, trust: &ServerTrust) -> Self {
        Self::over(Tls(address, trust.config()))
    }

    /// Ends the waits between attempts of all clients of this channel: the control plane is known to be back.
    pub fn retry_now(&self) {
        self.wake.send_replace(());
    }

    /// Changes at every [`Self::retry_now`].
    pub(super) fn wake(&self) -> watch::Receiver<()> {
        self.wake.subscribe()
    }

    pub(super) fn client(&self) -> AggregatedDiscoveryServiceClient<Channel> {
        AggregatedDiscoveryServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}

struct Unix(PathBuf);

impl Dial for Unix {
    fn dial(&self) -> BoxFuture<'static, io::Result<Box<dyn Transport>>> {
        let path = self.0.clone();
        async move {
            let stream = UnixStream::connect(&path).await;
            let stream =
                stream.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
            Ok(Box::new(stream) as Box<dyn Transport>)
        }
        .boxed()
    }
}

struct Tcp(SocketAddr);

impl Dial for Tcp {
    fn dial(&self) -> BoxFuture<'static, io::Result<Box<dyn Transport>>> {
        let address = self.0;
        async move { Ok(Box::new(connect(address).await?) as Box<dyn Transport>) }.boxed()
    }
}

struct Tls(SocketAddr, Arc<ClientConfig>);

impl Dial for Tls {
    fn dial(&self) -> BoxFuture<'static, io::Result<Box<dyn Transport>>> {
        let (address, connector) = (self.0, TlsConnector::from(Arc::clone(&self.1)));
        async move {
            let stream = connect(address).await?;
            let stream = connector.connect(ServerName::from(address.ip()), stream).await;
            let stream = stream.map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?;
            Ok(Box::new(stream) as Box<dyn Transport>)
        }
        .boxed()
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await;
    let stream = stream.map_err(|error| io::Error::new(error.kind(), format!("{address}: {error}")))?;
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE / 3);
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    Ok(stream)
}
