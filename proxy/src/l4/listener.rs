//! One listening socket: accepting, limits, the registry of what was accepted, and changes of configuration under it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwap;
use culvert_types::{RefusalReason, TrustDomain};
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::copy::Traffic;
use super::live::{Live, Refusal, Story};
use super::socket::{Connection, prepare};
use super::{inbound, outbound, tally};
use crate::balance::Destination;
use crate::config::{self, Direction};
use crate::handoff;
use crate::proxy::Context;
use crate::rbac::{self, RbacDecision};
use crate::threads::ThreadPlace;
use crate::tls::{PeerIdentity, ServerContext, own_identity};

/// Most connections of one listener, where the configuration names no limit.
const DEFAULT_MAX_CONNECTIONS: usize = 8192;
/// Pause after a failed `accept`: without descriptors (`EMFILE`) it would fail again at once, and again.
pub(crate) const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Everything that may change while the socket stays.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) config: Arc<config::Listener>,
    pub(crate) tls: Option<Arc<ServerContext>>,
    /// Whose names the rules of `config` are about. `tls` may be of another one: it stays where no new TLS is put in force.
    pub(crate) domain: Option<TrustDomain>,
    /// `None`: unknown cluster, or one that cannot be used.
    pub(crate) destination: Option<Arc<Destination>>,
}

impl State {
    /// Judges an inbound peer by the policy of this state.
    pub(crate) fn judge(&self, peer: &PeerIdentity, live: &Live) -> (RbacDecision, String) {
        let uri = self.present_uri(peer);
        let connection = rbac::Connection { identity: Some(&uri), peer: live.peer, local: live.local };
        let decision = rbac::evaluate(&self.config.rbac, &connection);
        let rule = match &self.config.explain {
            Some(explain) => explain.rule(Some(&uri), &decision),
            None => decision.rule(),
        };
        (decision, rule)
    }

    /// The name that policy knows the peer by. A connection may be older than the trust domain: a node in memory alone makes
    /// another authority when it starts again. Rules about names of today would miss who came in under the name of before.
    fn present_uri<'a>(&self, peer: &'a PeerIdentity) -> Cow<'a, str> {
        match self.domain.as_ref().filter(|domain| *domain != peer.id().trust_domain()) {
            Some(domain) => format!("{}{}", domain.id(), peer.id().path()).into(),
            None => peer.uri().into(),
        }
    }

    fn limit(&self) -> usize {
        let configured = self.config.max_connections.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
        configured.unwrap_or(DEFAULT_MAX_CONNECTIONS)
    }
}

/// The trust domain that the rules of `config` are about: that of the identity they came with.
pub(crate) fn domain_of(config: &config::Listener) -> Option<TrustDomain> {
    let (own, _) = own_identity(&config.tls.as_ref()?.identity).ok()?;
    Some(own.id().trust_domain().clone())
}

/// What the connections of a listener share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) context: Arc<Context>,
    pub(crate) state: ArcSwap<State>,
    open: Mutex<HashMap<u64, Arc<Live>>>,
    /// Bytes of connections that ended: to the tunnel, to the application. Written under the lock of `open`.
    ended: [AtomicU64; 2],
    next: AtomicU64,
    /// Cancelled when the last connection of a closed listener is gone.
    empty: CancellationToken,
    /// Asks to accept no more.
    closed: CancellationToken,
    /// Cancelled when no more will be accepted.
    stopped: CancellationToken,
}

/// A listener that accepts. Dropping it closes the socket and ends its connections, unless [`Listener::drain`] lets them go on.
#[derive(Debug)]
pub(crate) struct Listener {
    shared: Arc<Shared>,
    place: ThreadPlace,
}

impl Listener {
    /// Starts to accept on `socket`.
    pub(crate) fn start(context: Arc<Context>, socket: std::net::TcpListener, state: State) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        prepare(SockRef::from(&socket))?;
        let shared = Arc::new(Shared {
            context,
            state: ArcSwap::from_pointee(state),
            open: Mutex::default(),
            ended: Default::default(),
            next: AtomicU64::new(0),
            empty: CancellationToken::new(),
            closed: CancellationToken::new(),
            stopped: CancellationToken::new(),
        });
        shared.context.tally.add(&shared);
        let place = shared.context.threads.place();
        let accepting = Arc::clone(&shared);
        let stopped = shared.stopped.clone().drop_guard();
        place.handle.spawn(async move {
            let _stopped = stopped;
            match TcpListener::from_std(socket) {
                Ok(listener) => accepting.accept_until_closed(listener).await,
                Err(error) => warn!(%error, "cannot poll a listening socket"),
            }
        });
        Ok(Self { shared, place })
    }

    pub(crate) fn state(&self) -> Arc<State> {
        self.shared.state.load_full()
    }

    /// Puts `state` in force, for connections to come and for those that are open: who is no longer allowed is ended.
    pub(crate) fn update(&self, state: State) {
        let before = self.shared.state.swap(Arc::new(state));
        let now = self.shared.state.load_full();
        let same = before.config.rbac == now.config.rbac && before.domain == now.domain;
        if same || now.config.direction != Direction::Inbound {
            return;
        }
        // A connection whose peer is not known yet judges itself, by a state it reads after it took this lock.
        let open = self.shared.open.lock();
        for live in open.values() {
            if let Some(peer) = live.identity.get() {
                let (decision, rule) = now.judge(peer, live);
                if !decision.allowed {
                    live.end(Some(RefusalReason::Revoked), rule);
                }
            }
        }
    }

    /// Stops accepting, lets connections go on until `deadline` from now, then ends the rest. Until then they obey
    /// [`Self::update`].
    pub(crate) async fn drain(&self, deadline: Duration) {
        let Shared { closed, stopped, empty, .. } = &*self.shared;
        closed.cancel();
        stopped.cancelled().await;
        if self.is_over() {
            return;
        }
        if tokio::time::timeout(deadline, empty.cancelled()).await.is_err() {
            self.end_all();
            empty.cancelled().await;
        }
    }

    /// It accepts no more, and no connection is left.
    pub(crate) fn is_over(&self) -> bool {
        self.shared.stopped.is_cancelled() && self.shared.open.lock().is_empty()
    }

    /// Ends what is open.
    pub(crate) fn end_all(&self) {
        self.shared.end_all();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.closed.cancel();
        if !self.is_over() {
            // Not drained: its proxy failed, and policy that changes would not be heard of any more.
            let shared = Arc::clone(&self.shared);
            self.place.handle.spawn(async move {
                shared.stopped.cancelled().await;
                shared.end_all();
            });
        }
    }
}

