//! A whole node: an agent, steered by the command line and the HTTP API, with the jobs of tests.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::http::{get, get_json};
use crate::world::{DATA_DIR, World};
use crate::{binary, eventually};

/// The agent's API in every world.
pub const API: &str = "127.0.0.1:8500";

/// How a node is started.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// `encryption` at the start.
    pub encryption: &'static str,
    /// With eBPF?
    pub ebpf: bool,
    /// Further lines of configuration.
    pub settings: String,
    /// `-server`, which keeps its state, instead of `-dev`.
    pub server: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { encryption: "always", ebpf: true, settings: String::new(), server: false }
    }
}

/// A running agent. Dropping it kills the agent; [`Node::leave`] ends it properly.
#[derive(Debug)]
pub struct Node {
    folder: PathBuf,
    options: NodeOptions,
    cgroup_parent: String,
    home: PathBuf,
    agent: Option<Child>,
}

impl Node {
    /// Starts the agent and waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(world: &World, options: NodeOptions) -> Self {
        let folder = PathBuf::from("/run/test");
        std::fs::create_dir_all(&folder).expect("a folder");
        let (cgroup_parent, home) = (world.cgroup_parent(), world.home().to_owned());
        let mut node = Self { folder, options, cgroup_parent, home, agent: None };
        node.configure(node.options.encryption);
        node.spawn();
        node
    }

    /// Starts the agent again after it ended.
    ///
    /// # Panics
    /// When it does not serve.
    pub fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log");
        // The test itself may be in a cgroup of the node's: an agent belongs outside.
        let mut command = Command::new("sh");
        command.args(["-c", "echo 0 > \"$0\"/cgroup.procs && exec \"$@\""]).arg(&self.home);
        command.arg(binary("culvert")).args(["agent", "-config-file"]).arg(self.settings_path());
        command.args(["-cgroup-parent", &self.cgroup_parent]);
        if self.options.server {
            command.args(["-server", "-bind", "127.0.0.1", "-data-dir", DATA_DIR]);
        } else {
            command.arg("-dev");
        }
        if !self.options.ebpf {
            command.arg("-no-ebpf");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        self.agent = Some(command.spawn().expect("start the agent"));
        eventually("the agent serves", || {
            if let Some(status) = self.agent.as_mut().and_then(|agent| agent.try_wait().ok().flatten()) {
                panic!("the agent ended with {status}:\n{}", self.log());
            }
            get(API, "/v1/culvert/status").is_ok()
        });
    }

    fn settings_path(&self) -> PathBuf {
        self.folder.join("agent.hcl")
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("agent.log")
    }

    /// What the agent has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn configure(&self, encryption: &str) {
        let text = format!("encryption = {encryption:?}\n{}\n", self.options.settings);
        std::fs::write(self.settings_path(), text).expect("write the configuration");
    }

    /// Replaces the further lines of configuration, live.
    pub fn set(&mut self, settings: &str) {
        self.options.settings = settings.to_owned();
        self.configure(self.options.encryption);
        self.culvert(&["reload"]);
    }

    /// Switches `encryption` live.
    pub fn encrypt(&self, encryption: &str) {
        self.configure(encryption);
        self.culvert(&["reload"]);
    }

    /// Process id of the agent.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> i32 {
        let id = self.agent.as_ref().expect("the agent runs").id();
        i32::try_from(id).expect("a process id")
    }

    /// `kill -9`.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self) {
        let mut agent = self.agent.take().expect("the agent runs");
        agent.kill().expect("kill the agent");
        agent.wait().expect("reap the agent");
    }

    /// Sends a signal to the agent and waits for its end.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn end(&mut self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("signal the agent");
        self.ended();
    }

    /// Ctrl-C.
    ///
    /// # Panics
    /// When it does not run.
    pub fn interrupt(&self) {
        let pid = Pid::from_raw(self.pid());
        kill(pid, Signal::SIGINT).expect("send a signal");
    }

    /// `culvert leave`: everything is removed, the agent ends.
    ///
    /// # Panics
    /// When the agent does not end well.
    pub fn leave(&mut self) {
        self.culvert(&["leave"]);
        self.ended();
    }

    /// The agent ends by itself, and well.
    ///
    /// # Panics
    /// When it does not.
    pub fn ended(&mut self) {
        let mut agent = self.agent.take().expect("the agent runs");
        eventually("the agent ends", || agent.try_wait().expect("reap the agent").is_some());
        let status = agent.wait().expect("reap the agent");
        assert!(status.success(), "the agent ended with {status}:\n{}", self.log());
    }

    /// Runs a `culvert` command.
    ///
    /// # Panics
    /// When it fails, with what it said and the agent's log.
    pub fn culvert(&self, arguments: &[&str]) -> String {
        let output = self.try_culvert(arguments);
        assert!(
            output.status.success(),
            "culvert {}: {}: {}\n{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a `culvert` command that may fail.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn try_culvert(&self, arguments: &[&str]) -> Output {
        Command::new(binary("culvert")).args(arguments).output().expect("start culvert")
    }

    /// GET of the agent's API.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn api(&self, path: &str) -> Value {
        get_json(API, path).unwrap_or_else(|error| panic!("{path}: {error:#}\n{}", self.log()))
    }

    /// The metrics, summed over all samples of `name` whose line holds all of `labels`.
    #[must_use]
    pub fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let text = get(API, "/v1/culvert/metrics").unwrap_or_default();
        let samples = text
            .lines()
            .filter(|line| line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label)));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Runs the countdash example.
    ///
    /// # Panics
    /// When it is refused.
    pub fn run_countdash(&self) {
        // A sandboxed task has a /tmp of its own, where the workspace may lie: its programs run from this world's /run.
        let bin = self.folder.join("bin");
        std::fs::create_dir_all(&bin).expect("a folder");
        for program in ["counter-api", "counter-dashboard"] {
            std::fs::copy(binary(program), bin.join(program)).expect("copy a program");
        }
        let variable = format!("bin={}", bin.display());
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/countdash.nomad.hcl");
        self.culvert(&["job", "run", "-var", &variable, &example.to_string_lossy()]);
    }

    /// Runs a job given as text.
    ///
    /// # Panics
    /// When it is refused.
    pub fn run_job(&self, name: &str, text: &str) {
        self.culvert(&["job", "run", &self.write_job(name, text)]);
    }

    /// Writes a job file; its path.
    ///
    /// # Panics
    /// When it cannot.
    #[must_use]
    pub fn write_job(&self, name: &str, text: &str) -> String {
        let path = self.folder.join(format!("{name}.nomad.hcl"));
        std::fs::write(&path, text).expect("write the job file");
        path.display().to_string()
    }

    /// What the dashboard says of its connection.
    #[must_use]
    pub fn dashboard(&self) -> Value {
        get_json("127.0.0.1:9002", "/state").unwrap_or_default()
    }

    /// The dashboard is connected and its count grows.
    ///
    /// # Panics
    /// When it does not.
    pub fn counts(&self) {
        eventually(&format!("the dashboard is connected; log:\n{}", self.log()), || {
            self.dashboard()["connected"] == true
        });
        let before = self.dashboard()["count"].as_u64();
        eventually("the count grows", || {
            let state = self.dashboard();
            state["connected"] == true && state["count"].as_u64() > before
        });
    }

    /// The dashboard is cut off, and stays so.
    ///
    /// # Panics
    /// When it is not.
    pub fn does_not_count(&self) {
        eventually("the dashboard disconnects", || self.dashboard()["connected"] == false);
        let count = self.dashboard()["count"].clone();
        std::thread::sleep(std::time::Duration::from_secs(3));
        let state = self.dashboard();
        assert!(state["connected"] == false && state["count"] == count, "counts although denied: {state}");
    }

    /// Process id of the worker, if the agent knows one.
    #[must_use]
    pub fn worker(&self) -> Option<i32> {
        let status = self.api("/v1/culvert/status");
        status["Worker"]["Pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
    }

    /// `kill -9` of the worker.
    ///
    /// # Panics
    /// When there is none.
    pub fn kill_worker(&self) {
        let pid = self.worker().expect("a worker");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill the worker");
    }

    /// Process ids of all running tasks.
    #[must_use]
    pub fn tasks(&self) -> Vec<i32> {
        let jobs = self.api("/v1/culvert/jobs");
        let names = jobs.as_array().into_iter().flatten().filter_map(|job| job["ID"].as_str());
        let statuses: Vec<Value> = names.map(|name| self.api(&format!("/v1/culvert/job/{name}"))).collect();
        let allocations = statuses.iter().flat_map(|status| status["Allocations"].as_array().into_iter().flatten());
        let tasks = allocations.flat_map(|allocation| allocation["Tasks"].as_array().into_iter().flatten());
        tasks.filter_map(|task| i32::try_from(task["Pid"].as_i64()?).ok()).collect()
    }

    /// The first allocation of `group` in `job`.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn allocation(&self, job: &str, group: &str) -> Value {
        let status = self.api(&format!("/v1/culvert/job/{job}"));
        let allocations = status["Allocations"].as_array().cloned().unwrap_or_default();
        let found = allocations.into_iter().find(|allocation| allocation["Group"] == group);
        found.unwrap_or_else(|| panic!("no allocation of {group}: {status}"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            if std::thread::panicking() {
                println!(
                    "--- log of the agent\n{}",
                    std::fs::read_to_string(self.folder.join("agent.log")).unwrap_or_default()
                );
            }
            // A test that failed must not leave a node running: ask, then force.
            drop(Command::new(binary("culvert")).arg("leave").output());
            drop(agent.kill());
            drop(agent.wait());
        }
    }
}
