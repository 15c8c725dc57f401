//! An agent that keeps its state forgets nothing that it acknowledged, whenever it is killed, and takes over what runs.

#![expect(clippy::print_stdout, reason = "the rounds are the report of a failing test")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use culvert_tests::{
    API, App, Apps, Node, NodeOptions, Pair, Process, World, echo, eventually, is_direct, put, service, upstream,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const ROUNDS: u64 = 5;

/// What a node must still be after it was killed.
#[derive(Debug, Eq, PartialEq)]
struct Picture {
    root: Value,
    trust_domain: Value,
    sidecars: Vec<Value>,
    people: Vec<Process>,
    default_policy: Value,
}

impl Picture {
    fn note(node: &Node) -> Self {
        let roots = node.api("/v1/connect/ca/roots");
        let job = node.api("/v1/culvert/job/pair");
        let mut sidecars: Vec<Value> = job["Allocations"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|allocation| allocation["Services"].as_array().into_iter().flatten())
            .map(|service| serde_json::json!([service["ServiceID"], service["SidecarPort"], service["Identity"]]))
            .collect();
        sidecars.sort_by_key(Value::to_string);
        Self {
            root: roots["ActiveRootID"].clone(),
            trust_domain: roots["TrustDomain"].clone(),
            sidecars,
            people: node.people(),
            default_policy: node.api("/v1/culvert/status")["DefaultPolicy"].clone(),
        }
    }
}

/// All of the node is there again.
fn settled(node: &Node) -> bool {
    let status = node.api("/v1/culvert/status");
    let job = node.api("/v1/culvert/job/pair");
    let allocations = job["Allocations"].as_array().cloned().unwrap_or_default();
    let proxies = status["Worker"]["Proxies"].as_array().map_or(0, Vec::len);
    !status["Worker"]["Pid"].is_null()
        && proxies == 3
        && allocations.len() == 3
        && allocations.iter().all(|allocation| allocation["Status"] == "running")
}

fn source(number: usize) -> String {
    format!("source-{number}")
}

/// Writes intentions one after the other until the end; those that were acknowledged.
fn write_intentions(next: &AtomicUsize, stop: &AtomicBool) -> Vec<usize> {
    let mut acknowledged = Vec::new();
    while !stop.load(SeqCst) {
        let number = next.fetch_add(1, SeqCst);
        let path = format!("/v1/connect/intentions/exact?source={}&destination=called", source(number));
        let body = r#"{"SourceType": "consul", "Action": "deny"}"#;
        match put(API, &path, body) {
            Ok(_) => acknowledged.push(number),
            // Nobody there: not too fast.
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
    acknowledged
}

/// Who is denied tries all the while.
fn try_in_vain(stranger: &App, greeted: &AtomicUsize, stop: &AtomicBool) {
    while !stop.load(SeqCst) {
        if stranger.greeted(upstream()).is_ok() {
            greeted.fetch_add(1, SeqCst);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Kills and starts the agent under writes; the acknowledged ones.
fn killed_again_and_again(node: &mut Node, pair: &Pair, before: &Picture) -> Vec<usize> {
    let (next, stop, greeted) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
    let acknowledged = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let stopping = StopOnDrop(&stop);
        scope.spawn(|| acknowledged.lock().expect("no panic").extend(write_intentions(&next, &stop)));
        scope.spawn(|| try_in_vain(&pair.stranger, &greeted, &stop));
        for round in 0..ROUNDS {
            let (written, started) = (next.load(SeqCst), Instant::now());
            eventually("intentions are written", || next.load(SeqCst) > written + 10);
            // At another point of the writing each time.
            thread::sleep(Duration::from_millis(round * 7));
            println!("round {round}: killed after {:?}", started.elapsed());
            node.kill();
            node.spawn();
            eventually("the node is whole again", || settled(node));
            assert_eq!(&Picture::note(node), before, "round {round}");
        }
        drop(stopping);
    });
    assert_eq!(greeted.into_inner(), 0, "a denied connection was let through");
    acknowledged.into_inner().expect("no panic")
}

#[test]
fn what_was_acknowledged_is_there_after_every_kill_and_so_is_the_rest_of_the_node() {
    let world = World::new("durability");
    let options = NodeOptions { server: true, encryption: "between-nodes", ..NodeOptions::default() };
    let mut node = Node::start(&world, options);
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&service());
    pair.caller.greeted(upstream()).expect_err("the default is deny, without a flag");
    node.culvert(&["intention", "create", "-allow", "caller", "called"]);
    node.culvert(&["intention", "create", "-deny", "stranger", "called"]);
    eventually("a connection", || pair.caller.greeted(upstream()).is_ok_and(|stream| is_direct(&stream)));
    let mut lasting = pair.caller.greeted(upstream()).expect("a connection");
    eventually("the node is whole", || settled(&node));
    let before = Picture::note(&node);
    assert_eq!(before.default_policy, "deny");

    let acknowledged = killed_again_and_again(&mut node, &pair, &before);
    assert!(acknowledged.len() > 10, "the writes prove nothing: {acknowledged:?}");
    let intentions = node.api("/v1/connect/intentions");
    let sources: Vec<&str> =
        intentions.as_array().into_iter().flatten().filter_map(|intention| intention["SourceName"].as_str()).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|number| !sources.contains(&source(**number).as_str())).collect();
    assert!(lost.is_empty(), "of {} acknowledged intentions are lost: {lost:?}", acknowledged.len());
    echo(&mut lasting, b"still here").expect("a direct connection outlives all of it");

    // An agent that is asked to end leaves everything at work, too.
    node.end(Signal::SIGTERM);
    let mut meanwhile = pair.caller.greeted(upstream()).expect("a connection while no agent runs");
    node.spawn();
    eventually("the node is whole again", || settled(&node));
    assert_eq!(Picture::note(&node), before, "after SIGTERM");
    echo(&mut meanwhile, b"still here").expect("a connection of the time between");
    node.culvert(&["intention", "delete", "caller", "called"]);
    eventually("the default holds", || pair.caller.greeted(upstream()).is_err());
    drop((server, apps));
    node.leave();
    world.assert_nothing_left(&before.people);
}

#[test]
fn an_agent_in_memory_that_is_interrupted_leaves_nothing() {
    let world = World::new("interrupt");
    let mut node = Node::start(&world, NodeOptions { encryption: "between-nodes", ..NodeOptions::default() });
    drop(node.run_pair(""));
    let people = node.people();
    node.end(Signal::SIGINT);
    world.assert_nothing_left(&people);
}
