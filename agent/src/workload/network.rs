//! The network itself: opens it, gives each allocation its part of it, and takes it away again.
//!
//! Order of every change: the record on disk, then the kernel. Every kernel object is found by its name, so what a crash
//! left is removed by [`Network::reconcile`], or made again by [`Network::create`].

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::alloc_id::AllocId;
use super::firewall::{self, FirewallError, Ruleset};
use super::netlink::Netlink;
use super::node::{NodeFile, NodeFileError};
use super::settings::{NetworkSettings, SettingsError};
use super::state::{GATEWAY, State, StateError};
use super::sysctl::{self, SysctlError};
use super::types::{MacAddress, PortMap, Workload};
use super::{host_ports, netns, open};
use crate::task::{CgroupError, DirError};

/// The interface inside a workload's netns.
pub(super) const INSIDE: &str = "eth0";
/// Prefix length of the workload's IPv6 network.
pub(super) const PREFIX6: u8 = 64;

/// Source of what workloads send to each other's published ports, over IPv4. It is on no link: answers take the way to the
/// gateway, where the translation is undone.
const HAIRPIN4: Ipv4Addr = Ipv4Addr::new(169, 254, 172, 26);

/// The network could not be changed as asked.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A setting cannot work.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// `node.json`.
    #[error(transparent)]
    Node(#[from] NodeFileError),
    /// `network.json`, or no address left.
    #[error(transparent)]
    State(#[from] StateError),
    /// A kernel setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The packet filter.
    #[error(transparent)]
    Firewall(#[from] FirewallError),
    /// A cgroup of an allocation that is gone.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A mount of an allocation that is gone.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// A link, address, route or netns.
    #[error("{doing} {name}")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// With which object.
        name: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The bridge's name belongs to something else.
    #[error("interface {0} exists and is not a bridge: rename it, the name is culvert's")]
    NotABridge(String),
    /// The subnet is in use on this host.
    #[error(
        "workload subnet {subnet} overlaps {address} of interface {interface}: the interface needs another address"
    )]
    Overlap {
        /// The setting.
        subnet: String,
        /// The other address.
        address: IpAddr,
        /// Its interface.
        interface: String,
    },
    /// A host port is taken. Nomad's wording.
    #[error("Static port {port} already reserved by {owner}")]
    PortReserved {
        /// The port.
        port: u16,
        /// Another allocation's `<task or group>:<label>`, or a process of the host.
        owner: String,
    },
    /// The allocation has no network.
    #[error("allocation {0} has no network yet")]
    Unknown(AllocId),
}

pub(super) fn failed(doing: &'static str, name: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Kernel { doing, name: name.into(), source }
}

/// Runs blocking work; a panic in it becomes a panic here.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down: nobody waits for an answer any more.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The node's workload network. One per node; every method may be called concurrently.
pub struct Network {
    pub(super) settings: NetworkSettings,
    /// The IPv6 prefix, where the host has IPv6.
    ula: Option<Ipv6Addr>,
    bridge: u32,
    pub(super) netlink: Netlink,
    /// Also serialises changes of the kernel's objects.
    pub(super) state: Mutex<State>,
    warnings: Vec<String>,
}

/// The names and addresses that belong to one allocation.
struct Plan {
    netns: PathBuf,
    veth: String,
    addr4: Ipv4Addr,
    addr6: Option<Ipv6Addr>,
    mac: MacAddress,
}

/// Locally administered, unicast, and derived from the address: an address never changes its Ethernet address, so no
/// neighbour's cache is ever wrong.
pub(super) fn mac_of(address: Ipv4Addr) -> MacAddress {
    let [a, b, c, d] = address.octets();
    MacAddress([0x02, 0x63, a, b, c, d])
}

