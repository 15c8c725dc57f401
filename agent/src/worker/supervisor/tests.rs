//! The supervisor, with a worker that the test plays.

use std::time::SystemTime;

use culvert_proxy::handoff::{ControlSocket, MAX_DESCRIPTORS, Traffic};
use culvert_types::{ConnectionEvent, ConnectionKind, Path, SpiffeId, Verdict};

use super::super::backoff::FIRST_PAUSE;
use super::reports::own_service;
use super::*;

struct Nothing;

impl Surroundings for Nothing {
    fn connect_xds(&self, _: UnixStream) {}
    fn inbound_listener(&self, _: &str, _: u16, _: BorrowedFd<'_>) {}
    fn event(&self, _: &str, _: ConnectionEvent) {}
    fn traffic(&self, _: &str, _: &str, _: &Traffic) {}
    fn no_traffic(&self, _: Option<&str>) {}
    fn events_lost(&self, _: u64) {}
}

fn supervisor() -> (mpsc::Sender<Command>, Supervisor) {
    let settings = WorkerSettings { data_dir: "/nonexistent".into(), node: "n1".to_owned(), log: String::new() };
    let (handle, commands) = mpsc::channel(1);
    let view = watch::Sender::new(WorkerView::default());
    (handle, Supervisor::new(settings, Arc::new(Nothing), commands, view))
}

#[tokio::test]
async fn a_worker_that_says_something_unknown_is_served_on() {
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    rustix::net::send(&other_end, br#"{"NewsOfTomorrow":{}}"#, rustix::net::SendFlags::empty()).expect("sent");
    let other_end = ControlSocket::new(other_end).expect("control socket");
    let (_handle, mut supervisor) = supervisor();
    let worker = Worker::at(control).expect("a process");
    let asks = async {
        other_end.send(&ToAgent::ConnectXds { request: 7 }, &[]).await.expect("the agent listens");
        other_end.recv::<ToWorker>().await
    };
    tokio::select! {
        _ = supervisor.attend(&worker) => panic!("the worker was given up"),
        answer = asks => {
            let answer = answer.expect("understood").map(|(answer, _)| answer);
            assert!(matches!(answer, Some(ToWorker::XdsConnection { request: 7, result: Ok(()) })), "{answer:?}");
        }
    }
}

#[tokio::test]
async fn a_worker_that_says_something_unknown_is_drained_to_its_end() {
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    let (_handle, supervisor) = supervisor();
    let worker = Worker::at(control).expect("a process");
    let mut drained = std::pin::pin!(supervisor.drained(&worker));
    rustix::net::send(&other_end, br#"{"NewsOfTomorrow":{}}"#, rustix::net::SendFlags::empty()).expect("sent");
    assert!(timeout(FIRST_PAUSE, &mut drained).await.is_err(), "it has not ended");
    drop(other_end);
    timeout(STUCK, drained).await.expect("it has ended");
}

/// The supervisor attends to the worker for as long as the test plays it.
async fn while_served(supervisor: &mut Supervisor, worker: &Worker, plays: impl Future<Output = ()>) {
    tokio::select! {
        _ = supervisor.attend(worker) => panic!("the worker was given up"),
        () = plays => {}
    }
}

/// Has `proxy` served by the worker at the other end of the control socket.
fn served(proxy: &str) -> Command {
    let (proxy, service, upstreams) = (proxy.to_owned(), "web".to_owned(), Vec::new());
    Command::Serve(super::super::Served { proxy, service, netns: "/none".into(), inbound_port: 20_000, upstreams })
}

/// What the worker is told to serve or to stop next.
async fn told(worker: &ControlSocket) -> ToWorker {
    loop {
        match timeout(STUCK, worker.recv::<ToWorker>()).await.expect("in time").expect("understood") {
            Some((ToWorker::Ping, _)) => {}
            Some((message, _)) => return message,
            None => panic!("the agent is gone"),
        }
    }
}

async fn stopped(worker: &ControlSocket) {
    worker.send(&ToAgent::Stopped { proxy: "web".to_owned() }, &[]).await.expect("the agent listens");
}

#[tokio::test]
async fn a_proxy_that_the_worker_gave_up_is_served_again_and_later_each_time() {
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    let other_end = ControlSocket::new(other_end).expect("control socket");
    let (handle, mut supervisor) = supervisor();
    let view = supervisor.view.subscribe();
    let worker = Worker::at(control).expect("a process");
    let fails = async {
        handle.send(served("web")).await.expect("taken");
        assert!(matches!(told(&other_end).await, ToWorker::Serve { .. }));
        let mut pauses = Vec::new();
        for failures in 1..=3 {
            let start = Instant::now();
            stopped(&other_end).await;
            let again = told(&other_end).await;
            assert!(matches!(&again, ToWorker::Serve { proxy, .. } if proxy == "web"), "{again:?}");
            pauses.push(start.elapsed());
            assert_eq!(view.borrow().proxy_failures["web"], failures);
        }
        assert!(pauses[1] >= FIRST_PAUSE && pauses[2] >= 2 * FIRST_PAUSE, "{pauses:?}");
        // One that waits to be served again can be stopped: there is nothing to wait for.
        stopped(&other_end).await;
        let (done, gone) = oneshot::channel();
        let mut failed = view.clone();
        failed.wait_for(|view| view.proxy_failures["web"] == 4).await.expect("noted");
        let stop = Command::Stop { proxy: "web".to_owned(), deadline: STUCK, done };
        handle.send(stop).await.expect("taken");
        timeout(FIRST_PAUSE, gone).await.expect("at once").expect("told");
        assert!(view.borrow().proxies.is_empty() && view.borrow().proxy_failures.is_empty());
        assert!(timeout(5 * FIRST_PAUSE, told(&other_end)).await.is_err(), "it is not wanted any more");
    };
    while_served(&mut supervisor, &worker, fails).await;
}

#[tokio::test]
async fn a_proxy_that_is_wanted_again_while_it_is_drained_is_served_once_that_is_done() {
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    let other_end = ControlSocket::new(other_end).expect("control socket");
    let (handle, mut supervisor) = supervisor();
    let view = supervisor.view.subscribe();
    let worker = Worker::at(control).expect("a process");
    let changes_its_mind = async {
        handle.send(served("web")).await.expect("taken");
        assert!(matches!(told(&other_end).await, ToWorker::Serve { .. }));
        let (done, mut gone) = oneshot::channel();
        let stop = Command::Stop { proxy: "web".to_owned(), deadline: STUCK, done };
        handle.send(stop).await.expect("taken");
        assert!(matches!(told(&other_end).await, ToWorker::Stop { .. }));
        handle.send(served("web")).await.expect("taken");
        assert!(timeout(FIRST_PAUSE, told(&other_end)).await.is_err(), "the worker would refuse it");
        let former = ProxyStatus { proxy: "web".to_owned(), ready: true, ..ProxyStatus::default() };
        other_end.send(&ToAgent::Status(former), &[]).await.expect("the agent listens");
        gone.try_recv().expect_err("not gone yet");
        stopped(&other_end).await;
        assert!(matches!(told(&other_end).await, ToWorker::Serve { .. }));
        gone.await.expect("told");
        assert!(view.borrow().proxies.is_empty(), "its former life says nothing of this one");
        assert!(view.borrow().proxy_failures.is_empty(), "it did not fail");
    };
    while_served(&mut supervisor, &worker, changes_its_mind).await;
}

#[tokio::test]
async fn a_worker_whose_descriptors_do_not_fit_is_not_given_up() {
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    let too_many = vec![other_end.as_fd(); 2 * MAX_DESCRIPTORS];
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2 * MAX_DESCRIPTORS))];
    let mut descriptors = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(descriptors.push(rustix::net::SendAncillaryMessage::ScmRights(&too_many)));
    let adopt = br#"{"adopt":{"proxy":"web","address":"127.0.0.1:1"}}"#;
    let flags = rustix::net::SendFlags::empty();
    rustix::net::sendmsg(&other_end, &[std::io::IoSlice::new(adopt)], &mut descriptors, flags).expect("sent");
    let (_handle, mut supervisor) = supervisor();
    let ended = supervisor.attend(&Worker::at(control).expect("a process")).await;
    assert!(matches!(ended, Ended::Incomplete));
}

