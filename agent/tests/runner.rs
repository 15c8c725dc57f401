//! Jobs on a node without data plane: what is started, what waits for what, what stays. Tasks are real processes.

mod workload_world;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use culvert_agent::policy::PolicyEngine;
use culvert_agent::runner::{
    AllocationRecord, AllocationStatus, AllocationView, JobRecord, NodeServices, Records, RunError, Runner,
    SubmitError, WorkloadDialer,
};
use culvert_agent::task::ExecutorCommand;
use culvert_agent::worker::{self, Surroundings, WorkerSettings};
use culvert_agent::workload::{AllocId, Network, NetworkSettings, listen};
use culvert_control::{Control, ControlConfig};
use culvert_jobspec::{Job, NodeContext, PortBinding};
use culvert_proxy::handoff::Traffic;
use culvert_types::{ConnectionEvent, Datacenter, HealthStatus};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use workload_world::{World, eventually, in_world, run};

/// No worker runs here.
struct NoWorker;

impl Surroundings for NoWorker {
    fn connect_xds(&self, _stream: UnixStream) {}
    fn inbound_listener(&self, _proxy: &str, _port: u16, _listener: BorrowedFd<'_>) {}
    fn event(&self, _service: &str, _event: ConnectionEvent) {}
    fn events_lost(&self, _count: u64) {}
    fn traffic(&self, _proxy: &str, _service: &str, _traffic: &Traffic) {}
    fn no_traffic(&self, _proxy: Option<&str>) {}
}

async fn node(world: &World) -> Arc<NodeServices> {
    node_with(world.settings(), Handle::current()).await
}

/// Allocations live on `runtime`.
async fn node_with(settings: NetworkSettings, runtime: Handle) -> Arc<NodeServices> {
    let cgroup_parent = settings.cgroup_parent.clone();
    let data_dir = settings.data_dir.clone();
    let id = "d5c8c2f4-0000-4000-8000-000000000001";
    let config = ControlConfig::dev("n1", id, Datacenter::new("dc1").expect("a name"));
    let dialer = Arc::new(WorkloadDialer::new(Handle::current(), settings.clone()));
    let control = Arc::new(Control::start(config, dialer).await.expect("a control plane"));
    let worker = WorkerSettings { data_dir: data_dir.clone(), node: "n1".to_owned(), log: "info".to_owned() };
    let (_never_run, worker) = worker::supervisor(worker, Arc::new(NoWorker));
    Arc::new(NodeServices {
        runtime,
        network: Arc::new(Network::open(settings).await.expect("a network")),
        policy: PolicyEngine::new(None, control.mesh(), &data_dir),
        control,
        worker,
        records: Records::open(&data_dir).expect("records"),
        context: NodeContext { name: "n1".to_owned(), datacenter: "dc1".to_owned(), ..NodeContext::default() },
        executor: ExecutorCommand {
            program: PathBuf::from(env!("CARGO_BIN_EXE_culvert")),
            args: vec!["executor".into()],
        },
        hurry: CancellationToken::new(),
        advertise: Ipv4Addr::LOCALHOST.into(),
        data_dir,
        cgroup_parent,
    })
}

/// A job of one shell; `task` and `group` are added to their blocks.
fn job(id: &str, script: &str, task: &str, group: &str) -> Job {
    parse(&text(id, script, task, group))
}

fn parse(text: &str) -> Job {
    culvert_jobspec::parse(text, "job.nomad.hcl", &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
}

fn text(id: &str, script: &str, task: &str, group: &str) -> String {
    format!(
        r#"job "{id}" {{
  group "g" {{
    network {{
      mode = "bridge"
    }}
    {group}
    restart {{
      attempts = 0
    }}
    task "main" {{
      driver = "raw_exec"
      config {{
        command = "/bin/sh"
        args    = ["-c", "{script}"]
      }}
      {task}
    }}
  }}
}}"#
    )
}

fn view(runner: &Runner, id: &str) -> AllocationView {
    runner.allocation(id).unwrap_or_else(|| panic!("no allocation {id}"))
}

