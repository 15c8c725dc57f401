//! Start, restart, shutdown, and what the rest of the agent sees.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use culvert_control::store::{Operation, RedbStore, RowKey, Store as _, Table, Transaction};
use culvert_control::{Control, MeshView, NodeDialer, Reloadable, StartError};
use culvert_types::{Action, Encryption, HealthStatus};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use crate::client::{NODE_ID, PATIENCE, Server, config};

#[tokio::test]
async fn everything_acknowledged_is_there_after_a_restart() {
    let directory = tempfile::tempdir().expect("a directory");
    let kept = || {
        let mut kept = config();
        kept.data_dir = Some(directory.path().join("data"));
        kept
    };
    let first = Server::with(kept()).await;
    let body = json!({"Name": "web", "Port": 80, "Check": {"TTL": "1h"}, "Connect": {"SidecarService": {}}});
    first.put("/v1/agent/service/register", body.clone()).await.ok();
    first.put("/v1/agent/check/pass/service:web", Value::Null).await.ok();
    first.put("/v1/connect/intentions/exact?source=a&destination=b", json!({"Action": "deny"})).await.ok();
    let reads = ["/v1/agent/services", "/v1/connect/intentions", "/v1/connect/ca/roots"];
    let mut before = Vec::new();
    for path in reads {
        before.push(first.get(path).await.ok());
    }
    let revision = first.control.state().revision();

    let second = Control::start(kept(), Arc::new(NodeDialer)).await.err().expect("one agent per directory");
    assert!(matches!(second, StartError::Store(_)), "{second}");
    assert!(second.to_string().contains("in use by another process"), "{second}");
    let again = first.restart(&kept()).await;
    for (path, before) in reads.iter().zip(before) {
        assert_eq!(again.get(path).await.ok(), before, "{path}");
    }
    assert_eq!(again.get("/v1/health/checks/web").await.ok()[0]["Status"], "passing");
    assert!(again.control.state().revision() >= revision, "the index never goes back");
    // Checks run meanwhile and may write; services have no other writer.
    let index = again.control.state().index(Table::Services);
    again.put("/v1/agent/service/register", body).await.ok();
    assert_eq!(again.control.state().index(Table::Services), index, "re-registration after a restart is free");
}

#[tokio::test]
async fn an_intention_whose_names_an_earlier_build_took_is_listed_and_deleted() {
    let directory = tempfile::tempdir().expect("a directory");
    let row = json!({
        "source": "a..b", "destination": "a-.b", "action": "deny",
        "created_at": {"secs_since_epoch": 1, "nanos_since_epoch": 0},
        "updated_at": {"secs_since_epoch": 1, "nanos_since_epoch": 0},
    });
    let store = RedbStore::open(&directory.path().join("state.redb")).expect("a new store");
    let put = Operation::Put(RowKey::new(Table::Intentions, "a-.b/a..b"), row.to_string().into());
    store.commit(Transaction { guards: Vec::new(), operations: vec![put] }).await.expect("committed");
    drop(store);

    let mut kept = config();
    kept.data_dir = Some(directory.path().to_owned());
    let server = Server::with(kept).await;
    assert_eq!(server.get("/v1/connect/intentions").await.ok()[0]["SourceName"], "a..b");
    let matched = server.get("/v1/connect/intentions/match?by=source&name=a..b").await.ok();
    assert_eq!(matched["a..b"][0]["DestinationName"], "a-.b");
    let exact = "/v1/connect/intentions/exact?source=a..b&destination=a-.b";
    assert_eq!(server.put(exact, json!({"Action": "allow"})).await.status, 400, "no new ones");
    server.send("DELETE", exact, "").await.ok();
    assert_eq!(server.get("/v1/connect/intentions").await.ok(), json!([]));
}

#[tokio::test]
async fn a_node_that_changes_its_name_leaves_nothing_under_the_old_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let named = |name: &str, id: &str| {
        let mut kept = config();
        kept.data_dir = Some(directory.path().join("data"));
        (kept.node_name, kept.node_id) = (name.to_owned(), id.to_owned());
        kept
    };
    let other = Server::with(named("other", "6f0a4b0e-0000-4000-8000-000000000002")).await;
    let first = other.restart(&named("n1", NODE_ID)).await;
    // More rows than one transaction holds.
    for service in 0..6 {
        let checks: Vec<Value> = (0..12).map(|n| json!({"CheckID": format!("{service}-{n}"), "TTL": "1h"})).collect();
        let body =
            json!({"Name": format!("s{service}"), "Port": 80, "Checks": checks, "Connect": {"SidecarService": {}}});
        first.put("/v1/agent/service/register", body).await.ok();
    }
    let second = first.restart(&named("n2", NODE_ID)).await;
    let state = second.control.state();
    let nodes: Vec<&str> = state.nodes().map(|node| node.name.as_str()).collect();
    assert_eq!(nodes, ["n2", "other"], "another node's rows are not ours to remove");
    assert_eq!((state.services().count(), state.checks_on("n1").count()), (0, 0));
    assert_eq!(state.checks_on("n2").count(), 1, "its own");
    assert_eq!(second.get("/v1/health/service/s1").await.ok(), json!([]));
}

