//! Two real Envoys carry TCP through mutual TLS with our configuration, and obey intentions live.

mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use culvert_control::Reloadable;
use culvert_control::state::rows::Service;
use culvert_types::{Action, Encryption, HealthStatus};
use support::envoy::Envoy;
use support::{Control, PATIENCE, eventually, service, sidecar, upstream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Longest time for one echo; a connection that does not answer counts as refused after it.
const ECHO: Duration = Duration::from_secs(5);

/// `web` calls `api` through two Envoys.
struct Pair {
    control: Control,
    web: Envoy,
    api: Envoy,
    upstream: SocketAddr,
    /// Where the sidecar of `api` listens for the mesh.
    inbound: SocketAddr,
}

impl Pair {
    async fn start(default_policy: Action) -> Self {
        let control = Control::start(default_policy).await;
        let here = own_address();
        let application = echo_server(here).await;
        let on_loopback = |mut sidecar: Service| {
            sidecar.address = here.to_string();
            sidecar.proxy.as_mut().expect("a sidecar").settings.bind_address = Some(here.into());
            sidecar.proxy.as_mut().expect("a sidecar").local_service_address = here.to_string();
            sidecar
        };
        let calls = vec![upstream("api", &here.to_string(), 8080)];
        control.put(&service("api", application)).await;
        control.put(&on_loopback(sidecar("api", 21000, application, Vec::new()))).await;
        control.put(&service("web", 9)).await;
        control.put(&on_loopback(sidecar("web", 21001, 9, calls))).await;
        let address = control.address();
        Self {
            web: Envoy::start("web-sidecar-proxy", "web", address),
            api: Envoy::start("api-sidecar-proxy", "api", address),
            upstream: SocketAddr::new(here.into(), 8080),
            inbound: SocketAddr::new(here.into(), 21000),
            control,
        }
    }

    /// One connection through both: does it carry bytes?
    async fn carries(&self) -> bool {
        let echo = async {
            let mut stream = TcpStream::connect(self.upstream).await?;
            stream.write_all(b"through the culvert").await?;
            let mut answer = [0; 19];
            stream.read_exact(&mut answer).await?;
            std::io::Result::Ok(answer == *b"through the culvert")
        };
        timeout(ECHO, echo).await.is_ok_and(|echo| echo.is_ok_and(|same| same))
    }

    async fn comes_to(&self, carries: bool, what: &str) {
        eventually(what, async || self.carries().await == carries).await;
    }

    /// Makes a change, and waits until the proxy of `api` runs it.
    async fn applied(&self, change: impl Future<Output = ()>) {
        let version = || self.control.xds.status().proxies().remove("api-sidecar-proxy").map(|status| status.version);
        let before = version();
        change.await;
        eventually("the change is in force", async || version() != before).await;
    }

    /// Nothing that we sent was refused.
    fn accepted(&self) {
        let proxies = self.control.xds.status().proxies();
        for id in ["web-sidecar-proxy", "api-sidecar-proxy"] {
            let status = proxies.get(id).unwrap_or_else(|| panic!("{id} is connected"));
            assert!(status.refusals.is_empty(), "{id}: {:?}", status.refusals);
        }
        for envoy in [&self.web, &self.api] {
            let log = envoy.log();
            // The bootstrap, Consul's own, uses one deprecated field; what we send uses none.
            let bad = |line: &&str| {
                line.contains("rejected") || (line.contains("Deprecated") && !line.contains("http2_protocol_options"))
            };
            assert_eq!(log.lines().filter(bad).collect::<Vec<_>>(), Vec::<&str>::new());
        }
    }
}

/// One connection that carries numbered bytes back and forth until it is told to end.
struct Lasting {
    end: CancellationToken,
    task: JoinHandle<()>,
}

impl Lasting {
    fn start(mut stream: TcpStream) -> Self {
        let end = CancellationToken::new();
        let ended = end.clone();
        let task = tokio::spawn(async move {
            let mut sent = 0_u64;
            while !ended.is_cancelled() {
                let mut answer = [0; 8];
                stream.write_all(&sent.to_be_bytes()).await.expect("the connection lasts");
                timeout(PATIENCE, stream.read_exact(&mut answer))
                    .await
                    .expect("in time")
                    .expect("the connection lasts");
                assert_eq!(u64::from_be_bytes(answer), sent, "every byte, in order");
                sent += 1;
            }
            stream.shutdown().await.expect("half-closed");
            let mut rest = Vec::new();
            timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("in time").expect("a clean end");
            assert!(rest.is_empty() && sent > 0, "{} bytes nobody sent", rest.len());
        });
        Self { end, task }
    }

    async fn finish(self) {
        assert!(!self.task.is_finished(), "it ended by itself");
        self.end.cancel();
        self.task.await.expect("no panic");
    }
}

/// A loopback address of this test's own: no port on it is taken, whatever else runs on the machine.
fn own_address() -> Ipv4Addr {
    static TESTS: AtomicU8 = AtomicU8::new(64);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, TESTS.fetch_add(1, Ordering::Relaxed), high, low.clamp(1, 254))
}

