//! The direct path: loads the kernel programs, attaches them, and keeps their tables.
//!
//! Owns everything pinned below `bpf_dir`. The agent's policy compiler decides which pairs may talk and hands the result to
//! [`Datapath::apply`]; this module decides nothing. Applications reach each other without it, through the worker: every failure
//! here means "proxied", never "allowed".
//!
//! Programs, maps and links outlive the agent. [`Datapath::load`] finds what an earlier agent left: maps of the same layout go on being
//! used, and links are pointed at the new programs without a moment in between. What another layout left works beside the new until
//! [`Datapath::finish_takeover`].
//!
//! Calls are made on a thread in the agent's own network namespace, where the host's ends of the veths are.

mod cgroup;
mod clock;
mod event;
mod kernel;
mod listeners;
mod netns;
mod pins;
mod probe;
mod revoke;
mod sock_diag;
mod tc;
mod upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData, MapError, RingBuf, SockHash};
use culvert_ebpf_common::{
    Address, DEFAULT_AUTH_CAP, DEFAULT_AUTH_TTL, DEFAULT_REFUSALS_PER_SECOND, FAMILY_V4, FAMILY_V6, LAYOUT,
    ListenerKey, PORT_PROTECTED, PORT_PUBLISHED, PORT_STEERED, PortKey, PortRule, Quota, Settings, WORKLOAD_GUARDED,
    WORKLOAD_LOOKUP, Workload,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_blocking};
use tracing::{info, warn};

pub use self::cgroup::unified_root;
pub use self::event::{DirectConnection, DroppedPacket, EVENT_QUEUE, Flow, KernelEvent, Protocol};
pub use self::kernel::OBJECT;
pub use self::revoke::FlowEnds;
pub use self::tc::TcMode;
pub use self::upstream::{Applied, Instance, Removed, Upstream, UpstreamKey};

use self::kernel::{CGROUP_PROGRAMS, Kernel, LOOKUP};
use self::pins::Generation;
use self::revoke::FlowPair;
use crate::sys::bpf::{self, AttachType, LinkTarget};

/// `BPF_NOEXIST`: insert only what is not there.
const NOEXIST: u64 = 1;
/// A workload whose listening socket was not found is searched at most this often.
const SEARCH_INTERVAL: Duration = Duration::from_secs(1);

/// Between the end of a former layout's connect programs and that of its other programs: longer than a SYN is on its way.
pub const TAKEOVER_GRACE: Duration = Duration::from_millis(200);

/// Where the datapath lives, and its limits.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Directory for pins; default `/sys/fs/bpf/culvert`.
    pub bpf_dir: PathBuf,
    /// The cgroup (version 2) above all workloads; made if it does not exist. See [`unified_root`].
    pub cgroup: PathBuf,
    /// How long leave to open a connection lasts; default 130 s, longer than a SYN is retransmitted.
    pub auth_ttl: Duration,
    /// Most half-open direct connections per workload; default 1024. Further ones go through the worker.
    pub auth_cap: u32,
    /// Most events of refused and spoofed packets per workload and second; default 64.
    pub refusals_per_second: u32,
}

impl DatapathConfig {
    /// The defaults.
    #[must_use]
    pub fn new(bpf_dir: PathBuf, cgroup: PathBuf) -> Self {
        Self {
            bpf_dir,
            cgroup,
            auth_ttl: Duration::from_nanos(DEFAULT_AUTH_TTL),
            auth_cap: DEFAULT_AUTH_CAP,
            refusals_per_second: DEFAULT_REFUSALS_PER_SECOND,
        }
    }
}

/// Why there is no direct path on this node. The proxied path carries everything then.
#[derive(Debug, thiserror::Error)]
#[error("no direct path: {reason}")]
pub struct DatapathUnavailable {
    /// What was tried, and what the kernel said.
    pub reason: String,
}

