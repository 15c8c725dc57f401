//! The life of a job as a user sees it, by the command line: plan, run, status, logs, change, stop; what its tasks are told;
//! and how they end when they end badly.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use culvert_tests::{Node, NodeOptions, Process, World, binary, eventually};
use serde_json::Value;

/// A group with one task that runs a shell script, and a service in the mesh.
fn shell(name: &str, driver: &str, more: &str, script: &str) -> String {
    format!(
        r#"
  group "{name}" {{
    network {{
      mode = "bridge"
      port "http" {{}}
    }}
    service {{
      name = "{name}"
      port = "http"
      connect {{
        sidecar_service {{}}
      }}
    }}
    task "main" {{
      driver = "{driver}"
      config {{
        command = "/bin/sh"
        args    = ["-c", <<-END
{script}
END
        ]
      }}
{more}
    }}
  }}
"#
    )
}

fn job(name: &str, groups: &[String]) -> String {
    format!("job {name:?} {{\n{}\n}}\n", groups.concat())
}

/// Runs a command; its exit code and output.
fn outcome(node: &Node, arguments: &[&str]) -> (i32, String) {
    let output = node.try_culvert(arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().expect("an exit code"), text)
}

fn task(node: &Node, job: &str, group: &str) -> Value {
    node.allocation(job, group)["Tasks"][0].clone()
}

fn events(task: &Value) -> String {
    let events = task["Events"].as_array().into_iter().flatten();
    events.map(|event| format!("{} {}\n", event["Kind"], event["Message"])).collect()
}

fn ids(node: &Node, job: &str, group: &str) -> Vec<String> {
    let status = node.api(&format!("/v1/culvert/job/{job}"));
    let own = status["Allocations"].as_array().into_iter().flatten().filter(|one| one["Group"] == group);
    own.filter_map(|one| one["ID"].as_str().map(str::to_owned)).collect()
}

