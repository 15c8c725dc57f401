//! `culvert job`.

use culvert_api::{JobStatus, JobSubmission};

use super::fake::{ALLOCATION, FakeAgent, job};
use super::{culvert, said};

const JOB: &str = r#"
variable "port" { type = string }
job "web" {
  group "g" {
    network { mode = "bridge" }
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
    let mut waits = job("pending", None, &["Received"]);
    waits.allocations[0].error = Some("Static port 80 already reserved by other.g:http".into());
    let states = vec![
        job("pending", None, &["Received"]),
        waits.clone(),
        waits,
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
             \x20   Allocation 0a1b2c3d (g): Static port 80 already reserved by other.g:http\n\
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
fn services_outside_the_mesh_have_to_pass_too() {
    let outside = |health| {
        let mut job = job("running", health, &["Started"]);
        let service = &mut job.allocations[0].services[0];
        (service.sidecar_id, service.sidecar_port, service.identity) = (None, None, None);
        job
    };
    let agent = FakeAgent::start(vec![outside(None), outside(Some("critical")), outside(Some("passing"))]);
    let (_dir, file) = job_file();
    let ran = agent.run(&["job", "run"], &["-var", "port=80", &file]);
    assert!(ran.out.contains("Service web (0a1b2c3d): critical -> passing\n==> Job"), "{}", ran.out);
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
fn plan_leaves_out_the_difference_and_colours_when_asked() {
    let agent = FakeAgent::start(vec![job("pending", None, &[])]);
    let (_dir, file) = job_file();
    let closing = format!("To submit the job run:\n\nculvert job run {file}\n");
    let with_diff = format!("+ Job: \"web\"\n\n{closing}");
    for (flags, expected) in [
        (&["-diff=false"][..], &closing),
        (&["-diff", "-diff=f", "-no-color"], &closing),
        (&["-diff", "-no-color"], &with_diff),
        (&["-diff=true"], &with_diff),
    ] {
        let ran = agent.run(&["job", "plan"], &[flags, &["-var", "port=1", &file]].concat());
        assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (1, expected.as_str(), ""), "{flags:?}");
    }
}

#[test]
fn what_nomads_commands_take_and_culverts_do_not_is_refused_by_name() {
    let (_dir, file) = job_file();
    for (args, flag, code) in [
        (&["job", "run", "-check-index", "7", &file][..], "-check-index", 1),
        (&["job", "run", "-check-index=7", &file], "-check-index", 1),
        (&["job", "run", "-output", &file], "-output", 1),
        (&["job", "plan", "-verbose", &file], "-verbose", 255),
        (&["job", "plan", "-policy-override", &file], "-policy-override", 255),
        (&["job", "validate", "-json", &file], "-json", 1),
        (&["job", "status", "-evals", "web"], "-evals", 1),
        (&["job", "stop", "-detach", "web"], "-detach", 1),
        (&["job", "logs", "-job", "web"], "-job", 1),
    ] {
        let ran = culvert(args);
        let told = format!("{flag} of Nomad's command is not supported by culvert yet: leave it out\n");
        assert_eq!((ran.code, ran.out.as_str(), ran.err), (code, "", told), "{args:?}");
    }
    let unknown = culvert(&["job", "run", "-no-such-flag", &file]).err;
    assert!(unknown.contains("unexpected argument '-no-such-flag'"), "{unknown}");
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
