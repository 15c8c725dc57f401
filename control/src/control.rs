//! The control plane as one value: started, asked, reloaded, shut down.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use culvert_api::ServiceRegistration;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::ca::{Authority, ConfigureError, Leaves, OpenError};
use crate::catalog::{Catalog, Place, RegisterError, Registered, UnknownService};
use crate::checks::{CheckDialer, Checks};
use crate::config::{ControlConfig, Reloadable};
use crate::disk::remedy;
use crate::http::{Api, BindError, HttpServer, router};
use crate::intentions::Intentions;
use crate::mesh::{MeshPublisher, MeshView};
use crate::metrics::Metrics;
use crate::state::rows::Node;
use crate::state::{Ledger, LedgerError, State, UpdateError};
use crate::store::{MemoryStore, RedbStore, Store, StoreError};
use crate::xds::{XdsConfig, XdsPeer, XdsServer};

/// Name of the store's file in the data directory.
const STORE_FILE: &str = "state.redb";

/// Why the control plane did not start. Nothing of it runs then.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The name of the node cannot be a key.
    #[error("node name {0:?} must not be empty, hold a slash or a control character")]
    NodeName(String),
    /// The data directory.
    #[error("data directory {path} cannot be used ({})", remedy(source))]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is in it.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The first write.
    #[error("announce this node")]
    Announce(#[source] UpdateError),
    /// The certificate authority.
    #[error("certificate authority")]
    Authority(#[from] OpenError),
    /// Settings of an authority that is there already.
    #[error("settings of the certificate authority")]
    Configure(#[from] ConfigureError),
    /// An address of the HTTP API.
    #[error(transparent)]
    Http(#[from] BindError),
    /// The xDS server gives private keys to whoever connects.
    #[error(
        "xDS server: {0} is no loopback address, and whoever connects gets the private keys of this node's services: there \
         are no ACLs and no TLS yet. Turn it off (ports.grpc = -1), or give client_addr a loopback address"
    )]
    GrpcExposed(SocketAddr),
    /// The address of the xDS server.
    #[error("xDS server: listen on {address}")]
    Grpc {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A task of the start was cancelled.
    #[error("the start was interrupted")]
    Interrupted,
}

/// A running control plane.
pub struct Control {
    ledger: Ledger,
    catalog: Catalog,
    leaves: Leaves,
    metrics: Metrics,
    xds: XdsServer,
    http: Vec<SocketAddr>,
    settings: watch::Sender<Reloadable>,
    policy_changes: Arc<AtomicU64>,
    mesh: watch::Receiver<Arc<MeshView>>,
    drain: CancellationToken,
    stop: CancellationToken,
    server: Mutex<Option<tokio::task::JoinHandle<()>>>,
    tasks: TaskTracker,
    /// Dropping the value ends everything, without the patience of [`Control::shutdown`].
    _ends: (DropGuard, DropGuard),
}

impl Control {
    /// Opens the store, makes or adopts the authority, binds the listeners, and serves.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: ControlConfig, dialer: Arc<dyn CheckDialer>) -> Result<Self, StartError> {
        check_node_name(&config.node_name)?;
        check_exposure(&config)?;
        let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
        // From here on an error ends what was started.
        let ends = (drain.clone().drop_guard(), stop.clone().drop_guard());
        let metrics = Metrics::default();
        let server = HttpServer::bind(&config.http, config.limits, metrics.clone()).await?;
        let grpc = bind_grpc(config.grpc).await?;

        let store = open_store(config.data_dir.clone()).await?;
        let ledger = Ledger::start(store, stop.clone()).await?;
        let place = Arc::new(Place {
            node: config.node_name.clone(),
            advertise: config.advertise,
            datacenter: config.datacenter.clone(),
            sidecar_ports: config.sidecar_ports.clone(),
            dev: config.dev,
        });
        let catalog = Catalog::new(ledger.clone(), Arc::clone(&place));
        catalog.announce(&node(&config)).await.map_err(StartError::Announce)?;
        let (ca, clock) = (config.ca_given.over(config.ca.clone()), config.clock.clone());
        let authority = Authority::open(ledger.clone(), config.datacenter.clone(), ca, clock, stop.clone()).await?;
        authority.configure(&config.ca_given).await?;
        let leaves = Leaves::new(authority, &config.node_name, stop.clone());
        let (settings, settings_seen) = watch::channel(config.settings);

        let xds = XdsConfig {
            node: config.node_name.clone(),
            ledger: ledger.clone(),
            leaves: leaves.clone(),
            settings: settings_seen.clone(),
            limits: config.xds_limits,
            stop: stop.clone(),
        };
        let address = config.grpc.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)));
        let xds = XdsServer::start(xds, grpc).map_err(|source| StartError::Grpc { address, source })?;

        let tasks = TaskTracker::new();
        let checks = Checks::new(ledger.clone(), &config.node_name, dialer, metrics.clone());
        tasks.spawn(checks.clone().supervise(catalog.clone(), stop.clone()));
        let publisher = MeshPublisher::new(&ledger, &leaves, settings_seen.clone(), &place);
        let (mesh, requested) = (publisher.subscribe(), publisher.requested());
        tasks.spawn(publisher.run(stop.clone()));

        let policy_changes = Arc::new(AtomicU64::new(0));
        let api = Api {
            place,
            policy_changes: Arc::clone(&policy_changes),
            node_id: config.node_id,
            version: config.version,
            limits: config.limits,
            grpc_port: xds.address().map(|address| address.port()),
            ledger: ledger.clone(),
            settings: settings_seen,
            catalog: catalog.clone(),
            checks,
            intentions: Intentions::new(ledger.clone()),
            leaves: leaves.clone(),
            requested,
            metrics: metrics.clone(),
            drain: drain.clone(),
        };
        let http = server.addresses().to_vec();
        let server = tokio::spawn(server.run(router(Arc::new(api), config.routes), drain.clone()));
        info!(?http, grpc = ?xds.address(), revision = %ledger.state().revision(), "control plane started");
        let server = Mutex::new(Some(server));
        Ok(Self {
            ledger,
            catalog,
            leaves,
            metrics,
            xds,
            http,
            settings,
            policy_changes,
            mesh,
            drain,
            stop,
            server,
            tasks,
            _ends: ends,
        })
    }

    /// Where the HTTP API listens, in the order of the configuration.
    #[must_use]
    pub fn http_addrs(&self) -> &[SocketAddr] {
        &self.http
    }

    /// Where the xDS server listens for proxies that dial it.
    #[must_use]
    pub fn grpc_addr(&self) -> Option<SocketAddr> {
        self.xds.address()
    }

    /// Serves xDS on a connection that the agent made, for example to its worker.
    pub fn serve_xds(&self, stream: UnixStream, peer: XdsPeer) {
        self.xds.serve(stream, peer);
    }

    /// The mesh, as the node's policy compiler needs it.
    #[must_use]
    pub fn mesh(&self) -> watch::Receiver<Arc<MeshView>> {
        self.mesh.clone()
    }

    /// The latest state.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        self.ledger.state()
    }

    /// Certificates of the services of this node.
    #[must_use]
    pub fn leaves(&self) -> &Leaves {
        &self.leaves
    }

    /// The certificate authority.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        self.leaves.authority()
    }

    /// Registers a service, as `PUT /v1/agent/service/register` does. When it returns, every reader sees the service.
    ///
    /// # Errors
    /// [`RegisterError`]; its text is what the API would answer.
    pub async fn register_service(&self, body: ServiceRegistration) -> Result<Registered, RegisterError> {
        self.catalog.register_service(body, false).await
    }

    /// Deregisters a service and the sidecar it declared, as `PUT /v1/agent/service/deregister/:id` does.
    ///
    /// # Errors
    /// [`UnknownService`].
    pub async fn deregister_service(&self, id: &str) -> Result<(), UnknownService> {
        self.catalog.deregister_service(id).await
    }

    /// Puts new settings in force: for readers of [`Control::mesh`], proxies and the API alike.
    pub fn reload(&self, settings: Reloadable) {
        self.settings.send_if_modified(|current| {
            let changed = *current != settings;
            if current.default_policy != settings.default_policy {
                self.policy_changes.fetch_add(1, Ordering::Relaxed);
            }
            *current = settings;
            changed
        });
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> Reloadable {
        *self.settings.borrow()
    }

    /// Adds the numbers of the control plane to `registry`.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.metrics.register(registry);
        self.authority().metrics().register(registry);
        self.xds.status().register(registry);
    }

    /// Answers open requests, then ends every task. Safe to call twice.
    pub async fn shutdown(&self) {
        self.drain.cancel();
        let server = self.server.lock().take();
        if let Some(server) = server
            && let Err(err) = server.await
        {
            tracing::error!(%err, "HTTP API ended badly");
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.xds.stopped().await;
    }
}