async fn echo_server(address: Ipv4Addr) -> u16 {
    let listener = TcpListener::bind((address, 0)).await.expect("loopback");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("accept");
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                // The peer decides how it ends.
                drop(tokio::io::copy(&mut read, &mut write).await);
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn intentions_switch_traffic_between_two_envoys_live() {
    let pair = Pair::start(Action::Deny).await;
    let control = &pair.control;
    eventually("both proxies run our configuration", async || {
        let proxies = control.xds.status().proxies();
        proxies.len() == 2 && proxies.values().all(|status| !status.version.is_empty())
    })
    .await;
    // What a proxy runs is known before it listens; without a listener nothing is carried whatever the policy says.
    for (address, whose) in [(pair.upstream, "web's upstream"), (pair.inbound, "api's inbound")] {
        eventually(whose, async || TcpStream::connect(address).await.is_ok()).await;
    }
    assert!(!pair.carries().await, "denied by default");
    control.intend("web", "api", Action::Allow).await;
    pair.comes_to(true, "an exact intention allows").await;
    pair.accepted();
    control.intend("web", "api", Action::Deny).await;
    pair.comes_to(false, "the intention turned to deny").await;
    pair.applied(control.intend("*", "api", Action::Allow)).await;
    assert!(!pair.carries().await, "an exact denial wins over a wildcard");
    control.forget("web", "api").await;
    pair.comes_to(true, "the wildcard is left").await;
    control.intend("*", "*", Action::Deny).await;
    control.forget("*", "api").await;
    pair.comes_to(false, "everything is denied").await;

    let allow = Reloadable { default_policy: Action::Allow, encryption: Encryption::Always };
    pair.applied(async {
        control.settings.send_replace(allow);
    })
    .await;
    assert!(!pair.carries().await, "denied by the wildcard, whatever the default");
    control.forget("*", "*").await;
    pair.comes_to(true, "allowed by default").await;
    pair.applied(control.intend("other", "api", Action::Deny)).await;
    assert!(pair.carries().await, "another service is denied, not this one");
    control.intend("*", "*", Action::Deny).await;
    pair.comes_to(false, "all others too").await;
    control.intend("web", "*", Action::Allow).await;
    pair.comes_to(true, "web may call anyone").await;
    pair.accepted();
    pair.control.stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotation_of_the_root_loses_no_new_connection_and_no_byte_of_an_old_one() {
    let pair = Pair::start(Action::Allow).await;
    pair.comes_to(true, "allowed by default").await;
    let lasting = Lasting::start(TcpStream::connect(pair.upstream).await.expect("allowed"));
    let old = pair.control.authority.roots().expect("rows").active_id.clone();
    pair.control.authority.rotate().await.expect("rotation");
    let start = tokio::time::Instant::now();
    let mut after = 0;
    // Some more once both leaves are new: they reach the two Envoys at different moments.
    while after < 50 || start.elapsed() < Duration::from_secs(2) {
        assert!(pair.carries().await, "a connection was lost {:?} after the rotation", start.elapsed());
        let leaf = |service| pair.control.leaves.get(service);
        let (web, api) = (support::name("web"), support::name("api"));
        let renewed = leaf(&web).await.expect("leaf").certificate.root_id != old
            && leaf(&api).await.expect("leaf").certificate.root_id != old;
        after += usize::from(renewed);
        assert!(renewed || start.elapsed() < PATIENCE, "leaves were not renewed");
    }
    lasting.finish().await;
    pair.accepted();
    pair.control.stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_upstreams_and_registration_of_a_proxy_change_live() {
    let pair = Pair::start(Action::Allow).await;
    pair.comes_to(true, "allowed by default").await;
    pair.control.set_health("api", HealthStatus::Critical).await;
    pair.comes_to(false, "the only instance is critical").await;
    pair.control.set_health("api", HealthStatus::Warning).await;
    pair.comes_to(true, "one that warns is better than none").await;
    pair.control.set_health("api", HealthStatus::Passing).await;
    pair.comes_to(true, "it passes again").await;
    // Removed and made again: listener, cluster and endpoints.
    let web =
        pair.control.ledger.state().service(support::NODE, "web-sidecar-proxy").expect("registered").value.clone();
    let mut lonely = web.clone();
    lonely.proxy.as_mut().expect("a sidecar").upstreams.clear();
    pair.control.put(&lonely).await;
    eventually("nobody listens for the application", async || TcpStream::connect(pair.upstream).await.is_err()).await;
    pair.control.put(&web).await;
    pair.comes_to(true, "the upstream is back").await;
    pair.accepted();
    pair.control.deregister("api-sidecar-proxy").await;
    pair.comes_to(false, "no instance is left").await;
    // Connections that it still has must obey policy: it goes on to hear of it, until it hangs up by itself.
    pair.applied(pair.control.intend("web", "api", Action::Deny)).await;
    pair.accepted();
    pair.control.stop.cancel();
}