impl DatapathUnavailable {
    fn new(step: &str, error: &dyn Error) -> Self {
        let mut reason = format!("{step}: {error}");
        let mut cause = error.source();
        while let Some(inner) = cause {
            let text = inner.to_string();
            if !reason.ends_with(&text) {
                reason.push_str(": ");
                reason.push_str(&text);
            }
            cause = inner.source();
        }
        Self { reason }
    }

    fn missing(kind: &str, name: &str) -> Self {
        Self { reason: format!("the object has no {kind} {name}") }
    }
}

/// A table could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("kernel table {table}")]
pub struct TableError {
    table: &'static str,
    source: MapError,
}

/// A workload could not be put under the programs.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// An attachment, or finding out about its target, failed.
    #[error("workload {workload}: {step}")]
    Step {
        /// Which workload.
        workload: u32,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A table did not take the workload.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What [`Datapath::attach`] needs to know of a workload.
#[derive(Debug)]
pub struct WorkloadLinks {
    /// Its id, from 1.
    pub id: u32,
    /// Its network namespace, as a path: `/run/netns/…`.
    pub netns: PathBuf,
    /// Interface index of the host's end of its veth.
    pub host_ifindex: u32,
    /// Its IPv4 address.
    pub addr4: Ipv4Addr,
    /// Its IPv6 address.
    pub addr6: Option<Ipv6Addr>,
    /// MAC address of its end of the veth.
    pub mac: [u8; 6],
}

/// How a port of a workload is guarded.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum PortKind {
    /// An application of the mesh: only authorised direct connections reach it from outside the namespace.
    Protected,
    /// The same, but open to what does not come from a workload, because the user has exposed it.
    Published,
    /// The worker's: connections go to the listener of [`Datapath::steer`], and are refused as long as there is none.
    Steered,
}

impl PortKind {
    fn number(self) -> u32 {
        match self {
            Self::Protected => PORT_PROTECTED,
            Self::Published => PORT_PUBLISHED,
            Self::Steered => PORT_STEERED,
        }
    }
}

/// A workload under the programs.
#[derive(Debug)]
struct Attached {
    netns: OwnedFd,
    cookie: u64,
    addresses: Vec<IpAddr>,
    searched: Option<Instant>,
}

type Workloads = Arc<Mutex<BTreeMap<u32, Attached>>>;

/// The kernel programs of this node, and their tables.
pub struct Datapath {
    kernel: Kernel,
    cgroup: PathBuf,
    generation: Generation,
    /// Of other layouts, or left half-made.
    older: Vec<Generation>,
    workloads: Workloads,
    tc: TcMode,
    last_epoch: u64,
    lost_events: Arc<AtomicU64>,
    pump: AbortHandle,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datapath").field("generation", &self.generation).field("tc", &self.tc).finish_non_exhaustive()
    }
}

