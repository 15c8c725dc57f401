//! Real listeners, real timers where a connection is made, paused ones where nothing is.

use std::net::SocketAddr;

use culvert_types::Datacenter;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::*;
use crate::catalog::Place;
use crate::state::Stored;
use crate::store::MemoryStore;

struct World {
    ledger: Ledger,
    catalog: Catalog,
    checks: Checks,
    stop: CancellationToken,
}

impl World {
    async fn new() -> Self {
        Self::with_dialer(Arc::new(NodeDialer)).await
    }

    async fn with_dialer(dialer: Arc<dyn CheckDialer>) -> Self {
        let stop = CancellationToken::new();
        let ledger = Ledger::start(Arc::new(MemoryStore::default()), stop.clone()).await.expect("empty");
        let place = Place {
            node: "n1".to_owned(),
            advertise: [127, 0, 0, 1].into(),
            datacenter: Datacenter::new("dc1").expect("a name"),
            sidecar_ports: None,
            dev: false,
        };
        let catalog = Catalog::new(ledger.clone(), Arc::new(place));
        let checks = Checks::new(ledger.clone(), "n1", dialer, Metrics::default());
        tokio::spawn(checks.clone().supervise(catalog.clone(), stop.clone()));
        Self { ledger, catalog, checks, stop }
    }

    async fn register(&self, body: Value) {
        let body = culvert_api::decode(body.to_string().as_bytes()).expect("a body");
        self.catalog.register_service(body, false).await.expect("registered");
    }

    /// Waits until the check satisfies `wanted`.
    async fn until(&self, id: &str, wanted: impl Fn(&Check) -> bool) -> Arc<Stored<Check>> {
        let mut states = self.ledger.watch();
        let found = states.wait_for(|state| state.check("n1", id).is_some_and(|check| wanted(check)));
        let state = tokio::time::timeout(Duration::from_secs(60), found).await;
        let state = state.unwrap_or_else(|_| panic!("{id}: {:?}", self.ledger.state().check("n1", id)));
        Arc::clone(state.expect("running").check("n1", id).expect("found"))
    }

    async fn becomes(&self, id: &str, status: HealthStatus) -> Arc<Stored<Check>> {
        self.until(id, |check| check.status == status && !check.output.is_empty()).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Answers every request with the latest of `answer`, a whole response.
async fn server(mut answer: watch::Receiver<String>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.borrow_and_update().clone();
            tokio::spawn(async move {
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap_or(0);
                let echoed = String::from_utf8_lossy(&request[..length]).into_owned();
                let body = answer.replace("{request}", &echoed);
                // The peer may be gone.
                stream.write_all(body.as_bytes()).await.ok();
            });
        }
    });
    address
}

fn response(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}")
}

#[tokio::test]
async fn http_statuses_mean_what_they_mean_in_consul() {
    let world = World::new().await;
    let (answer, answers) = watch::channel(response("200 OK", "fine"));
    let url = format!("http://{}/health", server(answers).await);
    let check = json!({"HTTP": url, "Interval": "100ms", "Timeout": "10s", "OutputMaxSize": 200});
    world.register(json!({"Name": "web", "Check": check})).await;
    let passing = world.becomes("service:web", HealthStatus::Passing).await;
    assert_eq!(passing.output, format!("HTTP GET {url}: 200 OK Output: fine"));
    answer.send_replace(response("429 Too Many Requests", ""));
    world.becomes("service:web", HealthStatus::Warning).await;
    answer.send_replace(response("500 Internal Server Error", &"x".repeat(5000)));
    let critical = world.becomes("service:web", HealthStatus::Critical).await;
    assert!(critical.output.len() <= 200, "output is limited: {}", critical.output.len());
    answer.send_replace(response("204 No Content", ""));
    world.becomes("service:web", HealthStatus::Passing).await;
    answer.send_replace("nonsense".to_owned());
    world.becomes("service:web", HealthStatus::Critical).await;
}

#[tokio::test]
async fn http_checks_send_what_they_are_told_and_follow_redirects() {
    let world = World::new().await;
    let (_echo, echoes) = watch::channel(response("200 OK", "{request}"));
    let echo = server(echoes).await;
    let location =
        format!("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://{echo}/there\r\nConnection: close\r\n\r\n");
    let (_redirect, redirects) = watch::channel(location);
    let redirect = server(redirects).await;
    let check = |extra: Value| {
        let mut check = json!({
            "HTTP": format!("http://{redirect}/here"), "Interval": "1s", "Method": "POST", "Body": "ping",
            "Header": {"X-Check": ["yes"]},
        });
        for (key, value) in extra.as_object().expect("an object") {
            check[key] = value.clone();
        }
        check
    };
    let checks = [check(json!({"CheckID": "follow"})), check(json!({"CheckID": "stay", "DisableRedirects": true}))];
    world.register(json!({"Name": "web", "Checks": checks})).await;
    let follow = world.becomes("follow", HealthStatus::Passing).await;
    for part in ["POST /there HTTP/1.1", "x-check: yes", "ping", "Consul Health Check"] {
        assert!(follow.output.contains(part), "{part}: {}", follow.output);
    }
    let stay = world.until("stay", |check| !check.output.is_empty()).await;
    assert_eq!(stay.status, HealthStatus::Critical);
    assert!(stay.output.contains("307"), "{}", stay.output);
}

