//! Only passing instances get connections; checks count as they say; an instance without its application is nobody's.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;

use culvert_tests::{
    App, Apps, Node, NodeOptions, PATIENCE, Server, World, calls, echo, eventually, group, is_direct, service, upstream,
};

/// Where an instance tells of its health, beside its service.
const HEALTH: u16 = 9100;

/// `GET /health` of one instance, answered as the test wants.
#[derive(Default)]
struct Health {
    /// So many answers are bad from now on.
    bad: AtomicUsize,
    /// Good answers since the last bad one.
    good: AtomicUsize,
    /// Bad answers since the last good one.
    failed: AtomicUsize,
    asked: AtomicUsize,
}

impl Health {
    fn start(app: &App) -> Arc<Self> {
        let (health, listener) = (Arc::new(Self::default()), app.listen((Ipv4Addr::LOCALHOST, HEALTH)));
        let own = Arc::clone(&health);
        thread::spawn(move || own.answer(&listener));
        health
    }

    fn answer(&self, listener: &TcpListener) {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            drop(stream.set_read_timeout(Some(PATIENCE)));
            drop(stream.read(&mut [0; 4096]));
            let bad = self.bad.fetch_update(SeqCst, SeqCst, |bad| bad.checked_sub(1)).is_ok();
            if bad {
                self.good.store(0, SeqCst);
                self.failed.fetch_add(1, SeqCst);
            } else {
                self.failed.store(0, SeqCst);
                self.good.fetch_add(1, SeqCst);
            }
            let status = if bad { "503 Service Unavailable" } else { "200 OK" };
            drop(write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"));
            self.asked.fetch_add(1, SeqCst);
        }
    }

    fn fail(&self, times: usize) {
        self.bad.store(times, SeqCst);
    }
}

/// One of the two instances.
struct Instance {
    app: App,
    server: Option<Server>,
    health: Arc<Health>,
}

impl Instance {
    fn accepted(&self) -> usize {
        self.server.as_ref().map_or(0, |server| server.accepted().len())
    }

    /// What the catalog says of its service's check.
    fn status(&self, node: &Node) -> String {
        let checks = node.api("/v1/health/checks/called");
        let own = |check: &&serde_json::Value| {
            check["ServiceID"].as_str().is_some_and(|id| id.contains(&self.app.id)) && check["Name"] == "switchable"
        };
        let check = checks.as_array().into_iter().flatten().find(own).unwrap_or_else(|| panic!("no check: {checks}"));
        check["Status"].as_str().expect("a text").to_owned()
    }
}

