//! The agent as a whole: what is started in which order, what it reacts to, how it ends.
//!
//! Two runtimes: threads of `control` serve the network (HTTP, xDS) and have dropped every capability; the others own
//! namespaces, kernel programs and processes, and have no network listener.

use std::future::Future;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use culvert_control::ca::{CaSettings, Clock, ConfigurationUpdate};
use culvert_control::disk::remedy;
use culvert_control::xds::XdsLimits;
use culvert_control::{CONSUL_VERSION, Control, ControlConfig, HttpLimits, Reloadable, XdsPeer};
use culvert_jobspec::NodeContext;
use culvert_proxy::handoff::Traffic;
use culvert_types::ConnectionEvent;
use tokio::net::UnixStream;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{OnceCell, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::config::Settings;
use crate::datapath::{Datapath, DatapathConfig, unified_root};
use crate::events::EventHub;
use crate::lock::{Place, Places};
use crate::policy::{self, PolicyEngine};
use crate::report::chain;
use crate::routes::{self, Ask, NodeState, RouteState};
use crate::runner::{NodeServices, Records, Runner, WorkloadDialer};
use crate::task::{ExecutorCommand, Hierarchies, descriptors, sweep};
use crate::worker::{self, Surroundings, WorkerHandle, WorkerSettings};
use crate::workload::{AllocId, Network, NetworkSettings, NodeFile};
use crate::{lock, metrics};

/// Threads that serve HTTP and xDS.
const CONTROL_THREADS: usize = 2;
/// How long connections may go on when the agent leaves.
const LEAVE_DRAIN: Duration = Duration::from_secs(2);
/// What this agent writes in the data directory itself, beside the state store.
const FILES: [&str; 4] = ["node.json", "network.json", "worker.json", "direct.json"];
/// Beside the directory of the named network namespaces.
const LOCK_FILE: &str = "/run/culvert.lock";
/// Requests of operators that may wait.
const ASK_QUEUE: usize = 8;

/// Reads the settings again, for reload.
pub type SettingsSource = Box<dyn Fn() -> anyhow::Result<Settings> + Send>;

type Asks = mpsc::Receiver<(Ask, oneshot::Sender<Result<(), String>>)>;

/// Runs the agent until it is told to end.
///
/// # Errors
/// What keeps it from starting: another agent, missing rights, a taken port, unreadable state.
pub fn run(settings: Settings, again: SettingsSource) -> anyhow::Result<()> {
    require_root()?;
    if settings.grpc.len() > 1 {
        bail!("xDS listens on one address: give client_addr one address, or turn ports.grpc off");
    }
    let data_dir = settings.data_dir.clone();
    make_private(&data_dir)?;
    let mut places = lock_places(&settings)?;
    refuse_emptied_state(&data_dir)?;
    let node_file = NodeFile::load_or_create(&data_dir)?;
    worker::check_record(&data_dir)?;
    let limit = descriptors::raise().context("raise the limit of open descriptors")?;
    debug!(?limit, "open descriptors");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("node").enable_all().build()?;
    let control_runtime = unprivileged_runtime()?;
    let result = runtime.block_on(serve(settings, again, node_file, &control_runtime, &mut places));
    control_runtime.shutdown_timeout(Duration::from_secs(2));
    runtime.shutdown_timeout(Duration::from_secs(2));
    result
}

/// Nothing is removed or taken over before this: whatever another agent uses looks like a leftover.
fn lock_places(settings: &Settings) -> anyhow::Result<Places> {
    let mut places = Places::new(lock::take(&settings.data_dir, now())?);
    places.take_file(Path::new(LOCK_FILE))?;
    // A host without cgroup2 has no cgroups of ours.
    if let Ok(hierarchies) = Hierarchies::find() {
        places.take_cgroup(&hierarchies.cgroup2().join(&settings.cgroup_parent))?;
    }
    places.take_directory(Place::Pins, &settings.ebpf.bpf_dir)?;
    places.take_directory(Place::Data, &settings.data_dir)?;
    Ok(places)
}

/// A state file that lost its content, after a power cut say, would pass for that of a new mesh: without the intentions that
/// jobs of this node rely on.
fn refuse_emptied_state(data_dir: &Path) -> anyhow::Result<()> {
    let state = data_dir.join("state.redb");
    let has_jobs = std::fs::read_dir(data_dir.join("jobs")).is_ok_and(|mut jobs| jobs.next().is_some());
    if has_jobs && std::fs::metadata(&state).is_ok_and(|state| state.len() == 0) {
        bail!(
            "{} is empty, but this node has jobs: restore it from a backup, or remove it to begin a new mesh without the \
             intentions and certificates of the old one",
            state.display()
        );
    }
    Ok(())
}

fn require_root() -> anyhow::Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    bail!(
        "culvert agent needs root: it makes network namespaces, loads eBPF programs and starts tasks; run it with sudo, or as the \
         privileged daemon of your init system"
    )
}