/// `job logs -f` in a process of its own.
struct Follower {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Follower {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(binary("culvert"));
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().expect("start culvert");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, lines }
    }

    fn next(&mut self) -> Option<String> {
        self.lines.next().map(|line| line.expect("a line"))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

const CHATTER: &str = r#"trap 'exit 0' INT; echo "to the error output" >&2; n=0; while :; do n=$((n+1)); echo "$WORD $n"; sleep 0.2; done"#;

fn chatter(name: &str, count: usize, word: &str) -> String {
    let group = shell(name, "exec", &format!("env {{ WORD = {word:?} }}"), CHATTER);
    group.replacen("network {", &format!("count = {count}\n    network {{"), 1)
}

#[test]
fn a_job_is_planned_run_watched_changed_and_stopped() {
    let world = World::new("job-life");
    let mut node = Node::start(&world, NodeOptions::default());
    let file = node.write_job("life", &job("life", &[chatter("one", 1, "first"), chatter("two", 1, "other")]));
    let plan = "\
+ Job: \"life\"
+ Task Group: \"one\" (1 create)
  + Task: \"connect-proxy-one\" (forces create) (sidecar, served by culvert's worker)
  + Task: \"main\" (forces create)
+ Task Group: \"two\" (1 create)
  + Task: \"connect-proxy-two\" (forces create) (sidecar, served by culvert's worker)
  + Task: \"main\" (forces create)
";
    let closing = format!("To submit the job run:\n\nculvert job run {file}\n");
    assert_eq!(outcome(&node, &["job", "plan", &file]), (1, format!("{plan}\n{closing}")));
    assert_eq!(outcome(&node, &["job", "plan", "-diff=false", "-no-color", &file]), (1, closing));
    let (code, text) = outcome(&node, &["job", "run", &file]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = outcome(&node, &["job", "plan", &file]);
    assert_eq!(code, 0, "nothing would change: {text}");
    let status = node.culvert(&["job", "status", "life"]);
    for service in ["one", "two"] {
        assert!(status.contains(&format!("/ns/default/dc/dc1/svc/{service}")), "no identity of {service}: {status}");
    }
    let (first, second) = (ids(&node, "life", "one").remove(0), ids(&node, "life", "two").remove(0));

    eventually("a log", || node.culvert(&["job", "logs", &first]).starts_with("first 1\nfirst 2\n"));
    assert_eq!(node.culvert(&["job", "logs", "-stderr", &first]), "to the error output\n");
    let mut follower = Follower::start(&["job", "logs", "-f", &first]);
    for number in 1..=8 {
        assert_eq!(follower.next(), Some(format!("first {number}")), "followed from the beginning");
    }

    // More of the same keeps what runs; other words replace their own group only.
    node.run_job("life", &job("life", &[chatter("one", 2, "first"), chatter("two", 1, "other")]));
    let both = ids(&node, "life", "one");
    assert!(both.len() == 2 && both.contains(&first), "{first} is not kept: {both:?}");
    node.run_job("life", &job("life", &[chatter("one", 2, "second"), chatter("two", 1, "other")]));
    let replaced = ids(&node, "life", "one");
    assert!(replaced.len() == 2 && replaced.iter().all(|id| !both.contains(id)), "{replaced:?} of {both:?}");
    assert_eq!(ids(&node, "life", "two"), std::slice::from_ref(&second), "a group that did not change");
    eventually("the follower of an allocation that is gone ends", || follower.next().is_none());

    let people: Vec<_> = node.tasks().into_iter().filter_map(Process::of).collect();
    assert_eq!(people.len(), 3);
    let ports = node.allocation("life", "two")["Ports"]["http"][0].as_u64().expect("a host port").to_string();
    assert!(world.run("nft", &["list", "ruleset"]).contains(&ports));
    node.culvert(&["job", "stop", "life"]);
    assert!(people.iter().all(|process| !process.lives()), "a task runs on");
    for id in replaced.iter().chain([&second]) {
        assert!(!Path::new(&format!("/run/netns/culvert-{}", &id[..8])).exists(), "namespace of {id}");
        assert!(!world.run("ip", &["-o", "link"]).contains(&format!("cv{}", &id[..8])), "veth of {id}");
        assert!(!world.unified().join(world.cgroup_parent()).join(id).exists(), "cgroup of {id}");
    }
    assert!(!world.run("nft", &["list", "ruleset"]).contains(&ports), "a port is published still");
    for service in ["one", "two", "one-sidecar-proxy"] {
        assert_eq!(node.api(&format!("/v1/health/service/{service}")), serde_json::json!([]), "{service}");
    }
    assert!(node.culvert(&["job", "status", "life"]).contains("dead (stopped)"));
    node.culvert(&["job", "stop", "-purge", "life"]);
    let (code, text) = outcome(&node, &["job", "status", "life"]);
    assert!(code == 1 && text.contains("life"), "{text}");
    node.leave();
}

#[test]
fn a_task_sees_what_its_job_file_says_and_is_reached_at_its_port() {
    let world = World::new("job-words");
    let settings = "node_meta { rack = \"r7\" power-feed = \"B\" }".to_owned();
    let mut node = Node::start(&world, NodeOptions { settings, ..NodeOptions::default() });
    let more = r#"
      env {
        X     = "from env"
        AGAIN = "${env["X"]} again"
        ADDR  = "${NOMAD_ADDR_http}"
        NODE  = "${node.unique.name}|${node.unique.id}|${node.datacenter}"
        ATTR  = "${attr.kernel.name}|${attr.cpu.arch}|${attr.unique.hostname}|${attr.culvert.version}"
        META  = "${meta.rack}|${meta["power-feed"]}|${NOMAD_META_color}|${meta.nobody}"
      }
      meta { color = "blue" }"#;
    let script = r#"
      echo "$AGAIN|$NOMAD_META_color|$NOMAD_META_COLOR|$NOMAD_GROUP_NAME|$NOMAD_TASK_NAME|$NOMAD_JOB_NAME|$NOMAD_ALLOC_INDEX"
      echo "$NOMAD_ALLOC_ID|$NOMAD_HOST_PORT_http|$NOMAD_PORT_http|$NOMAD_UPSTREAM_ADDR_other|$ADDR"
      echo "$NODE"; echo "$ATTR"; echo "$META"
      exec perl -MIO::Socket::INET -e '
        my $listener = IO::Socket::INET->new(LocalPort => $ENV{NOMAD_PORT_http}, Listen => 5, ReuseAddr => 1) or die;
        while (my $caller = $listener->accept) { print $caller scalar <$caller>; }'"#;
    // Outside the mesh, so that its port is open to the host.
    let mesh = "connect {\n        sidecar_service {}\n      }";
    let group = |name: &str, driver: &str| {
        let upstream = "\n sidecar_service {\n proxy {\n upstreams {\n destination_name = \"other\"\n local_bind_port = 7070\n }\n }\n }\n";
        let extra = format!(
            "service {{\n name = \"{name}-mesh\"\n port = \"1\"\n connect {{ {upstream} }}\n }}\n task \"main\""
        );
        shell(name, driver, more, script).replace(mesh, "").replace("task \"main\"", &extra)
    };
    let tagged = |group: String| group.replacen("port = \"http\"", "port = \"http\"\n tags = [\"in-${meta.rack}\"]", 1);
    node.run_job("words", &job("words", &[tagged(group("plain", "raw_exec")), group("boxed", "exec")]));
    assert_eq!(node.api("/v1/catalog/service/plain")[0]["ServiceTags"], serde_json::json!(["in-r7"]));
    let config = node.api("/v1/agent/self")["Config"].clone();
    let own = |field: &str| config[field].as_str().unwrap_or_else(|| panic!("{field} in {config}")).to_owned();
    let (name, version, arch) = (own("NodeName"), env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
    let about_the_node = [
        format!("{name}|{}|{}", own("NodeID"), own("Datacenter")),
        format!("linux|{arch}|{name}|{version}"),
        "r7|B|blue|${meta.nobody}".to_owned(),
    ];
    for name in ["plain", "boxed"] {
        let allocation = node.allocation("words", name);
        let id = allocation["ID"].as_str().expect("an ID");
        let (host, inside) = (&allocation["Ports"]["http"][0], &allocation["Ports"]["http"][1]);
        let mut log = String::new();
        eventually("all its lines", || {
            log = node.culvert(&["job", "logs", id]);
            log.lines().count() == 5
        });
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(lines[0], format!("from env again|blue|blue|{name}|main|words|0"));
        let address = lines[1].rsplit('|').next().unwrap_or_default();
        assert_eq!(lines[1], format!("{id}|{host}|{inside}|127.0.0.1:7070|{address}"));
        assert!(address.ends_with(&format!(":{host}")), "{address}");
        assert_eq!(lines[2..], about_the_node);
        let port = host.as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port");
        let mut answer = String::new();
        eventually("the port answers", || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("published");
            stream.write_all(b"hello\n").is_ok()
                && BufReader::new(stream).read_line(&mut answer).is_ok()
                && !answer.is_empty()
        });
        assert_eq!(answer, "hello\n");
    }
    node.leave();
}

#[test]
fn tasks_that_end_badly_are_started_again_as_they_say_then_given_up() {
    let world = World::new("job-failures");
    let mut node = Node::start(&world, NodeOptions::default());
    let restart = "restart {\n attempts = 2\n interval = \"10m\"\n delay = \"0s\"\n mode = \"fail\"\n }";
    let failing =
        node.write_job("failing", &job("failing", &[shell("failing", "exec", restart, "echo again; exit 3")]));
    node.culvert(&["job", "run", "-detach", &failing]);
    let task_of = |job: &str| task(&node, job, job);
    eventually("it is given up", || task_of("failing")["Failed"] == true);
    let failed = task_of("failing");
    assert!(failed["Failed"] == true && failed["ExitCode"] == 3 && failed["Restarts"] == 2, "{failed}");
    assert_eq!(node.culvert(&["job", "logs", "failing"]), "again\n".repeat(3));
    eventually("and its allocation", || node.allocation("failing", "failing")["Status"] == "failed");
    eventually("its service is out of the catalog", || node.api("/v1/health/service/failing") == serde_json::json!([]));

    // Its memory limit is kept, and told.
    let greedy = "resources { memory = 20 }\n restart {\n attempts = 0\n mode = \"fail\"\n }";
    let greedy = shell("greedy", "exec", greedy, "exec tail /dev/zero");
    let greedy = node.write_job("greedy", &job("greedy", &[greedy]));
    node.culvert(&["job", "run", "-detach", &greedy]);
    eventually("it ended", || task_of("greedy")["Failed"] == true);
    assert!(events(&task_of("greedy")).contains("OOM Killed"), "{}", events(&task_of("greedy")));

    // Who does not listen is not waited for without end.
    let deaf = shell("deaf", "exec", "kill_timeout = \"1s\"", "trap '' INT; echo ready; while :; do sleep 0.1; done");
    node.run_job("deaf", &job("deaf", &[deaf]));
    eventually("it has made itself deaf", || node.culvert(&["job", "logs", "deaf"]) == "ready\n");
    let people: Vec<_> = node.people();
    node.culvert(&["job", "stop", "deaf"]);
    let alive = people.iter().filter(|process| process.lives()).count();
    assert_eq!(alive, 1, "only the worker is left");

    // What is not supported is refused with its place.
    let text = job("docker", &[shell("docker", "docker", "", "true")]);
    let line = text.lines().position(|line| line.contains("driver")).expect("a driver") + 1;
    let docker = node.write_job("docker", &text);
    for verb in ["validate", "plan", "run"] {
        let (code, text) = outcome(&node, &["job", verb, &docker]);
        assert_eq!(code, if verb == "plan" { 255 } else { 1 }, "{text}");
        let place = format!("on {docker} line {line}, column 16:");
        assert!(text.contains(&place) && text.contains("driver \"docker\""), "no {place:?} in {text}");
    }
    node.leave();
}
