//! The agent's side of the control socket, and a control plane, as far as the worker can tell.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use culvert_proxy::handoff::{
    AdoptionListener, ControlSocket, EventRecord, Family, ProxyStatus, ToAgent, ToWorker, Traffic,
};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use parking_lot::Mutex;
use prost::Name;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::fake::{Fake, FakeStream, eventually, soon};
use crate::resources::{
    any, assignment, eds_cluster, endpoint, outbound, public_listener, resource, response, static_cluster,
};

pub(crate) const PROXY: &str = "api-sidecar-proxy";

/// What the test wants of one node. The service `api` calls itself.
pub(crate) struct Setup {
    name: String,
    app: SocketAddr,
    public: SocketAddr,
    upstream: SocketAddr,
    pub(crate) refuse_app_sockets: bool,
}

impl Setup {
    pub(crate) fn new(name: &str, app: SocketAddr) -> Self {
        let free = || std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
        let name = format!("culvert/test/{name}/{}", std::process::id());
        Self { name, app, public: free(), upstream: free(), refuse_app_sockets: false }
    }
}

#[derive(Default)]
struct Seen {
    events: Vec<EventRecord>,
    status: Option<ProxyStatus>,
    traffic: Traffic,
    stopped: Vec<String>,
    pongs: usize,
    adopted: usize,
    /// Listening sockets outlive a worker, by address.
    listeners: Vec<(SocketAddr, Arc<OwnedFd>)>,
}

/// An agent with its worker.
pub(crate) struct Agent {
    setup: Arc<Setup>,
    worker: Option<Child>,
    pid: u32,
    control: Arc<ControlSocket>,
    seen: Arc<Mutex<Seen>>,
    allowed: watch::Sender<Vec<String>>,
    tasks: Vec<tokio::task::AbortHandle>,
}

/// A worker without an agent.
pub(crate) struct Orphan {
    setup: Arc<Setup>,
    worker: Option<Child>,
    pid: u32,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::AbortHandle::abort);
        end(self.worker.take());
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        end(self.worker.take());
    }
}

fn end(worker: Option<Child>) {
    if let Some(mut worker) = worker {
        let _may_have_ended = worker.kill();
        let _reaped = worker.wait();
    }
}

fn spawn(setup: &Setup) -> (ControlSocket, Child) {
    let (control, for_worker) = ControlSocket::pair().expect("socketpair");
    let worker = Command::new(env!("CARGO_BIN_EXE_culvert-proxy"))
        .args(["worker", &setup.name])
        .env("RUST_LOG", "info")
        .stdin(Stdio::from(for_worker))
        .spawn()
        .expect("the worker starts");
    (control, worker)
}

impl Agent {
    pub(crate) async fn start(setup: Setup) -> Self {
        let (control, worker) = spawn(&setup);
        Self::attend(Arc::new(setup), control, Some(worker), Seen::default()).await
    }

    /// Serves the worker and waits until it is ready.
    async fn attend(setup: Arc<Setup>, control: ControlSocket, worker: Option<Child>, seen: Seen) -> Self {
        let (control, seen) = (Arc::new(control), Arc::new(Mutex::new(seen)));
        let allowed = watch::Sender::new(vec!["api".to_owned()]);
        let (server_ends, incoming) = mpsc::channel(16);
        let mut streams = Fake::serve(ReceiverStream::new(incoming));
        let (plane_setup, plane_allowed) = (Arc::clone(&setup), allowed.clone());
        let plane = tokio::spawn(async move {
            while let Some(stream) = streams.recv().await {
                tokio::spawn(control_plane(stream, Arc::clone(&plane_setup), plane_allowed.subscribe()));
            }
        });
        let answering = tokio::spawn(answer(Arc::clone(&control), Arc::clone(&setup), Arc::clone(&seen), server_ends));
        let pid = worker.as_ref().map_or(0, Child::id);
        let tasks = vec![plane.abort_handle(), answering.abort_handle()];
        let agent = Self { setup, worker, pid, control, seen, allowed, tasks };
        agent.serve().await;
        agent.wait_ready().await;
        agent
    }

    async fn tell(&self, message: ToWorker) {
        self.control.send(&message, &[]).await.expect("the worker listens");
    }

    pub(crate) async fn serve(&self) {
        self.seen.lock().stopped.clear();
        self.seen.lock().status = None;
        let (proxy, cluster, node) = (PROXY.to_owned(), "api".to_owned(), "here".to_owned());
        self.tell(ToWorker::Serve { proxy, cluster, node, token: None }).await;
    }

