//! What an allocation makes of a job: its environment and its services.

use culvert_jobspec::{AllocContext, Environment, EnvironmentError, Job, NodeContext, PortBinding, TaskDirs, parse};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SEED: &str = include_str!("jobs/seed_000.nomad.hcl");

fn job(source: &str) -> Job {
    parse(source, "f", &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
}

fn context() -> AllocContext {
    let text = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    AllocContext {
        alloc_id: "1f2e3d4c-0000-4000-8000-000000000000".into(),
        index: 2,
        node: NodeContext {
            id: "node-id".into(),
            name: "node1".into(),
            datacenter: "dc1".into(),
            attributes: text(&[("kernel.name", "linux")]),
            meta: text(&[("rack", "r7")]),
        },
        host_ip: [10, 0, 0, 1].into(),
        alloc_ip: [172, 26, 64, 5].into(),
        alloc_interface: "eth0".into(),
        ports: BTreeMap::from([
            ("http".into(), PortBinding { host: 20001, inside: 9002 }),
            ("connect-proxy-count-dashboard".into(), PortBinding { host: 21000, inside: 21000 }),
        ]),
    }
}

fn dirs() -> TaskDirs {
    TaskDirs { alloc: "/alloc".into(), local: "/local".into(), secrets: "/secrets".into() }
}

fn dashboard(env: &str) -> Environment {
    let source = SEED.replace("COUNTING_SERVICE_URL", &format!("{env}\n COUNTING_SERVICE_URL"));
    let source =
        source.replace("datacenters", "meta {\n owner = \"job\"\n my-key = \"${NOMAD_ALLOC_INDEX}\"\n }\n datacenters");
    Environment::of_task(&job(&source), "dashboard", "dashboard", &context(), &dirs()).expect("environment")
}

#[test]
fn a_task_finds_nomads_variables() {
    let environment = dashboard("");
    for (name, value) in [
        ("COUNTING_SERVICE_URL", "http://127.0.0.1:8080"),
        ("NOMAD_UPSTREAM_ADDR_count_api", "127.0.0.1:8080"),
        ("NOMAD_UPSTREAM_ADDR_count-api", "127.0.0.1:8080"),
        ("NOMAD_UPSTREAM_IP_count_api", "127.0.0.1"),
        ("NOMAD_UPSTREAM_PORT_count_api", "8080"),
        ("NOMAD_PORT_http", "9002"),
        ("NOMAD_ALLOC_PORT_http", "9002"),
        ("NOMAD_HOST_PORT_http", "20001"),
        ("NOMAD_IP_http", "10.0.0.1"),
        ("NOMAD_ADDR_http", "10.0.0.1:20001"),
        ("NOMAD_HOST_ADDR_http", "10.0.0.1:20001"),
        ("NOMAD_ALLOC_IP_http", "172.26.64.5"),
        ("NOMAD_ALLOC_ADDR_http", "172.26.64.5:9002"),
        ("NOMAD_ALLOC_INTERFACE_http", "eth0"),
        ("NOMAD_PORT_connect-proxy-count-dashboard", "21000"),
        ("NOMAD_PORT_connect_proxy_count_dashboard", "21000"),
        ("NOMAD_ALLOC_ID", "1f2e3d4c-0000-4000-8000-000000000000"),
        ("NOMAD_SHORT_ALLOC_ID", "1f2e3d4c"),
        ("NOMAD_ALLOC_NAME", "countdash.dashboard[2]"),
        ("NOMAD_ALLOC_INDEX", "2"),
        ("NOMAD_TASK_NAME", "dashboard"),
        ("NOMAD_GROUP_NAME", "dashboard"),
        ("NOMAD_JOB_ID", "countdash"),
        ("NOMAD_JOB_NAME", "countdash"),
        ("NOMAD_DC", "dc1"),
        ("NOMAD_REGION", "global"),
        ("NOMAD_NAMESPACE", "default"),
        ("NOMAD_CPU_LIMIT", "100"),
        ("NOMAD_MEMORY_LIMIT", "300"),
        ("NOMAD_ALLOC_DIR", "/alloc"),
        ("NOMAD_TASK_DIR", "/local"),
        ("NOMAD_SECRETS_DIR", "/secrets"),
        ("NOMAD_META_owner", "job"),
        ("NOMAD_META_OWNER", "job"),
        ("NOMAD_META_my_key", "2"),
        ("NOMAD_META_MY_KEY", "2"),
    ] {
        assert_eq!(environment.variables().get(name).map(String::as_str), Some(value), "{name}");
    }
}

#[test]
fn values_may_refer_to_each_other_the_node_and_nothing() {
    let environment = dashboard(
        r#"
        A = "${B}!"
        B = "${C}"
        C = "${node.unique.name}/${attr.kernel.name}/${meta.rack}/${env["NOMAD_DC"]}"
        X = "${Y}"
        Y = "${X}"
        Z = "${meta.no_such_thing} ${PATH}"
        "#,
    );
    let value = |name: &str| environment.variables()[name].as_str();
    assert_eq!(value("A"), "node1/linux/r7/dc1!");
    assert!(value("X").contains("${"), "a circle stays as written: {}", value("X"));
    assert_eq!(value("Z"), "${meta.no_such_thing} ${PATH}");
}

#[test]
fn values_that_double_themselves_are_refused() {
    let doubling: String = (0..40).map(|n| format!("D{n:02} = \"${{D{:02}}}${{D{:02}}}\"\n", n + 1, n + 1)).collect();
    let source = SEED.replace("COUNTING_SERVICE_URL", &format!("{doubling} D40 = \"xxxxxxxx\"\n COUNTING_SERVICE_URL"));
    let error = Environment::of_task(&job(&source), "dashboard", "dashboard", &context(), &dirs());
    assert!(matches!(error, Err(EnvironmentError::Value { .. })), "{error:?}");
    let missing = Environment::of_task(&job(SEED), "dashboard", "nope", &context(), &dirs());
    assert!(matches!(missing, Err(EnvironmentError::UnknownTask(_))), "{missing:?}");
}

#[test]
fn services_refer_to_the_allocation_but_not_to_a_task() {
    let job = job(&SEED.replace("name = \"count-dashboard\"", "name = \"dash-${NOMAD_ALLOC_INDEX}-${meta.nope}\""));
    let group = job.group("dashboard").expect("group");
    let environment = Environment::of_group(&job, group, &context()).expect("environment");
    assert_eq!(environment.lookup("NOMAD_ALLOC_INDEX"), Some("2"));
    assert_eq!(environment.lookup("NOMAD_TASK_NAME"), None);
    let name = &group.services[0].name;
    assert_eq!(name.render("tag", &environment).expect("render"), "dash-2-${meta.nope}");
    assert_eq!(
        name.render_strict("service name", &environment).expect_err("unresolved").to_string(),
        "service name \"dash-${NOMAD_ALLOC_INDEX}-${meta.nope}\" refers to ${meta.nope}, which this allocation does not have"
    );
}

/// Whatever an allocation has may be referred to: what is refused is what nothing replaces.
#[test]
fn every_variable_may_be_referred_to() {
    let all = |environment: Environment| {
        let names = environment.variables().keys().map(|name| format!("${{{name}}}"));
        format!("\"{}\"", names.collect::<String>())
    };
    let source = SEED.replace("datacenters", "meta {\n my-key = 1\n}\n datacenters");
    let plain = job(&source);
    let group = plain.group("dashboard").expect("group");
    let mut of_services = context();
    of_services.ports.remove("connect-proxy-count-dashboard");
    let services = all(Environment::of_group(&plain, group, &of_services).expect("environment"));
    let tasks = all(Environment::of_task(&plain, "dashboard", "dashboard", &context(), &dirs()).expect("environment"));
    let source = source.replace("port = \"http\"", &format!("port = \"http\"\n tags = [{services}]"));
    job(&source.replace("COUNTING_SERVICE_URL", &format!("ALL = {tasks}\n COUNTING_SERVICE_URL")));

    let late = source.replace("\"count-dashboard\"", "\"dash-${NOMAD_ALLOC_INDEX}\"");
    job(&late.replace("NOMAD_UPSTREAM_ADDR_count_api", "NOMAD_PORT_connect-proxy-dash-0"));
}

proptest! {
    /// Text without references passes through parsing, JSON and rendering unchanged, whatever it holds.
    #[test]
    fn literal_text_is_carried_exactly(text in "\\PC{0,40}") {
        let quoted = serde_json::to_string(&text).expect("json").replace("${", "$${").replace("%{", "%%{");
        let source = SEED.replace("COUNTING_SERVICE_URL", &format!("TEXT = {quoted}\n COUNTING_SERVICE_URL"));
        let job = job(&source);
        let job: Job = serde_json::from_str(&serde_json::to_string(&job).expect("write")).expect("read");
        let environment = Environment::of_task(&job, "dashboard", "dashboard", &context(), &dirs()).expect("environment");
        prop_assert_eq!(&environment.variables()["TEXT"], &text);
    }
}
