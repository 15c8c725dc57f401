//! The proxies of a worker: started, stopped, and counted until they are gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use super::Parcel;
use super::link::{AgentDial, Link};
use super::pool::{HandedSockets, Pool};
use crate::events::Events;
use crate::handoff::{ProxyStatus, Secret, ToAgent, Traffic};
use crate::l4::Tally;
use crate::proxy::{Feed, Proxy};
use crate::threads::Placement;
use crate::xds::{Node, Token, XdsChannel, XdsClient};

/// How often an agent hears what a proxy carries.
pub const TRAFFIC_INTERVAL: Duration = Duration::from_secs(2);

/// One proxy at work.
struct Served {
    client: XdsClient,
    /// Taken when it is told to stop.
    stop: Option<oneshot::Sender<Duration>>,
    status: watch::Receiver<ProxyStatus>,
    tally: Arc<Tally>,
    task: AbortHandle,
    /// The present agent wants it.
    named: bool,
}

/// See the module.
pub(super) struct Proxies {
    link: Arc<Link>,
    threads: Arc<Placement>,
    channel: XdsChannel,
    events: Events,
    served: BTreeMap<String, Served>,
    running: JoinSet<String>,
    draining: bool,
}

impl Proxies {
    pub(super) fn new(link: Arc<Link>, threads: Arc<Placement>, events: Events) -> Self {
        let channel = XdsChannel::over(AgentDial(Arc::clone(&link)));
        let (served, running) = (BTreeMap::new(), JoinSet::new());
        Self { link, threads, channel, events, served, running, draining: false }
    }

    #[cfg(test)]
    pub(super) fn events(&self) -> &Events {
        &self.events
    }

    /// Serves `proxy`, or goes on to: the token of the xDS stream is all that may change.
    pub(super) fn serve(&mut self, proxy: &str, cluster: &str, node: &str, token: Option<Secret>) {
        let token = token.map(|token| Token::new(token.expose().to_owned()).map_err(|error| (token, error)));
        let token = match token.transpose() {
            Ok(token) => token.flatten(),
            Err((_, error)) => return warn!(proxy, %error, "not served"),
        };
        if self.draining {
            return warn!(proxy, "not served: the worker is draining");
        }
        if let Some(served) = self.served.get_mut(proxy).filter(|served| served.stop.is_some()) {
            served.named = true;
            served.client.set_token(token);
            if let Some(pool) = self.link.pools.lock().get(proxy) {
                pool.set_away(false);
            }
            return served.client.retry_now();
        }
        if self.served.contains_key(proxy) {
            return warn!(proxy, "not served: it is still being drained");
        }
        info!(proxy, "serving");
        let introduction = Node::new(proxy, cluster).with("namespace", "default").with("node_name", node);
        let client = XdsClient::start(self.channel.clone(), introduction, token);
        let pool = Arc::new(Pool::default());
        self.link.pools.lock().insert(proxy.to_owned(), Arc::clone(&pool));
        let sockets = HandedSockets { proxy: proxy.to_owned(), link: Arc::clone(&self.link), pool };
        let runs = Proxy::new(proxy, node, Arc::new(sockets), Arc::clone(&self.threads), self.events.clone());
        let (publish, status) = watch::channel(ProxyStatus { proxy: proxy.to_owned(), ..ProxyStatus::default() });
        let (stop, stopped) = oneshot::channel();
        let feed = Feed { config: client.config(), status: client.status() };
        let tally = runs.tally();
        tokio::spawn(report(Arc::clone(&self.link), status.clone(), Arc::clone(&tally)));
        let id = proxy.to_owned();
        let task = self.running.spawn(async move {
            runs.run(feed, publish, stopped).await;
            id
        });
        self.served.insert(proxy.to_owned(), Served { client, stop: Some(stop), status, tally, task, named: true });
    }

