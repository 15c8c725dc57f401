//! The node's worker: many proxies in one process without privilege, fed by the agent over the control socket.
//!
//! It outlives its agent. When the control socket ends, connections and listeners go on with the last configuration, and the
//! worker calls at [`ADOPTION_SOCKET`] until an agent of the same user as the first answers or its last
//! certificate has expired, when nobody could open a connection any more; then it drains and exits.
//!
//! A panic in one connection's task ends that connection (its sockets are reset as they are dropped) and nothing else.

mod link;
mod pool;
mod privilege;
mod proxies;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use pool::{APP_SOCKET_WAIT, BATCH, LOW_WATER};
pub use privilege::{NOBODY, PrivilegeError, drop_all};
pub use proxies::TRAFFIC_INTERVAL;

use crate::events::{EventReader, Events};
use crate::handoff::{
    ADOPTION_SOCKET, ControlSocket, EventRecord, MAX_MESSAGE, ReceiveError, SendError, ToAgent, ToWorker,
};
use crate::metrics::Metrics;
use crate::threads::{DataThreads, Placement};
use crate::tls;
use link::Link;
pub(crate) use privilege::raise_descriptor_limit;
use proxies::Proxies;

/// How long a worker looks for another agent at least, whatever its certificates say.
pub const ORPHAN_LIFE: Duration = Duration::from_secs(60);
/// How long at most.
pub const MAX_ORPHAN_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Pause between two calls, while an agent that is being replaced should be back any moment; an agent gives up after 3 s.
const CALL_PAUSE: Duration = Duration::from_millis(100);
/// Pause between two calls later on.
const LATE_CALL_PAUSE: Duration = Duration::from_secs(1);
/// How long connections may go on when no agent was found, and when an agent did not name a proxy again.
const ORPHAN_DRAIN: Duration = Duration::from_secs(30);
/// Within this time after it took over, an agent has to name every proxy that shall stay.
const RENAMING: Duration = Duration::from_secs(60);
/// After events were sent, those that follow wait for each other this long: to wake the agent costs more than to tell it of one.
const EVENT_REST: Duration = Duration::from_millis(10);
/// What a message takes around its events, in bytes.
const MESSAGE_FRAME: usize = 64;
/// Longest wait for the last events to be read, after everything was drained.
const FAREWELL: Duration = Duration::from_secs(1);

/// Runs the worker on this end of a control socket. Call it first in `main`: it gives up all privileges, which has to happen
/// before a second thread exists. Returns when the worker was drained.
///
/// # Errors
/// Privileges could not be dropped, or threads, descriptors and the socket are not as they should be.
pub fn run(control_socket: OwnedFd) -> anyhow::Result<()> {
    run_calling(control_socket, ADOPTION_SOCKET)
}

/// [`run`], but a worker without an agent calls at the abstract socket `adoption`.
///
/// # Errors
/// As [`run`].
pub fn run_calling(control_socket: OwnedFd, adoption: &str) -> anyhow::Result<()> {
    drop_all().context("the worker refuses to run with privileges")?;
    let descriptors = raise_descriptor_limit().context("raise the limit of open descriptors")?;
    let threads = DataThreads::per_processor().context("start data threads")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    info!(pid = std::process::id(), ?descriptors, "worker starts");
    runtime.block_on(async {
        let control = ControlSocket::new(control_socket).context("control socket")?;
        Worker::new(threads.placement()).live(control, adoption).await;
        Ok(())
    })
}

/// How an agent's time ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    /// It is gone.
    Gone,
    /// All was drained at its order.
    Drained,
}

struct Worker {
    link: Arc<Link>,
    proxies: Proxies,
    outbox: Outbox,
}

impl Worker {
    fn new(threads: Arc<Placement>) -> Self {
        let (link, messages) = Link::new();
        let (events, reader) = Events::new(Arc::new(Metrics::default()));
        let proxies = Proxies::new(Arc::clone(&link), threads, events);
        Self { link, proxies, outbox: Outbox { messages, events: reader, over: None, unsent: None, lost: 0 } }
    }

