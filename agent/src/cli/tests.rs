//! Commands as users type them, against a real control plane, or a server with canned answers where root is needed.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use culvert_api::{
    AgentStatus, AllocationStatus, EbpfStatus, EventRecord, JobListEntry, JobPlan, JobStatus, JobStopped,
    JobSubmission, JobSubmitted, NackStatus, ProxyStatus, ServiceStatus, TaskEvent, TaskStatus, Timestamp,
    WorkerStatus,
};
use culvert_control::{Control, ControlConfig, NodeDialer};
use culvert_types::Datacenter;
use tokio::runtime::Runtime;

use super::output::Output;
use super::{AgentArgs, Env, Roles, Session, run};

/// What a command left behind.
#[derive(Debug, Eq, PartialEq)]
struct Ran {
    code: u8,
    out: String,
    err: String,
}

fn roles() -> Roles {
    let fail = |_: Vec<OsString>| ExitCode::FAILURE;
    Roles { agent: |args| anyhow::bail!("agent {args:?}"), proxy: fail, worker: fail, executor: fail }
}

/// An hour after the epoch: canned answers date from the epoch.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(3600)
}

fn culvert_with(variables: &'static [(&'static str, &'static str)], args: &[&str]) -> Ran {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    let output = Output::new(&mut out, &mut err, false);
    let mut session = Session { env: Env(Box::new(variable)), output, now: now() };
    let code = run(args.iter().map(OsString::from), &mut session, &roles());
    let text = |bytes| String::from_utf8(bytes).expect("text");
    Ran { code, out: text(out), err: text(err) }
}

fn culvert(args: &[&str]) -> Ran {
    culvert_with(&[], args)
}

fn said(out: &str) -> Ran {
    Ran { code: 0, out: out.to_owned(), err: String::new() }
}

/// A control plane in memory on a free port, and the flag that names it.
struct Plane {
    runtime: Runtime,
    control: Option<Control>,
    flag: String,
}

impl Plane {
    fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let datacenter = Datacenter::new("dc1").expect("a name");
        let config = ControlConfig::dev("node-1", "11111111-2222-3333-4444-555555555555", datacenter);
        let control = runtime.block_on(Control::start(config, Arc::new(NodeDialer))).expect("started");
        let flag = format!("-http-addr={}", control.http_addrs()[0]);
        Self { runtime, control: Some(control), flag }
    }

    /// `culvert intention <verb> -http-addr=… <args>`
    fn intention(&self, verb: &str, args: &[&str]) -> Ran {
        culvert(&[&["intention", verb, self.flag.as_str()], args].concat())
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        if let Some(control) = self.control.take() {
            self.runtime.block_on(control.shutdown());
        }
    }
}

#[test]
fn intentions_are_made_asked_listed_and_deleted_as_in_consul() {
    let plane = Plane::start();
    assert_eq!(
        plane.intention("list", &[]),
        Ran { code: 0, out: String::new(), err: "There are no intentions.\n".into() }
    );
    assert_eq!(plane.intention("check", &["web", "api"]), said("Allowed\n"));
    assert_eq!(plane.intention("create", &["-deny", "*", "api"]), said("Created: * => api (deny)\n"));
    assert_eq!(plane.intention("check", &["web", "api"]), Ran { code: 1, out: "Denied\n".into(), err: String::new() });
    assert_eq!(plane.intention("create", &["web", "api"]), said("Created: web => api (allow)\n"));
    assert_eq!(plane.intention("check", &["web", "api"]), said("Allowed\n"));
    assert_eq!(plane.intention("match", &["api"]), said("web => api (allow)\n* => api (deny)\n"));
    assert_eq!(plane.intention("match", &["-source", "web"]).code, 0);
    let list = plane.intention("list", &[]);
    let lines: Vec<Vec<&str>> = list.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ID", "Source", "Action", "Destination", "Precedence"]);
    assert_eq!(lines[1][1..], ["web", "allow", "api", "9"]);
    assert_eq!(lines[2][1..], ["*", "deny", "api", "8"]);
    assert_eq!(plane.intention("delete", &["web", "api"]), said("Intention deleted.\n"));
    assert_eq!(plane.intention("delete", &[lines[2][0]]), said("Intention deleted.\n"));
    let gone = plane.intention("delete", &["web", "api"]);
    assert_eq!((gone.code, gone.out.as_str()), (1, ""));
    assert!(gone.err.contains("Intention with source \"web\" and destination \"api\" not found."), "{}", gone.err);
}