#[tokio::test]
async fn the_agents_own_routes_are_served_beside() {
    let mut with_routes = config();
    with_routes.routes = Router::new().route("/v1/culvert/ping", get(async || "pong"));
    let server = Server::with(with_routes).await;
    let pong = server.get("/v1/culvert/ping").await;
    assert_eq!((pong.status, pong.body.as_str()), (200, "pong"));
    assert_eq!(pong.header("x-consul-default-acl-policy"), "allow");
    assert_eq!(server.put("/v1/culvert/ping", Value::Null).await.body, "method PUT not allowed");
}

#[tokio::test]
async fn an_address_or_name_that_does_not_do_is_named() {
    let first = Server::start().await;
    let mut second = config();
    second.http = first.control.http_addrs().to_vec();
    let taken = second.http[0];
    let err = Control::start(second, Arc::new(NodeDialer)).await.err().expect("taken").to_string();
    assert_eq!(err, format!("HTTP API: listen on {taken}"));
    let mut open = config();
    open.grpc = Some(SocketAddr::from(([0, 0, 0, 0], 0)));
    let err = Control::start(open, Arc::new(NodeDialer)).await.err().expect("it would give keys to the network");
    assert!(matches!(err, StartError::GrpcExposed(_)), "{err}");
    let mut bad = config();
    bad.node_name = "a/b".to_owned();
    assert!(matches!(Control::start(bad, Arc::new(NodeDialer)).await, Err(StartError::NodeName(_))));
}

async fn until(control: &Control, wanted: impl FnMut(&Arc<MeshView>) -> bool) -> Arc<MeshView> {
    let mut mesh = control.mesh();
    let view = tokio::time::timeout(PATIENCE, mesh.wait_for(wanted)).await.expect("in time").expect("running");
    Arc::clone(&view)
}

#[tokio::test]
async fn the_mesh_view_follows_catalog_health_intentions_settings_and_certificates() {
    let server = Server::start().await;
    let control = &server.control;
    assert!(until(control, |_| true).await.instances.is_empty());
    let proxy = json!({
        "Config": {"bind_port": 21555}, "Upstreams": [{"DestinationName": "api", "LocalBindPort": 8080}],
    });
    let body = json!({
        "ID": "web-1", "Name": "web", "Port": 9001, "Checks": [{"CheckID": "ttl", "TTL": "1h", "Status": "passing"}],
        "Connect": {"SidecarService": {"Checks": [{"CheckID": "own", "TTL": "1h", "Status": "passing"}], "Proxy": proxy}},
    });
    server.put("/v1/agent/service/register", body.clone()).await.ok();
    let view = until(control, |view| view.instances.iter().any(|web| web.certificate_not_after.is_some())).await;
    let web = &view.instances[0];
    assert_eq!((web.service_id.as_str(), web.sidecar_id.as_str()), ("web-1", "web-1-sidecar-proxy"));
    assert_eq!((web.service.as_str(), web.node.as_str(), web.local_port, web.sidecar_port), ("web", "n1", 9001, 21555));
    assert_eq!((web.health, web.encryption, web.protocol.as_str()), (HealthStatus::Passing, Encryption::Always, "tcp"));
    assert_eq!(web.upstreams[0].destination.as_str(), "api");
    assert_eq!(web.upstreams[0].bind.to_string(), "127.0.0.1:8080");
    assert_eq!(&view.trust_domain, control.authority().trust_domain());
    assert_eq!(view.default_action, Action::Allow);

    server.put("/v1/agent/check/fail/ttl", Value::Null).await.ok();
    until(control, |view| view.instances[0].health == HealthStatus::Critical).await;
    server.put("/v1/connect/intentions/exact?source=web&destination=api", json!({"Action": "deny"})).await.ok();
    until(control, |view| view.intentions.len() == 1).await;
    control.reload(Reloadable { default_policy: Action::Deny, encryption: Encryption::BetweenNodes });
    let view = until(control, |view| view.default_action == Action::Deny).await;
    assert_eq!((view.encryption, view.instances[0].encryption), (Encryption::BetweenNodes, Encryption::BetweenNodes));
    let mut strict = body;
    strict["Connect"]["SidecarService"]["Proxy"]["Config"]["encryption"] = json!("always");
    server.put("/v1/agent/service/register", strict).await.ok();
    until(control, |view| view.instances[0].encryption == Encryption::Always).await;
    server.put("/v1/agent/service/deregister/web-1", Value::Null).await.ok();
    until(control, |view| view.instances.is_empty()).await;
}

#[tokio::test]
async fn the_api_answers_after_the_write_is_visible_everywhere() {
    let server = Server::start().await;
    for n in 1..=20_u16 {
        server.put("/v1/agent/service/register", json!({"Name": "web", "Port": n})).await.ok();
        assert_eq!(server.get("/v1/catalog/service/web").await.ok()[0]["ServicePort"], n);
        assert_eq!(server.control.state().service("n1", "web").expect("there").port, n);
    }
}

#[tokio::test]
async fn numbers_are_offered_for_scraping() {
    let server = Server::start().await;
    server.get("/v1/agent/services").await.ok();
    server.get("/v1/nothing").await;
    let mut registry = Registry::with_prefix("culvert");
    server.control.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("encoded");
    assert!(text.contains("culvert_api_requests_total{method=\"GET\",status=\"200\"} 1"), "{text}");
    assert!(text.contains("culvert_api_requests_total{method=\"GET\",status=\"404\"} 1"), "{text}");
    assert!(text.contains("culvert_api_connections ") && !text.contains("culvert_api_connections 0"), "{text}");
}
