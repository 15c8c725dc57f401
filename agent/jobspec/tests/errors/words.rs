//! Words that culvert has not, and words that nobody has.

use crate::{GOOD, case, marks, refuse};

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
