//! Registration by Consul's rules, over bodies as clients send them.

use culvert_types::{Datacenter, Encryption, HealthStatus};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::state::rows::Probe;
use crate::store::MemoryStore;

struct World {
    ledger: Ledger,
    catalog: Catalog,
}

impl World {
    async fn new() -> Self {
        Self::with_ports(Some(21000..=21002)).await
    }

    async fn with_ports(sidecar_ports: Option<RangeInclusive<u16>>) -> Self {
        let store = Arc::new(MemoryStore::default());
        let ledger = Ledger::start(store, CancellationToken::new()).await.expect("an empty store");
        let place = Place {
            node: "n1".to_owned(),
            advertise: [127, 0, 0, 1].into(),
            datacenter: Datacenter::new("dc1").expect("a name"),
            sidecar_ports,
            dev: false,
        };
        Self { catalog: Catalog::new(ledger.clone(), Arc::new(place)), ledger }
    }

    async fn register(&self, body: Value) -> Result<Registered, RegisterError> {
        self.register_replacing(body, false).await
    }

    async fn register_replacing(&self, body: Value, replace: bool) -> Result<Registered, RegisterError> {
        let body = ServiceRegistration::decode(body.to_string().as_bytes()).expect("a body");
        self.catalog.register_service(body, replace).await
    }

    async fn register_check(&self, body: Value) -> Result<(), CheckError> {
        self.catalog.register_check(culvert_api::decode(body.to_string().as_bytes()).expect("a body")).await
    }

    fn service(&self, id: &str) -> Service {
        self.ledger.state().service("n1", id).unwrap_or_else(|| panic!("{id} is registered")).value.clone()
    }

    fn check_ids(&self, service: &str) -> Vec<String> {
        self.ledger.state().checks_of("n1", service).map(|check| check.id.clone()).collect()
    }

    fn set_status(&self, id: &str, status: HealthStatus) -> impl Future<Output = ()> {
        let (ledger, id) = (self.ledger.clone(), id.to_owned());
        async move {
            let updated = ledger.update::<(), UpdateError>(|state, plan| {
                let check = state.check("n1", &id).expect("a check");
                let check = Check { status, output: "ran".to_owned(), ..check.value.clone() };
                plan.put(Table::Checks, row_key("n1", &id), &check);
                Ok(())
            });
            updated.await.expect("written");
        }
    }
}

#[tokio::test]
async fn a_sidecar_is_filled_in_from_its_service() {
    let world = World::new().await;
    let registered = world.register(json!({
        "ID": "web-1", "Name": "web", "Port": 8080, "Address": "10.0.0.1", "Tags": ["v1"], "Meta": {"a": "b"},
        "Connect": {"SidecarService": {}},
    }));
    let expected = Registered {
        service_id: "web-1".to_owned(),
        sidecar_id: Some("web-1-sidecar-proxy".to_owned()),
        sidecar_port: Some(21000),
    };
    assert_eq!(registered.await.expect("registered"), expected);
    let sidecar = world.service("web-1-sidecar-proxy");
    assert_eq!(
        (sidecar.name.as_str(), sidecar.address.as_str(), sidecar.port),
        ("web-sidecar-proxy", "10.0.0.1", 21000)
    );
    assert_eq!((sidecar.tags, sidecar.meta), (world.service("web-1").tags, world.service("web-1").meta));
    let proxy = sidecar.proxy.expect("a proxy");
    assert_eq!((proxy.destination_service_name.as_str(), proxy.destination_service_id.as_str()), ("web", "web-1"));
    assert_eq!((proxy.local_service_address.as_str(), proxy.local_service_port), ("127.0.0.1", 8080));

    let state = world.ledger.state();
    let listening = state.check("n1", "service:web-1-sidecar-proxy:1").expect("the first default check");
    assert_eq!(listening.name, "Connect Sidecar Listening");
    assert_eq!(listening.definition.probe, Probe::Tcp { address: "10.0.0.1:21000".to_owned() });
    assert_eq!(listening.definition.interval.as_secs(), 10);
    let alias = state.check("n1", "service:web-1-sidecar-proxy:2").expect("the second");
    assert_eq!(alias.name, "Connect Sidecar Aliasing web-1");
    assert_eq!(alias.definition.probe, Probe::Alias { service: "web-1".to_owned() });
    assert!(world.check_ids("web-1").is_empty());
}

