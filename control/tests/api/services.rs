//! Registration, catalog and health, from outside.

use culvert_api::ServiceRegistration;
use culvert_control::store::Table;
use serde_json::{Value, json};

use crate::client::Server;

async fn register(server: &Server, body: Value) {
    server.put("/v1/agent/service/register", body).await.ok();
}

/// Names or IDs of a list.
fn list(answer: &Value, field: &str) -> Vec<String> {
    let items = answer.as_array().expect("an array");
    items.iter().map(|item| item.pointer(field).and_then(Value::as_str).expect("text").to_owned()).collect()
}

#[tokio::test]
async fn a_registered_service_is_found_everywhere() {
    let server = Server::start().await;
    register(&server, json!({
        "ID": "web-1", "Name": "web", "Port": 80, "Tags": ["v1", "Blue"], "Meta": {"team": "a"}, "Address": "10.0.0.1",
        "Check": {"TTL": "1h", "Status": "passing"}, "Connect": {"SidecarService": {"Port": 21000}},
    }))
    .await;
    register(&server, json!({"ID": "web-2", "Name": "web", "Port": 81, "Tags": ["v2"], "Check": {"TTL": "1h"}})).await;

    assert_eq!(server.get("/v1/catalog/services").await.ok()["web"], json!(["Blue", "v1", "v2"]));
    let found = server.get("/v1/catalog/service/web?tag=blue&tag=v1&near=_agent").await.ok();
    assert_eq!(list(&found, "/ServiceID"), ["web-1"]);
    let item = &found[0];
    assert_eq!(
        (&item["Node"], &item["Address"], &item["ServiceAddress"]),
        (&json!("n1"), &json!("127.0.0.1"), &json!("10.0.0.1"))
    );
    assert_eq!(item["ServiceTaggedAddresses"]["lan_ipv4"], json!({"Address": "10.0.0.1", "Port": 80}));
    assert_eq!(list(&server.get("/v1/catalog/connect/web").await.ok(), "/ServiceID"), ["web-1-sidecar-proxy"]);

    let all = server.get("/v1/health/service/web").await.ok();
    assert_eq!(list(&all, "/Service/ID"), ["web-1", "web-2"]);
    assert_eq!(list(&all[0]["Checks"], "/CheckID"), ["serfHealth", "service:web-1"]);
    assert_eq!(all[0]["Node"]["Meta"]["consul-network-segment"], "");
    assert_eq!(list(&server.get("/v1/health/service/web?passing").await.ok(), "/Service/ID"), ["web-1"]);
    assert_eq!(list(&server.get("/v1/health/service/web?passing=false").await.ok(), "/Service/ID"), ["web-1", "web-2"]);
    let filter = "/v1/health/service/web?filter=Service.Meta.team%20==%20a%20and%20%22v1%22%20in%20Service.Tags";
    assert_eq!(list(&server.get(filter).await.ok(), "/Service/ID"), ["web-1"]);
    assert_eq!(server.get("/v1/health/service/web?node-meta=none:such").await.ok(), json!([]));
    let segment = "/v1/health/service/web?node-meta=consul-network-segment:";
    assert_eq!(list(&server.get(segment).await.ok(), "/Service/ID"), ["web-1", "web-2"]);
    assert_eq!(list(&server.get("/v1/health/connect/web").await.ok(), "/Service/ID"), ["web-1-sidecar-proxy"]);
    assert_eq!(server.get("/v1/health/service/nobody").await.ok(), json!([]));

    let critical = server.get("/v1/health/state/critical?filter=Type%20==%20ttl").await.ok();
    assert_eq!(list(&critical, "/CheckID"), ["service:web-2"]);
    assert_eq!(list(&server.get("/v1/health/checks/web").await.ok(), "/CheckID"), ["service:web-1", "service:web-2"]);
    assert!(list(&server.get("/v1/health/node/n1").await.ok(), "/CheckID").contains(&"serfHealth".to_owned()));
    let node = server.get("/v1/catalog/node/n1").await.ok();
    assert_eq!(node["Node"]["TaggedAddresses"]["lan"], "127.0.0.1");
    assert_eq!(node["Services"]["web-1-sidecar-proxy"]["Proxy"]["DestinationServiceID"], "web-1");
    assert_eq!(server.get("/v1/catalog/node/none").await.ok(), Value::Null);
    let by_node = server.get("/v1/catalog/node-services/n1?filter=Kind%20==%20%22connect-proxy%22").await.ok();
    assert_eq!(list(&by_node["Services"], "/ID"), ["web-1-sidecar-proxy"]);
    let proxies = server.get("/v1/agent/services?filter=Kind%20==%20%22connect-proxy%22").await.ok();
    assert_eq!(proxies.as_object().expect("an object").keys().collect::<Vec<_>>(), ["web-1-sidecar-proxy"]);
    assert!(server.get("/v1/agent/checks").await.ok().get("serfHealth").is_none());
}