#[test]
fn a_second_intention_for_a_pair_is_an_error_unless_it_replaces() {
    let plane = Plane::start();
    assert_eq!(plane.intention("create", &["-allow", "web", "api"]).code, 0);
    let again = plane.intention("create", &["-deny", "web", "api"]);
    assert_eq!(again.code, 1);
    let wanted =
        "Error creating intention \"web => api (deny)\": Unexpected response code: 500 (duplicate intention found:";
    assert!(again.err.starts_with(wanted), "{}", again.err);
    assert_eq!(plane.intention("create", &["-deny", "-replace", "web", "api"]), said(""));
    assert_eq!(plane.intention("check", &["web", "api"]).code, 1);
    assert_eq!(plane.intention("create", &["-replace", "new", "api"]), said("Created: new => api (allow)\n"));
}

#[test]
fn get_shows_the_fields_in_two_columns() {
    let plane = Plane::start();
    assert_eq!(plane.intention("create", &["-meta", "team=core", "web", "api"]).code, 0);
    let shown = plane.intention("get", &["web", "api"]).out;
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[..3], ["Source:       web", "Destination:  api", "Action:       allow"], "{shown}");
    let line = |name: &str| lines.iter().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{shown}"));
    assert_eq!(line("Meta[team]:").trim(), "core");
    assert!(line("Created At:").trim_end().ends_with(" UTC"), "{shown}");
    let id = line("ID:").trim().to_owned();
    assert_eq!(plane.intention("get", &[&id]).out, shown);
    let missing = plane.intention("get", &["a", "b"]);
    assert_eq!(
        (missing.code, missing.err.as_str()),
        (1, "Intention with source \"a\" and destination \"b\" not found.\n")
    );
}

