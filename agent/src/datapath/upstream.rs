//! Upstream entries as the policy compiler writes them, and the difference between two sets of them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, SystemTime};

use aya::maps::{HashMap, MapData, MapError};
use culvert_ebpf_common::{self as raw, Address, MAX_INSTANCES};

use super::clock;
use super::revoke::FlowEnds;

/// Two ends of certificates that lie closer than this are one: the calendar's clock is moved in small steps.
const EXPIRY_TOLERANCE: u64 = 2_000_000_000;

/// Between the end of an entry for new connections and for those that are just opening; longer than a SYN is on its way.
pub const REMOVAL_GRACE: Duration = Duration::from_millis(25);

/// Who connects where.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct UpstreamKey {
    /// The workload that calls.
    pub workload: u32,
    /// What the upstream listens on in it: a loopback address and a port.
    pub address: SocketAddr,
}

/// Where an upstream leads, on this node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Upstream {
    /// The destination service, a number of the caller's choice that comes back in events. Another number is another pair: live
    /// connections of the former one are no longer allowed.
    pub service: u32,
    /// Passing instances on this node; of more than [`MAX_INSTANCES`] the rest is not used.
    pub instances: Vec<Instance>,
    /// The entry is void from then on, even if nobody removes it: the end of the earlier of both certificates.
    pub not_after: Option<SystemTime>,
}

/// An instance of a service, on this node.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Instance {
    /// Its workload.
    pub workload: u32,
    /// Address of the workload.
    pub addr4: Ipv4Addr,
    /// Address of the workload, if it has IPv6.
    pub addr6: Option<Ipv6Addr>,
    /// Port of the application.
    pub port: u16,
}

/// What [`super::Datapath::apply`] changed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Applied {
    /// Pairs that may not talk any more; their live connections are to be ended ([`super::Datapath::destroy_flows`]).
    pub removed: Vec<Removed>,
    /// How many entries are new.
    pub added: usize,
    /// How many lead to other instances, or end at another time, than before.
    pub changed: usize,
}

/// A pair that may not talk any more.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Removed {
    /// The entry that is gone.
    pub key: UpstreamKey,
    /// Where it led.
    pub upstream: Upstream,
}

impl Removed {
    /// The ends between which connections may not live any more.
    pub fn ends(&self) -> impl Iterator<Item = FlowEnds> {
        let source = self.key.workload;
        self.upstream.instances.iter().map(move |instance| FlowEnds {
            source,
            destination: instance.workload,
            port: instance.port,
        })
    }
}

impl From<Instance> for raw::Instance {
    fn from(instance: Instance) -> Self {
        Self {
            address4: instance.addr4.into(),
            address6: instance.addr6.map(Address::from).unwrap_or_default(),
            workload: instance.workload,
            port: instance.port,
            reserved: 0,
        }
    }
}

impl From<raw::Instance> for Instance {
    fn from(instance: raw::Instance) -> Self {
        let v4 = match IpAddr::from(instance.address4) {
            IpAddr::V4(v4) => v4,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let v6 = match IpAddr::from(instance.address6) {
            IpAddr::V6(v6) if !v6.is_unspecified() => Some(v6),
            _ => None,
        };
        Self { workload: instance.workload, addr4: v4, addr6: v6, port: instance.port }
    }
}

impl Upstream {
    fn to_raw(&self, epoch: u64) -> raw::Upstream {
        let mut instances = [raw::Instance::default(); MAX_INSTANCES];
        for (slot, instance) in instances.iter_mut().zip(&self.instances) {
            *slot = (*instance).into();
        }
        let count = self.instances.len().min(MAX_INSTANCES);
        raw::Upstream {
            epoch,
            expires: self.not_after.map_or(u64::MAX, clock::boot_at),
            service: self.service,
            count: u32::try_from(count).expect("at most sixteen"),
            instances,
        }
    }

