//! Sidecars of their own process, as Nomad and operators start them: `culvert proxy` and Envoy, in every pairing, from the
//! same agent and with the same bootstrap file.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use culvert_tests::{
    API, GREETING, Node, NodeOptions, PATIENCE, Process, Server, World, binary, echo, envoy, eventually, get, greeting,
    put,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const FOLDER: &str = "/run/sidecars";
const HELLO: &[u8] = b"hello";
/// Where the agent serves xDS.
const XDS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8502);
/// Where `web` reaches `api`.
const UPSTREAM: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Culvert,
    Envoy,
}

/// A running sidecar; it ends with this value.
struct Sidecar {
    child: Child,
    admin: PathBuf,
}

impl Sidecar {
    fn start(kind: Kind, service: &str) -> Self {
        let folder = PathBuf::from(FOLDER);
        fs::create_dir_all(&folder).expect("a folder");
        let [config, admin] = ["bootstrap.json", "admin"].map(|name| folder.join(format!("{service}.{name}")));
        let mut bootstrap = envoy::bootstrap(&format!("{service}-sidecar-proxy"), service, XDS);
        let any_port = json!({"socket_address": {"address": "127.0.0.1", "port_value": 0}});
        bootstrap["admin"] = json!({"access_log_path": "/dev/null", "address": any_port});
        fs::write(&config, bootstrap.to_string()).expect("written");
        drop(fs::remove_file(&admin));
        let mut command = match kind {
            Kind::Culvert => {
                let mut command = Command::new(binary("culvert"));
                command.arg("proxy");
                command
            }
            Kind::Envoy => {
                let mut command = Command::new(envoy::binary());
                command.arg("--disable-hot-restart");
                command
            }
        };
        command.arg("-c").arg(&config).arg("--admin-address-path").arg(&admin);
        command.args(["--concurrency", "1", "--log-level", "warning"]);
        let child = command.stdin(Stdio::null()).spawn().expect("start a sidecar");
        Self { child, admin }
    }

    /// GET of the admin address, which the sidecar has written down.
    fn admin(&self, path: &str) -> Option<String> {
        let address = fs::read_to_string(&self.admin).ok()?;
        get(address.trim(), path).ok()
    }

