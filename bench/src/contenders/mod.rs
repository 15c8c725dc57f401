//! Who is compared: plain TCP, a pair of Envoys, and culvert's two paths. Each joins the same kind of namespaces.

mod envoy;
mod mesh;
mod plain;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};
use culvert_tests::{World, eventually};

use crate::place::Place;
use mesh::Mesh;

/// Where an application listens for the proxy beside it.
const APPLICATION: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9001));
/// Where an application reaches its upstream.
const UPSTREAM: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080));

/// The agent's API.
pub(crate) const API: &str = "127.0.0.1:8500";

/// One way from caller to called.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    /// Name in tables and files.
    pub(crate) name: &'static str,
    /// Where the load generator runs.
    pub(crate) place: Place,
    /// What it connects to.
    pub(crate) target: SocketAddr,
    /// Whose processor time is counted.
    pub(crate) processes: Vec<u32>,
    /// Who holds the connections, and so the memory for them.
    pub(crate) holders: Vec<u32>,
    /// The called service, where an intention governs the path.
    pub(crate) service: Option<&'static str>,
}

/// What every ratio refers to.
pub(crate) const BASE: &str = "plain TCP";
pub(crate) const DIRECT: &str = "culvert direct";
pub(crate) const PROXIED: &str = "culvert mTLS";
pub(crate) const ENVOY: &str = "Envoy mTLS";

/// All contenders, running.
pub(crate) struct Contenders {
    mesh: Mesh,
    _plain: Running,
    _envoys: [Running; 2],
    /// In the order of reports.
    pub(crate) all: Vec<Contender>,
}

impl Contenders {
    /// Starts all of them in `world`, and waits until each carries bytes.
    pub(crate) fn start(world: &World, envoy: &Path, concurrency: usize) -> anyhow::Result<Self> {
        let folder = PathBuf::from("/run/bench");
        std::fs::create_dir_all(&folder)?;
        let plain = plain::start(world)?;
        let envoys = envoy::start(envoy, &folder, concurrency)?;
        // A task may not see the folder that we run from.
        let own = folder.join("culvert-bench");
        std::fs::copy(std::env::current_exe()?, &own).context("copy the load generator")?;
        let mesh = Mesh::start(world, &own)?;
        let (carry, worker) = (mesh.processes()?, mesh.worker()?);
        let envoy_pair: Vec<u32> = envoys.iter().map(Running::pid).collect();
        let caller = plain::inside(plain::CLIENT.0);
        let contender = |name, place: &Place, target, processes: &[u32], holders: &[u32]| Contender {
            name,
            place: place.clone(),
            target,
            processes: processes.to_vec(),
            holders: holders.to_vec(),
            service: match name {
                DIRECT => Some("echo-direct"),
                PROXIED => Some("echo-proxied"),
                _ => None,
            },
        };
        let all = vec![
            contender(BASE, &caller, plain::target(), &[], &[]),
            contender(DIRECT, &mesh.caller, mesh::DIRECT, &carry, &[]),
            contender(PROXIED, &mesh.caller, mesh::PROXIED, &carry, &[worker]),
            contender(ENVOY, &caller, UPSTREAM, &envoy_pair, &envoy_pair),
        ];
        let contenders = Self { mesh, _plain: plain, _envoys: envoys, all };
        contenders.all.iter().for_each(answers);
        Ok(contenders)
    }

    /// The path that each contender claims is the one it takes: a bench of the wrong path would be worse than none.
    pub(crate) fn verify(&self) -> anyhow::Result<()> {
        for (name, path) in [(DIRECT, "direct"), (PROXIED, "proxied")] {
            let contender = self.all.iter().find(|contender| contender.name == name).context("a contender")?;
            self.mesh.settle()?;
            let other = if path == "direct" { "proxied" } else { "direct" };
            let before = (self.mesh.connections(path), self.mesh.connections(other));
            answers(contender);
            eventually("the connection is counted", || self.mesh.connections(path) > before.0);
            ensure!(self.mesh.connections(other) == before.1, "{name} does not take the {path} path");
        }
        let envoy = self.all.iter().find(|contender| contender.name == ENVOY).context("a contender")?;
        let before = envoy::handshakes()?;
        answers(envoy);
        ensure!(envoy::handshakes()? > before, "the pair of Envoys made no TLS handshake");
        Ok(())
    }

    /// Ends all of them and removes what they made.
    pub(crate) fn leave(self) {
        self.mesh.leave();
    }
}

/// Waits until an echo comes back through `contender`.
fn answers(contender: &Contender) {
    eventually(&format!("{} answers", contender.name), || {
        let echo = Running::own_command(&contender.place, &["echo", &contender.target.to_string(), "--millis", "1"]);
        echo.is_ok_and(|mut echo| {
            echo.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
        })
    });
}

/// A process that ends when this is dropped.
pub(crate) struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let program = command.get_program().to_owned();
        command.stdin(Stdio::null()).spawn().map(Self).with_context(|| format!("start {}", program.display()))
    }

    fn own(place: &Place, arguments: &[&str]) -> anyhow::Result<Self> {
        Self::start(&mut Self::own_command(place, arguments)?)
    }

    /// This program, at another place.
    pub(crate) fn own_command(place: &Place, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("the path of this program")?);
        command.args(place.arguments()).args(arguments);
        Ok(command)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
