//! `network.json`: which address and ports each allocation has, and which host settings were changed.
//!
//! Written before the kernel is told, so that after a crash nothing exists whose name is not here or in the kernel's own
//! lists. Pure bookkeeping: no kernel object is touched.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use culvert_control::disk::remedy;
use serde::{Deserialize, Serialize};

use super::alloc_id::AllocId;
use super::settings::Subnet4;
use super::types::PortMap;
use crate::task::{boot_id, read_json, write_json};

/// Name of the file in the data directory.
const FILE: &str = "network.json";
/// Layout of the file.
const VERSION: u32 = 1;
/// Host number of the gateway; allocations come after it.
pub(super) const GATEWAY: u32 = 1;

/// One allocation's share.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Share {
    /// Number in the subnet and in the ULA prefix.
    pub(super) host: u32,
    /// Published ports.
    pub(super) ports: Vec<PortMap>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Content {
    version: u32,
    subnet: String,
    /// The lowest number never given out.
    fresh: u32,
    /// Numbers given back, oldest first.
    released: VecDeque<u32>,
    allocations: BTreeMap<AllocId, Share>,
    /// Host settings we changed, with their former values.
    sysctls: BTreeMap<String, String>,
    /// `/proc/sys/kernel/random/boot_id` when they were changed.
    #[serde(default)]
    boot_id: String,
}

/// Interfaces that may go on forwarding, by family; `None`: all of them, because the host forwarded before culvert came.
/// Every other interface, also one that appears later, must not become a way through this host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Routers {
    pub(super) ipv4: Option<BTreeSet<String>>,
    pub(super) ipv6: Option<BTreeSet<String>>,
}

/// The setting by which the host forwards at all.
pub(super) fn forwarding(family: &str) -> &'static str {
    if family == "ipv6" { "net/ipv6/conf/all/forwarding" } else { "net/ipv4/ip_forward" }
}

/// The same of one interface.
pub(super) fn interface_forwarding(family: &str, interface: &str) -> String {
    format!("net/{family}/conf/{interface}/forwarding")
}

/// The file and its content.
#[derive(Debug)]
pub(super) struct State {
    path: PathBuf,
    subnet: Subnet4,
    content: Content,
}

/// `network.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Reading, understanding or writing it failed.
    #[error("network records {} cannot be used ({})", path.display(), remedy(source))]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Allocations live with addresses of another subnet.
    #[error(
        "network records {} hold allocations of subnet {recorded}, the setting says {configured}: stop them first",
        path.display()
    )]
    Subnet {
        /// The file.
        path: PathBuf,
        /// In the file.
        recorded: String,
        /// In the settings.
        configured: String,
    },
    /// No address left.
    #[error("no free workload address: all {count} addresses of {subnet} are in use by allocations of this node")]
    Exhausted {
        /// The subnet.
        subnet: String,
        /// Addresses in it.
        count: u32,
    },
    /// Two allocations with the same first digits.
    #[error(
        "allocation {id} begins like {other}, which lives: netns and veth are named by these digits; use another ID"
    )]
    SameShortId {
        /// The new one.
        id: AllocId,
        /// The living one.
        other: AllocId,
    },
}

