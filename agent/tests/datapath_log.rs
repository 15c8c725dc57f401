//! Log lines of the kernel programs. A file of its own: the subscriber is the process's.

mod common;

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use common::{APP, EchoServer, Pair, eventually, greeting, upstream4};
use socket2::{Domain, Socket, Type};

/// What was logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn programs_tell_of_their_rare_branches_when_debug_is_on() {
    let lines = Lines::default();
    let writer = lines.clone();
    tracing_subscriber::fmt().with_env_filter("info,culvert_ebpf=debug").with_writer(move || writer.clone()).init();
    let Some(pair) = Pair::new("log") else { return };
    let listen = |_| {
        pair.b.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_reuse_port(true).expect("a flag");
            socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, APP)).into()).expect("a port");
            socket.listen(16).expect("listening");
            EchoServer::start(TcpListener::from(socket), "member")
        })
    };
    let _members: Vec<_> = (0..5).map(listen).collect();
    let told = || String::from_utf8_lossy(&lines.0.lock().expect("no panic")).into_owned();
    let line = format!("workload {} listens on port {APP} more often than there are slots", pair.b.id);
    eventually("the line is logged", || told().contains(&line));
    assert!(!told().contains("without their log lines"), "{}", told());
    let mut stream = pair.a.connect(upstream4()).expect("the direct path");
    assert_eq!(greeting(&mut stream), "member");
}