    pub(crate) async fn wait_ready(&self) {
        eventually("the proxy is ready", || self.seen.lock().status.as_ref().is_some_and(|status| status.ready)).await;
    }

    pub(crate) async fn stop_proxy(&self, deadline: Duration) {
        let deadline_ms = u64::try_from(deadline.as_millis()).expect("short");
        self.tell(ToWorker::Stop { proxy: PROXY.to_owned(), deadline_ms }).await;
    }

    pub(crate) async fn drain(&self, deadline: Duration) {
        self.tell(ToWorker::Drain { deadline_ms: u64::try_from(deadline.as_millis()).expect("short") }).await;
    }

    /// Lets these services in, and nobody else, from now on.
    pub(crate) async fn allow(&self, services: &[&str]) {
        self.allowed.send_replace(services.iter().map(|service| (*service).to_owned()).collect());
    }

    pub(crate) fn upstream(&self) -> SocketAddr {
        self.setup.upstream
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn count(&self, wanted: impl Fn(&EventRecord) -> bool) -> usize {
        self.seen.lock().events.iter().filter(|event| wanted(event)).count()
    }

    pub(crate) async fn ping(&self) {
        self.tell(ToWorker::Ping).await;
    }

    pub(crate) fn pongs(&self) -> usize {
        self.seen.lock().pongs
    }

    /// What the proxy last said that it carries.
    pub(crate) fn traffic(&self) -> Traffic {
        self.seen.lock().traffic
    }

    pub(crate) fn stopped(&self) -> Vec<String> {
        self.seen.lock().stopped.clone()
    }

    pub(crate) fn adopted(&self) -> usize {
        self.seen.lock().adopted
    }

    pub(crate) fn worker_ended(&mut self) -> bool {
        self.worker.as_mut().expect("a child").try_wait().expect("wait").is_some()
    }

    pub(crate) async fn wait_for_worker(&mut self) -> ExitStatus {
        let mut worker = self.worker.take().expect("a child");
        soon("the worker ends", async {
            loop {
                if let Some(status) = worker.try_wait().expect("wait") {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }

    /// Ends without a word, as after `kill -9`.
    pub(crate) fn die(mut self) -> Orphan {
        Orphan { setup: Arc::clone(&self.setup), worker: self.worker.take(), pid: self.pid }
    }

    pub(crate) fn signal_worker(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.pid).expect("pid")).expect("pid");
        rustix::process::kill_process(pid, signal).expect("our child");
    }

    /// A new worker gets the listeners of the one that died.
    pub(crate) async fn restart_worker(mut self) -> Self {
        end(self.worker.take());
        let setup = Arc::clone(&self.setup);
        let listeners = std::mem::take(&mut self.seen.lock().listeners);
        drop(self);
        let (control, worker) = spawn(&setup);
        Self::attend(setup, control, Some(worker), Seen { listeners, ..Seen::default() }).await
    }
}

impl Orphan {
    /// Somebody who runs as the worker does waits in the agent's place; returns when the worker has called there.
    pub(crate) async fn call_impostor(&self) -> ControlSocket {
        let (name, runtime) = (self.setup.name.clone(), tokio::runtime::Handle::current());
        // Credentials are a thread's own, and a socket keeps those of the thread that listened.
        let bind = move || {
            let nobody = rustix::thread::Uid::from_raw(culvert_proxy::worker::NOBODY);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).expect("root may");
            let _runtime = runtime.enter();
            AdoptionListener::bind(&name).expect("bind")
        };
        let impostor = std::thread::spawn(bind).join().expect("bound");
        soon("the worker calls", impostor.accept()).await.expect("accept").0
    }

    /// The next agent.
    pub(crate) async fn adopt(mut self) -> Agent {
        let listener = AdoptionListener::bind(&self.setup.name).expect("bind");
        let (control, peer) = soon("the worker calls", listener.accept()).await.expect("accept");
        assert_eq!(peer.pid.unsigned_abs(), self.pid, "the kernel says who calls");
        Agent::attend(Arc::clone(&self.setup), control, self.worker.take(), Seen::default()).await
    }
}

/// Answers everything the worker asks for.
async fn answer(
    control: Arc<ControlSocket>,
    setup: Arc<Setup>,
    seen: Arc<Mutex<Seen>>,
    server_ends: mpsc::Sender<std::io::Result<UnixStream>>,
) {
    while let Ok(Some((message, descriptors))) = control.recv::<ToAgent>().await {
        let (answer, handed): (ToWorker, Vec<Arc<OwnedFd>>) = match message {
            ToAgent::OpenListener { request, address, .. } => {
                let known =
                    seen.lock().listeners.iter().find(|(known, _)| *known == address).map(|(_, open)| Arc::clone(open));
                let open =
                    known.map_or_else(|| std::net::TcpListener::bind(address).map(|open| Arc::new(open.into())), Ok);
                match open {
                    Ok(open) => {
                        seen.lock().listeners.push((address, Arc::clone(&open)));
                        (ToWorker::Listener { request, result: Ok(()) }, vec![open])
                    }
                    Err(error) => (ToWorker::Listener { request, result: Err(error.to_string()) }, vec![]),
                }
            }
            ToAgent::MoreAppSockets { proxy, family, .. } if setup.refuse_app_sockets => {
                (ToWorker::AppSockets { proxy, family, count: 0, error: Some("as the test wants".to_owned()) }, vec![])
            }
            ToAgent::MoreAppSockets { proxy, family, count } => {
                let made = (0..count).map(|_| Arc::new(unconnected(family))).collect();
                (ToWorker::AppSockets { proxy, family, count, error: None }, made)
            }
            ToAgent::ConnectXds { request } => {
                let (worker, server) = UnixStream::pair().expect("pair");
                server_ends.send(Ok(server)).await.expect("the control plane runs");
                let worker = worker.into_std().expect("std");
                (ToWorker::XdsConnection { request, result: Ok(()) }, vec![Arc::new(worker.into())])
            }
            other => {
                note(&seen, other, descriptors);
                continue;
            }
        };
        let handed: Vec<_> = handed.iter().map(|fd| fd.as_fd()).collect();
        if control.send(&answer, &handed).await.is_err() {
            return;
        }
    }
}

fn note(seen: &Mutex<Seen>, message: ToAgent, descriptors: Vec<OwnedFd>) {
    let mut seen = seen.lock();
    match message {
        ToAgent::Events(events) => seen.events.extend(events),
        ToAgent::Status(status) => seen.status = Some(status),
        ToAgent::Pong => seen.pongs += 1,
        ToAgent::Traffic { traffic, .. } => seen.traffic = traffic,
        ToAgent::Stopped { proxy } => seen.stopped.push(proxy),
        ToAgent::Adopt { address, .. } => {
            assert_eq!(descriptors.len(), 1);
            // The IPv6 companion of an upstream is not always there.
            seen.adopted += usize::from(address.is_ipv4());
        }
        _ => {}
    }
}

fn unconnected(family: Family) -> OwnedFd {
    let domain = if family == Family::V4 { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
    socket2::Socket::new(domain, socket2::Type::STREAM, None).expect("socket").into()
}

/// Sends everything, in the order that make-before-break wants, and the public listener again whenever policy changes.
async fn control_plane(mut stream: FakeStream, setup: Arc<Setup>, mut allowed: watch::Receiver<Vec<String>>) {
    let mut nonce = 0;
    let mut next = move || {
        nonce += 1;
        nonce.to_string()
    };
    loop {
        let changed = tokio::select! {
            request = stream.next() => match request {
                Some(request) if request.response_nonce.is_empty() => request.type_url,
                Some(_) => continue,
                None => return,
            },
            changed = allowed.changed() => match changed {
                Ok(()) => Listener::type_url(),
                Err(_) => return,
            },
        };
        let answer = if changed == Cluster::type_url() {
            let app = static_cluster("local_app", u32::from(setup.app.port()));
            let clusters = [app, eds_cluster("api")].map(|cluster| resource(&cluster.name.clone(), "1", any(&cluster)));
            response::<Cluster>(&next(), clusters.to_vec(), &[])
        } else if changed == ClusterLoadAssignment::type_url() {
            let instances = assignment("api", vec![endpoint("127.0.0.1", u32::from(setup.public.port()))]);
            response::<ClusterLoadAssignment>(&next(), vec![resource("api", "1", any(&instances))], &[])
        } else {
            let names = allowed.borrow_and_update().clone(); // the version tells them, as a hash of the content would
            let mut public = public_listener(&names.iter().map(String::as_str).collect::<Vec<_>>());
            public.address = Some(crate::resources::address("127.0.0.1", u32::from(setup.public.port())));
            let upstream = outbound("api:upstream", u32::from(setup.upstream.port()), "api");
            let version = format!("{} for {}", next(), names.join(","));
            let listeners = [public, upstream].map(|one| resource(&one.name.clone(), &version, any(&one)));
            response::<Listener>(&version, listeners.to_vec(), &[])
        };
        stream.send(answer).await;
    }
}
