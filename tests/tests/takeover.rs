//! What an agent finds when it starts after another was killed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use culvert_tests::{Apps, Node, NodeOptions, Pair, World, echo, eventually, is_direct, service, upstream, upstream6};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn server(encryption: &'static str) -> NodeOptions {
    let settings = "default_intention_policy = \"allow\"".to_owned();
    NodeOptions { encryption, settings, server: true, ..NodeOptions::default() }
}

fn allocations(node: &Node) -> Vec<Value> {
    node.api("/v1/culvert/job/pair")["Allocations"].as_array().cloned().unwrap_or_default()
}

fn task(allocation: &Value) -> Option<i32> {
    allocation["Tasks"][0]["Pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
}

fn greets(pair: &Pair) -> bool {
    [upstream(), upstream6()].into_iter().all(|to| pair.caller.greeted(to).is_ok())
}

#[test]
fn direct_connections_stay_direct_while_an_agent_is_killed_and_the_next_starts() {
    let world = World::new("takeover-direct");
    let mut node = Node::start(&world, server("between-nodes"));
    let pair = node.run_pair("");
    let apps = Apps::join(&world);
    let _called = pair.called.serve(&service());
    let ways = [upstream(), upstream6()];
    for to in ways {
        eventually("the direct path", || pair.caller.greeted(to).is_ok_and(|stream| is_direct(&stream)));
    }
    let mut lasting = ways.map(|to| pair.caller.greeted(to).expect("a connection"));

    let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            for to in ways.into_iter().cycle().take_while(|_| !stop.load(Ordering::SeqCst)) {
                let stream = pair.caller.greeted(to).expect("no connection fails");
                assert!(is_direct(&stream), "connection {} was proxied", made.load(Ordering::SeqCst));
                made.fetch_add(1, Ordering::SeqCst);
            }
        });
        let more = |count: usize| {
            let target = made.load(Ordering::SeqCst) + count;
            let reached = || made.load(Ordering::SeqCst) >= target || traffic.is_finished();
            eventually("traffic flows", reached);
        };
        for _ in 0..3 {
            node.kill();
            more(20);
            node.spawn();
            eventually("everything is taken over", || {
                let all = allocations(&node);
                all.len() == 3 && all.iter().all(|allocation| allocation["Status"] == "running")
            });
            more(50);
        }
        stop.store(true, Ordering::SeqCst);
    });
    for stream in &mut lasting {
        echo(stream, b"still here").expect("a connection outlives its agents");
    }
    drop((lasting, apps));
    node.leave();
}

#[test]
fn a_workload_whose_namespace_was_removed_meanwhile_is_reached_again() {
    for encryption in ["always", "between-nodes"] {
        let world = World::new(&format!("takeover-netns-{encryption}"));
        let mut node = Node::start(&world, server(encryption));
        let pair = node.run_pair("");
        let apps = Apps::join(&world);
        let called = pair.called.serve(&service());
        eventually("a connection", || greets(&pair));
        let before = allocations(&node);
        let worker = node.api("/v1/culvert/status")["Worker"]["Pid"].clone();

        // The agent is away; everything goes but the worker, which holds listeners in namespaces without a name.
        node.kill();
        for allocation in &before {
            let task = Pid::from_raw(task(allocation).expect("it runs"));
            kill(task, Signal::SIGKILL).expect("killed");
            let short = &allocation["ID"].as_str().expect("an ID")[..8];
            world.run("ip", &["link", "del", &format!("cv{short}")]);
            world.run("ip", &["netns", "del", &format!("culvert-{short}")]);
        }
        drop((called, pair));
        node.spawn();
        eventually("the tasks run again", || {
            let all = allocations(&node);
            let again = |(old, new): (&Value, &Value)| {
                new["Status"] == "running" && task(new).is_some() && task(new) != task(old)
            };
            all.len() == before.len() && before.iter().zip(&all).all(again)
        });
        assert_eq!(node.api("/v1/culvert/status")["Worker"]["Pid"], worker, "the worker is the same");
        let pair = node.pair();
        let called = pair.called.serve(&service());
        eventually("a connection in the new namespaces", || greets(&pair));
        drop((called, pair, apps));
        node.leave();
    }
}