/// A runtime whose threads have no capability: what parses bytes of users and proxies needs none.
fn unprivileged_runtime() -> anyhow::Result<Runtime> {
    let drop_capabilities = || {
        for set in [caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Inheritable] {
            if let Err(error) = caps::clear(None, set) {
                // Serving with capabilities would be worse than not serving.
                error!(%error, "a thread cannot drop its capabilities");
                std::process::abort();
            }
        }
    };
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(CONTROL_THREADS).thread_name("control").on_thread_start(drop_capabilities).enable_all();
    builder.build().context("start the threads of the control plane")
}

fn make_private(data_dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    // Tasks find their own directories below: others may pass through, not look.
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(data_dir);
    made.map_err(|error| {
        let what = format!("data directory {} cannot be used ({})", data_dir.display(), remedy(&error));
        anyhow::Error::new(error).context(what)
    })
}

async fn serve(
    settings: Settings,
    again: SettingsSource,
    node_file: NodeFile,
    control_runtime: &Runtime,
    places: &mut Places,
) -> anyhow::Result<()> {
    let data_dir = settings.data_dir.clone();
    let (node_name, advertise) = (settings.node_name.clone(), settings.advertise);
    let hub = EventHub::new();
    let (asks, asked) = mpsc::channel(ASK_QUEUE);
    let routes_state = Arc::new(RouteState {
        hub: Arc::clone(&hub),
        asks,
        data_dir: data_dir.clone(),
        ebpf: OnceCell::new(),
        node: OnceCell::new(),
    });
    let network = NetworkSettings {
        data_dir: data_dir.clone(),
        cgroup_parent: settings.cgroup_parent.clone(),
        ..NetworkSettings::default()
    };
    let routes = routes::router(Arc::clone(&routes_state));
    let config = control_config(&settings, &node_file, routes);
    let dialer = Arc::new(WorkloadDialer::new(Handle::current(), network.clone()));
    let control = on(control_runtime.handle(), async { Control::start(config, dialer).await }).await?;
    let control = control.context("control plane")?;
    let control = Arc::new(control);
    sweep(&data_dir, |name| FILES.contains(&name));
    sweep_former(&data_dir);
    info!(http = ?control.http_addrs(), node = node_name, "culvert agent serves");

    let network = Arc::new(Network::open(network).await.context("workload network")?);
    network.warnings().iter().for_each(|warning| warn!("{warning}"));
    places.in_use();
    let (datapath, kernel_events) = load_datapath(&settings, &network, &routes_state)?;
    // Unless there were pins before, their directory is new.
    places.take_directory(Place::Pins, &settings.ebpf.bpf_dir)?;
    let policy = PolicyEngine::new(datapath, control.mesh(), &data_dir);
    tokio::spawn(Arc::clone(&policy).run());
    if let Some(events) = kernel_events {
        tokio::spawn(policy::relay(events, Arc::clone(&policy), control.mesh(), Arc::clone(&hub)));
    }

    let surroundings = Arc::new(NodeSurroundings {
        control: Arc::clone(&control),
        control_runtime: control_runtime.handle().clone(),
        runtime: Handle::current(),
        policy: Arc::clone(&policy),
        hub: Arc::clone(&hub),
    });
    let worker_settings = WorkerSettings {
        data_dir: data_dir.clone(),
        node: node_name.clone(),
        log: settings.log_level.as_str().to_owned(),
    };
    let (supervisor, worker) = worker::supervisor(worker_settings, surroundings);
    tokio::spawn(supervisor.run());
    metrics::register(&hub, &worker, &control);

    let records = Records::open(&data_dir)?;
    records.sweep();
    reconcile(&records, &network, &policy).await;
    let node = Arc::new(NodeServices {
        runtime: Handle::current(),
        network: Arc::clone(&network),
        control: Arc::clone(&control),
        worker: worker.clone(),
        policy: Arc::clone(&policy),
        records,
        context: node_context(&settings, &node_name, &node_file),
        executor: ExecutorCommand::default(),
        hurry: CancellationToken::new(),
        advertise,
        data_dir,
        cgroup_parent: settings.cgroup_parent.clone(),
    });
    let runner = Runner::start(node);
    let state = NodeState {
        runner: Arc::clone(&runner),
        policy: Arc::clone(&policy),
        worker: worker.clone(),
        mesh: control.mesh(),
    };
    drop(routes_state.node.set(state));
    let agent = Agent { settings, again, control, runner, policy, worker, network };
    agent.attend(asked, control_runtime).await
}