#[tokio::test]
async fn health_of_a_service_is_a_status_code() {
    let server = Server::start().await;
    register(&server, json!({"ID": "a", "Name": "web", "Check": {"CheckID": "ttl", "TTL": "1h"}})).await;
    register(&server, json!({"ID": "b", "Name": "web"})).await;
    for (verb, code, word) in [("pass", 200, "passing"), ("warn", 429, "warning"), ("fail", 503, "critical")] {
        server.put(&format!("/v1/agent/check/{verb}/ttl?note=said%20{verb}"), Value::Null).await.ok();
        let by_id = server.get("/v1/agent/health/service/id/a").await;
        assert_eq!((by_id.status, by_id.header("x-consul-reason")), (code, word));
        let body = by_id.json();
        assert_eq!((&body["AggregatedStatus"], &body["Service"]["ID"]), (&json!(word), &json!("a")));
        let output = body["Checks"].as_array().expect("checks").iter().find(|check| check["CheckID"] == "ttl");
        assert_eq!(output.expect("there")["Output"], format!("said {verb}"));
        let by_name = server.get("/v1/agent/health/service/name/web?format=text").await;
        assert_eq!((by_name.status, by_name.body.as_str()), (code, word), "the worst instance wins");
    }
    let update = json!({"Status": "passing", "Output": "well"});
    server.put("/v1/agent/check/update/ttl", update).await.ok();
    assert_eq!(server.get("/v1/agent/checks").await.ok()["ttl"]["Output"], "well");
    let wrong = server.put("/v1/agent/check/update/ttl", json!({"Status": "fine"})).await;
    assert_eq!((wrong.status, wrong.body.as_str()), (400, "Invalid check status: 'fine'"));

    server.put("/v1/agent/service/maintenance/a?enable=true&reason=works", Value::Null).await.ok();
    let maintained = server.get("/v1/agent/health/service/id/a?format=text").await;
    assert_eq!((maintained.status, maintained.body.as_str()), (503, "maintenance"));
    assert_eq!(server.get("/v1/agent/checks").await.ok()["_service_maintenance:a"]["Notes"], "works");
    server.put("/v1/agent/service/maintenance/a?enable=false", Value::Null).await.ok();
    assert_eq!(server.get("/v1/agent/health/service/id/a").await.status, 200);
    server.put("/v1/agent/maintenance?enable=true", Value::Null).await.ok();
    assert_eq!(server.get("/v1/health/service/web?passing").await.ok(), json!([]));
    server.put("/v1/agent/maintenance?enable=false", Value::Null).await.ok();
    for (path, text) in
        [("id/none", "ServiceId none not found"), ("name/none?format=text", "ServiceName none Not Found")]
    {
        let answer = server.get(&format!("/v1/agent/health/service/{path}")).await;
        assert_eq!((answer.status, answer.body.as_str()), (404, text));
    }
    let not_ttl = json!({"Name": "tcp", "TCP": "127.0.0.1:1", "Interval": "1h"});
    server.put("/v1/agent/check/register", not_ttl).await.ok();
    let refused = server.put("/v1/agent/check/pass/tcp", Value::Null).await;
    assert_eq!((refused.status, refused.body.as_str()), (500, "CheckID \"tcp\" does not have associated TTL"));
}

