//! The direct path: loads the kernel programs, attaches them, and keeps their tables.
//!
//! Owns everything pinned below `bpf_dir`. The agent's policy compiler decides which pairs may talk and hands the result to
//! [`Datapath::apply`]; this module decides nothing. Applications reach each other without it, through the worker: every failure
//! here means "proxied", never "allowed".
//!
//! Programs, maps and links outlive the agent. [`Datapath::load`] finds what an earlier agent left: maps of the same layout go on being
//! used, and links are pointed at the new programs without a moment in between. What another layout left lets nothing through any
//! more, and goes on keeping out until [`Datapath::finish_takeover`].
//!
//! Calls are made on a thread in the agent's own network namespace, where the host's ends of the veths are.

mod cgroup;
mod clock;
mod config;
mod event;
mod kernel;
mod listeners;
mod log;
mod netns;
mod pins;
mod probe;
mod revoke;
mod sock_diag;
mod tc;
mod upstream;
mod workloads;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use culvert_ebpf_common::LAYOUT;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::{info, warn};

pub use self::cgroup::unified_root;
pub use self::config::{AttachError, DatapathConfig, DatapathUnavailable, PortKind, TableError, WorkloadLinks};
pub use self::event::{DirectConnection, DroppedPacket, EVENT_QUEUE, Flow, KernelEvent, Protocol};
pub use self::kernel::OBJECT;
pub use self::revoke::{FlowEnds, destroy_flows};
pub use self::tc::TcMode;
pub use self::upstream::{Applied, Instance, REMOVAL_GRACE, Removed, Upstream, UpstreamKey};

use self::kernel::{CGROUP_PROGRAMS, Kernel};
use self::pins::Generation;
use self::workloads::Workloads;
use crate::sys::bpf::{self, AttachType, LinkTarget};

