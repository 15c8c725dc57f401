//! Who asks for encryption gets it, at either end and for any instance, whatever the rest of the mesh does; and a switch is
//! felt by nobody.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use culvert_tests::{
    App, Apps, GREETING, Node, NodeOptions, Sniffer, World, calls, echo, eventually, group, is_direct, service,
    upstream, wants,
};

const MARKER: &[u8] = b"culvert-carries-this";

/// The three ways to name an upstream.
fn addresses(port: u16) -> [SocketAddr; 3] {
    let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
    [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into(), (mapped, port).into()]
}

fn use_once(app: &App, to: SocketAddr) -> io::Result<bool> {
    let mut stream = app.greeted(to)?;
    echo(&mut stream, MARKER)?;
    Ok(is_direct(&stream))
}

/// Which path connections of `app` to `port` take, and whether a packet socket at `called` sees what they carry.
fn look(app: &App, port: u16, called: &[&App], direct: bool) {
    let ends: Vec<_> = called.iter().flat_map(|called| [called.v4.into(), called.v6.into()]).collect();
    eventually(&format!("port {port} answers on its path, direct: {direct}"), || {
        addresses(port).iter().all(|to| use_once(app, *to).is_ok_and(|taken| taken == direct))
    });
    let sniffer = Sniffer::start(&ends, &[MARKER, GREETING]).expect("a packet socket");
    // Often enough to meet every instance of a service with two.
    for _ in 0..6 {
        for to in addresses(port) {
            assert_eq!(use_once(app, to).expect("carried"), direct, "the path to {to}");
        }
    }
    let seen = sniffer.finish().expect("packets");
    if direct {
        assert!(seen.plain > 0, "the packet socket proves nothing: {seen:?}");
    } else {
        assert!(seen.tls > 0 && seen.plain == 0, "port {port} in plain text: {seen:?}");
    }
}

/// A mesh that encrypts between nodes only, with services that want more.
fn stricter_end_wins(name: &str, ebpf: bool) {
    let world = World::new(name);
    let mut node = Node::start(&world, NodeOptions { encryption: "between-nodes", ebpf, ..NodeOptions::default() });
    let apps = Apps::join(&world);
    let upstreams = calls("strict", 8081) + &calls("open", 8082) + &calls("mixed", 8083);
    let mixed = |name, proxy: &str| group(name, 9001, proxy).replace(&format!("name = {name:?}"), "name = \"mixed\"");
    let groups = [
        group("strict", 9001, &wants("always")),
        group("open", 9001, ""),
        mixed("mixed-strict", &wants("always")),
        mixed("mixed-open", ""),
        group("caller", 9002, &upstreams),
        group("careful", 9002, &(wants("always") + &calls("open", 8082))),
    ];
    node.run_job("encryption", &format!("job \"encryption\" {{\n{}\n}}\n", groups.concat()));
    let app = |group| App::of(&node, "encryption", group);
    let called = ["strict", "open", "mixed-strict", "mixed-open"].map(app);
    let servers = called.each_ref().map(|called| called.serve(&service()));
    let [strict, open, one, two] = &called;
    let (caller, careful) = (app("caller"), app("careful"));

    look(&caller, 8081, &[strict], false);
    look(&careful, 8082, &[open], false);
    look(&caller, 8083, &[one, two], false);
    assert!(servers[2..].iter().all(|server| !server.accepted().is_empty()), "one of the two instances was not met");
    // And who asks for nothing goes direct, where that is possible.
    look(&caller, 8082, &[open], ebpf);
    drop((servers, apps));
    node.leave();
}

#[test]
fn the_stricter_end_wins() {
    stricter_end_wins("stricter", true);
}

#[test]
fn without_ebpf_everything_is_encrypted() {
    stricter_end_wins("stricter-no-ebpf", false);
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn no_connection_fails_while_encryption_is_switched() {
    let world = World::new("switch");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&service());
    eventually("a connection", || use_once(&pair.caller, upstream()).is_ok());
    let mut lasting = vec![pair.caller.greeted(upstream()).expect("proxied")];
    let (stop, failures, paths) = (AtomicBool::new(false), Mutex::new(Vec::new()), [0, 0].map(AtomicUsize::new));
    thread::scope(|scope| {
        let stopping = StopOnDrop(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    match use_once(&pair.caller, upstream()) {
                        Ok(direct) => drop(paths[usize::from(direct)].fetch_add(1, SeqCst)),
                        Err(error) => failures.lock().expect("no panic").push(error.to_string()),
                    }
                    thread::sleep(Duration::from_millis(10));
                }
            });
        }
        for round in 0..8 {
            let direct = round % 2 == 0;
            node.encrypt(if direct { "between-nodes" } else { "always" });
            let before = paths[usize::from(direct)].load(SeqCst);
            eventually("new connections take the new path", || paths[usize::from(direct)].load(SeqCst) > before + 5);
            eventually("and so does another", || {
                let stream = pair.caller.greeted(upstream()).expect("carried");
                let there = is_direct(&stream) == direct;
                lasting.push(stream);
                there
            });
        }
        drop(stopping);
    });
    let failures = failures.into_inner().expect("no panic");
    assert!(failures.is_empty(), "{failures:#?}");
    for stream in &mut lasting {
        echo(stream, b"still here").expect("a connection stays on the path that it took");
    }
    drop((server, apps));
    node.leave();
}
