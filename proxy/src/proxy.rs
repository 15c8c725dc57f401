//! One proxy: the configuration of one workload, put in force and kept in force.
//!
//! A [`Proxy`] follows a stream of [`ProxyConfig`]s and changes as little as possible: a listener whose address stays keeps
//! its socket, TLS that stays is not made again, counts of instances go on, connections that are open are judged anew by the
//! policy that changed and otherwise left alone. A listener that is gone stops accepting at once and its connections may
//! go on for [`LISTENER_DRAIN`], those of a proxy that is stopped until its deadline; they obey policy to their end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use crate::balance::Destination;
use crate::config::{self, Direction, ProxyConfig};
use crate::events::Events;
use crate::handoff::{ListenerStatus, Nack, ProxyStatus};
use crate::l4::{Listener, State, Tally, domain_of};
use crate::rbac::Rbac;
use crate::sockets::Sockets;
use crate::threads::Placement;
use crate::tls::ServerContext;
use crate::xds;

/// How long the connections of a removed listener may go on.
pub const LISTENER_DRAIN: Duration = Duration::from_secs(30);
/// Pause before a listening socket that could not be had is asked for again.
pub const LISTEN_RETRY: Duration = Duration::from_secs(1);

/// What all connections of a proxy share.
pub(crate) struct Context {
    pub(crate) id: String,
    node: String,
    pub(crate) sockets: Arc<dyn Sockets>,
    pub(crate) threads: Arc<Placement>,
    pub(crate) events: Events,
    pub(crate) tally: Arc<Tally>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("id", &self.id).finish_non_exhaustive()
    }
}

/// One proxy, see the module.
#[derive(Debug)]
pub struct Proxy {
    context: Arc<Context>,
    destinations: BTreeMap<String, Arc<Destination>>,
    listeners: BTreeMap<SocketAddr, Arc<Listener>>,
    statuses: BTreeMap<SocketAddr, ListenerStatus>,
    /// Listeners that accept no more, as long as they have connections.
    closed: Vec<Arc<Listener>>,
    drains: tokio::task::JoinSet<()>,
}

/// Where a proxy takes its configuration from.
#[derive(Debug)]
pub struct Feed {
    /// The configuration in force.
    pub config: watch::Receiver<Arc<ProxyConfig>>,
    /// What the conversation with the control plane says about it.
    pub status: watch::Receiver<xds::Status>,
}

impl Proxy {
    /// Prepares the proxy with catalog ID `id` on `node`; nothing listens yet.
    #[must_use]
    pub fn new(id: &str, node: &str, sockets: Arc<dyn Sockets>, threads: Arc<Placement>, events: Events) -> Self {
        let context =
            Context { id: id.to_owned(), node: node.to_owned(), sockets, threads, events, tally: Arc::default() };
        Self {
            context: Arc::new(context),
            destinations: BTreeMap::new(),
            listeners: BTreeMap::new(),
            statuses: BTreeMap::new(),
            closed: Vec::new(),
            drains: tokio::task::JoinSet::new(),
        }
    }