/// It is asked again for what it said before, and carries on meanwhile.
#[tokio::test]
async fn a_worker_that_is_taken_over_anew_drains_on_and_is_not_told_to_serve_what_it_drains() {
    let (_handle, mut supervisor) = supervisor();
    let (done, mut gone) = oneshot::channel();
    let Command::Serve(web) = served("web") else { unreachable!() };
    let Command::Serve(api) = served("api") else { unreachable!() };
    supervisor.sockets.serve(web);
    supervisor.sockets.serve(api);
    supervisor.stopping.insert("web".to_owned(), Stopping { service: None, waiting: vec![done], overdue: None });
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    let other_end = ControlSocket::new(other_end).expect("control socket");
    let worker = Worker::at(control).expect("a process");
    let drains = async {
        assert!(matches!(told(&other_end).await, ToWorker::Serve { proxy, .. } if proxy == "api"));
        // Its end may have been lost.
        assert!(matches!(told(&other_end).await, ToWorker::Stop { proxy, .. } if proxy == "web"));
        gone.try_recv().expect_err("it is drained yet");
        stopped(&other_end).await;
        assert!(matches!(told(&other_end).await, ToWorker::Serve { proxy, .. } if proxy == "web"));
        gone.await.expect("told");
    };
    while_served(&mut supervisor, &worker, drains).await;
    assert!(supervisor.view.borrow().proxy_failures.is_empty(), "it did not fail");
}

