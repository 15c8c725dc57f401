//! `kill -9` of agent and worker under traffic.

use culvert_tests::{Node, NodeOptions, World, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn worker(node: &Node) -> Option<i32> {
    let status = node.api("/v1/culvert/status");
    status["Worker"]["Pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
}

fn kill_worker(node: &Node) {
    let pid = worker(node).expect("a worker");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill the worker");
    eventually("another worker runs", || worker(node).is_some_and(|now| now != pid));
}

fn count(node: &Node) -> u64 {
    node.dashboard()["count"].as_u64().unwrap_or_default()
}

/// Process ids of all tasks.
fn tasks(node: &Node) -> Vec<u64> {
    ["api", "dashboard"]
        .iter()
        .map(|group| node.allocation("countdash", group)["Tasks"][0]["Pid"].as_u64().expect("the task runs"))
        .collect()
}

#[test]
fn a_killed_worker_is_replaced_and_the_next_connection_goes_through() {
    let world = World::new("worker-kill");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash();
    node.counts();
    for _ in 0..3 {
        kill_worker(&node);
        node.counts();
    }
    assert_eq!(node.api("/v1/culvert/status")["Worker"]["Restarts"], 3);
    node.leave();
}

#[test]
fn a_killed_agent_is_taken_over_with_its_worker_tasks_and_paths() {
    for encryption in ["always", "between-nodes"] {
        let world = World::new(&format!("agent-kill-{encryption}"));
        let mut node = Node::start(&world, NodeOptions { encryption, ..NodeOptions::default() });
        node.run_countdash();
        node.counts();
        let (worker_before, tasks_before) = (worker(&node), tasks(&node));
        node.kill();
        // Nobody is at the controls; old and new connections go on as before.
        let (before, connections) = (count(&node), node.dashboard()["connections"].as_u64());
        eventually("the count grows over new connections without an agent", || {
            let state = node.dashboard();
            state["connected"] == true && count(&node) > before + 8 && state["connections"].as_u64() > connections
        });
        node.spawn();
        eventually("the job is taken over", || {
            let status = node.api("/v1/culvert/job/countdash");
            let allocations = status["Allocations"].as_array().cloned().unwrap_or_default();
            allocations.len() == 2 && allocations.iter().all(|allocation| allocation["Status"] == "running")
        });
        node.counts();
        assert_eq!(tasks(&node), tasks_before, "tasks were started again");
        assert_eq!(worker(&node), worker_before, "the worker was replaced");
        node.culvert(&["intention", "create", "-deny", "count-dashboard", "count-api"]);
        node.does_not_count();
        node.leave();
    }
}

#[test]
fn what_is_denied_stays_denied_whatever_is_killed() {
    let world = World::new("denied-kills");
    let settings = "default_intention_policy = \"deny\"".to_owned();
    let mut node = Node::start(&world, NodeOptions { settings, encryption: "between-nodes", ..NodeOptions::default() });
    node.run_countdash();
    node.does_not_count();
    for round in 0..4 {
        if round % 2 == 0 {
            kill_worker(&node);
        } else {
            node.kill();
            std::thread::sleep(std::time::Duration::from_millis(500));
            node.spawn();
            eventually("the worker is known again", || worker(&node).is_some());
        }
        // The dashboard dials twice a second all the while.
        std::thread::sleep(std::time::Duration::from_secs(2));
        assert_eq!(count(&node), 0, "a denied connection was let through in round {round}");
    }
    node.leave();
}
