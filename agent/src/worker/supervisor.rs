//! The task that owns the worker.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use culvert_proxy::handoff::{ProxyStatus, ReceiveError, SendError, ToAgent, ToWorker};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};
use tracing::{debug, error, info, warn};

use crate::report::chain;

use super::backoff::{Failed, next_pause, vacancy};
use super::process::{self, Worker};
use super::sockets::Sockets;
use super::{Command, Surroundings, WorkerSettings, WorkerView};

mod reports;

/// A worker that does not read its control socket for this long is stuck, and replaced.
const STUCK: Duration = Duration::from_secs(5);

/// How often the worker is asked for a sign of life.
const PING_EVERY: Duration = Duration::from_secs(5);
/// A worker that owes so many answers hangs, and is replaced.
const PINGS_OWED: u32 = 3;

/// Pause before a worker is taken over again whose descriptors did not all come: somebody may close some meanwhile.
const TAKE_OVER_PAUSE: Duration = Duration::from_secs(1);

/// Most listeners that are kept for proxies not announced yet: more than a node has workloads.
const MAX_BROUGHT: usize = 4096;

/// Owns the worker, see the module.
pub struct Supervisor {
    settings: WorkerSettings,
    surroundings: Arc<dyn Surroundings>,
    commands: mpsc::Receiver<Command>,
    view: watch::Sender<WorkerView>,
    sockets: Sockets,
    /// Listeners that a re-adopted worker brought, until their proxy is announced again.
    brought: Vec<(String, std::net::SocketAddr, OwnedFd)>,
    /// Proxies that were told to stop because their network namespace was made again, to be served anew.
    replaced: BTreeSet<String>,
    /// Proxies that are being drained.
    stopping: BTreeMap<String, Stopping>,
    /// Proxies that the worker gave up unasked.
    failed: Failed,
    /// Pings that the present worker has not answered.
    owed: u32,
}

/// A proxy that is being drained.
struct Stopping {
    /// Not known of a proxy that an earlier agent served.
    service: Option<String>,
    /// Wait for the end.
    waiting: Vec<oneshot::Sender<()>>,
    /// When the worker should have told of the end long since; `None` for never.
    overdue: Option<Instant>,
}

impl Stopping {
    fn is_overdue(&self) -> bool {
        self.overdue.is_some_and(|overdue| overdue <= Instant::now())
    }

    /// What is left of the time for its connections.
    fn deadline_ms(&self) -> u64 {
        let left = |overdue: Instant| overdue.saturating_duration_since(Instant::now() + STUCK);
        self.overdue.map_or(u64::MAX, |overdue| u64::try_from(left(overdue).as_millis()).unwrap_or(u64::MAX))
    }
}

/// Why the inner loop returned.
enum Ended {
    WorkerGone,
    /// Descriptors that the worker sent got lost. It lives, and tells all again when it is taken over anew.
    Incomplete,
    /// The agent ends and leaves the worker at work.
    Left,
    Shutdown(Duration, oneshot::Sender<()>),
}

impl Supervisor {
    pub(super) fn new(
        settings: WorkerSettings,
        surroundings: Arc<dyn Surroundings>,
        commands: mpsc::Receiver<Command>,
        view: watch::Sender<WorkerView>,
    ) -> Self {
        let (sockets, brought, replaced) = (Sockets::default(), Vec::new(), BTreeSet::new());
        let (stopping, failed) = (BTreeMap::new(), Failed::default());
        Self { settings, surroundings, commands, view, sockets, brought, replaced, stopping, failed, owed: 0 }
    }

