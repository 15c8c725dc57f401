//! Services, their sidecars and checks.

use crate::{GOOD, case, refuse};

#[test]
fn services_use_nomads_words() {
    case(
        "name = \"web\"",
        "name = \"Web\"",
        "Consul Connect service name \"Web\" in group \"web\" must not contain uppercase characters",
        "\"Web\"",
    );
    case(
        "name = \"web\"",
        "name = \"we_b\"",
        "Service name must be valid per RFC 1123 and can contain only alphanumeric characters or dashes and must be no longer than 63 characters: \"we_b\"",
        "\"we_b\"",
    );
    case("port = \"http\"", "port = \"70000\"", "port 70000 is not between 1 and 65535", "\"70000\"");
    case(
        "name = \"web\"",
        "provider = \"nomad\"\n name = \"web\"",
        "Service with provider nomad cannot include Connect blocks",
        "\"nomad\"",
    );
    case(
        "name = \"web\"",
        "address_mode = \"driver\"\n name = \"web\"",
        "address_mode \"driver\" is not supported by culvert yet",
        "\"driver\"",
    );
    let service = &GOOD[GOOD.find("    service").expect("service")..GOOD.find("    task").expect("task")];
    let second = service.replace("8080", "8081");
    case("    task \"serve\"", &format!("{second}    task \"serve\""), "service \"web\" is duplicate", "\"web\"");
    let third = service.replace("name = \"web\"", "name = \"other\"");
    case(
        "    task \"serve\"",
        &format!("{third}    task \"serve\""),
        "Consul Connect services \"web\" and \"other\" in group \"web\" using same address for upstreams (127.0.0.1:8080)",
        "8080",
    );
    let fourth = third.replace("local_bind_port", "local_bind_address = \"::1\"\nlocal_bind_port");
    case(
        "    task \"serve\"",
        &format!("{fourth}    task \"serve\""),
        "Consul Connect services \"web\" and \"other\" in group \"web\" using same address for upstreams ([::1]:8080)",
        "8080",
    );
    case(
        "8080",
        "9002",
        "upstream \"api\" binds 127.0.0.1:9002, where service \"web\" of group \"web\" listens",
        "9002",
    );
    case(
        "        sidecar_service {",
        "        sidecar_service {\n port = \"nope\"",
        "\"port\" in \"sidecar_service\" is not supported by culvert yet",
        "port",
    );
    case(
        "local_bind_port",
        "local_bind_address = \"0.0.0.0\"\n local_bind_port",
        "local_bind_address 0.0.0.0 is not a loopback address",
        "\"0.0.0.0\"",
    );
    case("              local_bind_port  = 8080\n", "", "\"upstreams\" requires \"local_bind_port\"", "upstreams");
    case("destination_name = \"api\"", "destination_name = \"a b\"", "\"a b\" is not the name of a service", "\"a b\"");
    case(
        "          proxy {",
        "          proxy {\n config {\n encryption = \"never\"\n }",
        "config \"encryption\" cannot be \"never\"",
        "\"never\"",
    );
    case(
        "          proxy {",
        "          proxy {\n config {\n envoy_extra_static_clusters_json = \"{}\"\n }",
        "config \"envoy_extra_static_clusters_json\" is not supported by culvert yet",
        "\"{}\"",
    );
    case(
        "          proxy {",
        "          proxy {\n config {\n encrypton = \"always\"\n }",
        "config has no setting \"encrypton\"",
        "\"always\"",
    );
    let connect = &service[service.find("      connect").expect("connect")..];
    case(
        connect,
        "connect {\n }\n }\n",
        "Consul Connect must be exclusively native, make use of a sidecar, or represent a Gateway",
        "connect",
    );
    case(
        "      driver = \"exec\"",
        "      driver = \"exec\"\n service {\n name = \"s\"\n connect {\n }\n }",
        "service \"s\" cannot have \"connect\" block, only services defined in a \"group\" block can",
        "connect",
    );
}