impl Network {
    /// Makes or adopts the bridge, its addresses, the kernel settings and the nftables table.
    ///
    /// # Errors
    /// [`NetworkError`]: no privilege, no `nft`, a bad setting, a name or subnet in use by somebody else.
    pub async fn open(settings: NetworkSettings) -> Result<Self, NetworkError> {
        settings.check()?;
        let node = NodeFile::load_or_create(&settings.data_dir)?;
        let mut state = State::load(&settings.data_dir, settings.subnet)?;
        let ula = sysctl::exists("net/ipv6").then(|| settings.ula.unwrap_or(node.ula_prefix));
        let netlink = Netlink::connect().map_err(failed("open", "a netlink socket"))?;
        let bridge = open::open_bridge(&netlink, &settings, ula).await?;
        let warnings = open::open_sysctls(&netlink, &settings, ula.is_some(), &mut state).await?;
        let mut network = Self { settings, ula, bridge, netlink, state: Mutex::new(state), warnings };
        let state = network.state.lock().await;
        network.apply(&state).await?;
        drop(state);
        let (nft, table) = (network.settings.nft.clone(), network.settings.table.clone());
        if let Some(chain) = blocking(move || firewall::foreign_drop(&nft, &table)).await? {
            network.warnings.push(format!(
                "chain {chain} drops forwarded packets by default: until it accepts interface {}, workloads reach neither \
                 the outside nor, where bridged packets are filtered too (bridge-nf-call-iptables), each other, and \
                 published ports are not reached from outside",
                network.settings.bridge
            ));
        }
        Ok(network)
    }

    /// What the host does not allow, in sentences for the log.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The gateway's IPv4 address: the host as workloads see it, and the source of what comes through published ports
    /// from the host itself, or from the workload itself.
    #[must_use]
    pub fn gateway4(&self) -> Ipv4Addr {
        self.settings.subnet.host(GATEWAY)
    }