/// Between the end of a former layout's connect programs and that of its leave: longer than a SYN is on its way.
pub const TAKEOVER_GRACE: Duration = Duration::from_millis(200);

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
    /// What the kernel had counted when an earlier agent ended.
    lost_before: u64,
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
    /// When the kernel, or our rights, do not suffice: every program, map and attachment is tried, no version is looked at. What an
    /// earlier agent left is removed then: nobody would keep its tables in line with policy.
    pub fn load(config: &DatapathConfig) -> Result<(Self, mpsc::Receiver<KernelEvent>), DatapathUnavailable> {
        Self::try_load(config).inspect_err(|_| {
            if let Err(error) = Self::remove_leftovers(&config.bpf_dir) {
                warn!(%error, "kernel programs of an earlier agent stay behind");
            }
        })
    }

    fn try_load(config: &DatapathConfig) -> Result<(Self, mpsc::Receiver<KernelEvent>), DatapathUnavailable> {
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
        let (kernel, ring, tc) = Self::load_generation(config, target, &generation)?;
        void(&older).map_err(unavailable("end what programs of another layout let through"))?;
        let workloads = Workloads::default();
        let lost_events = Arc::new(AtomicU64::new(0));
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        let search = workloads::listener_search(&generation, &config.cgroup, Arc::downgrade(&workloads));
        let pump = tokio::spawn(event::pump(ring, sender, Arc::clone(&lost_events), search)).abort_handle();
        let lost_before = kernel.lost();
        let datapath = Self {
            kernel,
            cgroup: config.cgroup.clone(),
            generation,
            older,
            workloads,
            tc,
            last_epoch: clock::boot(),
            lost_events,
            lost_before,
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
        let written = kernel.settings.set(0, config.settings(), 0);
        written.map_err(|error| DatapathUnavailable::new("write the settings", &error))?;
        let written = workloads::write_hairpin(&mut kernel, &config.hairpin);
        written.map_err(|error| DatapathUnavailable::new("write the addresses of hairpins", &error))?;
        for name in CGROUP_PROGRAMS {
            let attached = kernel.program(name).and_then(|program| {
                generation
                    .attach(name, target, program, || bpf::attach_to_fd(program, &cgroup, cgroup_attach_type(name)))
            });
            attached.map_err(|error| DatapathUnavailable::new(&format!("attach {name} to the cgroup"), &error))?;
        }
        Ok((kernel, ring, tc))
    }

    /// Brings the upstream entries of all workloads to `desired`: first removals, then additions. Entries that stay lose no connection
    /// attempt. What is removed leads no new connection from the start of the call on; it waits
    /// [`REMOVAL_GRACE`] for those that are just opening. [`Self::destroy_flows`] ends those that live. Entries of
    /// workloads that are not attached are left out.
    ///
    /// # Errors
    /// [`TableError`]; the difference that is left is found by the next call.
    pub fn apply(&mut self, desired: &BTreeMap<UpstreamKey, Upstream>) -> Result<Applied, TableError> {
        self.apply_beside(desired, &BTreeSet::new())
    }

    /// As [`Self::apply`]; but what is `left_alone`, and not desired, stays as it is.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_beside(
        &mut self,
        desired: &BTreeMap<UpstreamKey, Upstream>,
        left_alone: &BTreeSet<UpstreamKey>,
    ) -> Result<Applied, TableError> {
        self.last_epoch = clock::boot().max(self.last_epoch + 1);
        let cookies = self.cookies()?;
        upstream::apply(&mut self.kernel.upstream, desired, left_alone, &cookies, self.last_epoch)
            .map_err(|source| TableError { table: "UPSTREAM", source })
    }

    /// The entries in force: those of the last [`Self::apply`], or of an earlier agent's. Their ends are not told.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn upstreams(&self) -> Result<BTreeMap<UpstreamKey, Upstream>, TableError> {
        let cookies = self.cookies()?;
        upstream::list(&self.kernel.upstream, &cookies).map_err(|source| TableError { table: "UPSTREAM", source })
    }

    /// Network namespaces of the workloads, also of those that an earlier agent left and that are not attached again yet.
    fn cookies(&self) -> Result<BTreeMap<u32, u64>, TableError> {
        Ok(self.workload_entries()?.iter().map(|entry| (entry.id, entry.netns_cookie)).collect())
    }

    /// Ends every direct connection between `ends`, at both of them, whether it is open, opening or closing; returns how many
    /// sockets were ended. In workloads that are not attached none is.
    ///
    /// # Errors
    /// When a namespace cannot be entered, or its sockets cannot be listed.
    pub fn destroy_flows(&self, ends: &BTreeSet<FlowEnds>) -> io::Result<usize> {
        let workloads = self.workloads.lock();
        let entries = self.workload_entries().map_err(io::Error::other)?;
        let addresses: BTreeMap<u32, Vec<IpAddr>> =
            entries.iter().map(|entry| (entry.id, workloads::addresses(entry))).collect();
        revoke::destroy_flows(ends, &addresses, |workload| match workloads.get(&workload) {
            Some(workload) => workload.open(),
            None => Err(io::ErrorKind::NotFound.into()),
        })
    }

    /// Removes what programs of another layout have left, once every live workload was attached: until then they guard it.
    /// Connections that the former programs had opened live on, but tell the instance's address as their peer's, and their end is
    /// not told.
    ///
    /// # Errors
    /// When a pin cannot be removed; may be repeated.
    pub fn finish_takeover(&mut self) -> io::Result<()> {
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
        let removed = removed.and_then(|()| pins::remove_directory_if_empty(self.generation.bpf_dir()));
        detached?;
        removed.map_err(|source| AttachError::Step { workload: 0, step: "remove pins", source })
    }

    /// Removes what agents have left below `bpf_dir`, without loading anything: for a node that is told not to use the direct path.
    ///
    /// # Errors
    /// When a pin cannot be removed; may be repeated.
    pub fn remove_leftovers(bpf_dir: &Path) -> io::Result<()> {
        if !bpf_dir.exists() {
            return Ok(());
        }
        Generation::list(bpf_dir)?.iter().try_for_each(Generation::remove)?;
        pins::remove_directory_if_empty(bpf_dir)
    }

    /// Events that were left out since [`Self::load`] because nobody took them in time, in the kernel or here.
    #[must_use]
    pub fn lost_events(&self) -> u64 {
        let in_kernel = self.kernel.lost().saturating_sub(self.lost_before);
        self.lost_events.load(Ordering::Relaxed) + in_kernel
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

/// Ends what programs of other layouts let through: first nobody is led by them any more, then nobody has their leave.
fn void(older: &[Generation]) -> io::Result<()> {
    if older.is_empty() {
        return Ok(());
    }
    info!(count = older.len(), "taking over from kernel programs of another layout");
    older.iter().try_for_each(|generation| generation.remove_links("connect"))?;
    thread::sleep(TAKEOVER_GRACE);
    older.iter().try_for_each(Generation::void)
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