#[test]
fn checks_use_nomads_words() {
    let name = "service: \"web\" check";
    case(
        "type     = \"http\"\n        path     = \"/health\"",
        "type     = \"tcp\"",
        &format!("Check {name} invalid: tcp checks are not valid for Connect enabled services"),
        "\"tcp\"",
    );
    case(
        "type     = \"http\"",
        "type     = \"grpc\"",
        "check type \"grpc\" is not supported by culvert yet",
        "\"grpc\"",
    );
    case(
        "type     = \"http\"",
        "type     = \"udp\"",
        "invalid check type (\"udp\"), must be one of \"grpc\", \"http\", \"tcp\", \"script\"",
        "\"udp\"",
    );
    case("        type     = \"http\"\n", "", "\"check\" requires \"type\"", "check");
    case(
        "        path     = \"/health\"\n",
        "",
        &format!("Check {name} invalid: http type must have http path"),
        "check",
    );
    case(
        "\"/health\"",
        "\"health\"",
        &format!("Check {name} invalid: http type must have relative http path"),
        "\"health\"",
    );
    case(
        "        interval = \"5s\"\n",
        "",
        "missing required value interval. Interval cannot be less than 1s",
        "check",
    );
    case("\"5s\"", "\"500ms\"", "interval (500ms) cannot be lower than 1s", "\"500ms\"");
    case("        timeout  = \"1s\"\n", "", "missing required value timeout. Timeout cannot be less than 1s", "check");
    case("\"1s\"", "\"500ms\"", "timeout (500ms) is lower than required minimum timeout 1s", "\"500ms\"");
    case(
        "timeout  =",
        "initial_status = \"fine\"\n timeout  =",
        &format!(
            "Check {name} invalid: invalid initial check state (fine), must be one of \"passing\", \"warning\", \"critical\" or empty"
        ),
        "\"fine\"",
    );
    case(
        "timeout  =",
        "address_mode = \"auto\"\n timeout  =",
        &format!("Check {name} invalid: invalid address_mode \"auto\" - auto only valid for services"),
        "\"auto\"",
    );
    case(
        "      port = \"http\"\n",
        "",
        &format!("Check {name} invalid: check requires a port but neither check nor service \"web\" have a port"),
        "check",
    );
    case(
        "timeout  =",
        "port = \"nope\"\n timeout  =",
        "port label \"nope\" referenced by services web does not exist",
        "\"nope\"",
    );
    case(
        "timeout  =",
        "header {\n X-A = \"text\"\n }\n timeout  =",
        &format!("Check {name} invalid: header \"X-A\" must be a list of strings"),
        "\"text\"",
    );
    case(
        "timeout  =",
        "header {\n X-A = [\"a\\r\\nB: c\"]\n }\n timeout  =",
        &format!("Check {name} invalid: header \"X-A\" holds a line break"),
        "[\"a\\r\\nB: c\"]",
    );
    let check = &GOOD[GOOD.find("      check").expect("check")..GOOD.find("      connect").expect("connect")];
    case("      connect", &format!("{check}      connect"), &format!("check {name:?} is duplicate"), "check");
}

#[test]
fn a_block_in_a_free_map_stands_once_and_holds_no_other() {
    let with = |config: &str, message: &str, marked: &str| {
        let anchor = "destination_name = \"api\"";
        case(anchor, &format!("{anchor}\n config {{\n {config}\n }}"), message, marked);
    };
    let limits = "limits {\n max_connections = 1\n }";
    for other in [limits, "limits = { max_connections = 2 }"] {
        let errors =
            refuse(&GOOD.replace("upstreams {", &format!("upstreams {{\n config {{\n {other}\n {limits}\n }}")));
        assert!(
            errors.errors().iter().all(|error| error.message == "only one \"limits\" is allowed in \"config\""),
            "{errors}"
        );
    }
    with("limits \"x\" {\n max_connections = 1\n }", "\"limits\" takes no label", "\"x\"");
    with("limits {\n deep {\n }\n }", "\"limits\" holds only key = value", "deep");
    let words = "config \"max_pending_requests\" is not supported by culvert yet";
    with("limits {\n max_pending_requests = 1\n }", words, "limits");
    let env = "env {\n K {\n }\n }\n      driver";
    case("      driver", env, "\"K\" in \"env\" must be a string, this is a map", "K");
}