#[tokio::test]
async fn ids_may_hold_anything_that_a_path_can_carry() {
    let server = Server::start().await;
    let id = "a/b:c d";
    register(&server, json!({"ID": id, "Name": "odd", "Check": {"CheckID": "x/y z", "TTL": "1h"}})).await;
    assert_eq!(server.get("/v1/agent/service/a%2Fb:c%20d").await.ok()["ID"], id);
    assert_eq!(server.get("/v1/agent/service/a/b:c%20d").await.ok()["ID"], id);
    server.put("/v1/agent/check/pass/x%2Fy%20z", Value::Null).await.ok();
    server.put("/v1/agent/check/deregister/x/y%20z", Value::Null).await.ok();
    server.put("/v1/agent/service/deregister/a%2Fb%3Ac%20d", Value::Null).await.ok();
    assert_eq!(server.get("/v1/agent/services").await.ok(), json!({}));
}

#[tokio::test]
async fn the_job_runner_and_the_api_share_one_way_in() {
    let server = Server::start().await;
    let body = json!({"Name": "web", "Port": 80, "Connect": {"SidecarService": {}}});
    let typed = ServiceRegistration::decode(body.to_string().as_bytes()).expect("a body");
    let registered = server.control.register_service(typed).await.expect("registered");
    assert_eq!(registered.sidecar_port, Some(21000));
    let before = server.control.state().index(Table::Services);
    register(&server, body).await;
    assert_eq!(server.control.state().index(Table::Services), before);
    server.control.deregister_service("web").await.expect("deregistered");
    assert_eq!(server.get("/v1/agent/services").await.ok(), json!({}));
}

/// Consul takes them with a warning, so they are taken; but whoever carries an identity is a segment of its SPIFFE ID.
#[tokio::test]
async fn a_name_that_no_identity_can_have_stays_outside_of_the_mesh() {
    let server = Server::start().await;
    let path = "/v1/agent/service/register";
    for name in ["team/web", "a b", "web..1"] {
        register(&server, json!({"ID": "one", "Name": name, "Port": 80})).await;
        assert_eq!(server.get("/v1/agent/service/one").await.ok()["Service"], name);
        let meshed = [
            json!({"Name": name, "Port": 80, "Connect": {"SidecarService": {}}}),
            json!({"Name": name, "Port": 80, "Connect": {"Native": true}}),
            json!({"Name": "p", "Port": 80, "Kind": "connect-proxy", "Proxy": {"DestinationServiceName": name}}),
            json!({"Name": "p", "Port": 80, "Connect": {"SidecarService": {"Proxy": {"Upstreams": [
                {"DestinationName": name, "LocalBindPort": 9000}
            ]}}}}),
        ];
        for body in meshed {
            let refused = server.put(path, body).await;
            assert!(refused.status == 400 && refused.body.contains(&format!("name {name:?}")), "{refused:?}");
        }
        let at = name.replace(' ', "%20");
        assert_eq!(server.get(&format!("/v1/agent/connect/ca/leaf/{at}")).await.status, 400, "{name}");
        let intention = format!("/v1/connect/intentions/exact?source=a&destination={}", at.replace('/', "%2F"));
        assert_eq!(server.put(&intention, json!({"Action": "allow"})).await.status, 400, "{name}");
        let asked = json!({"Target": name, "ClientCertURI": "spiffe://td/ns/default/dc/dc1/svc/a"});
        let asked = server.send("POST", "/v1/agent/connect/authorize", asked.to_string()).await;
        assert_eq!(asked.status, 400, "{name}");
    }
}
