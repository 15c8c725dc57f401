//! Workloads under the programs: attached, guarded, and forgotten without a trace.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData, MapError, SockHash};
use culvert_ebpf_common::{
    Address, FAMILY_V4, FAMILY_V6, ListenerKey, PortKey, PortRule, Quota, SOME_WORKLOAD, WORKLOAD_GUARDED,
    WORKLOAD_LOOKUP, Workload, is_application, map,
};
use parking_lot::Mutex;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::config::{AttachError, PortKind, TableError, WorkloadLinks};
use super::kernel::{Kernel, LOOKUP};
use super::pins::Generation;
use super::{Datapath, listeners, netns};
use crate::sys::bpf::{self, AttachType, LinkTarget};

/// `BPF_NOEXIST`: insert only what is not there.
const NOEXIST: u64 = 1;
/// A workload whose listening socket was not found is searched at most this often.
const SEARCH_INTERVAL: Duration = Duration::from_secs(1);

/// A workload under the programs.
#[derive(Debug)]
pub(super) struct Attached {
    /// By its name: an open descriptor would keep the namespace, and the veth in it, alive after its end.
    pub(super) netns: PathBuf,
    pub(super) cookie: u64,
    searched: Option<Instant>,
}

impl Attached {
    /// Opens the namespace; not found if its name stands for another by now.
    pub(super) fn open(&self) -> io::Result<OwnedFd> {
        let netns = fs::File::open(&self.netns)?.into();
        if netns::cookie(OwnedFd::as_fd(&netns))? == self.cookie {
            Ok(netns)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

pub(super) type Workloads = Arc<Mutex<BTreeMap<u32, Attached>>>;

impl Datapath {
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
            mac: links.mac.into(),
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

        entry.flags = ready;
        self.write_workload(&entry)?;
        let attached = Attached { netns: links.netns.clone(), cookie, searched: None };
        self.workloads.lock().insert(links.id, attached);
        Ok(cookie)
    }

    /// Says how the ports of a workload are guarded; ports that are not named are not.
    ///
    /// # Errors
    /// [`TableError`]; ports are guarded before they are left alone, so a failure leaves too many guarded rather than too few.
    pub fn set_ports(&mut self, workload: u32, ports: &[(u16, PortKind)]) -> Result<(), TableError> {
        let table = |source| TableError { table: "PORTS", source };
        let mut new = false;
        for &(port, kind) in ports {
            let (key, rule) = (PortKey { workload, port, reserved: 0 }, PortRule { kind: kind.number() });
            let known = self.kernel.ports.get(&key, 0).is_ok_and(|rule| is_application(rule.kind));
            new |= is_application(rule.kind) && !known;
            self.kernel.ports.insert(key, rule, 0).map_err(table)?;
        }
        let stale = |key: &PortKey| key.workload == workload && !ports.iter().any(|(port, _)| *port == key.port);
        remove_if(&mut self.kernel.ports, stale).map_err(table)?;
        if new {
            self.adopt_listeners(workload);
        }
        Ok(())
    }

    /// Finds sockets that listened on the ports of applications before these were named. What is missed here is looked for when a
    /// connection misses it.
    fn adopt_listeners(&mut self, workload: u32) {
        let netns = self.workloads.lock().get(&workload).map(Attached::open);
        let Some(netns) = netns else { return };
        let Kernel { listeners, ports, .. } = &mut self.kernel;
        let adopted = netns.and_then(|netns| listeners::adopt(listeners, ports, workload, netns.as_fd(), &self.cgroup));
        if let Err(error) = adopted {
            warn!(workload, %error, "could not search for listening sockets");
        }
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
}

/// Tables of workloads.
impl Datapath {
    pub(super) fn workload_entries(&self) -> Result<Vec<Workload>, TableError> {
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
        let cookie = self.cookies()?.get(&id).copied();
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

/// The addresses of a workload.
pub(super) fn addresses(entry: &Workload) -> Vec<IpAddr> {
    let v6 = (!entry.address6.is_unspecified()).then_some(entry.address6);
    std::iter::once(entry.address4).chain(v6).map(IpAddr::from).collect()
}

/// Makes exactly `addresses` those of the workload that stands for all of them, [`SOME_WORKLOAD`].
pub(super) fn write_hairpin(kernel: &mut Kernel, addresses: &[IpAddr]) -> Result<(), TableError> {
    let table = |source| TableError { table: "WORKLOAD_ADDR", source };
    let entry = Workload { id: SOME_WORKLOAD, ..Workload::default() };
    let keys: Vec<Address> = addresses.iter().copied().map(Address::from).collect();
    for key in &keys {
        kernel.workload_addr.insert(key, entry, 0).map_err(table)?;
    }
    let present = kernel.workload_addr.iter().collect::<Result<Vec<_>, _>>().map_err(table)?;
    let stale = present.iter().filter(|(key, workload)| workload.id == SOME_WORKLOAD && !keys.contains(key));
    stale.map(|(key, _)| key).try_for_each(|key| ignore_absent(kernel.workload_addr.remove(key))).map_err(table)
}

pub(super) fn link_name(workload: u32, kind: &str) -> String {
    format!("{workload}-{kind}")
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
pub(super) fn listener_search(
    generation: &Generation,
    cgroup: &Path,
    workloads: Weak<Mutex<BTreeMap<u32, Attached>>>,
) -> impl FnMut(u32) + Send + use<> {
    let pins = [map::LISTENERS, map::PORTS].map(|name| generation.map(name));
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
            workload.open()
        };
        let (pins, cgroup) = (pins.clone(), cgroup.clone());
        spawn_blocking(move || {
            let searched = netns.and_then(|netns| {
                let [listeners, ports] = &pins;
                let listeners = MapData::from_pin(listeners).map_err(io::Error::other)?;
                let ports = MapData::from_pin(ports).map_err(io::Error::other)?;
                let mut table = SockHash::try_from(Map::SockHash(listeners)).map_err(io::Error::other)?;
                let ports = HashMap::try_from(Map::HashMap(ports)).map_err(io::Error::other)?;
                listeners::adopt(&mut table, &ports, id, netns.as_fd(), &cgroup)
            });
            match searched {
                Ok(count) => info!(workload = id, count, "searched for listening sockets"),
                Err(error) => warn!(workload = id, %error, "could not search for listening sockets"),
            }
        });
    }
}
