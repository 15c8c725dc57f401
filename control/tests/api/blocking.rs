//! Reads that wait.

use std::sync::Arc;
use std::time::Duration;

use culvert_control::Reloadable;
use culvert_types::{Action, Encryption};
use serde_json::{Value, json};

use crate::client::{Answer, PATIENCE, Server};

/// Blocked readers in the large test.
const READERS: usize = 300;

pub(crate) async fn blocked(server: &Arc<Server>, path: String) -> tokio::task::JoinHandle<Answer> {
    let server = Arc::clone(server);
    tokio::spawn(async move { server.get(&path).await })
}

async fn register(server: &Server, name: &str, port: u16) {
    server.put("/v1/agent/service/register", json!({"Name": name, "Port": port})).await.ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_readers_wait_and_only_those_concerned_wake() {
    let server = Arc::new(Server::start().await);
    for n in 0..3 {
        register(&server, &format!("s{n}"), 80).await;
    }
    let mut readers = Vec::new();
    for n in 0..READERS {
        let path = format!("/v1/health/service/s{}", n % 3);
        let index = server.get(&path).await.index();
        readers.push((n % 3, blocked(&server, format!("{path}?index={index}&wait=10m")).await));
    }
    register(&server, "unrelated", 1).await;
    register(&server, "s0", 81).await;
    for (service, reader) in &mut readers {
        if *service == 0 {
            let answer = tokio::time::timeout(PATIENCE, reader).await.expect("woken").expect("no panic");
            assert_eq!(answer.ok()[0]["Service"]["Port"], 81);
        } else {
            assert!(!reader.is_finished(), "s{service} did not change");
        }
    }
    // Shutdown answers who waits, with what there is.
    server.control.shutdown().await;
    for (_, reader) in readers.into_iter().filter(|(service, _)| *service != 0) {
        let answer = tokio::time::timeout(PATIENCE, reader).await.expect("answered").expect("no panic");
        assert_eq!(answer.ok()[0]["Service"]["Port"], 80);
    }
}

#[tokio::test]
async fn a_wait_that_ends_gives_the_same_index_and_data() {
    let server = Server::start().await;
    register(&server, "web", 80).await;
    let first = server.get("/v1/catalog/service/web").await;
    let second = server.get(&format!("/v1/catalog/service/web?index={}&wait=100ms", first.index())).await;
    assert_eq!((second.index(), second.body), (first.index(), first.body));
}

#[tokio::test]
async fn every_change_between_two_reads_is_seen() {
    let server = Arc::new(Server::start().await);
    let mut index = server.get("/v1/catalog/service/web").await.index();
    let writer = {
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            for port in 1..=50 {
                register(&server, "web", port).await;
            }
        })
    };
    let mut last = 0;
    while last < 50 {
        let answer = server.get(&format!("/v1/catalog/service/web?index={index}&wait=10m")).await;
        assert!(answer.index() > index, "an answer before the end of the wait is a change");
        index = answer.index();
        let port = answer.ok()[0]["ServicePort"].as_u64().expect("a number");
        assert!(port > last, "{port} after {last}");
        last = port;
    }
    writer.await.expect("no panic");
}

#[tokio::test]
async fn an_agent_service_is_awaited_by_its_hash() {
    let server = Arc::new(Server::start().await);
    register(&server, "web", 80).await;
    let first = server.get("/v1/agent/service/web").await;
    let hash = first.header("x-consul-contenthash").to_owned();
    assert_eq!(first.ok()["ContentHash"], hash);
    let same = server.get(&format!("/v1/agent/service/web?hash={hash}&wait=100ms")).await;
    assert_eq!(same.header("x-consul-contenthash"), hash);
    let waiting = blocked(&server, format!("/v1/agent/service/web?hash={hash}&wait=10m")).await;
    register(&server, "unrelated", 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    register(&server, "web", 81).await;
    let changed = tokio::time::timeout(PATIENCE, waiting).await.expect("woken").expect("no panic");
    assert_eq!(changed.ok()["Port"], 81);
    let hash = changed.header("x-consul-contenthash").to_owned();
    let waiting = blocked(&server, format!("/v1/agent/service/web?hash={hash}&wait=10m")).await;
    server.put("/v1/agent/service/deregister/web", Value::Null).await.ok();
    let gone = tokio::time::timeout(PATIENCE, waiting).await.expect("woken").expect("no panic");
    assert_eq!(gone.status, 404);
}

#[tokio::test]
async fn intentions_wake_their_readers_and_nobody_elses() {
    let server = Arc::new(Server::start().await);
    register(&server, "web", 80).await;
    let index = |path: &'static str| {
        let server = Arc::clone(&server);
        async move { server.get(path).await.index() }
    };
    let list = format!("/v1/connect/intentions?index={}&wait=10m", index("/v1/connect/intentions").await);
    let health = format!("/v1/health/service/web?index={}&wait=10m", index("/v1/health/service/web").await);
    let (list, health) = (blocked(&server, list).await, blocked(&server, health).await);
    let rule = json!({"Action": "deny"});
    server.put("/v1/connect/intentions/exact?source=web&destination=api", rule).await.ok();
    let woken = tokio::time::timeout(PATIENCE, list).await.expect("woken").expect("no panic");
    assert_eq!(woken.ok().as_array().expect("an array").len(), 1);
    assert!(!health.is_finished());
    health.abort();
}

#[tokio::test]
async fn who_waits_for_a_verdict_wakes_for_intentions_and_for_another_default() {
    let server = Arc::new(Server::start().await);
    let path = "/v1/connect/intentions/check?source=web&destination=api";
    let first = server.get(path).await;
    assert_eq!(first.ok()["Allowed"], true);
    let same = server.get(&format!("{path}&index={}&wait=100ms", first.index())).await;
    assert_eq!((same.index(), same.ok()), (first.index(), first.ok()));

    let next = |before: &Answer| blocked(&server, format!("{path}&index={}&wait=10m", before.index()));
    let waiting = next(&first).await;
    let settings = |default_policy| Reloadable { default_policy, encryption: Encryption::Always };
    server.control.reload(settings(Action::Deny));
    let denied = tokio::time::timeout(PATIENCE, waiting).await.expect("woken").expect("no panic");
    assert!(denied.ok()["Allowed"] == false && denied.index() > first.index(), "{denied:?}");

    let waiting = next(&denied).await;
    let rule = json!({"Action": "allow"});
    server.put("/v1/connect/intentions/exact?source=web&destination=api", rule).await.ok();
    let allowed = tokio::time::timeout(PATIENCE, waiting).await.expect("woken").expect("no panic");
    assert!(allowed.ok()["Allowed"] == true && allowed.index() > denied.index(), "{allowed:?}");
    // A change between two reads is not missed, and an index of an earlier run is answered at once.
    server.control.reload(settings(Action::Allow));
    assert!(server.get(&format!("{path}&index={}&wait=10m", allowed.index())).await.index() > allowed.index());
    assert!(server.get(&format!("{path}&index=1000000&wait=10m")).await.index() < 1_000_000);
}