/// What earlier versions wrote before it took the place of `worker.json`.
fn sweep_former(data_dir: &Path) {
    let path = data_dir.join("worker.json.next");
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            warn!(%error, path = %path.display(), "a file that was never finished stays");
        }
        _ => {}
    }
}

/// Runs `work` on another runtime's threads.
async fn on<T: Send + 'static>(runtime: &Handle, work: impl Future<Output = T> + Send + 'static) -> anyhow::Result<T> {
    runtime.spawn(work).await.context("a part of the agent ended in a panic")
}

fn control_config(settings: &Settings, node_file: &NodeFile, routes: axum::Router) -> ControlConfig {
    let ca_given = ConfigurationUpdate {
        leaf_ttl: settings.ca.leaf_ttl,
        intermediate_ttl: settings.ca.intermediate_ttl,
        root_ttl: settings.ca.root_ttl,
        csr_max_per_second: settings.ca.csr_max_per_second,
        ..ConfigurationUpdate::default()
    };
    let limits = HttpLimits {
        max_connections: settings.limits.http_max_conns,
        max_connections_per_client: settings.limits.http_max_conns_per_client,
        ..HttpLimits::default()
    };
    ControlConfig {
        node_name: settings.node_name.clone(),
        node_id: node_file.node_id.to_string(),
        node_meta: settings.node_meta.clone(),
        datacenter: settings.datacenter.clone(),
        data_dir: (!settings.dev).then(|| settings.data_dir.clone()),
        http: settings.http.clone(),
        grpc: settings.grpc.first().copied(),
        advertise: settings.advertise,
        settings: reloadable(settings),
        sidecar_ports: settings.sidecar_ports.clone(),
        version: CONSUL_VERSION,
        dev: settings.dev,
        ca: CaSettings::default(),
        ca_given,
        clock: Clock::system(),
        limits,
        xds_limits: XdsLimits::default(),
        routes,
    }
}

fn reloadable(settings: &Settings) -> Reloadable {
    Reloadable { default_policy: settings.default_policy, encryption: settings.encryption }
}

