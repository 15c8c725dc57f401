//! Job files that must be refused: the words, and the text they point at.

use culvert_jobspec::{Diagnostics, MAX_DIAGNOSTICS, parse};
use std::collections::BTreeMap;

/// A job that is right; every case breaks one thing in it.
const GOOD: &str = r#"job "shop" {
  group "web" {
    network {
      mode = "bridge"
      port "http" {
        static = 9002
        to     = 9002
      }
    }
    service {
      name = "web"
      port = "http"
      check {
        type     = "http"
        path     = "/health"
        interval = "5s"
        timeout  = "1s"
      }
      connect {
        sidecar_service {
          proxy {
            upstreams {
              destination_name = "api"
              local_bind_port  = 8080
            }
          }
        }
      }
    }
    task "serve" {
      driver = "exec"
      config {
        command = "/bin/serve"
      }
    }
  }
}
"#;

fn refuse(source: &str) -> Diagnostics {
    parse(source, "shop.nomad.hcl", &BTreeMap::new()).expect_err("the job must be refused")
}

/// Message and marked text of every error.
fn marks(errors: &Diagnostics) -> Vec<(String, String)> {
    let marked = |location: &culvert_jobspec::Location| {
        location.text.chars().skip(location.column - 1).take(location.width).collect::<String>()
    };
    let mark = |error: &culvert_jobspec::Diagnostic| {
        (error.message.clone(), error.location.as_ref().map(marked).unwrap_or_default())
    };
    errors.errors().iter().map(mark).collect()
}

/// Replaces `from` in [`GOOD`] by `to` and expects exactly this error at this text.
fn case(from: &str, to: &str, message: &str, marked: &str) {
    assert!(GOOD.contains(from), "{from:?} is not in the good job");
    let source = GOOD.replacen(from, to, 1);
    let errors = refuse(&source);
    assert_eq!(marks(&errors), [(message.to_owned(), marked.to_owned())], "{from:?} -> {to:?}\n{errors}");
}

