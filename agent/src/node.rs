//! The agent as a whole: what is started in which order, what it reacts to, how it ends.
//!
//! Two runtimes: threads of `control` serve the network (HTTP, xDS) and have dropped every capability; the others own
//! namespaces, kernel programs and processes, and have no network listener.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use culvert_control::ca::{CaSettings, Clock, ConfigurationUpdate};
use culvert_control::xds::XdsLimits;
use culvert_control::{CONSUL_VERSION, Control, ControlConfig, HttpLimits};
use culvert_jobspec::NodeContext;
use tokio::runtime::{Handle, Runtime};
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
use crate::task::{ExecutorCommand, Hierarchies, descriptors};
use crate::worker::{self, WorkerSettings};
use crate::workload::{AllocId, Network, NetworkSettings, NodeFile};
use crate::{lock, metrics};

mod data_dir;
mod life;
mod surroundings;

use data_dir::{make_private, refuse_emptied_state, sweep_unfinished};
use life::{Agent, Signals, reloadable};
use surroundings::NodeSurroundings;

/// Threads that serve HTTP and xDS.
const CONTROL_THREADS: usize = 2;
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

async fn serve(
    settings: Settings,
    again: SettingsSource,
    node_file: NodeFile,
    control_runtime: &Runtime,
    places: &mut Places,
) -> anyhow::Result<()> {
    // From the beginning: who ends the agent while it starts has it end in order, once it has started.
    let signals = Signals::new().context("await signals")?;
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
    sweep_unfinished(&data_dir);
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
    agent.attend(signals, asked, control_runtime).await
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
