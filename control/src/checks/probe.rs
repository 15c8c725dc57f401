//! One run of a check that culvert makes itself: TCP connect or HTTP request, through the [`CheckDialer`].

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use culvert_types::HealthStatus;
use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{ACCEPT, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::state::rows::{CheckDefinition, Probe};

/// Redirects followed in one run, as Go's client.
const MAX_REDIRECTS: usize = 10;
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;

/// Connects to what checks look at. The agent's makes the socket inside the network namespace of the workload that the
/// service belongs to; whatever it does not know is dialled from the node.
pub trait CheckDialer: Send + Sync {
    /// Connects to `address` as seen by the service `service_id`; empty for checks of the node.
    fn dial(&self, service_id: &str, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>>;
}

/// Dials everything from the namespace of the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeDialer;

impl CheckDialer for NodeDialer {
    fn dial(&self, _service_id: &str, address: SocketAddr) -> BoxFuture<'static, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(address))
    }
}

/// What a run found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Outcome {
    pub(super) status: HealthStatus,
    pub(super) output: String,
}

impl Outcome {
    fn passing(output: String) -> Self {
        Self { status: HealthStatus::Passing, output }
    }

    fn critical(output: String) -> Self {
        Self { status: HealthStatus::Critical, output }
    }
}

/// Runs `definition` once, within its time-out. Probes that are not run this way pass without a look.
pub(super) async fn run(dialer: &Arc<dyn CheckDialer>, service_id: &str, definition: &CheckDefinition) -> Outcome {
    let target = Target { dialer, service_id };
    let run = async {
        match &definition.probe {
            Probe::Tcp { address } => tcp(&target, address).await,
            Probe::Http { url, method, header, body, disable_redirects } => {
                let mut request = HttpProbe {
                    url: url.clone(),
                    method: method.clone(),
                    headers: headers(header),
                    body: Bytes::copy_from_slice(body.as_bytes()),
                    redirects: if *disable_redirects { 0 } else { MAX_REDIRECTS },
                    output: definition.output_max_size,
                };
                http(&target, &mut request).await
            }
            Probe::Fixed | Probe::Ttl(_) | Probe::Alias { .. } => Outcome::passing(String::new()),
        }
    };
    let late = |_| Outcome::critical(format!("no answer within {:?}", definition.timeout));
    tokio::time::timeout(definition.timeout, run).await.unwrap_or_else(late)
}

/// Who looks.
struct Target<'a> {
    dialer: &'a Arc<dyn CheckDialer>,
    service_id: &'a str,
}

impl Target<'_> {
    /// Connects to the first address of `host:port` that answers.
    async fn connect(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let host = if host.is_empty() { "localhost" } else { host };
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
        for address in tokio::net::lookup_host((host, port)).await?.take(MAX_ADDRESSES) {
            match self.dialer.dial(self.service_id, address).await {
                Ok(stream) => return Ok(stream),
                Err(err) => last = io::Error::new(err.kind(), format!("dial tcp {address}: {err}")),
            }
        }
        Err(last)
    }
}

async fn tcp(target: &Target<'_>, address: &str) -> Outcome {
    let Some((host, port)) = split_host_port(address) else {
        return Outcome::critical(format!("{address:?} is not host:port"));
    };
    match target.connect(host, port).await {
        Ok(_) => Outcome::passing(format!("TCP connect {address}: Success")),
        Err(err) => Outcome::critical(err.to_string()),
    }
}

/// Splits `host:port`; the host may be empty or an IPv6 address in brackets.
pub(crate) fn split_host_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    Some((bare, port.parse().ok().filter(|port| *port != 0)?))
}

struct HttpProbe {
    url: String,
    method: String,
    headers: HeaderMap,
    body: Bytes,
    redirects: usize,
    /// Most bytes of the answer's body that are kept.
    output: usize,
}

/// Header fields that cannot be sent were refused at registration.
fn headers(fields: &std::collections::BTreeMap<String, Vec<String>>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(USER_AGENT, HeaderValue::from_static("Consul Health Check"));
    headers.insert(ACCEPT, HeaderValue::from_static("text/plain, text/*, */*"));
    for (name, values) in fields {
        let Ok(name) = name.parse::<HeaderName>() else { continue };
        headers.remove(&name);
        for value in values.iter().filter_map(|value| HeaderValue::from_str(value).ok()) {
            headers.append(name.clone(), value);
        }
    }
    headers
}

