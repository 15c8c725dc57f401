//! A node without eBPF: who reaches an application, and what becomes of that when eBPF is turned on.

use std::io::ErrorKind;
use std::net::TcpStream;

use culvert_tests::{Apps, Node, NodeOptions, Pair, World, echo, eventually, is_direct, upstream, upstream6};

fn only_the_mesh_reaches_it(pair: &Pair) {
    for address in [(pair.called.v4, 9001).into(), std::net::SocketAddr::from((pair.called.v6, 9001))] {
        let refused = pair.stranger.connect(address).expect_err("another workload");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{address}");
        let refused = TcpStream::connect(address).expect_err("the host");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
}

#[test]
fn application_ports_are_guarded_without_ebpf_and_direct_connections_pass_when_it_is_turned_on() {
    let world = World::new("no-ebpf");
    let allow = "default_intention_policy = \"allow\"\n";
    let settings = format!("{allow}ebpf {{ enabled = false }}");
    let options = NodeOptions { encryption: "between-nodes", settings, server: true, ..NodeOptions::default() };
    let mut node = Node::start(&world, options);
    let pair = node.run_pair("");
    let apps = Apps::join(&world);
    let called = pair.called.serve(&["[::]:9001".parse().expect("an address")]);
    eventually("a connection", || pair.caller.greeted(upstream()).is_ok());
    only_the_mesh_reaches_it(&pair);

    node.set(allow);
    node.kill();
    node.spawn();
    eventually("the direct path", || pair.caller.greeted(upstream()).is_ok_and(|stream| is_direct(&stream)));
    only_the_mesh_reaches_it(&pair);
    drop((called, pair, apps));
    node.leave();
}

#[test]
fn a_node_that_cannot_use_ebpf_says_why_and_takes_the_proxied_path() {
    let world = World::new("ebpf-cannot");
    world.run("mount", &["-o", "remount,ro", "/sys/fs/bpf"]);
    let mut node = Node::start(&world, NodeOptions { encryption: "between-nodes", ..NodeOptions::default() });
    let reason = "mount the BPF file system: Read-only file system";
    let log = node.log();
    let told = log.lines().find(|line| line.contains("no eBPF: every mesh connection takes the proxied path"));
    assert!(told.is_some_and(|line| line.contains(reason)), "{log}");
    let status = node.culvert(&["status"]);
    assert!(status.contains(reason), "{status}");

    let pair = node.run_pair("");
    let apps = Apps::join(&world);
    let called = pair.called.serve(&["[::]:9001".parse().expect("an address")]);
    for to in [upstream(), upstream6()] {
        eventually("a proxied connection", || pair.caller.greeted(to).is_ok_and(|stream| !is_direct(&stream)));
    }
    let mut held = pair.caller.greeted(upstream()).expect("as before");
    only_the_mesh_reaches_it(&pair);
    node.culvert(&["intention", "create", "-deny", "caller", "called"]);
    eventually("a denied connection ends", || echo(&mut held, b"denied").is_err());
    eventually("new ones are refused", || pair.caller.greeted(upstream()).is_err());
    drop((called, pair, apps));
    node.leave();
}

#[test]
fn a_deny_ends_direct_connections_of_before_ebpf_was_turned_off() {
    let world = World::new("ebpf-off");
    let allow = "default_intention_policy = \"allow\"\n";
    let options =
        NodeOptions { encryption: "between-nodes", settings: allow.to_owned(), server: true, ..NodeOptions::default() };
    let mut node = Node::start(&world, options);
    let pair = node.run_pair("");
    let apps = Apps::join(&world);
    let called = pair.called.serve(&["[::]:9001".parse().expect("an address")]);
    let mut held: Vec<TcpStream> = Vec::new();
    for to in [upstream(), upstream6()] {
        eventually("the direct path", || {
            let stream = pair.caller.greeted(to).ok().filter(is_direct);
            held.extend(stream);
            held.last().is_some_and(|stream| stream.peer_addr().is_ok_and(|peer| peer == to))
        });
    }
    node.set(&format!("{allow}ebpf {{ enabled = false }}"));
    node.kill();
    node.spawn();
    eventually("a proxied connection", || pair.caller.greeted(upstream()).is_ok());
    for stream in &mut held {
        echo(stream, b"still allowed").expect("what is allowed lives on");
    }
    node.culvert(&["intention", "create", "-deny", "caller", "called"]);
    for mut stream in held {
        eventually("a denied connection ends", || echo(&mut stream, b"denied").is_err());
    }
    drop((called, pair, apps));
    node.leave();
}
