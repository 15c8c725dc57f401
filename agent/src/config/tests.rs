//! The configuration as users write it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use culvert_types::{Action, Encryption};
use proptest::prelude::*;

use super::*;

fn server(fragments: &[&str]) -> AgentArgs {
    AgentArgs {
        server: true,
        node: Some("n1".into()),
        advertise: Some("192.0.2.1".into()),
        hcl: fragments.iter().map(ToString::to_string).collect(),
        ..AgentArgs::default()
    }
}

fn error(fragment: &str) -> String {
    load(&server(&[fragment])).expect_err(fragment).to_string()
}

#[test]
fn without_files_the_defaults_hold() {
    let settings = load(&server(&[])).expect("loads");
    assert_eq!(settings.datacenter.as_str(), "dc1");
    assert_eq!(settings.http, ["127.0.0.1:8500".parse().expect("address")]);
    assert_eq!(settings.grpc, []);
    assert_eq!((settings.default_policy, settings.encryption), (Action::Deny, Encryption::Always));
    assert_eq!(settings.sidecar_ports, Some(21000..=21255));
    assert_eq!(settings.data_dir, PathBuf::from("/var/lib/culvert"));
    assert_eq!(settings.ca, CaTimes::default());
    assert!(settings.ebpf.enabled && settings.cgroup_parent == "culvert");
}

#[test]
fn dev_is_loopback_allows_and_serves_grpc() {
    let args = AgentArgs { dev: true, node: Some("n1".into()), ..AgentArgs::default() };
    let settings = load(&args).expect("loads");
    assert_eq!(settings.advertise, IpAddr::from(Ipv4Addr::LOCALHOST));
    assert_eq!(settings.default_policy, Action::Allow);
    assert_eq!(settings.grpc, ["127.0.0.1:8502".parse().expect("address")]);
    assert_eq!(settings.data_dir, PathBuf::from("/run/culvert"));
}

#[test]
fn every_key_in_scope_is_honoured() {
    let text = r#"
        datacenter = "east"  node_name = "node-7"  data_dir = "/srv/culvert"  server = true  bootstrap_expect = 1
        bind_addr = "192.0.2.7"  client_addr = "127.0.0.1 ::1"  advertise_addr = "192.0.2.8"  log_level = "WARN"
        ports { http = 8501 grpc = 8503 sidecar_min_port = 20000 sidecar_max_port = 20010 }
        connect = { enabled = true, ca_provider = "consul", ca_config { leaf_cert_ttl = "1h30m" root_cert_ttl = "8760h" csr_max_per_second = 7 } }
        default_intention_policy = "allow"  encryption = "between-nodes"  cgroup_parent = "test/culvert-1"
        acl { enabled = false default_policy = "deny" }
        ebpf { enabled = false bpf_dir = "/sys/fs/bpf/test" }
        limits { http_max_conns_per_client = 9 http_max_conns = 99 }
    "#;
    let args = AgentArgs { hcl: vec![text.to_owned()], ..AgentArgs::default() };
    let settings = load(&args).expect("loads");
    assert_eq!((settings.datacenter.as_str(), settings.node_name.as_str()), ("east", "node-7"));
    assert_eq!(settings.http, ["127.0.0.1:8501".parse().expect("v4"), "[::1]:8501".parse().expect("v6")]);
    assert_eq!(settings.grpc.len(), 2);
    assert_eq!(settings.advertise.to_string(), "192.0.2.8");
    assert_eq!((settings.log_level, settings.sidecar_ports.clone()), (LogLevel::Warn, Some(20000..=20010)));
    let (leaf_ttl, root_ttl) = (Duration::from_secs(5400), Duration::from_secs(8760 * 3600));
    let given = CaTimes {
        leaf_ttl: Some(leaf_ttl),
        root_ttl: Some(root_ttl),
        csr_max_per_second: Some(7),
        ..CaTimes::default()
    };
    assert_eq!(settings.ca, given);
    assert_eq!((settings.default_policy, settings.encryption), (Action::Allow, Encryption::BetweenNodes));
    assert_eq!(settings.ebpf, EbpfSettings { enabled: false, bpf_dir: "/sys/fs/bpf/test".into() });
    assert_eq!(settings.cgroup_parent, "test/culvert-1");
    assert_eq!(settings.limits, Limits { http_max_conns: 99, http_max_conns_per_client: 9 });
}

