//! References that nothing will replace.

use crate::{GOOD, case, refuse};

/// Where a text of the good job can stand: what is replaced, by what, and whether tasks' names have a value there.
const PLACES: &[(&str, &str, bool)] = &[
    ("  group \"web\" {", "meta {\n k = \"@\"\n}\n  group \"web\" {", true),
    ("    network {", "meta {\n k = \"@\"\n}\n    network {", true),
    ("      driver", "meta = { k = \"@\" }\n      driver", true),
    ("      driver", "env {\n K = \"a @ b\"\n}\n      driver", true),
    ("\"/bin/serve\"", "\"@\"", true),
    ("\"/bin/serve\"", "\"/bin/serve\"\n args = [\"-a\",\n \"@\"]", true),
    ("name = \"web\"", "name = \"web-@\"", false),
    ("name = \"web\"", "name = \"web\"\n tags = [\"a\", \"@\"]", false),
    ("name = \"web\"", "name = \"web\"\n meta {\n k = \"@\"\n}", false),
    ("\"/health\"", "\"/health\"\n name = \"@\"", false),
    ("\"/health\"", "\"/health?@\"", false),
    ("\"/health\"", "\"/health\"\n body = \"@\"", false),
    ("\"/health\"", "\"/health\"\n header {\n X-K = [\"@\"]\n}", false),
    ("sidecar_service {", "sidecar_service {\n tags = [\"@\"]", false),
    ("sidecar_service {", "sidecar_service {\n meta {\n k = \"@\"\n}", false),
];

#[test]
fn what_nothing_will_replace_is_refused_wherever_it_stands() {
    for (from, to, in_task) in PLACES {
        let refused = |reference: &str, message: &str| {
            case(from, &to.replace('@', reference), &format!("{reference} {message}"), reference);
        };
        let unsupported = "is not supported by culvert yet";
        refused("${node.class}", unsupported);
        refused("${attr.cpu.numcores}", unsupported);
        refused("${NOMAD_PARENT_CGROUP}", unsupported);
        refused("${NOMAD_PORT_nope}", "refers to port \"nope\", which group \"web\" does not have");
        if !in_task {
            refused("${NOMAD_TASK_DIR}", "has a value in tasks only");
        }
    }
}

#[test]
fn every_kind_of_reference_is_refused_by_name() {
    let in_env = |reference: &str, message: &str| {
        let env = format!("env {{\n K = \"{reference}\"\n}}\n      driver");
        case("      driver", &env, &format!("{reference} {message}"), reference);
    };
    for name in ["node.pool", "node.unique.nme", "attr.os.name", "attr.consul.version"] {
        in_env(&format!("${{{name}}}"), "is not supported by culvert yet");
    }
    for name in ["MEMORY_MAX_LIMIT", "CPU_CORES", "JOB_PARENT_ID", "TOKEN", "UNIX_ADDR", "ENVOY_ADMIN_ADDR_web", "X"] {
        in_env(&format!("${{NOMAD_{name}}}"), "is not supported by culvert yet");
    }
    for kind in ["PORT", "IP", "ADDR"] {
        for where_ in ["", "HOST_", "ALLOC_"] {
            let message = "refers to port \"htpp\", which group \"web\" does not have";
            in_env(&format!("${{NOMAD_{where_}{kind}_htpp}}"), message);
        }
        let message = "refers to upstream \"web\", which group \"web\" does not have";
        in_env(&format!("${{NOMAD_UPSTREAM_{kind}_web}}"), message);
    }
    in_env("${NOMAD_META_owner}", "refers to meta \"owner\", which group \"web\" does not have");
    let meta = "meta {\n a = \"x\"\n k = \"${NOMAD_META_a}\"\n}\n  group \"web\" {";
    let refused = "${NOMAD_META_a} in \"meta\": one key cannot refer to another";
    case("  group \"web\" {", meta, refused, "${NOMAD_META_a}");
    in_env(
        "${NOMAD_PORT_connect-proxy-api}",
        "refers to port \"connect-proxy-api\", which group \"web\" does not have",
    );
}

#[test]
fn a_hint_names_what_was_meant() {
    for (reference, hint) in [
        ("node.class", "culvert knows node.datacenter, node.unique.id, node.unique.name"),
        ("node.unique.nme", "did you mean ${node.unique.name}?"),
        ("attr.os", "culvert knows attr.cpu.arch, attr.culvert.version, attr.kernel.name, attr.unique.hostname"),
        ("NOMAD_PORT_htpp", "did you mean ${NOMAD_PORT_http}?"),
        ("NOMAD_ALLOC_IDX", "did you mean ${NOMAD_ALLOC_ID}?"),
    ] {
        let errors = refuse(&GOOD.replace("/bin/serve", &format!("${{{reference}}}")));
        assert_eq!(errors.errors()[0].hint.as_deref(), Some(hint), "{errors}");
    }
}

#[test]
fn what_stands_elsewhere_is_refused_where_it_is_used() {
    let source = format!("locals {{\n x = \"${{node.class}}\"\n}}\n{}", GOOD.replace("\"/bin/serve\"", "local.x"));
    let errors = refuse(&source).to_string();
    assert!(errors.contains("${node.class} is not") && errors.contains("command = local.x"), "{errors}");
    let two = GOOD.replacen("job \"shop\" {", "job \"shop\" {\n meta = { k = \"${node.class}\" }", 1);
    let group = two[two.find("  group").expect("a group")..two.rfind('}').expect("its end")].to_owned();
    let two =
        two.replacen(&group, &format!("{group}{}", group.replace("9002", "9003").replace("\"web\" {", "\"two\" {")), 1);
    let errors = refuse(&two);
    assert_eq!(errors.errors().len(), 1, "the job's meta is told of once: {errors}");
}
