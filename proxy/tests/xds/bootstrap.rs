//! Bootstrap files and Envoy's command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use culvert_proxy::bootstrap::{Args, ArgsError, Bootstrap, BootstrapError, Command, ControlPlane, Level};
use culvert_proxy::xds::ServerTrust;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::resources::PKI;

const RECORDED: &str = include_str!("../fixtures/bootstrap/count-dashboard.json");

fn recorded() -> Value {
    serde_json::from_str(RECORDED).expect("fixture")
}

fn parse(json: &Value) -> Result<Bootstrap, BootstrapError> {
    Bootstrap::parse(json.to_string().as_bytes())
}

/// The error of the recorded file with `change` made to it.
fn refusal(change: impl FnOnce(&mut Value)) -> String {
    let mut json = recorded();
    change(&mut json);
    parse(&json).expect_err("must be refused").to_string()
}

#[test]
fn reads_what_consul_prints() {
    let bootstrap = Bootstrap::parse(RECORDED.as_bytes()).expect("recorded");
    assert_eq!(bootstrap.node.cluster, "count-dashboard");
    assert!(bootstrap.node.id.ends_with("-sidecar-proxy"), "{}", bootstrap.node.id);
    assert_eq!(bootstrap.node.metadata["namespace"], "default");
    assert_eq!(bootstrap.control_plane, ControlPlane::Unix(PathBuf::from("alloc/tmp/consul_grpc.sock")));
    assert_eq!(bootstrap.token, None);
    assert_eq!(bootstrap.admin.map(|admin| admin.ip().is_loopback()), Some(true));
}

#[test]
fn reads_both_spellings_newer_forms_and_tcp() {
    let json = json!({
        "admin": {
            "accessLog": [{"name": "Consul Admin", "typedConfig": {"@type": "type", "path": "/dev/null"}}],
            "address": {"socketAddress": {"address": "127.0.0.2", "portValue": 19001}},
        },
        "node": {"id": "web-sidecar-proxy", "cluster": "web", "metadata": {"node_name": "n1", "partition": "default"}},
        "layered_runtime": {"layers": [{"name": "base", "static_layer": {"re2.max_program_size.error_level": 1048576}}]},
        "staticResources": {"clusters": [{
            "name": "local_agent", "connectTimeout": "1s", "type": "STATIC",
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {}},
            "loadAssignment": {"clusterName": "local_agent", "endpoints": [{"lbEndpoints": [{"endpoint":
                {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 8502}}}}]}]},
        }]},
        "dynamicResources": {
            "ldsConfig": {"ads": {}, "initialFetchTimeout": "0s", "resourceApiVersion": "V3"},
            "cdsConfig": {"ads": {}, "initialFetchTimeout": "0s", "resourceApiVersion": "V3"},
            "adsConfig": {"apiType": "DELTA_GRPC", "transportApiVersion": "V3", "grpcServices": [{
                "initialMetadata": [{"key": "x-consul-token", "value": "s3cret-token"}],
                "envoyGrpc": {"clusterName": "local_agent"},
            }]},
        },
    });
    let bootstrap = parse(&json).expect("valid");
    assert_eq!(bootstrap.control_plane, ControlPlane::Tcp("127.0.0.1:8502".parse().expect("address")));
    assert!(bootstrap.token.is_some());
    assert!(!format!("{bootstrap:?}").contains("s3cret"));
}

#[test]
fn refuses_by_path_what_it_would_not_honour() {
    type Change = fn(&mut Value);
    let table: [(&str, Change); 8] = [
        ("static_resources.listeners", |json| json["static_resources"]["listeners"] = json!([{"name": "prometheus"}])),
        ("static_resources.clusters[0].transport_socket.typed_config.sni", |json| {
            json["static_resources"]["clusters"][0]["transport_socket"] = tls(&PKI.root);
            json["static_resources"]["clusters"][0]["transport_socket"]["typed_config"]["sni"] = json!("consul");
        }),
        ("stats_sinks", |json| json["stats_sinks"] = json!([{"name": "statsd"}])),
        ("tracing", |json| json["tracing"] = json!({"http": {}})),
        ("admin.access_log_path", |json| json["admin"]["access_log_path"] = json!("/var/log/admin.log")),
        ("dynamic_resources.ads_config.api_type", |json| {
            json["dynamic_resources"]["ads_config"]["api_type"] = json!("GRPC");
        }),
        ("dynamic_resources.lds_config.ads", |json| {
            json["dynamic_resources"]["lds_config"] = json!({"path": "/etc/lds.yaml"});
        }),
        ("node.id", |json| json["node"]["id"] = json!("")),
    ];
    for (path, change) in table {
        let error = refusal(change);
        assert!(error.starts_with(&format!("bootstrap: {path}: ")), "{path}: {error}");
    }
}

/// What Consul adds for an agent with TLS.
fn tls(roots: &str) -> Value {
    let validation = json!({"trusted_ca": {"inline_string": roots}});
    json!({"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": {"validation_context": validation},
    }})
}

