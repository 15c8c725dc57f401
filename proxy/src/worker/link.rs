//! What the parts of a worker share to talk to the agent: requests with answers, and whether there is an agent at all.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::pool::Pool;
use crate::handoff::{Family, ToAgent};
use crate::xds::{Dial, Transport};

/// Messages that may wait to be sent.
const OUTGOING: usize = 1024;
/// Longest wait for an answer of the agent.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    outgoing: mpsc::Sender<ToAgent>,
    /// Since when there is no agent.
    away_since: Mutex<Option<Instant>>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<io::Result<OwnedFd>>>>,
    pub(super) pools: Mutex<BTreeMap<String, Arc<Pool>>>,
    /// A second handle of the stream to the agent's control plane: it ends with the agent, whoever else holds its other end.
    line: Mutex<Option<UnixStream>>,
    /// Copies of the listening sockets in use, for the next agent.
    pub(super) held: Mutex<BTreeMap<(String, SocketAddr), TcpListener>>,
}

impl Link {
    pub(super) fn new() -> (Arc<Self>, mpsc::Receiver<ToAgent>) {
        let (outgoing, to_send) = mpsc::channel(OUTGOING);
        let link = Self {
            outgoing,
            away_since: Mutex::new(Some(Instant::now())),
            next: AtomicU64::new(1),
            waiting: Mutex::default(),
            pools: Mutex::default(),
            line: Mutex::default(),
            held: Mutex::default(),
        };
        (Arc::new(link), to_send)
    }

    /// There is an agent from now on.
    pub(super) fn connected(&self) {
        *self.away_since.lock() = None;
    }

    pub(super) fn is_connected(&self) -> bool {
        self.away_since.lock().is_none()
    }

    /// How long there has been no agent.
    pub(super) fn away_for(&self) -> Duration {
        self.away_since.lock().map(|since| since.elapsed()).unwrap_or_default()
    }

    /// The agent is gone: nobody will answer what is still open.
    pub(super) fn disconnected(&self) {
        *self.away_since.lock() = Some(Instant::now());
        for (_, waiting) in self.waiting.lock().drain() {
            let _asker_may_be_gone = waiting.send(Err(away()));
        }
        if let Some(line) = self.line.lock().take() {
            let _may_have_ended = line.shutdown(std::net::Shutdown::Both);
        }
        for pool in self.pools.lock().values() {
            pool.set_away(true);
        }
    }

    /// A message of the agent's came without its end: it may have been what a pool waits for, and would never ask for again.
    pub(super) fn missed(&self, reason: &str) {
        for pool in self.pools.lock().values() {
            pool.missed(reason);
        }
    }

    /// Sends a message that needs no answer; waits while too many others wait.
    pub(super) async fn tell(&self, message: ToAgent) {
        let _ends_with_the_worker = self.outgoing.send(message).await;
    }

    /// Asks for sockets without waiting for them.
    pub(super) fn ask_app_sockets(&self, proxy: &str, family: Family, count: u16) -> io::Result<()> {
        if !self.is_connected() {
            return Err(away());
        }
        let message = ToAgent::MoreAppSockets { proxy: proxy.to_owned(), family, count };
        self.outgoing.try_send(message).map_err(|_| io::Error::other("too many requests to the agent are waiting"))
    }

    /// Asks for a descriptor and waits for it.
    pub(super) async fn request(&self, message: impl FnOnce(u64) -> ToAgent) -> io::Result<OwnedFd> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.waiting.lock().insert(number, answer);
        let _forget = Forget { link: self, number };
        if !self.is_connected() {
            return Err(away());
        }
        let asked = self.outgoing.try_send(message(number));
        asked.map_err(|_| io::Error::other("too many requests to the agent are waiting"))?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(away()),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer of the agent in time")),
        }
    }

    /// Hands an answer to who asked.
    pub(super) fn answered(&self, number: u64, result: Result<(), String>, descriptor: Option<OwnedFd>) {
        let Some(waiting) = self.waiting.lock().remove(&number) else { return };
        let answer = match (result, descriptor) {
            (Ok(()), Some(descriptor)) => Ok(descriptor),
            (Ok(()), None) => Err(io::Error::other("answer without a descriptor")),
            (Err(reason), _) => Err(io::Error::other(reason)),
        };
        let _asker_may_be_gone = waiting.send(answer);
    }
}

fn away() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the agent is away")
}

/// Removes a request nobody waits for any more.
struct Forget<'a> {
    link: &'a Link,
    number: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.link.waiting.lock().remove(&self.number);
    }
}

/// Connects to the control plane by asking the agent.
pub(super) struct AgentDial(pub(super) Arc<Link>);

impl Dial for AgentDial {
    fn dial(&self) -> BoxFuture<'static, io::Result<Box<dyn Transport>>> {
        let link = Arc::clone(&self.0);
        async move {
            let stream = link.request(|request| ToAgent::ConnectXds { request }).await?;
            let stream = UnixStream::from(stream);
            stream.set_nonblocking(true)?;
            let second = stream.try_clone()?;
            *link.line.lock() = Some(second);
            Ok(Box::new(tokio::net::UnixStream::from_std(stream)?) as Box<dyn Transport>)
        }
        .boxed()
    }
}