impl Drop for Datapath {
    /// Stops reading events. Programs, links and tables stay.
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Datapath {
    /// Loads the programs and attaches those of the cgroup. Must be called within a tokio runtime, which then reads events.
    ///
    /// # Errors
    /// When the kernel, or our rights, do not suffice: every program, map and attachment is tried, no version is looked at.
    /// Nothing is left behind then that was not there before.
    pub fn load(config: &DatapathConfig) -> Result<(Self, mpsc::Receiver<KernelEvent>), DatapathUnavailable> {
        let unavailable = |step: &'static str| move |error: io::Error| DatapathUnavailable::new(step, &error);
        if let Some(path) = cgroup::conflicting_v1().map_err(unavailable("read mounts"))? {
            let reason = format!(
                "{}: net_cls or net_prio of cgroup v1 is in use, which hides sockets from cgroup2",
                path.display()
            );
            return Err(DatapathUnavailable { reason });
        }
        let target = cgroup_target(&config.cgroup).map_err(unavailable("make the cgroup"))?;
        pins::ensure_directory(&config.bpf_dir).map_err(unavailable("mount the BPF file system"))?;
        let (generation, older) = Generation::choose(&config.bpf_dir, LAYOUT).map_err(unavailable("read pins"))?;
        let fresh = generation.is_empty();
        let loaded = Self::load_generation(config, target, &generation);
        if loaded.is_err()
            && fresh
            && let Err(error) = generation.remove()
        {
            warn!(%error, "pins of a failed attempt stay behind");
        }
        let (kernel, ring, tc) = loaded?;
        if !older.is_empty() {
            info!(count = older.len(), "taking over from kernel programs of another layout");
        }
        let workloads = Workloads::default();
        let lost_events = Arc::new(AtomicU64::new(0));
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        let search = listener_search(&generation, &config.cgroup, Arc::downgrade(&workloads));
        let pump = tokio::spawn(event::pump(ring, sender, Arc::clone(&lost_events), search)).abort_handle();
        let datapath = Self {
            kernel,
            cgroup: config.cgroup.clone(),
            generation,
            older,
            workloads,
            tc,
            last_epoch: clock::boot(),
            lost_events,
            pump,
        };
        Ok((datapath, receiver))
    }

    fn load_generation(
        config: &DatapathConfig,
        (cgroup, target): (OwnedFd, LinkTarget),
        generation: &Generation,
    ) -> Result<(Kernel, RingBuf<MapData>, TcMode), DatapathUnavailable> {
        let (mut kernel, ring) = Kernel::load(generation)?;
        let tc = probe::probe(&mut kernel)?;
        let settings = Settings {
            epoch: 0,
            auth_ttl: u64::try_from(config.auth_ttl.as_nanos()).unwrap_or(u64::MAX),
            auth_cap: config.auth_cap,
            refusals_per_second: config.refusals_per_second,
        };
        let written = kernel.settings.set(0, settings, 0);
        written.map_err(|error| DatapathUnavailable::new("write the settings", &error))?;
        for name in CGROUP_PROGRAMS {
            let attached = kernel.program(name).and_then(|program| {
                generation
                    .attach(name, target, program, || bpf::attach_to_fd(program, &cgroup, cgroup_attach_type(name)))
            });
            attached.map_err(|error| DatapathUnavailable::new(&format!("attach {name} to the cgroup"), &error))?;
        }
        Ok((kernel, ring, tc))
    }

    /// Puts a workload under the programs, or takes over one that is, and returns the cookie of its network namespace. Until then its
    /// packets are not guarded: call it before the workload's first process starts.
    ///
    /// # Errors
    /// [`AttachError`]; the workload is not used for direct connections then, and what was attached stays until
    /// [`Self::detach`].
    pub fn attach(&mut self, links: &WorkloadLinks) -> Result<u64, AttachError> {
        let at = |step: &'static str| move |source| AttachError::Step { workload: links.id, step, source };
        let netns = fs::File::open(&links.netns).map(OwnedFd::from).map_err(at("open its network namespace"))?;
        let cookie = netns::cookie(netns.as_fd()).map_err(at("read the cookie of its network namespace"))?;
        let inode = fs_inode(&netns).map_err(at("look at its network namespace"))?;

        let mut entry = Workload {
            netns_cookie: cookie,
            id: links.id,
            flags: 0,
            address4: links.addr4.into(),
            address6: links.addr6.map(Address::from).unwrap_or_default(),
            ifindex: links.host_ifindex,
            mac: links.mac,
            reserved: [0; 6],
        };
        let ready = WORKLOAD_LOOKUP | WORKLOAD_GUARDED;
        let known = self.kernel.workload_netns.get(&cookie, 0).ok();
        // What is in place stays in use while it is taken over.
        let taken_over = known.is_some_and(|known| known == Workload { flags: ready, ..entry });
        if !taken_over {
            self.forget_workload(links.id, Some(&entry))?;
            self.write_workload(&entry)?;
        }
        let quota = self.kernel.quota.insert(links.id, Quota::default(), NOEXIST);
        table_unless_present("QUOTA", quota)?;

        self.tc
            .attach(&mut self.kernel, &self.generation, links)
            .map_err(at("attach to the host's end of its veth"))?;
        let program = self.kernel.program(LOOKUP).map_err(at("find the lookup program"))?;
        let target = LinkTarget::Netns(inode);
        self.generation
            .attach(&link_name(links.id, "lookup"), target, program, || {
                bpf::attach_to_fd(program, &netns, AttachType::SkLookup)
            })
            .map_err(at("attach to its network namespace"))?;

        listeners::adopt(&mut self.kernel.listeners, links.id, netns.as_fd(), &self.cgroup)
            .map_err(at("list its listening sockets"))?;
        entry.flags = ready;
        self.write_workload(&entry)?;
        let addresses = [Some(IpAddr::V4(links.addr4)), links.addr6.map(IpAddr::V6)].into_iter().flatten().collect();
        self.workloads.lock().insert(links.id, Attached { netns, cookie, addresses, searched: None });
        Ok(cookie)
    }

    /// Says how the ports of a workload are guarded; ports that are not named are not.
    ///
    /// # Errors
    /// [`TableError`]; ports are guarded before they are left alone, so a failure leaves too many guarded rather than too few.
    pub fn set_ports(&mut self, workload: u32, ports: &[(u16, PortKind)]) -> Result<(), TableError> {
        let table = |source| TableError { table: "PORTS", source };
        for &(port, kind) in ports {
            let rule = PortRule { kind: kind.number() };
            self.kernel.ports.insert(PortKey { workload, port, reserved: 0 }, rule, 0).map_err(table)?;
        }
        let stale = |key: &PortKey| key.workload == workload && !ports.iter().any(|(port, _)| *port == key.port);
        remove_if(&mut self.kernel.ports, stale).map_err(table)
    }

    /// Hands connections to a port of kind [`PortKind::Steered`] to `listener`, a listening socket made in the workload's
    /// namespace. It leaves the table by itself when it is closed.
    ///
    /// # Errors
    /// [`TableError`], also when `listener` does not listen.
    pub fn steer(&mut self, workload: u32, port: u16, listener: BorrowedFd<'_>) -> Result<(), TableError> {
        let v4 = socket2::SockRef::from(&listener).local_addr().is_ok_and(|address| address.is_ipv4());
        let family = if v4 { FAMILY_V4 } else { FAMILY_V6 };
        let key = ListenerKey { workload, port, family, slot: 0 };
        self.kernel
            .steered
            .insert(key, listener.as_raw_fd(), 0)
            .map_err(|source| TableError { table: "STEERED", source })
    }

    /// Brings the upstream entries of all workloads to `desired`: first removals, then additions. Entries that stay lose no connection
    /// attempt. What was removed is void at once for new connections; [`Self::destroy_flows`] ends those that live. Entries of
    /// workloads that are not attached are left out.
    ///
    /// # Errors
    /// [`TableError`]; the difference that is left is found by the next call.
    pub fn apply(&mut self, desired: &BTreeMap<UpstreamKey, Upstream>) -> Result<Applied, TableError> {
        self.last_epoch = clock::boot().max(self.last_epoch + 1);
        let cookies = self.workloads.lock().iter().map(|(id, workload)| (*id, workload.cookie)).collect();
        upstream::apply(&mut self.kernel.upstream, desired, &cookies, self.last_epoch)
            .map_err(|source| TableError { table: "UPSTREAM", source })
    }

    /// Ends every direct connection between `ends`, at both of them, whether it is open, opening or closing; returns how many
    /// sockets were ended. Workloads that are not attached have none.
    ///
    /// # Errors
    /// When a namespace cannot be entered, or its sockets cannot be listed.
    pub fn destroy_flows(&self, ends: &BTreeSet<FlowEnds>) -> io::Result<usize> {
        let workloads = self.workloads.lock();
        let mut by_workload: BTreeMap<u32, Vec<FlowPair>> = BTreeMap::new();
        for &FlowEnds { source, destination, port } in ends {
            let (Some(caller), Some(called)) = (workloads.get(&source), workloads.get(&destination)) else { continue };
            for (from, to) in
                caller.addresses.iter().flat_map(|from| called.addresses.iter().map(move |to| (*from, *to)))
            {
                if from.is_ipv4() == to.is_ipv4() {
                    let pair = FlowPair { source: from, destination: to, port };
                    by_workload.entry(source).or_default().push(pair);
                    by_workload.entry(destination).or_default().push(pair);
                }
            }
        }
        let mut ended = 0;
        for (workload, pairs) in by_workload {
            if let Some(workload) = workloads.get(&workload) {
                ended += revoke::destroy(workload.netns.as_fd(), &pairs)?;
            }
        }
        Ok(ended)
    }

    /// Takes the programs off a workload and forgets it. Its namespace and veth may be gone already.
    ///
    /// # Errors
    /// [`AttachError`]; may be repeated.
    pub fn detach(&mut self, workload: u32) -> Result<(), AttachError> {
        let at = |step: &'static str| move |source| AttachError::Step { workload, step, source };
        self.forget_traffic(workload)?;
        for entry in self.workload_entries()?.iter().filter(|entry| entry.id == workload) {
            self.tc.detach(entry.ifindex).map_err(at("detach from the host's end of its veth"))?;
        }
        self.forget_workload(workload, None)?;
        for generation in self.older.iter().chain([&self.generation]) {
            generation.remove_links(&format!("{workload}-")).map_err(at("remove its links"))?;
        }
        self.workloads.lock().remove(&workload);
        Ok(())
    }

    /// Detaches every workload that is not in `live`: what an earlier agent left.
    ///
    /// # Errors
    /// The first [`AttachError`]; may be repeated.
    pub fn retain(&mut self, live: &[u32]) -> Result<Vec<u32>, AttachError> {
        let mut known = self.generation.workloads().unwrap_or_default();
        known.extend(self.workload_entries()?.iter().map(|entry| entry.id));
        known.sort_unstable();
        known.dedup();
        known.retain(|id| !live.contains(id));
        for id in &known {
            self.detach(*id)?;
        }
        Ok(known)
    }

    /// Removes what programs of another layout have left, once every live workload was attached and the tables were applied. Until
    /// then both work side by side: a connection that either has given leave to is let through. Waits [`TAKEOVER_GRACE`] if there is
    /// something to remove. Connections that the former programs had opened live on, but tell the instance's address as their
    /// peer's, and their end is not told.
    ///
    /// # Errors
    /// When a pin cannot be removed; may be repeated.
    pub fn finish_takeover(&mut self) -> io::Result<()> {
        if self.older.is_empty() {
            return Ok(());
        }
        for generation in &self.older {
            // First nobody is led by them any more, then nobody needs their leave.
            generation.remove_links("connect")?;
        }
        thread::sleep(TAKEOVER_GRACE);
        while let Some(generation) = self.older.last() {
            generation.remove()?;
            self.older.pop();
        }
        Ok(())
    }

    /// Removes every program, link and table of ours from the node. Live direct connections go on: they are ordinary TCP.
    ///
    /// # Errors
    /// The first failure; what could be removed is.
    pub fn remove_all(mut self) -> Result<(), AttachError> {
        let detached = self.retain(&[]);
        let removed = self.finish_takeover().and_then(|()| self.generation.remove());
        detached?;
        removed.map_err(|source| AttachError::Step { workload: 0, step: "remove pins", source })
    }

    /// Events that were left out because nobody took them in time.
    #[must_use]
    pub fn lost_events(&self) -> u64 {
        self.lost_events.load(Ordering::Relaxed)
    }

    /// How packets of workloads are guarded on this kernel.
    #[must_use]
    pub fn tc_mode(&self) -> TcMode {
        self.tc
    }

    /// Attaches to veths the older way from now on, as on kernels without tcx.
    pub fn use_clsact(&mut self) {
        self.tc = TcMode::Clsact;
    }
}

/// Tables of workloads.
impl Datapath {
    fn workload_entries(&self) -> Result<Vec<Workload>, TableError> {
        let entries = self.kernel.workload_if.iter().map(|entry| entry.map(|(_, workload)| workload));
        entries.collect::<Result<_, _>>().map_err(|source| TableError { table: "WORKLOAD_IF", source })
    }