#[test]
fn intentions_come_from_files_too() {
    let plane = Plane::start();
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let good = file("good.json", r#"{"SourceName": "web", "DestinationName": "api", "Action": "deny"}"#);
    assert_eq!(plane.intention("create", &["-file", &good]), said("Created: web => api (deny)\n"));
    let bad = file("bad.json", r#"{"SourceName": "web", "Colour": 1}"#);
    let refused = plane.intention("create", &["-f", &bad]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("unknown field \"Colour\"") && refused.err.contains("bad.json"), "{}", refused.err);
    assert_eq!(plane.intention("create", &["-file", "-deny", &good]).code, 1);
}

#[test]
fn wrong_use_of_intention_commands_is_refused_in_consuls_words() {
    for (args, code, text) in [
        (&["intention", "create", "-allow", "-deny", "a", "b"][..], 1, "Only one of -allow or -deny may be specified."),
        (&["intention", "create", "a"], 1, "Must specify two arguments: source and destination"),
        (&["intention", "check", "a"], 2, "command requires exactly two arguments: src and dst"),
        (&["intention", "check", "-no-such-flag", "a", "b"], 2, "'-no-such-flag'"),
        (&["intention", "match"], 1, "command requires exactly one argument"),
        (&["intention", "match", "-source", "-destination", "a"], 1, "only one of -source or -destination"),
        (&["intention", "get"], 1, "1 or 2 args"),
    ] {
        let ran = culvert(args);
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{args:?}: {}", ran.err);
        assert!(ran.err.contains(text), "{args:?}: {}", ran.err);
    }
}

#[test]
fn a_check_that_cannot_be_asked_is_no_denial() {
    let ran = culvert(&["intention", "check", "-http-addr", &unused_address(), "web", "api"]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("cannot reach the agent at 127.0.0.1:"), "{}", ran.err);
}

/// An address where nobody listens: the port was free a moment ago.
fn unused_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

#[test]
fn flags_and_variables_that_are_not_honoured_are_refused_by_name() {
    for (variables, args, name) in [
        (&[][..], &["reload", "-ca-file=x"][..], "-ca-file"),
        (&[], &["reload", "-namespace", "team"], "-namespace"),
        (&[], &["reload", "-http-addr=https://127.0.0.1:8501"], "https"),
        (&[("CONSUL_HTTP_SSL", "true")], &["reload"], "CONSUL_HTTP_SSL"),
        (&[("CONSUL_HTTP_AUTH", "a:b")], &["reload"], "CONSUL_HTTP_AUTH"),
        (&[("CONSUL_PARTITION", "p")], &["reload"], "CONSUL_PARTITION"),
        (&[], &["members"], "members"),
        (&[], &["reload", "-token-file=/nonexistent/token"], "/nonexistent/token"),
        (&[], &["job", "plan", "-var-file", "x", "y"], "-var-file"),
    ] {
        let ran = culvert_with(variables, args);
        assert!(ran.code != 0 && ran.err.contains(name), "{args:?}: {ran:?}");
    }
}

#[test]
fn help_and_version_are_good_and_spell_flags_with_one_dash() {
    for args in [&["-help"][..], &["-h"], &["--help"], &["job", "run", "-h"], &["intention", "--help"]] {
        let ran = culvert(args);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{args:?}");
        assert!(ran.out.contains("Usage: culvert") && !ran.out.contains("--"), "{args:?}: {}", ran.out);
    }
    assert_eq!(culvert(&["version"]), said(concat!("culvert v", env!("CARGO_PKG_VERSION"), "\n")));
    assert!(culvert(&[]).code == 1 && culvert(&["no-such-command"]).code == 1);
}

#[test]
fn the_agents_flags_reach_the_agent() {
    let parse = |args: &[&str]| culvert(&[&["agent"], args].concat()).err;
    let wanted = AgentArgs {
        dev: true,
        config: vec!["/a".into(), "/b".into()],
        hcl: vec!["x = -1".into(), "y = 2".into()],
        http_port: Some(-1),
        no_ebpf: true,
        encryption: Some("between-nodes".into()),
        ..AgentArgs::default()
    };
    let given = parse(&[
        "-dev",
        "-config-file",
        "/a",
        "-config-dir=/b",
        "-hcl",
        "x = -1",
        "--hcl=y = 2",
        "-http-port",
        "-1",
        "-no-ebpf",
        "-encryption=between-nodes",
    ]);
    assert_eq!(given, format!("agent {wanted:?}\n"));
    assert_eq!(parse(&["-dev=false"]), format!("agent {:?}\n", AgentArgs::default()));
}

/// What the fake agent was asked, and what it answers for jobs.
#[derive(Clone, Default)]
struct Fake {
    seen: Arc<Mutex<Vec<String>>>,
    submissions: Arc<Mutex<Vec<JobSubmission>>>,
    /// Answers of `GET /v1/culvert/job/web` in turn; the last one stays.
    states: Arc<Mutex<Vec<JobStatus>>>,
}

struct FakeAgent {
    _runtime: Runtime,
    fake: Fake,
    flag: String,
}

impl FakeAgent {
    fn start(states: Vec<JobStatus>) -> Self {
        let fake = Fake { states: Arc::new(Mutex::new(states)), ..Fake::default() };
        let runtime = Runtime::new().expect("a runtime");
        let app = Router::new().fallback(answer).with_state(fake.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address: SocketAddr = listener.local_addr().expect("an address");
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { _runtime: runtime, fake, flag: format!("-http-addr=http://{address}") }
    }

    fn run(&self, words: &[&str], args: &[&str]) -> Ran {
        culvert(&[words, &[self.flag.as_str()], args].concat())
    }

    fn seen(&self) -> Vec<String> {
        self.fake.seen.lock().expect("no panic").clone()
    }
}

async fn answer(State(fake): State<Fake>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let asked = format!("{} {}", parts.method, parts.uri);
    fake.seen.lock().expect("no panic").push(asked.clone());
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
    let path = parts.uri.path().to_owned();
    match (parts.method.as_str(), path.as_str()) {
        ("PUT", "/v1/culvert/jobs") => {
            fake.submissions.lock().expect("no panic").push(culvert_api::decode(&body).expect("a submission"));
            let created = vec![ALLOCATION.to_owned()];
            Json(JobSubmitted { id: "web".into(), created, ..JobSubmitted::default() }).into_response()
        }
        ("POST", "/v1/culvert/jobs/plan") => {
            let changes = String::from_utf8_lossy(&body).contains("group");
            Json(JobPlan { diff: "+ Job: \"web\"\n".into(), changes }).into_response()
        }
        ("GET", "/v1/culvert/jobs") => Json(vec![JobListEntry {
            id: "web".into(),
            job_type: "service".into(),
            priority: 50,
            status: "running".into(),
            submitted: Timestamp(SystemTime::UNIX_EPOCH),
        }])
        .into_response(),
        ("GET", "/v1/culvert/job/web") => {
            let mut states = fake.states.lock().expect("no panic");
            let state = if states.len() > 1 { states.remove(0) } else { states[0].clone() };
            Json(state).into_response()
        }
        ("DELETE", "/v1/culvert/job/web") => Json(JobStopped { stopped: vec![ALLOCATION.into()] }).into_response(),
        ("GET", logs) if logs.starts_with("/v1/culvert/allocation/") => "one\ntwo\nthree\n".into_response(),
        ("GET", "/v1/culvert/observe") => observed().into_response(),
        ("GET", "/v1/culvert/status") => Json(status()).into_response(),
        ("PUT", "/v1/agent/reload" | "/v1/agent/leave") => ().into_response(),
        _ => (StatusCode::NOT_FOUND, format!("unknown path {:?}", Path(path).0)).into_response(),
    }
}

const ALLOCATION: &str = "0a1b2c3d-1111-2222-3333-444444444444";
const IDENTITY: &str = "spiffe://x.consul/ns/default/dc/dc1/svc/web";

/// A job of one allocation with one task and one service.
fn job(status: &str, health: Option<&str>, events: &[&str]) -> JobStatus {
    let event = |kind: &&str| TaskEvent { kind: (*kind).to_owned(), message: "m".into(), ..TaskEvent::default() };
    let failed = status == "failed";
    let state = if status == "running" { "running" } else { "pending" };
    JobStatus {
        id: "web".into(),
        status: status.into(),
        submitted: Timestamp(SystemTime::UNIX_EPOCH),
        datacenters: vec!["dc1".into()],
        allocations: vec![AllocationStatus {
            id: ALLOCATION.into(),
            group: "g".into(),
            status: status.into(),
            error: failed.then(|| "no such program".into()),
            created: Timestamp(SystemTime::UNIX_EPOCH),
            addresses: vec!["172.26.64.2".into()],
            ports: [("http".to_owned(), (9002, 80))].into(),
            services: vec![ServiceStatus {
                service: "web".into(),
                sidecar_id: Some("web-sidecar-proxy".into()),
                sidecar_port: Some(21000),
                identity: Some(IDENTITY.into()),
                health: health.map(str::to_owned),
                ..ServiceStatus::default()
            }],
            tasks: vec![TaskStatus {
                name: "main".into(),
                state: state.into(),
                failed,
                events: events.iter().map(event).collect(),
                ..TaskStatus::default()
            }],
            ..AllocationStatus::default()
        }],
        ..JobStatus::default()
    }
}

const JOB: &str = r#"
variable "port" { type = string }
job "web" {
  group "g" {
    task "main" {
      driver = "raw_exec"
      config { command = "/bin/true" }
      env { PORT = var.port }
    }
  }
}
"#;

fn job_file() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("web.nomad.hcl");
    std::fs::write(&path, JOB).expect("written");
    let path = path.display().to_string();
    (dir, path)
}

#[test]
fn run_waits_until_the_job_is_healthy_and_tells_what_happens() {
    let states = vec![
        job("pending", None, &["Received"]),
        job("running", Some("critical"), &["Received", "Started", "Restarting"]),
        job("running", Some("passing"), &["Received", "Started", "Restarting"]),
    ];
    let agent = FakeAgent::start(states);
    let (_dir, file) = job_file();
    let ran = agent.run(&["job", "run"], &["-var", "port=80", &file]);
    assert_eq!(
        ran,
        said(
            "==> Job \"web\" version 0 submitted: 1 allocations created, 0 stopped, 0 unchanged\n\
             \x20   Allocation 0a1b2c3d (g): pending\n\
             \x20   Allocation 0a1b2c3d (g): pending -> running\n\
             \x20   Service web (0a1b2c3d): critical\n\
             \x20   Task main (0a1b2c3d): Restarting m\n\
             \x20   Service web (0a1b2c3d): critical -> passing\n\
             ==> Job \"web\" is running and healthy\n"
        )
    );
    let submitted = agent.fake.submissions.lock().expect("no panic").remove(0);
    let variables = [("port".to_owned(), "80".to_owned())].into();
    assert_eq!(submitted, JobSubmission { source: JOB.into(), file, variables });
}

#[test]
fn run_fails_when_an_allocation_fails() {
    let agent = FakeAgent::start(vec![job("failed", None, &[])]);
    let (_dir, file) = job_file();
    let ran = agent.run(&["job", "run"], &["-var=port=80", &file]);
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("allocation 0a1b2c3d (g): no such program"), "{}", ran.err);
}

#[test]
fn run_detached_does_not_wait() {
    let agent = FakeAgent::start(vec![job("pending", None, &[])]);
    let (_dir, file) = job_file();
    let ran = agent.run(&["job", "run", "-detach"], &["-var=port=80", &file]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(agent.seen(), ["PUT /v1/culvert/jobs"]);
}

#[test]
fn a_job_file_with_an_error_never_reaches_the_agent() {
    let agent = FakeAgent::start(vec![job("pending", None, &[])]);
    let (dir, file) = job_file();
    for (args, text) in [
        (&["job", "validate", &file][..], "port"),
        (&["job", "run", &agent.flag, "-var", "port=1", "-var", "colour=red", &file], "colour"),
        (&["job", "run", &agent.flag, "-var", "port", &file], "use key=value"),
        (&["job", "validate", "/nonexistent.hcl"], "/nonexistent.hcl"),
        (&["job", "validate", "https://example.org/x.nomad"], "only local files"),
    ] {
        let ran = culvert(args);
        assert!(ran.code == 1 && ran.err.contains(text), "{args:?}: {ran:?}");
    }
    let broken = dir.path().join("broken.hcl").display().to_string();
    std::fs::write(&broken, "job \"web\" {\n  gruop \"g\" {}\n}\n").expect("written");
    let ran = culvert(&["job", "plan", &agent.flag, &broken]);
    assert_eq!(ran.code, 255);
    assert!(ran.err.contains("broken.hcl line 2, column 3") && ran.err.contains("gruop"), "{}", ran.err);
    std::fs::write(&broken, "{\"job\": {}}").expect("written");
    assert!(culvert(&["job", "validate", &broken]).err.contains("JSON"));
    assert!(agent.seen().is_empty(), "{:?}", agent.seen());
    assert_eq!(culvert(&["job", "validate", "-var", "port=1", &file]), said("Job validation successful\n"));
}

#[test]
fn plan_exits_1_when_something_would_change() {
    let agent = FakeAgent::start(vec![job("pending", None, &[])]);
    let (_dir, file) = job_file();
    let ran = agent.run(&["job", "plan"], &["-var", "port=1", &file]);
    assert_eq!((ran.code, ran.err.as_str()), (1, ""));
    assert_eq!(ran.out, format!("+ Job: \"web\"\n\nTo submit the job run:\n\nculvert job run {file}\n"));
}

#[test]
fn status_of_a_job_shows_allocations_tasks_services_and_identities() {
    let agent = FakeAgent::start(vec![job("running", Some("passing"), &["Received", "Started"])]);
    assert_eq!(
        agent.run(&["job", "status"], &["web"]),
        said(
            "ID          = web\n\
             Submit Date = 1970-01-01T00:00:00Z\n\
             Version     = 0\n\
             Datacenters = dc1\n\
             Status      = running\n\
             \n\
             Summary\n\
             Task Group  Starting  Running  Failed  Complete\n\
             g           0         1        0       0\n\
             \n\
             Allocations\n\
             ID        Task Group  Version  Status   Created  Address\n\
             0a1b2c3d  g           0        running  1h ago   172.26.64.2\n\
             \n\
             Tasks\n\
             Allocation  Task  State    Restarts  Exit Code  Last Event\n\
             0a1b2c3d    main  running  0         -          Started m\n\
             \n\
             Services\n\
             Allocation  Service  Health   Sidecar Port  Identity\n\
             0a1b2c3d    web      passing  21000         spiffe://x.consul/ns/default/dc/dc1/svc/web\n\
             \n\
             Ports\n\
             Allocation  Label  Host Port  Port\n\
             0a1b2c3d    http   9002       80\n"
        )
    );
    let list = "ID   Type     Priority  Status   Submit Date\nweb  service  50        running  1970-01-01T00:00:00Z\n";
    assert_eq!(agent.run(&["job", "status"], &[]), said(list));
    let json = agent.run(&["job", "status", "-json"], &["web"]).out;
    assert_eq!(culvert_api::decode_known::<JobStatus>(json.as_bytes()).expect("JSON").id, "web");
    let unknown = agent.run(&["job", "status"], &["no/such"]);
    assert_eq!(unknown.code, 1);
    assert!(unknown.err.contains("Unexpected response code: 404"), "{}", unknown.err);
    assert!(agent.seen().contains(&"GET /v1/culvert/job/no%2Fsuch".to_owned()));
}

#[test]
fn stop_purges_when_asked() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    let stopped = said("==> Job \"web\" stopped: 1 allocations ended\n");
    assert_eq!(agent.run(&["job", "stop"], &["web"]), stopped);
    assert_eq!(agent.run(&["job", "stop", "-purge", "-yes"], &["web"]), stopped);
    assert_eq!(agent.seen(), ["DELETE /v1/culvert/job/web", "DELETE /v1/culvert/job/web?purge=true"]);
}

#[test]
fn logs_are_found_by_job_and_by_allocation() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    let all = said("one\ntwo\nthree\n");
    assert_eq!(agent.run(&["job", "logs"], &["web"]), all);
    assert_eq!(agent.run(&["job", "logs", "-stderr", "-f", "-n", "2"], &["0a1b", "main"]), all);
    let logs = format!("GET /v1/culvert/allocation/{ALLOCATION}/logs/main?type=");
    let seen: Vec<String> =
        agent.seen().into_iter().filter_map(|line| Some(line.strip_prefix(&logs)?.to_owned())).collect();
    assert_eq!(seen, ["stdout", "stderr&tail=1048576", "stderr&tail=10&follow=true"]);
    let unknown = agent.run(&["job", "logs"], &["nothing"]);
    assert!(unknown.code == 1 && unknown.err.contains("no job and no allocation"), "{unknown:?}");
}