async fn becomes(runner: &Runner, id: &str, status: AllocationStatus) {
    eventually(&format!("{id} is {}", status.as_str()), async || view(runner, id).status == status).await;
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn who_waits_for_a_task_to_end_holds_up_nobody() {
    in_world("runner-waits", async |world| {
        let runner = Runner::start(node(&world).await);
        let stubborn = |word: &str| {
            let script = format!("trap '' INT; echo {word} > /run/said; while :; do sleep 1; done");
            job("stubborn", &script, "kill_timeout = \"1h\"", "")
        };
        let old = runner.submit(stubborn("old")).expect("accepted").created.remove(0);
        eventually("the old one has its trap", async || lines(Path::new("/run/said")) == 1).await;
        std::fs::remove_file("/run/said").expect("said");
        let new = runner.submit(stubborn("new")).expect("accepted while the old one ends");
        assert_eq!(new.stopped, std::slice::from_ref(&old));
        let new = new.created[0].clone();
        assert!(view(&runner, &old).record.stopping, "it can be seen until it is gone");

        let stopping = tokio::spawn({
            let runner = Arc::clone(&runner);
            async move { runner.stop("stubborn", false).await }
        });
        eventually("the stop is written down", async || runner.job("stubborn").is_some_and(|job| job.stopped)).await;
        let other = runner.submit(job("other", "sleep 1000", "", "")).expect("accepted").created.remove(0);
        becomes(&runner, &other, AllocationStatus::Running).await;
        assert!(!stopping.is_finished() && runner.allocation(&old).is_some(), "the stubborn one has an hour");
        assert!(!Path::new("/run/said").exists(), "the new one has not begun");
        eventually("the new one is gone", async || runner.allocation(&new).is_none()).await;

        runner.hurry();
        let stopped = stopping.await.expect("no panic").expect("stopped");
        assert!(stopped.contains(&old), "{stopped:?}");
        assert!(runner.allocation(&old).is_none());
        runner.stop_all().await;
        assert!(runner.views().is_empty());
        runner.submit(job("late", "true", "", "")).expect_err("the agent leaves");
    });
}

#[test]
fn what_replaces_an_allocation_begins_when_that_is_gone() {
    in_world("runner-replaces", async |world| {
        let runner = Runner::start(node(&world).await);
        let slow = |word: &str| {
            let script = format!(
                "trap 'sleep 1; echo {word}-ends >> /run/said; exit' INT; echo {word} >> /run/said; sleep 1000 & wait"
            );
            job("slow", &script, "kill_timeout = \"1m\"", "")
        };
        let old = runner.submit(slow("old")).expect("accepted").created.remove(0);
        eventually("the old one has its trap", async || lines(Path::new("/run/said")) == 1).await;
        let new = runner.submit(slow("new")).expect("accepted").created.remove(0);
        becomes(&runner, &new, AllocationStatus::Running).await;
        assert!(runner.allocation(&old).is_none());
        eventually("the new one speaks", async || lines(Path::new("/run/said")) == 3).await;
        assert_eq!(std::fs::read_to_string("/run/said").expect("text"), "old\nold-ends\nnew\n");
        runner.stop_all().await;
    });
}

#[test]
fn what_failed_stays_failed_under_the_next_agent() {
    in_world("runner-failed", async |world| {
        let node = node(&world).await;
        let runner = Runner::start(Arc::clone(&node));
        let failing = job("failing", "echo once >> /run/said; exit 3", "", "");
        let failed = runner.submit(failing.clone()).expect("accepted").created.remove(0);
        becomes(&runner, &failed, AllocationStatus::Failed).await;
        eventually("it is written down", async || node.records.allocations()[0].failed.is_some()).await;

        let next = Runner::start(node);
        assert_eq!(view(&next, &failed).status, AllocationStatus::Failed);
        assert_eq!(view(&next, &failed).error.as_deref(), Some("failed tasks: main"));
        eventually("its task is shown", async || view(&next, &failed).tasks.contains_key("main")).await;
        let again = next.submit(failing).expect("accepted");
        assert_eq!(again.stopped, [failed]);
        becomes(&next, &again.created[0], AllocationStatus::Failed).await;
        assert_eq!(lines(Path::new("/run/said")), 2, "once each time it was asked for");
        next.stop_all().await;
    });
}

#[test]
fn what_the_next_agent_can_never_bring_up_does_not_run_on() {
    in_world("runner-refused", async |world| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let runner = Runner::start(node_with(world.settings(), runtime.handle().clone()).await);
        let script = "trap 'echo ends >> /run/said; exit' INT; echo begins > /run/said; sleep 1000 & wait";
        let id = runner.submit(job("refused", script, "", "")).expect("accepted").created.remove(0);
        eventually("it has its trap", async || lines(Path::new("/run/said")) == 1).await;
        runtime.shutdown_background(); // as by SIGKILL
        drop(runner);

        let node = node(&world).await;
        let refused = job("refused", script, "", &refused_service());
        let wanted = JobRecord { job: refused.clone(), ..node.records.jobs().remove(0) };
        node.records.put_job(&wanted).expect("written");
        node.records.change_allocation(&id, |record| record.job = refused).expect("written");
        let next = Runner::start(node);
        becomes(&next, &id, AllocationStatus::Failed).await;
        eventually("its task has ended", async || lines(Path::new("/run/said")) == 2).await;
        next.stop_all().await;
    });
}