fn job() -> String {
    let check = r#"
      check {
        name                     = "switchable"
        type                     = "http"
        path                     = "/health"
        port                     = "health"
        interval                 = "1s"
        timeout                  = "5s"
        success_before_passing   = 2
        failures_before_critical = 2
      }
      connect {"#;
    let called = group("called", 9001, "").replace("connect {", check).replace(
        "network { mode = \"bridge\" }",
        "count = 2\n network {\n mode = \"bridge\"\n port \"health\" {\n to = 9100\n }\n }",
    );
    format!("job \"health\" {{\n{called}\n{}\n}}\n", group("caller", 9002, &calls("called", 8080)))
}

fn instances(node: &Node) -> [Instance; 2] {
    let status = node.api("/v1/culvert/job/health");
    let called = status["Allocations"].as_array().into_iter().flatten().filter(|one| one["Group"] == "called");
    let instance = |allocation| {
        let app = App::from_allocation(allocation);
        let (server, health) = (Some(app.serve(&service())), Health::start(&app));
        Instance { app, server, health }
    };
    let found: Vec<_> = called.map(instance).collect();
    found.try_into().unwrap_or_else(|_| panic!("not two instances: {status}"))
}

/// Connections go to `expected` only, from some moment on.
fn all_go_to(caller: &App, expected: &Instance, other: &Instance, direct: bool) {
    let connect = || {
        let before = (expected.accepted(), other.accepted());
        let stream = caller.greeted(upstream()).expect("one instance is well");
        assert_eq!(is_direct(&stream), direct);
        (expected.accepted() - before.0, other.accepted() - before.1) == (1, 0)
    };
    eventually("the other is left alone", || (0..5).all(|_| connect()));
    assert!((0..20).all(|_| connect()), "a connection to an instance that is not well");
}

fn both_are_met(caller: &App, [one, two]: [&Instance; 2]) {
    let before = (one.accepted(), two.accepted());
    eventually("both instances get connections", || {
        drop(caller.greeted(upstream()));
        one.accepted() > before.0 && two.accepted() > before.1
    });
}

fn only_passing_instances(name: &str, encryption: &'static str) {
    let direct = encryption == "between-nodes";
    let world = World::new(name);
    let mut node = Node::start(&world, NodeOptions { encryption, ..NodeOptions::default() });
    let apps = Apps::join(&world);
    // The checks fail until the test serves them.
    let file = node.write_job("health", &job());
    node.culvert(&["job", "run", "-detach", &file]);
    eventually("the allocations run", || {
        let status = node.api("/v1/culvert/job/health");
        let allocations = status["Allocations"].as_array().cloned().unwrap_or_default();
        allocations.len() == 3 && allocations.iter().all(|allocation| allocation["Status"] == "running")
    });
    let caller = App::of(&node, "health", "caller");
    caller.greeted(upstream()).expect_err("no instance is passing yet");
    let [one, mut two] = instances(&node);
    let passing = |instance: &Instance| instance.status(&node) == "passing";
    for instance in [&one, &two] {
        eventually("the check passes", || passing(instance));
        assert!(instance.health.good.load(SeqCst) >= 2, "passing before success_before_passing");
    }
    eventually("the path is there", || caller.greeted(upstream()).is_ok_and(|stream| is_direct(&stream) == direct));
    both_are_met(&caller, [&one, &two]);

    // One failure is none.
    let asked = one.health.asked.load(SeqCst);
    one.health.fail(1);
    eventually("it was asked again", || {
        assert!(passing(&one), "critical before failures_before_critical");
        one.health.asked.load(SeqCst) > asked + 2
    });

    // Two are: no new connections, and the live ones stay.
    let mut live = Vec::new();
    let accepted = one.accepted();
    while one.accepted() < accepted + 2 {
        live.push(caller.greeted(upstream()).expect("both are well"));
    }
    one.health.fail(usize::MAX);
    eventually("the check is critical", || one.status(&node) == "critical");
    assert!(one.health.failed.load(SeqCst) >= 2);
    all_go_to(&caller, &two, &one, direct);
    for stream in &mut live {
        echo(stream, b"still here").expect("live connections stay");
    }
    one.health.fail(0);
    eventually("it passes again", || passing(&one));
    assert!(one.health.good.load(SeqCst) >= 2, "passing before success_before_passing");
    both_are_met(&caller, [&one, &two]);

    // An instance whose application is gone: direct callers meet the other, proxied ones are refused there.
    drop(two.server.take());
    if direct {
        // In the moment of its end a listener refuses, as always.
        eventually("the other is met", || (0..5).all(|_| caller.greeted(upstream()).is_ok()));
        all_go_to(&caller, &one, &two, true);
    } else {
        let refused = || node.metric("culvert_refusals_total", &["service=\"called\"", "reason=\"connect\""]);
        let before = refused();
        eventually("the refusal of the application is told", || {
            drop(caller.greeted(upstream()));
            refused() > before
        });
    }
    two.server = Some(two.app.serve(&service()));

    // Nobody is well.
    for instance in [&one, &two] {
        instance.health.fail(usize::MAX);
    }
    eventually("both are critical", || [&one, &two].iter().all(|instance| instance.status(&node) == "critical"));
    let nobody = || node.metric("culvert_refusals_total", &["service=\"caller\"", "reason=\"no_healthy_instance\""]);
    let before = nobody();
    eventually("there is nobody to go to", || {
        drop(caller.greeted(upstream()));
        nobody() > before
    });
    let accepted = one.accepted() + two.accepted();
    caller.greeted(upstream()).expect_err("nobody is well");
    assert_eq!(one.accepted() + two.accepted(), accepted);
    drop((live, one, two, apps));
    node.leave();
}

#[test]
fn only_passing_instances_are_reached_on_the_direct_path() {
    only_passing_instances("health-direct", "between-nodes");
}

#[test]
fn only_passing_instances_are_reached_on_the_proxied_path() {
    only_passing_instances("health-proxied", "always");
}