#[test]
fn the_good_job_is_good() {
    parse(GOOD, "shop.nomad.hcl", &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"));
}

#[test]
fn an_error_shows_file_line_column_text_and_hint() {
    let errors = refuse(&GOOD.replace("driver =", "drivr ="));
    assert_eq!(
        errors.to_string(),
        r#"Error: Missing task driver

  on shop.nomad.hcl line 30, column 5:
  30:     task "serve" {
          ^^^^^^^^^^^^

  hint: add driver = "exec"

Error: "task" has no argument named "drivr"

  on shop.nomad.hcl line 31, column 7:
  31:       drivr = "exec"
            ^^^^^

  hint: did you mean "driver"?
"#
    );
}

#[test]
fn several_errors_come_at_once_in_the_order_of_the_file() {
    let source = GOOD.replace("\"5s\"", "\"5\"").replace("8080", "\"x\"").replace("\"exec\"", "\"java\"");
    assert_eq!(
        marks(&refuse(&source)).into_iter().map(|(message, _)| message).collect::<Vec<_>>(),
        [
            "\"interval\" is not a duration: \"5\"",
            "\"local_bind_port\" must be a whole number, this is a string",
            "driver \"java\" is not supported by culvert yet",
        ]
    );
}

#[test]
fn syntax_errors_have_their_place() {
    for (source, line, column) in [
        ("job \"x\" {\n  a = \n}\n", 2, 7),
        ("job \"x\" {\n", 1, 10),
        ("job \"x\" { group \"y\" {} }\n", 1, 17),
        ("job \"x\" {\n  a = 1\n  a = 2\n}\n", 3, 3),
        ("job \"x\" {\n  a = \"\\q\"\n}\n", 2, 10),
    ] {
        let errors = refuse(source);
        let location = errors.errors()[0].location.clone().expect("place");
        assert_eq!((location.line, location.column), (line, column), "{source}\n{errors}");
    }
    let one_line = refuse("job \"x\" { group \"y\" {} }\n");
    assert!(one_line.to_string().contains("break the line"), "{one_line}");
    let json = refuse("{ \"job\": {} }");
    assert!(json.to_string().contains("JSON job files are not supported"), "{json}");
}

#[test]
fn what_nomad_knows_and_culvert_has_not_is_refused_by_name() {
    let unsupported = |name: &str, block: &str| format!("\"{name}\" in \"{block}\" is not supported by culvert yet");
    for (anchor, block, names) in [
        ("  group \"web\" {", "job", &["update", "constraint", "reschedule", "periodic", "vault", "spread"][..]),
        ("    network {", "group", &["volume", "ephemeral_disk", "scaling", "constraint", "disconnect"]),
        ("      mode = \"bridge\"", "network", &["dns", "cni"]),
        ("      check {", "service", &["check_restart", "weights"]),
        ("        type     = \"http\"", "check", &["check_restart"]),
        ("        sidecar_service {", "connect", &["gateway", "sidecar_task"]),
        ("            upstreams {", "proxy", &["expose", "transparent_proxy"]),
        ("              destination_name = \"api\"", "upstreams", &["mesh_gateway"]),
        ("      config {", "task", &["artifact", "template", "volume_mount", "vault", "lifecycle", "identity"]),
    ] {
        for name in names {
            case(anchor, &format!("{name} {{\n}}\n{anchor}"), &unsupported(name, block), name);
        }
    }
    for (anchor, block, names) in [
        ("  group \"web\" {", "job", &["node_pool", "all_at_once", "id"][..]),
        ("    network {", "group", &["shutdown_delay", "stop_after_client_disconnect"]),
        ("      mode = \"bridge\"", "network", &["hostname"]),
        ("        static = 9002", "port", &["host_network", "ignore_collision"]),
        ("      name = \"web\"", "service", &["canary_tags", "on_update", "tagged_addresses"]),
        ("        type     = \"http\"", "check", &["expose", "tls_skip_verify", "grpc_service", "command"]),
        ("        sidecar_service {", "connect", &["native"]),
        ("              destination_name = \"api\"", "upstreams", &["datacenter", "destination_peer"]),
        ("      driver = \"exec\"", "task", &["leader", "shutdown_delay"]),
        ("        command = \"/bin/serve\"", "config", &["work_dir", "cap_add", "pid_mode"]),
    ] {
        for name in names {
            case(anchor, &format!("{name} = 1\n{anchor}"), &unsupported(name, block), name);
        }
    }
}

#[test]
fn words_that_nobody_knows_get_a_hint() {
    for (from, to, message, marked, hint) in [
        ("group \"web\"", "gruop \"web\"", "\"job\" has no block named \"gruop\"", "gruop", "did you mean \"group\"?"),
        ("path     =", "pth     =", "\"check\" has no argument named \"pth\"", "pth", "did you mean \"path\"?"),
        (
            "    network",
            "    restart = 1\n    network",
            "\"group\" has no argument named \"restart\"",
            "restart",
            "\"restart\" is a block",
        ),
        ("job \"shop\"", "jbo \"shop\"", "a job file has no block named \"jbo\"", "jbo", "did you mean \"job\"?"),
        ("\"http\"\n      check", "htpp\n      check", "there is no variable named \"htpp\"", "htpp", "\"htpp\""),
        (
            "\"http\"\n      check",
            "\"htpp\"\n      check",
            "port label \"htpp\" referenced by services web does not exist",
            "\"htpp\"",
            "did you mean \"http\"?",
        ),
    ] {
        let errors = refuse(&GOOD.replacen(from, to, 1));
        let found = errors.errors().iter().zip(marks(&errors)).find(|(_, mark)| mark.0 == message);
        let (error, mark) = found.unwrap_or_else(|| panic!("{message} is not in:\n{errors}"));
        assert_eq!(mark.1, marked);
        assert!(error.hint.as_deref().unwrap_or_default().contains(hint), "{errors}");
    }
}

#[test]
fn jobs_and_groups_say_what_they_lack() {
    let task = &GOOD[GOOD.find("    task").expect("task")..GOOD.rfind("  }\n}").expect("end")];
    case(task, "", "Missing tasks for task group \"web\"", "group \"web\"");
    case(
        "job \"shop\" {",
        "job \"shop\" {\n type = \"batch\"",
        "job type \"batch\" is not supported by culvert yet",
        "\"batch\"",
    );
    case("job \"shop\" {", "job \"shop\" {\n type = \"cron\"", "invalid job type: \"cron\"", "\"cron\"");
    case(
        "job \"shop\" {",
        "job \"shop\" {\n namespace = \"x\"",
        "namespace \"x\" is not supported by culvert yet",
        "\"x\"",
    );
    case("job \"shop\" {", "job \"shop\" {\n priority = 101", "\"priority\" must be between 1 and 100; got 101", "101");
    case("job \"shop\" {", "job \"shop\" {\n datacenters = []", "Missing job datacenters", "[]");
    case(
        "job \"shop\" {",
        "job \"shop\" {\n datacenters = \"dc1\"",
        "\"datacenters\" must be a list of strings, this is a string",
        "\"dc1\"",
    );
    case("job \"shop\"", "job \"my shop\"", "Job ID contains a space", "\"my shop\"");
    case("task \"serve\"", "task \"a/b\"", "Task name cannot include slashes", "\"a/b\"");
    case("task \"serve\"", "task \"alloc\"", "Task name cannot be \"alloc\"", "\"alloc\"");
    case("task \"serve\"", "task \"..\"", "Task name \"..\" is not usable as a name", "\"..\"");
    case("group \"web\"", "group \"\"", "Task group name is empty", "\"\"");
    case("group \"web\" {", "group \"web\" {\n count = -1", "\"count\" must be between 0 and 1000; got -1", "-1");
    assert_eq!(marks(&refuse("")), [("the file has no \"job\" block".to_owned(), String::new())]);
    assert_eq!(marks(&refuse("job \"x\" {\n}\n")), [("Missing job task groups".to_owned(), "job \"x\"".to_owned())]);
    let two = format!("{GOOD}\njob \"other\" {{\n}}\n");
    let expected = ("only one \"job\" block is allowed in a job file".to_owned(), "job \"other\"".to_owned());
    assert_eq!(marks(&refuse(&two)), [expected]);
}

#[test]
fn networks_of_mesh_services_use_nomads_words() {
    let wrong_mode = |mode: &str| {
        format!(
            "connect sidecar: invalid network mode for Consul Connect: group \"web\" uses network mode {mode:?}; must be \"bridge\" or \"cni/*\""
        )
    };
    case("mode = \"bridge\"", "mode = \"host\"", &wrong_mode("host"), "\"host\"");
    case("      mode = \"bridge\"\n", "", &wrong_mode("host"), "network");
    case(
        "mode = \"bridge\"",
        "mode = \"cni/mine\"",
        "network mode \"cni/mine\" is not supported by culvert yet",
        "\"cni/mine\"",
    );
    let count = |count: usize| {
        format!("connect sidecar: must have exactly one network for Consul Connect: group \"web\" has {count} networks")
    };
    case("    service {", "    network {\n      mode = \"bridge\"\n    }\n    service {", &count(2), "network");
    let network = &GOOD[GOOD.find("    network").expect("network")..GOOD.find("    service").expect("service")];
    let plain = GOOD.replace(network, "").replace("port = \"http\"", "port = 80");
    assert_eq!(marks(&refuse(&plain)), [(count(0), "group \"web\"".to_owned())]);
}

#[test]
fn ports_use_nomads_words() {
    case("static = 9002", "static = 70000", "Port http (70000) cannot be greater than 65535", "70000");
    case("static = 9002", "static = 0", "Port http (0) must be greater than 0", "0");
    case(
        "to     = 9002",
        "to     = 70000",
        "Port \"http\" cannot be mapped to a port (70000) greater than 65535",
        "70000",
    );
    case("to     = 9002", "to     = -5", "Port \"http\" cannot be mapped to negative value -5", "-5");
    case(
        "      port \"http\" {",
        "      port \"http\" {\n      }\n      port \"http\" {",
        "Port label http already in use by web",
        "\"http\"",
    );
    case(
        "      port \"http\" {",
        "      port \"x\" {\n        static = 9002\n      }\n      port \"http\" {",
        "Static port 9002 already reserved by web:x",
        "9002",
    );
    case(
        "group \"web\" {",
        "group \"web\" {\n count = 2",
        "group \"web\" has count 2 and static port 9002: one node can give it to one allocation only",
        "9002",
    );
    let end = GOOD.rfind('}').expect("end");
    let second = GOOD[GOOD.find("  group").expect("group")..end].replace("\"web\"", "\"two\"");
    let source = format!("{}{second}}}\n", &GOOD[..end]);
    assert_eq!(
        marks(&refuse(&source)),
        [("Static port 9002 already reserved by web:http".to_owned(), "9002".to_owned())]
    );
}

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
fn tasks_use_nomads_words() {
    let line = "      driver = \"exec\"";
    for (add, message, marked) in [
        ("kill_timeout = \"2h\"", "kill_timeout can be at most 1h0m0s; got 2h0m0s", "\"2h\""),
        ("kill_signal = \"SIGFOO\"", "unknown signal: \"SIGFOO\"", "\"SIGFOO\""),
        ("resources {\n cpu = 0\n }", "minimum CPU value is 1; got 0", "0"),
        ("resources {\n memory = 5\n }", "minimum MemoryMB value is 10; got 5", "5"),
        ("resources {\n cores = 1\n }", "\"cores\" in \"resources\" is not supported by culvert yet", "cores"),
        ("logs {\n max_files = 0\n }", "minimum number of files is 1; got 0", "0"),
        ("logs {\n max_file_size = 0\n }", "minimum file size is 1MB; got 0", "0"),
        ("restart {\n mode = \"never\"\n }", "Unsupported restart mode: \"never\"", "\"never\""),
        ("restart {\n interval = \"1s\"\n }", "Interval can not be less than 5s (got 1s)", "\"1s\""),
        (
            "restart {\n attempts = 0\n mode = \"delay\"\n }",
            "Restart policy \"delay\" with 0 attempts is ambiguous",
            "restart",
        ),
        (
            "restart {\n attempts = 10\n interval = \"1m\"\n }",
            "Nomad can't restart the TaskGroup 10 times in an interval of 1m0s with a delay of 15s",
            "restart",
        ),
        ("env {\n X = [1]\n }", "\"X\" in \"env\" must be a string, this is a list", "[1]"),
        ("env {\n A = 1\n }\n env {\n B = 1\n }", "only one \"env\" is allowed in \"task\"", "env"),
        ("user = env.HOME", "\"user\" cannot hold a value that is known only when an allocation runs", "env.HOME"),
    ] {
        case(line, &format!("{line}\n{add}"), message, marked);
    }
    case(line, "      driver = \"podman\"", "driver \"podman\" is not supported by culvert yet", "\"podman\"");
    case(line, "      driver = \"exe\"", "invalid driver: \"exe\"", "\"exe\"");
    case("        command = \"/bin/serve\"\n", "", "\"config\" requires \"command\"", "config");
    case(
        "\"/bin/serve\"",
        "\"/bin/serve\"\n args = \"x\"",
        "\"args\" must be a list of strings, this is a string",
        "\"x\"",
    );
    case("type     = \"http\"", "type     = null", "\"check\" requires \"type\"", "check");
    case("\"5s\"", "null", "missing required value interval. Interval cannot be less than 1s", "check");
    case(
        "destination_name = \"api\"",
        "destination_name = null",
        "\"upstreams\" requires \"destination_name\"",
        "upstreams",
    );
    case("8080", "null", "\"upstreams\" requires \"local_bind_port\"", "upstreams");
    case(line, "      driver = null", "Missing task driver", "task \"serve\"");
    case("\"/bin/serve\"", "null", "\"config\" requires \"command\"", "config");
}

#[test]
fn expressions_say_where_they_fail() {
    for (expression, message, marked) in [
        ("var.nope", "there is no variable named \"nope\"", "var.nope"),
        ("local.nope", "there is no local named \"nope\"", "local.nope"),
        (
            "upper(\"${NOMAD_ALLOC_ID}\")",
            "upper() cannot use a value that is known only when an allocation runs",
            "\"${NOMAD_ALLOC_ID}\"",
        ),
        ("env.A == \"x\"", "a comparison cannot use a value that is known only when an allocation runs", "env.A"),
        ("file(\"x\")", "function \"file\" is not supported by culvert yet", "file"),
        ("uper(\"x\")", "there is no function named \"uper\"", "uper"),
        ("upper()", "upper() takes 1 arguments, here are 0", "upper"),
        ("join(\",\", \"x\")", "argument 2 of join() must be a list of strings, this is a string", "\"x\""),
        ("1 / 0", "division by zero", "0"),
        ("1 + \"a\"", "a number is required, this is a string", "\"a\""),
        ("[1][3]", "element 3 of a list of 1 does not exist", "[1][3]"),
        ("{ a = 1 }.b", "the map has no element \"b\"", "{ a = 1 }.b"),
        ("\"${[1]}\"", "\"X\" in \"env\" must be a string, this is a list", "\"${[1]}\""),
        ("\"a${[1]}\"", "a list cannot stand inside a string", "[1]"),
        ("path.module", "\"path.…\" belongs to other HCL tools, not to job files", "path.module"),
        ("format(\"%d\", 1.5)", "\"%d\" needs a whole number, this is a number", "1.5"),
        ("format(\"%s\")", "format() has no argument for \"%s\"", "format"),
        ("format(\"%999999s\", 1)", "format() takes a width of at most 256", "format"),
        ("[for x in 3 : x]", "\"for\" needs a list or a map, this is a number", "3"),
    ] {
        let line = "      driver = \"exec\"";
        case(line, &format!("{line}\nenv {{\n X = {expression}\n}}"), message, marked);
    }
}

#[test]
fn variables_and_locals_say_what_is_wrong() {
    for (top, message, marked) in [
        ("variable \"a\" {}", "Unset variable \"a\": a used variable must be set or have a default value", "\"a\""),
        (
            "variable \"a\" {\n type = number\n default = \"x\"\n}",
            "invalid value of variable \"a\": a number is required, but this is a string",
            "\"x\"",
        ),
        ("variable \"a\" {\n type = \"string\"\n default = 1\n}", "\"string\" in quotes is not a type", "\"string\""),
        ("variable \"a\" {\n type = strng\n default = 1\n}", "\"strng\" is not a type", "strng"),
        (
            "variable \"a\" {\n sensitive = true\n default = 1\n}",
            "\"sensitive\" in \"variable\" is not supported by culvert yet",
            "sensitive",
        ),
        ("variable \"a\" {\n default = var.b\n}", "there is no variable named \"b\"", "var.b"),
        ("variable \"a\" {\n default = \"${NOMAD_DC}\"\n}", "there is no variable named \"NOMAD_DC\" here", "NOMAD_DC"),
        (
            "variable \"a\" {\n default = 1\n}\nvariable \"a\" {\n default = 1\n}",
            "variable \"a\" is declared twice",
            "\"a\"",
        ),
        (
            "variable \"a\" {\n default = 1\n validation {\n condition = var.a > 5\n error_message = \"too small\"\n }\n}",
            "invalid value of variable \"a\": too small",
            "var.a > 5",
        ),
        ("locals {\n a = local.a\n}", "local \"a\" depends on itself", "a"),
        ("locals {\n a = 1\n}\nlocals {\n a = 2\n}", "local \"a\" is defined twice", "a"),
    ] {
        let errors = refuse(&format!("{top}\n{GOOD}"));
        assert_eq!(marks(&errors), [(message.to_owned(), marked.to_owned())], "{top}\n{errors}");
    }
    let given = BTreeMap::from([("nope".to_owned(), "1".to_owned())]);
    let errors = parse(GOOD, "f", &given).expect_err("unknown -var");
    assert_eq!(
        marks(&errors),
        [("a \"nope\" variable was set but was not found in known variables".to_owned(), String::new())]
    );
    let source = format!("variable \"n\" {{\n type = number\n}}\n{GOOD}");
    let errors = parse(&source, "f", &BTreeMap::from([("n".to_owned(), "1 +".to_owned())])).expect_err("syntax");
    assert!(errors.to_string().starts_with("Error: invalid value of -var n: "), "{errors}");
}

#[test]
fn many_errors_are_counted_and_not_all_kept() {
    let many: String = (0..200).map(|n| format!("  wrong{n} = 1\n")).collect();
    let errors = refuse(&GOOD.replacen("  group", &format!("{many}  group"), 1));
    assert_eq!(errors.errors().len(), MAX_DIAGNOSTICS);
    assert!(errors.to_string().ends_with("… and 150 more errors\n"), "{errors}");
}