    /// The gateway's IPv6 address.
    #[must_use]
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.ula.map(|ula| Ipv6Addr::from_bits(ula.to_bits() | u128::from(GATEWAY)))
    }

    pub(super) fn ula(&self) -> Option<Ipv6Addr> {
        self.ula
    }

    /// The sources of what workloads send to each other's published ports: no address of a workload, nor of the host, so that
    /// the guard of a port can tell.
    #[must_use]
    pub fn hairpin(&self) -> Vec<IpAddr> {
        std::iter::once(IpAddr::V4(HAIRPIN4)).chain(self.hairpin6().map(IpAddr::V6)).collect()
    }

    /// Of the neighbouring /64: on no link, as [`HAIRPIN4`].
    fn hairpin6(&self) -> Option<Ipv6Addr> {
        self.ula.map(|ula| Ipv6Addr::from_bits((ula.to_bits() ^ 1 << 64) | u128::from(GATEWAY)))
    }

    /// The settings it was opened with.
    #[must_use]
    pub fn settings(&self) -> &NetworkSettings {
        &self.settings
    }

    /// Makes the network of `id`: netns, veth pair, addresses, routes. One that is complete is adopted as it is; a broken or
    /// half-made one gets a new veth pair in the netns that is there, because tasks may live in it. The address stays the
    /// same until [`Network::remove`].
    ///
    /// # Errors
    /// [`NetworkError`]; of what was made now nothing stays.
    pub async fn create(&self, id: &AllocId) -> Result<Workload, NetworkError> {
        let mut state = self.state.lock().await;
        let known = state.share(id).is_some();
        let host = state.allocate(id)?;
        let plan = self.plan(id, host);
        if let Some(workload) = self.inspect(&plan).await? {
            return Ok(workload);
        }
        let lived_in = netns::is_netns(&plan.netns);
        let built = match self.build(&plan, lived_in).await {
            Ok(()) => match self.inspect(&plan).await? {
                Some(workload) => return Ok(workload),
                None => Err(failed("find", plan.veth.clone())(io::ErrorKind::NotFound.into())),
            },
            Err(error) => Err(error),
        };
        if lived_in {
            return built;
        }
        if let Err(error) = self.demolish(&plan).await {
            tracing::warn!(alloc = %id, error = &error as &dyn std::error::Error, "half-made network stays");
        } else if !known {
            state.release(id)?;
        }
        built
    }

    /// The network of `id`, if it is complete.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`].
    pub async fn workload(&self, id: &AllocId) -> Result<Option<Workload>, NetworkError> {
        let host = self.state.lock().await.share(id).map(|share| share.host);
        match host {
            Some(host) => self.inspect(&self.plan(id, host)).await,
            None => Ok(None),
        }
    }

    /// Publishes exactly `ports` for `id`; what was published for it before and is not among them is withdrawn.
    ///
    /// # Errors
    /// [`NetworkError::PortReserved`] when another allocation or a process of the host has a port; nothing changes then.
    pub async fn publish(&self, id: &AllocId, ports: &[PortMap]) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        let before = state.share(id).ok_or_else(|| NetworkError::Unknown(id.clone()))?.ports.clone();
        for (index, map) in ports.iter().enumerate() {
            self.check_free(&state, id, map, &ports[..index])?;
        }
        state.set_ports(id, ports.to_vec())?;
        if let Err(error) = self.apply(&state).await {
            state.set_ports(id, before)?;
            return Err(error);
        }
        Ok(())
    }

    /// Removes the network of `id`: ports, netns, veth, address. One that is not there is removed.
    ///
    /// # Errors
    /// [`NetworkError`]; the record stays, so that the next [`Network::reconcile`] tries again.
    pub async fn remove(&self, id: &AllocId) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        self.remove_locked(&mut state, id).await
    }

    pub(super) async fn remove_locked(&self, state: &mut State, id: &AllocId) -> Result<(), NetworkError> {
        let Some(host) = state.share(id).map(|share| share.host) else { return Ok(()) };
        if state.share(id).is_some_and(|share| !share.ports.is_empty()) {
            state.set_ports(id, Vec::new())?;
            self.apply(state).await?;
        }
        self.demolish(&self.plan(id, host)).await?;
        Ok(state.release(id)?)
    }

    fn plan(&self, id: &AllocId, host: u32) -> Plan {
        let addr4 = self.settings.subnet.host(host);
        Plan {
            netns: self.settings.netns(id),
            veth: format!("{}{}", self.settings.veth_prefix, id.short()),
            addr4,
            addr6: self.ula.map(|ula| Ipv6Addr::from_bits(ula.to_bits() | u128::from(host))),
            mac: mac_of(addr4),
        }
    }

    /// The network as the kernel has it, if nothing is missing. The default route is made last, so it stands for the rest.
    async fn inspect(&self, plan: &Plan) -> Result<Option<Workload>, NetworkError> {
        let name = || plan.netns.display().to_string();
        if !netns::is_netns(&plan.netns) {
            return Ok(None);
        }
        let link = self.netlink.link(&plan.veth).await.map_err(failed("look at", &plan.veth))?;
        let Some(link) = link.filter(|link| link.up && link.controller == Some(self.bridge)) else { return Ok(None) };
        let inside = Netlink::connect_in(&plan.netns).await.map_err(failed("look into netns", name()))?;
        let Some(eth0) = inside.link(INSIDE).await.map_err(failed("look into netns", name()))? else { return Ok(None) };
        let addresses = inside.addresses(eth0.index).await.map_err(failed("look into netns", name()))?;
        let has = |wanted: IpAddr| addresses.iter().any(|(address, _)| *address == wanted);
        let addressed = has(plan.addr4.into()) && plan.addr6.is_none_or(|address| has(address.into()));
        if !addressed || !inside.has_default4().await.map_err(failed("look into netns", name()))? {
            return Ok(None);
        }
        let cookie = netns::netns_cookie(&plan.netns).await.unwrap_or_else(|error| {
            tracing::debug!(netns = %plan.netns.display(), %error, "no netns cookie");
            0
        });
        Ok(Some(Workload {
            netns: plan.netns.clone(),
            netns_cookie: cookie,
            host_interface: plan.veth.clone(),
            host_ifindex: link.index,
            addr4: plan.addr4,
            addr6: plan.addr6,
            mac: plan.mac,
        }))
    }

    async fn build(&self, plan: &Plan, lived_in: bool) -> Result<(), NetworkError> {
        let name = || plan.netns.display().to_string();
        if lived_in {
            // Its end inside goes with it, and so do the addresses and routes.
            self.delete_veth(plan).await?;
        } else {
            self.demolish(plan).await?;
            let path = plan.netns.clone();
            blocking(move || netns::create(&path)).await.map_err(failed("create netns", name()))?;
        }
        let ipv6 = plan.addr6.is_some();
        netns::run_in_netns(&plan.netns, move || Ok(inside_sysctls(ipv6)))
            .await
            .map_err(failed("enter netns", name()))??;
        let made = self.netlink.add_veth(&plan.veth, &plan.netns, INSIDE, plan.mac).await;
        made.map_err(failed("create interface", &plan.veth))?;
        let veth = self.netlink.index(&plan.veth).await.map_err(failed("look at", &plan.veth))?;
        self.netlink.attach(veth, self.bridge).await.map_err(failed("attach to the bridge", &plan.veth))?;
        self.configure_inside(plan).await.map_err(failed("configure netns", name()))
    }

    async fn configure_inside(&self, plan: &Plan) -> io::Result<()> {
        let inside = Netlink::connect_in(&plan.netns).await?;
        inside.set_up(inside.index("lo").await?).await?;
        let eth0 = inside.index(INSIDE).await?;
        inside.add_address(eth0, plan.addr4.into(), self.settings.subnet.prefix).await?;
        if let Some(address) = plan.addr6 {
            inside.add_address(eth0, address.into(), PREFIX6).await?;
        }
        inside.set_up(eth0).await?;
        if let Some(gateway) = self.gateway6() {
            inside.add_default6(eth0, gateway).await?;
        }
        inside.add_default4(eth0, self.gateway4()).await
    }

    async fn demolish(&self, plan: &Plan) -> Result<(), NetworkError> {
        self.delete_veth(plan).await?;
        let path = plan.netns.clone();
        let removed = blocking(move || netns::remove(&path)).await;
        removed.map_err(failed("remove netns", plan.netns.display().to_string()))
    }

    async fn delete_veth(&self, plan: &Plan) -> Result<(), NetworkError> {
        self.netlink.delete(&plan.veth).await.map_err(failed("delete interface", &plan.veth))
    }

    /// Is the host port free? A port that this allocation already has is: it is published again.
    fn check_free(&self, state: &State, id: &AllocId, map: &PortMap, earlier: &[PortMap]) -> Result<(), NetworkError> {
        let reserved = |owner: String| NetworkError::PortReserved { port: map.host_port, owner };
        let same = |other: &&PortMap| other.host_port == map.host_port && other.addr == map.addr;
        if let Some(other) = earlier.iter().find(same) {
            return Err(reserved(other.owner.clone()));
        }
        if let Some(other) = state.port_owner(id, map) {
            return Err(reserved(other.owner.clone()));
        }
        let own = state.share(id).is_some_and(|share| share.ports.iter().any(|other| same(&other)));
        if own {
            return Ok(());
        }
        let sockets = host_ports::listening(map.host_port, map.addr);
        match sockets.map_err(failed("read the host's sockets for port", map.host_port.to_string()))?.first() {
            None => Ok(()),
            Some(socket) => {
                let at = std::net::SocketAddr::new(socket.address, map.host_port);
                Err(reserved(format!("{} listening on {at}/{} of this host", socket.process(), socket.protocol)))
            }
        }
    }

    /// Makes the packet filter what the records say.
    pub(super) async fn apply(&self, state: &State) -> Result<(), NetworkError> {
        let ports = state.allocations().iter().flat_map(|(id, share)| {
            let plan = self.plan(id, share.host);
            share.ports.iter().map(move |map| (plan.addr4, plan.addr6, map))
        });
        let ruleset = Ruleset {
            table: &self.settings.table,
            bridge: &self.settings.bridge,
            subnet: self.settings.subnet,
            ula: self.ula,
            hairpin4: HAIRPIN4,
            hairpin6: self.hairpin6(),
            routers: state.routers(),
            ports: ports.collect(),
        };
        let (nft, script) = (self.settings.nft.clone(), ruleset.script());
        Ok(blocking(move || firewall::apply(&nft, &script)).await?)
    }
}

/// Settings of a new netns, before its interface arrives. Thread is inside.
fn inside_sysctls(ipv6: bool) -> Result<(), SysctlError> {
    // A worker that is replaced hands its unfinished handshakes to its successor's listener (Linux 5.14).
    if sysctl::exists("net/ipv4/tcp_migrate_req") {
        sysctl::set("net/ipv4/tcp_migrate_req", "1")?;
    }
    // A new netns takes its IPv4 settings over from the host, which may be a router.
    sysctl::set("net/ipv4/ip_forward", "0")?;
    // Tasks have no capability at all; the netns is theirs alone, so every port may be.
    sysctl::set("net/ipv4/ip_unprivileged_port_start", "0")?;
    if ipv6 {
        for name in ["all", "default"] {
            sysctl::set(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0")?;
            // No router but ours, and no second of waiting for duplicates of addresses that we assign.
            sysctl::set(&format!("net/ipv6/conf/{name}/accept_ra"), "0")?;
            sysctl::set(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
        }
    }
    Ok(())
}