fn observed() -> String {
    let event = EventRecord {
        at: Timestamp(SystemTime::UNIX_EPOCH),
        kind: "refuse".into(),
        path: "proxied".into(),
        verdict: "deny".into(),
        source: Some(IDENTITY.into()),
        destination: Some(IDENTITY.replace("web", "api")),
        rule: Some("web => api (deny, precedence 9)".into()),
        reason: Some("intention".into()),
        ..EventRecord::default()
    };
    serde_json::to_string(&event).expect("JSON") + "\n"
}

#[test]
fn observe_prints_lines_or_json_and_asks_for_denied_ones_only() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    let ran = agent.run(&["observe", "-denied"], &[]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let line = ran.out.lines().nth(1).expect("a line under the header");
    assert!(
        line.contains("deny") && line.contains("web => api ") && line.ends_with("precedence 9) [intention]"),
        "{line}"
    );
    assert_eq!(agent.run(&["observe", "-json"], &[]), said(&observed()));
    assert_eq!(agent.seen(), ["GET /v1/culvert/observe?denied=true", "GET /v1/culvert/observe"]);
}

fn status() -> AgentStatus {
    AgentStatus {
        version: "0.1.0".into(),
        node: "n1".into(),
        encryption: "always".into(),
        ebpf: EbpfStatus { active: false, reason: Some("no CAP_BPF".into()), routes: 0 },
        worker: WorkerStatus {
            pid: Some(7),
            restarts: 1,
            proxies: vec![ProxyStatus {
                id: "web-sidecar-proxy".into(),
                ready: true,
                xds_version: Some("12".into()),
                nack: Some(NackStatus { resource: "l".into(), reason: "bad".into() }),
                certificate_not_after: Some(Timestamp(SystemTime::UNIX_EPOCH)),
            }],
        },
        ..AgentStatus::default()
    }
}