    /// What it carries, to be asked at any time.
    #[must_use]
    pub(crate) fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.context.tally)
    }

    /// Follows `feed` until `stop` names a deadline, then drains: no connection is accepted any more, and those still open
    /// when the deadline has passed are reset. Publishes the state after every change.
    pub async fn run(
        mut self,
        mut feed: Feed,
        publish: watch::Sender<ProxyStatus>,
        mut stop: oneshot::Receiver<Duration>,
    ) {
        let mut retry = None;
        let deadline = loop {
            let config = Arc::clone(&feed.config.borrow_and_update());
            let known = feed.status.borrow_and_update().clone();
            let all_listen = self.apply(&config).await;
            retry = if all_listen {
                None
            } else {
                retry.filter(|at| *at > Instant::now()).or(Some(Instant::now() + LISTEN_RETRY))
            };
            let status = self.status(known, all_listen);
            publish.send_if_modified(|before| std::mem::replace(before, status.clone()) != status);
            let again = async {
                match retry {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                deadline = &mut stop => break deadline.unwrap_or_default(),
                changed = feed.config.changed() => if changed.is_err() {
                    // The client is gone: the last configuration stays.
                    break stop.await.unwrap_or_default();
                },
                changed = feed.status.changed() => if changed.is_err() {
                    break stop.await.unwrap_or_default();
                },
                () = again => {}
                Some(_) = self.drains.join_next() => {}
            }
        };
        self.drain(feed.config, deadline).await;
    }

    /// Lets connections go on until `deadline` from now. Policy changes meanwhile, too.
    async fn drain(mut self, mut configs: watch::Receiver<Arc<ProxyConfig>>, deadline: Duration) {
        info!(proxy = self.context.id, ?deadline, "draining");
        for address in self.listeners.keys().copied().collect::<Vec<_>>() {
            self.remove(address, deadline);
        }
        let end = sleep(deadline);
        let mut end = std::pin::pin!(end);
        let (mut following, mut in_time) = (true, true);
        while !self.drains.is_empty() {
            let config = Arc::clone(&configs.borrow_and_update());
            self.judge_closed(&config);
            tokio::select! {
                _ = self.drains.join_next() => {}
                changed = configs.changed(), if following => following = changed.is_ok(),
                // For those of listeners that were removed before, which may have more time of their own.
                () = &mut end, if in_time => {
                    in_time = false;
                    self.closed.iter().for_each(|listener| listener.end_all());
                }
            }
        }
    }

    /// Puts `config` in force. `false` if a listener has no socket.
    async fn apply(&mut self, config: &ProxyConfig) -> bool {
        self.apply_clusters(config);
        let mut wanted: BTreeMap<SocketAddr, Arc<config::Listener>> = BTreeMap::new();
        for listener in config.listeners.values() {
            wanted.insert(listener.address, Arc::clone(listener));
        }
        let companions: Vec<_> =
            wanted.values().filter_map(|listener| Some((loopback_v6(listener)?, Arc::clone(listener)))).collect();
        let mut optional = BTreeSet::new();
        for (address, listener) in companions {
            if let std::collections::btree_map::Entry::Vacant(free) = wanted.entry(address) {
                free.insert(listener);
                optional.insert(address);
            }
        }
        let gone: Vec<SocketAddr> =
            self.listeners.keys().filter(|address| !wanted.contains_key(address)).copied().collect();
        for address in gone {
            self.remove(address, LISTENER_DRAIN);
        }
        self.judge_closed(config);
        self.statuses.retain(|address, _| wanted.contains_key(address));
        let mut all = true;
        for (address, listener) in wanted {
            let problem = self.apply_listener(address, &listener).await.err();
            let ready = self.listeners.contains_key(&address);
            if optional.contains(&address) {
                if !ready {
                    self.statuses.remove(&address); // without IPv6 there is none, and nobody misses it
                    continue;
                }
            } else {
                all &= ready;
            }
            let name = listener.name.clone();
            let known = self.statuses.insert(address, ListenerStatus { name, address, ready, error: problem.clone() });
            if let Some(problem) = problem
                && known.is_none_or(|known| known.error.as_ref() != Some(&problem))
            {
                warn!(proxy = self.context.id, listener = listener.name, %address, problem, "listener is not as configured");
            }
        }
        all
    }

    fn apply_clusters(&mut self, config: &ProxyConfig) {
        self.destinations.retain(|name, _| config.clusters.contains_key(name));
        for (name, cluster) in &config.clusters {
            let previous = self.destinations.get(name);
            if previous.is_some_and(|previous| previous.config == *cluster) {
                continue;
            }
            match Destination::new(cluster, &self.context.node, previous.map(Arc::as_ref)) {
                Ok(destination) => drop(self.destinations.insert(name.clone(), Arc::new(destination))),
                Err(error) => {
                    warn!(proxy = self.context.id, cluster = name, %error, "cluster is not usable; the last good one stays")
                }
            }
        }
    }

    /// Puts one listener in force at `address`.
    async fn apply_listener(&mut self, address: SocketAddr, config: &Arc<config::Listener>) -> Result<(), String> {
        let before = self.listeners.get(&address).map(|listener| listener.state());
        let domain = domain_of(config).or_else(|| before.as_ref()?.domain.clone());
        let (mut config, mut problem) = (Arc::clone(config), None);
        let tls = match (&config.tls, &before) {
            (None, _) => None,
            (Some(tls), Some(before)) if before.config.tls.as_ref() == Some(tls) => before.tls.clone(),
            (Some(tls), before) => match (ServerContext::new(tls), before) {
                (Ok(context), _) => Some(Arc::new(context)),
                (Err(error), None) => return Err(format!("TLS: {error}")),
                (Err(error), Some(before)) => {
                    // The identity before serves on. Policy does not wait for a better one.
                    config = Arc::new(config::Listener { tls: before.config.tls.clone(), ..(*config).clone() });
                    problem = Some(format!("TLS: {error}"));
                    before.tls.clone()
                }
            },
        };
        let destination = self.destinations.get(&config.cluster).cloned();
        let same = |before: &State| {
            let same_destination = match (&before.destination, &destination) {
                (Some(before), Some(now)) => Arc::ptr_eq(before, now),
                (before, now) => before.is_none() && now.is_none(),
            };
            before.config == config && before.domain == domain && same_destination
        };
        if !before.as_deref().is_some_and(same) {
            let state = State { config: Arc::clone(&config), tls, domain, destination };
            match self.listeners.get(&address) {
                Some(listener) => listener.update(state),
                None => self.listen(address, state).await?,
            }
        }
        problem.map_or(Ok(()), Err)
    }

    async fn listen(&mut self, address: SocketAddr, state: State) -> Result<(), String> {
        let name = state.config.name.clone();
        let socket = self.context.sockets.listen(address).await.map_err(|error| format!("listen: {error}"))?;
        let listener =
            Listener::start(Arc::clone(&self.context), socket, state).map_err(|error| format!("listen: {error}"))?;
        info!(proxy = self.context.id, listener = name, %address, "accepting");
        self.listeners.insert(address, Arc::new(listener));
        Ok(())
    }

    fn remove(&mut self, address: SocketAddr, deadline: Duration) {
        self.context.sockets.forget(address);
        if let Some(listener) = self.listeners.remove(&address) {
            info!(proxy = self.context.id, %address, "listener removed");
            self.closed.push(Arc::clone(&listener));
            self.drains.spawn(async move { listener.drain(deadline).await });
        }
    }

    /// Judges the connections of closed listeners by the policy of `config`. Without one they may not go on.
    fn judge_closed(&mut self, config: &ProxyConfig) {
        self.closed.retain(|listener| !listener.is_over());
        for listener in &self.closed {
            let before = listener.state();
            if before.config.direction != Direction::Inbound {
                continue;
            }
            let (rbac, explain, domain) = match config.successor_of(&before.config) {
                Some(now) => (Arc::clone(&now.rbac), now.explain.clone(), domain_of(now)),
                None => ([Rbac::deny_all()].into(), None, None),
            };
            let domain = domain.or_else(|| before.domain.clone());
            let now = config::Listener { rbac, explain, ..(*before.config).clone() };
            let (tls, destination) = (before.tls.clone(), before.destination.clone());
            listener.update(State { config: Arc::new(now), tls, domain, destination });
        }
    }

    fn status(&self, known: xds::Status, all_listen: bool) -> ProxyStatus {
        let own = self.listeners.values().filter_map(|listener| listener.state().tls.as_ref()?.not_after());
        let clients = self.destinations.values().filter_map(|destination| destination.tls.as_ref()?.not_after());
        ProxyStatus {
            proxy: self.context.id.clone(),
            listeners: self.statuses.values().cloned().collect(),
            xds_version: (!known.version.is_empty()).then_some(known.version),
            nack: known.last_nack.map(|nack| Nack { resource: nack.resource, reason: nack.reason }),
            certificate_not_after: own.chain(clients).min(),
            ready: known.ready && all_listen,
        }
    }
}

/// Applications that call `localhost` may try `::1` first: an upstream on 127.0.0.1 is offered there as well.
fn loopback_v6(listener: &config::Listener) -> Option<SocketAddr> {
    let loopback =
        listener.address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) && listener.direction == Direction::Outbound;
    loopback.then(|| SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), listener.address.port()))
}

#[cfg(test)]
#[path = "proxy_tests.rs"]
mod tests;