/// Such an application only calls others: the sidecar has no inbound listener.
#[tokio::test]
async fn the_sidecar_of_an_application_without_a_port_is_not_expected_to_listen() {
    let world = World::new().await;
    let registered = world.register(json!({"Name": "client", "Connect": {"SidecarService": {}}}));
    assert_eq!(registered.await.expect("registered").sidecar_port, Some(21000));
    assert_eq!(world.check_ids("client-sidecar-proxy"), ["service:client-sidecar-proxy"]);
    let state = world.ledger.state();
    let alias = state.check("n1", "service:client-sidecar-proxy").expect("the only check");
    assert_eq!(alias.definition.probe, Probe::Alias { service: "client".to_owned() });
}

#[tokio::test]
async fn what_a_sidecar_says_itself_stays() {
    let world = World::new().await;
    let body = json!({
        "Name": "web", "Port": 80, "Tags": ["v1"],
        "Connect": {"SidecarService": {
            "Name": "web-proxy", "Port": 20000, "Address": "10.0.0.9", "Tags": ["p"], "Meta": {"x": "y"},
            "Check": {"Name": "mine", "TCP": "10.0.0.9:20000", "Interval": "5s"},
            "Proxy": {"LocalServiceAddress": "127.0.0.2", "LocalServicePort": 81,
                "Config": {"encryption": "between-nodes", "bind_port": 20001.0, "envoy_stats_tags": ["a=b"]},
                "Upstreams": [{"DestinationName": "api", "LocalBindPort": 9191, "Config": {"connect_timeout_ms": 250}}]},
        }},
    });
    world.register(body).await.expect("registered");
    let sidecar = world.service("web-sidecar-proxy");
    assert_eq!((sidecar.name.as_str(), sidecar.port, sidecar.listener_port()), ("web-proxy", 20000, 20001));
    assert_eq!((sidecar.address.as_str(), &sidecar.tags[..]), ("10.0.0.9", &["p".to_owned()][..]));
    let proxy = sidecar.proxy.expect("a proxy");
    assert_eq!((proxy.local_service_address.as_str(), proxy.local_service_port), ("127.0.0.2", 81));
    assert_eq!(proxy.settings.encryption, Some(Encryption::BetweenNodes));
    assert_eq!(proxy.upstreams[0].bind().expect("an address").to_string(), "127.0.0.1:9191");
    assert_eq!(proxy.upstreams[0].connect_timeout, Some(std::time::Duration::from_millis(250)));
    assert_eq!(world.check_ids("web-sidecar-proxy"), ["service:web-sidecar-proxy"]);
}

#[tokio::test]
async fn ports_are_the_lowest_free_and_stay() {
    let world = World::new().await;
    let web = |name: &str| json!({"Name": name, "Port": 80, "Connect": {"SidecarService": {}}});
    for (name, port) in [("a", 21000), ("b", 21001), ("c", 21002)] {
        assert_eq!(world.register(web(name)).await.expect("registered").sidecar_port, Some(port));
    }
    let full = world.register(web("d")).await.expect_err("no port is left").to_string();
    assert_eq!(full, "no port provided for sidecar_service and none left in the configured range [21000, 21002]");
    world.catalog.deregister_service("a").await.expect("deregistered");
    assert_eq!(
        world.register(web("b")).await.expect("again").sidecar_port,
        Some(21001),
        "its own port, not a lower one"
    );
    assert_eq!(world.register(web("d")).await.expect("registered").sidecar_port, Some(21000));

    let off = World::with_ports(None).await;
    let refused = off.register(web("a")).await.expect_err("no assignment").to_string();
    assert_eq!(refused, "no port provided for sidecar_service and auto-assignment disabled in config");
}

