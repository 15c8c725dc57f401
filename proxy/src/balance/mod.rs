//! Which instance of a cluster a connection goes to.
//!
//! A [`Destination`] is one cluster in force: its healthy instances, their open connections, and the TLS to reach them. The
//! next version of a cluster takes over the counts of instances that stay. Least-request compares two instances drawn by
//! weight and takes the one with fewer open connections for its weight ("power of two choices": nearly as good as looking at
//! all, without herding).

use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::config::{Cluster, LbPolicy};
use crate::tls::{ClientContext, ContextError};

/// One cluster in force.
#[derive(Debug)]
pub(crate) struct Destination {
    pub(crate) config: Arc<Cluster>,
    pub(crate) tls: Option<Arc<ClientContext>>,
    /// Healthy ones only.
    instances: Vec<Instance>,
    /// Sum of the weights up to and including each instance.
    shares: Vec<u64>,
    /// Connections open to the whole cluster; shared with earlier and later versions.
    open: Arc<AtomicU32>,
    /// State of the draw: a counter for round-robin, a generator otherwise.
    draw: AtomicU64,
}

#[derive(Debug)]
struct Instance {
    address: SocketAddr,
    weight: u32,
    open: Arc<AtomicU32>,
}

/// A place at an instance, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) address: SocketAddr,
    instance: Arc<AtomicU32>,
    cluster: Arc<AtomicU32>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.instance.fetch_sub(1, Relaxed);
        self.cluster.fetch_sub(1, Relaxed);
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NoPlace {
    /// No healthy instance that was not tried yet.
    NoInstance,
    /// `max_connections` of the cluster are open.
    Full,
}

impl Destination {
    /// Puts `config` in force, seen from `node`. Counts, and TLS if it is the same, go on from `previous`.
    pub(crate) fn new(config: &Arc<Cluster>, node: &str, previous: Option<&Self>) -> Result<Self, ContextError> {
        let tls = match (&config.tls, previous) {
            (None, _) => None,
            (Some(tls), Some(Self { config: before, tls: Some(context), .. })) if before.tls.as_ref() == Some(tls) => {
                Some(Arc::clone(context))
            }
            (Some(tls), _) => Some(Arc::new(ClientContext::new(tls)?)),
        };
        let known = previous.map_or(&[][..], |previous| &previous.instances);
        let healthy = config.endpoints.iter().filter(|endpoint| endpoint.healthy && endpoint.weight > 0);
        let instances: Vec<Instance> = healthy
            .map(|endpoint| {
                let address = endpoint.address_from(node);
                let open = known.iter().find(|known| known.address == address).map(|known| Arc::clone(&known.open));
                Instance { address, weight: endpoint.weight, open: open.unwrap_or_default() }
            })
            .collect();
        let sum = |sum: &mut u64, instance: &Instance| {
            *sum += u64::from(instance.weight);
            Some(*sum)
        };
        let shares = instances.iter().scan(0, sum).collect();
        let open = previous.map(|previous| Arc::clone(&previous.open)).unwrap_or_default();
        let draw = AtomicU64::new(RandomState::new().hash_one(config.name.as_str()));
        Ok(Self { config: Arc::clone(config), tls, instances, shares, open, draw })
    }

    /// Takes a place at an instance that is not among `tried`.
    pub(crate) fn place(&self, tried: &[SocketAddr]) -> Result<Place, NoPlace> {
        let chosen = match self.config.lb_policy {
            LbPolicy::RoundRobin => self.at(self.draw.fetch_add(1, Relaxed), tried),
            LbPolicy::Random => self.at(self.random(), tried),
            LbPolicy::LeastRequest => self.at(self.random(), tried).map(|one| {
                let other = self.at(self.random(), tried).unwrap_or(one);
                if other.load_is_less_than(one) { other } else { one }
            }),
        };
        let instance = chosen.ok_or(NoPlace::NoInstance)?;
        let limit = self.config.max_connections.unwrap_or(u32::MAX);
        let more = |open| (open < limit).then_some(open + 1);
        self.open.fetch_update(Relaxed, Relaxed, more).map_err(|_| NoPlace::Full)?;
        instance.open.fetch_add(1, Relaxed);
        let (address, cluster) = (instance.address, Arc::clone(&self.open));
        Ok(Place { address, instance: Arc::clone(&instance.open), cluster })
    }

    /// The instance whose share `position` falls into, or the next one that was not tried.
    fn at(&self, position: u64, tried: &[SocketAddr]) -> Option<&Instance> {
        let position = position % self.shares.last().copied()?;
        let first = self.shares.partition_point(|end| *end <= position);
        let around = self.instances[first..].iter().chain(&self.instances[..first]);
        around.into_iter().find(|instance| !tried.contains(&instance.address))
    }

