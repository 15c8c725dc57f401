//! Connections that nobody uses: they live as long as both ends are there, on both paths.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use culvert_tests::{Apps, Node, NodeOptions, World, echo, eventually, service, upstream, upstream6};
use nix::sys::socket::getsockopt;
use nix::{getsockopt_impl, libc, sockopt_impl};
use rustix::net::sockopt::{set_tcp_keepidle, set_tcp_keepintvl};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{SockRef, TcpKeepalive};

/// What stands here for the five minutes and the thirty seconds of docs/limits.md.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Longer than seven of them, after which a connection whose peer does not answer is given up.
const IDLE: Duration = Duration::from_secs(12);

/// State of a connection that is open at both ends (`TCP_ESTABLISHED`).
const ESTABLISHED: u8 = 1;

sockopt_impl!(
    /// What the kernel knows of a connection (tcp(7)).
    TcpInfo, GetOnly, libc::IPPROTO_TCP, libc::TCP_INFO, libc::tcp_info
);

/// The worker's connections. The descriptors are the test's own, the sockets behind them are the worker's.
fn connections(node: &Node) -> Vec<OwnedFd> {
    let worker = node.worker().expect("a worker");
    let process = pidfd_open(Pid::from_raw(worker).expect("a process"), PidfdFlags::empty()).expect("it lives");
    let entries = fs::read_dir(format!("/proc/{worker}/fd")).expect("its descriptors").flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let descriptors = numbers.filter_map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok());
    let connected = |socket: &OwnedFd| SockRef::from(socket).peer_addr().is_ok_and(|peer| peer.as_socket().is_some());
    descriptors.filter(connected).collect()
}

/// The kernel probes soon, where the worker told it to probe at all.
fn hurry(sockets: &[OwnedFd]) {
    for socket in sockets {
        set_tcp_keepidle(socket, PROBE_EVERY).expect("an option");
        set_tcp_keepintvl(socket, PROBE_EVERY).expect("an option");
    }
}

fn info(socket: &impl AsFd) -> libc::tcp_info {
    getsockopt(socket, TcpInfo).expect("an option")
}

/// How long ago the peer last said that it is there.
fn silence(socket: &impl AsFd) -> Duration {
    Duration::from_millis(info(socket).tcpi_last_ack_recv.into())
}

#[test]
fn an_idle_connection_outlives_its_probes_on_both_paths() {
    for encryption in ["always", "between-nodes"] {
        let direct = encryption == "between-nodes";
        let world = World::new(&format!("idle-{encryption}"));
        let mut node = Node::start(&world, NodeOptions { encryption, ..NodeOptions::default() });
        let apps = Apps::join(&world);
        let pair = node.run_pair("");
        let server = pair.called.serve(&service());
        let mut idle = [upstream(), upstream6()].map(|to| pair.caller.opened(to, direct));
        let carrying = connections(&node);
        hurry(&carrying);
        // Nobody but the application probes on the direct path.
        let own = TcpKeepalive::new().with_time(PROBE_EVERY).with_interval(PROBE_EVERY).with_retries(3);
        for stream in &idle {
            SockRef::from(stream).set_tcp_keepalive(&own).expect("an option");
        }
        std::thread::sleep(IDLE);
        if !direct {
            // A health check's may be among them, and has ended.
            let open: Vec<_> = carrying.iter().filter(|socket| info(socket).tcpi_state == ESTABLISHED).collect();
            assert!(open.len() >= 2 * 4, "the worker has four ends for each: {open:?}");
            assert!(open.iter().all(|socket| silence(socket) < IDLE / 2), "the worker's probes are not answered");
        }
        for stream in &mut idle {
            assert!(silence(stream) < IDLE / 2, "the application's probes are not answered");
            echo(stream, b"still here").expect("idleness ends nothing");
        }
        drop((server, apps));
        node.leave();
    }
}

#[test]
fn the_worker_notices_a_peer_that_vanished_without_a_word() {
    let world = World::new("idle-vanished");
    let mut node = Node::start(&world, NodeOptions::default());
    let apps = Apps::join(&world);
    let pair = node.run_pair("");
    let server = pair.called.serve(&service());
    let mut stream = pair.caller.opened(upstream(), false);
    let carrying = connections(&node);
    // What is under way is sent again and again instead of probes.
    eventually("all is acknowledged", || carrying.iter().all(|socket| info(socket).tcpi_unacked == 0));
    hurry(&carrying);
    drop(carrying); // else nothing that the worker closes is closed
    let veth = format!("cv{}", &pair.called.id[..8]);
    // Not down, which the workload would see: who has no carrier keeps its probes to itself.
    world.run("ip", &["link", "set", &veth, "nomaster"]);
    let error = stream.read_exact(&mut [0; 1]).expect_err("nobody said anything");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    eventually("the other end is told by its own side", || server.cut() == 1);
    drop((server, apps));
    node.leave();
}
