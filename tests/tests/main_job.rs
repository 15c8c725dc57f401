//! The main job, end to end: a job file goes in, two allocations talk through the mesh, an intention cuts them off.

use culvert_tests::{Node, NodeOptions, Seen, Sniffer, World, eventually};

/// New connections take `path`, as the metrics count them on both sides.
fn new_connections_take(node: &Node, path: &str) {
    let label = format!("path=\"{path}\"");
    for side in ["side=\"outbound\"", "side=\"inbound\""] {
        let before = node.metric("culvert_connections_total", &[&label, side]);
        eventually(&format!("connections take the {path} path, {side}"), || {
            node.metric("culvert_connections_total", &[&label, side]) > before
        });
    }
}

fn deny(node: &Node) {
    node.culvert(&["intention", "create", "-replace", "-deny", "count-dashboard", "count-api"]);
}

fn allow(node: &Node) {
    node.culvert(&["intention", "create", "-replace", "-allow", "count-dashboard", "count-api"]);
}

/// What a packet socket sees of the API's traffic while the dashboard dials it a few times.
fn seen_on_the_wire(node: &Node) -> Seen {
    let allocation = node.allocation("countdash", "api");
    let addresses = allocation["Addresses"].as_array().into_iter().flatten();
    let addresses: Vec<_> = addresses.filter_map(|text| text.as_str()?.parse().ok()).collect();
    let sniffer = Sniffer::start(&addresses, &[b"GET / HTTP/1.1", b"\"count\":"]).expect("a packet socket");
    let connections = || node.dashboard()["connections"].as_u64().unwrap_or_default();
    let before = connections();
    eventually("the dashboard dials again", || connections() > before + 1);
    sniffer.finish().expect("packets")
}

#[test]
fn countdash_counts_on_both_paths_switched_live() {
    let world = World::new("both-paths");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash();
    node.counts();
    new_connections_take(&node, "proxied");
    let seen = seen_on_the_wire(&node);
    assert!(seen.tls > 0 && seen.plain == 0, "encryption = always shows payload on the wire: {seen:?}");

    node.encrypt("between-nodes");
    new_connections_take(&node, "direct");
    node.counts();
    let seen = seen_on_the_wire(&node);
    assert!(seen.plain > 0, "the packet socket sees no payload on the direct path: it proves nothing: {seen:?}");

    node.encrypt("always");
    new_connections_take(&node, "proxied");
    node.counts();
    node.leave();
}

#[test]
fn an_intention_cuts_the_dashboard_off_on_both_paths_and_brings_it_back() {
    let world = World::new("intention");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash();
    for encryption in ["always", "between-nodes"] {
        node.encrypt(encryption);
        allow(&node);
        node.counts();
        let refused =
            || node.metric("culvert_refusals_total", &["reason=\"intention\"", "count-dashboard => count-api (deny"]);
        let before = refused();
        deny(&node);
        node.does_not_count();
        assert!(refused() > before, "no refusal names its rule with {encryption}");
        allow(&node);
        node.counts();
    }
    node.leave();
}

#[test]
fn without_ebpf_the_same_mesh_holds() {
    let world = World::new("no-ebpf");
    let mut node =
        Node::start(&world, NodeOptions { ebpf: false, encryption: "between-nodes", ..NodeOptions::default() });
    let status = node.api("/v1/culvert/status");
    assert_eq!(status["Ebpf"]["Active"], false, "{status}");
    assert!(status["Ebpf"]["Reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{status}");
    node.run_countdash();
    node.counts();
    new_connections_take(&node, "proxied");
    deny(&node);
    node.does_not_count();
    allow(&node);
    node.counts();
    assert_eq!(node.metric("culvert_connections_total", &["path=\"direct\""]), 0);
    node.leave();
}

#[test]
fn a_default_of_deny_lets_nothing_through_until_allowed() {
    let world = World::new("default-deny");
    let settings = "default_intention_policy = \"deny\"".to_owned();
    let mut node = Node::start(&world, NodeOptions { settings, encryption: "between-nodes", ..NodeOptions::default() });
    node.run_countdash();
    node.does_not_count();
    allow(&node);
    node.counts();
    node.culvert(&["intention", "delete", "count-dashboard", "count-api"]);
    node.does_not_count();
    node.leave();
}

#[test]
fn a_second_signal_to_an_agent_that_leaves_ends_its_wait() {
    let world = World::new("second-signal");
    let mut node = Node::start(&world, NodeOptions::default());
    let job = r#"job "stubborn" {
        group "g" {
            network { mode = "bridge" }
            task "main" {
                driver       = "raw_exec"
                kill_timeout = "1h"
                config {
                    command = "/bin/sh"
                    args    = ["-c", "trap '' INT; touch /run/test/trapped; while :; do sleep 1; done"]
                }
            }
        }
    }"#;
    node.run_job("stubborn", job);
    eventually("the task has its trap", || std::path::Path::new("/run/test/trapped").exists());
    node.interrupt();
    eventually("the agent waits for the task", || node.log().contains("stopping every job"));
    node.interrupt();
    node.ended();
}

#[test]
fn what_cannot_be_removed_keeps_no_agent_from_starting_and_leave_tells_it() {
    let world = World::new("not-removable");
    let obstacle = std::path::Path::new("/run/netns/culvert-deadbeef");
    std::fs::create_dir_all(obstacle.join("in-the-way")).expect("a folder with the name of a namespace");
    let mut node = Node::start(&world, NodeOptions::default());
    let left = node.try_culvert(&["leave"]);
    let said = String::from_utf8_lossy(&left.stderr);
    assert!(!left.status.success() && said.contains("culvert-deadbeef"), "{said}");
    std::fs::remove_dir_all(obstacle).expect("removed");
    node.kill();
    node.spawn();
    node.leave();
}

#[test]
fn a_second_agent_refuses_to_start_and_says_who_runs() {
    let world = World::new("second-agent");
    let mut node = Node::start(&world, NodeOptions::default());
    let output = node.try_culvert(&["agent", "-dev", "-http-port", "8600", "-data-dir", "/run/other"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "a second agent started");
    assert!(text.contains(&format!("pid {}", node.pid())), "it does not say who runs: {text}");
    node.leave();
}

#[test]
fn leave_removes_everything_that_carries_our_names() {
    let world = World::new("leave");
    let mut node = Node::start(&world, NodeOptions { encryption: "between-nodes", ..NodeOptions::default() });
    node.run_countdash();
    node.counts();
    let people = node.people();
    node.leave();
    world.assert_nothing_left(&people);
}
