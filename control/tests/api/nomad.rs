//! What a real Nomad 1.1 sent to a real Consul 1.10, sent again here; answers are held against the recorded ones and against
//! what Nomad compares on every sync.

use culvert_control::store::Table;
use serde_json::{Map, Value, json};

use crate::client::Server;

/// Recorded requests and answers, in order.
fn recording() -> Vec<Value> {
    serde_json::from_str(include_str!("../fixtures/nomad-1.1.json")).expect("JSON")
}

/// The service of one recorded check; its own registration was not recorded.
const RPC_SERVICE: &str = "_nomad-server-umwiqm4bgatz6gr5jeff467gaudac5li";

#[tokio::test]
async fn recorded_requests_get_the_recorded_answers() {
    let server = Server::start().await;
    server.put("/v1/agent/service/register", json!({"ID": RPC_SERVICE, "Name": "nomad", "Tags": ["rpc"]})).await.ok();
    for exchange in recording() {
        let (method, path) = (exchange["method"].as_str().expect("text"), exchange["path"].as_str().expect("text"));
        // The sidecar leaves with its service already; Nomad deregisters it all the same and takes 404 for done.
        let repeated = path.contains("/deregister/") && path.ends_with("-sidecar-proxy");
        let body = if exchange["request"].is_null() { String::new() } else { exchange["request"].to_string() };
        let answer = server.send(method, path, body).await;
        let status = if repeated { 404 } else { exchange["status"].as_u64().expect("a number") };
        assert_eq!(u64::from(answer.status), status, "{method} {path}: {answer:?}");
        if exchange["response"].is_object() {
            let (mut ours, mut theirs) = (answer.json(), exchange["response"].clone());
            for body in [&mut ours, &mut theirs] {
                let hash = body.as_object_mut().expect("an object").remove("ContentHash").expect("a hash");
                assert_eq!(hash.as_str().expect("text").len(), 16);
            }
            assert_eq!(ours, theirs, "{path}");
        } else if status == 200 {
            assert_eq!(answer.body, "", "{path}");
        }
        if path.ends_with("/service/register") {
            sync_finds_no_difference(&server, &exchange["request"]).await;
            // Checks run meanwhile and may write; services have no other writer.
            let before = server.control.state().index(Table::Services);
            server.put(path, exchange["request"].clone()).await.ok();
            let after = server.control.state().index(Table::Services);
            assert_eq!(after, before, "a registration that is repeated is free: {path}");
        }
    }
}

#[tokio::test]
async fn checks_keep_the_ids_that_nomad_looks_for() {
    let server = Server::start().await;
    let request = recording().into_iter().find(|exchange| exchange["request"].to_string().contains("count-api"));
    server.put("/v1/agent/service/register", request.expect("recorded")["request"].clone()).await.ok();
    let checks = server.get("/v1/agent/checks").await.ok();
    let ids: Vec<&String> = checks.as_object().expect("an object").keys().collect();
    let sidecar = "service:_nomad-task-c291acee-132e-2c6c-44b6-d5eb270a9ed2-group-api-count-api-9001-sidecar-proxy";
    assert_eq!(ids, [&format!("{sidecar}:1"), &format!("{sidecar}:2")]);
    assert_eq!(checks[format!("{sidecar}:1")]["Type"], "alias");
    assert_eq!(checks[format!("{sidecar}:2")]["Type"], "tcp");
}

/// Registrations as newer Nomads send them.
#[tokio::test]
async fn every_compared_field_is_echoed() {
    let server = Server::start().await;
    let body = json!({
        "ID": "_nomad-task-1-group-web-web-80", "Name": "web", "Tags": ["b", "a"], "Port": 80, "Address": "10.0.0.1",
        "EnableTagOverride": true, "Meta": {"external-source": "nomad", "x": "y"},
        "TaggedAddresses": {"lan": {"Address": "10.0.0.1", "Port": 80}, "wan": {"Address": "192.0.2.1", "Port": 8080}},
        "Weights": {"Passing": 3, "Warning": 2}, "Check": null, "Checks": null,
        "Connect": {"SidecarService": {"Tags": ["proxy"], "Port": 21500, "Proxy": {
            "Config": {"bind_address": "0.0.0.0", "bind_port": 21500, "envoy_stats_tags": ["nomad.job=web"]},
            "Upstreams": [
                {"DestinationName": "api", "DestinationType": "service", "DestinationNamespace": "default",
                 "DestinationPartition": "default", "Datacenter": "dc1", "LocalBindAddress": "127.0.0.2", "LocalBindPort": 8080,
                 "MeshGateway": {"Mode": "none"}, "Config": {"connect_timeout_ms": 500}},
                {"DestinationName": "db", "LocalBindPort": 5432, "MeshGateway": {}},
            ]}}},
    });
    server.put("/v1/agent/service/register?replace-existing-checks=true", body.clone()).await.ok();
    sync_finds_no_difference(&server, &body).await;
}

/// What Nomad does every 30 s: compares its registration with `/v1/agent/services`.
async fn sync_finds_no_difference(server: &Server, wanted: &Value) {
    let services = server.get("/v1/agent/services").await.ok();
    let id = wanted["ID"].as_str().expect("text");
    let service = &services[id];
    let or = |value: &Value, default: Value| if value.is_null() { default } else { value.clone() };
    assert_eq!(or(&service["Kind"], json!("")), or(&wanted["Kind"], json!("")));
    for (ours, theirs, default) in [
        ("ID", "ID", json!("")),
        ("Service", "Name", json!("")),
        ("Tags", "Tags", json!([])),
        ("Port", "Port", json!(0)),
        ("Address", "Address", json!("")),
        ("Meta", "Meta", json!({})),
        ("EnableTagOverride", "EnableTagOverride", json!(false)),
        ("Weights", "Weights", json!({"Passing": 1, "Warning": 1})),
    ] {
        assert_eq!(service[ours], or(&wanted[theirs], default), "{id}: {ours}");
    }
    let empty = Map::new();
    let given = wanted["TaggedAddresses"].as_object().unwrap_or(&empty);
    for (tag, address) in service["TaggedAddresses"].as_object().unwrap_or(&empty) {
        match given.get(tag) {
            Some(given) => assert_eq!(address, given),
            None => {
                assert!(["lan_ipv4", "lan_ipv6", "wan_ipv4", "wan_ipv6"].contains(&tag.as_str()), "{tag} was added")
            }
        }
    }
    assert!(given.keys().all(|tag| service["TaggedAddresses"].get(tag).is_some()));
    let declared = &wanted["Connect"]["SidecarService"];
    let sidecar = &services[format!("{id}-sidecar-proxy")];
    assert_eq!(sidecar.is_null(), declared.is_null(), "{id}: sidecar");
    if declared.is_null() {
        return;
    }
    assert_eq!(sidecar["Tags"], or(&declared["Tags"], service["Tags"].clone()));
    let upstreams = |proxy: &Value| proxy["Upstreams"].as_array().cloned().unwrap_or_default();
    let (ours, theirs) = (upstreams(&sidecar["Proxy"]), upstreams(&declared["Proxy"]));
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        for field in [
            "DestinationName",
            "DestinationNamespace",
            "DestinationPartition",
            "DestinationPeer",
            "DestinationType",
            "Datacenter",
            "LocalBindAddress",
            "LocalBindPort",
            "LocalBindSocketPath",
            "LocalBindSocketMode",
            "Config",
        ] {
            assert_eq!(ours[field], theirs[field], "{id}: {field}");
        }
        assert_eq!(ours["MeshGateway"]["Mode"], theirs["MeshGateway"]["Mode"]);
    }
}