    /// SplitMix64: good enough to spread connections, and no lock.
    fn random(&self) -> u64 {
        let mut z = self.draw.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Instance {
    fn load_is_less_than(&self, other: &Self) -> bool {
        let open = |instance: &Self| u64::from(instance.open.load(Relaxed));
        open(self) * u64::from(other.weight) < open(other) * u64::from(self.weight)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::config::{ClusterKind, Endpoint};

    fn address(index: usize) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], u16::try_from(index).expect("small") + 1))
    }

    fn cluster(policy: LbPolicy, endpoints: &[(u32, bool)]) -> Arc<Cluster> {
        let endpoint = |(index, (weight, healthy)): (usize, &(u32, bool))| Endpoint {
            address: address(index),
            weight: *weight,
            healthy: *healthy,
            node: None,
            workload: None,
        };
        Arc::new(Cluster {
            name: "api".to_owned(),
            kind: ClusterKind::Eds,
            connect_timeout: Duration::from_secs(5),
            lb_policy: policy,
            endpoints: endpoints.iter().enumerate().map(endpoint).collect(),
            tls: None,
            max_connections: None,
        })
    }

    fn destination(policy: LbPolicy, endpoints: &[(u32, bool)]) -> Destination {
        Destination::new(&cluster(policy, endpoints), "node", None).expect("no TLS")
    }

    const POLICIES: [LbPolicy; 3] = [LbPolicy::RoundRobin, LbPolicy::LeastRequest, LbPolicy::Random];

    proptest! {
        #[test]
        fn only_healthy_instances_that_were_not_tried_are_chosen(
            endpoints in proptest::collection::vec((1u32..10, any::<bool>()), 0..8),
            tried in proptest::collection::vec(0usize..8, 0..8), policy in 0usize..3,
        ) {
            let destination = destination(POLICIES[policy], &endpoints);
            let tried: Vec<_> = tried.into_iter().map(address).collect();
            let usable: Vec<_> = (0..endpoints.len())
                .filter(|index| endpoints[*index].1 && !tried.contains(&address(*index))).map(address).collect();
            for _ in 0..20 {
                match destination.place(&tried) {
                    Ok(place) => prop_assert!(usable.contains(&place.address)),
                    Err(why) => { prop_assert_eq!(why, NoPlace::NoInstance); prop_assert!(usable.is_empty()); }
                }
            }
        }
    }

    #[test]
    fn weights_share_idle_instances() {
        for policy in POLICIES {
            let destination = destination(policy, &[(1, true), (3, true)]);
            let mut counts = HashMap::new();
            for _ in 0..4000 {
                *counts.entry(destination.place(&[]).expect("place").address).or_insert(0) += 1;
            }
            assert!((800..1200).contains(&counts[&address(0)]), "{policy:?}: {counts:?}");
        }
    }

    #[test]
    fn least_request_evens_out_open_connections() {
        let destination = destination(LbPolicy::LeastRequest, &[(1, true); 4]);
        let held: Vec<_> = (0..400).map(|_| destination.place(&[]).expect("place")).collect();
        let mut counts = HashMap::new();
        held.iter().for_each(|place| *counts.entry(place.address).or_insert(0) += 1);
        assert!(counts.values().all(|count| (90..=110).contains(count)), "{counts:?}");
    }

    #[test]
    fn an_instance_with_stuck_connections_gets_fewer_new_ones() {
        let destination = destination(LbPolicy::LeastRequest, &[(1, true), (1, true)]);
        let stuck: Vec<_> = (0..50).map(|_| destination.place(&[address(1)]).expect("place")).collect();
        let to_stuck = (0..1000).filter(|_| destination.place(&[]).expect("place").address == address(0)).count();
        assert!((150..350).contains(&to_stuck), "{to_stuck}: only when both draws hit it");
        drop(stuck);
    }

    #[test]
    fn counts_survive_an_update_and_places_are_given_back() {
        let first = destination(LbPolicy::LeastRequest, &[(1, true), (1, true)]);
        let place = first.place(&[address(1)]).expect("place");
        let second =
            Destination::new(&cluster(LbPolicy::LeastRequest, &[(1, true)]), "node", Some(&first)).expect("ok");
        assert_eq!(second.instances[0].open.load(Relaxed), 1);
        drop(place);
        assert_eq!((second.instances[0].open.load(Relaxed), second.open.load(Relaxed)), (0, 0));
    }

    #[test]
    fn the_limit_of_the_cluster_holds() {
        let mut config = Cluster::clone(&cluster(LbPolicy::Random, &[(1, true)]));
        config.max_connections = Some(2);
        let destination = Destination::new(&Arc::new(config), "node", None).expect("ok");
        let held = [destination.place(&[]).expect("first"), destination.place(&[]).expect("second")];
        assert_eq!(destination.place(&[]).expect_err("full"), NoPlace::Full);
        drop(held);
        assert!(destination.place(&[]).is_ok());
    }

    #[test]
    fn an_instance_on_this_node_is_reached_at_its_workload() {
        let mut config = Cluster::clone(&cluster(LbPolicy::Random, &[(1, true)]));
        let mut endpoint = config.endpoints[0].clone();
        (endpoint.node, endpoint.workload) = (Some("here".to_owned()), Some(address(7)));
        config.endpoints = [endpoint].into();
        let config = Arc::new(config);
        let from = |node| Destination::new(&config, node, None).expect("ok").place(&[]).expect("place").address;
        assert_eq!((from("here"), from("there")), (address(7), address(0)));
    }
}