    /// Serves one agent after the other, until drained.
    async fn live(mut self, first: ControlSocket, adoption: &str) {
        let owner = match first.peer() {
            Ok(peer) => peer.uid,
            Err(error) => return error!(%error, "who started this worker is not known"),
        };
        let mut agent = first;
        let mut introduction = Vec::new();
        loop {
            introduction.insert(0, (hello(), None));
            let end = self.attend(&agent, introduction).await;
            self.link.disconnected();
            if end == End::Drained || self.proxies.drained() {
                return info!("drained");
            }
            warn!("the agent is gone; serving on with the last configuration");
            let life = orphan_life(self.proxies.last_certificate(), tls::now().as_secs());
            let Some(next) = find_agent(adoption, owner, life).await else {
                error!("no agent within {life:?}; draining");
                return self.proxies.drain_all(ORPHAN_DRAIN).await;
            };
            info!("an agent took over");
            agent = next;
            self.proxies.bury();
            introduction = self.proxies.introduction();
            self.proxies.unname();
        }
    }

    /// Serves one agent while it is there. Sending and receiving never wait for each other: two ends that both only send would
    /// wait for ever.
    async fn attend(&mut self, agent: &ControlSocket, introduction: Vec<Parcel>) -> End {
        let Self { link, proxies, outbox } = self;
        // What was meant for the agent before. This one does not know the proxies yet, and would refuse them sockets.
        while outbox.messages.try_recv().is_ok() {}
        let finish = CancellationToken::new();
        let mut sending = std::pin::pin!(outbox.send_all(agent, introduction, finish.clone()));
        link.connected();
        proxies.retry();
        let end = tokio::select! {
            end = obey(agent, link, proxies) => end,
            _ = &mut sending => End::Gone,
        };
        if end == End::Drained {
            finish.cancel();
            let _agent_may_be_gone = timeout(FAREWELL, sending).await;
        }
        end
    }
}

fn hello() -> ToAgent {
    ToAgent::Hello { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() }
}

/// How long a worker goes on without an agent whose last certificate ends at `last`, in seconds since 1970.
fn orphan_life(last: Option<u64>, now: u64) -> Duration {
    let left = Duration::from_secs(last.unwrap_or_default().saturating_sub(now));
    left.clamp(ORPHAN_LIFE, MAX_ORPHAN_LIFE)
}

/// Calls until an agent of user `owner` answers, for `life`.
async fn find_agent(adoption: &str, owner: u32, life: Duration) -> Option<ControlSocket> {
    let start = Instant::now();
    while start.elapsed() < life {
        match ControlSocket::call(adoption).and_then(|agent| Ok((agent.peer()?.uid, agent))) {
            // Anybody may bind an abstract name. The worker's own user is no better than others: sandboxed tasks share it.
            Ok((uid, agent)) if uid == owner => return Some(agent),
            Ok((uid, _)) => warn!(uid, "a process that is not an agent answers in its place; not followed"),
            Err(_) => {}
        }
        sleep(if start.elapsed() < ORPHAN_LIFE { CALL_PAUSE } else { LATE_CALL_PAUSE }).await;
    }
    None
}

/// Does what the agent says, until it is gone or everything is drained.
async fn obey(agent: &ControlSocket, link: &Link, proxies: &mut Proxies) -> End {
    let renamed_by = Instant::now() + RENAMING;
    loop {
        if proxies.drained() {
            return End::Drained;
        }
        tokio::select! {
            message = agent.recv_parts::<ToWorker>() => match message {
                Ok(Some((message, descriptors))) => handle(message, descriptors, link, proxies),
                Ok(None) => return End::Gone,
                Err(ReceiveError::Socket(error)) => {
                    warn!(%error, "control socket");
                    return End::Gone;
                }
                Err(error) => {
                    error!(%error, "the agent sent what is not understood");
                    if matches!(error, ReceiveError::Truncated) {
                        link.missed(&error.to_string());
                    }
                }
            },
            Some((proxy, traffic)) = proxies.next_gone() => {
                link.tell(ToAgent::Traffic { proxy: proxy.clone(), traffic }).await;
                link.tell(ToAgent::Stopped { proxy }).await;
            }
            () = sleep_until(renamed_by), if proxies.any_unnamed() => proxies.stop_unnamed(ORPHAN_DRAIN),
        }
    }
}