/// Only the catalog knows how long a value may be.
fn refused_service() -> String {
    format!("service {{\nname = \"web\"\nport = \"80\"\nmeta {{\nlong = \"{}\"\n}}\n}}", "x".repeat(600))
}

#[test]
fn what_no_attempt_can_bring_up_is_refused_or_fails_at_once() {
    in_world("runner-lasting", async |world| {
        let runner = Runner::start(node(&world).await);
        let service = "service {\nname = \"web-${env[\"NOWHERE\"]}\"\nport = \"80\"\n}";
        let refused = runner.submit(job("nowhere", "true", "", service)).expect_err("no such variable");
        let SubmitError::Services { source, .. } = &refused else { panic!("{refused:?}") };
        assert!(matches!(**source, RunError::Registration(_)), "{refused:?}");
        assert!(runner.job("nowhere").is_none() && runner.views().is_empty());

        let failed = runner.submit(job("refused", "true", "", &refused_service())).expect("accepted").created.remove(0);
        becomes(&runner, &failed, AllocationStatus::Failed).await;
        let error = view(&runner, &failed).error.unwrap_or_default();
        assert!(error.contains("the catalog refuses the service"), "{error}");
        runner.stop_all().await;
    });
}

#[test]
fn checks_of_a_service_outside_the_mesh_are_made_inside_and_count() {
    in_world("runner-health", async |world| {
        // The host listens where the workload does not.
        let _host = std::net::TcpListener::bind("127.0.0.1:8000").expect("a port");
        let node = node(&world).await;
        let runner = Runner::start(Arc::clone(&node));
        let service = "service {\nname = \"web\"\nport = \"8000\"\ncheck {\ntype = \"tcp\"\ninterval = \"1s\"\ntimeout = \"1s\"\n}\n}";
        let web = runner.submit(job("web", "sleep 1000", "", service)).expect("accepted").created.remove(0);
        becomes(&runner, &web, AllocationStatus::Running).await;
        let service = view(&runner, &web).services.remove(0);
        let said = |word: &str| {
            let state = node.control.state();
            state.checks_of("n1", &service.service_id).any(|check| check.output.contains(word))
        };
        eventually("the check has run", async || said("refused")).await;
        assert_eq!(runner.health(&service), Some(HealthStatus::Critical), "the host must not answer for it");
        let netns = world.settings().netns(&AllocId::new(&web).expect("an ID"));
        let _listener = listen(&netns, ([127, 0, 0, 1], 8000).into()).await.expect("listens");
        eventually("it passes", async || runner.health(&service) == Some(HealthStatus::Passing)).await;
        runner.stop_all().await;
    });
}

#[test]
fn an_allocation_that_is_stopped_while_it_comes_up_leaves_nothing() {
    in_world("runner-early-stop", async |world| {
        let nft = world.dir.join("nft");
        let script = "#!/bin/sh\necho >> /run/begun\n[ ! -e /run/slow ] || sleep 2\nnft \"$@\"\ncode=$?\necho >> /run/done\nexit $code\n";
        std::fs::write(&nft, script).expect("a slow nft");
        run("chmod", &["0755", &nft.to_string_lossy()]);
        // Blocking steps run beside each other here, as in the agent.
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let settings = NetworkSettings { nft, ..world.settings() };
        let runner = Runner::start(node_with(settings, runtime.handle().clone()).await);
        let (begun, done) = (|| lines(Path::new("/run/begun")), || lines(Path::new("/run/done")));
        let before = begun();
        std::fs::write("/run/slow", "").expect("written");
        let network = "mode = \"bridge\"\nport \"http\" {\nstatic = 9100\n}";
        let early = parse(&text("early", "sleep 1000", "", "").replace("mode = \"bridge\"", network));
        runner.submit(early).expect("accepted");
        eventually("the port is being published", async || begun() > before).await;
        std::fs::remove_file("/run/slow").expect("removed");
        runner.stop("early", false).await.expect("stopped");
        eventually("nothing is under way any more", async || begun() == done()).await;
        let table = run("nft", &["list", "table", "inet", "culvert"]);
        assert!(!table.contains("9100"), "{table}");
        assert!(!run("ip", &["-o", "link"]).contains("cv"), "a veth stays");
        assert_eq!(std::fs::read_dir("/run/netns").map_or(0, Iterator::count), 0, "a netns stays");
        runtime.shutdown_background();
    });
}

