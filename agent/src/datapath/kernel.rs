//! The object, loaded: its maps under their types, its programs ready to be attached.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SockHash};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel, include_bytes_aligned};
use culvert_ebpf_common::{
    Address, Auth, FlowKey, ListenerKey, PortKey, PortRule, Quota, Settings, Upstream, UpstreamKey, Workload, map,
};
use tokio::task::AbortHandle;
use tracing::warn;

use super::config::DatapathUnavailable;
use super::log;
use super::pins::Generation;

/// The kernel programs, built by `cargo xtask ebpf`.
pub static OBJECT: &[u8] = include_bytes_aligned!("culvert.bpf.o");

/// Programs attached to the cgroup, as named in the object.
pub(super) const CGROUP_PROGRAMS: [&str; 5] = ["connect4", "connect6", "getpeername4", "getpeername6", "milestone"];
/// Program attached in a workload's network namespace.
pub(super) const LOOKUP: &str = "lookup";
/// Program for packets from a workload.
pub(super) const FROM_WORKLOAD: &str = "from_workload";
/// Program for packets to a workload.
pub(super) const TO_WORKLOAD: &str = "to_workload";

/// Maps and programs.
pub(super) struct Kernel {
    /// Programs; their maps are taken out.
    ebpf: Ebpf,
    pub(super) upstream: HashMap<MapData, UpstreamKey, Upstream>,
    pub(super) auth: HashMap<MapData, FlowKey, Auth>,
    pub(super) listeners: SockHash<MapData, ListenerKey>,
    pub(super) steered: SockHash<MapData, ListenerKey>,
    pub(super) workload_if: HashMap<MapData, u32, Workload>,
    pub(super) workload_netns: HashMap<MapData, u64, Workload>,
    pub(super) workload_addr: HashMap<MapData, Address, Workload>,
    pub(super) ports: HashMap<MapData, PortKey, PortRule>,
    pub(super) quota: HashMap<MapData, u32, Quota>,
    pub(super) settings: Array<MapData, Settings>,
    pub(super) lost: PerCpuArray<MapData, u64>,
    /// Passes log lines on, if there are any.
    lines: Option<AbortHandle>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.lines.iter().for_each(AbortHandle::abort);
    }
}

impl Kernel {
    /// Loads the object with the maps of `generation`, making those that are not there, and has every program verified.
    pub(super) fn load(generation: &Generation) -> Result<(Self, RingBuf<MapData>), DatapathUnavailable> {
        let level = log::level();
        Self::load_with(generation, level).or_else(|error| {
            if level == log::OFF {
                return Err(error);
            }
            // Nobody shall lose the direct path because he wants to know more about it.
            warn!(%error, "the kernel programs are loaded without their log lines");
            Self::load_with(generation, log::OFF)
        })
    }

    fn load_with(generation: &Generation, level: u8) -> Result<(Self, RingBuf<MapData>), DatapathUnavailable> {
        let paths = map::ALL.map(|name| (name, generation.map(name)));
        let mut loader = EbpfLoader::new();
        loader.verifier_log_level(VerifierLogLevel::DEBUG).override_global(log::LEVEL, &level, true);
        for (name, path) in &paths {
            loader.map_pin_path(name, path.as_path());
        }
        let mut ebpf = loader.load(OBJECT).map_err(|error| DatapathUnavailable::new("load the object", &error))?;
        for name in CGROUP_PROGRAMS.into_iter().chain([LOOKUP, FROM_WORKLOAD, TO_WORKLOAD]) {
            let program = ebpf.program_mut(name).ok_or_else(|| DatapathUnavailable::missing("program", name))?;
            load_program(program).map_err(|error| DatapathUnavailable::new(&format!("load program {name}"), &error))?;
        }
        let lines = if level == log::OFF { None } else { log::follow(&mut ebpf).ok() };
        let events = typed(&mut ebpf, map::EVENTS)?;
        let kernel = Self {
            upstream: typed(&mut ebpf, map::UPSTREAM)?,
            auth: typed(&mut ebpf, map::AUTH)?,
            listeners: typed(&mut ebpf, map::LISTENERS)?,
            steered: typed(&mut ebpf, map::STEERED)?,
            workload_if: typed(&mut ebpf, map::WORKLOAD_IF)?,
            workload_netns: typed(&mut ebpf, map::WORKLOAD_NETNS)?,
            workload_addr: typed(&mut ebpf, map::WORKLOAD_ADDR)?,
            ports: typed(&mut ebpf, map::PORTS)?,
            quota: typed(&mut ebpf, map::QUOTA)?,
            settings: typed(&mut ebpf, map::SETTINGS)?,
            lost: typed(&mut ebpf, map::LOST)?,
            lines,
            ebpf,
        };
        Ok((kernel, events))
    }

    /// Events that have ever found the ring full.
    pub(super) fn lost(&self) -> u64 {
        self.lost.get(&0, 0).map_or(0, |per_cpu| per_cpu.iter().sum())
    }

    /// The descriptor of a program.
    pub(super) fn program(&self, name: &str) -> io::Result<BorrowedFd<'_>> {
        let program = self.ebpf.program(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(program.fd().map_err(io::Error::other)?.as_fd())
    }

    /// A program, for attachments that only aya makes.
    pub(super) fn program_mut(&mut self, name: &str) -> Option<&mut Program> {
        self.ebpf.program_mut(name)
    }
}

fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        other => Err(ProgramError::InvalidName { name: format!("a program of type {:?}", other.prog_type()) }),
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &str) -> Result<T, DatapathUnavailable> {
    let map = ebpf.take_map(name).ok_or_else(|| DatapathUnavailable::missing("map", name))?;
    T::try_from(map).map_err(|error| DatapathUnavailable::new(&format!("open map {name}"), &error))
}