#[test]
fn reads_the_roots_of_a_control_plane_with_tls() {
    let mut json = recorded();
    let cluster = &mut json["static_resources"]["clusters"][0];
    cluster["transport_socket"] = tls(&PKI.root);
    let error = parse(&json).expect_err("a unix socket").to_string();
    assert!(error.ends_with("pipe.path: TLS over a unix socket is not supported by culvert"), "{error}");
    let cluster = &mut json["static_resources"]["clusters"][0];
    cluster["loadAssignment"]["endpoints"][0]["lbEndpoints"][0]["endpoint"]["address"] =
        json!({"socket_address": {"address": "127.0.0.1", "port_value": 8503}});
    let trust = ServerTrust::from_pem(PKI.root.as_bytes()).expect("roots");
    let address = "127.0.0.1:8503".parse().expect("address");
    assert_eq!(parse(&json).expect("valid").control_plane, ControlPlane::Tls(address, trust));
    json["static_resources"]["clusters"][0]["transport_socket"] = tls("no pem");
    let error = parse(&json).expect_err("no roots").to_string();
    assert!(error.contains("trusted_ca.inline_string: not a bundle of roots"), "{error}");
}

#[test]
fn a_field_in_two_spellings_is_refused() {
    let error = refusal(|json| {
        json["static_resources"]["clusters"][0]["load_assignment"] = json!({});
    });
    assert_eq!(error, "bootstrap: static_resources.clusters[0].load_assignment: given twice, also as loadAssignment");
}

#[test]
fn errors_never_quote_the_token() {
    let error = refusal(|json| {
        let services = &mut json["dynamic_resources"]["ads_config"]["grpc_services"];
        services["initial_metadata"][0]["value"] = json!("s3cret\r\nx: y");
    });
    assert!(error.contains("initial_metadata[0].value") && !error.contains("s3cret"), "{error}");
    let error = Bootstrap::parse(b"{\"token\": s3cret").expect_err("not json").to_string();
    assert!(error.contains("line 1") && !error.contains("s3cret"), "{error}");
}

#[test]
fn a_missing_file_is_named() {
    let error = Bootstrap::read("/nonexistent/bootstrap.json".as_ref()).expect_err("no such file");
    assert_eq!(error.to_string(), "bootstrap file /nonexistent/bootstrap.json");
}

fn command(line: &str) -> Result<Command, ArgsError> {
    Command::parse(line.split_whitespace().map(OsString::from))
}

#[test]
fn accepts_the_command_line_that_nomad_uses() {
    let line = "-c /secrets/envoy_bootstrap.json -l debug --concurrency 1 --disable-hot-restart";
    let expected = Args {
        config_path: PathBuf::from("/secrets/envoy_bootstrap.json"),
        log_level: Level::Debug,
        concurrency: std::num::NonZeroUsize::new(1),
        admin_address_path: None,
        drain_time: Duration::from_secs(600),
    };
    assert_eq!(command(line), Ok(Command::Serve(expected.clone())));
    let long =
        "--config-path=/secrets/envoy_bootstrap.json --log-level debug --concurrency 1 --base-id 7 --restart-epoch 0";
    assert_eq!(command(long), Ok(Command::Serve(expected)));
}

#[test]
fn knows_the_other_commands() {
    assert!(matches!(command("--mode validate -c x"), Ok(Command::Validate(_))));
    assert_eq!(command("-c x --version"), Ok(Command::Version));
    assert_eq!(command("--help"), Ok(Command::Help));
}

#[test]
fn refuses_flags_by_name() {
    use ArgsError::{NoConfig, NoValue, NoValueWanted, Twice, Unknown, Unsupported, Value};
    let value = |flag, value: &str, expected| Value { flag, value: value.to_owned(), expected };
    let table = [
        ("", NoConfig),
        ("-c", NoValue("--config-path")),
        ("-c a -c b", Twice("--config-path")),
        ("-c a --config-yaml {}", Unsupported("--config-yaml".to_owned())),
        ("-c a --component-log-level upstream:debug", Unsupported("--component-log-level".to_owned())),
        ("-c a --log-path /tmp/x", Unsupported("--log-path".to_owned())),
        ("-c a --frobnicate", Unknown("--frobnicate".to_owned())),
        ("-c a stray", Unknown("stray".to_owned())),
        ("-c a --disable-hot-restart=yes", NoValueWanted("--disable-hot-restart")),
        ("-c a --concurrency two", value("--concurrency", "two", "a number of threads")),
        ("-c a --restart-epoch 1", value("--restart-epoch", "1", "0: there is no hot restart")),
        ("-c a --mode init_only", value("--mode", "init_only", "serve or validate")),
    ];
    for (line, error) in table {
        assert_eq!(command(line), Err(error), "{line}");
    }
}

proptest! {
    #[test]
    fn no_input_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        Bootstrap::parse(&bytes).expect_err("no bootstrap file is that short");
    }

    #[test]
    fn a_file_that_was_cut_short_is_refused(cut in 0..RECORDED.trim_end().len()) {
        Bootstrap::parse(&RECORDED.as_bytes()[..cut]).expect_err("cut short");
    }
}