impl Shared {
    fn end_all(&self) {
        for live in self.open.lock().values() {
            live.end(None, "the proxy was stopped".to_owned());
        }
    }

    async fn accept_until_closed(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.closed.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => self.admit(stream, peer),
                Err(error) if gone_before_accept(&error) => debug!(%error, "a connection ended in the backlog"),
                Err(error) => {
                    warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    /// Starts the task of one connection, on the thread with the fewest.
    fn admit(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let Ok(local) = stream.local_addr() else { return };
        let live = Arc::new(Live::new(peer, local));
        let state = self.state.load_full();
        let mut open = self.open.lock();
        if open.len() >= state.limit() {
            drop(open);
            drop(stream); // a reset: refused, not closed
            let refusal = Refusal::new(RefusalReason::Limit, format_args!("{} connections are open", state.limit()));
            return self.story(&live, &state).refuse(refusal);
        }
        let place = self.context.threads.place();
        // Leaves this thread's reactor; the task joins its own.
        let Ok(stream) = stream.into_std() else { return };
        let id = self.next.fetch_add(1, Relaxed);
        let entry = Entry { shared: Arc::clone(self), live: Arc::clone(&live), id };
        let handle = place.handle.clone();
        let task = handle.spawn(async move {
            let (entry, _place) = (entry, place);
            let Ok(stream) = TcpStream::from_std(stream) else { return };
            entry.shared.carry(&entry.live, Connection::accepted(stream)).await;
        });
        let _only_set_here = live.task.set(task.abort_handle());
        open.insert(id, live);
    }

    async fn carry(&self, live: &Live, stream: Connection) {
        match self.state.load().config.direction {
            Direction::Inbound => inbound::carry(self, live, stream).await,
            Direction::Outbound => outbound::carry(self, live, stream).await,
        }
    }

    pub(super) fn story<'a>(&'a self, live: &'a Live, state: &State) -> Story<'a> {
        let inbound = state.config.direction == Direction::Inbound;
        let mut story = Story::new(live, &self.context.events, &self.context.id, inbound);
        let own = state.tls.as_ref().map(|tls| tls.own().id().clone());
        if inbound {
            story.destination = own;
        } else {
            let client = state.destination.as_ref().and_then(|destination| destination.tls.as_ref());
            story.source = client.map(|tls| tls.own().id().clone());
        }
        story
    }

    /// Adds what is carried here.
    pub(super) fn count(&self, traffic: &mut handoff::Traffic) {
        let direction = self.state.load().config.direction;
        let side = tally::side(traffic, direction);
        let open = self.open.lock();
        let [mut to_tunnel, mut to_app] = self.ended.each_ref().map(|bytes| bytes.load(Relaxed));
        let all: Vec<Arc<Live>> = open.values().map(Arc::clone).collect();
        drop(open); // who connects meanwhile does not wait for the sums
        for live in all {
            to_tunnel += live.traffic.to_tunnel.load(Relaxed);
            to_app += live.traffic.to_app.load(Relaxed);
            side.open += u64::from(live.open.load(Relaxed));
        }
        let (to_destination, to_source) = match direction {
            Direction::Inbound => (to_app, to_tunnel),
            Direction::Outbound => (to_tunnel, to_app),
        };
        side.bytes_to_destination += to_destination;
        side.bytes_to_source += to_source;
    }

    /// Notes who the peer is and returns the state to judge it by: one that [`Listener::update`] cannot slip past.
    pub(super) fn identify(&self, live: &Live, peer: PeerIdentity) -> Arc<State> {
        let open = self.open.lock();
        let _only_set_here = live.identity.set(peer);
        drop(open);
        self.state.load_full()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.context.tally.keep(self);
    }
}

/// A place in the registry, given up when the connection's task is gone in whatever way.
struct Entry {
    shared: Arc<Shared>,
    live: Arc<Live>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = self.shared.open.lock();
        open.remove(&self.id);
        let Traffic { to_tunnel, to_app } = &self.live.traffic;
        for (sum, bytes) in self.shared.ended.iter().zip([to_tunnel, to_app]) {
            sum.store(sum.load(Relaxed) + bytes.load(Relaxed), Relaxed);
        }
        if open.is_empty() && self.shared.stopped.is_cancelled() {
            self.shared.empty.cancel();
        }
    }
}

/// Errors of the connection, not of the socket that accepts (accept(2), "Error handling").
fn gone_before_accept(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}
