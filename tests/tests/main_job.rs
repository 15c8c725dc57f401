//! The main job, end to end: a job file goes in, two allocations talk through the mesh, an intention cuts them off.

use culvert_tests::{Node, NodeOptions, Sniffer, World, eventually};
use std::time::Duration;

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

fn api_address(node: &Node) -> std::net::Ipv4Addr {
    let allocation = node.allocation("countdash", "api");
    allocation["Addresses"][0].as_str().and_then(|text| text.parse().ok()).expect("an address")
}

#[test]
fn countdash_counts_on_both_paths_switched_live() {
    let world = World::new("both-paths");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash();
    node.counts();
    new_connections_take(&node, "proxied");
    let seen =
        Sniffer::new().expect("a packet socket").watch(api_address(&node), Duration::from_secs(4)).expect("packets");
    assert!(seen.tls > 0 && seen.plain == 0, "encryption = always shows payload on the wire: {seen:?}");

    node.encrypt("between-nodes");
    new_connections_take(&node, "direct");
    node.counts();
    let seen =
        Sniffer::new().expect("a packet socket").watch(api_address(&node), Duration::from_secs(4)).expect("packets");
    assert!(seen.plain > 0, "the packet socket sees no payload on the direct path: it proves nothing: {seen:?}");

    node.encrypt("always");
    new_connections_take(&node, "proxied");
    node.counts();
    node.leave();
}

#[test]
fn an_intention_cuts_live_connections_on_both_paths_and_brings_them_back() {
    let world = World::new("intention");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash();
    for encryption in ["always", "between-nodes"] {
        node.encrypt(encryption);
        allow(&node);
        node.counts();
        deny(&node);
        node.does_not_count();
        let refused =
            node.metric("culvert_refusals_total", &["reason=\"intention\"", "count-dashboard => count-api (deny"]);
        assert!(refused > 0, "no refusal names its rule");
        allow(&node);
        node.counts();
    }
    node.leave();
}

#[test]
fn an_upstream_is_reached_on_localhost_of_both_families() {
    let world = World::new("localhost-v6");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash_as(|job| job.replace("${NOMAD_UPSTREAM_ADDR_count_api}", "[::1]:8080"));
    node.counts();
    new_connections_take(&node, "proxied");
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
    let worker = node.api("/v1/culvert/status")["Worker"]["Pid"].as_u64().expect("a worker");
    node.leave();
    let left = |folder: &str, prefix: &str| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(prefix)).collect::<Vec<_>>()
    };
    assert_eq!(left("/run/netns", "culvert-"), [""; 0], "netns");
    assert_eq!(left("/sys/fs/bpf/culvert", ""), [""; 0], "pins");
    let links = world.run("ip", &["-o", "link"]);
    assert!(!links.contains("culvert0") && !links.contains("cv"), "links: {links}");
    assert_eq!(world.run("nft", &["list", "tables"]), "", "nftables");
    for hierarchy in ["unified", "memory", "cpu", "pids"] {
        assert_eq!(left(&format!("/sys/fs/cgroup/{hierarchy}"), &world.cgroup_parent()), [""; 0], "cgroup {hierarchy}");
    }
    assert!(!std::path::Path::new(&format!("/proc/{worker}")).exists(), "the worker still runs");
}