    /// Drains `proxy`. Of one that is not served, the agent has not heard that it has stopped.
    pub(super) fn stop(&mut self, proxy: &str, deadline: Duration) {
        let Some(served) = self.served.get_mut(proxy) else {
            warn!(proxy, "told to stop a proxy that is not served");
            let (link, proxy) = (Arc::clone(&self.link), proxy.to_owned());
            tokio::spawn(async move { link.tell(ToAgent::Stopped { proxy }).await });
            return;
        };
        if let Some(stop) = served.stop.take() {
            let _runs_until_told = stop.send(deadline);
        }
    }

    /// Drains all of them; [`Self::drained`] tells when that is done.
    pub(super) fn start_drain(&mut self, deadline: Duration) {
        self.draining = true;
        for proxy in self.served.keys().cloned().collect::<Vec<_>>() {
            self.stop(&proxy, deadline);
        }
    }

    pub(super) async fn drain_all(&mut self, deadline: Duration) {
        self.start_drain(deadline);
        while self.next_gone().await.is_some() {}
    }

    /// Everything was drained, and nothing will be served any more.
    pub(super) fn drained(&self) -> bool {
        self.draining && self.running.is_empty()
    }

    /// The next proxy that is gone, and what it carried; `None` while none runs. Cancel-safe.
    pub(super) async fn next_gone(&mut self) -> Option<(String, Traffic)> {
        let joined = self.running.join_next().await?;
        self.ended(joined)
    }

    /// Takes note of proxies that have ended while there was no agent to tell.
    pub(super) fn bury(&mut self) {
        while let Some(joined) = self.running.try_join_next() {
            self.ended(joined);
        }
    }

    fn ended(&mut self, joined: Result<String, JoinError>) -> Option<(String, Traffic)> {
        let proxy = match joined {
            Ok(proxy) => proxy,
            Err(error) => {
                let proxy = self.served.iter().find(|(_, served)| served.task.id() == error.id())?.0.clone();
                tracing::error!(proxy, %error, "a proxy failed");
                proxy
            }
        };
        let traffic = self.served.remove(&proxy).map(|served| served.tally.read()).unwrap_or_default();
        self.link.pools.lock().remove(&proxy);
        self.link.held.lock().retain(|(owner, _), _| *owner != proxy);
        Some((proxy, traffic))
    }

    /// Tells the agent, once every data thread has had a turn, that this worker works.
    pub(super) fn pong(&self) {
        let (link, threads) = (Arc::clone(&self.link), Arc::clone(&self.threads));
        tokio::spawn(async move {
            threads.all_take_turns().await;
            link.tell(ToAgent::Pong).await;
        });
    }

    /// Asks for the configuration at once: there is an agent again.
    pub(super) fn retry(&self) {
        self.channel.retry_now();
    }

    /// What a new agent has to know: listeners and states.
    pub(super) fn introduction(&self) -> Vec<Parcel> {
        let held = self.link.held.lock();
        let listener = |((proxy, address), listener): (&(String, _), &std::net::TcpListener)| {
            let copy = listener.try_clone().inspect_err(|error| warn!(%error, proxy, "cannot hand back a listener"));
            Some((ToAgent::Adopt { proxy: proxy.clone(), address: *address }, Some(copy.ok()?.into())))
        };
        let listeners: Vec<Parcel> = held.iter().filter_map(listener).collect();
        let states = self.served.values().map(|served| (ToAgent::Status(served.status.borrow().clone()), None));
        listeners.into_iter().chain(states).collect()
    }

    /// When the last certificate ends that is in use, in seconds since 1970.
    pub(super) fn last_certificate(&self) -> Option<u64> {
        self.served.values().filter_map(|served| served.status.borrow().certificate_not_after).max()
    }

    /// A new agent has to name every proxy again, and counts from zero.
    pub(super) fn unname(&mut self) {
        for served in self.served.values_mut() {
            served.named = false;
            served.tally.count_anew();
        }
    }

    pub(super) fn any_unnamed(&self) -> bool {
        self.served.values().any(|served| !served.named && served.stop.is_some())
    }

