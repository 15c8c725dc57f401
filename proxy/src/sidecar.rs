//! The same data plane as a process of its own for one workload, started as Nomad and operators start Envoy.
//!
//! It makes its own sockets, in the network namespace it was started in, and logs connections instead of reporting them. The
//! admin address serves `/ready` (200 when every listener accepts, else 503) and `/stats/prometheus`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use culvert_types::{ConnectionEvent, ConnectionKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::bootstrap::{Args, Bootstrap};
use crate::events::{EventReader, Events};
use crate::handoff::ProxyStatus;
use crate::metrics::Metrics;
use crate::proxy::{Feed, Proxy};
use crate::sockets::OwnSockets;
use crate::threads::{DataThreads, Placement};
use crate::worker::raise_descriptor_limit;
use crate::xds::XdsClient;

/// Longest time for a request on the admin address.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest request on the admin address, in bytes.
const MAX_ADMIN_REQUEST: usize = 8 * 1024;
/// Requests on the admin address at the same time.
const MAX_ADMIN_CONNECTIONS: usize = 16;

/// Runs a sidecar until it is told to end (SIGTERM, SIGINT) and drained; a second signal ends it at once.
///
/// # Errors
/// The bootstrap file is not usable, the admin address is taken, or there are no threads or descriptors.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let bootstrap = Bootstrap::read(&args.config_path)?;
    rustix::thread::set_no_new_privs(true).context("set no_new_privs")?;
    raise_descriptor_limit().context("raise the limit of open descriptors")?;
    let threads = match args.concurrency {
        Some(count) => DataThreads::new(count.get()),
        None => DataThreads::per_processor(),
    };
    let threads = threads.context("start data threads")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(serve(args, bootstrap, threads.placement()))
}

async fn serve(args: &Args, bootstrap: Bootstrap, threads: Arc<Placement>) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("watch for signals")?;
    let metrics = Arc::new(Metrics::default());
    let (events, reader) = Events::new(Arc::clone(&metrics));
    let (publish, status) = watch::channel(ProxyStatus::default());
    if let Some(address) = bootstrap.admin {
        let listener = TcpListener::bind(address).await.with_context(|| format!("admin address {address}"))?;
        if let Some(path) = &args.admin_address_path {
            let address = listener.local_addr().context("admin address")?.to_string();
            std::fs::write(path, address).with_context(|| format!("write {}", path.display()))?;
        }
        tokio::spawn(admin(listener, status, metrics));
    }
    let log = tokio::spawn(log_events(reader));
    let client = XdsClient::start(bootstrap.control_plane.channel(), bootstrap.node.clone(), bootstrap.token);
    let node = bootstrap.node.metadata.get("node_name").and_then(serde_json::Value::as_str).unwrap_or_default();
    let proxy = Proxy::new(&bootstrap.node.id, node, Arc::new(OwnSockets), threads, events);
    let feed = Feed { config: client.config(), status: client.status() };
    let (stop, stopped) = oneshot::channel();
    let mut running = tokio::spawn(proxy.run(feed, publish, stopped));
    info!(proxy = bootstrap.node.id, "sidecar starts");
    signals.ended().await;
    let _proxy_listens = stop.send(args.drain_time);
    tokio::select! {
        done = &mut running => done.context("the proxy failed")?,
        () = signals.ended() => warn!("told twice to end: connections that are open are reset"),
    }
    drop(log);
    Ok(())
}

/// SIGTERM and SIGINT. Made once: what comes between two waits is not lost.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for either of them.
    async fn ended(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

async fn log_events(mut reader: EventReader) {
    while let Some(event) = reader.next().await {
        log_event(&event);
        match reader.take_lost() {
            0 => {}
            lost => warn!(lost, "connection events were dropped"),
        }
    }
}

fn log_event(event: &ConnectionEvent) {
    let name = |id: &Option<culvert_types::SpiffeId>| id.as_ref().map(ToString::to_string);
    let (source, destination) = (name(&event.source), name(&event.destination));
    let reason = event.reason.map(|reason| reason.as_str());
    let (inbound, rule, detail, peer) = (event.inbound, &event.rule, &event.detail, event.peer);
    match event.kind {
        ConnectionKind::Open => info!(inbound, source, destination, rule, ?peer, "connection opened"),
        ConnectionKind::Close => info!(
            inbound,
            source,
            destination,
            reason,
            detail,
            bytes_to_destination = event.bytes_to_destination,
            bytes_to_source = event.bytes_to_source,
            duration = ?event.duration,
            "connection closed"
        ),
        ConnectionKind::Refuse => {
            warn!(inbound, source, destination, reason, rule, detail, ?peer, "connection refused")
        }
    }
}

async fn admin(listener: TcpListener, status: watch::Receiver<ProxyStatus>, metrics: Arc<Metrics>) {
    let places = Arc::new(Semaphore::new(MAX_ADMIN_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await.inspect_err(|error| warn!(%error, "admin accept failed")) else {
            tokio::time::sleep(crate::l4::ACCEPT_BACKOFF).await;
            continue;
        };
        let (status, metrics) = (status.clone(), Arc::clone(&metrics));
        tokio::spawn(async move {
            let _place = place;
            let _client_may_be_gone = timeout(ADMIN_TIMEOUT, answer(stream, &status, &metrics)).await;
        });
    }
}

/// One request, one answer, over: all that probes and scrapes need of HTTP/1.1 (RFC 9112).
async fn answer(mut stream: TcpStream, status: &watch::Receiver<ProxyStatus>, metrics: &Metrics) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        if head.len() > MAX_ADMIN_REQUEST || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let path = line.strip_prefix("GET ").and_then(|rest| rest.split([' ', '?']).next());
    let (code, body) = match path {
        Some("/ready") if status.borrow().ready => ("200 OK", "LIVE\n".to_owned()),
        Some("/ready") => ("503 Service Unavailable", "PRE_INITIALIZING\n".to_owned()),
        Some("/stats/prometheus") => ("200 OK", metrics.prometheus()),
        Some(_) => ("404 Not Found", "only /ready and /stats/prometheus are here\n".to_owned()),
        None => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {code}\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn a_second_signal_is_heard_however_soon_it_comes() {
        let mut signals = Signals::new().expect("watched");
        for signal in [Signal::TERM, Signal::INT] {
            kill_process(getpid(), signal).expect("sent");
        }
        for _ in 0..2 {
            timeout(ADMIN_TIMEOUT, signals.ended()).await.expect("heard");
        }
    }
}