#[tokio::test]
async fn a_tcp_check_follows_its_listener() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    world.register(json!({"Name": "web", "Check": {"TCP": address.to_string(), "Interval": "100ms"}})).await;
    let passing = world.becomes("service:web", HealthStatus::Passing).await;
    assert_eq!(passing.output, format!("TCP connect {address}: Success"));
    drop(listener);
    let critical = world.becomes("service:web", HealthStatus::Critical).await;
    assert!(critical.output.contains(&format!("dial tcp {address}")), "{}", critical.output);
}

#[tokio::test]
async fn a_peer_that_does_not_answer_is_critical_after_the_time_out() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("bound"));
    let check = json!({"HTTP": url, "Interval": "100ms", "Timeout": "50ms", "Status": "passing"});
    world.register(json!({"Name": "web", "Check": check})).await;
    let critical = world.becomes("service:web", HealthStatus::Critical).await;
    assert!(critical.output.contains("no answer within"), "{}", critical.output);
}

/// Every dial waits for the test to say how it ends.
#[derive(Clone)]
struct Script {
    results: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<bool>>>,
    asked: watch::Sender<Vec<String>>,
}

impl Script {
    fn new() -> (Self, mpsc::UnboundedSender<bool>) {
        let (sender, results) = mpsc::unbounded_channel();
        (Self { results: Arc::new(tokio::sync::Mutex::new(results)), asked: watch::Sender::default() }, sender)
    }

    /// Waits until the `n`-th dial has begun: everything about the one before is written then.
    async fn asked(&self, n: usize) {
        let mut asked = self.asked.subscribe();
        let begun = asked.wait_for(|asked| asked.len() >= n);
        tokio::time::timeout(Duration::from_secs(60), begun).await.expect("in time").expect("running");
    }
}

impl CheckDialer for Script {
    fn dial(
        &self,
        service_id: &str,
        _address: SocketAddr,
    ) -> futures::future::BoxFuture<'static, std::io::Result<tokio::net::TcpStream>> {
        self.asked.send_modify(|asked| asked.push(service_id.to_owned()));
        let results = Arc::clone(&self.results);
        Box::pin(async move {
            match results.lock().await.recv().await {
                Some(true) => {
                    let listener = TcpListener::bind("127.0.0.1:0").await?;
                    tokio::net::TcpStream::connect(listener.local_addr()?).await
                }
                _ => Err(std::io::Error::other("scripted failure")),
            }
        })
    }
}

#[tokio::test]
async fn checks_dial_as_their_service_and_thresholds_count() {
    let (script, results) = Script::new();
    let world = World::with_dialer(Arc::new(script.clone())).await;
    let check = json!({
        "TCP": "10.255.255.1:80", "Interval": "100ms", "Timeout": "1h", "SuccessBeforePassing": 3, "FailuresBeforeCritical": 2,
    });
    world.register(json!({"ID": "web-1", "Name": "web", "Check": check})).await;
    let say = |result| results.send(result).expect("the dialer listens");
    let status = || world.ledger.state().check("n1", "service:web-1").expect("there").status;
    [true, true, false, true, true].into_iter().for_each(say);
    script.asked(6).await;
    assert_eq!(status(), HealthStatus::Critical, "two successes in a row are too few");
    say(true);
    world.becomes("service:web-1", HealthStatus::Passing).await;
    say(false);
    script.asked(8).await;
    assert_eq!(status(), HealthStatus::Passing, "one failure is too few");
    say(false);
    world.becomes("service:web-1", HealthStatus::Critical).await;
    assert!(script.asked.borrow().iter().all(|service| service == "web-1"));
}

#[tokio::test]
async fn a_check_ends_with_its_registration_and_changes_with_its_definition() {
    let (script, results) = Script::new();
    let world = World::with_dialer(Arc::new(script.clone())).await;
    let check = |port: u16| json!({"TCP": format!("10.255.255.1:{port}"), "Interval": "100ms", "Timeout": "1h"});
    let say = |result| results.send(result).expect("the dialer listens");
    world.register(json!({"Name": "web", "Check": check(1)})).await;
    say(true);
    world.becomes("service:web", HealthStatus::Passing).await;
    say(false);
    let critical = world.becomes("service:web", HealthStatus::Critical).await;
    assert!(critical.output.contains("10.255.255.1:1"), "{}", critical.output);
    // The next dial of the old definition is under way and ends unheard.
    script.asked(3).await;
    world.register(json!({"Name": "web", "Check": check(2)})).await;
    script.asked(4).await;
    say(true);
    let passing = world.becomes("service:web", HealthStatus::Passing).await;
    assert!(passing.output.contains("10.255.255.1:2"), "{}", passing.output);
    world.catalog.deregister_service("web").await.expect("deregistered");
    assert!(world.ledger.state().check("n1", "service:web").is_none());
}