#[test]
fn status_says_why_ebpf_is_off_and_what_was_refused() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    let text = agent.run(&["status"], &[]).out;
    for line in [
        "eBPF           = off: no CAP_BPF",
        "Worker         = pid 7, restarted 1 times",
        "ID                 Ready  Config  Certificate Until",
        "web-sidecar-proxy  true   12      1970-01-01T00:00:00Z",
        "web-sidecar-proxy refuses l: bad",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} in:\n{text}");
    }
    let json = agent.run(&["status", "-json"], &[]).out;
    assert_eq!(culvert_api::decode_known::<AgentStatus>(json.as_bytes()).expect("JSON"), status());
}

#[test]
fn reload_and_leave_say_what_consul_says() {
    let agent = FakeAgent::start(vec![job("running", None, &[])]);
    assert_eq!(agent.run(&["reload"], &[]), said("Configuration reload triggered\n"));
    assert_eq!(agent.run(&["leave"], &[]), said("Graceful leave complete\n"));
}

#[test]
fn services_are_listed_with_their_addresses() {
    let plane = Plane::start();
    let empty = culvert(&["services", &plane.flag]);
    assert_eq!((empty.code, empty.err.as_str()), (0, "There are no services.\n"));
    let body = culvert_api::ServiceRegistration {
        name: "web".into(),
        port: 80,
        address: "192.0.2.1".into(),
        ..culvert_api::ServiceRegistration::default()
    };
    let control = plane.control.as_ref().expect("runs");
    plane.runtime.block_on(control.register_service(body)).expect("registered");
    let wanted = "Service  Kind     Address       ID\nweb      typical  192.0.2.1:80  web\n";
    assert_eq!(culvert(&["services", &plane.flag]), said(wanted));
}