#[test]
fn files_are_read_in_lexical_order_fragments_after_them_and_flags_win() {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("written");
    write("20.json", r#"{"datacenter": "second", "log_level": "debug", "ports": {"http": 2}}"#);
    write("10.hcl", "datacenter = \"first\"\nencryption = \"between-nodes\"\nports { http = 1 grpc = 7 }");
    write("30.txt", "this is not configuration");
    let mut args = server(&["log_level = \"error\""]);
    args.config = vec![dir.path().to_owned()];
    let settings = load(&args).expect("loads");
    assert_eq!((settings.datacenter.as_str(), settings.log_level), ("second", LogLevel::Error));
    assert_eq!((settings.encryption, settings.http[0].port()), (Encryption::BetweenNodes, 2));
    assert_eq!(settings.grpc[0].port(), 7, "repeated blocks merge");
    args.datacenter = Some("flag".into());
    args.http_port = Some(3);
    args.no_ebpf = true;
    let settings = load(&args).expect("loads");
    assert_eq!((settings.datacenter.as_str(), settings.http[0].port(), settings.ebpf.enabled), ("flag", 3, false));
}

#[test]
fn an_unknown_key_is_named_with_its_place() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("a.hcl");
    std::fs::write(&file, "datacenter = \"dc1\"\nports {\n  htp = 1\n}\n").expect("written");
    let mut args = server(&[]);
    args.config = vec![file.clone()];
    let error = load(&args).expect_err("unknown").to_string();
    assert_eq!(error, format!("{}:3:3: invalid config key ports.htp", file.display()));
    assert_eq!(self::error("colour = 1"), "-hcl:1:1: invalid config key colour");
}

#[test]
fn what_consul_knows_and_culvert_does_not_honour_is_refused_by_name() {
    for (fragment, key) in [
        ("retry_join = [\"192.0.2.1\"]", "retry_join"),
        ("ports { dns = 8600 }", "ports.dns"),
        ("acl = { enabled = true }", "acl.enabled = true"),
        ("connect { enabled = false }", "connect.enabled = false"),
        ("connect { ca_provider = \"vault\" }", "connect.ca_provider = \"vault\""),
        ("connect { ca_config { private_key = \"x\" } }", "connect.ca_config.private_key"),
        ("bootstrap_expect = 3", "bootstrap_expect = 3"),
        ("ui_config { enabled = true }", "ui_config"),
        ("tls { defaults { verify_incoming = true } }", "tls"),
        ("config_entries { bootstrap = [ { kind = \"x\" config { a = 1 } } ] }", "config_entries"),
    ] {
        let text = error(fragment);
        assert!(text.contains(&format!("config key {key} is not supported")), "{fragment}: {text}");
    }
}

