//! Jobs, groups, networks, ports and tasks.

use crate::{GOOD, case, marks, refuse};

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
