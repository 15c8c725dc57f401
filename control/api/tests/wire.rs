//! The wire forms against what a real system sent: requests of Nomad 1.1.2, answers of Consul 1.10.11.

use culvert_api::{
    AgentSelf, AgentService, ApiError, CaRoots, CatalogService, CheckDefinition, DecodeError, HealthCheck, Intention,
    LeafCert, Proxy, ServiceEntry, ServiceRegistration, Unsupported, Weights, decode, decode_known, decode_value,
};
use culvert_types::Encryption;
use serde_json::{Value, json};

fn recorded() -> Vec<Value> {
    serde_json::from_str(include_str!("recorded/nomad-to-consul.json")).expect("the recording is JSON")
}

fn text<'a>(exchange: &'a Value, key: &str) -> &'a str {
    exchange[key].as_str().expect("a text")
}

#[test]
fn every_recorded_request_body_decodes_and_is_supported() {
    let (mut services, mut checks) = (0, 0);
    for exchange in recorded().into_iter().filter(|exchange| exchange["request"].is_object()) {
        let body = exchange["request"].clone();
        match text(&exchange, "path") {
            "/v1/agent/service/register" => {
                let service: ServiceRegistration = decode_value(body).expect("a registration");
                let sidecar = service.connect.and_then(|connect| connect.sidecar_service);
                let proxy = sidecar.and_then(|sidecar| sidecar.proxy).unwrap_or_default();
                proxy.check_supported().expect("nothing that culvert refuses");
                services += 1;
            }
            "/v1/agent/check/register" => {
                let check: CheckDefinition = decode_value(body).expect("a check");
                assert!(check.tcp.starts_with("0.0.0.0:") && check.timeout.0.as_secs() == 3);
                checks += 1;
            }
            other => panic!("no decoder is tried for {other}"),
        }
    }
    assert_eq!((services, checks), (4, 2));
}

#[test]
fn recorded_requests_survive_a_round_trip() {
    for exchange in recorded().into_iter().filter(|exchange| exchange["request"].is_object()) {
        if text(&exchange, "path") == "/v1/agent/service/register" {
            let service: ServiceRegistration = decode_value(exchange["request"].clone()).expect("a registration");
            let again = decode_value(serde_json::to_value(&service).expect("JSON")).expect("our own form");
            assert_eq!(service, again);
        }
    }
}

#[test]
fn the_recorded_dashboard_keeps_its_sidecar_ports_and_upstream() {
    let body = recorded().into_iter().find(|exchange| exchange["request"]["Name"] == "count-dashboard");
    let service: ServiceRegistration = decode_value(body.expect("recorded")["request"].clone()).expect("decodes");
    let sidecar = service.connect.and_then(|connect| connect.sidecar_service).expect("a sidecar");
    assert_eq!((service.port, sidecar.port, sidecar.address.as_str()), (9002, 27349, "192.0.2.2"));
    let checks = &sidecar.checks;
    assert!(checks[0].alias_service.starts_with("_nomad-task-") && checks[1].tcp == "192.0.2.2:27349");
    assert_eq!(checks[1].interval.0.as_secs(), 10);
    let proxy = sidecar.proxy.as_ref().expect("a proxy");
    assert_eq!(proxy.config["bind_port"], json!(27349));
    assert_eq!((proxy.upstreams[0].destination_name.as_str(), proxy.upstreams[0].local_bind_port), ("count-api", 8080));
}

/// Values, key order and omitted fields alike.
#[test]
fn the_recorded_agent_service_is_printed_as_consul_printed_it() {
    let exchanges = recorded();
    let answer = exchanges.iter().find(|exchange| exchange["response"].is_object()).expect("recorded");
    let service: AgentService = decode_value(answer["response"].clone()).expect("decodes without unknown keys");
    let printed = serde_json::to_string(&service).expect("JSON");
    assert_eq!(printed, serde_json::to_string(&answer["response"]).expect("JSON"));
}

#[test]
fn empty_lists_and_maps_are_never_null() {
    assert_eq!(
        serde_json::to_string(&AgentService::default()).expect("JSON"),
        r#"{"ID":"","Service":"","Tags":[],"Meta":{},"Port":0,"Address":"","Weights":{"Passing":1,"Warning":1},"EnableTagOverride":false}"#
    );
    for value in [
        serde_json::to_value(ServiceEntry::default()),
        serde_json::to_value(CatalogService::default()),
        serde_json::to_value(HealthCheck::default()),
        serde_json::to_value(CaRoots::default()),
        serde_json::to_value(LeafCert::default()),
        serde_json::to_value(Intention::default()),
    ] {
        no_null(&value.expect("JSON"));
    }
}