async fn http(target: &Target<'_>, probe: &mut HttpProbe) -> Outcome {
    loop {
        let response = match request(target, probe).await {
            Ok(response) => response,
            Err(why) => return Outcome::critical(format!("{} {}: {why}", probe.method, probe.url)),
        };
        let status = response.status();
        if status.is_redirection() && probe.redirects > 0 && response.headers().contains_key(LOCATION) {
            if let Err(why) = follow(probe, &response) {
                return Outcome::critical(format!("{} {}: {why}", probe.method, probe.url));
            }
            continue;
        }
        let body = read_body(response, probe.output).await;
        let output = format!("HTTP {} {}: {status} Output: {body}", probe.method, probe.url);
        let verdict = match status {
            StatusCode::TOO_MANY_REQUESTS => HealthStatus::Warning,
            status if status.is_success() => HealthStatus::Passing,
            _ => HealthStatus::Critical,
        };
        return Outcome { status: verdict, output };
    }
}

async fn request(target: &Target<'_>, probe: &HttpProbe) -> Result<Response<hyper::body::Incoming>, String> {
    let (uri, host, port) = split_url(&probe.url)?;
    let stream = target.connect(&host, port).await.map_err(|err| err.to_string())?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|err| err.to_string())?;
    // Ends with the sender or the peer; errors come out of the request too.
    tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let method = Method::from_bytes(probe.method.as_bytes()).map_err(|err| err.to_string())?;
    let mut request = Request::new(Full::new(probe.body.clone()));
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().map_err(|err: hyper::http::uri::InvalidUri| err.to_string())?;
    *request.headers_mut() = probe.headers.clone();
    if !request.headers().contains_key(HOST) {
        let authority = uri.authority().map_or(host.as_str(), |authority| authority.as_str());
        let value = HeaderValue::from_str(authority).map_err(|err| err.to_string())?;
        request.headers_mut().insert(HOST, value);
    }
    sender.send_request(request).await.map_err(|err| err.to_string())
}

/// Turns the probe to where the answer points.
fn follow(probe: &mut HttpProbe, response: &Response<hyper::body::Incoming>) -> Result<(), String> {
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let location = location.ok_or("the redirect's Location is not text")?;
    probe.url = if location.starts_with('/') {
        let (uri, ..) = split_url(&probe.url)?;
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        format!("http://{authority}{location}")
    } else {
        location.to_owned()
    };
    probe.redirects -= 1;
    if probe.redirects == 0 {
        return Err(format!("stopped after {MAX_REDIRECTS} redirects"));
    }
    if !matches!(response.status(), StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT) {
        probe.body = Bytes::new();
        if probe.method != "HEAD" {
            probe.method = "GET".to_owned();
        }
    }
    // A name that was given for the first server is not for another one.
    probe.headers.remove(HOST);
    Ok(())
}

/// The URL, its host without brackets, its port.
pub(crate) fn split_url(url: &str) -> Result<(Uri, String, u16), String> {
    let uri: Uri = url.parse().map_err(|err| format!("{url:?} is not a URL: {err}"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("{url:?} is not an http:// URL"));
    }
    let host = uri.host().ok_or_else(|| format!("{url:?} has no host"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = uri.port_u16().unwrap_or(80);
    Ok((uri, host, port))
}

/// The first `limit` bytes of the body; the rest is not read.
async fn read_body(response: Response<hyper::body::Incoming>, limit: usize) -> String {
    let mut body = response.into_body();
    let mut read = Vec::new();
    while read.len() < limit
        && let Some(Ok(frame)) = body.frame().await
    {
        if let Some(data) = frame.data_ref() {
            read.extend_from_slice(&data[..data.len().min(limit - read.len())]);
        }
    }
    String::from_utf8_lossy(&read).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_addresses_as_go_dials_them() {
        assert_eq!(split_host_port("127.0.0.1:80"), Some(("127.0.0.1", 80)));
        assert_eq!(split_host_port("[::1]:80"), Some(("::1", 80)));
        assert_eq!(split_host_port(":80"), Some(("", 80)));
        for text in ["", "80", "::1:80", "[::1:80", "a:0", "a:65536", "a:x"] {
            assert_eq!(split_host_port(text), None, "{text}");
        }
    }

    #[test]
    fn splits_urls() {
        let (uri, host, port) = split_url("http://[::1]:9001/health?x=1").expect("a URL");
        assert_eq!((uri.path(), host.as_str(), port), ("/health", "::1", 9001));
        assert_eq!(split_url("http://localhost").expect("a URL").2, 80);
        for text in ["https://localhost", "localhost:80", "/path", "http://", "ftp://x"] {
            assert!(split_url(text).is_err(), "{text}");
        }
    }
}