#[tokio::test]
async fn saying_the_same_again_is_free_and_resets_nothing() {
    let world = World::new().await;
    let body = || {
        json!({
            "Name": "web", "Port": 80, "Connect": {"SidecarService": {}},
            "Checks": [{"TTL": "10s"}, {"HTTP": "http://127.0.0.1/", "Interval": "1s", "Status": "critical"}],
        })
    };
    world.register(body()).await.expect("registered");
    for id in ["service:web:1", "service:web:2", "service:web-sidecar-proxy:1"] {
        world.set_status(id, HealthStatus::Passing).await;
    }
    let before = world.ledger.state().revision();
    world.register(body()).await.expect("again");
    assert_eq!(world.ledger.state().revision(), before);

    let mut changed = body();
    changed["Tags"] = json!(["new"]);
    changed["Checks"][0]["TTL"] = json!("20s");
    world.register(changed).await.expect("changed");
    let state = world.ledger.state();
    let check = state.check("n1", "service:web:1").expect("there");
    assert_eq!((check.status, check.output.as_str()), (HealthStatus::Passing, "ran"));
    assert_eq!(check.definition.probe, Probe::Ttl(std::time::Duration::from_secs(20)));
    assert_eq!(check.service_tags, ["new"]);
}

#[tokio::test]
async fn checks_that_are_not_named_again_stay_unless_replaced() {
    let world = World::new().await;
    world.register(json!({"Name": "web", "Checks": [{"CheckID": "a", "TTL": "1s"}, {"TTL": "1s"}]})).await.expect("ok");
    assert_eq!(world.check_ids("web"), ["a", "service:web:2"]);
    let own = json!({"Name": "own", "ServiceID": "web", "TTL": "1s"});
    world.register_check(own).await.expect("registered");
    world.catalog.service_maintenance("web", true, "").await.expect("in maintenance");
    let one = || json!({"Name": "web", "Tags": ["t"], "Check": {"CheckID": "a", "TTL": "1s"}});
    world.register(one()).await.expect("again");
    assert_eq!(world.check_ids("web"), ["_service_maintenance:web", "a", "own", "service:web:2"]);
    let state = world.ledger.state();
    assert_eq!(state.check("n1", "own").expect("there").service_tags, ["t"], "checks follow their service's tags");
    world.register_replacing(one(), true).await.expect("again");
    assert_eq!(world.check_ids("web"), ["_service_maintenance:web", "a"]);
}

#[tokio::test]
async fn a_service_leaves_with_its_checks_and_its_declared_sidecar() {
    let world = World::new().await;
    let body = json!({"Name": "web", "Port": 80, "Check": {"TTL": "1s"}, "Connect": {"SidecarService": {}}});
    world.register(body.clone()).await.expect("registered");
    world.register(json!({"Name": "web", "Port": 80, "Check": {"TTL": "1s"}})).await.expect("without a sidecar");
    world.catalog.deregister_service("web").await.expect("deregistered");
    let state = world.ledger.state();
    assert_eq!((state.services().count(), state.checks().count()), (0, 0));
    let unknown = world.catalog.deregister_service("web").await.expect_err("gone").to_string();
    assert_eq!(unknown, "Unknown service ID \"web\". Ensure that the service ID is passed, not the service name.");

    world.register(body).await.expect("registered");
    world.catalog.deregister_service("web-sidecar-proxy").await.expect("a sidecar may go alone");
    assert_eq!(world.ledger.state().services().count(), 1);
    world.catalog.deregister_service("web").await.expect("deregistered");
}

