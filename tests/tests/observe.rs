//! `culvert observe` and the metrics tell every connection once per side: who, which way, by which rule, how many bytes.

use std::collections::BTreeSet;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use culvert_tests::{API, Apps, Node, NodeOptions, Pair, World, binary, eventually, get, is_direct, service, upstream};
use serde_json::Value;

const SENT: usize = 1000;
const ANSWERED: usize = 3000;

/// A `culvert observe -json` that runs, and what it has said.
struct Observer {
    child: Child,
    said: Arc<Mutex<Vec<Value>>>,
}

impl Observer {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(binary("culvert"));
        command.args(["observe", "-json"]).args(arguments).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start culvert");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let said = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&said);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
                list.lock().expect("no panic").push(event);
            }
        });
        Self { child, said }
    }

    fn events(&self, fits: impl Fn(&Value) -> bool) -> Vec<Value> {
        self.said.lock().expect("no panic").iter().filter(|event| fits(event)).cloned().collect()
    }

    /// What was told of the caller's connections that began or ended, on one side.
    fn told(&self, kind: &str, inbound: bool) -> Vec<Value> {
        self.events(|event| {
            event["Kind"] == kind && event["Inbound"] == inbound && ends_with(event, "Source", "/svc/caller")
        })
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// One connection: `sent` bytes out, [`ANSWERED`] back.
fn exchange(pair: &Pair, listener: &TcpListener, direct: bool, sent: usize) -> io::Result<()> {
    let mut caller = pair.caller.connect(upstream())?;
    let (mut called, _) = listener.accept()?;
    caller.write_all(&vec![1; sent])?;
    called.read_exact(&mut vec![0; sent])?;
    called.write_all(&[2; ANSWERED])?;
    caller.read_exact(&mut [0; ANSWERED])?;
    assert_eq!(is_direct(&caller), direct);
    Ok(())
}

/// All samples of the connections of `pair` that the exchange changes.
fn counted(node: &Node, path: &str) -> Vec<u64> {
    let path = format!("path=\"{path}\"");
    let sides = [["service=\"caller\"", "side=\"outbound\""], ["service=\"called\"", "side=\"inbound\""]];
    sides
        .iter()
        .flat_map(|[service, side]| {
            let metric = |name, more: &str| node.metric(name, &[&path, service, side, more]);
            [
                metric("culvert_connections_total", ""),
                metric("culvert_payload_bytes_total", "direction=\"to_destination\""),
                metric("culvert_payload_bytes_total", "direction=\"to_source\""),
            ]
        })
        .collect()
}

fn open_connections(node: &Node) -> u64 {
    node.metric("culvert_connections_open", &[])
}

fn starts_with(event: &Value, field: &str, text: &str) -> bool {
    event[field].as_str().is_some_and(|value| value.starts_with(text))
}

fn ends_with(event: &Value, field: &str, text: &str) -> bool {
    event[field].as_str().is_some_and(|value| value.ends_with(text))
}

/// An allowed connection is told once per side, as it was.
fn an_allowed_one(node: &Node, pair: &Pair, observer: &Observer, path: &str) {
    let (direct, listener) = (path == "direct", pair.called.listen(service()[0]));
    // The observer listens when it has told something.
    let mut total = 0;
    eventually("the observer is there", || {
        exchange(pair, &listener, direct, SENT).expect("allowed");
        total += SENT;
        [true, false].iter().all(|inbound| !observer.told("close", *inbound).is_empty())
    });
    // One that is known by its size: what came before it has been told when it has.
    exchange(pair, &listener, direct, SENT + 1).expect("allowed");
    total += SENT + 1;
    eventually("all of it has ended and is counted", || {
        let ended = |inbound| {
            let (opened, closed) = (observer.told("open", inbound), observer.told("close", inbound));
            // Of one that was open when the observer came only the end is told.
            opened.len() <= closed.len() && closed.iter().any(|event| event["BytesToDestination"] == SENT + 1)
        };
        let counted = counted(node, path);
        ended(true) && ended(false) && [counted[1], counted[4]] == [total as u64; 2] && open_connections(node) == 0
    });
    let sides =
        [true, false].map(|inbound| (inbound, ["open", "close"].map(|kind| observer.told(kind, inbound).len())));
    let before = counted(node, path);
    exchange(pair, &listener, direct, SENT).expect("allowed");
    eventually("its end is told on both sides", || {
        sides.iter().all(|(inbound, [_, before])| observer.told("close", *inbound).len() > *before)
    });
    for (inbound, before) in sides {
        for (kind, before) in ["open", "close"].into_iter().zip(before) {
            let told = observer.told(kind, inbound).split_off(before);
            let [event] = &told[..] else { panic!("{kind}, inbound: {inbound}, not once: {told:#?}") };
            assert_eq!((&event["Path"], &event["Verdict"]), (&path.into(), &"allow".into()), "{event}");
            assert!(
                ends_with(event, "Source", "/svc/caller") && ends_with(event, "Destination", "/svc/called"),
                "{event}"
            );
            assert!(starts_with(event, "Source", "spiffe://") && event["Reason"].is_null(), "{event}");
            // On the proxied path only the called side knows the rule.
            assert!(starts_with(event, "Rule", "caller => called (allow") || !(direct || inbound), "{event}");
            if kind == "close" {
                assert_eq!(event["BytesToDestination"], SENT, "{event}");
                assert_eq!(event["BytesToSource"], ANSWERED, "{event}");
                assert!(event["DurationMicros"].as_u64() > Some(0), "{event}");
            }
        }
    }
    let growth = [1, SENT as u64, ANSWERED as u64, 1, SENT as u64, ANSWERED as u64];
    let expected: Vec<u64> = before.iter().zip(growth).map(|(before, more)| before + more).collect();
    // The worker tells of the bytes a moment after the end.
    eventually("all of it is counted", || counted(node, path) == expected);
    eventually("no connection is open", || open_connections(node) == 0);
}

/// A denied one is told with its rule, to who asks for denials too; and so is the end of a live one.
fn denied_ones(node: &Node, pair: &Pair, observers: [&Observer; 2], path: &str) {
    let server = pair.called.serve(&service());
    let mut live = pair.caller.greeted(upstream()).expect("allowed");
    let refused =
        |event: &Value| event["Kind"] == "refuse" && event["Inbound"] == true && event["Reason"] == "intention";
    let before = observers.map(|observer| observer.events(refused).len());
    let labels = ["service=\"called\"", "side=\"inbound\"", "reason=\"intention\"", "stranger => called (deny"];
    let counted = node.metric("culvert_refusals_total", &labels);
    pair.stranger.greeted(upstream()).expect_err("denied");
    for (observer, before) in observers.iter().zip(before) {
        eventually("the refusal is told", || observer.events(refused).len() > before);
        let told = observer.events(refused).split_off(before);
        let [event] = &told[..] else { panic!("not once: {told:#?}") };
        assert_eq!(event["Verdict"], "deny", "{event}");
        assert!(starts_with(event, "Rule", "stranger => called (deny"), "{event}");
        assert!(
            ends_with(event, "Source", "/svc/stranger") && ends_with(event, "Destination", "/svc/called"),
            "{event}"
        );
    }
    assert_eq!(node.metric("culvert_refusals_total", &labels), counted + 1);
    // The calling side has opened it before the called one judged; it hears why it ended.
    let heard = |event: &Value| event["Inbound"] == false && ends_with(event, "Source", "/svc/stranger");
    let closed = |event: &Value| heard(event) && event["Kind"] == "close" && event["Verdict"] == "deny";
    eventually("the calling side tells it too", || !observers[0].events(closed).is_empty());
    assert!(observers[0].events(closed).iter().all(|event| event["Reason"] == "intention"));

    node.culvert(&["intention", "create", "-replace", "-deny", "caller", "called"]);
    live.read_exact(&mut [0; 1]).expect_err("cut");
    let revoked = |event: &Value| event["Reason"] == "revoked" && event["Inbound"] == true && event["Path"] == path;
    for observer in observers {
        eventually("that it was revoked is told", || !observer.events(revoked).is_empty());
        let event = observer.events(revoked).remove(0);
        assert_eq!((&event["Kind"], &event["Verdict"]), (&"close".into(), &"deny".into()), "{event}");
        assert!(starts_with(&event, "Rule", "caller => called (deny"), "{event}");
    }
    let allowed = observers[1].events(|event| event["Verdict"] != "deny");
    assert!(allowed.is_empty(), "who asks for denials hears of others: {allowed:#?}");
    drop(server);
}

fn connections_are_told(name: &str, encryption: &'static str, path: &str) {
    let world = World::new(name);
    let mut node = Node::start(&world, NodeOptions { encryption, ..NodeOptions::default() });
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    node.culvert(&["intention", "create", "-allow", "caller", "called"]);
    node.culvert(&["intention", "create", "-deny", "stranger", "called"]);
    eventually("the path is there", || {
        let server = pair.called.serve(&service());
        let there = pair.caller.greeted(upstream()).is_ok_and(|stream| is_direct(&stream) == (path == "direct"));
        drop(server);
        there
    });
    let (observer, denials) = (Observer::start(&[]), Observer::start(&["-denied"]));
    eventually("the observer of denials is there", || {
        drop(pair.stranger.greeted(upstream()));
        !denials.events(|_| true).is_empty()
    });
    an_allowed_one(&node, &pair, &observer, path);
    denied_ones(&node, &pair, [&observer, &denials], path);
    for group in ["called", "caller", "stranger"] {
        let proxy = format!("-group-{group}-");
        assert!(node.metric("culvert_leaf_not_after_seconds", &[&proxy]) > 0, "{group}");
        assert_eq!(node.metric("culvert_xds_applied", &[&proxy]), 1, "{group}");
        assert_eq!(node.metric("culvert_proxy_ready", &[&proxy]), 1, "{group}");
    }
    drop((observer, denials, apps));
    node.leave();
}

#[test]
fn proxied_connections_are_told() {
    connections_are_told("observe-proxied", "always", "proxied");
}

#[test]
fn direct_connections_are_told() {
    connections_are_told("observe-direct", "between-nodes", "direct");
}

/// The metrics of the table in docs/observability.md.
fn documented() -> BTreeSet<String> {
    let text = include_str!("../../docs/observability.md");
    let cells = text.lines().filter(|line| line.starts_with("| `culvert_")).filter_map(|line| line.split('|').nth(1));
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// The metrics that the node tells, of which it has a sample at least.
fn told(text: &str) -> BTreeSet<String> {
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    // The samples of a counter have the name of its family and a suffix.
    families.map(|(name, kind)| format!("{name}{}", if kind == "counter" { "_total" } else { "" })).collect()
}

#[test]
fn the_metrics_are_those_that_are_documented() {
    let world = World::new("metrics");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&service());
    // Something of each kind; but nobody asks the authority for what it refuses, and no proxy refuses what it is told.
    eventually("a connection", || pair.caller.greeted(upstream()).is_ok());
    node.culvert(&["intention", "create", "-deny", "stranger", "called"]);
    let mut expected = documented();
    for never in ["culvert_ca_requests_refused_total", "culvert_xds_refusals_total"] {
        assert!(expected.remove(never), "{never}");
    }
    let mut text = String::new();
    let mut missing = || {
        drop(pair.stranger.greeted(upstream()));
        text = get(API, "/v1/culvert/metrics").expect("metrics");
        expected.difference(&told(&text)).cloned().collect::<Vec<_>>()
    };
    eventually("all that is documented is told", || missing().is_empty());
    assert_eq!(missing(), [""; 0]);
    assert_eq!(told(&text), expected, "and nothing else");
    assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
    drop((server, apps));
    node.leave();
}