fn no_null(value: &Value) {
    match value {
        Value::Null => panic!("a null"),
        Value::Array(elements) => elements.iter().for_each(no_null),
        Value::Object(fields) => fields.values().for_each(no_null),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_value_at_the_top_of_agent_self_is_an_object_or_null() {
    let Value::Object(fields) = serde_json::to_value(AgentSelf::default()).expect("JSON") else { panic!("no object") };
    assert!(fields.values().all(|value| value.is_object() || value.is_null()));
    assert!(!fields.contains_key("xDS"), "left out while gRPC is off");
}

#[test]
fn health_checks_and_catalog_services_have_gos_field_order() {
    let keys = |value: Value| value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(
        keys(serde_json::to_value(HealthCheck::default()).expect("JSON")),
        "Node CheckID Name Status Notes Output ServiceID ServiceName ServiceTags Type Interval Timeout ExposedPort \
         Definition CreateIndex ModifyIndex"
    );
    assert_eq!(
        keys(serde_json::to_value(CatalogService::default()).expect("JSON")),
        "ID Node Address Datacenter TaggedAddresses NodeMeta ServiceKind ServiceID ServiceName ServiceTags \
         ServiceAddress ServiceWeights ServiceMeta ServicePort ServiceSocketPath ServiceEnableTagOverride \
         ServiceProxy ServiceConnect CreateIndex ModifyIndex"
    );
    assert_eq!(
        keys(serde_json::to_value(LeafCert::default()).expect("JSON")),
        "SerialNumber CertPEM PrivateKeyPEM Service ServiceURI ValidAfter ValidBefore CreateIndex ModifyIndex"
    );
}

#[test]
fn lower_case_and_snake_case_keys_are_understood() {
    let pythonic = br#"{"name":"web","id":"web1","tags":null,"port":80,"enable_tag_override":true,"check":{"http":"http://127.0.0.1/","interval":"10s","tls_skip_verify":false,"deregister_critical_service_after":"1m"},
        "tagged_addresses":{"lan_ipv4":{"address":"192.0.2.9","port":80}},"connect":{"sidecar_service":{"proxy":{"upstreams":[{"destination_name":"api","local_bind_port":8080}]}}}}"#;
    let service: ServiceRegistration = decode(pythonic).expect("decodes");
    assert_eq!((service.name.as_str(), service.id.as_str(), service.port), ("web", "web1", 80));
    assert!(service.enable_tag_override && service.tags.is_empty());
    assert_eq!(service.check.expect("a check").deregister_critical_service_after.0.as_secs(), 60);
    assert_eq!(service.tagged_addresses["lan_ipv4"].address, "192.0.2.9");
    let sidecar = service.connect.and_then(|connect| connect.sidecar_service).expect("a sidecar");
    assert_eq!(sidecar.proxy.expect("a proxy").upstreams[0].local_bind_port, 8080);
}

#[test]
fn keys_of_maps_stay_as_they_are() {
    let body =
        br#"{"Name":"web","Meta":{"External_Source":"x"},"Proxy":{"Config":{"bind_port":1,"Nested":{"A_b":null}}}}"#;
    let service: ServiceRegistration = decode(body).expect("decodes");
    assert_eq!(service.meta["External_Source"], "x");
    let config = service.proxy.expect("a proxy").config;
    assert_eq!(Value::Object(config), json!({"bind_port": 1, "Nested": {"A_b": null}}));
}

#[test]
fn an_unknown_key_is_refused_in_consuls_words_at_every_depth() {
    for body in [
        r#"{"Name":"web","Prot":80}"#,
        r#"{"Checks":[{"Prot":80}]}"#,
        r#"{"Connect":{"SidecarService":{"Proxy":{"Upstreams":[{"Prot":1}]}}}}"#,
        r#"{"TaggedAddresses":{"lan":{"Prot":1}}}"#,
    ] {
        let error = decode::<ServiceRegistration>(body.as_bytes()).expect_err(body);
        assert_eq!(
            ApiError::from(error),
            ApiError::bad_request("Request decode failed: json: unknown field \"Prot\""),
            "{body}"
        );
        decode_known::<ServiceRegistration>(body.as_bytes()).expect("an answer may have more keys than we know");
    }
}

#[test]
fn a_bad_value_is_refused_with_its_place() {
    for (body, place) in [
        (r#"{"Port":"80"}"#, "Port"),
        (r#"{"Port":65536}"#, "Port"),
        (r#"{"Port":-1}"#, "Port"),
        (r#"{"Port":1.5}"#, "Port"),
        (r#"{"Tags":["a",7]}"#, "Tags[1]"),
        (r#"{"Checks":[{},{"Interval":"often"}]}"#, "Checks[1].Interval"),
        (r#"{"Connect":{"SidecarService":{"Port":"x"}}}"#, "Connect.SidecarService.Port"),
        (r#"{"Meta":{"k":1}}"#, "Meta.k"),
        ("[]", ""),
        ("7", ""),
    ] {
        match decode::<ServiceRegistration>(body.as_bytes()).expect_err(body) {
            DecodeError::Value { path, .. } => assert_eq!(path, place, "{body}"),
            other => panic!("{body}: {other}"),
        }
    }
    for body in ["", " ", "{", "{} {}", "nul"] {
        let error = decode::<ServiceRegistration>(body.as_bytes()).expect_err(body);
        assert!(matches!(error, DecodeError::Syntax(_)), "{body:?}: {error}");
    }
}

#[test]
fn what_a_proxy_asks_for_and_culvert_does_not_honour_is_named() {
    let body = br#"{"Mode":"transparent","Expose":{"Checks":true},"Upstreams":[{"DestinationName":"a"},{"DestinationPeer":"p"}]}"#;
    let proxy: Proxy = decode(body).expect("decodes");
    let Unsupported { fields } = proxy.check_supported().expect_err("refused");
    assert_eq!(fields, ["Proxy.Mode \"transparent\"", "Proxy.Expose", "Proxy.Upstreams[1].DestinationPeer"]);
}

#[test]
fn encryption_is_read_from_the_free_settings() {
    let proxy = |config: &str| decode::<Proxy>(format!("{{\"Config\":{config}}}").as_bytes()).expect("decodes");
    assert_eq!(proxy("{}").encryption(), Ok(None));
    assert_eq!(proxy("{\"encryption\":\"always\"}").encryption(), Ok(Some(Encryption::Always)));
    for config in ["{\"encryption\":\"never\"}", "{\"encryption\":7}"] {
        proxy(config).encryption().expect_err(config);
    }
}

#[test]
fn of_two_weights_the_missing_one_is_zero_and_without_any_both_are_one() {
    let weights = |body: &str| decode::<ServiceRegistration>(body.as_bytes()).expect("decodes").weights;
    assert_eq!(
        weights("{\"Weights\":{\"Passing\":3}}").map(|weights| (weights.passing, weights.warning)),
        Some((3, 0))
    );
    assert_eq!(weights("{}"), None);
    assert_eq!((Weights::default().passing, Weights::default().warning), (1, 1));
}

#[test]
fn the_body_of_the_go_client_makes_an_intention() {
    let body = br#"{"SourceNS":"","SourceName":"web","DestinationNS":"","DestinationName":"*","SourceType":"consul","Action":"deny",
        "Precedence":0,"CreatedAt":"0001-01-01T00:00:00Z","UpdatedAt":"0001-01-01T00:00:00Z","CreateIndex":0,"ModifyIndex":0}"#;
    let wire: Intention = decode(body).expect("decodes");
    let intention = culvert_types::Intention::try_from(&wire).expect("an intention");
    assert_eq!(intention.to_string(), "web => * (deny, precedence 6)");
}

#[test]
fn an_intention_that_culvert_cannot_hold_is_refused() {
    for change in [
        json!({"Action": "maybe"}),
        json!({"Action": ""}),
        json!({"SourceName": "we b"}),
        json!({"DestinationName": ""}),
    ] {
        let mut body = json!({"SourceName": "web", "DestinationName": "api", "Action": "allow"});
        for (key, value) in change.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let wire: Intention = decode_value(body).expect("decodes");
        culvert_types::Intention::try_from(&wire).expect_err(&change.to_string());
    }
}