fn load_datapath(
    settings: &Settings,
    network: &Network,
    state: &RouteState,
) -> anyhow::Result<(Option<Datapath>, Option<mpsc::Receiver<crate::datapath::KernelEvent>>)> {
    let loaded = if settings.ebpf.enabled {
        unified_root().map_err(|error| format!("cgroup2: {error}")).and_then(|root| {
            let config = DatapathConfig::new(settings.ebpf.bpf_dir.clone(), root.join(&settings.cgroup_parent));
            Datapath::load(&DatapathConfig { hairpin: network.hairpin(), ..config }).map_err(|error| chain(&error))
        })
    } else {
        Err("turned off by configuration".to_owned())
    };
    match loaded {
        Ok((datapath, events)) => {
            drop(state.ebpf.set(None));
            Ok((Some(datapath), Some(events)))
        }
        Err(reason) => {
            warn!(reason, "no eBPF: every mesh connection takes the proxied path");
            drop(state.ebpf.set(Some(reason)));
            // Programs of an earlier agent would go on letting through what it allowed.
            Datapath::remove_leftovers(&settings.ebpf.bpf_dir)
                .context("remove the kernel programs of an earlier agent")?;
            Ok((None, None))
        }
    }
}

/// Removes what carries our names and belongs to no record. What cannot be removed keeps nobody from starting: it is
/// nobody's, and is tried again by the next start and when the agent leaves.
async fn reconcile(records: &Records, network: &Network, policy: &PolicyEngine) {
    let allocations = records.allocations();
    let live: Vec<AllocId> = allocations.iter().filter_map(|record| AllocId::new(&record.id).ok()).collect();
    match network.reconcile(&live).await {
        Ok(removed) if removed.is_empty() => {}
        Ok(removed) => info!(?removed, "removed what an earlier agent left"),
        Err(error) => warn!(error = chain(&error), "not all that an earlier agent left is removed"),
    }
    policy.retain(&allocations.iter().map(|record| record.workload).collect::<Vec<_>>()).await;
}

