//! What a job file limits holds on a node: how many connections a service takes and a caller opens, and how long is waited.

use std::io;
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use culvert_tests::{App, Apps, Node, NodeOptions, Pair, World, calls, echo, eventually, group, service, upstream};

/// What a listener and an upstream are limited to.
const MOST: usize = 2;
/// How many more are tried.
const TOO_MANY: u64 = 3;
/// What is waited for a connection: far from the default of 5 s.
const WAIT_MS: u64 = 700;

/// The job `pair`, with what the sidecars of `called` and `caller` are told.
fn run(node: &Node, called: &str, caller: &str) -> Pair {
    let upstream = calls("called", 8080).replace("\n }", &format!("\n {caller}\n }}"));
    let groups = [
        group("called", 9001, called),
        group("caller", 9002, &upstream),
        group("stranger", 9003, &calls("called", 8080)),
    ];
    node.run_job("pair", &format!("job \"pair\" {{\n{}\n}}\n", groups.concat()));
    node.pair()
}

/// Refusals that one side of the proxied path has told of.
fn refused(node: &Node, service: &str, side: &str, reason: &str) -> u64 {
    let label = |name: &str, value: &str| format!("{name}={value:?}");
    let labels = [label("service", service), label("side", side), label("reason", reason)];
    node.metric("culvert_refusals_total", &labels.each_ref().map(String::as_str))
}

/// Opens [`MOST`] connections. What else uses the listener, as its check does for a moment, is waited for.
fn fill(app: &App) -> Vec<TcpStream> {
    let mut open = Vec::new();
    eventually("as many connections as are allowed", || {
        open.extend(app.greeted(upstream()));
        open.len() == MOST
    });
    open
}

/// With as many connections open as are allowed, one more of `by` is reset, those go on, and a place that is left is free.
fn holds(open_by: &App, by: &App) {
    let mut open = fill(open_by);
    for _ in 0..TOO_MANY {
        let error = by.greeted(upstream()).expect_err("one too many");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    }
    for stream in &mut open {
        echo(stream, b"as before").expect("those that are open go on");
    }
    drop(open.pop());
    let mut next = None;
    eventually("the place of one that has ended is free", || {
        next = by.greeted(upstream()).ok();
        next.is_some()
    });
    echo(&mut open[0], b"and still").expect("the other goes on");
}

#[test]
fn a_service_takes_no_more_connections_than_its_job_file_says() {
    let world = World::new("limits-inbound");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = run(&node, &format!("config {{ max_inbound_connections = {MOST} }}"), "");
    let server = pair.called.serve(&service());
    // It is for all callers together.
    holds(&pair.caller, &pair.stranger);
    eventually("the called side tells why", || refused(&node, "called", "inbound", "limit") >= TOO_MANY);
    for caller in ["caller", "stranger"] {
        assert_eq!(refused(&node, caller, "outbound", "limit"), 0, "it is not {caller}'s limit");
    }
    drop((server, apps));
    node.leave();
}

#[test]
fn a_caller_opens_no_more_connections_than_its_job_file_says() {
    let world = World::new("limits-upstream");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = run(&node, "", &format!("config {{\n limits {{ max_connections = {MOST} }}\n }}"));
    let server = pair.called.serve(&service());
    holds(&pair.caller, &pair.caller);
    eventually("the calling side tells why", || refused(&node, "caller", "outbound", "limit") >= TOO_MANY);
    assert_eq!(refused(&node, "called", "inbound", "limit"), 0, "it never came to the called side");
    // It is for this caller alone.
    let mut others: Vec<TcpStream> =
        (0..=MOST).map(|_| pair.stranger.greeted(upstream()).expect("nothing limits it")).collect();
    others.iter_mut().for_each(|stream| echo(stream, b"fine").expect("echo"));
    drop((others, server, apps));
    node.leave();
}

/// Packets to `port` vanish in the namespace of `app`.
fn vanish(app: &App, port: u16) {
    let rules = format!(
        "add table inet hole; add chain inet hole in {{ type filter hook input priority -300; }}; \
         add rule inet hole in tcp dport {port} drop"
    );
    app.run(|| {
        let output = Command::new("nft").arg(&rules).output().expect("nft runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
}

fn appear(app: &App) {
    app.run(|| {
        let done = Command::new("nft").args(["delete", "table", "inet", "hole"]).status().expect("nft runs");
        assert!(done.success());
    });
}

#[test]
fn who_does_not_answer_is_waited_for_as_long_as_the_job_file_says() {
    let world = World::new("limits-time");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let called = format!("config {{ local_connect_timeout_ms = {WAIT_MS} }}");
    let pair = run(&node, &called, &format!("config {{ connect_timeout_ms = {WAIT_MS} }}"));
    let server = pair.called.serve(&service());
    for (port, service, side) in [(pair.called.sidecar_port, "caller", "outbound"), (9001, "called", "inbound")] {
        eventually("it answers", || pair.caller.greeted(upstream()).is_ok());
        let before = refused(&node, service, side, "connect");
        vanish(&pair.called, port);
        let started = Instant::now();
        let error = pair.caller.greeted(upstream()).expect_err("nobody answers");
        let waited = started.elapsed();
        appear(&pair.called);
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
        let wait = Duration::from_millis(WAIT_MS);
        assert!(waited >= wait && waited < wait + Duration::from_secs(3), "{side}: {waited:?}");
        eventually("the side that waited tells why", || refused(&node, service, side, "connect") > before);
    }
    drop((server, apps));
    node.leave();
}
