//! A small client of the HTTP API: one connection per request, over TCP or a unix socket.
//!
//! Left out: TLS (refused by name), connection pooling: the command line makes one call and ends.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::decode::{DecodeError, decode_known};
use crate::value::Secret;

/// Where an agent listens unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:8500";
/// Time to connect.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Time for an answer; stopping a job waits for its tasks.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);
/// Longest answer that is read whole.
const MAX_ANSWER: usize = 64 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is no address.
    #[error("address {address:?}: {reason}")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Nobody answers.
    #[error("cannot reach the agent at {address}; is `culvert agent` running?")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("{method} {path}")]
    Http {
        /// Method of the call.
        method: Method,
        /// Path of the call.
        path: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The agent refuses. The text is that of Consul's client.
    #[error("Unexpected response code: {status} ({message})")]
    Status {
        /// HTTP status.
        status: u16,
        /// The body.
        message: String,
    },
    /// The answer is not what this version expects.
    #[error("answer of {path}")]
    Answer {
        /// Path of the call.
        path: String,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
}

#[derive(Clone, Debug)]
enum Place {
    Tcp(String),
    Unix(PathBuf),
}

/// A client of one agent.
#[derive(Clone, Debug)]
pub struct Client {
    place: Place,
    token: Option<Secret>,
}

impl Client {
    /// A client of the agent at `address`: `host:port`, `http://host:port` or `unix:///path`.
    ///
    /// # Errors
    /// [`ClientError::Address`]; `https` is refused by name.
    pub fn new(address: &str, token: Option<Secret>) -> Result<Self, ClientError> {
        let refused = |reason| ClientError::Address { address: address.to_owned(), reason };
        let place = if let Some(path) = address.strip_prefix("unix://") {
            Place::Unix(path.into())
        } else if address.starts_with("https://") {
            return Err(refused("https is not supported by culvert yet; use http:// or unix://"));
        } else {
            let plain = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
            if plain.is_empty() || plain.contains('/') {
                return Err(refused("use host:port, http://host:port or unix:///path"));
            }
            // The last colon is a port's, unless it stands inside the brackets of an IPv6 address.
            let has_port = plain.rfind(':').is_some_and(|colon| plain.rfind(']').is_none_or(|bracket| bracket < colon));
            Place::Tcp(if has_port { plain.to_owned() } else { format!("{plain}:8500") })
        };
        Ok(Self { place, token })
    }

    /// Calls and decodes the answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let answer = self.bytes(method, path, body).await?;
        decode_known(&answer).map_err(|source| ClientError::Answer { path: path.to_owned(), source })
    }

    /// GET and decode.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// Calls and returns the bytes of the answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn bytes(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Bytes, ClientError> {
        let response = self.send(method.clone(), path, body).await?;
        let collected = tokio::time::timeout(ANSWER_WITHIN, Limited::new(response.into_body(), MAX_ANSWER).collect());
        match collected.await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(source)) => Err(ClientError::Http { method, path: path.to_owned(), source }),
            Err(source) => Err(ClientError::Http { method, path: path.to_owned(), source: source.into() }),
        }
    }

    /// GET whose answer is read as it comes.
    ///
    /// # Errors
    /// [`ClientError`] for the call itself.
    pub async fn stream(&self, path: &str) -> Result<BodyStream, ClientError> {
        let response = self.send(Method::GET, path, None::<&()>).await?;
        Ok(BodyStream { body: response.into_body(), path: path.to_owned() })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, ClientError> {
        let failed = |source| ClientError::Http { method: method.clone(), path: path.to_owned(), source };
        let body = body.map(serde_json::to_vec).transpose().map_err(|error| failed(error.into()))?.unwrap_or_default();
        let mut request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header("host", self.host())
            .header("user-agent", concat!("culvert/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = &self.token {
            request = request.header("x-consul-token", token.expose());
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| failed(error.into()))?;
        let response = self.exchange(request).await?;
        match tokio::time::timeout(ANSWER_WITHIN, response).await {
            Ok(Ok(response)) if response.status().is_success() => Ok(response),
            Ok(Ok(response)) => {
                let status = response.status().as_u16();
                let text = Limited::new(response.into_body(), 64 * 1024).collect().await.map_err(failed)?.to_bytes();
                Err(ClientError::Status { status, message: String::from_utf8_lossy(&text).trim_end().to_owned() })
            }
            Ok(Err(error)) => Err(failed(error.into())),
            Err(elapsed) => Err(failed(elapsed.into())),
        }
    }

    fn host(&self) -> &str {
        match &self.place {
            Place::Tcp(address) => address,
            Place::Unix(_) => "localhost",
        }
    }

    /// Connects and sends; the answer comes from the returned future.
    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<impl Future<Output = hyper::Result<Response<Incoming>>> + use<>, ClientError> {
        let unreachable = |address: String, source| ClientError::Connect { address, source };
        match &self.place {
            Place::Tcp(address) => {
                let stream = within(TcpStream::connect(address)).await;
                let stream = stream.map_err(|source| unreachable(address.clone(), source))?;
                Ok(Box::pin(talk(stream, request)) as std::pin::Pin<Box<dyn Future<Output = _> + Send>>)
            }
            Place::Unix(path) => {
                let stream = within(UnixStream::connect(path)).await;
                let stream = stream.map_err(|source| unreachable(path.display().to_string(), source))?;
                Ok(Box::pin(talk(stream, request)) as std::pin::Pin<Box<dyn Future<Output = _> + Send>>)
            }
        }
    }
}

async fn within<T>(connect: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    let timed_out = || Err(std::io::Error::from(std::io::ErrorKind::TimedOut));
    tokio::time::timeout(CONNECT_WITHIN, connect).await.unwrap_or_else(|_| timed_out())
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> hyper::Result<Response<Incoming>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the body of the answer; its error is told by the body as well.
    tokio::spawn(connection);
    sender.send_request(request).await
}

/// An answer that goes on.
pub struct BodyStream {
    body: Incoming,
    path: String,
}

impl BodyStream {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError::Http`] when the connection breaks.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|error| ClientError::Http {
                method: Method::GET,
                path: self.path.clone(),
                source: error.into(),
            })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }
}

/// `text` as one segment of a path or one value of a query (RFC 3986 §2.3: everything but unreserved is encoded).
#[must_use]
pub fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
