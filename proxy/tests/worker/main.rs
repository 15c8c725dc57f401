//! The worker as a process: a test plays the agent and the control plane, connections and sockets are real.

#[path = "../xds/fake.rs"]
#[expect(dead_code, reason = "the tests of xDS use the rest")]
mod fake;
#[path = "../xds/resources.rs"]
#[expect(dead_code, reason = "the tests of xDS use the rest")]
mod resources;

mod agent;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use culvert_proxy::handoff::{SideTraffic, ToAgent};
use culvert_types::RefusalReason;
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use agent::{Agent, Setup};
use fake::{eventually, soon};

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.into_split();
                let _reset_by_peer = tokio::io::copy(&mut read, &mut write).await;
                let _reset_by_peer = write.shutdown().await;
            });
        }
    });
    address
}

fn call(address: SocketAddr) -> TcpStream {
    let stream = std::net::TcpStream::connect(address).expect("somebody listens");
    stream.set_nonblocking(true).expect("nonblocking");
    TcpStream::from_std(stream).expect("runtime")
}

async fn ping(stream: &mut TcpStream) -> std::io::Result<()> {
    let both = async {
        stream.write_all(b"are you there").await?;
        let mut answer = [0; 13];
        stream.read_exact(&mut answer).await.map(|_| ())
    };
    soon("an echo", both).await
}

async fn end(stream: &mut TcpStream) -> Result<(), ErrorKind> {
    let mut rest = Vec::new();
    soon("an end", stream.read_to_end(&mut rest)).await.map(|_| ()).map_err(|error| error.kind())
}

#[tokio::test]
async fn the_worker_serves_without_any_privilege() {
    let agent = Agent::start(Setup::new("serves", echo().await)).await;
    ping(&mut call(agent.upstream())).await.expect("through the mesh");
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    if rustix::process::geteuid().is_root() {
        assert_eq!(field("CapBnd:"), ["0000000000000000"]);
        assert_eq!(field("Uid:"), ["65534"; 4]);
        assert_eq!(field("Gid:"), ["65534"; 4]);
        assert_eq!(field("Groups:"), [""; 0]);
    } else {
        assert!(std::env::var_os("CI").is_none(), "CI runs as root, so that this is tested");
    }
    eventually("events of both sides", || agent.count(|event| event.kind == "open") >= 2).await;
}

#[tokio::test]
async fn the_worker_outlives_its_agent_and_is_taken_over() {
    let setup = Setup::new("outlives", echo().await);
    let agent = Agent::start(setup).await;
    let mut before = call(agent.upstream());
    ping(&mut before).await.expect("with the first agent");
    let (pid, upstream) = (agent.pid(), agent.upstream());
    let orphan = agent.die();
    ping(&mut before).await.expect("an open connection does not notice");
    ping(&mut call(upstream)).await.expect("new ones still work: there is a stock of sockets");
    let next = orphan.adopt().await;
    eventually("both listeners come back", || next.adopted() == 2).await;
    ping(&mut before).await.expect("with the second agent");
    ping(&mut call(upstream)).await.expect("a new one too");
    next.wait_ready().await;
    assert_eq!(next.pid(), pid, "the same process");
    // The new agent's policy reaches connections that are older than it.
    next.allow(&[]).await;
    assert_eq!(end(&mut before).await, Err(ErrorKind::ConnectionReset));
    eventually("a revocation is told", || {
        next.count(|event| event.reason.as_deref() == Some(RefusalReason::Revoked.as_str())) > 0
    })
    .await;
}

#[tokio::test]
async fn a_worker_answers_as_long_as_it_works() {
    let agent = Agent::start(Setup::new("ping", echo().await)).await;
    agent.ping().await;
    eventually("an answer", || agent.pongs() == 1).await;
    agent.signal_worker(Signal::STOP);
    agent.ping().await;
    agent.ping().await;
    agent.signal_worker(Signal::CONT);
    eventually("every ping is answered", || agent.pongs() == 3).await;
}

#[tokio::test]
async fn each_agent_hears_what_is_carried_since_it_came() {
    let agent = Agent::start(Setup::new("traffic", echo().await)).await;
    let mut client = call(agent.upstream());
    ping(&mut client).await.expect("echo");
    let carries = |open, bytes| SideTraffic { open, bytes_to_destination: bytes, bytes_to_source: bytes };
    eventually("the open connection and its bytes", || agent.traffic().inbound == carries(1, 13)).await;
    let orphan = agent.die();
    ping(&mut client).await.expect("nobody hears of these bytes");
    let mut agent = orphan.adopt().await;
    eventually("the connection is still open", || agent.traffic().outbound == carries(1, 0)).await;
    ping(&mut client).await.expect("echo");
    drop(client);
    agent.drain(Duration::from_secs(60)).await;
    agent.wait_for_worker().await;
    eventually("the last word", || agent.stopped() == ["api-sidecar-proxy"]).await;
    assert_eq!(agent.traffic().inbound, carries(0, 13));
}

