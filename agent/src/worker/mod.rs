//! The agent's side of the worker: starts or re-adopts it, keeps it alive, answers its requests for sockets.
//!
//! One task, [`Supervisor`], owns everything: the process, the control socket, the listening sockets of every workload and
//! what the worker last said. Others talk to it through a [`WorkerHandle`]. The listening sockets stay here, so a worker that
//! crashes loses its own connections only: connections that wait in a backlog are accepted by its successor.
//!
//! The worker is the less trusted end. It gets sockets only in network namespaces of workloads that were announced with
//! [`WorkerHandle::serve`], and listeners only at the addresses named there.

mod backoff;
mod process;
mod sockets;
mod supervisor;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use culvert_proxy::handoff::{ProxyStatus, Traffic};
use culvert_types::ConnectionEvent;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use process::WorkerRecord;
pub use process::{WorkerFileError, WorkerSettings, check_record};
pub use supervisor::Supervisor;

/// Commands that may wait for the supervisor.
const COMMAND_QUEUE: usize = 64;

/// One proxy that the worker shall serve.
#[derive(Clone, Debug)]
pub struct Served {
    /// Catalog ID of the sidecar.
    pub proxy: String,
    /// Name of the service in front of which it stands.
    pub service: String,
    /// Network namespace of the workload.
    pub netns: PathBuf,
    /// Port of the inbound listener; it may be opened on any local address of the netns.
    pub inbound_port: u16,
    /// Addresses of the upstream listeners.
    pub upstreams: Vec<SocketAddr>,
}

/// What the supervisor needs from the rest of the agent.
pub trait Surroundings: Send + Sync {
    /// Serve xDS to the worker on this connection.
    fn connect_xds(&self, stream: UnixStream);
    /// An inbound listener of `proxy` is open; the kernel may steer to it.
    fn inbound_listener(&self, proxy: &str, port: u16, listener: BorrowedFd<'_>);
    /// The worker reports a connection of `service`.
    fn event(&self, service: &str, event: ConnectionEvent);
    /// What `proxy` carries for `service`.
    fn traffic(&self, proxy: &str, service: &str, traffic: &Traffic);
    /// This proxy carries nothing any more, or none does: the worker is gone.
    fn no_traffic(&self, proxy: Option<&str>);
    /// The worker dropped this many events.
    fn events_lost(&self, count: u64);
}

/// What is known of the worker.
#[derive(Clone, Debug, Default)]
pub struct WorkerView {
    /// Its process id while it runs.
    pub pid: Option<u32>,
    /// How often a worker was started after the first.
    pub restarts: u64,
    /// What it last said of each proxy. Emptied when the worker goes away.
    pub proxies: BTreeMap<String, ProxyStatus>,
    /// How often the worker gave up a proxy that it should serve; each was served again.
    pub proxy_failures: BTreeMap<String, u64>,
}

enum Command {
    Serve(Served),
    Stop { proxy: String, deadline: Duration, done: oneshot::Sender<()> },
    Shutdown { deadline: Duration, done: oneshot::Sender<()> },
}

/// How long the end of a worker that was drained may take.
const END_WITHIN: Duration = Duration::from_secs(8);

/// How the rest of the agent talks to the supervisor. Cheap to clone.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<WorkerView>,
}

impl WorkerHandle {
    /// Has the worker serve `served` from now on, across restarts. Idempotent.
    pub async fn serve(&self, served: Served) {
        // The supervisor ends only with the agent; then there is nothing left to serve.
        drop(self.commands.send(Command::Serve(served)).await);
    }

    /// Drains the proxy and closes its listeners; returns when it is gone or `deadline` has passed.
    pub async fn stop(&self, proxy: &str, deadline: Duration) {
        let (done, gone) = oneshot::channel();
        drop(self.commands.send(Command::Stop { proxy: proxy.to_owned(), deadline, done }).await);
        drop(tokio::time::timeout(deadline + Duration::from_secs(1), gone).await);
    }

    /// Drains the whole worker and ends it; the supervisor ends with it.
    ///
    /// # Errors
    /// Which worker may be left.
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), String> {
        let pid = self.view.borrow().pid;
        let (done, gone) = oneshot::channel();
        drop(self.commands.send(Command::Shutdown { deadline, done }).await);
        match tokio::time::timeout(deadline + END_WITHIN, gone).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(format!("the worker{}", pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())),
        }
    }

    /// What is known of the worker, as it changes.
    #[must_use]
    pub fn view(&self) -> watch::Receiver<WorkerView> {
        self.view.clone()
    }

    /// Waits until the worker accepts on every listener of `proxy`.
    ///
    /// # Errors
    /// What the worker last said about the proxy, when it is not ready within `patience`.
    pub async fn ready(&self, proxy: &str, patience: Duration) -> Result<(), NotReady> {
        let mut view = self.view.clone();
        let is_ready = |view: &WorkerView| view.proxies.get(proxy).is_some_and(|status| status.ready);
        if tokio::time::timeout(patience, view.wait_for(is_ready)).await.is_ok_and(|waited| waited.is_ok()) {
            return Ok(());
        }
        let last = self.view.borrow().proxies.get(proxy).cloned();
        Err(NotReady {
            proxy: proxy.to_owned(),
            last: last.map_or_else(|| "nothing yet".into(), |last| describe(&last)),
        })
    }
}

/// The worker does not serve a proxy.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the worker does not serve {proxy} yet; it says: {last}")]
pub struct NotReady {
    /// The proxy.
    pub proxy: String,
    /// What the worker said.
    pub last: String,
}

fn describe(status: &ProxyStatus) -> String {
    if let Some(nack) = &status.nack {
        return format!("resource {} is refused: {}", nack.resource, nack.reason);
    }
    let failed = status.listeners.iter().find_map(|listener| Some((listener.address, listener.error.as_ref()?)));
    match failed {
        Some((address, error)) => format!("listener {address}: {error}"),
        None if status.xds_version.is_none() => "no configuration yet".to_owned(),
        None => "listeners are not open yet".to_owned(),
    }
}

/// Makes a supervisor and the handle to it; [`Supervisor::run`] starts the work.
#[must_use]
pub fn supervisor(settings: WorkerSettings, surroundings: Arc<dyn Surroundings>) -> (Supervisor, WorkerHandle) {
    let (commands, received) = mpsc::channel(COMMAND_QUEUE);
    let (publish, view) = watch::channel(WorkerView::default());
    (Supervisor::new(settings, surroundings, received, publish), WorkerHandle { commands, view })
}