#[tokio::test]
async fn listeners_that_a_worker_brought_end_with_it() {
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    let other_end = ControlSocket::new(other_end).expect("control socket");
    let (_handle, mut supervisor) = supervisor();
    let worker = Worker::at(control).expect("a process");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    other_end
        .send(&ToAgent::Adopt { proxy: "web".to_owned(), address }, &[listener.as_fd()])
        .await
        .expect("the agent listens");
    drop((listener, other_end));
    assert!(matches!(supervisor.attend(&worker).await, Ended::WorkerGone));
    assert_eq!(supervisor.brought.len(), 1);
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    drop(other_end);
    let next = Worker::at(control).expect("a process");
    supervisor.begin();
    assert!(matches!(supervisor.attend(&next).await, Ended::WorkerGone));
    std::net::TcpListener::bind(address).expect("nobody listens there any more");
}

#[tokio::test]
async fn who_waits_for_a_drained_proxy_hears_of_the_next_worker() {
    let (control, other_end) = ControlSocket::pair().expect("socketpair");
    let (_handle, mut supervisor) = supervisor();
    let (done, gone) = oneshot::channel();
    supervisor.stopping.insert("web".to_owned(), Stopping { service: None, waiting: vec![done], overdue: None });
    drop(other_end);
    supervisor.begin();
    supervisor.attend(&Worker::at(control).expect("a process")).await;
    timeout(STUCK, gone).await.expect("told").expect_err("by the end of the channel");
}

#[test]
fn a_connection_counts_for_the_service_whose_side_tells() {
    let id = |service: &str| SpiffeId::parse(&format!("spiffe://td.consul/ns/default/dc/dc1/svc/{service}")).ok();
    let event = |inbound, source, destination| ConnectionEvent {
        at: SystemTime::now(),
        kind: ConnectionKind::Close,
        path: Path::Proxied,
        verdict: Verdict::Allow,
        source,
        destination,
        reporter: "gone".to_owned(),
        inbound,
        rule: None,
        reason: None,
        detail: None,
        peer: None,
        bytes_to_destination: 0,
        bytes_to_source: 0,
        duration: Duration::ZERO,
    };
    assert_eq!(own_service(&event(true, id("web"), id("api"))).as_deref(), Some("api"));
    assert_eq!(own_service(&event(false, id("web"), id("api"))).as_deref(), Some("web"));
    assert_eq!(own_service(&event(true, id("web"), None)), None, "never the peer's");
    let agent = SpiffeId::parse("spiffe://td.consul/agent/client/dc/dc1/id/x").ok();
    assert_eq!(own_service(&event(false, agent, id("api"))), None);
}
