//! Job files that must parse, and what they mean.

use culvert_jobspec::{
    CheckKind, CheckStatus, Command, Driver, Job, Part, PortRef, RestartMode, Template, check_runnable, parse,
};
use std::collections::BTreeMap;
use std::time::Duration;

const SEED_000: &str = include_str!("jobs/seed_000.nomad.hcl");
const SEED_001: &str = include_str!("jobs/seed_001.nomad.hcl");
const EXAMPLE: &str = include_str!("../../../examples/countdash.nomad.hcl");

fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn job(source: &str) -> Job {
    parse(source, "test.nomad.hcl", &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
}

/// A job with one group and one task, whose body is `task`; `top` stands before it.
fn task_job(top: &str, task: &str) -> Job {
    job(&format!(
        "{top}\njob \"j\" {{\n group \"g\" {{\n  network {{\n   mode = \"bridge\"\n   port \"http\" {{}}\n  }}\n  task \"t\" {{\n   driver = \"exec\"\n   config {{\n    command = \"/bin/true\"\n   }}\n   {task}\n  }}\n }}\n}}\n"
    ))
}

fn env(top: &str, expression: &str) -> String {
    let job = task_job(top, &format!("env {{\n X = {expression}\n }}"));
    job.groups[0].tasks[0].env["X"].to_string()
}

#[test]
fn the_seeds_parse_unchanged_and_docker_is_refused_only_to_run() {
    for (source, port) in [(SEED_000, PortRef::Label("http".into())), (SEED_001, PortRef::Number(9002))] {
        let job = job(source);
        assert_eq!(job.id, "countdash");
        assert_eq!((job.region.as_str(), job.namespace.as_str(), job.priority), ("global", "default", 50));
        let api = job.group("api").expect("api");
        assert_eq!(api.services[0].port, Some(PortRef::Number(9001)));
        assert!(api.services[0].connect.is_some());
        let dashboard = job.group("dashboard").expect("dashboard");
        assert_eq!(dashboard.services[0].port, Some(port));
        let http = dashboard.network.port("http").expect("http");
        assert_eq!((http.static_port, http.to), (Some(9002), Some(9002)));
        let proxy = &dashboard.services[0].connect.as_ref().expect("connect").sidecar.proxy;
        assert_eq!(proxy.upstreams[0].destination_name, "count-api");
        assert_eq!(proxy.upstreams[0].local_bind_port, 8080);
        let url = &dashboard.tasks[0].env["COUNTING_SERVICE_URL"];
        let reference = Part::Reference { name: "NOMAD_UPSTREAM_ADDR_count_api".into() };
        assert_eq!(url.parts(), [Part::Literal("http://".into()), reference]);

        let refused = check_runnable(&job).expect_err("docker");
        assert_eq!(refused.errors().len(), 2);
        let expected = "Error: driver \"docker\" of task api.web is not supported by culvert yet\n\n  on test.nomad.hcl line 19, column 16:\n  19:       driver = \"docker\"\n                     ^^^^^^^^\n";
        assert!(refused.to_string().starts_with(expected), "{refused}");
    }
}

#[test]
fn the_example_is_the_seed_with_exec() {
    let job = parse(EXAMPLE, "countdash.nomad.hcl", &variables(&[("bin", "/opt/demo")])).expect("example");
    check_runnable(&job).expect("runnable");
    let task = &job.group("dashboard").expect("dashboard").tasks[0];
    let Driver::Exec(Command { command, args }) = &task.driver else { panic!("{:?}", task.driver) };
    assert_eq!(command.as_literal(), Some("/opt/demo/counter-dashboard"));
    assert!(args.is_empty());
    for group in &job.groups {
        let check = &group.services[0].checks[0];
        assert_eq!(check.success_before_passing, 2);
        assert_eq!(check.initial_status, CheckStatus::Critical);
        let CheckKind::Http(http) = &check.kind else { panic!("{:?}", check.kind) };
        assert_eq!((http.path.to_string().as_str(), http.method.as_str()), ("/health", "GET"));
    }
    let relative = parse(EXAMPLE, "countdash.nomad.hcl", &variables(&[("bin", "target/debug")])).expect_err("relative");
    assert!(relative.to_string().contains("bin must be an absolute path"), "{relative}");
}

#[test]
fn jobs_survive_json() {
    for source in [SEED_000, SEED_001] {
        let job = job(source);
        let json = serde_json::to_string(&job).expect("serialise");
        let back: Job = serde_json::from_str(&json).expect("read back");
        assert_eq!(back, job);
        assert_eq!(check_runnable(&back), check_runnable(&job), "places are kept too");
    }
}

#[test]
fn everything_of_a_task_is_read() {
    let job = task_job(
        "",
        r#"
        user = "nobody"
        kill_timeout = "20s"
        kill_signal  = "sigterm"
        env = { A = 1, B = true }
        meta {
          team = "mesh"
        }
        resources {
          cpu    = 250
          memory = 128
        }
        logs {
          max_files     = 3
          max_file_size = 5
        }
        restart {
          attempts = 5
          interval = "10m"
          delay    = "1s"
          mode     = "delay"
        }
        "#,
    );
    let task = &job.groups[0].tasks[0];
    assert_eq!(task.user.as_deref(), Some("nobody"));
    assert_eq!(task.kill_timeout, Duration::from_secs(20));
    assert_eq!(task.kill_signal, "SIGTERM");
    assert_eq!(task.env["A"], Template::literal("1"));
    assert_eq!(task.env["B"], Template::literal("true"));
    assert_eq!(task.meta["team"], Template::literal("mesh"));
    assert_eq!((task.resources.cpu_mhz, task.resources.memory_mb), (250, 128));
    assert_eq!((task.logs.max_files, task.logs.max_file_size_mb), (3, 5));
    assert_eq!((task.restart.attempts, task.restart.mode), (5, RestartMode::Delay));
}

#[test]
fn a_restart_block_of_the_group_holds_for_its_tasks() {
    let source = SEED_000.replace("task \"web\" {", "restart {\n attempts = 7\n}\ntask \"web\" {");
    let job = job(&source);
    assert_eq!(job.group("api").expect("api").tasks[0].restart.attempts, 7);
    assert_eq!(job.group("dashboard").expect("dashboard").tasks[0].restart.attempts, 2);
    let own = "restart {\n attempts = 0\n}\ntask \"web\" {\n restart {\n delay = \"1s\"\n }";
    let both = self::job(&SEED_000.replace("task \"web\" {", own));
    let restart = both.group("api").expect("api").tasks[0].restart;
    assert_eq!((restart.attempts, restart.delay.as_secs()), (0, 1), "the task's block changes only what it names");
}

#[test]
fn services_take_what_a_mesh_needs() {
    let source = SEED_000.replace(
        "port = \"http\"\n",
        r#"port = "http"
      tags = ["a", "${NOMAD_ALLOC_INDEX}"]
      meta {
        rack = "${meta.rack}"
      }
      check {
        type                     = "http"
        path                     = "/health?full=1"
        method                   = "POST"
        header {
          X-Id = ["${NOMAD_ALLOC_ID}"]
        }
        body                     = "{}"
        interval                 = "10s"
        timeout                  = "2s"
        initial_status           = "warning"
        failures_before_critical = 3
        failures_before_warning  = 2
      }
"#,
    );
    let source = source.replace(
        "local_bind_port  = 8080",
        r#"local_bind_port  = 8080
              local_bind_address = "127.0.0.2"
              config {
                connect_timeout_ms = 500
                limits = { max_connections = 10 }
              }"#,
    );
    let source = source.replace("proxy {", "proxy {\n config {\n encryption = \"between-nodes\"\n }\n");
    let job = job(&source);
    let service = &job.group("dashboard").expect("dashboard").services[0];
    let check = &service.checks[0];
    assert_eq!(check.name.to_string(), "service: \"count-dashboard\" check");
    assert_eq!((check.failures_before_critical, check.failures_before_warning), (3, 2));
    assert_eq!(check.initial_status, CheckStatus::Warning);
    let CheckKind::Http(http) = &check.kind else { panic!("{:?}", check.kind) };
    assert_eq!(http.headers["X-Id"][0].to_string(), "${NOMAD_ALLOC_ID}");
    let proxy = &service.connect.as_ref().expect("connect").sidecar.proxy;
    assert_eq!(serde_json::to_string(&proxy.config).expect("json"), r#"{"encryption":"between-nodes"}"#);
    assert_eq!(
        serde_json::to_string(&proxy.upstreams[0].config).expect("json"),
        r#"{"connect_timeout_ms":500,"limits":{"max_connections":10}}"#
    );
    let block = "limits {\n max_connections = 10\n }";
    let with_block = self::job(&source.replace("limits = { max_connections = 10 }", block));
    assert_eq!(with_block.groups, job.groups, "a map may be a block");
}

#[test]
fn names_of_services_know_their_job_and_group() {
    for (line, expected) in [
        ("", "countdash-api"),
        ("name = \"x-${JOB}-${TASKGROUP}-${TASK}\"", "x-countdash-api-group"),
        ("name = \"${BASE}\"", "countdash-api"),
        ("name = \"api-${NOMAD_ALLOC_INDEX}\"", "api-${NOMAD_ALLOC_INDEX}"),
    ] {
        let job = job(&SEED_000.replacen("name = \"count-api\"", line, 1));
        assert_eq!(job.groups[0].services[0].name.to_string(), expected, "{line}");
    }
}

#[test]
fn variables_have_types_defaults_and_values_from_outside() {
    let top = r#"
variable "port" {
  type    = number
  default = 80
}
variable "names" {
  type    = list(string)
  default = ["a", 2]
}
variable "shape" {
  type    = object({ size = number, name = string })
  default = { size = "3", name = "cube", extra = 1 }
}
variable "free" {}
"#;
    let source = |value: &str| {
        format!(
            "{top}\njob \"j\" {{\n group \"g\" {{\n network {{\n mode = \"bridge\"\n }}\n task \"t\" {{\n driver = \"exec\"\n config {{\n command = \"/x\"\n args = [{value}]\n }}\n }}\n }}\n}}"
        )
    };
    let text = source(r#""${var.port + 1}", var.names[1], var.shape.size, var.free, jsonencode(var.shape)"#);
    let args = |given: &[(&str, &str)]| -> Vec<String> {
        let job = parse(&text, "f", &variables(given)).unwrap_or_else(|errors| panic!("{errors}"));
        let command = job.groups[0].tasks[0].driver.command().expect("command").clone();
        command.args.iter().map(ToString::to_string).collect()
    };
    let shape = r#"{"name":"cube","size":3}"#;
    assert_eq!(args(&[("free", "1 + 1")]), ["81", "2", "3", "1 + 1", shape]);
    assert_eq!(args(&[("free", ""), ("port", "8080"), ("names", r#"["x", "y"]"#)]), ["8081", "y", "3", "", shape]);
}

#[test]
fn expressions_are_evaluated_as_hcl2_does() {
    let top = r#"
locals {
  two   = local.one + 1
  one   = 1
  names = ["b", "a"]
  map   = { a = 1, b = "x" }
  url   = "http://${NOMAD_ADDR_http}"
}
"#;
    for (expression, expected) in [
        ("1 + 2 * 3", "7"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("7 % 4", "3"),
        ("-local.two", "-2"),
        ("1 < 2 && !false ? \"yes\" : \"no\"", "yes"),
        ("local.two == 2", "true"),
        ("\"${local.names[0]}-${local.map.b}-${local.map[\"a\"]}\"", "b-x-1"),
        ("join(\",\", [for name in local.names : upper(name) if name != \"a\"])", "B"),
        ("jsonencode({ for index, name in local.names : name => index })", r#"{"a":1,"b":0}"#),
        ("jsonencode({ for name in [\"a\", \"b\", \"a\"] : name => 1... })", r#"{"a":[1,1],"b":[1]}"#),
        ("\"%{ for name in local.names }[${name}]%{ endfor }\"", "[b][a]"),
        ("\"a %{~ if local.one == 1 ~} b %{~ else ~} c %{~ endif ~} d\"", "abd"),
        ("<<-EOT\n    one\n      two\n    EOT\n", "one\n  two\n"),
        ("format(\"%s:%d %05.1f %q %v %%\", \"a\", 8, 2.25, \"q\", [1])", "a:8 002.2 \"q\" [1] %"),
        ("format(\"http://%s/\", NOMAD_ADDR_http)", "http://${NOMAD_ADDR_http}/"),
        ("join(\",\", [local.url, \"x\"])", "http://${NOMAD_ADDR_http},x"),
        ("concat([1], [2, 3])[2]", "3"),
        ("coalesce(null, \"\", \"x\")", "x"),
        ("lookup(local.map, \"zz\", \"none\")", "none"),
        ("merge({ a = 1 }, { a = 2 }).a", "2"),
        ("length(\"héllo\")", "5"),
        ("trimspace(\"  x \")", "x"),
        ("replace(\"1-2-3\", \"-\", \"+\")", "1+2+3"),
        ("min(3, 1, 2) + max([4, 5]...)", "6"),
        ("tonumber(\"42\") + 1", "43"),
        ("join(\"\", split(\",\", \"a,b\"))", "ab"),
        ("contains([\"a\"], \"a\")", "true"),
        ("join(\" \", keys(local.map))", "a b"),
        ("lower(\"ABC\")", "abc"),
        ("\"$${not} %%{this}\"", "${not} %{this}"),
        (
            "\"${env[\"HOME\"]} ${node.unique.name} ${attr.kernel.name} ${meta[\"a.b\"]} ${HOME}\"",
            "${env[\"HOME\"]} ${node.unique.name} ${attr.kernel.name} ${meta.a.b} ${HOME}",
        ),
        ("jsonencode([{ a = 1 }, { a = 2 }][*].a)", "[1,2]"),
    ] {
        assert_eq!(env(top, expression), expected, "{expression}");
    }
}

#[test]
fn json_of_a_variable_that_is_text_is_no_expression() {
    let top = "variable \"x\" {\n type = string\n}\n";
    let source = format!("{top}{}", SEED_000.replace("\"count-api\"\n      port", "var.x\n      port"));
    let job = parse(&source, "f", &variables(&[("x", "a-${NOMAD_ALLOC_ID}")]));
    let error = job.expect_err("the text of -var is taken as it is, so this is no valid name");
    assert!(error.to_string().contains("RFC 1123"), "{error}");
}
