//! A world of its own for each test: private network and mount namespaces with an empty `/run`, so that the documented
//! names can be used and tests run beside each other. Everything in it goes with the test's thread; cgroups, which have no
//! such namespace, are named after the test and removed by a guard.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use culvert_agent::task::{self, Hierarchies};
use culvert_agent::workload::{NetworkSettings, dial};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// How long anything may take on a slow and busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The place a test runs in.
pub(crate) struct World {
    /// Root of the world's files, in memory.
    pub(crate) dir: PathBuf,
    /// Parent of the world's cgroups.
    pub(crate) cgroup_parent: String,
}

impl World {
    /// The documented names, with this world's directories.
    pub(crate) fn settings(&self) -> NetworkSettings {
        NetworkSettings {
            data_dir: self.dir.join("data"),
            cgroup_parent: self.cgroup_parent.clone(),
            ..NetworkSettings::default()
        }
    }
}

struct CgroupGuard(String);

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        let hierarchies = Hierarchies::find().expect("cgroup2 was there before");
        let removed = task::kill_and_remove(&hierarchies, Path::new(&self.0));
        if !std::thread::panicking() {
            removed.expect("the test's cgroups can be removed");
        }
    }
}

/// Runs `test` in a world named `name`. Needs root: without it says so and passes, except under CI.
pub(crate) fn in_world<F: Future<Output = ()>>(name: &str, test: impl FnOnce(World) -> F + Send) {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "{name} needs root, and CI must not skip it");
        #[allow(clippy::print_stderr, reason = "a skip must be seen")]
        {
            eprintln!("SKIPPED: {name} needs root");
        }
        return;
    }
    let cgroup_parent = format!("culvert-test-{name}-{}", std::process::id());
    let _guard = CgroupGuard(cgroup_parent.clone());
    std::thread::scope(|scope| {
        let world = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, move || {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
            mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a /run of its own");
            run("ip", &["link", "set", "lo", "up"]);
            // A new netns takes its IPv4 settings over from the machine's first one.
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("no router yet");
            let dir = PathBuf::from("/run/world");
            std::fs::DirBuilder::new().mode(0o755).create(&dir).expect("a directory");
            // One blocking thread: what an abandoned step still does is over before the next one begins.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(1)
                .build()
                .expect("a runtime");
            runtime.block_on(test(World { dir, cgroup_parent }));
        });
        if let Err(panic) = world.expect("a thread").join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs a command that must succeed; returns what it printed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Runs a command that may fail; returns whether it succeeded and what it printed.
pub(crate) fn try_run(program: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

/// Waits until `probe` says yes.
pub(crate) async fn eventually(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !probe().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Adds a netns `name` joined to this one: `inside` there, `here` here, both /24 or /64.
pub(crate) fn neighbour(name: &str, here: &[&str], inside: &[&str]) -> PathBuf {
    let (outer, inner) = (format!("o-{name}"), format!("i-{name}"));
    run("ip", &["netns", "add", name]);
    run("ip", &["link", "add", &outer, "type", "veth", "peer", "name", &inner, "netns", name]);
    for address in here {
        run("ip", &["addr", "add", address, "dev", &outer, "nodad"]);
    }
    run("ip", &["link", "set", &outer, "up"]);
    for address in inside {
        run("ip", &["-n", name, "addr", "add", address, "dev", &inner, "nodad"]);
    }
    run("ip", &["-n", name, "link", "set", &inner, "up"]);
    run("ip", &["-n", name, "link", "set", "lo", "up"]);
    let deadline = Instant::now() + PATIENCE;
    // The carrier comes a moment later, the link-local addresses after duplicate address detection.
    while !run("ip", &["-o", "link", "show", &outer]).contains("state UP")
        || run("ip", &["-o", "-6", "addr", "show", &outer]).contains("tentative")
    {
        assert!(Instant::now() < deadline, "{outer} does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
    Path::new("/run/netns").join(name)
}

/// Serves `listener`: tells every client the address it is seen with, and the address it reached.
pub(crate) fn tell_addresses(listener: std::os::fd::OwnedFd) -> SocketAddr {
    let listener = TcpListener::from_std(listener.into()).expect("a non-blocking listener");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, peer)) = listener.accept().await {
            let local = stream.local_addr().expect("an address");
            let text = format!("{} {}", peer.ip().to_canonical(), local.ip().to_canonical());
            // A client that went away is the client's affair.
            drop(stream.write_all(text.as_bytes()).await);
        }
    });
    address
}

/// What [`tell_addresses`] says to a client in `netns`.
pub(crate) async fn ask_from(netns: &Path, address: &str) -> io::Result<String> {
    let address = address.parse().expect("an address");
    ask(tokio::time::timeout(Duration::from_secs(5), dial(netns, address)).await).await
}

/// What [`tell_addresses`] says to a client of this netns.
pub(crate) async fn ask_from_host(address: &str) -> io::Result<String> {
    ask(tokio::time::timeout(Duration::from_secs(5), TcpStream::connect(address)).await).await
}

async fn ask(stream: Result<io::Result<TcpStream>, tokio::time::error::Elapsed>) -> io::Result<String> {
    let mut stream = stream.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let mut text = String::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut text))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(text)
}