fn handle(message: ToWorker, descriptors: Result<Vec<OwnedFd>, ReceiveError>, link: &Link, proxies: &mut Proxies) {
    // What came of them when some are missing is of no use: who asked is refused, and nobody else.
    let (mut descriptors, missing) = match descriptors {
        Ok(descriptors) => (descriptors, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    if let Some(missing) = &missing {
        error!(error = missing, "a message of the agent's came without its descriptors");
    }
    match message {
        ToWorker::Serve { proxy, cluster, node, token } => proxies.serve(&proxy, &cluster, &node, token),
        ToWorker::Stop { proxy, deadline_ms } => proxies.stop(&proxy, Duration::from_millis(deadline_ms)),
        ToWorker::Ping => proxies.pong(),
        ToWorker::Drain { deadline_ms } => proxies.start_drain(Duration::from_millis(deadline_ms)),
        ToWorker::Listener { request, result } | ToWorker::XdsConnection { request, result } => {
            link.answered(request, missing.map_or(result, Err), descriptors.pop());
        }
        ToWorker::AppSockets { proxy, family, error, .. } => {
            if let Some(error) = &error {
                warn!(proxy, error, "the agent cannot make sockets");
            }
            let pool = link.pools.lock().get(&proxy).cloned();
            if let Some(pool) = pool {
                pool.fill(family, descriptors, missing.or(error));
            }
        }
    }
}

/// A message, with the descriptor that goes with it.
type Parcel = (ToAgent, Option<OwnedFd>);

/// What waits to be sent to the agent.
struct Outbox {
    messages: mpsc::Receiver<ToAgent>,
    events: EventReader,
    /// An event that the last message had no room for.
    over: Option<EventRecord>,
    /// Events on their way. If their agent ends before it has them, the next one gets them.
    unsent: Option<ToAgent>,
    /// How many events were lost that no agent knows of yet.
    lost: u64,
}

impl Outbox {
    /// Sends until the agent is gone; after `finish` until nothing waits any more. Messages go first, events when none waits.
    async fn send_all(
        &mut self,
        agent: &ControlSocket,
        introduction: Vec<Parcel>,
        finish: CancellationToken,
    ) -> Result<(), Gone> {
        for (message, descriptor) in introduction {
            let descriptors: Vec<BorrowedFd<'_>> = descriptor.iter().map(AsFd::as_fd).collect();
            send(agent, &message, &descriptors).await?;
        }
        let mut rest_until = Instant::now();
        loop {
            self.send_events(agent).await?;
            let Self { messages, events, over, .. } = self;
            let event = async {
                if let Some(over) = over.take() {
                    return Some(over);
                }
                let _in_a_hurry = timeout_at(rest_until, finish.cancelled()).await;
                events.next().await.map(|event| EventRecord::from(&event))
            };
            tokio::select! {
                biased;
                Some(message) = messages.recv() => send(agent, &message, &[]).await?,
                Some(first) = event => {
                    self.unsent = Some(self.batch(first));
                    if self.over.is_none() {
                        rest_until = Instant::now() + EVENT_REST;
                    }
                }
                () = finish.cancelled() => return Ok(()),
            }
        }
    }

    /// Sends the events on their way, and the number of those lost. Forgets neither before that has succeeded: this future may be
    /// dropped at any time.
    async fn send_events(&mut self, agent: &ControlSocket) -> Result<(), Gone> {
        if let Some(events) = &self.unsent {
            send(agent, events, &[]).await?;
            self.unsent = None;
        }
        self.lost += self.events.take_lost();
        if self.lost > 0 {
            send(agent, &ToAgent::EventsLost { count: self.lost }, &[]).await?;
            self.lost = 0;
        }
        Ok(())
    }

    /// `first`, and as many as wait behind it and fit the same message.
    fn batch(&mut self, first: EventRecord) -> ToAgent {
        let mut room = MAX_MESSAGE.saturating_sub(MESSAGE_FRAME + first.room());
        let mut batch = vec![first];
        while let Some(event) = self.events.try_next() {
            let record = EventRecord::from(&event);
            match room.checked_sub(record.room()) {
                Some(left) => room = left,
                None => {
                    self.over = Some(record);
                    break;
                }
            }
            batch.push(record);
        }
        ToAgent::Events(batch)
    }
}

/// The agent is gone.
#[derive(Debug)]
struct Gone;

async fn send(agent: &ControlSocket, message: &ToAgent, descriptors: &[BorrowedFd<'_>]) -> Result<(), Gone> {
    match agent.send(message, descriptors).await {
        Ok(()) => Ok(()),
        Err(SendError::Socket(_)) => Err(Gone),
        Err(error) => {
            error!(%error, "a message to the agent was not sent");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