#[tokio::test(start_paused = true)]
async fn a_ttl_check_passes_while_somebody_speaks_for_it() {
    let world = World::new().await;
    world.register(json!({"Name": "web", "Check": {"TTL": "10s"}})).await;
    let start = Instant::now();
    for _ in 0..4 {
        world.checks.update_ttl("service:web", HealthStatus::Passing, "alive".to_owned()).await.expect("a TTL check");
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(world.ledger.state().check("n1", "service:web").expect("there").status, HealthStatus::Passing);
    }
    let critical = world.becomes("service:web", HealthStatus::Critical).await;
    assert_eq!(critical.output, "TTL expired (last output before timeout follows): alive");
    assert_eq!(start.elapsed().as_secs(), 37);
    world.checks.update_ttl("service:web", HealthStatus::Warning, "late".to_owned()).await.expect("a TTL check");
    world.becomes("service:web", HealthStatus::Warning).await;
    let unknown = world.checks.update_ttl("nope", HealthStatus::Passing, String::new()).await.expect_err("unknown");
    let text = "Unknown check ID \"nope\". Ensure that the check ID is passed, not the check name.";
    assert_eq!(unknown.to_string(), text);
}

#[tokio::test(start_paused = true)]
async fn outputs_alone_are_written_rarely_but_known_at_once() {
    let world = World::new().await;
    world.register(json!({"Name": "web", "Check": {"TTL": "1h"}})).await;
    let update = |text: &str| world.checks.update_ttl("service:web", HealthStatus::Passing, text.to_owned());
    update("first").await.expect("a TTL check");
    let written = world.ledger.state().revision();
    update("second").await.expect("a TTL check");
    assert_eq!(world.ledger.state().revision(), written);
    assert_eq!(world.checks.output("service:web").as_deref(), Some("second"));
    tokio::time::sleep(OUTPUT_INTERVAL).await;
    update("third").await.expect("a TTL check");
    assert_eq!(world.ledger.state().check("n1", "service:web").expect("there").output, "third");
}

#[tokio::test]
async fn an_alias_is_as_well_as_the_worst_it_follows() {
    let world = World::new().await;
    world.register(json!({"Name": "side", "Checks": [{"CheckID": "alias", "AliasService": "web"}]})).await;
    let missing = world.until("alias", |check| !check.output.is_empty()).await;
    assert_eq!(missing.status, HealthStatus::Critical, "a service that is not there is not well");
    world.register(json!({"Name": "web"})).await;
    assert_eq!(world.becomes("alias", HealthStatus::Passing).await.output, "No checks found.");
    let checks = json!([{"CheckID": "one", "TTL": "1h", "Status": "passing"}, {"CheckID": "two", "TTL": "1h", "Status": "passing"}]);
    world.register(json!({"Name": "web", "Checks": checks})).await;
    world.checks.update_ttl("two", HealthStatus::Warning, "slow".to_owned()).await.expect("a TTL check");
    world.becomes("alias", HealthStatus::Warning).await;
    world.checks.update_ttl("one", HealthStatus::Critical, "dead".to_owned()).await.expect("a TTL check");
    let critical = world.becomes("alias", HealthStatus::Critical).await;
    assert!(critical.output.contains("dead"), "{}", critical.output);
    for id in ["one", "two"] {
        world.checks.update_ttl(id, HealthStatus::Passing, "well".to_owned()).await.expect("a TTL check");
    }
    world.becomes("alias", HealthStatus::Passing).await;
}

#[tokio::test]
async fn two_services_that_follow_each_other_recover() {
    let world = World::new().await;
    world.register(json!({"Name": "a", "Checks": [{"CheckID": "a-own", "TTL": "1h", "Status": "passing"}, {"CheckID": "a-b", "AliasService": "b"}]})).await;
    world.register(json!({"Name": "b", "Checks": [{"CheckID": "b-a", "AliasService": "a"}]})).await;
    world.becomes("b-a", HealthStatus::Passing).await;
    world.checks.update_ttl("a-own", HealthStatus::Critical, "dead".to_owned()).await.expect("a TTL check");
    world.becomes("b-a", HealthStatus::Critical).await;
    world.checks.update_ttl("a-own", HealthStatus::Passing, "well".to_owned()).await.expect("a TTL check");
    world.becomes("b-a", HealthStatus::Passing).await;
    world.becomes("a-b", HealthStatus::Passing).await;
}

#[tokio::test(start_paused = true)]
async fn a_service_that_stays_critical_is_deregistered_when_it_said_so() {
    let world = World::new().await;
    let check = json!({"TTL": "10s", "DeregisterCriticalServiceAfter": "2m"});
    world.register(json!({"Name": "web", "Check": check})).await;
    world.register(json!({"Name": "other", "Check": {"TTL": "10s"}})).await;
    tokio::time::sleep(Duration::from_secs(110)).await;
    assert!(world.ledger.state().service("n1", "web").is_some());
    tokio::time::sleep(Duration::from_secs(70)).await;
    let state = world.ledger.state();
    assert!(state.service("n1", "web").is_none() && state.service("n1", "other").is_some());
}