    fn write_workload(&mut self, entry: &Workload) -> Result<(), TableError> {
        let Kernel { workload_if, workload_netns, workload_addr, .. } = &mut self.kernel;
        let table = |table| move |source| TableError { table, source };
        workload_if.insert(entry.ifindex, entry, 0).map_err(table("WORKLOAD_IF"))?;
        workload_addr.insert(entry.address4, entry, 0).map_err(table("WORKLOAD_ADDR"))?;
        if !entry.address6.is_unspecified() {
            workload_addr.insert(entry.address6, entry, 0).map_err(table("WORKLOAD_ADDR"))?;
        }
        // Last: the caller's side looks here first.
        workload_netns.insert(entry.netns_cookie, entry, 0).map_err(table("WORKLOAD_NETNS"))
    }

    /// Removes what is known of a workload, but for the keys of `except`, which are about to be written.
    fn forget_workload(&mut self, id: u32, except: Option<&Workload>) -> Result<(), TableError> {
        let Kernel { workload_if, workload_netns, workload_addr, .. } = &mut self.kernel;
        let table = |table| move |source| TableError { table, source };
        let stays = |keep: fn(&Workload, &Workload) -> bool| {
            move |old: &Workload| old.id != id || except.is_some_and(|new| keep(old, new))
        };
        let stays_netns = stays(|old, new| old.netns_cookie == new.netns_cookie);
        remove_unless(workload_netns, stays_netns).map_err(table("WORKLOAD_NETNS"))?;
        let stays_addr = stays(|old, new| old.address4 == new.address4 && old.address6 == new.address6);
        remove_unless(workload_addr, stays_addr).map_err(table("WORKLOAD_ADDR"))?;
        remove_unless(workload_if, stays(|old, new| old.ifindex == new.ifindex)).map_err(table("WORKLOAD_IF"))
    }