#[tokio::test]
async fn a_proxy_may_be_registered_by_itself() {
    let world = World::new().await;
    let proxy = |proxy: Value| json!({"Kind": "connect-proxy", "Name": "p", "Port": 9000, "Proxy": proxy});
    world.register(proxy(json!({"DestinationServiceName": "web"}))).await.expect("registered");
    assert_eq!(world.service("p").proxy.expect("a proxy").destination_service_name, "web");
    let nameless = world.register(proxy(json!({}))).await.expect_err("for whom?").to_string();
    let text = "Failed Validation: Proxy.DestinationServiceName must be non-empty for Connect proxy services";
    assert_eq!(nameless, text);
    let none = world.register(json!({"Kind": "connect-proxy", "Name": "p", "Port": 1})).await.expect_err("for whom?");
    assert_eq!(none.to_string(), text);
}

#[tokio::test]
async fn registrations_are_refused_with_consuls_texts_and_change_nothing() {
    let world = World::new().await;
    let with = |field: &str, value: Value| {
        let mut body = json!({"Name": "web", "Port": 80});
        body[field] = value;
        body
    };
    let sidecar = |value: Value| with("Connect", json!({"SidecarService": value}));
    let proxy = |value: Value| sidecar(json!({"Proxy": value}));
    let check = |value: Value| with("Check", value);
    let upstream = |name: &str, port: u16| json!({"DestinationName": name, "LocalBindPort": port});
    let cases = [
        (json!({"Port": 80}), "Missing service name"),
        (with("Address", json!("0.0.0.0")), "Invalid service address"),
        (with("Address", json!("[::]")), "Invalid service address"),
        (with("Weights", json!({"Passing": 0, "Warning": 1})), "Invalid Weights: Passing must be greater than 0"),
        (with("Weights", json!({"Passing": 65536, "Warning": 1})), "Invalid Weights: "),
        (
            with("Meta", json!({"consul-x": "y"})),
            "Invalid Service Meta: Couldn't load metadata pair ('consul-x', 'y'): ",
        ),
        (with("Meta", json!({"a b": "y"})), "Key contains invalid characters"),
        (with("Kind", json!("mesh-gateway")), "not supported by culvert yet: Kind \"mesh-gateway\""),
        (with("SocketPath", json!("/run/x")), "not supported by culvert yet: SocketPath"),
        (with("Namespace", json!("other")), "not supported by culvert yet: Namespace"),
        (
            json!({"Name": "we b", "Port": 1, "Connect": {"SidecarService": {}}}),
            "Validation failed: Name: name \"we b\"",
        ),
        (
            json!({"Name": "web", "Connect": {"Native": true}}),
            "Port or SocketPath must be set for a Connect native service.",
        ),
        (
            sidecar(json!({"ID": "x"})),
            "Validation failed: A SidecarService cannot specify an ID as this is managed by the agent",
        ),
        (sidecar(json!({"Connect": {"SidecarService": {}}})), "A SidecarService cannot have a nested SidecarService"),
        (
            sidecar(json!({"Check": {"TCP": "x:1"}})),
            "Invalid check in sidecar_service: Invalid check: Interval must be > 0",
        ),
        (proxy(json!({"Mode": "transparent"})), "Proxy.Mode \"transparent\""),
        (proxy(json!({"Expose": {"Checks": true}})), "Proxy.Expose"),
        (proxy(json!({"MeshGateway": {"Mode": "local"}})), "Proxy.MeshGateway.Mode"),
        (proxy(json!({"Config": {"protocol": "http"}})), "Proxy.Config.protocol \"http\" (only \"tcp\")"),
        (proxy(json!({"Config": {"encryption": "never"}})), "encryption must be \"always\" or \"between-nodes\""),
        (
            proxy(json!({"Config": {"envoy_extra_static_clusters_json": "{}"}})),
            "Proxy.Config.envoy_extra_static_clusters_json",
        ),
        (proxy(json!({"Config": {"bind_port": 70000}})), "Proxy.Config.bind_port must be a whole number"),
        (proxy(json!({"Upstreams": [{"LocalBindPort": 1}]})), "upstream destination name cannot be empty"),
        (proxy(json!({"Upstreams": [{"DestinationName": "api"}]})), "upstream local bind port"),
        (proxy(json!({"Upstreams": [upstream("a", 1), upstream("b", 1)]})), "upstreams cannot contain duplicates"),
        (proxy(json!({"Upstreams": [upstream("a", 1), upstream("a", 2)]})), "upstreams cannot contain duplicates"),
        (
            proxy(json!({"Upstreams": [
                upstream("a", 1), {"DestinationName": "b", "LocalBindPort": 1, "LocalBindAddress": "::1"},
            ]})),
            "\"b\" and another listen on [::1]:1",
        ),
        (
            proxy(json!({"Upstreams": [
                {"DestinationName": "b", "LocalBindPort": 1, "LocalBindAddress": "::1"}, upstream("a", 1),
            ]})),
            "\"a\" and another listen on [::1]:1",
        ),
        (
            proxy(json!({"Upstreams": [{"DestinationName": "a", "LocalBindPort": 1, "Datacenter": "dc2"}]})),
            "Datacenter \"dc2\"",
        ),
        (
            check(json!({"Interval": "1s", "TTL": "1s", "TCP": "a:1"})),
            "Invalid check: Interval and TTL cannot both be specified",
        ),
        (
            check(json!({"HTTP": "http://a/"})),
            "Interval must be > 0 for Script, HTTP, H2PING, TCP, UDP or OSService checks",
        ),
        (check(json!({"Name": "x"})), "Invalid check: TTL must be > 0 for TTL checks"),
        (check(json!({"AliasService": "a", "Interval": "1s"})), "Interval cannot be set for Alias checks"),
        (check(json!({"TTL": "1s", "Status": "fine"})), "Status for checks must 'passing', 'warning', 'critical'"),
        (
            check(json!({"TCP": "a:1", "Interval": "1s", "FailuresBeforeWarning": 2, "FailuresBeforeCritical": 1})),
            "FailuresBeforeWarning can't be higher than FailuresBeforeCritical",
        ),
        (check(json!({"TTL": "1s", "SuccessBeforePassing": 2})), "count the runs of HTTP and TCP checks only"),
        (check(json!({"Args": ["true"], "Interval": "1s"})), "not supported by culvert yet: ScriptArgs"),
        (check(json!({"GRPC": "a:1", "Interval": "1s"})), "not supported by culvert yet: GRPC"),
        (check(json!({"HTTP": "https://a/", "Interval": "1s"})), "HTTP with an https:// URL"),
        (check(json!({"TCP": "nowhere", "Interval": "1s"})), "TCP must be host:port"),
        (check(json!({"HTTP": "http://a/", "Interval": "1s", "Method": "G T"})), "is not an HTTP method"),
        (check(json!({"HTTP": "http://a/", "Interval": "1s", "Header": {"a b": ["c"]}})), "is not a header field"),
        (
            with("Checks", json!([{"CheckID": "x", "TTL": "1s"}, {"CheckID": "x", "TTL": "1s"}])),
            "duplicate check ID \"x\"",
        ),
        (json!({"Name": "../../etc"}), "Name: \"../../etc\" must not look like a file path"),
        (json!({"Name": "web", "ID": "../../etc"}), "ID: \"../../etc\" must not look like a file path"),
        (json!({"Name": "web\nfake 1"}), "Name: \"web\\nfake 1\" must not hold control characters"),
        (
            json!({"Name": "web", "Port": 1, "Connect": {"SidecarService": {"Name": "/etc"}}}),
            "SidecarService.Name: \"/etc\"",
        ),
        (check(json!({"CheckID": "../c", "TTL": "1s"})), "Invalid check: ID: \"../c\" must not look like a file path"),
    ];
    for (body, text) in cases {
        let err = world.register(body.clone()).await.expect_err(&body.to_string()).to_string();
        assert!(err.contains(text), "{body}: {err}");
    }
    assert_eq!(world.ledger.state().revision().0, 0);
}