impl State {
    /// Reads the file, or begins without one.
    pub(super) fn load(data_dir: &Path, subnet: Subnet4) -> Result<Self, StateError> {
        let path = data_dir.join(FILE);
        let failed = |source| StateError::File { path: path.clone(), source };
        let text = format!("{}/{}", subnet.network, subnet.prefix);
        let mut content = read_json::<Content>(&path).map_err(failed)?.unwrap_or_else(|| Content {
            version: VERSION,
            subnet: text.clone(),
            fresh: GATEWAY + 1,
            released: VecDeque::new(),
            allocations: BTreeMap::new(),
            sysctls: BTreeMap::new(),
            boot_id: String::new(),
        });
        if content.version != VERSION {
            let other = format!("layout version {} instead of {VERSION}", content.version);
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, other)));
        }
        if content.subnet != text {
            if !content.allocations.is_empty() {
                return Err(StateError::Subnet { path, recorded: content.subnet, configured: text });
            }
            (content.subnet, content.fresh, content.released) = (text, GATEWAY + 1, VecDeque::new());
        }
        let boot_id = boot_id().map_err(failed)?;
        if content.boot_id != boot_id {
            if !content.boot_id.is_empty() {
                // The kernel has forgotten what was changed, and its settings are the administrator's again.
                content.sysctls.clear();
            }
            content.boot_id = boot_id;
        }
        Ok(Self { path, subnet, content })
    }

    /// Makes the change durable, or undoes it.
    fn change<T>(&mut self, change: impl FnOnce(&mut Content) -> T) -> Result<T, StateError> {
        let mut next = self.content.clone();
        let result = change(&mut next);
        if next != self.content {
            write_json(&self.path, &next).map_err(|source| StateError::File { path: self.path.clone(), source })?;
            self.content = next;
        }
        Ok(result)
    }

    /// The number of `id`: the one it has, else one never used, else the one unused for longest.
    pub(super) fn allocate(&mut self, id: &AllocId) -> Result<u32, StateError> {
        if let Some(share) = self.content.allocations.get(id) {
            return Ok(share.host);
        }
        if let Some(other) = self.content.allocations.keys().find(|other| other.short() == id.short()) {
            return Err(StateError::SameShortId { id: id.clone(), other: other.clone() });
        }
        let last = self.subnet.last_host();
        if self.content.fresh > last && self.content.released.is_empty() {
            let count = last - GATEWAY;
            return Err(StateError::Exhausted { subnet: self.content.subnet.clone(), count });
        }
        self.change(|content| {
            let host = if content.fresh <= last {
                content.fresh += 1;
                content.fresh - 1
            } else {
                content.released.pop_front().unwrap_or(last) // just seen to hold one
            };
            content.allocations.insert(id.clone(), Share { host, ports: Vec::new() });
            host
        })
    }

    /// Gives back the number and the ports of `id`.
    pub(super) fn release(&mut self, id: &AllocId) -> Result<(), StateError> {
        self.change(|content| {
            if let Some(share) = content.allocations.remove(id) {
                content.released.push_back(share.host);
            }
        })
    }

    pub(super) fn share(&self, id: &AllocId) -> Option<&Share> {
        self.content.allocations.get(id)
    }

    pub(super) fn allocations(&self) -> &BTreeMap<AllocId, Share> {
        &self.content.allocations
    }

    /// Replaces the published ports of `id`.
    pub(super) fn set_ports(&mut self, id: &AllocId, ports: Vec<PortMap>) -> Result<(), StateError> {
        self.change(|content| {
            if let Some(share) = content.allocations.get_mut(id) {
                share.ports = ports;
            }
        })
    }

    /// Who else has the host port of `map`? Different addresses of the host do not collide, an address and all do.
    pub(super) fn port_owner(&self, id: &AllocId, map: &PortMap) -> Option<&PortMap> {
        let others = self.content.allocations.iter().filter(|(other, _)| *other != id);
        let mut ports = others.flat_map(|(_, share)| &share.ports);
        ports.find(|other| other.host_port == map.host_port && collide(other.addr, map.addr))
    }

    /// Remembers the former value of a host setting, the first time only.
    pub(super) fn remember_sysctl(&mut self, name: &str, former: &str) -> Result<(), StateError> {
        self.change(|content| {
            content.sysctls.entry(name.to_owned()).or_insert_with(|| former.to_owned());
        })
    }

    pub(super) fn sysctls(&self) -> &BTreeMap<String, String> {
        &self.content.sysctls
    }

    /// Who may go on forwarding: where culvert switched it on, those that did before.
    pub(super) fn routers(&self) -> Routers {
        let sysctls = self.sysctls();
        let of = |family: &str| {
            let forwarded = |interface: &String| {
                sysctls.get(&interface_forwarding(family, interface)).is_some_and(|former| former != "0")
            };
            let prefix = format!("net/{family}/conf/");
            let interfaces = sysctls.keys().filter_map(|name| name.strip_prefix(&prefix)?.strip_suffix("/forwarding"));
            let interfaces = interfaces.filter(|name| *name != "all").map(str::to_owned).filter(forwarded);
            sysctls.contains_key(forwarding(family)).then(|| interfaces.collect())
        };
        Routers { ipv4: of("ipv4"), ipv6: of("ipv6") }
    }

    /// Removes the file: the node has left.
    pub(super) fn forget(&mut self) -> Result<(), StateError> {
        match std::fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StateError::File { path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

fn collide(one: Option<IpAddr>, other: Option<IpAddr>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(prefix: u8) -> Subnet4 {
        Subnet4 { network: [10, 9, 8, 0].into(), prefix }
    }

    #[test]
    fn an_allocation_keeps_its_number_across_restarts() {
        let directory = tempfile::tempdir().expect("a directory");
        let ids: Vec<AllocId> = (0..5).map(|_| AllocId::random()).collect();
        let numbers =
            |state: &mut State| -> Vec<u32> { ids.iter().map(|id| state.allocate(id).expect("free")).collect() };
        let first = numbers(&mut State::load(directory.path(), subnet(24)).expect("loaded"));
        assert_eq!(first, [2, 3, 4, 5, 6]);
        assert_eq!(numbers(&mut State::load(directory.path(), subnet(24)).expect("loaded")), first);
    }

    #[test]
    fn released_numbers_come_last_and_the_oldest_first() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut state = State::load(directory.path(), subnet(29)).expect("loaded"); // 2 … 6
        let ids: Vec<AllocId> = (0..5).map(|_| AllocId::random()).collect();
        let take = |state: &mut State, id: &AllocId| state.allocate(id);
        assert_eq!(take(&mut state, &ids[0]).expect("free"), 2);
        assert_eq!(take(&mut state, &ids[1]).expect("free"), 3);
        state.release(&ids[1]).expect("released");
        state.release(&ids[0]).expect("released");
        let later: Vec<AllocId> = (0..6).map(|_| AllocId::random()).collect();
        let mut state = State::load(directory.path(), subnet(29)).expect("loaded again");
        let numbers: Vec<u32> = later[..5].iter().map(|id| state.allocate(id).expect("free")).collect();
        assert_eq!(numbers, [4, 5, 6, 3, 2]);
        let full = state.allocate(&later[5]).expect_err("full").to_string();
        assert_eq!(
            full,
            "no free workload address: all 5 addresses of 10.9.8.0/29 are in use by allocations of this node"
        );
    }

    #[test]
    fn a_port_collides_with_the_same_address_and_with_all_addresses() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut state = State::load(directory.path(), subnet(24)).expect("loaded");
        let (one, other) = (AllocId::random(), AllocId::random());
        let map = |addr: Option<&str>| PortMap {
            host_port: 9002,
            to: 80,
            addr: addr.map(|addr| addr.parse().expect("an address")),
            owner: "one:http".into(),
        };
        state.allocate(&one).expect("free");
        state.set_ports(&one, vec![map(Some("10.0.0.1"))]).expect("kept");
        let owner = |state: &State, id, addr| state.port_owner(id, &map(addr)).map(|map| map.owner.clone());
        assert_eq!(owner(&state, &other, Some("10.0.0.2")), None);
        assert_eq!(owner(&state, &other, Some("10.0.0.1")), Some("one:http".into()));
        assert_eq!(owner(&state, &other, None), Some("one:http".into()));
        assert_eq!(owner(&state, &one, None), None, "its own ports are no obstacle");
    }

    #[test]
    fn only_what_forwarded_before_goes_on_and_a_reboot_forgets_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut state = State::load(directory.path(), subnet(24)).expect("loaded");
        assert_eq!(state.routers(), Routers::default(), "nothing was switched on");
        let changed = [
            ("net/ipv4/conf/eth1/forwarding", "1"),
            ("net/ipv4/conf/all/accept_redirects", "1"),
            ("net/ipv4/ip_forward", "0"),
        ];
        for (name, former) in changed {
            state.remember_sysctl(name, former).expect("kept");
        }
        let routers = Routers { ipv4: Some(["eth1".to_owned()].into()), ipv6: None };
        assert_eq!(state.routers(), routers);
        assert_eq!(State::load(directory.path(), subnet(24)).expect("loaded").routers(), routers);
        let path = directory.path().join(FILE);
        let mut json: serde_json::Value = read_json(&path).expect("read").expect("there");
        json["boot_id"] = "another".into();
        write_json(&path, &json).expect("written");
        let rebooted = State::load(directory.path(), subnet(24)).expect("loaded");
        assert!(rebooted.sysctls().is_empty() && rebooted.routers() == Routers::default());
    }

    #[test]
    fn a_damaged_file_and_a_changed_subnet_are_errors() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut state = State::load(directory.path(), subnet(24)).expect("loaded");
        state.allocate(&AllocId::random()).expect("free");
        assert!(matches!(State::load(directory.path(), subnet(25)), Err(StateError::Subnet { .. })));
        std::fs::write(directory.path().join(FILE), "{\"version\":").expect("written");
        assert!(matches!(State::load(directory.path(), subnet(24)), Err(StateError::File { .. })));
    }
}
