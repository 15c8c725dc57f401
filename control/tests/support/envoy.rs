//! A real Envoy, started with the bootstrap that Consul writes.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use culvert_tests::envoy;
use tempfile::TempDir;

/// A running Envoy, killed when dropped.
pub(crate) struct Envoy {
    child: Child,
    directory: TempDir,
}

impl Envoy {
    /// Starts Envoy as proxy `id`, with its control plane at `control`.
    pub(crate) fn start(id: &str, cluster: &str, control: SocketAddr) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let bootstrap = directory.path().join("bootstrap.json");
        fs::write(&bootstrap, envoy::bootstrap(id, cluster, control).to_string()).expect("bootstrap");
        let log = File::create(directory.path().join("envoy.log")).expect("log");
        let child = Command::new(envoy::binary())
            .arg("-c")
            .arg(&bootstrap)
            .args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "info"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("Envoy starts");
        Self { child, directory }
    }

    /// What it wrote so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("envoy.log")).unwrap_or_default()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let told = |line: &&str| !line.contains("[main]");
            let tail: Vec<&str> = log.lines().rev().filter(told).take(40).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            #[expect(clippy::print_stderr, reason = "a failed test shows what Envoy said")]
            {
                eprintln!("last lines of Envoy's log:\n{tail}");
            }
        }
        // Both fail only if it is gone already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
