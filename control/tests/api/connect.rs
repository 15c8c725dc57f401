//! Identities and intentions, from outside.

use culvert_control::Reloadable;
use culvert_types::{Action, Encryption};
use serde_json::{Value, json};

use crate::client::Server;

#[tokio::test]
async fn a_leaf_is_given_to_a_service_of_this_node_and_to_nobody_else() {
    let server = Server::start().await;
    let stranger = server.get("/v1/agent/connect/ca/leaf/web").await;
    assert_eq!(stranger.status, 403, "{stranger:?}");
    server.put("/v1/agent/service/register", json!({"Name": "web", "Port": 80})).await.ok();
    let leaf = server.get("/v1/agent/connect/ca/leaf/web").await;
    let body = leaf.ok();
    let roots = server.get("/v1/agent/connect/ca/roots").await.ok();
    let trust_domain = roots["TrustDomain"].as_str().expect("text");
    assert_eq!(body["ServiceURI"], format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/web"));
    assert!(body["CertPEM"].as_str().expect("text").starts_with("-----BEGIN CERTIFICATE-----"));
    assert!(body["PrivateKeyPEM"].as_str().expect("text").starts_with("-----BEGIN EC PRIVATE KEY-----"));
    assert!(leaf.index() > 0 && body["ModifyIndex"] == leaf.index());
    let again = server.get(&format!("/v1/agent/connect/ca/leaf/web?index={}&wait=100ms", leaf.index())).await;
    assert_eq!(again.index(), leaf.index());
    server.put("/v1/agent/service/deregister/web", Value::Null).await.ok();
    assert_eq!(server.get("/v1/agent/connect/ca/leaf/web").await.status, 403);
}

#[tokio::test]
async fn roots_and_configuration_are_public_and_hold_no_key() {
    let server = Server::start().await;
    let roots = server.get("/v1/connect/ca/roots").await.ok();
    let active = &roots["Roots"][0];
    assert_eq!((&active["Active"], &active["ID"]), (&json!(true), &roots["ActiveRootID"]));
    assert_eq!((&active["PrivateKeyType"], &active["PrivateKeyBits"]), (&json!("ec"), &json!(256)));
    let pem = server.get("/v1/connect/ca/roots?pem=true").await;
    assert_eq!(pem.header("content-type"), "application/pem-certificate-chain");
    assert!(pem.body.contains(active["RootCert"].as_str().expect("text").trim()));
    let configuration = server.get("/v1/connect/ca/configuration").await;
    assert_eq!(configuration.ok()["Provider"], "consul");
    assert_eq!(configuration.ok()["Config"]["LeafCertTTL"], "72h0m0s");
    for answer in [pem, configuration, server.get("/v1/connect/ca/roots").await] {
        assert!(!answer.body.contains("PRIVATE KEY"), "{answer:?}");
    }
}

async fn authorize(server: &Server, uri: &str, target: &str) -> Value {
    let body = json!({"Target": target, "ClientCertURI": uri, "ClientCertSerial": "01"});
    server.send("POST", "/v1/agent/connect/authorize", body.to_string()).await.ok()
}

#[tokio::test]
async fn intentions_are_written_listed_matched_and_obeyed() {
    let server = Server::start().await;
    let exact = |source: &str, destination: &str| {
        format!("/v1/connect/intentions/exact?source={source}&destination={destination}")
    };
    let deny = json!({"Action": "deny", "Description": "closed", "Meta": {"a": "b"}, "SourceType": "consul"});
    assert_eq!(server.put(&exact("web", "api"), deny.clone()).await.ok(), json!(true));
    assert_eq!(server.put(&exact("*", "api"), json!({"Action": "allow"})).await.ok(), json!(true));
    assert_eq!(server.put(&exact("default/web", "*"), json!({"Action": "allow"})).await.ok(), json!(true));

    let intention = server.get(&exact("web", "api")).await.ok();
    for (field, value) in [
        ("SourceName", json!("web")),
        ("SourceNS", json!("default")),
        ("DestinationName", json!("api")),
        ("DestinationNS", json!("default")),
        ("SourceType", json!("consul")),
        ("Action", json!("deny")),
        ("Precedence", json!(9)),
        ("Description", json!("closed")),
        ("Meta", json!({"a": "b"})),
    ] {
        assert_eq!(intention[field], value, "{field}");
    }
    assert!(intention["CreatedAt"].as_str().expect("a time").starts_with("20") && intention["Hash"].is_string());
    assert!(intention.get("ID").is_none());
    let before = server.get("/v1/connect/intentions").await.index();
    server.put(&exact("web", "api"), deny).await.ok();
    assert_eq!(server.get("/v1/connect/intentions").await.index(), before, "the same again is no change");
    let precedence = |list: &Value| -> Vec<u64> {
        list.as_array().expect("an array").iter().map(|item| item["Precedence"].as_u64().expect("a number")).collect()
    };
    assert_eq!(precedence(&server.get("/v1/connect/intentions").await.ok()), [9, 8, 6]);
    let filtered = server.get("/v1/connect/intentions?filter=Action%20==%20deny").await.ok();
    assert_eq!(precedence(&filtered), [9]);
    let matched = server.get("/v1/connect/intentions/match?by=destination&name=api&name=db").await.ok();
    assert_eq!((precedence(&matched["api"]), precedence(&matched["db"])), (vec![9, 8, 6], vec![6]));
    let names = ["default/api", "default/default/api", "*"];
    let asked = names.map(|name| format!("&name={name}")).concat();
    let matched = server.get(&format!("/v1/connect/intentions/match?by=destination{asked}")).await.ok();
    assert_eq!(names.map(|name| precedence(&matched[name])), [vec![9, 8, 6], vec![9, 8, 6], vec![6]], "{matched}");

    let allowed = async |source: &str, destination: &str| {
        let path = format!("/v1/connect/intentions/check?source={source}&destination={destination}");
        server.get(&path).await.ok()["Allowed"].as_bool().expect("a verdict")
    };
    assert!(!allowed("web", "api").await && allowed("other", "api").await && allowed("web", "db").await);
    let uri = "spiffe://td.consul/ns/default/dc/dc1/svc/web";
    let verdict = authorize(&server, uri, "api").await;
    let reason = "Matched L4 intention: default/web => default/api (Precedence: 9, Action: DENY)";
    assert_eq!(verdict, json!({"Authorized": false, "Reason": reason}));
    assert_eq!(server.send("DELETE", &exact("web", "api"), "").await.ok(), json!(true));
    assert!(authorize(&server, uri, "api").await["Authorized"] == true);

    assert_eq!(authorize(&server, uri.replace("web", "x").as_str(), "y").await["Reason"], "Default intention policy");
    let settings = Reloadable { default_policy: Action::Deny, encryption: Encryption::Always };
    server.control.reload(settings);
    assert!(authorize(&server, uri.replace("web", "x").as_str(), "y").await["Authorized"] == false);
}

#[tokio::test]
async fn the_old_intention_api_still_works() {
    let server = Server::start().await;
    let body = json!({"SourceName": "web", "DestinationName": "api", "SourceType": "consul", "Action": "allow"});
    let post = async |body: &Value| server.send("POST", "/v1/connect/intentions", body.to_string()).await;
    let id = post(&body).await.ok()["ID"].as_str().expect("an ID").to_owned();
    let duplicate = post(&body).await;
    assert_eq!(duplicate.status, 500);
    let text = format!("default/web => default/api (ID: {id}, Precedence: 9, Action: ALLOW)");
    assert_eq!(duplicate.body, format!("duplicate intention found: {text}"));
    server.put("/v1/connect/intentions/exact?source=db&destination=api", json!({"Action": "deny"})).await.ok();
    let duplicate = post(&json!({"SourceName": "db", "DestinationName": "api", "Action": "allow"})).await;
    let text = "duplicate intention found: default/db => default/api (Precedence: 9, Action: DENY)";
    assert_eq!((duplicate.status, duplicate.body.as_str()), (500, text));
    // What is wrong with an intention is 500 here as well.
    let long = "x".repeat(600);
    for (field, value, text) in [
        ("Action", "maybe", "Action must be set to 'allow' or 'deny'"),
        ("SourceName", "team/web", "there is no namespace but \"default\""),
        ("DestinationName", "we*", "destination: name \"we*\""),
        ("Description", long.as_str(), "Description exceeds maximum length 512"),
    ] {
        let mut wrong = json!({"SourceName": "new", "DestinationName": "api", "Action": "allow"});
        wrong[field] = json!(value);
        let answer = post(&wrong).await;
        assert!(answer.status == 500 && answer.body.contains(text), "{field}: {answer:?}");
    }
    assert_eq!(server.send("POST", "/v1/connect/intentions?ns=team", body.to_string()).await.status, 400);
    let mut with_id = body.clone();
    with_id["ID"] = json!("x");
    assert_eq!(post(&with_id).await.body, "ID must be empty when creating a new intention");
    let broken = server.send("POST", "/v1/connect/intentions", "{").await;
    assert!(broken.status == 500 && broken.body.starts_with("Failed to decode request body: "), "{broken:?}");
    let path = format!("/v1/connect/intentions/{id}");
    assert_eq!(server.get(&path).await.ok()["ID"], id);
    let mut deny = body.clone();
    deny["Action"] = json!("deny");
    assert_eq!(server.put(&path, deny).await.ok()["ID"], id);
    assert_eq!(server.get(&path).await.ok()["Action"], "deny");
    assert_eq!(server.send("DELETE", &path, "").await.ok(), json!(true));
    assert_eq!(server.get(&path).await.status, 404);
}

#[tokio::test]
async fn intentions_that_cannot_be_kept_are_refused() {
    let server = Server::start().await;
    for (query, body, text) in [
        ("source=web&destination=api", json!({}), "Action must be set to 'allow' or 'deny'"),
        ("source=web&destination=api", json!({"Action": "maybe"}), "Action must be set to 'allow' or 'deny'"),
        (
            "source=web&destination=api",
            json!({"Permissions": [{"Action": "allow"}]}),
            "L7 intentions are not supported",
        ),
        ("source=we*&destination=api", json!({"Action": "allow"}), "source: name \"we*\""),
        ("source=other/web&destination=api", json!({"Action": "allow"}), "there is no namespace but \"default\""),
        ("source=web&destination=api", json!({"Action": "allow", "SourceName": "x"}), "is not \"web\" of the query"),
        (
            "source=web&destination=api",
            json!({"Action": "allow", "SourceType": "vm"}),
            "SourceType must be set to 'consul'",
        ),
        ("source=web&destination=api", json!({"Action": "allow", "SourcePeer": "p"}), "SourcePeer"),
        ("destination=api", json!({"Action": "allow"}), "required query parameter 'source' not set"),
    ] {
        let answer = server.put(&format!("/v1/connect/intentions/exact?{query}"), body.clone()).await;
        assert_eq!(answer.status, 400, "{query} {body}: {answer:?}");
        assert!(answer.body.contains(text), "{query} {body}: {answer:?}");
    }
    for (body, text) in [
        (json!({"ClientCertURI": "spiffe://td/x"}), "Target service must be specified"),
        (
            json!({"Target": "api", "ClientCertURI": "spiffe://td/x", "Namespace": "team"}),
            "Namespace \"team\": Namespaces are a Consul Enterprise feature",
        ),
        (json!({"Target": "api", "ClientCertURI": "http://x"}), "ClientCertURI not a valid Connect identifier"),
        (json!({"Target": "api", "ClientCertURI": "spiffe://td/x"}), "ClientCertURI not a valid Service identifier"),
    ] {
        let answer = server.send("POST", "/v1/agent/connect/authorize", body.to_string()).await;
        assert_eq!((answer.status, answer.body.as_str()), (400, text));
    }
}

#[tokio::test]
async fn intentions_are_shown_as_config_entries_by_destination() {
    let server = Server::start().await;
    assert_eq!(server.get("/v1/config/service-intentions").await.ok(), json!([]));
    let missing = server.get("/v1/config/service-intentions/api").await;
    let text = "Config entry not found for \"service-intentions\" / \"api\"";
    assert_eq!((missing.status, missing.body.as_str()), (404, text));
    let web = json!({"SourceName": "web", "DestinationName": "api", "Action": "allow", "Meta": {"team": "core"}});
    let id = server.send("POST", "/v1/connect/intentions", web.to_string()).await.ok()["ID"].clone();
    for (pair, body) in [
        ("source=*&destination=api", json!({"Action": "deny", "Description": "closed"})),
        ("source=web&destination=*", json!({"Action": "deny"})),
    ] {
        server.put(&format!("/v1/connect/intentions/exact?{pair}"), body).await.ok();
    }
    let answer = server.get("/v1/config/service-intentions/api").await;
    let api = answer.ok();
    assert_eq!((&api["Kind"], &api["Name"]), (&json!("service-intentions"), &json!("api")));
    let (first, second) = (&api["Sources"][0], &api["Sources"][1]);
    for (field, value) in
        [("Name", json!("web")), ("Action", json!("allow")), ("Precedence", json!(9)), ("LegacyID", id)]
    {
        assert_eq!(first[field], value, "{field}");
    }
    assert_eq!((&first["Type"], &first["LegacyMeta"]), (&json!("consul"), &json!({"team": "core"})));
    let open = json!({"Name": "*", "Action": "deny", "Precedence": 8, "Type": "consul", "Description": "closed"});
    assert_eq!(second, &open);
    assert_eq!(api["Sources"].as_array().expect("an array").len(), 2);
    assert!(api["CreateIndex"].as_u64() < api["ModifyIndex"].as_u64() && api["ModifyIndex"].as_u64() > Some(0));
    let all = server.get("/v1/config/service-intentions").await.ok();
    let names: Vec<&Value> = all.as_array().expect("an array").iter().map(|entry| &entry["Name"]).collect();
    assert_eq!((names, &all[1]), (vec![&json!("*"), &json!("api")], &api));
    assert_eq!(answer.index(), server.get("/v1/connect/intentions").await.index());
    for kind in ["jwt-provider", "http-route", "mesh"] {
        assert_eq!(server.get(&format!("/v1/config/{kind}")).await.ok(), json!([]), "{kind}");
    }
    let unknown = server.get("/v1/config/colours").await;
    assert_eq!((unknown.status, unknown.body.as_str()), (400, "invalid config entry kind: colours"));
}