    pub(super) fn stop_unnamed(&mut self, deadline: Duration) {
        let unnamed = self.served.iter().filter(|(_, served)| !served.named && served.stop.is_some());
        for proxy in unnamed.map(|(proxy, _)| proxy.clone()).collect::<Vec<_>>() {
            warn!(proxy, "the agent did not name this proxy again; draining it");
            self.stop(&proxy, deadline);
        }
    }
}

/// Tells the agent every state, and what is carried, until the proxy is gone.
async fn report(link: Arc<Link>, mut status: watch::Receiver<ProxyStatus>, tally: Arc<Tally>) {
    let proxy = status.borrow().proxy.clone();
    let mut told = Traffic::default();
    let mut due = tokio::time::interval(TRAFFIC_INTERVAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = status.changed() => match changed {
                Ok(()) => {
                    let now = status.borrow_and_update().clone();
                    link.tell(ToAgent::Status(now)).await;
                }
                Err(_) => return,
            },
            _ = due.tick() => {
                // Not a condition of the branch: that would be looked at before the wait, and hold until something else happens.
                if !link.is_connected() {
                    continue;
                }
                let traffic = tally.read();
                // Repeated while there is something: an agent that has just come does not know every proxy yet.
                if traffic != told || traffic.inbound.open + traffic.outbound.open > 0 {
                    link.tell(ToAgent::Traffic { proxy: proxy.clone(), traffic }).await;
                    told = traffic;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::SideTraffic;
    use crate::threads::DataThreads;

    #[tokio::test]
    async fn of_a_proxy_that_is_not_served_it_is_told_that_it_has_stopped() {
        let threads = DataThreads::new(1).expect("thread");
        let (link, mut messages) = Link::new();
        let (events, _reader) = Events::new(Arc::default());
        Proxies::new(link, threads.placement(), events).stop("web", Duration::ZERO);
        let told = messages.recv().await.expect("told");
        assert!(matches!(&told, ToAgent::Stopped { proxy } if proxy == "web"), "{told:?}");
    }

    #[tokio::test]
    async fn a_proxy_that_fails_is_told_by_its_name_also_when_another_ends_with_it() {
        let threads = DataThreads::new(1).expect("thread");
        let (link, _messages) = Link::new();
        let (events, _reader) = Events::new(Arc::default());
        let mut proxies = Proxies::new(link, threads.placement(), events);
        for proxy in ["api", "web"] {
            proxies.serve(proxy, proxy, "n1", None);
        }
        let (web, api) = (proxies.served["web"].task.clone(), proxies.served["api"].task.clone());
        web.abort(); // the same to whoever joins it as a panic
        while !web.is_finished() {
            tokio::task::yield_now().await;
        }
        proxies.stop("api", Duration::ZERO);
        while !api.is_finished() {
            tokio::task::yield_now().await;
        }
        let mut gone = Vec::new();
        while let Some((proxy, _)) = proxies.next_gone().await {
            gone.push(proxy);
        }
        gone.sort();
        assert_eq!(gone, ["api", "web"]);
        assert!(proxies.served.is_empty() && proxies.link.pools.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_carried_is_told_whenever_there_is_an_agent_and_only_then() {
        let (link, mut messages) = Link::new();
        let (_publish, status) = watch::channel(ProxyStatus::default());
        let inbound = SideTraffic { open: 1, ..SideTraffic::default() };
        let tally = Tally::of_past(Traffic { inbound, ..Traffic::default() });
        tokio::spawn(report(Arc::clone(&link), status, Arc::new(tally)));
        for _ in 0..2 {
            tokio::time::sleep(3 * TRAFFIC_INTERVAL).await;
            assert!(messages.try_recv().is_err(), "nobody is there to be told");
            link.connected();
            let told = tokio::time::timeout(3 * TRAFFIC_INTERVAL, messages.recv()).await;
            assert!(matches!(told, Ok(Some(ToAgent::Traffic { .. }))), "{told:?}");
            link.disconnected();
        }
    }
}