    /// Runs until [`super::WorkerHandle::shutdown`], or until every handle is gone.
    pub async fn run(mut self) {
        let mut pause = Duration::ZERO;
        let mut starts: u64 = 0;
        let ControlFlow::Continue(mut next) = self.take_over().await else { return };
        loop {
            let worker = match next.take() {
                Some(worker) => worker,
                None => match self.start() {
                    Ok(worker) => {
                        starts += 1;
                        worker
                    }
                    Err(error) => {
                        error!(%error, "cannot start the worker; mesh connections are refused until it runs");
                        pause = next_pause(pause, Duration::ZERO);
                        if self.wait(pause, false).await.is_break() {
                            return;
                        }
                        continue;
                    }
                },
            };
            // One that was taken over first counts as started.
            starts = starts.max(1);
            let started = Instant::now();
            self.view.send_modify(|view| {
                (view.pid, view.restarts) = (Some(worker.process.pid), starts - 1);
                view.proxies.clear();
            });
            let ended = self.attend(&worker).await;
            self.view.send_modify(|view| (view.pid, view.proxies) = (None, BTreeMap::new()));
            self.surroundings.no_traffic(None);
            match ended {
                Ended::Shutdown(deadline, done) => return self.shut_down(worker, deadline, done).await,
                Ended::Left => return,
                Ended::Incomplete => {
                    drop(worker); // it calls again, as if this were the next agent
                    self.brought.clear(); // it brings them again
                    if self.wait(TAKE_OVER_PAUSE, true).await.is_break() {
                        return;
                    }
                    let ControlFlow::Continue(worker) = self.take_over().await else { return };
                    next = worker;
                    continue;
                }
                Ended::WorkerGone => worker.end().await,
            }
            pause = vacancy(pause, started.elapsed());
            let at_once = starts == 1; // the first end is answered at once: backlogs are waiting
            warn!(?pause, "the worker ended; starting another");
            if !at_once && self.wait(pause, false).await.is_break() {
                return;
            }
        }
    }

    fn start(&mut self) -> std::io::Result<Worker> {
        self.begin();
        Worker::start(&self.settings)
    }

    /// With another worker: what an earlier one drained is gone with it, and dropping its end tells who waits.
    fn begin(&mut self) {
        self.stopping.clear();
        self.replaced.clear();
        self.failed.clear();
        // This one does not hold what an earlier one brought, and would find the addresses taken.
        self.brought.clear();
    }

    /// The worker of an agent before this one, or the one whose descriptors did not all come; takes commands meanwhile.
    async fn take_over(&mut self) -> ControlFlow<(), Option<Worker>> {
        let settings = self.settings.clone();
        let mut adopting = std::pin::pin!(Worker::adopt(&settings));
        loop {
            tokio::select! {
                worker = &mut adopting => return ControlFlow::Continue(worker),
                command = self.commands.recv() => self.without_worker(command, true).await?,
            }
        }
    }

    /// Takes commands while no worker is at the other end; one may live.
    async fn wait(&mut self, pause: Duration, may_live: bool) -> ControlFlow<()> {
        let until = Instant::now() + pause;
        loop {
            tokio::select! {
                () = sleep_until(until) => return ControlFlow::Continue(()),
                command = self.commands.recv() => self.without_worker(command, may_live).await?,
            }
        }
    }