fn check_node_name(name: &str) -> Result<(), StartError> {
    // It is the first part of keys, which a slash ends.
    if name.is_empty() || name.chars().any(|c| c == '/' || c.is_control()) {
        return Err(StartError::NodeName(name.to_owned()));
    }
    Ok(())
}

/// Nothing proves who a client is, so it has to be on this host; who widens the HTTP API is told what that means.
fn check_exposure(config: &ControlConfig) -> Result<(), StartError> {
    let exposed = |address: &SocketAddr| !address.ip().to_canonical().is_loopback();
    if let Some(address) = config.grpc.filter(exposed) {
        return Err(StartError::GrpcExposed(address));
    }
    for address in config.http.iter().filter(|address| exposed(address)) {
        warn!(%address, "the HTTP API is reachable from outside: without ACLs and TLS, whoever reaches it rules this node");
    }
    Ok(())
}

async fn bind_grpc(address: Option<SocketAddr>) -> Result<Option<TcpListener>, StartError> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address).await.map_err(|source| StartError::Grpc { address, source })?;
    Ok(Some(listener))
}

async fn open_store(data_dir: Option<PathBuf>) -> Result<Arc<dyn Store>, StartError> {
    let Some(directory) = data_dir else { return Ok(Arc::new(MemoryStore::default())) };
    let open = move || -> Result<RedbStore, StartError> {
        make_private(&directory)?;
        Ok(RedbStore::open(&directory.join(STORE_FILE))?)
    };
    let store = tokio::task::spawn_blocking(open).await.map_err(|_| StartError::Interrupted)??;
    Ok(Arc::new(store))
}

/// Makes the directory, readable by its owner alone, unless it is there.
fn make_private(directory: &Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|source| StartError::DataDir { path: directory.to_owned(), source })
}

fn node(config: &ControlConfig) -> Node {
    let meta = [("consul-network-segment", ""), ("consul-version", config.version)];
    Node {
        name: config.node_name.clone(),
        id: config.node_id.clone(),
        address: config.advertise,
        meta: meta
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into_iter()
            .chain(config.node_meta.clone())
            .collect(),
    }
}