    fn from_raw(raw: &raw::Upstream) -> Self {
        let instances = raw.instances.iter().take(raw.count as usize).map(|instance| (*instance).into()).collect();
        Self { service: raw.service, instances, not_after: None }
    }
}

/// Brings the kernel's table to `desired`: removals first, then changes and additions. `cookies` are the network namespaces of the
/// attached workloads, `fresh_epoch` is one that no entry has had.
pub(super) fn apply(
    table: &mut HashMap<MapData, raw::UpstreamKey, raw::Upstream>,
    desired: &BTreeMap<UpstreamKey, Upstream>,
    left_alone: &BTreeSet<UpstreamKey>,
    cookies: &BTreeMap<u32, u64>,
    fresh_epoch: u64,
) -> Result<Applied, MapError> {
    let mut desired: std::collections::HashMap<raw::UpstreamKey, &Upstream> = desired
        .iter()
        .filter(|(_, wanted)| !wanted.instances.is_empty())
        .filter_map(|(key, wanted)| Some((raw_key(*cookies.get(&key.workload)?, key.address), wanted)))
        .collect();
    let workloads: BTreeMap<u64, u32> = cookies.iter().map(|(workload, cookie)| (*cookie, *workload)).collect();
    let raw_keys = left_alone.iter().filter_map(|key| Some(raw_key(*cookies.get(&key.workload)?, key.address)));
    let left_alone: HashSet<raw::UpstreamKey> = raw_keys.collect();
    let stays = |key: &raw::UpstreamKey, entry: &raw::Upstream| {
        desired.get(key).map_or(left_alone.contains(key), |wanted| wanted.service == entry.service)
    };
    let present = table.iter().collect::<Result<Vec<_>, _>>()?;
    let (kept, gone): (Vec<_>, Vec<_>) = present.into_iter().partition(|(key, entry)| stays(key, entry));
    close(table, &gone)?;
    let mut applied = Applied::default();
    for (key, entry) in gone {
        table.remove(&key)?;
        // Of a workload that is gone nothing lives.
        if let Some(key) = plain_key(&key, &workloads) {
            applied.removed.push(Removed { key, upstream: Upstream::from_raw(&entry) });
        }
    }
    // What is there comes before what is new: a full table must not keep it from being brought up to date.
    for (key, entry) in &kept {
        let Some(wanted) = desired.remove(key) else { continue };
        let new = wanted.to_raw(entry.epoch);
        if !same(entry, &new) {
            table.insert(key, new, 0)?;
            applied.changed += 1;
        }
    }
    for (key, wanted) in desired {
        table.insert(key, wanted.to_raw(fresh_epoch), 0)?;
        applied.added += 1;
    }
    Ok(applied)
}

/// What is in the kernel's table, of the workloads that `cookies` names.
pub(super) fn list(
    table: &HashMap<MapData, raw::UpstreamKey, raw::Upstream>,
    cookies: &BTreeMap<u32, u64>,
) -> Result<BTreeMap<UpstreamKey, Upstream>, MapError> {
    let workloads: BTreeMap<u64, u32> = cookies.iter().map(|(workload, cookie)| (*cookie, *workload)).collect();
    let present = table.iter().collect::<Result<Vec<_>, _>>()?;
    let known =
        present.iter().filter_map(|(key, entry)| Some((plain_key(key, &workloads)?, Upstream::from_raw(entry))));
    Ok(known.collect())
}

fn plain_key(key: &raw::UpstreamKey, workloads: &BTreeMap<u64, u32>) -> Option<UpstreamKey> {
    let workload = *workloads.get(&key.netns_cookie)?;
    Some(UpstreamKey { workload, address: SocketAddr::new(key.address.into(), key.port) })
}

/// Takes away the instances, so that no connection is led by these entries any more, and waits until SYNs that have left under them
/// have arrived: without this a connection that was begun a moment ago would be refused, though it should only have gone another way.
fn close(
    table: &mut HashMap<MapData, raw::UpstreamKey, raw::Upstream>,
    entries: &[(raw::UpstreamKey, raw::Upstream)],
) -> Result<(), MapError> {
    for (key, entry) in entries {
        table.insert(key, raw::Upstream { count: 0, ..*entry }, 0)?;
    }
    if !entries.is_empty() {
        thread::sleep(REMOVAL_GRACE);
    }
    Ok(())
}

fn raw_key(netns_cookie: u64, address: SocketAddr) -> raw::UpstreamKey {
    raw::UpstreamKey { netns_cookie, address: address.ip().into(), port: address.port(), reserved: [0; 3] }
}

fn same(old: &raw::Upstream, new: &raw::Upstream) -> bool {
    raw::Upstream { expires: 0, ..*old } == raw::Upstream { expires: 0, ..*new }
        && old.expires.abs_diff(new.expires) < EXPIRY_TOLERANCE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_as_they_went_in() {
        let upstream = Upstream {
            service: 7,
            instances: vec![
                Instance { workload: 1, addr4: Ipv4Addr::new(172, 26, 64, 2), addr6: None, port: 9001 },
                Instance {
                    workload: 2,
                    addr4: Ipv4Addr::new(172, 26, 64, 3),
                    addr6: Some("fd00::3".parse().expect("an address")),
                    port: 9002,
                },
            ],
            not_after: None,
        };
        assert_eq!(Upstream::from_raw(&upstream.to_raw(1)), upstream);
    }

    #[test]
    fn instances_beyond_the_limit_are_left_out() {
        let instance = Instance { workload: 1, addr4: Ipv4Addr::LOCALHOST, addr6: None, port: 1 };
        let upstream = Upstream { service: 1, instances: vec![instance; MAX_INSTANCES + 3], not_after: None };
        assert_eq!(upstream.to_raw(1).count as usize, MAX_INSTANCES);
    }

    #[test]
    fn a_small_step_of_the_clock_changes_nothing() {
        let instance = Instance { workload: 1, addr4: Ipv4Addr::LOCALHOST, addr6: None, port: 1 };
        let upstream = Upstream { service: 1, instances: vec![instance], not_after: None };
        let old = raw::Upstream { expires: 10_000_000_000, ..upstream.to_raw(1) };
        assert!(same(&old, &raw::Upstream { expires: 10_900_000_000, ..old }));
        assert!(!same(&old, &raw::Upstream { expires: 19_000_000_000, ..old }));
        assert!(!same(&old, &raw::Upstream { count: 0, ..old }));
    }
}