#[test]
fn meta_of_the_node_comes_together_from_all_files_and_is_checked() {
    let pairs = ["node_meta { rack = \"r1\" zone = \"a\" }", "node_meta = { zone = \"b\" }"];
    let settings = load(&server(&pairs)).expect("loads");
    let expected = [("rack", "r1"), ("zone", "b")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(settings.node_meta, expected.into());
    for (fragment, why) in [
        ("node_meta = \"x\"", "must be a block of strings"),
        ("node_meta { rack = 1 }", "the value of \"rack\" must be a string"),
        ("node_meta { consul-x = \"1\" }", "not begin with \"consul-\""),
        ("node_meta { \"a b\" = \"1\" }", "letters, digits"),
        (&format!("node_meta {{ a = \"{}\" }}", "x".repeat(513)), "longer than 512 bytes"),
    ] {
        let text = error(fragment);
        assert!(text.contains(why), "{fragment}: {text}");
    }
}

#[test]
fn a_key_without_effect_may_say_so() {
    let fragments = [
        "retry_join = []",
        "ports { dns = -1 https = 0 }",
        "ui_config { enabled = false }",
        "encrypt = \"\"",
        "enable_script_checks = false",
        "disable_update_check = true",
        "disable_remote_exec = true",
        "bootstrap = true",
    ];
    load(&server(&fragments)).expect("loads");
}

#[test]
fn a_bad_value_is_refused_with_key_and_place() {
    for (fragment, text) in [
        ("datacenter = 5", "-hcl:1:1: datacenter: must be a string, got a whole number"),
        ("ports { http = 70000 }", "-hcl:1:9: ports.http: must be a port, or 0 for a free one, got 70000"),
        ("ports { http = -1 }", "-hcl:1:9: ports.http: must be a port, or 0 for a free one, got -1"),
        ("ports = 5", "-hcl:1:9: ports: must be a block, got a whole number"),
        (
            "bind_addr = \"{{ GetPrivateIP }}\"",
            "-hcl:1:1: bind_addr: templates are not supported by culvert yet: give an IP address",
        ),
        ("client_addr = \"\"", "-hcl:1:1: client_addr: must name at least one IP address"),
        ("data_dir = \"x\"", "-hcl:1:1: data_dir: must be an absolute path"),
        ("server = \"yes\"", "-hcl:1:1: server: must be true or false, got a string"),
        ("a = = 1", "-hcl:1:5: expected a value, found '='"),
        (
            "limits { http_max_conns_per_client = 0 }",
            "-hcl:1:10: limits.http_max_conns_per_client: must be greater than 0",
        ),
    ] {
        assert_eq!(error(fragment), text);
    }
    for fragment in [
        "encryption = \"never\"",
        "default_intention_policy = \"ask\"",
        "log_level = \"loud\"",
        "node_name = \"a/b\"",
        "cgroup_parent = \"../x\"",
        "connect { ca_config { leaf_cert_ttl = \"long\" } }",
        "datacenter = \"d c\"",
        "ports { sidecar_min_port = 9 sidecar_max_port = 8 }",
        "advertise_addr = \"0.0.0.0\" ",
    ] {
        let mut args = server(&[fragment]);
        args.advertise = None;
        args.bind = Some("192.0.2.1".into());
        args.node = None;
        load(&args).expect_err(fragment);
    }
}

#[test]
fn errors_of_flags_name_the_flag() {
    let args = AgentArgs { http_port: Some(70000), ..server(&[]) };
    assert!(load(&args).expect_err("port").to_string().starts_with("-http-port: "));
}

#[test]
fn an_agent_without_a_server_is_refused() {
    let args = AgentArgs { server: false, ..server(&[]) };
    assert!(load(&args).expect_err("no server").to_string().contains("-server"));
    load(&AgentArgs { server: false, ..server(&["server = true"]) }).expect("the file says it");
}

#[test]
fn zero_turns_sidecar_ports_and_grpc_off() {
    let settings = load(&server(&["ports { sidecar_min_port = 0 grpc = 0 }"])).expect("loads");
    assert_eq!((settings.sidecar_ports, settings.grpc), (None, vec![]));
}

#[test]
fn a_reload_names_what_it_cannot_change() {
    let before = load(&server(&[])).expect("loads");
    let after = load(&server(&["encryption = \"between-nodes\" default_intention_policy = \"allow\""]));
    assert_eq!(before.fixed_changes(&after.expect("loads")), Vec::<&str>::new());
    let after = load(&server(&["datacenter = \"x\" ports { http = 1 } log_level = \"debug\""])).expect("loads");
    assert_eq!(before.fixed_changes(&after), ["datacenter", "client_addr, ports.http", "log_level"]);
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(datacenter|ports|http|acl|connect|ca_config|=|\\{|\\}|\\[|\\]|\"x\"|-1|true|,| |\n|\\PC){0,30}") {
        drop(check(&text, "f"));
    }
}