    /// Removes ports, sockets, entries and authorisations of a workload.
    fn forget_traffic(&mut self, id: u32) -> Result<(), TableError> {
        let cookie = self.workloads.lock().get(&id).map(|workload| workload.cookie);
        let kernel = &mut self.kernel;
        let table = |table| move |source| TableError { table, source };
        if let Some(cookie) = cookie {
            remove_if(&mut kernel.upstream, |key| key.netns_cookie == cookie).map_err(table("UPSTREAM"))?;
        }
        let auth: Vec<_> = kernel.auth.iter().collect::<Result<_, _>>().map_err(table("AUTH"))?;
        for (key, _) in auth.iter().filter(|(_, auth)| auth.source_workload == id || auth.destination_workload == id) {
            ignore_absent(kernel.auth.remove(key)).map_err(table("AUTH"))?;
        }
        remove_sockets(&mut kernel.listeners, id).map_err(table("LISTENERS"))?;
        remove_sockets(&mut kernel.steered, id).map_err(table("STEERED"))?;
        remove_if(&mut kernel.ports, |key| key.workload == id).map_err(table("PORTS"))?;
        ignore_absent(kernel.quota.remove(&id)).map_err(table("QUOTA"))
    }
}

fn link_name(workload: u32, kind: &str) -> String {
    format!("{workload}-{kind}")
}

fn cgroup_attach_type(program: &str) -> AttachType {
    match program {
        "connect4" => AttachType::CgroupConnect4,
        "connect6" => AttachType::CgroupConnect6,
        "getpeername4" => AttachType::CgroupGetpeername4,
        "getpeername6" => AttachType::CgroupGetpeername6,
        _ => AttachType::CgroupSockOps,
    }
}

/// Makes and opens the cgroup; its id is its inode number.
fn cgroup_target(path: &Path) -> io::Result<(OwnedFd, LinkTarget)> {
    fs::create_dir_all(path)?;
    if !path.join("cgroup.procs").exists() || !path.join("cgroup.controllers").exists() {
        return Err(io::Error::other(format!("{} is not a cgroup of version 2", path.display())));
    }
    let directory = fs::File::open(path)?;
    let id = directory.metadata()?.ino();
    Ok((directory.into(), LinkTarget::Cgroup(id)))
}

fn fs_inode(file: &OwnedFd) -> io::Result<u32> {
    let inode = rustix::fs::fstat(file)?.st_ino;
    u32::try_from(inode).map_err(io::Error::other)
}

fn remove_if<K: aya::Pod, V: aya::Pod>(
    table: &mut HashMap<MapData, K, V>,
    matches: impl Fn(&K) -> bool,
) -> Result<(), MapError> {
    let keys = table.keys().collect::<Result<Vec<_>, _>>()?;
    keys.iter().filter(|key| matches(key)).try_for_each(|key| ignore_absent(table.remove(key)))
}

fn remove_unless<K: aya::Pod, V: aya::Pod>(
    table: &mut HashMap<MapData, K, V>,
    stays: impl Fn(&V) -> bool,
) -> Result<(), MapError> {
    let entries = table.iter().collect::<Result<Vec<_>, _>>()?;
    entries.iter().filter(|(_, value)| !stays(value)).try_for_each(|(key, _)| ignore_absent(table.remove(key)))
}

fn remove_sockets(table: &mut SockHash<MapData, ListenerKey>, workload: u32) -> Result<(), MapError> {
    let keys = table.keys().collect::<Result<Vec<_>, _>>()?;
    keys.iter().filter(|key| key.workload == workload).try_for_each(|key| ignore_absent(table.remove(key)))
}

/// Entries leave by themselves too: sockets that close, authorisations that are used.
fn ignore_absent(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn table_unless_present(table: &'static str, result: Result<(), MapError>) -> Result<(), TableError> {
    match result {
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map_err(|source| TableError { table, source }),
    }
}

/// What to do when a listening socket is missing: search the workload for it, not more often than [`SEARCH_INTERVAL`].
fn listener_search(
    generation: &Generation,
    cgroup: &Path,
    workloads: Weak<Mutex<BTreeMap<u32, Attached>>>,
) -> impl FnMut(u32) + Send + use<> {
    let pin = generation.map(culvert_ebpf_common::map::LISTENERS);
    let cgroup = cgroup.to_owned();
    move |id| {
        let Some(workloads) = workloads.upgrade() else { return };
        let netns = {
            let mut workloads = workloads.lock();
            let Some(workload) = workloads.get_mut(&id) else { return };
            if workload.searched.is_some_and(|at| at.elapsed() < SEARCH_INTERVAL) {
                return;
            }
            workload.searched = Some(Instant::now());
            workload.netns.try_clone()
        };
        let (pin, cgroup) = (pin.clone(), cgroup.clone());
        spawn_blocking(move || {
            let searched = netns.and_then(|netns| {
                let map = MapData::from_pin(&pin).map_err(io::Error::other)?;
                let mut table = SockHash::try_from(aya::maps::Map::SockHash(map)).map_err(io::Error::other)?;
                listeners::adopt(&mut table, id, netns.as_fd(), &cgroup)
            });
            match searched {
                Ok(count) => info!(workload = id, count, "searched for listening sockets"),
                Err(error) => warn!(workload = id, %error, "could not search for listening sockets"),
            }
        });
    }
}
