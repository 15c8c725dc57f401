//! An intention that turns to deny ends live connections: idle and busy, on both paths, over both families, at both ends;
//! and nobody else's.

#![expect(clippy::print_stdout, reason = "what a failing test prints is its report")]

use std::io::{self, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use culvert_tests::{
    API, Apps, Node, NodeOptions, Pair, Server, World, echo, eventually, put, service, upstream, upstream_mapped,
    upstream6,
};

/// How `caller` may come to be denied, and allowed again; `stranger` stays allowed. Each way leaves both allowed.
struct Way {
    name: &'static str,
    default: &'static str,
    /// What comes before.
    prepare: &'static [&'static str],
    deny: &'static str,
    allow: &'static str,
}

const WAYS: [Way; 4] = [
    Way {
        name: "a reload that turns the default to deny",
        default: "allow",
        prepare: &["intention create -allow stranger called"],
        deny: "default deny",
        allow: "default allow",
    },
    Way {
        name: "an intention about the pair",
        default: "allow",
        prepare: &[],
        deny: "intention create -deny caller called",
        allow: "intention create -replace -allow caller called",
    },
    Way {
        name: "an intention about everybody",
        default: "allow",
        prepare: &["intention delete caller called"],
        deny: "intention create -deny * called",
        allow: "intention create -replace -allow * called",
    },
    Way {
        name: "the end of the intention that allowed",
        default: "deny",
        prepare: &["intention create -allow caller called", "intention delete * called"],
        deny: "intention delete caller called",
        allow: "intention create -allow caller called",
    },
];

fn obey(node: &mut Node, command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    match words[..] {
        ["default", policy] => set_default(node, policy),
        _ => drop(node.culvert(&words)),
    }
}

fn set_default(node: &mut Node, policy: &str) {
    node.set(&format!("default_intention_policy = {policy:?}"));
}

/// A connection that carries bytes all the time.
struct Busy {
    rounds: Arc<AtomicUsize>,
    thread: JoinHandle<io::Error>,
}