#[tokio::test]
async fn a_check_is_registered_by_itself() {
    let world = World::new().await;
    world.register(json!({"Name": "web", "Tags": ["t"]})).await.expect("registered");
    let body = || json!({"ID": "c", "Name": "alive", "ServiceID": "web", "Interval": "10s", "Timeout": "3s", "TCP": "127.0.0.1:1"});
    world.register_check(body()).await.expect("registered");
    world.set_status("c", HealthStatus::Passing).await;
    let before = world.ledger.state().revision();
    world.register_check(body()).await.expect("again");
    assert_eq!(world.ledger.state().revision(), before);
    let mut forced = body();
    forced["Status"] = json!("warning");
    world.register_check(forced).await.expect("again");
    let state = world.ledger.state();
    let check = state.check("n1", "c").expect("there");
    assert_eq!(
        (check.status, check.service_name.as_str(), &check.service_tags[..]),
        (HealthStatus::Warning, "web", &["t".to_owned()][..])
    );

    world.register_check(json!({"Name": "node-wide", "TTL": "1m"})).await.expect("a check of the node");
    for (body, text) in [
        (json!({"TTL": "1s"}), "Missing check name"),
        (json!({"Name": "x", "TTL": "1s", "Status": "fine"}), "Bad check status"),
        (json!({"Name": "x", "TTL": "1s", "ServiceID": "nope"}), "ServiceID \"nope\" does not exist"),
        (json!({"Name": "x"}), "Invalid check: TTL must be > 0 for TTL checks"),
        (
            json!({"Name": "x\n", "TTL": "1s"}),
            "Invalid check: ID: \"x\\n\" must not hold control characters, line separators or marks of text direction",
        ),
    ] {
        let err = world.register_check(body.clone()).await.expect_err("refused").to_string();
        assert_eq!(err, text, "{body}");
    }
    world.catalog.deregister_check("c").await.expect("deregistered");
    let unknown = world.catalog.deregister_check("c").await.expect_err("gone").to_string();
    assert_eq!(unknown, "Unknown check ID \"c\". Ensure that the check ID is passed, not the check name.");
}

