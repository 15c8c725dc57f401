//! The dashboard's one connection to the counting service: asks for the count, reconnects by itself.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// How often the count moves while connected.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// How long one connection is used: a new path or a new instance shows within seconds.
const RENEW_AFTER: Duration = Duration::from_secs(2);
/// How long to wait before dialling again.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long one dial or one answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest answer that is read.
const MAX_ANSWER: usize = 64 * 1024;

/// What every viewer sees.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    pub(crate) connected: bool,
    pub(crate) count: u64,
    pub(crate) hostname: String,
    pub(crate) error: String,
    /// Round trip of the last answer.
    pub(crate) micros: u128,
    /// Connections opened since the start: grows by one at each reconnect.
    pub(crate) connections: u64,
}

impl State {
    pub(crate) fn json(&self) -> String {
        serde_json::json!({
            "connected": self.connected, "count": self.count, "hostname": self.hostname, "error": self.error,
            "micros": u64::try_from(self.micros).unwrap_or(u64::MAX), "connections": self.connections,
        })
        .to_string()
    }
}

/// Where the counting service is.
pub(crate) struct Target {
    authority: String,
    path: String,
}

impl Target {
    /// Reads `http://host:port[/path]`.
    pub(crate) fn parse(url: &str) -> anyhow::Result<Self> {
        let uri: hyper::Uri = url.parse().context("not a URL")?;
        if uri.scheme_str() != Some("http") {
            bail!("only http:// is spoken; the mesh encrypts");
        }
        let authority = uri.authority().context("no host")?;
        let authority = if authority.port().is_some() { authority.to_string() } else { format!("{authority}:80") };
        Ok(Self { authority, path: uri.path().to_owned() })
    }
}

/// Asks for the count until nobody listens any more.
pub(crate) async fn follow(target: Target, publish: watch::Sender<State>) {
    while !publish.is_closed() {
        let Err(error) = serve_one_connection(&target, &publish).await else { continue };
        publish.send_modify(|state| {
            state.connected = false;
            state.error = format!("{error:#}");
        });
        sleep(RETRY_AFTER).await;
    }
}

async fn serve_one_connection(target: &Target, publish: &watch::Sender<State>) -> anyhow::Result<()> {
    let stream = timeout(PATIENCE, TcpStream::connect(&target.authority)).await.context("connect: timed out")??;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let result = ask_repeatedly(target, &mut sender, publish).await;
    connection.abort();
    result
}

async fn ask_repeatedly(
    target: &Target,
    sender: &mut SendRequest<Empty<Bytes>>,
    publish: &watch::Sender<State>,
) -> anyhow::Result<()> {
    let (opened, mut first) = (Instant::now(), true);
    while opened.elapsed() < RENEW_AFTER {
        let started = Instant::now();
        let (count, hostname) = timeout(PATIENCE, ask(target, sender)).await.context("no answer in time")??;
        publish.send_modify(|state| {
            let connections = state.connections + u64::from(first);
            let micros = started.elapsed().as_micros();
            *state = State { connected: true, count, hostname, error: String::new(), micros, connections };
        });
        first = false;
        sleep(ASK_EVERY).await;
    }
    Ok(())
}

async fn ask(target: &Target, sender: &mut SendRequest<Empty<Bytes>>) -> anyhow::Result<(u64, String)> {
    let request = Request::get(&target.path).header("host", &target.authority).body(Empty::new())?;
    let response = sender.send_request(request).await?;
    if !response.status().is_success() {
        bail!("counting service answered {}", response.status());
    }
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("read the answer: {error}"))?.to_bytes();
    let answer: serde_json::Value = serde_json::from_slice(&body).context("the answer is not JSON")?;
    let count = answer["count"].as_u64().context("the answer has no count")?;
    Ok((count, answer["hostname"].as_str().unwrap_or("unknown").to_owned()))
}