#[tokio::test]
async fn connections_beyond_the_stock_of_sockets_wait_for_the_next_agent() {
    let agent = Agent::start(Setup::new("waits", echo().await)).await;
    let mut before = call(agent.upstream());
    ping(&mut before).await.expect("with the agent");
    let upstream = agent.upstream();
    let orphan = agent.die();
    // More than the 64 that are in stock, and few enough to be through their handshakes long before the first gives up.
    let calls = (0..80).map(|_| {
        tokio::spawn(async move {
            let mut client = call(upstream);
            ping(&mut client).await.map(|()| client)
        })
    });
    let calls: Vec<_> = calls.collect();
    let answered = || calls.iter().filter(|call| call.is_finished()).count();
    eventually("the stock is used up", || answered() >= 16).await;
    assert!(answered() < 80, "nobody else makes sockets");
    let agent = orphan.adopt().await;
    let clients = futures::future::join_all(calls).await;
    assert!(clients.into_iter().all(|client| client.expect("no panic").is_ok()));
    drop(agent);
}

#[tokio::test]
async fn nobody_but_the_user_who_started_the_worker_takes_it_over() {
    if !rustix::process::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI runs as root, so that this is tested");
        return eprintln!("SKIPPED: needs root");
    }
    let agent = Agent::start(Setup::new("impostor", echo().await)).await;
    let mut before = call(agent.upstream());
    ping(&mut before).await.expect("with the agent");
    let orphan = agent.die();
    let impostor = orphan.call_impostor().await;
    let said = soon("the worker hangs up", impostor.recv::<ToAgent>()).await;
    assert!(matches!(said, Ok(None)), "not a word, and no listener: {said:?}");
    drop(impostor);
    let agent = orphan.adopt().await;
    ping(&mut before).await.expect("with the next agent");
    drop(agent);
}

#[tokio::test]
async fn a_worker_that_is_killed_resets_its_connections_and_a_successor_goes_on() {
    let agent = Agent::start(Setup::new("killed", echo().await)).await;
    let mut client = call(agent.upstream());
    ping(&mut client).await.expect("through the mesh");
    agent.signal_worker(Signal::KILL);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset), "not an orderly end");
    // The agent kept the listeners: this waits in the backlog until there is a worker again.
    let mut waiting = call(agent.upstream());
    let agent = agent.restart_worker().await;
    ping(&mut waiting).await.expect("accepted by the successor");
    drop(agent);
}

#[tokio::test]
async fn draining_ends_the_worker_when_the_last_connection_ends() {
    let mut agent = Agent::start(Setup::new("drains", echo().await)).await;
    let mut client = call(agent.upstream());
    ping(&mut client).await.expect("through the mesh");
    agent.drain(Duration::from_secs(600)).await;
    ping(&mut client).await.expect("an open connection may end by itself");
    assert!(!agent.worker_ended());
    client.shutdown().await.expect("close");
    assert_eq!(end(&mut client).await, Ok(()));
    let status = agent.wait_for_worker().await;
    assert!(status.success(), "{status}");
    eventually("the proxy is reported gone", || agent.stopped() == ["api-sidecar-proxy"]).await;
    eventually("the last event came through", || agent.count(|event| event.kind == "close") >= 2).await;
}

#[tokio::test]
async fn a_stopped_proxy_is_gone_and_the_worker_stays() {
    let mut agent = Agent::start(Setup::new("stops", echo().await)).await;
    let mut client = call(agent.upstream());
    ping(&mut client).await.expect("through the mesh");
    agent.stop_proxy(Duration::from_millis(50)).await;
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset), "the deadline is short");
    eventually("the proxy is reported gone", || agent.stopped() == ["api-sidecar-proxy"]).await;
    assert!(!agent.worker_ended());
    agent.serve().await;
    agent.wait_ready().await;
    ping(&mut call(agent.upstream())).await.expect("served again");
}

#[tokio::test]
async fn without_sockets_for_the_application_connections_are_refused_in_time() {
    let mut setup = Setup::new("nosockets", echo().await);
    setup.refuse_app_sockets = true;
    let agent = Agent::start(setup).await;
    assert_eq!(end(&mut call(agent.upstream())).await, Err(ErrorKind::ConnectionReset));
    eventually("told with its reason", || {
        agent.count(|event| {
            event.reason.as_deref() == Some("connect")
                && event.detail.as_ref().is_some_and(|why| why.contains("as the test wants"))
        }) > 0
    })
    .await;
}

#[tokio::test]
async fn many_connections_at_once_find_sockets() {
    let agent = Agent::start(Setup::new("many", echo().await)).await;
    let calls = (0..300).map(|_| {
        let upstream = agent.upstream();
        tokio::spawn(async move {
            let mut client = call(upstream);
            ping(&mut client).await.expect("echo");
            client
        })
    });
    let clients = futures::future::join_all(calls).await;
    assert_eq!(clients.into_iter().filter(|client| client.is_ok()).count(), 300);
}

#[test]
fn a_worker_that_cannot_drop_its_privileges_refuses_to_run() {
    // Here a second thread runs: the test's own harness.
    let refusal = culvert_proxy::worker::drop_all().expect_err("more than one thread");
    assert!(matches!(refusal, culvert_proxy::worker::PrivilegeError::Threads(2..)), "{refusal}");
}