    async fn without_worker(&mut self, command: Option<Command>, may_live: bool) -> ControlFlow<()> {
        match command {
            None => return ControlFlow::Break(()),
            Some(Command::Serve(served)) => self.sockets.serve(served),
            Some(Command::Stop { proxy, deadline, done }) => {
                let service = self.forget(&proxy);
                if may_live {
                    // A worker that is taken over may serve it: it is told then.
                    self.stopping(proxy, service, deadline, done);
                } else {
                    tell(done);
                }
            }
            Some(Command::Shutdown { done, .. }) => {
                process::end_recorded(&self.settings.data_dir).await;
                process::forget(&self.settings.data_dir);
                tell(done);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    /// Serves one worker until it is gone or shall go.
    async fn attend(&mut self, worker: &Worker) -> Ended {
        let Ok(()) = self.greet(worker).await else { return Ended::WorkerGone };
        self.owed = 0;
        let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let result = tokio::select! {
                _ = pings.tick() => self.ping(worker).await,
                proxy = self.failed.due() => self.serve_anew(worker, &proxy).await,
                command = self.commands.recv() => match command {
                    None => return Ended::Left,
                    Some(Command::Shutdown { deadline, done }) => return Ended::Shutdown(deadline, done),
                    Some(Command::Serve(served)) => self.serve(worker, served).await,
                    Some(Command::Stop { proxy, deadline, done }) => self.stop(worker, proxy, deadline, done).await,
                },
                received = worker.control.recv::<ToAgent>() => match received {
                    Ok(Some((message, descriptors))) => self.answer(worker, message, descriptors).await,
                    Ok(None) => return Ended::WorkerGone,
                    // One of another version may say what this agent does not know. That is no reason to end its connections.
                    Err(ReceiveError::Parse(error)) => {
                        warn!(%error, "the worker said what is not understood; left out");
                        Ok(())
                    }
                    Err(error @ ReceiveError::DescriptorsLost) => {
                        error!(%error, pid = worker.process.pid, "a listener of the worker was lost; taking it over again");
                        return Ended::Incomplete;
                    }
                    Err(error) => {
                        warn!(%error, "the worker sent what is not understood; replacing it");
                        return Ended::WorkerGone;
                    }
                },
            };
            if result.is_err() {
                return Ended::WorkerGone;
            }
        }
    }

    /// Tells a worker all that it shall serve, and one that was taken over what it shall not.
    async fn greet(&mut self, worker: &Worker) -> Result<(), ()> {
        let now = |served: &&super::Served| !self.served_later(&served.proxy);
        let serve = self.sockets.all().filter(now).map(|served| self.serve_message(served));
        // That it has stopped, or that it shall, may have been lost.
        let drained = self.stopping.iter().map(|(proxy, stopping)| (proxy.clone(), stopping.deadline_ms()));
        let replaced = self.replaced.iter().map(|proxy| (proxy.clone(), 0));
        let stop = drained.chain(replaced).map(|(proxy, deadline_ms)| ToWorker::Stop { proxy, deadline_ms });
        for message in serve.chain(stop).collect::<Vec<_>>() {
            self.send(worker, &message, &[]).await?;
        }
        Ok(())
    }

    async fn ping(&mut self, worker: &Worker) -> Result<(), ()> {
        if self.owed == PINGS_OWED {
            error!(pid = worker.process.pid, "the worker gives no sign of life; replacing it");
            return Err(());
        }
        self.owed += 1;
        // Of what a worker should have told of long since, it says nothing any more.
        let overdue = |(proxy, stopping): (&String, &Stopping)| {
            (stopping.is_overdue() && self.sockets.get(proxy).is_some()).then(|| proxy.clone())
        };
        for proxy in self.stopping.iter().filter_map(overdue).collect::<Vec<_>>() {
            self.stopping.remove(&proxy);
            self.serve_anew(worker, &proxy).await?;
        }
        self.send(worker, &ToWorker::Ping, &[]).await
    }

    fn serve_message(&self, served: &super::Served) -> ToWorker {
        ToWorker::Serve {
            proxy: served.proxy.clone(),
            cluster: served.service.clone(),
            node: self.settings.node.clone(),
            token: None,
        }
    }

    /// It is served again once it has stopped, or its pause is over.
    fn served_later(&self, proxy: &str) -> bool {
        let drained = self.stopping.get(proxy).is_some_and(|stopping| !stopping.is_overdue());
        drained || self.replaced.contains(proxy) || self.failed.waits(proxy)
    }

    async fn serve(&mut self, worker: &Worker, served: super::Served) -> Result<(), ()> {
        let message = self.serve_message(&served);
        let proxy = served.proxy.clone();
        self.sockets.serve(served);
        let (mine, others) = std::mem::take(&mut self.brought).into_iter().partition(|(owner, ..)| *owner == proxy);
        self.brought = others;
        for (_, address, listener) in Vec::from_iter::<Vec<_>>(mine) {
            self.adopt(worker, &proxy, address, listener).await?;
        }
        if self.replaced.contains(&proxy) || self.failed.waits(&proxy) {
            return Ok(()); // later, see there
        }
        if let Some(stopping) = self.stopping.get(&proxy) {
            // The worker would refuse it before it has stopped.
            self.view.send_modify(|view| drop(view.proxies.remove(&proxy)));
            if !stopping.is_overdue() {
                return Ok(());
            }
            self.stopping.remove(&proxy);
        }
        self.send(worker, &message, &[]).await
    }

    /// Takes over a listener that the worker holds. One of a network namespace that is gone ends its proxy, which is then served
    /// anew: the worker's other sockets are from there too.
    async fn adopt(
        &mut self,
        worker: &Worker,
        proxy: &str,
        address: std::net::SocketAddr,
        listener: OwnedFd,
    ) -> Result<(), ()> {
        if self.replaced.contains(proxy) {
            return Ok(());
        }
        if self.sockets.is_at_home(proxy, &listener).await {
            self.announce(proxy, address, listener.as_fd());
            self.sockets.adopt(proxy, address, listener);
            return Ok(());
        }
        info!(proxy, "its network namespace was made again; serving it anew");
        self.replaced.insert(proxy.to_owned());
        self.view.send_modify(|view| drop(view.proxies.remove(proxy)));
        self.send(worker, &ToWorker::Stop { proxy: proxy.to_owned(), deadline_ms: 0 }, &[]).await
    }

    async fn stop(
        &mut self,
        worker: &Worker,
        proxy: String,
        deadline: Duration,
        done: oneshot::Sender<()>,
    ) -> Result<(), ()> {
        let brought = self.brought.iter().any(|(owner, ..)| *owner == proxy);
        let rests = self.failed.waits(&proxy);
        let service = self.forget(&proxy);
        // One that was taken over may not have said yet what it serves.
        let unknown = service.is_none() && !brought && !worker.was_adopted();
        if !self.stopping.contains_key(&proxy) && (rests || unknown) {
            self.view.send_modify(|view| drop(view.proxies.remove(&proxy)));
            tell(done);
            return Ok(());
        }
        if !self.stopping(proxy.clone(), service, deadline, done) {
            return Ok(());
        }
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        self.send(worker, &ToWorker::Stop { proxy, deadline_ms }, &[]).await
    }

    /// `proxy` is not wanted any more; returns whose it was.
    fn forget(&mut self, proxy: &str) -> Option<String> {
        self.brought.retain(|(owner, ..)| owner != proxy);
        let service = self.sockets.get(proxy).map(|served| served.service.clone());
        self.sockets.remove(proxy);
        self.failed.forget(proxy);
        self.view.send_modify(|view| _ = view.proxy_failures.remove(proxy));
        service
    }

    /// Notes that `proxy` is being drained and who waits for its end; false if it was before.
    fn stopping(
        &mut self,
        proxy: String,
        service: Option<String>,
        deadline: Duration,
        done: oneshot::Sender<()>,
    ) -> bool {
        match self.stopping.entry(proxy) {
            Entry::Occupied(mut known) => {
                known.get_mut().waiting.push(done);
                false
            }
            Entry::Vacant(new) => {
                let overdue = Instant::now().checked_add(deadline).and_then(|end| end.checked_add(STUCK));
                new.insert(Stopping { service, waiting: vec![done], overdue });
                true
            }
        }
    }

    async fn answer(&mut self, worker: &Worker, message: ToAgent, mut descriptors: Vec<OwnedFd>) -> Result<(), ()> {
        match message {
            ToAgent::Hello { pid, version } => {
                debug!(pid, version, "the worker says hello");
                Ok(())
            }
            ToAgent::Adopt { proxy, address } => {
                let Some(listener) = descriptors.pop() else { return Ok(()) };
                if self.sockets.get(&proxy).is_some() {
                    return self.adopt(worker, &proxy, address, listener).await;
                }
                if self.brought.len() < MAX_BROUGHT {
                    self.brought.push((proxy, address, listener));
                }
                Ok(())
            }
            ToAgent::OpenListener { request, proxy, address } => self.open(worker, request, &proxy, address).await,
            ToAgent::MoreAppSockets { proxy, family, count } => {
                let made = self.sockets.app_sockets(&proxy, family, count).await;
                let (made, error) = match made {
                    Ok(made) => (made, None),
                    Err(refused) => (Vec::new(), Some(chain(&refused))),
                };
                let count = u16::try_from(made.len()).unwrap_or(u16::MAX);
                let made: Vec<BorrowedFd<'_>> = made.iter().map(OwnedFd::as_fd).collect();
                self.send(worker, &ToWorker::AppSockets { proxy, family, count, error }, &made).await
            }
            ToAgent::ConnectXds { request } => self.connect_xds(worker, request).await,
            ToAgent::Event(_) | ToAgent::Events(_) | ToAgent::EventsLost { .. } => {
                self.hear(message);
                Ok(())
            }
            ToAgent::Status(status) => {
                self.status(status);
                Ok(())
            }
            ToAgent::Pong => {
                self.owed = 0;
                Ok(())
            }
            ToAgent::Traffic { proxy, traffic } => {
                if let Some(service) = self.service_of(&proxy) {
                    self.surroundings.traffic(&proxy, service, &traffic);
                }
                Ok(())
            }
            ToAgent::Stopped { proxy } => {
                // A listener that nobody asks for any more would keep its network namespace.
                self.brought.retain(|(owner, ..)| *owner != proxy);
                self.surroundings.no_traffic(Some(&proxy));
                self.stopped(worker, &proxy).await
            }
        }
    }

    /// The worker does not serve `proxy` any more. If it shall, it is told so again.
    async fn stopped(&mut self, worker: &Worker, proxy: &str) -> Result<(), ()> {
        let stopping = self.stopping.remove(proxy);
        let asked = self.replaced.remove(proxy) || stopping.is_some();
        self.view.send_modify(|view| drop(view.proxies.remove(proxy)));
        stopping.into_iter().flat_map(|stopping| stopping.waiting).for_each(tell);
        if asked {
            return self.serve_anew(worker, proxy).await;
        }
        if self.sockets.get(proxy).is_some() {
            let pause = self.failed.note(proxy);
            error!(proxy, ?pause, "the worker gave up a proxy that it shall serve; it is told again after a pause");
            self.view.send_modify(|view| {
                *view.proxy_failures.entry(proxy.to_owned()).or_default() += 1;
                let status = ProxyStatus { proxy: proxy.to_owned(), ..ProxyStatus::default() };
                view.proxies.insert(proxy.to_owned(), status);
            });
        }
        Ok(())
    }

    /// Has the worker serve a proxy that it does not serve any more, if it is still wanted.
    async fn serve_anew(&mut self, worker: &Worker, proxy: &str) -> Result<(), ()> {
        match self.sockets.get(proxy).map(|served| self.serve_message(served)) {
            Some(message) => self.send(worker, &message, &[]).await,
            None => Ok(()),
        }
    }

    async fn open(
        &mut self,
        worker: &Worker,
        request: u64,
        proxy: &str,
        address: std::net::SocketAddr,
    ) -> Result<(), ()> {
        match self.sockets.listener(proxy, address).await {
            Ok(listener) => {
                self.announce(proxy, address, listener.as_fd());
                self.send(worker, &ToWorker::Listener { request, result: Ok(()) }, &[listener.as_fd()]).await
            }
            Err(refused) => {
                let reason = chain(&refused);
                warn!(proxy, %address, reason, "the worker does not get a listener");
                self.send(worker, &ToWorker::Listener { request, result: Err(reason) }, &[]).await
            }
        }
    }

    /// Tells the kernel side of an inbound listener.
    fn announce(&self, proxy: &str, address: std::net::SocketAddr, listener: BorrowedFd<'_>) {
        if self.sockets.get(proxy).is_some_and(|served| served.inbound_port == address.port()) {
            self.surroundings.inbound_listener(proxy, address.port(), listener);
        }
    }

    async fn connect_xds(&self, worker: &Worker, request: u64) -> Result<(), ()> {
        match UnixStream::pair() {
            Ok((ours, theirs)) => {
                self.surroundings.connect_xds(ours);
                self.send(worker, &ToWorker::XdsConnection { request, result: Ok(()) }, &[theirs.as_fd()]).await
            }
            Err(error) => {
                self.send(worker, &ToWorker::XdsConnection { request, result: Err(error.to_string()) }, &[]).await
            }
        }
    }

    async fn send(&self, worker: &Worker, message: &ToWorker, descriptors: &[BorrowedFd<'_>]) -> Result<(), ()> {
        match timeout(STUCK, worker.control.send(message, descriptors)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(SendError::Socket(error))) => {
                debug!(%error, "the worker is gone");
                Err(())
            }
            Ok(Err(error)) => {
                error!(%error, "a message to the worker was not sent");
                Ok(())
            }
            Err(_) => {
                error!(pid = worker.process.pid, "the worker does not read its control socket; replacing it");
                Err(())
            }
        }
    }

    /// Hears a worker that drains to its end.
    async fn drained(&self, worker: &Worker) {
        loop {
            match worker.control.recv::<ToAgent>().await {
                Ok(Some((message, _))) => self.hear(message),
                Ok(None) | Err(ReceiveError::Socket(_)) => return,
                // What one of another version says is no reason to cut its connections off.
                Err(error) => debug!(%error, "the worker said what is not understood; left out"),
            }
        }
    }

    async fn shut_down(&mut self, worker: Worker, deadline: Duration, done: oneshot::Sender<()>) {
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let told = self.send(&worker, &ToWorker::Drain { deadline_ms }, &[]).await;
        if told.is_ok() && timeout(deadline, self.drained(&worker)).await.is_err() {
            info!("the worker did not drain in time");
        }
        worker.end().await;
        process::forget(&self.settings.data_dir);
        tell(done);
    }
}

/// Tells whoever waits; nobody may wait any more.
fn tell(done: oneshot::Sender<()>) {
    if done.send(()).is_err() {
        debug!("nobody waits for the proxy to be gone");
    }
}

#[cfg(test)]
mod tests;
