//! What `plan` prints, and what it says will happen.

use culvert_jobspec::{Change, Job, diff, group_change, parse};
use std::collections::BTreeMap;

const SEED: &str = include_str!("jobs/seed_000.nomad.hcl");
const EXAMPLE: &str = include_str!("../../../examples/countdash.nomad.hcl");

fn job(source: &str) -> Job {
    let variables = BTreeMap::from([("bin".to_owned(), "/opt".to_owned())]);
    let given = if source.contains("variable \"bin\"") { variables } else { BTreeMap::new() };
    parse(source, "f", &given).unwrap_or_else(|errors| panic!("{errors}"))
}

#[test]
fn a_new_job_shows_its_tasks_and_sidecars() {
    assert_eq!(
        diff(None, &job(SEED)).to_string(),
        r#"+ Job: "countdash"
+ Task Group: "api" (1 create)
  + Task: "connect-proxy-count-api" (forces create) (sidecar, served by culvert's worker)
  + Task: "web" (forces create)
+ Task Group: "dashboard" (1 create)
  + Task: "connect-proxy-count-dashboard" (forces create) (sidecar, served by culvert's worker)
  + Task: "dashboard" (forces create)
"#
    );
}

#[test]
fn verbose_shows_what_really_runs() {
    let text = diff(None, &job(EXAMPLE)).render(true);
    let dashboard = &text[text.find("+ Task Group: \"dashboard\"").expect("group")..];
    assert_eq!(
        dashboard,
        r#"+ Task Group: "dashboard" (1 create)
  + Count: "1" (forces create)
  + Network {
    + Mode: "bridge"
    + Static Port {
      + Label: "http"
      + To:    "9002"
      + Value: "9002"
      }
    }
  + Service {
    + Name:      "count-dashboard"
    + PortLabel: "http"
    + Check {
      + FailuresBeforeCritical: "0"
      + FailuresBeforeWarning:  "0"
      + InitialStatus:          "critical"
      + Interval:               "2s"
      + Method:                 "GET"
      + Name:                   "dashboard-health"
      + Path:                   "/health"
      + SuccessBeforePassing:   "2"
      + Timeout:                "1s"
      + Type:                   "http"
      }
    + ConsulConnect {
      + Native: "false"
      + SidecarService {
        + ConsulProxy {
          + ConsulUpstreams {
            + DestinationName:  "count-api"
            + LocalBindAddress: "127.0.0.1"
            + LocalBindPort:    "8080"
            }
          }
        }
      }
    }
  + Task: "connect-proxy-count-dashboard" (forces create) (sidecar, served by culvert's worker)
    + Driver:       "culvert"
    + Kind:         "connect-proxy:count-dashboard"
    + LocalService: "127.0.0.1:http"
    + Upstream {
      + count-api: "127.0.0.1:8080"
      }
  + Task: "dashboard" (forces create)
    + Driver:                    "exec"
    + Env[COUNTING_SERVICE_URL]: "http://${NOMAD_UPSTREAM_ADDR_count_api}"
    + Env[PORT]:                 "${NOMAD_PORT_http}"
    + KillSignal:                "SIGINT"
    + KillTimeout:               "5s"
    + Config {
      + command: "/opt/counter-dashboard"
      }
    + LogConfig {
      + MaxFileSizeMB: "10"
      + MaxFiles:      "10"
      }
    + Resources {
      + CPU:      "100"
      + MemoryMB: "64"
      }
    + RestartPolicy {
      + Attempts: "2"
      + Delay:    "15s"
      + Interval: "30m0s"
      + Mode:     "fail"
      }
"#
    );
}

#[test]
fn a_changed_job_shows_old_and_new() {
    let old = job(EXAMPLE);
    let new = job(&EXAMPLE
        .replace("group \"api\" {", "group \"api\" {\n count = 3")
        .replace("PORT = \"9001\"", "PORT = \"9001\"\n LEVEL = \"info\"")
        .replace("local_bind_port  = 8080", "local_bind_port  = 8081"));
    assert_eq!(
        diff(Some(&old), &new).to_string(),
        r#"+/- Job: "countdash"
+/- Task Group: "api" (2 create, 1 create/destroy update)
  +/- Count: "1" => "3" (forces create)
      Task: "connect-proxy-count-api" (sidecar, served by culvert's worker)
  +/- Task: "web" (forces create/destroy update)
    + Env[LEVEL]: "info"
+/- Task Group: "dashboard" (1 create/destroy update)
  +/- Service {
        Name:      "count-dashboard"
        PortLabel: "http"
    +/- ConsulConnect {
          Native: "false"
      +/- SidecarService {
        +/- ConsulProxy {
          +/- ConsulUpstreams {
                DestinationName:  "count-api"
                LocalBindAddress: "127.0.0.1"
            +/- LocalBindPort:    "8080" => "8081"
              }
            }
          }
        }
      }
  +/- Task: "connect-proxy-count-dashboard" (forces create/destroy update) (sidecar, served by culvert's worker)
    +/- Upstream {
      +/- count-api: "127.0.0.1:8080" => "127.0.0.1:8081"
        }
      Task: "dashboard"
"#
    );
}

#[test]
fn a_group_that_goes_is_destroyed() {
    let old = job(SEED);
    let start = SEED.find("  group \"dashboard\"").expect("group");
    let new = job(&format!("{}}}\n", &SEED[..start]));
    let text = diff(Some(&old), &new).to_string();
    assert!(text.contains("- Task Group: \"dashboard\" (1 destroy)\n"), "{text}");
    assert!(text.contains("Task Group: \"api\" (1 ignore)\n"), "{text}");
}

#[test]
fn the_same_job_on_other_lines_changes_nothing() {
    let old = job(SEED);
    let new = job(&format!("# moved\n\n{SEED}"));
    let text = diff(Some(&old), &new).to_string();
    assert!(text.starts_with("Job: \"countdash\"\nTask Group: \"api\" (1 ignore)\n"), "{text}");
    assert!(!text.contains('+'), "{text}");
}

#[test]
fn any_difference_but_the_count_replaces_allocations() {
    let old = job(EXAMPLE);
    for (from, to, expected) in [
        ("\"2s\"", "\"3s\"", Change::Replace),
        ("port = \"9001\"", "port = \"9001\"\n tags = [\"v1\"]", Change::Replace),
        ("datacenters = [\"dc1\"]", "priority = 60", Change::Nothing),
        ("group \"api\" {", "group \"api\" {\n count = 2", Change::Nothing),
        ("datacenters = [\"dc1\"]", "region = \"eu\"", Change::Replace),
        ("datacenters = [\"dc1\"]", "meta {\n a = \"b\"\n }", Change::Replace),
        ("PORT = \"9001\"", "PORT = \"9003\"", Change::Replace),
        ("sidecar_service {}", "sidecar_service {\n tags = [\"x\"]\n }", Change::Replace),
    ] {
        let new = job(&EXAMPLE.replacen(from, to, 1));
        assert_eq!(group_change(&old, &new, "api"), expected, "{from} -> {to}");
    }
}

#[test]
fn a_task_with_the_sidecars_name_keeps_it() {
    let source = SEED.replacen("task \"web\"", "task \"connect-proxy-count-api\"", 1);
    let job = job(&source);
    let sidecars = job.groups[0].sidecars();
    assert_eq!(job.groups[0].tasks[0].name, "connect-proxy-count-api");
    assert_eq!(sidecars[0].task, "connect-proxy-count-api-000000");
    assert_eq!(sidecars[0].local_service().as_deref(), Some("127.0.0.1:9001"));
}

#[test]
fn control_characters_cannot_reach_the_terminal() {
    let new = job(&EXAMPLE.replacen("PORT = \"9001\"", "PORT = \"9\\u001b[31m\"", 1));
    let text = diff(None, &new).render(true);
    assert!(!text.contains('\u{1b}') && text.contains("9\\u{1b}[31m"), "{text}");
}