#[tokio::test]
async fn the_job_runner_may_say_where_a_sidecar_is_on_its_node() {
    let world = World::new().await;
    let body = |address: &str| {
        json!({
            "Name": "web", "Port": 80, "Connect": {"SidecarService": {
                "TaggedAddresses": {"culvert-workload": {"Address": address, "Port": 0}}}},
        })
    };
    world.register(body("172.26.64.5")).await.expect("registered");
    let address = world.service("web-sidecar-proxy").workload_address().expect("given");
    assert_eq!(address.to_string(), "172.26.64.5:21000");
    assert!(world.register(body("somewhere")).await.is_err());
}

/// Bodies that are right, wrong and odd in every part.
fn body() -> impl Strategy<Value = Value> {
    let text = prop_oneof![Just("web"), Just("api"), Just(""), Just("w b"), Just("10.0.0.1"), Just("::")];
    let check = prop_oneof![
        Just(json!({"TTL": "10s"})),
        Just(json!({"TCP": "127.0.0.1:80", "Interval": "10s"})),
        Just(json!({"CheckID": "same", "TTL": "10s"})),
        Just(json!({"AliasService": "web"})),
        Just(json!({"GRPC": "x"})),
        Just(json!({})),
    ];
    let sidecar = prop_oneof![
        Just(Value::Null),
        Just(json!({"SidecarService": {}})),
        Just(json!({"SidecarService": {"Port": 21001}})),
        Just(json!({"SidecarService": {"Proxy": {"Upstreams": [{"DestinationName": "api", "LocalBindPort": 1}]}}})),
        Just(json!({"SidecarService": {"Proxy": {"Mode": "transparent"}}})),
        Just(json!({"Native": true})),
    ];
    let checks = prop::collection::vec(check, 0..4);
    (text.clone(), text, 0..3_u16, checks, sidecar).prop_map(|(id, name, port, checks, connect)| {
        json!({"ID": id, "Name": name, "Port": port, "Checks": checks, "Connect": connect})
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever is registered in whatever order: refusals change nothing, repetition changes nothing, every check has its
    /// service, every sidecar a port and a destination, and what is deregistered leaves nothing.
    #[test]
    fn the_catalog_stays_in_order(bodies in prop::collection::vec(body(), 1..12)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let world = World::new().await;
            for body in bodies {
                let before = world.ledger.state();
                let registered = world.register(body.clone()).await;
                let after = world.ledger.state();
                match registered {
                    Err(_) => prop_assert_eq!(after.revision(), before.revision(), "{}", body),
                    Ok(first) => {
                        let again = world.register(body.clone()).await.expect("the same again");
                        prop_assert_eq!(&again, &first);
                        prop_assert_eq!(world.ledger.state().revision(), after.revision(), "{}", body);
                    }
                }
                for check in after.checks() {
                    prop_assert!(after.service("n1", &check.service_id).is_some(), "{} after {}", check.id, body);
                }
                for sidecar in after.sidecars() {
                    prop_assert!(sidecar.port > 0);
                    let proxy = sidecar.proxy.as_ref().expect("a sidecar has a proxy");
                    prop_assert!(proxy.destination().is_some());
                }
            }
            let ids: Vec<String> = world.ledger.state().services().map(|service| service.id.clone()).collect();
            for id in ids {
                // A sidecar may have left with its service.
                world.catalog.deregister_service(&id).await.ok();
            }
            let state = world.ledger.state();
            prop_assert_eq!((state.services().count(), state.checks().count()), (0, 0));
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn a_service_with_as_many_checks_as_it_may_have_is_replaced_and_removed() {
    let world = World::new().await;
    let checks = |prefix: &str, count: usize| -> Value {
        (0..count).map(|n| json!({"CheckID": format!("{prefix}{n}"), "Name": "c", "TTL": "1h"})).collect()
    };
    let body = |prefix: &str, count: usize| {
        let sidecar = json!({"Checks": checks(&format!("s{prefix}"), count)});
        json!({"Name": "web", "Port": 80, "Checks": checks(prefix, count), "Connect": {"SidecarService": sidecar}})
    };
    world.register(body("a", MAX_CHECKS)).await.expect("as many as allowed");
    world.catalog.service_maintenance("web", true, "").await.expect("beside them");
    world.register_replacing(body("b", MAX_CHECKS), true).await.expect("all of them at once");
    let too_many = |err: String| assert!(err.contains("would have more than 30 checks"), "{err}");
    too_many(world.register(body("c", MAX_CHECKS)).await.expect_err("the old ones stay").to_string());
    too_many(
        world.register(json!({"Name": "db", "Checks": checks("d", MAX_CHECKS + 1)})).await.expect_err("31").to_string(),
    );
    let one_more = json!({"ID": "more", "Name": "c", "TTL": "1h", "ServiceID": "web"});
    too_many(world.register_check(one_more).await.expect_err("one more").to_string());
    let again = json!({"ID": "b1", "Name": "c", "TTL": "2h", "ServiceID": "web"});
    world.register_check(again).await.expect("it is there already");
    assert_eq!(world.check_ids("web").len(), MAX_CHECKS + 1);
    world.catalog.deregister_service("web").await.expect("in one transaction");
    assert_eq!(world.ledger.state().checks().count(), 0);
}