    fn process(&self) -> Process {
        Process::of(i32::try_from(self.child.id()).expect("a process id")).expect("it runs")
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// `web` calls `api`; each declares its sidecar. Nobody is told of health but by the test.
fn register() {
    let check = json!([{"Name": "told", "TTL": "1h", "Status": "passing"}]);
    let upstream = json!({"DestinationName": "api", "LocalBindPort": UPSTREAM.port()});
    for (name, port, sidecar, upstreams) in [("api", 9001, 21500, json!([])), ("web", 9002, 21501, json!([upstream]))] {
        let sidecar = json!({"Port": sidecar, "Checks": check, "Proxy": {"Upstreams": upstreams}});
        let body = json!({"Name": name, "Port": port, "Connect": {"SidecarService": sidecar}});
        put(API, "/v1/agent/service/register", &body.to_string()).expect("registered");
    }
}

/// The caller speaks first: Envoy judges when the first byte comes.
fn connect() -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&UPSTREAM, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(HELLO)?;
    greeting(&mut stream)?;
    let mut back = [0; HELLO.len()];
    stream.read_exact(&mut back)?;
    if back == HELLO { Ok(stream) } else { Err(io::Error::other("the echo differs")) }
}

/// Connections of which the application heard anything.
fn heard(server: &Server) -> usize {
    server.accepted().iter().filter(|accepted| !accepted.first.is_empty()).count()
}

fn intention(node: &Node, action: &str) {
    node.culvert(&["intention", "create", "-replace", action, "web", "api"]);
}

/// What any pair must do.
fn carries(node: &Node, caller: Kind, called: Kind, server: &Server) {
    let pair = format!("{caller:?} to {called:?}");
    let _sidecars = [Sidecar::start(called, "api"), Sidecar::start(caller, "web")];
    let mut live = None;
    eventually(&format!("{pair}: a connection"), || {
        live = connect().ok();
        live.is_some()
    });
    let mut live = live.expect("just opened");
    echo(&mut live, &[7; 100_000]).unwrap_or_else(|error| panic!("{pair}: {error}"));
    let mut half = connect().expect("carried");
    half.write_all(b"and no more").expect("sent");
    half.shutdown(Shutdown::Write).expect("half closed");
    let mut answer = Vec::new();
    half.read_to_end(&mut answer).expect("the other half goes on");
    assert_eq!(answer, b"and no more", "{pair}");

    intention(node, "-deny");
    if called == Kind::Culvert {
        live.read_exact(&mut [0; 1]).expect_err("cut");
    }
    eventually(&format!("{pair}: new connections are denied"), || connect().is_err());
    let before = (heard(server), server.accepted().len());
    connect().expect_err("denied");
    assert_eq!(heard(server), before.0, "{pair}: the application heard who is denied");
    if called == Kind::Culvert {
        assert_eq!(server.accepted().len(), before.1, "{pair}: the application was connected to for who is denied");
    }
    intention(node, "-allow");
    eventually(&format!("{pair}: allowed again"), || connect().is_ok());
    for kind in ["Listener", "Cluster", "Endpoints"] {
        let refused = node.metric("culvert_xds_refusals_total", &[&format!("kind=\"{kind}\"")]);
        assert_eq!(refused, 0, "{pair}: {kind}\n{}", node.log());
    }
}

#[test]
fn sidecars_of_culvert_and_envoy_carry_each_others_connections() {
    let world = World::new("sidecar-pairs");
    let mut node = Node::start(&world, NodeOptions::default());
    register();
    let server = Server::start(vec![TcpListener::bind((Ipv4Addr::LOCALHOST, 9001)).expect("a port")]);
    for (caller, called) in [
        (Kind::Culvert, Kind::Culvert),
        (Kind::Culvert, Kind::Envoy),
        (Kind::Envoy, Kind::Culvert),
        (Kind::Envoy, Kind::Envoy),
    ] {
        carries(&node, caller, called, &server);
    }
    drop(server);
    node.leave();
}

#[test]
fn a_sidecar_tells_when_it_is_ready_outlives_its_agent_and_ends_when_its_connections_have() {
    let world = World::new("sidecar-life");
    let mut node = Node::start(&world, NodeOptions::default());
    let mut early = Sidecar::start(Kind::Culvert, "web");
    eventually("it tells its admin address", || early.admin("/stats/prometheus").is_some());
    assert!(early.admin("/ready").is_none(), "ready before anybody told it what to do");
    register();
    let called = Sidecar::start(Kind::Culvert, "api");
    let server = Server::start(vec![TcpListener::bind((Ipv4Addr::LOCALHOST, 9001)).expect("a port")]);
    for sidecar in [&early, &called] {
        eventually("it is ready", || sidecar.admin("/ready").as_deref() == Some("LIVE\n"));
    }
    let mut live = None;
    eventually("a connection", || {
        live = connect().ok();
        live.is_some()
    });
    let mut live = live.expect("just opened");
    let text = early.admin("/stats/prometheus").expect("metrics");
    assert!(text.lines().any(|line| !line.starts_with('#') && line.contains("connections")), "{text}");

    node.kill();
    echo(&mut live, GREETING).expect("carried on");
    for _ in 0..20 {
        echo(&mut connect().expect("new ones too"), GREETING).expect("carried");
    }
    node.spawn();

    // It accepts no more, and waits for who is there.
    kill(Pid::from_raw(early.process().pid), Signal::SIGTERM).expect("told to end");
    eventually("it accepts no more", || {
        TcpStream::connect_timeout(&UPSTREAM, PATIENCE)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    });
    echo(&mut live, GREETING).expect("carried on to the end");
    assert!(early.process().lives(), "it does not wait for its connections");
    drop(live);
    let status = early.child.wait().expect("it ends");
    assert!(status.success(), "{status}");
    drop((server, called));
    node.leave();
}