#[test]
fn a_dynamic_port_that_the_host_took_is_replaced_and_a_static_one_is_waited_for() {
    in_world("runner-ports", async |world| {
        let node = node(&world).await;
        let with = |id: &str, port: &str| parse(&text(id, "sleep 1000", "", "").replace("mode = \"bridge\"", port));
        let fixed = with("fixed", "mode = \"bridge\"\nport \"http\" {\nstatic = 9100\n}");
        let dynamic = with("dynamic", "mode = \"bridge\"\nport \"http\" {\n}");
        // Given to the allocation when it was free.
        let port = PortBinding { host: 20000, inside: 20000 };
        let record = AllocationRecord {
            id: AllocId::random().to_string(),
            workload: 1,
            job: dynamic.clone(),
            job_version: 0,
            group: "g".to_owned(),
            index: 0,
            ports: [("http".to_owned(), port)].into(),
            sidecar_ports: BTreeMap::new(),
            created: 0,
            stopping: false,
            failed: None,
        };
        let wanted = JobRecord { job: dynamic, version: 0, stopped: false, submitted: 0 };
        node.records.submit(&wanted, std::slice::from_ref(&record)).expect("written");
        let _host = std::net::UdpSocket::bind("0.0.0.0:20000").expect("a port");
        let runner = Runner::start(Arc::clone(&node));
        becomes(&runner, &record.id, AllocationStatus::Running).await;
        assert_eq!(view(&runner, &record.id).record.ports["http"].host, 20001);

        let host = std::net::TcpListener::bind("0.0.0.0:9100").expect("a port");
        let fixed = runner.submit(fixed).expect("accepted").created.remove(0);
        let why = || view(&runner, &fixed).error.unwrap_or_default();
        eventually("it is told who has the port", async || {
            why().contains("Static port 9100 already reserved by process")
        })
        .await;
        drop(host);
        becomes(&runner, &fixed, AllocationStatus::Running).await;
        runner.stop_all().await;
    });
}

#[test]
fn a_plan_says_what_a_run_does() {
    in_world("runner-plan", async |world| {
        let runner = Runner::start(node(&world).await);
        let failing = job("failing", "exit 3", "", "");
        let plan = runner.plan(failing.clone()).expect("a plan");
        assert!(plan.changes && plan.diff.to_string().contains("\"g\" (1 create)"), "{}", plan.diff);
        let failed = runner.submit(failing.clone()).expect("accepted").created.remove(0);
        becomes(&runner, &failed, AllocationStatus::Failed).await;
        let plan = runner.plan(failing).expect("a plan");
        assert!(plan.changes && plan.diff.to_string().contains("\"g\" (1 create/destroy update)"), "{}", plan.diff);

        let lives = job("lives", "sleep 1000", "", "");
        let id = runner.submit(lives.clone()).expect("accepted").created.remove(0);
        let plan = runner.plan(lives.clone()).expect("a plan");
        assert!(!plan.changes && plan.diff.to_string().contains("\"g\" (1 ignore)"), "{}", plan.diff);
        assert_eq!(runner.submit(lives.clone()).expect("accepted").kept, [id]);
        let away = Job { datacenters: vec!["elsewhere".to_owned()], ..lives };
        assert!(matches!(runner.plan(away), Err(SubmitError::Datacenter { .. })));
        let port = "mode = \"bridge\"\nport \"http\" {\nstatic = 9100\n}";
        let with_port = |id: &str| parse(&text(id, "sleep 1000", "", "").replace("mode = \"bridge\"", port));
        runner.submit(with_port("one")).expect("accepted");
        let refused = runner.plan(with_port("two")).expect_err("taken").to_string();
        assert_eq!(refused, "Static port 9100 already reserved by one.g:http");
        runner.stop_all().await;
    });
}