impl Busy {
    fn start(mut stream: TcpStream) -> Self {
        let rounds = Arc::new(AtomicUsize::new(0));
        let thread = thread::spawn({
            let rounds = Arc::clone(&rounds);
            move || loop {
                if let Err(error) = echo(&mut stream, &[7; 1000]) {
                    return error;
                }
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { rounds, thread }
    }

    fn flows(&self) {
        let before = self.rounds.load(Ordering::SeqCst);
        eventually("a busy connection carries bytes", || self.rounds.load(Ordering::SeqCst) > before + 3);
    }
}

fn assert_cut(what: &str, error: &io::Error) {
    let cut = matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe
    );
    assert!(cut, "{what} ended otherwise: {error:?}");
}

/// Opens, denies, looks at all ends, allows again.
fn deny_and_allow(node: &mut Node, pair: &Pair, server: &Server, way: &Way, to: &[SocketAddr], direct: bool) {
    set_default(node, way.default);
    way.prepare.iter().for_each(|command| obey(node, command));
    let mut idle: Vec<_> = to.iter().map(|to| pair.caller.opened(*to, direct)).collect();
    let busy: Vec<_> = to.iter().map(|to| Busy::start(pair.caller.opened(*to, direct))).collect();
    let mut others: Vec<_> = to.iter().map(|to| pair.stranger.opened(*to, direct)).collect();
    busy.iter().for_each(Busy::flows);
    let cut = server.cut();

    obey(node, way.deny);
    for stream in &mut idle {
        let error = stream.read_exact(&mut [0; 1]).expect_err("nobody sent anything");
        assert_cut("an idle connection", &error);
    }
    for busy in busy {
        assert_cut("a busy connection", &busy.thread.join().expect("no panic"));
    }
    eventually("the called application sees the end of all of them", || server.cut() >= cut + 2 * to.len());
    for to in to {
        // What ends live direct connections and what refuses new proxied ones are told at the same time, not in an order.
        eventually("a new connection is refused", || pair.caller.greeted(*to).is_err());
        for _ in 0..3 {
            pair.caller.greeted(*to).expect_err("a denied connection was greeted");
        }
    }
    for stream in &mut others {
        echo(stream, b"still here").expect("who is allowed is left alone");
    }

    obey(node, way.allow);
    for to in to {
        let mut stream = pair.caller.opened(*to, direct);
        echo(&mut stream, b"back again").expect("allowed again");
    }
}

fn denied_connections_end(name: &str, options: NodeOptions, direct: bool) {
    let to = [upstream(), upstream6(), upstream_mapped()];
    let world = World::new(name);
    let mut node = Node::start(&world, options);
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&service());
    for way in &WAYS {
        println!("{}", way.name);
        deny_and_allow(&mut node, &pair, &server, way, &to, direct);
    }
    let path = if direct { "path=\"direct\"" } else { "path=\"proxied\"" };
    assert!(node.metric("culvert_connections_total", &[path]) > 0, "the metrics know the path otherwise");
    drop((server, apps));
    node.leave();
}

#[test]
fn denied_connections_end_on_the_direct_path() {
    let options = NodeOptions { encryption: "between-nodes", ..NodeOptions::default() };
    denied_connections_end("revoke-direct", options, true);
}

#[test]
fn denied_connections_end_on_the_proxied_path() {
    denied_connections_end("revoke-proxied", NodeOptions::default(), false);
}

#[test]
fn denied_connections_end_without_ebpf() {
    let options = NodeOptions { ebpf: false, encryption: "between-nodes", ..NodeOptions::default() };
    denied_connections_end("revoke-no-ebpf", options, false);
}

/// How often somebody is denied to see how soon it is felt.
const DENIES: usize = 11;
/// What is promised of one in a hundred (README.md, "How fast"); the bench measures that.
const LIVE_ENDS_WITHIN: Duration = Duration::from_millis(500);
const NEW_REFUSED_WITHIN: Duration = Duration::from_millis(100);

/// A live connection's end, and the beginning of the first attempt that was refused, both since the deny was answered.
fn felt_after(node: &Node, pair: &Pair, direct: bool) -> (Duration, Duration) {
    let mut live = pair.caller.opened(upstream(), direct);
    let end = thread::spawn(move || {
        assert_cut("a live connection", &live.read_exact(&mut [0]).expect_err("nobody sent anything"));
        Instant::now()
    });
    node.culvert(&["intention", "create", "-replace", "-deny", "caller", "called"]);
    let answered = Instant::now();
    let mut refused = answered;
    eventually("a new connection is refused", || {
        refused = Instant::now();
        pair.caller.greeted(upstream()).is_err()
    });
    let ended = end.join().expect("cut");
    node.culvert(&["intention", "create", "-replace", "-allow", "caller", "called"]);
    (ended.saturating_duration_since(answered), refused - answered)
}

/// The promise is a time. Medians keep to it on a machine that others keep busy for a moment; what waits for a timer, or is
/// looked for every second, shows in them.
#[test]
fn a_deny_is_felt_in_time_on_both_paths() {
    let world = World::new("revoke-soon");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&service());
    for (encryption, direct) in [("always", false), ("between-nodes", true)] {
        node.encrypt(encryption);
        let felt: Vec<_> = (0..DENIES).map(|_| felt_after(&node, &pair, direct)).collect();
        let median = |of: fn(&(Duration, Duration)) -> Duration| {
            let mut times: Vec<_> = felt.iter().map(of).collect();
            times.sort();
            times[DENIES / 2]
        };
        assert!(median(|felt| felt.0) < LIVE_ENDS_WITHIN, "direct: {direct}, {felt:?}");
        assert!(median(|felt| felt.1) < NEW_REFUSED_WITHIN, "direct: {direct}, {felt:?}");
    }
    drop((server, apps));
    node.leave();
}

/// Whoever deregisters a service does not stop it: its application runs on, and so do its connections.
#[test]
fn a_deregistered_service_obeys_as_long_as_it_runs() {
    let world = World::new("revoke-deregistered");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&service());
    let mut denied = pair.caller.opened(upstream(), false);
    let mut kept = pair.stranger.opened(upstream(), false);
    let services = node.api("/v1/agent/services");
    let called = services.as_object().expect("services").values().find(|service| service["Service"] == "called");
    let id = called.expect("registered")["ID"].as_str().expect("an ID");
    put(API, &format!("/v1/agent/service/deregister/{id}"), "").expect("deregistered");
    echo(&mut denied, b"still allowed").expect("carried");
    node.culvert(&["intention", "create", "-deny", "caller", "called"]);
    assert_cut("the denied one", &denied.read_exact(&mut [0]).expect_err("nobody sent anything"));
    echo(&mut kept, b"allowed").expect("the other one is carried");
    drop((server, apps));
    node.leave();
}