fn node_context(settings: &Settings, node_name: &str, node_file: &NodeFile) -> NodeContext {
    let attributes = [
        ("kernel.name", "linux".to_owned()),
        ("cpu.arch", std::env::consts::ARCH.to_owned()),
        ("unique.hostname", node_name.to_owned()),
        ("culvert.version", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    NodeContext {
        id: node_file.node_id.to_string(),
        name: node_name.to_owned(),
        datacenter: settings.datacenter.to_string(),
        attributes: attributes.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        meta: settings.node_meta.clone(),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The worker's way to the rest of the agent.
struct NodeSurroundings {
    control: Arc<Control>,
    control_runtime: Handle,
    runtime: Handle,
    policy: Arc<PolicyEngine>,
    hub: Arc<EventHub>,
}

impl Surroundings for NodeSurroundings {
    fn connect_xds(&self, stream: UnixStream) {
        let _on_threads_without_capabilities = self.control_runtime.enter();
        self.control.serve_xds(stream, XdsPeer::Node);
    }

    fn inbound_listener(&self, proxy: &str, port: u16, listener: BorrowedFd<'_>) {
        let listener: OwnedFd = match listener.as_fd().try_clone_to_owned() {
            Ok(listener) => listener,
            Err(error) => return warn!(%error, proxy, "a listener cannot be steered to"),
        };
        let (policy, proxy) = (Arc::clone(&self.policy), proxy.to_owned());
        self.runtime.spawn(async move { policy.listener_opened(&proxy, port, listener).await });
    }

    fn event(&self, service: &str, event: ConnectionEvent) {
        self.hub.publish(service, event);
    }

    fn traffic(&self, proxy: &str, service: &str, traffic: &Traffic) {
        self.hub.traffic(proxy, service, traffic);
    }

    fn no_traffic(&self, proxy: Option<&str>) {
        self.hub.no_traffic(proxy);
    }

    fn events_lost(&self, count: u64) {
        self.hub.lost(count);
    }
}

/// Signals that ask the agent to end.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
}

impl Ends {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Everything that runs.
struct Agent {
    settings: Settings,
    again: SettingsSource,
    control: Arc<Control>,
    runner: Arc<Runner>,
    policy: Arc<PolicyEngine>,
    worker: WorkerHandle,
    network: Arc<Network>,
}

impl Agent {
    /// Serves signals and operators until the end.
    async fn attend(mut self, mut asked: Asks, control_runtime: &Runtime) -> anyhow::Result<()> {
        let mut ends =
            Ends { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? };
        let mut hang_up = signal(SignalKind::hangup())?;
        loop {
            tokio::select! {
                () = ends.recv() => break,
                _ = hang_up.recv() => {
                    if let Err(error) = self.reload().await {
                        error!(error, "the configuration is not reloaded; the one in force stays");
                    }
                }
                ask = asked.recv() => match ask {
                    Some((Ask::Reload, done)) => drop(done.send(self.reload().await)),
                    Some((Ask::Leave, done)) => {
                        let left = self.leave(&mut ends).await;
                        drop(done.send(left.clone()));
                        // The answer leaves before the server does.
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        return self.end(control_runtime, left).await;
                    }
                    None => break,
                },
            }
        }
        let left = if self.settings.dev {
            // A dev agent keeps its state in memory: what it ran would be nobody's.
            self.leave(&mut ends).await
        } else {
            info!("ending; workloads, worker and kernel programs go on, the next start takes them over");
            Ok(())
        };
        self.end(control_runtime, left).await
    }

    /// Reads the configuration again and applies what may change: `encryption` and `default_intention_policy`.
    async fn reload(&mut self) -> Result<(), String> {
        let new = (self.again)().map_err(|error| format!("{error:#}"))?;
        let fixed = self.settings.fixed_changes(&new);
        if !fixed.is_empty() {
            warn!(settings = fixed.join(", "), "these settings need a restart; they stay as they are");
        }
        (self.settings.encryption, self.settings.default_policy) = (new.encryption, new.default_policy);
        self.control.reload(reloadable(&self.settings));
        info!(encryption = %self.settings.encryption, default_policy = %self.settings.default_policy, "configuration reloaded");
        Ok(())
    }

    /// Stops everything and removes everything that carries our names. Who asks again does not want to wait. The error says
    /// what could not be removed.
    async fn leave(&self, ends: &mut Ends) -> Result<(), String> {
        info!("leaving: stopping every job and removing everything");
        let mut stopped = std::pin::pin!(self.runner.stop_all());
        let allocations = tokio::select! {
            left = &mut stopped => left,
            () = ends.recv() => {
                warn!("asked again: tasks that have not ended are killed");
                self.runner.hurry();
                stopped.await
            }
        };
        let mut left: Vec<String> = allocations.iter().map(|id| format!("allocation {id}")).collect();
        self.worker.shutdown(LEAVE_DRAIN).await;
        left.extend(self.policy.remove_all().await.err());
        left.extend(self.network.close_all().await.err().map(|error| chain(&error)));
        if left.is_empty() { Ok(()) } else { Err(format!("the host is not as it was found: {}", left.join("; "))) }
    }

    async fn end(self, control_runtime: &Runtime, left: Result<(), String>) -> anyhow::Result<()> {
        let control = self.control;
        on(control_runtime.handle(), async move { control.shutdown().await }).await?;
        left.map_err(anyhow::Error::msg)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_was_emptied_under_jobs_is_refused() {
        let data = tempfile::tempdir().expect("a directory");
        let state = data.path().join("state.redb");
        refuse_emptied_state(data.path()).expect("a new node");
        std::fs::write(&state, "").expect("a file");
        refuse_emptied_state(data.path()).expect("killed before it had anything");
        std::fs::create_dir(data.path().join("jobs")).expect("a directory");
        std::fs::write(data.path().join("jobs/61.json"), "{}").expect("a job");
        let refused = refuse_emptied_state(data.path()).expect_err("jobs, and no state");
        assert!(refused.to_string().contains("restore it from a backup"), "{refused}");
        std::fs::write(&state, "redb").expect("a file");
        refuse_emptied_state(data.path()).expect("the store looks at what is in it");
    }
}
